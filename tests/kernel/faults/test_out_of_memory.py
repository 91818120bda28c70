"""No memory for the only thing that a call may allocate. (With a sanitizer the monitor has another allocator.)"""

from __future__ import annotations

from pathlib import Path

from mpu_notify.notify.monitor import PROGRAM, Monitor, identify
from mpu_notify.notify.protocol import Cause
from mpu_notify.notify.protocol import Step as Direction
from mpu_notify.rm.controls import GPU_PIDS
from mpu_notify.supervisor.service import MONITORED

from ..conftest import StartStandIn
from ..harness import ScriptedChannel, caller_host_pid, compile_c, under_filter
from .conftest import Record
from .record import Row
from .scene import THE_DRIVERS_OWN, in_words
from .test_errnos import SECTION


def test_a_monitor_without_memory_for_one_more_control_leaves_the_call_to_the_driver(
    standin: StartStandIn, caller_program: Path, tmp_path: Path, record: Record
) -> None:
    library = compile_c(Path(__file__).with_name("fail_realloc.c"), tmp_path, "-shared", "-fPIC")
    wrapper = tmp_path / "monitor"
    wrapper.write_text(f'#!/bin/sh\nexec env LD_PRELOAD={library} {PROGRAM} "$@"\n')
    wrapper.chmod(0o755)
    node = standin("--era", "host").control_node
    with (
        Monitor.start(identify(node), MONITORED, program=wrapper) as monitor,
        under_filter(caller_program, node.parent, "on_demand") as caller,
    ):
        monitor.attach(caller.listener, b"{}")
        arrival = monitor.receive()
        assert arrival is not None
        channel = ScriptedChannel(arrival.channel)
        caller.go()
        assert caller.line() == "up"
        own = f"pids= {caller_host_pid(caller)}"
        caller.poke()
        channel.channel.perform(channel.up_to(Direction.OUT), GPU_PIDS.cmd, bytes(GPU_PIDS.size))
        assert caller.line() == own
        assert channel.outcome() is Cause.SUPERVISOR_GONE
        caller.poke()
        assert channel.pass_all_on() is Cause.TRANSLATED, "the next call is asked about again"
    record(Row(SECTION, "memory for one more control (realloc): ENOMEM", 1, in_words(THE_DRIVERS_OWN), "none"))
