"""Each part killed, stopped, starved or frozen at every step of a call: what the caller gets, and what is left."""

from __future__ import annotations

import os
import signal
import subprocess
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager
from pathlib import Path
from typing import NamedTuple

import pytest

from mpu_notify.standin.process import StandIn

from ..harness import eventually, kill_and_wait_for, stop_and_wait_for
from .cgroups import frozen, starved
from .conftest import MakeScene, Record
from .gate import SECTION, STEPS, Step, gate, is_from
from .record import Row
from .scene import NO_SYSTEM_CALL, NOT_CONNECTED, THE_DRIVERS_OWN, TRANSLATED, Scene, in_words


@contextmanager
def supervisor_killed(scene: Scene) -> Iterator[None]:
    scene.daemon.process.kill()
    scene.daemon.process.wait()
    yield
    scene.daemon.start()


@contextmanager
def stopped(pid: int) -> Iterator[None]:
    stop_and_wait_for(pid)
    try:
        yield
    finally:
        os.kill(pid, signal.SIGCONT)


@contextmanager
def monitor_killed(scene: Scene) -> Iterator[None]:
    monitor = scene.daemon.find_monitor()
    kill_and_wait_for(monitor)
    yield
    eventually(lambda: scene.daemon.find_monitor() != monitor, "there is another monitor")


@contextmanager
def caller_signalled(scene: Scene) -> Iterator[None]:
    """By one that it catches, and that restarts nothing."""
    os.kill(scene.host_pid, signal.SIGUSR1)
    yield


@contextmanager
def signalled_to_stop(pid: int) -> Iterator[None]:
    """It stops when its call returns, and not before."""
    os.kill(pid, signal.SIGSTOP)
    yield
    eventually(lambda: " T " in Path(f"/proc/{pid}/stat").read_text(), "the caller has stopped")
    os.kill(pid, signal.SIGCONT)


def until_the_last_answer(step: Step) -> set[str]:
    """What the supervisor has not answered yet goes to the driver. It may be quicker than its end."""
    if step.name == "second request sent":
        return {TRANSLATED, THE_DRIVERS_OWN}
    return {TRANSLATED} if is_from(step, "second answer taken") else {THE_DRIVERS_OWN}


def until_the_reply(step: Step) -> set[str]:
    return {TRANSLATED} if step.name == "replied" else {THE_DRIVERS_OWN}


def always_translated(_: Step) -> set[str]:
    return {TRANSLATED}


class Fault(NamedTuple):
    """What is done while the call is held, and undone once it has gone on."""

    name: str
    strikes: Callable[[Scene], AbstractContextManager[None]]
    gives: Callable[[Step], set[str]]
    is_outlived: bool = False  # the caller gets its answer while the fault lasts
    silence_s: float = 10


FREEZERS = {"cgroup": "cgroup v1", "cgroup2": "cgroup v2"}

FAULTS = [
    Fault("supervisor killed", supervisor_killed, until_the_last_answer, is_outlived=True),
    Fault(
        "supervisor stopped, and continued later",
        lambda scene: stopped(scene.daemon.process.pid),
        until_the_last_answer,
        is_outlived=True,
        silence_s=0.1,
    ),
    Fault("supervisor starved", lambda scene: starved(scene.daemon.process.pid), always_translated, is_outlived=True),
    Fault("monitor killed", monitor_killed, until_the_reply, is_outlived=True),
    Fault("monitor stopped and continued", lambda scene: stopped(scene.daemon.find_monitor()), always_translated),
    *(
        Fault(
            f"monitor frozen and thawed ({name})",
            lambda scene, kind=kind: frozen(scene.daemon.find_monitor(), kind),  # type: ignore[misc]
            always_translated,
        )
        for kind, name in FREEZERS.items()
    ),
    Fault("monitor starved", lambda scene: starved(scene.daemon.find_monitor()), always_translated, is_outlived=True),
    Fault("driver stopped and continued", lambda scene: stopped(scene.driver.pid), always_translated),
    Fault("driver starved", lambda scene: starved(scene.driver.pid), always_translated, is_outlived=True),
    Fault("caller signalled", caller_signalled, always_translated),
    Fault("caller stopped and continued", lambda scene: signalled_to_stop(scene.host_pid), always_translated),
    Fault("caller starved", lambda scene: starved(scene.host_pid), always_translated, is_outlived=True),
    *(
        Fault(
            f"caller frozen and thawed ({name})",
            lambda scene, kind=kind: frozen(scene.host_pid, kind),  # type: ignore[misc]
            always_translated,
        )
        for kind, name in FREEZERS.items()
    ),
]


def answer_at(scene: Scene, step: Step, fault: Fault, gate_program: Path) -> str:
    with gate(gate_program, scene.daemon.find_monitor(), step) as held:
        scene.caller.poke("i")
        held.reached()
        with fault.strikes(scene):
            held.open()
            if fault.is_outlived:
                return scene.caller.line()
        return scene.caller.line()


@pytest.mark.parametrize("fault", FAULTS, ids=lambda fault: fault.name)
def test_a_fault_at_any_step_gives_the_caller_an_answer_and_leaves_nothing_behind(
    make_scene: MakeScene, gate_program: Path, record: Record, fault: Fault
) -> None:
    scene = make_scene(fault.silence_s)
    with scene.container():
        with fault.strikes(scene):  # once without a call: what the second supervisor has is what is to be left
            pass
        scene.wait_until_translated()
        before = scene.held()
        for step in STEPS:
            got = answer_at(scene, step, fault, gate_program)
            assert got in fault.gives(step), (fault.name, step.name)
            scene.wait_until_translated()
            eventually(lambda: scene.held() == before, f"nothing is left of '{fault.name}' at '{step.name}'")
            record(Row(SECTION, fault.name, 1, in_words(got), "none"))


def test_a_caller_killed_at_any_step_leaves_nothing_behind(
    make_scene: MakeScene, gate_program: Path, record: Record
) -> None:
    scene = make_scene()
    for step in STEPS:
        with (
            scene.leaves_nothing(),
            scene.container(),
            gate(gate_program, scene.daemon.find_monitor(), step) as held,
        ):
            scene.caller.poke("i")
            held.reached()
            kill_and_wait_for(scene.host_pid)
            held.open()
        record(Row(SECTION, "caller killed", 1, "its end", "none"))
    warned = [line for line in scene.daemon.log.read_text().splitlines() if " warning " in line]
    assert not warned, "that a caller has died is no fault of anything"


@pytest.mark.parametrize("step", [STEPS[0], STEPS[11], STEPS[-2]], ids=lambda step: step.name)
def test_monitor_and_supervisor_killed_at_once_is_where_it_ends(
    make_scene: MakeScene, gate_program: Path, record: Record, step: Step
) -> None:
    scene = make_scene()
    with scene.container():
        monitor = scene.daemon.find_monitor()
        with Path(os.devnull).open() as null:  # the test's own duplicate of the listener would keep the caller waiting
            os.dup2(null.fileno(), scene.caller.listener)
        with gate(gate_program, monitor, step) as held:
            scene.caller.poke("i")
            held.reached()
            scene.daemon.process.kill()
            scene.daemon.process.wait()
            kill_and_wait_for(monitor)
            held.open()
        assert scene.caller.line().startswith(NO_SYSTEM_CALL)
        assert scene.ask().startswith(NO_SYSTEM_CALL)
        fault = "monitor and supervisor killed at once, and nobody keeps the listeners"
        record(Row(SECTION, fault, 1, in_words(NO_SYSTEM_CALL), "none"))
    scene.daemon.start()


@pytest.fixture
def mortal(tmp_path: Path, caller_program: Path) -> Iterator[Scene]:
    """A scene whose driver the test kills: its mount is left, without a server."""
    driver = StandIn("--era", "host")
    scene = Scene(tmp_path, driver, caller_program)
    yield scene
    scene.daemon.end()
    subprocess.run(["umount", driver.control_node.parent], check=True)
    driver.stop()


def killed_in_the_ioctl(scene: Scene) -> None:
    """The driver is, while it works on the call."""
    monitor = scene.daemon.find_monitor()
    stop_and_wait_for(scene.driver.pid)
    scene.caller.poke("i")
    eventually(lambda: scene.daemon.calls_of(monitor) == 1, "the monitor waits for the driver")
    kill_and_wait_for(scene.driver.pid)


#: Where something is done with the driver's file, and the moments before and after.
WITH_THE_DRIVER = (
    "first answer taken",
    "file looked at",
    "file fetched",
    "before the ioctl",
    "ioctl made",
    "file closed",
)


@pytest.mark.parametrize("step", [*(step for step in STEPS if step.name in WITH_THE_DRIVER), None])
def test_a_driver_that_dies_gives_the_caller_what_it_gives_without_us(
    mortal: Scene, gate_program: Path, record: Record, step: Step | None
) -> None:
    scene = mortal
    with scene.container():
        before = scene.held()
        if step is None:
            killed_in_the_ioctl(scene)
        else:
            with gate(gate_program, scene.daemon.find_monitor(), step) as held:
                scene.caller.poke("i")
                held.reached()
                kill_and_wait_for(scene.driver.pid)
                held.open()
        got = scene.caller.line()
        assert got.startswith(TRANSLATED if step and is_from(step, "ioctl made") else NOT_CONNECTED)
        assert scene.ask().startswith(NOT_CONNECTED), "and later calls, too"
        eventually(lambda: scene.held() == before, "nothing is left of the call")
        record(Row(SECTION, "driver killed (before, in and after its ioctl)", 1, in_words(got), "none"))
