"""The guest, and what the tests ask of it."""

from __future__ import annotations

import json
import subprocess
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from tests.kernel.harness import compile_c

from .guest import BUILD, REPOSITORY, Guest

#: Plays a scene in the guest, see scene.py; what it has to say.
Play = Callable[..., Any]


@pytest.fixture(scope="session")
def _prepared() -> None:
    for script in ("install.sh", "clients.sh"):
        subprocess.run([Path(__file__).with_name(script)], check=True)


@pytest.fixture(scope="session")
def caller_program(_prepared: None) -> Path:
    """The kernel tests' caller.c, compiled here: there it takes long."""
    return compile_c(REPOSITORY / "tests" / "kernel" / "caller.c", BUILD)


@pytest.fixture(scope="session")
def hostile_program(_prepared: None) -> Path:
    """The same of the fault tests' hostile.c."""
    return compile_c(REPOSITORY / "tests" / "kernel" / "faults" / "hostile.c", BUILD)


@pytest.fixture(scope="session")
def guest(caller_program: Path) -> Iterator[Guest]:  # noqa: ARG001 - the guest sees what was there when it looked first
    """A guest for the session, or for as long as it answers."""
    with Guest() as running:
        yield running


@pytest.fixture
def play(guest: Guest) -> Play:
    """A function that plays a scene."""

    def play(*arguments: str | Path) -> Any:
        done = guest.run("python", "-m", "tests.vm.scene", *arguments)
        assert done.status == 0, guest.console()
        return json.loads(done.output.splitlines()[-1])

    return play
