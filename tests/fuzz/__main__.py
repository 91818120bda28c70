"""Fuzz the C entry points for as long as you like: `make fuzz SECONDS=600`."""

from __future__ import annotations

import argparse
import sys

from .fuzzing import BUILD, TARGETS, FuzzError, build, fuzz_all, keep


def _parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="python -m tests.fuzz", description=__doc__)
    parser.add_argument("targets", nargs="*", metavar="TARGET", help=f"of {', '.join(TARGETS)} (default: all)")
    parser.add_argument("--seconds", type=int, default=60, help="for each target (default %(default)s)")
    parser.add_argument("--keep", action="store_true", help="do not fuzz: reduce what was found to the kept inputs")
    arguments = parser.parse_args()
    arguments.targets = arguments.targets or TARGETS
    unknown = set(arguments.targets) - set(TARGETS)
    if unknown:
        parser.error(f"no such target: {', '.join(sorted(unknown))}")
    return arguments


def main() -> int:
    """Say what failed and how to see it again; 1 where anything did."""
    arguments = _parse()
    if arguments.keep:
        return _keep(arguments.targets)
    outcomes = fuzz_all(arguments.targets, arguments.seconds)
    for target, outcome in outcomes.items():
        print(f"{target}: {outcome}")
    if any(isinstance(outcome, FuzzError) for outcome in outcomes.values()):
        return 1
    print(f"Nothing failed; new inputs are in {BUILD / 'found'}.")
    return 0


def _keep(targets: list[str]) -> int:
    build(targets)
    try:
        for target in targets:
            keep(target)
    except FuzzError as error:
        print(error, file=sys.stderr)
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
