"""Fixtures of the fault matrix."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Protocol

import pytest

from ..conftest import StartStandIn
from ..harness import compile_c
from ..test_serve import Daemon
from .record import Row, append
from .scene import Scene

#: Notes what a fault did.
Record = Callable[[Row], None]


@pytest.fixture(scope="session")
def record(pytestconfig: pytest.Config) -> Record:
    """A function that appends a row to the file of the option --rows; without that, to none."""
    file: Path | None = pytestconfig.getoption("rows")
    return lambda row: append(file, row) if file else None


@pytest.fixture
def daemon(tmp_path: Path, standin: StartStandIn) -> Iterator[Daemon]:
    """A daemon before a driver of the host era."""
    driver = standin("--era", "host")
    started = Daemon(tmp_path, driver.control_node)
    started.driver = driver.pid
    yield started
    started.end()


class MakeScene(Protocol):
    """Starts a daemon before a driver of the host era; the time is how long its supervisor may be silent."""

    def __call__(self, silence_s: float = ...) -> Scene: ...


@pytest.fixture
def make_scene(tmp_path: Path, standin: StartStandIn, caller_program: Path) -> Iterator[MakeScene]:
    made: list[Scene] = []

    def make(silence_s: float = 10) -> Scene:
        made.append(Scene(tmp_path, standin("--era", "host"), caller_program, silence_s))
        return made[-1]

    yield make
    for scene in made:
        scene.daemon.end()


@pytest.fixture(scope="session")
def gate_program(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """gate.c, compiled."""
    return compile_c(Path(__file__).with_name("gate.c"), tmp_path_factory.mktemp("gate"))
