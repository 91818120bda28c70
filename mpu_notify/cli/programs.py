"""The C programs under the names that people and unit files use. Engines call them where they are, without this."""

from __future__ import annotations

import os
import sys
from typing import NoReturn

from mpu_notify.notify.monitor import PROGRAM


def monitor() -> NoReturn:
    """Become the monitor."""
    _become("mpu-notify-monitor")


def runtime() -> NoReturn:
    """Become the OCI runtime."""
    _become("mpu-notify-runtime")


def hook() -> NoReturn:
    """Become the OCI hook."""
    _become("mpu-notify-hook")


def _become(name: str) -> NoReturn:
    os.execv(PROGRAM.with_name(name), [name, *sys.argv[1:]])  # noqa: S606 - our own program
