"""``mpu-notify doctor``: what the loaded driver does, what mpu-notify will do about it here, and what is in its way."""

from __future__ import annotations

import argparse
import json
import os
import platform
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

from mpu_notify.cli import options
from mpu_notify.notify import filter as seccomp
from mpu_notify.notify import native
from mpu_notify.notify.monitor import PROGRAM, accepts
from mpu_notify.pidns import PidNamespaceError, require_initial_namespace
from mpu_notify.pidns.views import namespace_ioctls_work
from mpu_notify.rm import eras
from mpu_notify.rm.controls import CONTROLS, LEFT_ALONE, sizes_of
from mpu_notify.supervisor import configuration, probe
from mpu_notify.supervisor.driver import Finding

DESCRIPTION = """\
Say which driver is loaded, what it does with PIDs by itself (its era) and how
that was found; which controls mpu-notify translates here and why, and which it
leaves to the driver; and what is missing or in the way.

The driver is asked where that is possible, which makes a short-lived process
that uses the first GPU; else what was kept of an earlier answer, or flavour and
version, tells.
"""

EPILOG = """\
exit status:
  0 if nothing is in the way of mpu-notify; 1 if something is; 2 for wrong usage.

examples:
  mpu-notify doctor
  mpu-notify doctor --json
"""

_OLDEST_KERNEL = (5, 9)
_WAKE_UP_KERNEL = (6, 6)
_ACTIONS = Path("/proc/sys/kernel/seccomp/actions_avail")


class Check(NamedTuple):
    """Something that was looked at: whether it is as it should be, and whether anything works without it."""

    ok: bool
    needed: bool
    text: str

    @property
    def mark(self) -> str:
        """In the margin."""
        return "ok" if self.ok else "PROBLEM" if self.needed else "not here"


class Verdict(NamedTuple):
    """What becomes of a control here, and why."""

    control: str
    cmd: int
    sizes: list[int]
    translated: bool
    why: str


def register(subparsers: options.Subparsers) -> None:
    """Add the verb to the command line."""
    parser = options.add_verb(subparsers, "doctor", "say what is done here, and what is wrong", DESCRIPTION, EPILOG)
    options.add_device(parser)
    options.add_translate(parser)
    parser.add_argument("--json", action="store_true", help="print a JSON object instead of text")
    parser.set_defaults(func=main)


def main(args: argparse.Namespace) -> int:
    """Run the verb; returns the exit status."""
    node = Path(args.device)
    found = probe.finding_if_possible(node)
    verdicts = judge(found, everything=args.translate == "always")
    checks = list(look_around(node))
    if args.json:
        print(json.dumps(_document(found, verdicts, checks), indent=2))
    else:
        print("\n".join(_lines(found, verdicts, checks)))
    return int(any(check.needed and not check.ok for check in checks))


def judge(found: Finding, *, everything: bool) -> list[Verdict]:
    """What becomes of each control in the table."""
    verdicts = []
    for cmd, name in {control.cmd: control.name for control in CONTROLS}.items():
        wrong = eras.wrong_by_itself(found.era, cmd)
        why = wrong or ("as --translate always wants it" if everything else "the driver gets it right by itself")
        verdicts.append(Verdict(name, cmd, list(sizes_of(cmd)), everything or wrong is not None, why))
    return verdicts


def look_around(node: Path) -> Iterator[Check]:
    """What mpu-notify needs and would like to have."""
    yield _namespace()
    yield _control_node(node)
    yield _kernel()
    actions = _ACTIONS.read_text(encoding="ascii").split() if _ACTIONS.exists() else []
    yield Check("user_notif" in actions, needed=True, text="the kernel has seccomp user notification")
    yield _library()
    yield Check(os.access(PROGRAM, os.X_OK), needed=True, text=f"the monitor is installed: {PROGRAM}")
    yield Check(
        native.filter_flags_known(native.WAIT_KILLABLE_RECV),
        needed=False,
        text="the kernel keeps signals from a call that is being translated (WAIT_KILLABLE_RECV, Linux 5.19)",
    )
    yield Check(
        _kernel_version() >= _WAKE_UP_KERNEL,
        needed=False,
        text="the kernel wakes the monitor on the caller's CPU, which is faster (SYNC_WAKE_UP, Linux 6.6)",
    )
    yield Check(
        namespace_ioctls_work(),
        needed=False,
        text="the kernel translates PIDs itself, which is faster than reading /proc (NS_GET_*_PIDNS, Linux 6.11)",
    )
    socket = Path(configuration.load(None).socket)
    yield Check(accepts(socket), needed=False, text=f"mpu-notify serve accepts containers on {socket}")


def _namespace() -> Check:
    try:
        require_initial_namespace()
    except PidNamespaceError as error:
        return Check(ok=False, needed=True, text=str(error))
    return Check(ok=True, needed=True, text="this is the initial PID namespace")


def _control_node(node: Path) -> Check:
    try:
        os.close(os.open(node, os.O_RDWR | os.O_CLOEXEC))
    except OSError as error:
        todo = "load the NVIDIA driver, or name the control node with --device"
        return Check(ok=False, needed=True, text=f"cannot open the control node {node}: {error.strerror}; {todo}")
    return Check(ok=True, needed=True, text=f"the control node {node} can be opened")


def _kernel_version() -> tuple[int, ...]:
    return tuple(int(part) for part in re.findall(r"\d+", platform.release())[:2])


def _kernel() -> Check:
    oldest = ".".join(map(str, _OLDEST_KERNEL))
    return Check(
        _kernel_version() >= _OLDEST_KERNEL, needed=True, text=f"Linux {oldest} or later: {platform.release()}"
    )


def _library() -> Check:
    try:
        seccomp.build_native()
    except (seccomp.LibseccompError, seccomp.UnsupportedMachineError) as error:
        return Check(ok=False, needed=True, text=str(error))
    return Check(ok=True, needed=True, text="there is a filter for this machine")


def _document(found: Finding, verdicts: list[Verdict], checks: list[Check]) -> dict[str, Any]:
    driver = found.identity.driver
    return {
        "driver": driver and {"flavour": driver.flavour.value, "version": driver.version},
        "era": found.era.value if found.era else None,
        "how": found.how.value,
        "seen": found.seen,
        "controls": [verdict._asdict() for verdict in verdicts],
        "left_alone": [{"control": name, "cmd": cmd, "why": why} for cmd, (name, why) in LEFT_ALONE.items()],
        "checks": [check._asdict() for check in checks],
    }


def _lines(found: Finding, verdicts: list[Verdict], checks: list[Check]) -> Iterator[str]:
    yield f"Driver: {found.identity.driver or f'none that {eras.VERSION_FILE} names'}"
    era = f"{found.era.value}: {eras.DESCRIPTIONS[found.era]}" if found.era else "unknown: everything is translated"
    yield f"Era: {era}"
    yield f"Found: {found.how.value}{': ' if found.seen else ''}{found.seen}"
    for title, translated in (("Translated:", True), ("Left to the driver:", False)):
        rows = [verdict for verdict in verdicts if verdict.translated is translated]
        yield from ("", title) if rows else ()
        yield from (f"  {row.control} ({row.cmd:#x}): {row.why}" for row in rows)
    yield from ("", "Carry PIDs and are left alone:")
    yield from (f"  {name} ({cmd:#x}): {why}" for cmd, (name, why) in LEFT_ALONE.items())
    yield from ("", "Here:")
    yield from (f"  {check.mark}: {check.text}" for check in checks)
