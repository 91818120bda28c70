"""The way through, step by step: a real monitor, with the test in the supervisor's place."""

from __future__ import annotations

import os
import re
import resource
import signal
import socket
import struct
import subprocess
import threading
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from mpu_notify.notify import protocol
from mpu_notify.notify.monitor import PROGRAM, Monitor, MonitorError, identify
from mpu_notify.notify.protocol import Cause, Ended, Message, Outcome, Performed, Request, Step
from mpu_notify.rm.controls import GPU_PID_INFO, GPU_PIDS, NVENC_SESSIONS
from mpu_notify.supervisor.service import MONITORED

from .conftest import StartStandIn
from .crowd import Node, crowd
from .harness import (
    HAS_PIDFD_THREAD,
    SECONDS,
    Caller,
    ScriptedChannel,
    ScriptedSupervisor,
    caller_host_pid,
    eventually,
    injected,
    kill_and_wait_for,
    scripted_supervisor,
    stop_and_wait_for,
    system_calls,
    under_filter,
)


class Scene:
    """A caller that asks on demand, before a supervisor that is the test."""

    def __init__(self, caller: Caller, supervisor: ScriptedSupervisor, node: Path = Path("/nowhere")) -> None:
        self.node = node
        self.caller = caller
        self.supervisor = supervisor
        self.channel = supervisor.attach(caller)
        caller.go()
        assert caller.line() == "up"
        self.host_pid = caller_host_pid(caller)

    def ask(self, what: str, step: Step) -> Request:
        """Have the caller make a call; its request of this step."""
        self.caller.poke(what)
        return self.channel.up_to(step)

    def what_the_driver_says(self, what: str) -> str:
        """The host era's own answer to the caller, which is PID 1 of its namespace: not what is true there."""
        return {"pids": f"pids= {self.host_pid}", "info": "pid=1 result=0x0 private=0"}[WHAT[what]]


#: What the caller does when poked: see its case on_demand.
WHAT = {"x": "pids", "i": "info"}

#: Every request that there is, as a poke and the step.
REQUESTS = [
    pytest.param("x", Step.OUT, id="list, out"),
    pytest.param("i", Step.IN, id="info, in"),
    pytest.param("i", Step.OUT, id="info, out"),
]

#: The oldest kernel that is supported, whose ways the monitor can be told to keep to, and the running one.
KERNELS = ["5.9", None]


@pytest.fixture(params=KERNELS, ids=["as on Linux 5.9", "as it runs"])
def scene(request: pytest.FixtureRequest, standin: StartStandIn, caller_program: Path) -> Iterator[Scene]:
    node = standin("--era", "host").control_node
    with (
        scripted_supervisor(node, silence_ms=300, kernel=request.param) as supervisor,
        under_filter(caller_program, node.parent, "on_demand") as caller,
    ):
        yield Scene(caller, supervisor, node)


def listed(pids: list[int]) -> bytes:
    params = bytearray(GPU_PIDS.size)
    GPU_PIDS.table.replace(params, pids)
    return bytes(params)


def test_the_caller_gets_what_the_supervisor_made_of_the_drivers_answer(scene: Scene) -> None:
    before = time.clock_gettime_ns(time.CLOCK_BOOTTIME)
    scene.caller.poke("x")
    assert scene.channel.begun().tid == scene.host_pid
    request = scene.channel.request()
    assert (request.step, request.cmd, len(request.params)) == (Step.OUT, GPU_PIDS.cmd, GPU_PIDS.size)
    assert before <= request.begun_ns <= time.clock_gettime_ns(time.CLOCK_BOOTTIME)
    assert GPU_PIDS.table.pids(request.params) == [scene.host_pid]
    scene.channel.channel.answer(request, listed([41, 42]))
    assert scene.caller.line() == "pids= 41 42"
    assert scene.channel.outcome() is Cause.TRANSLATED


def test_an_answer_without_pids_needs_nobody(standin: StartStandIn, caller_program: Path) -> None:
    node = standin("--era", "host").control_node
    with (
        scripted_supervisor(node) as supervisor,
        under_filter(caller_program, node.parent, "empty") as caller,
    ):
        channel = supervisor.attach(caller)
        caller.go()
        channel.begun()
        assert channel.outcome() is Cause.TRANSLATED, "and no request before"
        assert [caller.line(), caller.line()] == ["pids=", "tail=0"]


def test_the_driver_is_asked_with_what_the_supervisor_made_of_the_callers_params(scene: Scene) -> None:
    asked = scene.ask("i", Step.IN)
    assert GPU_PID_INFO.table.pids(asked.params) == [1]
    changed = bytearray(asked.params)
    GPU_PID_INFO.table.put(changed, 0, 0)
    scene.channel.channel.answer(asked, bytes(changed))
    performed = scene.channel.request()
    assert GPU_PID_INFO.table.pids(performed.params) == [0]
    scene.channel.pass_on(performed)
    assert scene.caller.line() == "pid=0 result=0x1f private=0", "the driver's own word for entry 0"
    assert scene.channel.outcome() is Cause.TRANSLATED


@pytest.mark.parametrize(("what", "step"), REQUESTS)
def test_a_declined_call_goes_to_the_driver_untouched(scene: Scene, what: str, step: Step) -> None:
    scene.channel.channel.answer(scene.ask(what, step), None)
    assert scene.caller.line() == scene.what_the_driver_says(what)
    assert scene.channel.outcome() is Cause.SUPERVISOR_DECLINED


@pytest.mark.parametrize(("what", "step"), REQUESTS)
def test_a_silent_supervisor_is_not_waited_for_longer_than_was_said(scene: Scene, what: str, step: Step) -> None:
    scene.ask(what, step)
    begun = time.monotonic()
    assert scene.caller.line() == scene.what_the_driver_says(what)
    assert time.monotonic() - begun < SECONDS / 2


def test_only_one_call_waits_for_a_silent_supervisor(scene: Scene) -> None:
    scene.ask("x", Step.OUT)
    assert scene.caller.line() == scene.what_the_driver_says("x")
    begun = time.monotonic()
    for _ in range(20):
        scene.caller.poke()
        assert scene.caller.line() == scene.what_the_driver_says("x")
    assert time.monotonic() - begun < 20 * 0.3


@pytest.mark.parametrize(("what", "step"), REQUESTS)
def test_a_late_answer_changes_nothing_and_ends_the_silence(scene: Scene, what: str, step: Step) -> None:
    late = scene.ask(what, step)
    assert scene.caller.line() == scene.what_the_driver_says(what)
    assert scene.channel.outcome() is Cause.SUPERVISOR_SILENT
    scene.channel.channel.answer(late, b"\xff" * len(late.params))
    scene.channel.pass_on(scene.ask("x", Step.OUT))
    assert scene.caller.line() == scene.what_the_driver_says("x"), "translated, by a test that changes nothing"
    assert scene.channel.outcome() is Cause.TRANSLATED


def test_a_supervisor_that_was_silent_is_asked_again_after_a_while(scene: Scene) -> None:
    scene.ask("x", Step.OUT)
    assert scene.caller.line() == scene.what_the_driver_says("x")
    assert scene.channel.outcome() is Cause.SUPERVISOR_SILENT

    def is_asked_again() -> bool:
        scene.caller.poke()
        asked = scene.channel.readable(0.1)
        if asked:
            scene.channel.pass_all_on()
        assert scene.caller.line() == scene.what_the_driver_says("x")
        return asked

    eventually(is_asked_again, "the supervisor is asked again")


@pytest.mark.parametrize(("what", "step"), REQUESTS)
def test_a_supervisor_that_dies_leaves_the_call_to_the_driver(scene: Scene, what: str, step: Step) -> None:
    scene.ask(what, step)
    scene.channel.channel.close()
    scene.supervisor.monitor.close()
    assert scene.caller.line() == scene.what_the_driver_says(what)
    scene.caller.poke()
    assert scene.caller.line() == scene.what_the_driver_says("x"), "and so do all later calls"


#: Cases of the caller whose buffers are not all there, but NVOS54 can be read.
MEMORY_CASES = [
    *("readonly_nvos54", "null_params", "unmapped_params", "half_mapped_params"),
    *("kernel_params", "readonly_params", "noaccess_params"),
]


def header(length: int, kind: int, version: int = protocol.VERSION, listener: int = 1) -> bytes:
    return struct.pack("=IHHII", length, version, kind, listener, 0)


ANSWER = 8
ANSWER_BODY = "=QIIII"  # sequence, verdict, size, cmd, reserved


def answer(verdict: int, size: int, params: bytes = b"", cmd: int = 0) -> bytes:
    body = struct.pack(ANSWER_BODY, 1, verdict, size, cmd, 0) + params
    return header(16 + len(body), ANSWER) + body


NONSENSE = {
    "an empty head": b"\0" * 3,
    "another version": header(16, ANSWER, version=protocol.VERSION + 1),
    "a length that is not the packet's": header(17, ANSWER),
    "an unknown type": header(16, 99),
    "a type of the monitor's own": header(16, 1),
    "a huge packet": header(100_000, ANSWER) + bytes(99_984),
}
NONSENSE_ON_A_CHANNEL = {
    **NONSENSE,
    "an answer without its body": header(16, ANSWER),
    "an answer with a size beyond its end": answer(1, 4096),
    "an answer with an unknown verdict": answer(9, 0),
    "an answer of another size than the request": answer(1, 4, bytes(4)),
    "one more control that is not in the table": answer(2, 4, bytes(4), cmd=0x201),
    "one more control of a size that is not": answer(2, 4, bytes(4), cmd=GPU_PIDS.cmd),
    "one more control with a table behind a pointer": answer(2, 16, bytes(16), cmd=NVENC_SESSIONS.cmd),
    "a refusal with params": answer(0, 4, bytes(4)),
}
NONSENSE_TO_THE_MONITOR = {
    **NONSENSE,
    "an answer": answer(0, 0),
    "a table that is longer than its params": protocol.configure(
        protocol.Device(is_device=True, major=1, minor=3, inode=0),
        [protocol.Control(1, 16, asks=False, count_at=0, table_at=4, table_size=13)],
        1,
    ),
    "a table behind a pointer that is longer than a packet": protocol.configure(
        protocol.Device(is_device=True, major=1, minor=3, inode=0),
        [protocol.Control(1, 16, False, 0, 16, 0, pointer_at=8, entry_size=2**17, n_entries=2**15)],  # noqa: FBT003
        1,
    ),
    "a pointer that is longer than its params": protocol.configure(
        protocol.Device(is_device=True, major=1, minor=3, inode=0),
        [protocol.Control(1, 16, False, 0, 16, 0, pointer_at=9, entry_size=8, n_entries=1)],  # noqa: FBT003
        1,
    ),
    "an attach without a listener": protocol.attach(),
}


@pytest.mark.parametrize("nonsense", NONSENSE_ON_A_CHANNEL.values(), ids=NONSENSE_ON_A_CHANNEL)
def test_a_channel_on_which_nonsense_comes_is_hung_up(scene: Scene, nonsense: bytes) -> None:
    scene.ask("x", Step.OUT)
    with socket.socket(fileno=os.dup(scene.channel.channel.fileno())) as raw:
        raw.send(nonsense)
    assert scene.caller.line() == scene.what_the_driver_says("x")
    eventually(lambda: scene.channel.channel.receive() is None, "the monitor hung up")
    scene.caller.poke()
    assert scene.caller.line() == scene.what_the_driver_says("x")


def test_an_answer_to_what_nobody_asked_is_nonsense_to_a_monitor_that_waits_for_a_late_one(scene: Scene) -> None:
    scene.ask("x", Step.OUT)
    assert scene.caller.line() == scene.what_the_driver_says("x")
    assert scene.channel.outcome() is Cause.SUPERVISOR_SILENT
    with socket.socket(fileno=os.dup(scene.channel.channel.fileno())) as raw:
        body = struct.pack(ANSWER_BODY, 0, 1, 0, 0, 0)
        raw.send(header(16 + len(body), ANSWER) + body)
    for _ in range(2):
        scene.caller.poke()
        assert scene.caller.line() == scene.what_the_driver_says("x")


@pytest.mark.parametrize("nonsense", NONSENSE_TO_THE_MONITOR.values(), ids=NONSENSE_TO_THE_MONITOR)
def test_a_supervisor_that_speaks_nonsense_is_not_heard_again(scene: Scene, nonsense: bytes) -> None:
    scene.ask("x", Step.OUT)
    with socket.socket(fileno=os.dup(scene.supervisor.monitor.fileno())) as raw:
        raw.send(nonsense)
    assert scene.caller.line() == scene.what_the_driver_says("x")
    eventually(lambda: scene.channel.channel.receive() is None, "the monitor hung up")
    scene.caller.poke()
    assert scene.caller.line() == scene.what_the_driver_says("x")


def test_a_monitor_that_heard_nonsense_says_so() -> None:
    ours, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
    command = [PROGRAM, "--supervisor", str(theirs.fileno())]
    process = subprocess.Popen(command, pass_fds=[theirs.fileno()], stderr=subprocess.PIPE, text=True)
    theirs.close()
    with ours, process:
        ours.send(header(16, 99))
        assert process.stderr is not None
        said = f"16 bytes, type 99, which protocol version {protocol.VERSION} does not have; answering continue"
        assert said in process.stderr.read()
        assert process.wait(SECONDS) == 0, "with no listener there is nothing left to do"


@pytest.mark.parametrize(
    "arguments",
    [
        *([], ["--supervisor"], ["--supervisor", "x"], ["--supervisor", "0"], ["--help"]),
        *(["--listen", "a"], ["--control", "c"], ["--listen", "a", "--control", "c", "--supervisor", "3"]),
        *(["--agent-fd", "0"], ["--agent-fd", "0", "--control-fd", "0"], ["--take-over", "c", "--listen", "a"]),
    ],
)
def test_a_monitor_started_by_hand_says_how_it_is_used(arguments: list[str]) -> None:
    done = subprocess.run([PROGRAM, *arguments], capture_output=True, text=True, check=False, stdin=subprocess.DEVNULL)
    assert done.returncode == 2
    assert done.stderr.startswith("usage: mpu-notify-monitor --listen AGENT --control CONTROL")


@pytest.mark.parametrize(("what", "step"), REQUESTS)
def test_a_caller_that_is_killed_during_a_step_harms_nobody(scene: Scene, what: str, step: Step) -> None:
    request = scene.ask(what, step)
    kill_and_wait_for(scene.host_pid)
    scene.channel.pass_on(request)
    assert scene.channel.outcome() in (Cause.CALLER_GONE, Cause.FILE_UNAVAILABLE)
    assert isinstance(scene.channel.next(), Ended)


def test_a_caller_that_is_killed_while_the_driver_works_harms_nobody(
    standin: StartStandIn, caller_program: Path
) -> None:
    driver = standin("--era", "host")
    with (
        scripted_supervisor(driver.control_node) as supervisor,
        under_filter(caller_program, driver.control_node.parent, "on_demand") as caller,
    ):
        scene = Scene(caller, supervisor)
        request = scene.ask("i", Step.IN)
        os.kill(driver.pid, signal.SIGSTOP)
        try:
            scene.channel.pass_on(request)
            assert not scene.channel.readable(0.05), "the ioctl is under way, and stays so"
            kill_and_wait_for(scene.host_pid)
        finally:
            os.kill(driver.pid, signal.SIGCONT)
        assert scene.channel.pass_all_on() is Cause.CALLER_GONE


#: asm/unistd.h, the same everywhere.
PIDFD_GETFD = 438


def _opened(fd: Path) -> str | None:
    try:
        return str(fd.readlink())
    except FileNotFoundError:
        return None


@pytest.mark.parametrize("case", ["closed_while_pending", "replaced_while_pending"])
def test_a_file_that_goes_away_during_the_call_gives_what_the_kernel_gives(
    standin: StartStandIn, caller_program: Path, case: str
) -> None:
    node = standin().control_node
    with (
        scripted_supervisor(node) as supervisor,
        under_filter(caller_program, node.parent, case) as caller,
    ):
        channel = supervisor.attach(caller)
        caller.go()
        assert caller.line() == "up"
        request = channel.up_to(Step.IN)
        caller.poke()
        fd = Path(f"/proc/{caller_host_pid(caller)}/fd/3")
        eventually(lambda: _opened(fd) in (None, "/dev/null"), "the fd is another's")
        channel.pass_on(request)
        expected = {"closed_while_pending": "ret=-1 errno=9", "replaced_while_pending": "ret=-1 errno=25"}
        assert caller.line().startswith(expected[case])
        assert channel.outcome() in (Cause.FILE_UNAVAILABLE, Cause.FILE_FOREIGN)


def test_another_drivers_file_is_not_even_fetched(standin: StartStandIn, caller_program: Path) -> None:
    """To close it is to have its server asked, which may be the caller's own."""
    node, others = standin().control_node, standin().control_node
    with (
        scripted_supervisor(node) as supervisor,
        under_filter(caller_program, others.parent, "plain") as caller,
    ):
        channel = supervisor.attach(caller)
        assert supervisor.monitor.process is not None
        with injected(supervisor.monitor.process.pid, "--inject=pidfd_getfd:error=EPERM"):
            caller.go()
            assert channel.pass_all_on() is Cause.FILE_FOREIGN


@pytest.mark.parametrize("case", ["gpu_node", "other_file"])
def test_of_the_drivers_files_only_the_control_node_is_served(
    standin: StartStandIn, caller_program: Path, case: str
) -> None:
    node = standin().control_node
    with (
        scripted_supervisor(node) as supervisor,
        under_filter(caller_program, node.parent, case) as caller,
    ):
        channel = supervisor.attach(caller)
        caller.go()
        assert channel.pass_all_on() is Cause.FILE_FOREIGN


@pytest.mark.parametrize(("device", "cause"), [("/dev/null", Cause.IOCTL_FAILED), ("/dev/zero", Cause.FILE_FOREIGN)])
def test_of_device_files_only_the_one_with_the_numbers_is_served(
    standin: StartStandIn, caller_program: Path, device: str, cause: Cause
) -> None:
    """The caller's file is /dev/null, which takes no RM control."""
    node = standin().control_node
    with (
        scripted_supervisor(Path(device)) as supervisor,
        under_filter(caller_program, node.parent, "other_file") as caller,
    ):
        channel = supervisor.attach(caller)
        caller.go()
        assert channel.pass_all_on() is cause


@pytest.mark.parametrize("case", ["bad_client", "another_open_file"])
def test_an_answer_that_the_driver_refused_is_shown_to_nobody(
    standin: StartStandIn, caller_program: Path, case: str
) -> None:
    node = standin().control_node
    with (
        scripted_supervisor(node) as supervisor,
        under_filter(caller_program, node.parent, case) as caller,
    ):
        channel = supervisor.attach(caller)
        caller.go()
        channel.begun()
        assert channel.outcome() is Cause.STATUS_BAD, "and no request before"


def test_a_file_that_is_replaced_while_it_is_fetched_is_not_the_control_node(
    standin: StartStandIn, caller_program: Path
) -> None:
    node = standin().control_node
    with (
        scripted_supervisor(node) as supervisor,
        under_filter(caller_program, node.parent, "replaced_while_pending") as caller,
    ):
        channel = supervisor.attach(caller)
        caller.go()
        assert caller.line() == "up"
        request = channel.up_to(Step.IN)
        assert supervisor.monitor.process is not None
        monitor = supervisor.monitor.process.pid
        with injected(monitor, "--inject=pidfd_getfd:delay_enter=1s"):
            channel.pass_on(request)
            eventually(lambda: PIDFD_GETFD in system_calls(monitor), "the monitor has looked, and is to fetch")
            caller.poke()
            assert channel.outcome() is Cause.FILE_FOREIGN, "and no ioctl was made on it"
        assert caller.line().startswith("ret=-1 errno=25")


@pytest.mark.parametrize("kernel", KERNELS)
def test_memory_that_is_protected_during_the_call_is_not_written_through(
    standin: StartStandIn, caller_program: Path, kernel: str | None
) -> None:
    node = standin().control_node
    with (
        scripted_supervisor(node, kernel=kernel) as supervisor,
        under_filter(caller_program, node.parent, "protected_while_pending") as caller,
    ):
        channel = supervisor.attach(caller)
        caller.go()
        assert caller.line() == "up"
        request = channel.up_to(Step.OUT)
        caller.poke()
        maps = Path(f"/proc/{caller_host_pid(caller)}/maps")
        protected = re.compile(r"^20000000-\w+ r--p", re.MULTILINE)
        eventually(lambda: protected.search(maps.read_text()) is not None, "the memory is protected")
        channel.pass_on(request)
        assert caller.line().startswith("ret=-1 errno=14")
        assert channel.outcome() is Cause.MEMORY_UNWRITABLE


def test_a_table_that_is_protected_during_the_call_is_not_written_through(
    standin: StartStandIn, caller_program: Path
) -> None:
    node = standin().control_node
    with (
        scripted_supervisor(node) as supervisor,
        under_filter(caller_program, node.parent, "encoders_protected_while_pending") as caller,
    ):
        channel = supervisor.attach(caller)
        caller.go()
        assert caller.line() == "up"
        request = channel.up_to(Step.OUT)
        assert len(request.params) == 16 + 512 * 32, "the table follows its params"
        assert struct.unpack_from("<I", request.params, 16) == (caller_host_pid(caller),)
        assert struct.unpack_from("<Q", request.params, 8) == (0x30000000,), "the caller's pointer, not the monitor's"
        caller.poke()
        maps = Path(f"/proc/{caller_host_pid(caller)}/maps")
        protected = re.compile(r"^30000000-\w+ r--p", re.MULTILINE)
        eventually(lambda: protected.search(maps.read_text()) is not None, "the table is protected")
        channel.pass_on(request)
        assert caller.line().startswith("ret=0 errno=0 status=0x1e"), "the driver's own word"
        assert channel.outcome() is Cause.MEMORY_UNWRITABLE


LIST_ALL = struct.pack("<II", 0, 0x2080).ljust(GPU_PIDS.size, b"\0")


@pytest.mark.parametrize("what", ["x", "i"])
def test_one_more_control_is_performed_before_the_answer(scene: Scene, what: str) -> None:
    request = scene.ask(what, Step.OUT)
    before = time.clock_gettime_ns(time.CLOCK_BOOTTIME)
    scene.channel.channel.perform(request, GPU_PIDS.cmd, LIST_ALL)
    performed = scene.channel.performed()
    assert (performed.cmd, performed.status, len(performed.params)) == (GPU_PIDS.cmd, 0, GPU_PIDS.size)
    assert before <= performed.begun_ns <= time.clock_gettime_ns(time.CLOCK_BOOTTIME)
    assert GPU_PIDS.table.pids(performed.params) == [scene.host_pid]
    scene.channel.channel.answer(performed, request.params)
    assert scene.caller.line() == scene.what_the_driver_says(what), "of the one more control nothing reaches the caller"
    assert scene.channel.outcome() is Cause.TRANSLATED


def test_one_more_control_that_the_driver_refuses_is_told_and_no_more(scene: Scene) -> None:
    request = scene.ask("x", Step.OUT)
    refused = struct.pack("<II", 9, 0x2080).ljust(GPU_PIDS.size, b"\xaa")
    scene.channel.channel.perform(request, GPU_PIDS.cmd, refused)
    performed = scene.channel.performed()
    assert (performed.status, performed.params) == (0x1F, refused)
    scene.channel.channel.answer(performed, listed([41]))
    assert scene.caller.line() == "pids= 41"


def test_the_call_that_waits_is_none_the_worse_for_another_size(scene: Scene) -> None:
    """A larger one and a smaller one, one after the other, before the params that were sent first."""
    request = scene.ask("x", Step.OUT)
    info = struct.pack("<IIII", 1, 0, scene.host_pid, 0).ljust(GPU_PID_INFO.size, b"\0")
    scene.channel.channel.perform(request, GPU_PID_INFO.cmd, info)
    performed = scene.channel.performed()
    assert GPU_PID_INFO.table.pids(performed.params) == [scene.host_pid]
    scene.channel.channel.perform(performed, GPU_PIDS.cmd, LIST_ALL)
    scene.channel.channel.answer(scene.channel.performed(), listed([41, 42]))
    assert scene.caller.line() == "pids= 41 42"


def test_more_controls_than_a_call_may_have_are_nonsense(scene: Scene) -> None:
    request: Request | Performed = scene.ask("x", Step.OUT)
    for _ in range(protocol.MAX_PERFORMED):
        scene.channel.channel.perform(request, GPU_PIDS.cmd, LIST_ALL)
        request = scene.channel.performed()
    scene.channel.channel.perform(request, GPU_PIDS.cmd, LIST_ALL)
    assert scene.caller.line() == scene.what_the_driver_says("x")
    eventually(lambda: scene.channel.channel.receive() is None, "the monitor hung up")


def test_a_supervisor_that_is_silent_after_one_more_control_is_not_waited_for(scene: Scene) -> None:
    request = scene.ask("i", Step.IN)
    scene.channel.channel.perform(request, GPU_PIDS.cmd, LIST_ALL)
    scene.channel.performed()
    assert scene.caller.line() == scene.what_the_driver_says("i")
    assert scene.channel.outcome() is Cause.SUPERVISOR_SILENT


def test_all_exchanges_of_a_call_share_one_time(scene: Scene) -> None:
    message: Message = scene.ask("x", Step.OUT)
    while isinstance(message, (Request, Performed)):
        time.sleep(0.2)  # of 0.3 s
        scene.channel.channel.perform(message, GPU_PIDS.cmd, LIST_ALL)
        message = scene.channel.next()
    assert isinstance(message, Outcome)
    assert message.cause is Cause.SUPERVISOR_SILENT


def test_a_caller_that_is_killed_before_one_more_control_harms_nobody(scene: Scene) -> None:
    request = scene.ask("x", Step.OUT)
    kill_and_wait_for(scene.host_pid)
    scene.channel.channel.perform(request, GPU_PIDS.cmd, LIST_ALL)
    assert scene.channel.outcome() in (Cause.CALLER_GONE, Cause.FILE_UNAVAILABLE)
    assert isinstance(scene.channel.next(), Ended)


def test_a_new_configuration_is_that_of_the_next_call(scene: Scene) -> None:
    device = identify(scene.node)
    scene.supervisor.monitor.reconfigure(device, [row for row in MONITORED if row.cmd == GPU_PID_INFO.cmd])

    def is_left_alone() -> bool:
        scene.caller.poke("x")
        asked = scene.channel.readable(0.1)
        if asked:
            scene.channel.pass_all_on()
        assert scene.caller.line() == scene.what_the_driver_says("x")
        return not asked

    eventually(is_left_alone, "the list is not in the table any more")
    scene.channel.pass_on(scene.ask("i", Step.OUT))
    assert scene.caller.line() == scene.what_the_driver_says("i")


def test_an_unknown_size_is_told_once_for_each_control(standin: StartStandIn) -> None:
    driver = standin()
    with scripted_supervisor(driver.control_node) as supervisor, crowd(driver.control_node, [Node("one")]) as people:
        listener = people["one"].listener()
        supervisor.monitor.attach(listener, b"{}")
        os.close(listener)
        arrival = supervisor.monitor.receive()
        assert arrival is not None
        people["one"].say(do="prepare")
        for cmd, size in ((0x2080018D, 3816), (0x2080018D, 3816), (0x20802096, 60000), (0x2080018D, 3820)):
            status, params, _ = people["one"].ask("subdevice", cmd, b"\xaa" * size)
            assert (status, params) == (0x1F, b"\xaa" * size), "the driver's own word"
        channel = ScriptedChannel(arrival.channel)
        for cmd, size in ((0x2080018D, 3816), (0x20802096, 60000)):
            told = channel.next()
            assert isinstance(told, Outcome)
            assert (told.cmd, told.size, told.cause) == (cmd, size, Cause.SIZE_UNKNOWN)
    ended = channel.next()
    assert isinstance(ended, Ended)
    assert ended.causes[Cause.SIZE_UNKNOWN] == 4, "and counted always"


def test_a_monitor_out_of_fds_refuses_a_listener_and_serves_the_others(scene: Scene) -> None:
    process = scene.supervisor.monitor.process
    assert process is not None
    soft, hard = resource.prlimit(process.pid, resource.RLIMIT_NOFILE)
    resource.prlimit(process.pid, resource.RLIMIT_NOFILE, (3, hard))
    with pytest.raises(MonitorError, match="Too many open files"):
        scene.supervisor.attach(scene.caller)
    resource.prlimit(process.pid, resource.RLIMIT_NOFILE, (soft, hard))
    scene.channel.pass_on(scene.ask("x", Step.OUT))
    assert scene.caller.line() == scene.what_the_driver_says("x")
    assert scene.channel.outcome() is Cause.TRANSLATED


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGHUP, signal.SIGINT])
def test_a_signal_to_all_of_a_job_does_not_take_the_driver_from_it(scene: Scene, number: signal.Signals) -> None:
    assert scene.supervisor.monitor.process is not None
    scene.supervisor.monitor.process.send_signal(number)
    scene.channel.pass_on(scene.ask("x", Step.OUT))
    assert scene.caller.line() == scene.what_the_driver_says("x")
    assert scene.channel.outcome() is Cause.TRANSLATED


def test_a_monitor_whose_standard_error_nobody_reads_lives_on() -> None:
    ours, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
    command = [PROGRAM, "--supervisor", str(theirs.fileno())]
    process = subprocess.Popen(command, pass_fds=[theirs.fileno()], stderr=subprocess.PIPE, text=True)
    theirs.close()
    assert process.stderr is not None
    process.stderr.close()
    with ours, process:
        ours.send(header(16, 99))
        assert process.wait(SECONDS) == 0


def test_a_file_whose_server_never_answers_holds_up_nobody_else(standin: StartStandIn, caller_program: Path) -> None:
    """The caller of another driver's file, which hangs, gets what it asked for; the monitor serves on."""
    served, hung = standin("--era", "host"), standin("--era", "host")
    with (
        scripted_supervisor(served.control_node) as supervisor,
        under_filter(caller_program, hung.control_node.parent, "on_demand") as stuck_caller,
        under_filter(caller_program, served.control_node.parent, "on_demand") as lively_caller,
    ):
        stuck, lively = Scene(stuck_caller, supervisor), Scene(lively_caller, supervisor)
        os.kill(hung.pid, signal.SIGSTOP)
        try:
            stuck.caller.poke()
            assert stuck.channel.pass_all_on() is Cause.FILE_FOREIGN, "nobody asked the hung server anything"
            lively.caller.poke()
            assert lively.channel.pass_all_on() is Cause.TRANSLATED
            assert lively.caller.line() == lively.what_the_driver_says("x")
        finally:
            os.kill(hung.pid, signal.SIGCONT)
        assert stuck.caller.line() == stuck.what_the_driver_says("x")


@pytest.mark.parametrize(
    ("kernel", "case", "cause"),
    [
        ("5.9", "thread", Cause.TRANSLATED),
        ("5.9", "unshared_files", Cause.FILE_UNAVAILABLE),
        (None, "thread", Cause.TRANSLATED),
        (None, "unshared_files", Cause.TRANSLATED if HAS_PIDFD_THREAD else Cause.FILE_UNAVAILABLE),
    ],
)
def test_a_file_is_fetched_from_the_thread_that_has_it(
    standin: StartStandIn, caller_program: Path, kernel: str | None, case: str, cause: Cause
) -> None:
    """Before PIDFD_THREAD a thread with files of its own cannot be served, and is not mistaken for its process."""
    node = standin("--era", "host").control_node
    with (
        scripted_supervisor(node, kernel=kernel) as supervisor,
        under_filter(caller_program, node.parent, case) as caller,
    ):
        channel = supervisor.attach(caller)
        caller.go()
        assert channel.pass_all_on() is cause
        assert caller.line().startswith("pids= ")


@pytest.mark.parametrize("case", MEMORY_CASES)
@pytest.mark.parametrize("kernel", KERNELS)
def test_memory_that_the_driver_could_not_write_is_left_alone(
    standin: StartStandIn, caller_program: Path, kernel: str | None, case: str
) -> None:
    node = standin("--era", "host").control_node
    with (
        scripted_supervisor(node, kernel=kernel) as supervisor,
        under_filter(caller_program, node.parent, case) as caller,
    ):
        channel = supervisor.attach(caller)
        caller.go()
        assert channel.pass_all_on() in (Cause.MEMORY_UNWRITABLE, Cause.MEMORY_UNREADABLE)


def test_callers_killed_at_any_moment_leave_nothing_behind(standin: StartStandIn, caller_program: Path) -> None:
    node = standin("--era", "host").control_node
    with scripted_supervisor(node) as supervisor:
        before = open_fds(supervisor)
        for number in range(40):
            with under_filter(caller_program, node.parent, "on_demand") as caller:
                scene = Scene(caller, supervisor)
                request = scene.ask("i", Step.IN)
                killer = threading.Timer(number % 20 / 10_000, os.kill, (scene.host_pid, signal.SIGKILL))
                killer.start()
                scene.channel.pass_on(request)
                while not isinstance(message := scene.channel.next(), Ended):
                    if isinstance(message, Request):
                        scene.channel.pass_on(message)
                killer.join()
                scene.channel.channel.close()
        eventually(lambda: open_fds(supervisor) == before, "every fd is closed again")


def open_fds(supervisor: ScriptedSupervisor) -> int:
    assert supervisor.monitor.process is not None
    return len(list(Path(f"/proc/{supervisor.monitor.process.pid}/fd").iterdir()))


def test_a_caller_that_is_killed_before_its_call_was_received_harms_nobody(
    standin: StartStandIn, caller_program: Path
) -> None:
    node = standin("--era", "host").control_node
    with (
        scripted_supervisor(node) as supervisor,
        under_filter(caller_program, node.parent, "on_demand") as gone_caller,
        under_filter(caller_program, node.parent, "on_demand") as there_caller,
    ):
        gone, there = Scene(gone_caller, supervisor), Scene(there_caller, supervisor)
        assert supervisor.monitor.process is not None
        stop_and_wait_for(supervisor.monitor.process.pid)
        try:
            gone.caller.poke()
            wchan = Path(f"/proc/{gone.host_pid}/wchan")
            eventually(lambda: "seccomp" in wchan.read_text(), "the caller is trapped")
            kill_and_wait_for(gone.host_pid)
        finally:
            os.kill(supervisor.monitor.process.pid, signal.SIGCONT)
        ended = gone.channel.next()
        assert isinstance(ended, Ended)
        assert sum(ended.causes.values()) == 0
        there.caller.poke()
        assert there.channel.pass_all_on() is Cause.TRANSLATED


def test_a_caller_that_is_killed_just_after_its_call_was_received_is_no_fault(
    standin: StartStandIn, caller_program: Path
) -> None:
    """Its /proc files vanish, which is no reason to warn of unreadable memory."""
    node = standin("--era", "host").control_node
    with (
        scripted_supervisor(node) as supervisor,
        under_filter(caller_program, node.parent, "on_demand") as caller,
    ):
        scene = Scene(caller, supervisor)
        assert supervisor.monitor.process is not None
        memory = f"/proc/{scene.host_pid}/mem"
        with injected(supervisor.monitor.process.pid, f"--trace-path={memory}", "--inject=openat:delay_enter=500ms"):
            caller.poke()
            time.sleep(0.1)
            kill_and_wait_for(scene.host_pid)
            assert scene.channel.outcome() is Cause.CALLER_GONE


def test_causes_are_told_and_counted(standin: StartStandIn, caller_program: Path) -> None:
    node = standin().control_node
    with (
        scripted_supervisor(node) as supervisor,
        under_filter(caller_program, node.parent, "flags") as caller,
    ):
        channel = supervisor.attach(caller)
        caller.go()
        assert caller.line().startswith("ret=0")
        assert channel.pass_all_on() is Cause.FLAGS_SET
        caller.end()
        ended = channel.next()
        assert isinstance(ended, Ended)
        assert ended.causes[Cause.FLAGS_SET] == 1
        assert ended.received == 1 + ended.untranslated


def test_the_monitor_ends_when_supervisor_and_callers_are_gone(standin: StartStandIn, caller_program: Path) -> None:
    node = standin().control_node
    with (
        under_filter(caller_program, node.parent, "on_demand") as caller,
        scripted_supervisor(node) as supervisor,
    ):
        scene = Scene(caller, supervisor)
        scene.channel.channel.close()
        supervisor.monitor.close()
        process = supervisor.monitor.process
        assert process is not None
        caller.poke()
        assert caller.line() == scene.what_the_driver_says("x")
        assert process.poll() is None, "it answers continue for as long as there are callers"
        caller.end()
        assert process.wait(SECONDS) == 0


def test_what_is_not_a_listener_is_not_served() -> None:
    device = identify(Path("/dev/null"))
    with Monitor.start(device, MONITORED) as monitor, Path("/dev/null").open("rb") as file:
        monitor.attach(file.fileno(), b"{}")
        with pytest.raises(MonitorError, match="cannot serve the listener: Bad file descriptor"):
            monitor.receive()


def test_the_monitor_has_no_capability_that_raises_rm_privilege() -> None:
    with Monitor.start(identify(Path("/dev/null")), MONITORED) as monitor:
        assert monitor.process is not None
        status = Path(f"/proc/{monitor.process.pid}/status").read_text()
        effective = next(int(line.split()[1], 16) for line in status.splitlines() if line.startswith("CapPrm"))
    cap_sys_ptrace, cap_dac_override = 19, 1
    assert effective & ~(1 << cap_sys_ptrace | 1 << cap_dac_override) == 0


def test_a_monitor_that_cannot_start_is_named() -> None:
    with pytest.raises(MonitorError, match="/nowhere/monitor"):
        Monitor.start(identify(Path("/dev/null")), MONITORED, program=Path("/nowhere/monitor"))
