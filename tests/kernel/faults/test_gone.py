"""A caller that is gone at a check of its id: from there on nothing is done in its name, and nothing to its memory."""

from __future__ import annotations

import json
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from mpu_notify.notify.protocol import Cause
from mpu_notify.notify.protocol import Step as Direction

from ..conftest import StartStandIn
from ..harness import ScriptedChannel, caller_host_pid, eventually, kill_and_wait_for, scripted_supervisor, under_filter
from .conftest import Record
from .gate import QUERY, Step, gate
from .record import Row
from .scene import Held

SECTION = "Caller killed just before its id is checked"


@contextmanager
def killed_after(
    step: Step, node: Path, caller_program: Path, gate_program: Path, what: str = "i"
) -> Iterator[ScriptedChannel]:
    """The channel of a caller that dies at a step of its call, with the test in the supervisor's place."""
    with (
        scripted_supervisor(node) as supervisor,
        under_filter(caller_program, node.parent, "on_demand") as caller,
    ):
        assert supervisor.monitor.process is not None
        monitor = supervisor.monitor.process.pid
        before = Held(monitor)
        channel = supervisor.attach(caller)
        caller.go()
        assert caller.line() == "up"
        with gate(gate_program, monitor, step) as held:
            caller.poke(what)
            held.reached()
            kill_and_wait_for(caller_host_pid(caller))
            held.open()
            yield channel
        eventually(lambda: Held(monitor) == before, "nothing is left of the call and its container")


def test_the_supervisor_is_not_told_of_a_caller_that_is_gone_when_its_memory_is_open(
    standin: StartStandIn, caller_program: Path, gate_program: Path, record: Record
) -> None:
    node = standin().control_node
    with killed_after(Step("maps opened", "openat", 2), node, caller_program, gate_program) as channel:
        assert channel.outcome() is Cause.CALLER_GONE, "and that is the first that it hears"
    record(Row(SECTION, "memory and maps opened", 1, "its end; the supervisor is not told of the call", "none"))


def test_the_supervisor_is_not_asked_about_the_params_of_a_caller_that_is_gone(
    standin: StartStandIn, caller_program: Path, gate_program: Path, record: Record
) -> None:
    node = standin().control_node
    last = Step("looked at the mappings of NVOS54 and params", "ioctl", 2, QUERY)
    with killed_after(last, node, caller_program, gate_program) as channel:
        channel.begun()
        assert channel.outcome() is Cause.CALLER_GONE, "and no request before"
    record(Row(SECTION, "params read", 1, "its end; the supervisor is not asked", "none"))


def test_the_driver_is_not_asked_for_a_caller_that_is_gone(
    standin: StartStandIn, caller_program: Path, gate_program: Path, record: Record, tmp_path: Path
) -> None:
    trace = tmp_path / "trace"
    node = standin("--trace", str(trace)).control_node
    with killed_after(Step("fetched", "statx", 2), node, caller_program, gate_program, "x") as channel:
        channel.begun()
        assert channel.outcome() is Cause.CALLER_GONE
    asked = [json.loads(line) for line in trace.read_text().splitlines()]
    assert any("alloc" in each for each in asked)
    assert not any("control" in each for each in asked)
    record(Row(SECTION, "file fetched", 1, "its end; the driver is not asked", "none"))


def test_memory_of_a_caller_that_is_gone_is_not_written(
    standin: StartStandIn, caller_program: Path, gate_program: Path, record: Record
) -> None:
    """Another process may share it, as the parent of a vfork does."""
    node = standin().control_node
    answered = Step("second answer taken", "recvmsg", 2)
    with (
        scripted_supervisor(node) as supervisor,
        under_filter(caller_program, node.parent, "shared_memory") as caller,
    ):
        assert supervisor.monitor.process is not None
        monitor = supervisor.monitor.process.pid
        before = Held(monitor)
        channel = supervisor.attach(caller)
        with gate(gate_program, monitor, answered) as held:
            caller.go()
            child = channel.begun().tid
            for _ in Direction:
                channel.pass_on(channel.request())
            held.reached()
            kill_and_wait_for(child)
            held.open()
        assert channel.outcome() is Cause.CALLER_GONE
        caller.poke()
        assert caller.line() == "same=1"
        eventually(lambda: Held(monitor) == before, "nothing is left of the call and its container")
    record(Row(SECTION, "answer there", 1, "its end; its memory is not written", "none"))
