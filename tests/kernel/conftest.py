"""Fixtures that need root and the kernel's FUSE."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from mpu_notify.standin.process import StandIn

from .harness import compile_c

#: Starts a stand-in with command-line options, waits until it is ready.
StartStandIn = Callable[..., StandIn]


@pytest.fixture
def standin() -> Iterator[StartStandIn]:
    """A function that starts stand-ins; the test's end stops them and sees that nothing is left."""
    started: list[StandIn] = []

    def start(*options: str) -> StandIn:
        started.append(StandIn(*options))
        return started[-1]

    yield start
    statuses = [each.stop() for each in started]
    mounts = Path("/proc/self/mounts").read_text()
    assert statuses == [0] * len(started)
    assert not [each for each in started if str(each.control_node.parent) in mounts]


@pytest.fixture(scope="session")
def caller_program(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """caller.c, compiled."""
    return compile_c(Path(__file__).with_name("caller.c"), tmp_path_factory.mktemp("caller"))
