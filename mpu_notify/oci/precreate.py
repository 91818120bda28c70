"""The `precreate` hook of Podman and CRI-O: a spec on standard input, the one to use on standard output.

    python3 -I -S precreate.py [--config FILE]

Podman gives it no environment: a user's own configuration must be named.
A container that did not opt in, or whose agent is absent, gets its spec back byte for byte. Which runtime gets the spec
is not known here, so it has only the flags that every runtime in PATH takes; nor is the container's id, which the agent
learns with the listener.
"""

# Pathlib would be a large part of the time.
# ruff: noqa: PTH100, PTH120

from __future__ import annotations

import json
import os
import sys

if __name__ == "__main__":  # -I -S: nothing but the standard library is found by itself
    sys.path.append(os.path.dirname(os.path.dirname(os.path.dirname(os.path.abspath(__file__)))))

from mpu_notify.errors import MpuNotifyError
from mpu_notify.oci import agent, flags, settings, spec


def main() -> int:
    """Run the hook; returns its exit status."""
    text = sys.stdin.buffer.read()
    try:
        sys.stdout.buffer.write(_edit(text, _configuration(sys.argv[1:])))
    except MpuNotifyError as error:
        sys.stderr.write(f"mpu-notify-hook: {error}\n")
        return 1
    return 0


def _configuration(words: list[str]) -> str:
    if not words:
        return ""
    if len(words) != 2 or words[0] != "--config":  # noqa: PLR2004 - the option and its value
        raise MpuNotifyError(f"cannot understand the hook's arguments {words}: it takes --config FILE, or none")
    return words[1]


def _edit(text: bytes, configuration: str) -> bytes:
    try:
        before = json.loads(text)
    except (ValueError, RecursionError):
        return text  # which the runtime says better
    ours = settings.load(configuration)
    if not spec.opted_in(before):
        return text
    if not agent.is_there(ours):
        warning = f"{agent.absence(ours)} A container starts without mpu-notify."
        sys.stderr.write(f"mpu-notify-hook: {warning}\n")
        agent.warn("mpu-notify-hook", warning)
        return text
    metadata = agent.metadata("", "precreate")
    after = spec.rewrite(before, ours.socket, metadata, flags.taken_by_all(), os.uname().machine)
    return json.dumps(after).encode() if after != before else text


if __name__ == "__main__":
    sys.exit(main())
