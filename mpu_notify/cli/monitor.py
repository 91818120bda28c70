"""``mpu-notify-monitor``: the monitor's program, under the name that unit files use."""

from __future__ import annotations

import os
import sys

from mpu_notify.notify.monitor import PROGRAM


def main() -> int:
    """Become the monitor."""
    os.execv(PROGRAM, ["mpu-notify-monitor", *sys.argv[1:]])  # noqa: S606 - our own program
