"""What all tests need."""

from __future__ import annotations

import os
import signal
from pathlib import Path
from sysconfig import get_path

import pytest
from hypothesis import settings


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption("--rows", type=Path, metavar="FILE", help="append what each fault did (tests/kernel/faults)")
    parser.addoption("--calls", type=int, default=2000, metavar="N", help="how many the soak makes (default 2000)")


def pytest_configure(config: pytest.Config) -> None:  # noqa: ARG001 - pytest's signature
    """The tests start the commands of the installation that they run in, with signals as a shell has them.

    Whoever starts the tests may ignore some (nohup, a shell's background): programs would inherit that.
    """
    for number in (signal.SIGHUP, signal.SIGQUIT, signal.SIGTERM, signal.SIGCHLD, signal.SIGUSR1, signal.SIGUSR2):
        signal.signal(number, signal.SIG_DFL)
    signal.signal(signal.SIGINT, signal.default_int_handler)
    # How long an example takes says something about the machine, not about the code.
    settings.register_profile("untimed", deadline=None)
    settings.load_profile("untimed")
    os.environ["PATH"] = f"{Path(get_path('scripts'))}{os.pathsep}{os.environ['PATH']}"
