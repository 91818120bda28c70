"""A list behind a pointer, whose count is asked with and answered in one place: the driver must find what was asked."""

from __future__ import annotations

import errno
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import NamedTuple

import pytest

from ..harness import Caller, caller_host_pid, eventually, kill_and_wait_for, system_calls, under_filter
from .conftest import MakeScene, Record
from .gate import SECTION, STEPS, Step, gate
from .record import Row
from .scene import THE_DRIVERS_OWN, Scene, in_words
from .test_errnos import SECTION as SECTION_OF_ERRNOS

IOCTL = 16  # asm/unistd_64.h

#: The caller's table, its params, NVOS54.
WRITES = [1, 2, 3]


TRANSLATED_ENCODERS = "encoders=1 pid=1 codec=0 width=1920 stale=0"


class Encoders(NamedTuple):
    """A caller that asks for the table of encoder sessions once, and the monitor that receives that."""

    caller: Caller
    monitor: int
    own: str  # what the driver says, if it is asked with room for more sessions than one


@contextmanager
def encoders(scene: Scene, case: str = "encoders") -> Iterator[Encoders]:
    with (
        scene.leaves_nothing(),
        under_filter(scene.caller_program, scene.daemon.node.parent, case) as caller,
    ):
        scene.daemon.attach(caller)
        monitor = scene.daemon.find_monitor()
        eventually(lambda: scene.daemon.listeners_of(monitor) == 1, "the listener is served")
        eventually(lambda: scene.daemon.says("attached container=one"), "the supervisor knows")
        yield Encoders(caller, monitor, f"encoders=1 pid={caller_host_pid(caller)} codec=0 width=1920 stale=0")


@pytest.mark.parametrize("nth", WRITES)
@pytest.mark.parametrize("error", ["EFAULT", "ENOMEM"])
def test_a_table_behind_a_pointer_that_cannot_be_written_is_the_drivers_to_write(
    make_scene: MakeScene, gate_program: Path, record: Record, nth: int, error: str
) -> None:
    write = Step("write", "pwrite64", nth, moment="enter")
    with (
        encoders(make_scene()) as asking,
        gate(gate_program, asking.monitor, write, -getattr(errno, error)) as held,
    ):
        asking.caller.go()
        held.reached()
        held.open()
        assert asking.caller.line() == asking.own
    fault = "writing a table behind a pointer, params, NVOS54: EFAULT, ENOMEM"
    record(Row(SECTION_OF_ERRNOS, fault, 1, in_words(THE_DRIVERS_OWN), "none"))


@pytest.mark.parametrize("nth", WRITES)
def test_a_monitor_that_is_killed_after_a_write_leaves_the_driver_what_it_was_asked_with(
    make_scene: MakeScene, gate_program: Path, record: Record, nth: int
) -> None:
    with (
        encoders(make_scene()) as asking,
        gate(gate_program, asking.monitor, Step("written", "pwrite64", nth)) as held,
    ):
        asking.caller.go()
        held.reached()
        kill_and_wait_for(asking.monitor)
        held.open()
        assert asking.caller.line() == asking.own
    fault = "monitor killed after writing a table behind a pointer, params, NVOS54"
    record(Row(SECTION, fault, 1, in_words(THE_DRIVERS_OWN), "none"))


def test_nothing_is_put_back_once_the_caller_has_its_answer(make_scene: MakeScene, gate_program: Path) -> None:
    scene = make_scene()
    with (
        encoders(scene, "encoders_kept") as asking,
        gate(gate_program, asking.monitor, STEPS[-1]) as held,
    ):
        asking.caller.go()
        held.reached()
        assert asking.caller.line() == TRANSLATED_ENCODERS
        kill_and_wait_for(asking.monitor)
        held.open()
        eventually(lambda: IOCTL in system_calls(scene.daemon.find_monitor()), "the next monitor receives")
        asking.caller.poke()
        assert asking.caller.line() == "count=1"


def test_nothing_of_an_earlier_call_is_put_back_in_a_later_one(make_scene: MakeScene, gate_program: Path) -> None:
    with encoders(make_scene(), "encoders_kept") as asking:
        asking.caller.go()
        assert asking.caller.line() == TRANSLATED_ENCODERS
        asking.caller.poke()
        assert asking.caller.line() == "count=1"
        with gate(gate_program, asking.monitor, Step("params written", "pwrite64")) as held:
            asking.caller.poke("i")
            held.reached()
            kill_and_wait_for(asking.monitor)
            held.open()
            assert asking.caller.line() == THE_DRIVERS_OWN
