"""``mpu-notify probe``: ask the driver what it does with PIDs by itself, and keep the answer."""

from __future__ import annotations

import argparse
from pathlib import Path

from mpu_notify.cli import options
from mpu_notify.supervisor import driver, probe

DESCRIPTION = f"""\
Ask the driver what it does with PIDs by itself, its era, and keep the answer for
serve and run: in {driver.ERA_FILE}, unless told otherwise.

For a moment this makes a process in a PID namespace of its own that uses the
first GPU. It is a one-shot for root, to be repeated when another driver has been
loaded; an answer of an earlier driver is recognised and not used. Without it
serve asks when it starts, as root, and everybody else goes by the driver's
flavour and version.
"""

EPILOG = """\
exit status:
  0 if the driver answered and that was kept; 1 if not; 2 for wrong usage.

examples:
  mpu-notify probe
  mpu-notify probe --write /run/somewhere/era.json
"""


def register(subparsers: options.Subparsers) -> None:
    """Add the verb to the command line."""
    parser = options.add_verb(subparsers, "probe", "ask the driver what it does with PIDs", DESCRIPTION, EPILOG)
    options.add_device(parser)
    told = "where to keep the answer (default: %(default)s)"
    parser.add_argument("--write", metavar="FILE", type=Path, default=driver.ERA_FILE, help=told)
    parser.set_defaults(func=main)


def main(args: argparse.Namespace) -> int:
    """Run the verb; returns the exit status."""
    found = probe.finding(Path(args.device))
    driver.write(found, args.write)
    print(f"{found.era.value if found.era else 'unknown'}: {found.seen}")
    return 0
