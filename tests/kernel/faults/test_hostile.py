"""Callers that mean harm: they delay nobody else, and reach no more than the driver would have given them directly.

Each is a real program under the real filter, with the real daemon and an innocent container beside it.
"""

from __future__ import annotations

import contextlib
import json
import os
import select
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from mpu_notify.rm.controls import CONTROL_TABLE
from tests.kernel.conftest import StartStandIn
from tests.kernel.harness import (
    SECONDS,
    Caller,
    caller_host_pid,
    compile_c,
    eventually,
    injected,
    kill_and_wait_for,
    kill_container,
    state_of,
    stop_and_wait_for,
    system_calls,
    under_filter,
)
from tests.kernel.test_calls import aided, unaided
from tests.kernel.test_handover import Keeper
from tests.kernel.test_monitor import PIDFD_GETFD
from tests.kernel.test_serve import STATE, Daemon, ask, up

from .conftest import Record
from .record import Row

SECTION = "Hostile callers"

#: hostile.c has the same.
SWAPPED_CALLS = 30000


@pytest.fixture(scope="session")
def hostile_program(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """hostile.c, compiled."""
    return compile_c(Path(__file__).with_name("hostile.c"), tmp_path_factory.mktemp("hostile"))


class Scene:
    """The daemon, an innocent container, and what monitor and supervisor have with just that."""

    def __init__(self, daemon: Daemon, neighbour: Caller, place: Path) -> None:
        self.daemon = daemon
        self.neighbour = neighbour
        self.place = place
        self.calls = 0
        self._before = self._at_rest()

    def _taken(self) -> dict[str, int]:
        return {
            f"{name} {what}": len(list(Path(f"/proc/{pid}/{what}").iterdir()))
            for name, pid in (("monitor", self.daemon.monitor), ("supervisor", self.daemon.process.pid))
            for what in ("fd", "task")
        }

    def _at_rest(self) -> dict[str, int]:
        """What they have when they are done with what was asked: the least of a while."""
        samples = []
        for _ in range(10):
            samples.append(self._taken())
            time.sleep(0.01)
        return {name: min(sample[name] for sample in samples) for name in samples[0]}

    def neighbour_is_served(self, calls: int = 20) -> None:
        """Each of its calls is answered rightly."""
        assert [ask(self.neighbour) for _ in range(calls)] == ["pids= 1"] * calls
        self.calls += calls

    def neighbour_is_served_again(self) -> None:
        """After another monitor or supervisor has come."""
        eventually(lambda: ask(self.neighbour) == "pids= 1", "the neighbour is translated again")

    def leaks(self) -> str:
        """What is left when the hostile ones are gone."""
        eventually(lambda: self._taken() == self._before, "nothing is left")
        return "none"

    @contextlib.contextmanager
    def hostile(self, program: Path, case: str, inside: Caller | None = None) -> Iterator[Caller]:
        """A container that is attached, and about to do what the case is named for; or one more process of one."""
        command = program, self.daemon.node.parent, case, self.place
        with under_filter(*command, inside=inside) as caller:
            self.daemon.attach(caller)
            try:
                up(caller)
                yield caller
            finally:
                if inside is None:
                    kill_container(caller)

    @contextlib.contextmanager
    def stuck(self, program: Path, case: str, caller_program: Path) -> Iterator[tuple[Caller, Caller]]:
        """A hostile container, and one more process of it that only asks."""
        with (
            self.hostile(program, case) as stuck,
            self.hostile(caller_program, "on_demand", inside=stuck) as second,
        ):
            yield stuck, second


@pytest.fixture
def scene(daemon: Daemon, caller_program: Path, tmp_path: Path) -> Iterator[Scene]:
    place = tmp_path / "place"
    place.mkdir()
    with under_filter(caller_program, daemon.node.parent, "on_demand") as neighbour:
        daemon.attach(neighbour)
        up(neighbour)
        eventually(lambda: ask(neighbour) == "pids= 1", "the neighbour is translated")
        yield Scene(daemon, neighbour, place)


def served(caller: Caller, calls: int = 20) -> None:
    """One that is in the namespace of another that uses the GPU: each of its calls is answered rightly."""
    status = Path(f"/proc/{caller_host_pid(caller)}/status").read_text()
    own = next(line.split()[-1] for line in status.splitlines() if line.startswith("NSpid:"))
    assert [ask(caller) for _ in range(calls)] == [f"pids= 1 {own}"] * calls


def waits(scene: Scene) -> list[str]:
    """In what the monitor's threads wait, as the kernel names it."""
    found = []
    for task in Path(f"/proc/{scene.daemon.monitor}/task").iterdir():
        with contextlib.suppress(FileNotFoundError, ProcessLookupError):
            found.append((task / "wchan").read_text())
    return found


def test_a_thousand_threads_that_call_without_pause_keep_nobody_from_a_right_answer(
    scene: Scene, hostile_program: Path, record: Record
) -> None:
    with scene.hostile(hostile_program, "crowd") as crowd:
        crowd.poke()
        made = wrong = 0
        while made < 1000:
            scene.neighbour_is_served()
            crowd.poke()
            made, wrong = (int(word.partition("=")[2]) for word in crowd.line().split())
        assert wrong == 0, "they are served as well"
    leaks = scene.leaks()
    record(Row(SECTION, "1,000 threads that call without pause", made, "translated; its neighbour, too", leaks))


def test_a_caller_that_is_stopped_and_takes_no_answer(scene: Scene, caller_program: Path, record: Record) -> None:
    with scene.hostile(caller_program, "on_demand") as stopped:
        host_pid = caller_host_pid(stopped)
        stop_and_wait_for(scene.daemon.driver)
        stopped.poke()
        eventually(lambda: scene.daemon.calls_of(scene.daemon.monitor) == 1, "its call is under way")
        os.kill(host_pid, signal.SIGSTOP)
        os.kill(scene.daemon.driver, signal.SIGCONT)
        scene.neighbour_is_served()
        os.kill(host_pid, signal.SIGCONT)
        assert stopped.line() == "pids= 1"
    record(Row(SECTION, "one that is stopped and takes no answer", 1, "translated, when it goes on", scene.leaks()))


def test_a_caller_that_sits_in_a_signals_handler(scene: Scene, hostile_program: Path, record: Record) -> None:
    with scene.hostile(hostile_program, "handler") as caught:
        caught.poke()
        assert caught.line() == "in the handler"
        scene.neighbour_is_served()
        for _ in range(20):
            caught.poke()
            assert caught.line() == "pids= 1", "another thread of the same process"
    record(Row(SECTION, "one that sits in a signal's handler", 1, "its other threads are translated", scene.leaks()))


def test_a_caller_that_dies_during_its_calls(scene: Scene, caller_program: Path, record: Record) -> None:
    """At each moment: tests/kernel/test_monitor.py."""
    for _ in range(20):
        with scene.hostile(caller_program, "on_demand") as dying:
            dying.poke()
            kill_and_wait_for(caller_host_pid(dying))
            scene.neighbour_is_served(2)
    record(Row(SECTION, "one that dies and takes no answer", 20, "nothing; its neighbour is translated", scene.leaks()))


#: Memory that whoever reads it waits for, for good.
ABSENT = {
    "userfault_nvos54": "NVOS54 behind a userfaultfd that is never answered",
    "silent_nvos54": "NVOS54 in a FUSE file whose server never answers",
    "silent_params": "params in a FUSE file whose server never answers",
}


def hangs(scene: Scene) -> bool:
    """Whether a thread of the monitor waits for a page of memory."""
    return any("userfault" in place or "request_wait" in place for place in waits(scene))


@pytest.mark.parametrize("case", ABSENT)
def test_memory_that_is_never_there_holds_up_its_own_listener_at_most(
    scene: Scene, hostile_program: Path, caller_program: Path, record: Record, case: str
) -> None:
    with scene.stuck(hostile_program, case, caller_program) as (stuck, second):
        stuck.poke()
        eventually(lambda: hangs(scene), "the monitor's thread for it hangs")
        served(second)
        scene.neighbour_is_served()
        assert hangs(scene)
        assert not stuck.says_something_within(0)
    record(Row(SECTION, ABSENT[case], 1, "waits until it is killed; all others are translated", scene.leaks()))


def test_a_monitor_that_is_killed_while_a_thread_of_it_cannot_die_gets_a_successor(
    scene: Scene, hostile_program: Path, caller_program: Path, record: Record
) -> None:
    """Its files stay open, and so do its connections, until the container that it waits for has ended."""
    killed = scene.daemon.monitor
    with scene.stuck(hostile_program, "silent_nvos54", caller_program) as (stuck, second):
        stuck.poke()
        eventually(lambda: hangs(scene), "the monitor's thread for it hangs")
        os.kill(killed, signal.SIGKILL)
        scene.neighbour_is_served_again()
        scene.daemon.monitor = scene.daemon.find_monitor()
        assert scene.daemon.monitor != killed
        served(second)
        with scene.hostile(caller_program, "on_demand") as third:
            assert ask(third) == "pids= 1", "it attached to the new one"
        assert Path(f"/proc/{killed}").exists(), "all of that while it cannot end"
    eventually(lambda: not Path(f"/proc/{killed}").exists(), "the killed monitor has ended")
    what = "a monitor that is killed while it waits for memory in a silent FUSE file"
    record(Row(SECTION, what, 1, "its neighbour: the driver's own once, then translated", scene.leaks()))


def test_a_service_manager_may_start_a_monitor_beside_one_that_is_killed_and_cannot_end(
    tmp_path: Path, standin: StartStandIn, hostile_program: Path, caller_program: Path, record: Record
) -> None:
    """As systemd does when it has missed it for a while (WatchdogSec=)."""
    keeper = Keeper(tmp_path)
    daemon = Daemon(tmp_path, standin("--era", "host").control_node, "--no-monitor")
    try:
        with under_filter(caller_program, daemon.node.parent, "on_demand") as neighbour:
            daemon.attach(neighbour)
            up(neighbour)
            place = tmp_path / "place"
            place.mkdir()
            scene = Scene(daemon, neighbour, place)
            scene.neighbour_is_served_again()
            with scene.hostile(hostile_program, "silent_nvos54") as stuck:
                stuck.poke()
                eventually(lambda: hangs(scene), "the monitor's thread for it hangs")
                cannot_end = keeper.process
                cannot_end.kill()
                keeper.start()
                scene.neighbour_is_served_again()
                assert daemon.find_monitor() == keeper.process.pid
                assert cannot_end.poll() is None, "all of that while it cannot end"
            cannot_end.wait(SECONDS)
            what = "the same under a service manager, which starts the next one"
            record(Row(SECTION, what, 1, "its neighbour: the driver's own, then translated", "none"))
    finally:
        with daemon.process:
            daemon.process.terminate()
        keeper.end()


def test_params_behind_a_userfaultfd_are_not_waited_for(scene: Scene, hostile_program: Path, record: Record) -> None:
    with scene.hostile(hostile_program, "userfault_params") as impatient:
        impatient.poke()
        assert impatient.line() == "it came back"
        scene.neighbour_is_served()
    what = "params behind a userfaultfd that is never answered"
    record(Row(SECTION, what, 1, "the driver's own; all others are translated", scene.leaks()))


#: A file of a FUSE server that answers neither to what it is nor to the rest, where the control node should be.
SILENT = {
    "silent_ioctl": "a control node that is a FUSE file: stat and ioctl never answered",
    "silent_close": "a control node that is a FUSE file: stat and close never answered",
}


@pytest.mark.parametrize("case", SILENT)
def test_a_control_node_that_never_answers_holds_up_nobody_but_its_caller(
    scene: Scene, hostile_program: Path, caller_program: Path, record: Record, case: str
) -> None:
    with scene.stuck(hostile_program, case, caller_program) as (stuck, second):
        stuck.poke()
        wchan = Path(f"/proc/{caller_host_pid(stuck)}/wchan")
        eventually(lambda: "request_wait" in wchan.read_text(), "the caller waits for its file")
        served(second)
        scene.neighbour_is_served()
        assert not hangs(scene)
        if case == "silent_close":
            assert stuck.line().startswith("ret=-1 errno=25"), "its ioctl was its server's to answer"
    record(Row(SECTION, SILENT[case], 1, "what its file gives it; all others are translated", scene.leaks()))


def test_a_silent_file_that_is_fetched_after_all_holds_up_its_own_listener_at_most(
    scene: Scene, hostile_program: Path, caller_program: Path, record: Record
) -> None:
    """It takes the control node's place between the monitor's look and the fetch; to close it asks its server."""
    with scene.stuck(hostile_program, "silent_put_in_place", caller_program) as (stuck, second):
        number = Path(f"/proc/{caller_host_pid(stuck)}/fd/3")
        with injected(scene.daemon.monitor, "--inject=pidfd_getfd:delay_enter=1s:when=1"):
            stuck.poke()
            eventually(lambda: PIDFD_GETFD in system_calls(scene.daemon.monitor), "the monitor is to fetch")
            stuck.poke()
            eventually(lambda: str(scene.place) in str(number.readlink()), "it gets another file")
            eventually(lambda: hangs(scene), "the monitor's thread for it hangs")
            served(second, calls=2)
            scene.neighbour_is_served(2)
            assert hangs(scene)
            kill_container(stuck)  # strace lets go of no thread that hangs
    what = "a silent FUSE file that takes the control node's place while it is fetched"
    record(Row(SECTION, what, 1, "waits until it is killed; all others are translated", scene.leaks()))


#: Names of cases, and what is crafted.
CRAFTED = {
    "xfer_in_xfer": "an XFER call in an XFER call",
    "xfer_to_itself": "an XFER call that points to itself",
    "xfer_sizes": "an XFER call of every wrong size",
    "xfer_pointers": "an XFER call that points nowhere, half somewhere, to the kernel",
    "xfer_half_mapped": "an XFER call that is only half there, or not",
    "xfer_overlapping": "an NVOS54 that is its own params, in an XFER call",
}


@pytest.mark.parametrize("case", CRAFTED)
def test_a_crafted_wrapper_gets_what_the_driver_gives_it(
    standin: StartStandIn, hostile_program: Path, record: Record, case: str
) -> None:
    node = standin().control_node
    got = aided(node, hostile_program, node.parent, case)
    assert got == unaided(hostile_program, node.parent, case)
    record(Row(SECTION, CRAFTED[case], got.count("\n"), "the driver's own", "none"))


def test_a_caller_that_changes_everything_while_it_is_looked_at(
    tmp_path: Path, standin: StartStandIn, hostile_program: Path, caller_program: Path, record: Record
) -> None:
    """Arguments, params, file: the stand-in tells what it was asked, by whom, and on whose file."""
    trace = tmp_path / "trace"
    others = standin()
    daemon = Daemon(tmp_path, standin("--era", "host", "--trace", str(trace)).control_node)
    try:
        with under_filter(caller_program, daemon.node.parent, "on_demand") as neighbour:
            daemon.attach(neighbour)
            up(neighbour)
            eventually(lambda: ask(neighbour) == "pids= 1", "the neighbour is translated")
            scene = Scene(daemon, neighbour, others.control_node.parent)
            innocent = caller_host_pid(neighbour)
            with scene.hostile(hostile_program, "swap") as swapping:
                swapper = caller_host_pid(swapping)
                monitor = {int(task.name) for task in Path(f"/proc/{daemon.monitor}/task").iterdir()}
                swapping.poke()
                while not swapping.says_something_within(0):
                    scene.neighbour_is_served(1)
                said = swapping.line()
            leaks = scene.leaks()
    finally:
        daemon.end()
    assert said == f"calls={SWAPPED_CALLS} some_done=1 protected_memory_is_as_it_was=1"
    asked = [json.loads(line) for line in trace.read_text().splitlines()]
    ours = [line for line in asked if line["by"] in monitor]
    for_it = [line for line in ours if line["opened_by"] == swapper]
    assert for_it, "some of its calls were performed for it"
    assert {line["opened_by"] for line in ours} == {swapper, innocent}, "on files of the callers' own"
    assert {line["by"] for line in asked if line["opened_by"] == swapper} <= {swapper, *monitor}
    assert {line["device"] for line in ours} == {"nvidiactl"}
    assert {(int(line["control"], 16), line["size"]) for line in ours} <= set(CONTROL_TABLE), "and nothing else"
    got = f"translated or the driver's own; {len(for_it):,} controls performed, all in the table, on its own file"
    record(Row(SECTION, "one that changes arguments, params and files during its calls", SWAPPED_CALLS, got, leaks))


#: A container's root at the agent's socket, which is mounted into its namespace. It says "up" when it is done.
AT_THE_SOCKET = """
import contextlib, os, socket, sys
path, count = sys.argv[1], int(sys.argv[2])
kept = []
for number in range(count):
    s = socket.socket(socket.AF_UNIX)
    s.connect(path)
    kept.append(s)
    with contextlib.suppress(BrokenPipeError, ConnectionResetError):
        if number % 3 == 1:
            s.send(b"{")
        elif number % 3 == 2:
            socket.send_fds(s, [b'{"fds": ["seccompFd"]}'], [int(sys.argv[3]), 0, 1, 2])
print("up", flush=True)
sys.stdin.read()
"""


def test_a_containers_root_that_floods_the_mounted_socket_keeps_no_runtime_from_attaching(
    scene: Scene, caller_program: Path, record: Record
) -> None:
    """It opens hundreds of connections, sends nothing, half a message, or a true listener, and closes none."""
    with under_filter(caller_program, scene.daemon.node.parent, "on_demand") as own:
        enter = ["unshare", "--pid", "--fork", "--kill-child", "--mount-proc", sys.executable, "-c", AT_THE_SOCKET]
        command = [*enter, str(scene.daemon.socket), "500", str(own.listener)]
        with subprocess.Popen(
            command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, pass_fds=[own.listener]
        ) as flooding:
            for _ in range(5):
                with scene.hostile(caller_program, "on_demand") as attaching:
                    eventually(lambda attaching=attaching: ask(attaching) == "pids= 1", "it is translated")
                scene.neighbour_is_served(5)
            assert flooding.stdout is not None
            assert flooding.stdout.readline() == "up\n"
            eventually(lambda: scene.daemon.says("in our PID namespace"), "it is refused")
            leaks = scene.leaks()
            assert flooding.stdin is not None
            flooding.stdin.close()
    assert "attached container=" in scene.daemon.log.read_text()
    record(Row(SECTION, "a container's root that floods the mounted agent socket", 500, "refused", leaks))


def test_a_refused_file_that_cannot_be_closed_keeps_no_runtime_from_attaching(
    scene: Scene, hostile_program: Path, caller_program: Path, record: Record
) -> None:
    """From a container's root at the mounted socket: a FUSE file with a page to write, which its server never takes."""
    with scene.hostile(hostile_program, "silent_sent") as sending:
        stop_and_wait_for(scene.daemon.monitor)  # as a flood of connections can: what is sent must wait to be taken
        sending.poke()
        assert sending.line() == "sent"
        os.kill(scene.daemon.monitor, signal.SIGCONT)
        tasks = Path(f"/proc/{scene.daemon.monitor}/task")
        eventually(lambda: any(state_of(task) == "D" for task in tasks.iterdir()), "a thread of the monitor hangs")
        with scene.hostile(caller_program, "on_demand") as attaching:
            eventually(lambda: ask(attaching) == "pids= 1", "it is translated")
        scene.neighbour_is_served()
    what = "a container's root that sends the agent a FUSE file that cannot be closed"
    record(Row(SECTION, what, 1, "refused; all others are translated", scene.leaks()))


def _epoll() -> int:
    with select.epoll() as epoll:
        return os.dup(epoll.fileno())


#: Files that are no listener, by what they are.
NO_LISTENERS: dict[str, Callable[[Path], int]] = {
    "a regular file": lambda _place: os.open(__file__, os.O_RDONLY),
    "a file opened with O_PATH": lambda place: os.open(place, os.O_PATH),
    "a pidfd": lambda _place: os.pidfd_open(os.getpid()),
    "an epoll": lambda _place: _epoll(),
    "a memfd that is called a listener": lambda _place: os.memfd_create("anon_inode:seccomp notify"),
}


@pytest.mark.parametrize("what", NO_LISTENERS)
def test_a_file_that_is_no_listener_is_refused(scene: Scene, record: Record, what: str) -> None:
    fd = NO_LISTENERS[what](scene.place)
    before = scene.daemon.log.read_text().count("no seccomp listener")
    scene.daemon.send(json.dumps(STATE).encode(), fd)
    os.close(fd)
    eventually(lambda: scene.daemon.log.read_text().count("no seccomp listener") > before, "it is refused")
    scene.neighbour_is_served()
    record(Row(SECTION, f"a runtime that sends {what}", 1, "refused", scene.leaks()))


def test_a_listener_that_nobody_uses_any_more_is_let_go(scene: Scene, caller_program: Path, record: Record) -> None:
    with under_filter(caller_program, scene.daemon.node.parent, "on_demand") as gone:
        listener = os.dup(gone.listener)
    scene.daemon.send(json.dumps(STATE).encode(), listener)
    os.close(listener)
    eventually(lambda: scene.daemon.says(" ended "), "it has ended")
    scene.neighbour_is_served()
    record(Row(SECTION, "a runtime that sends a listener whose container is gone", 1, "nothing", scene.leaks()))


def test_a_listener_that_comes_twice_is_served(scene: Scene, caller_program: Path, record: Record) -> None:
    with scene.hostile(caller_program, "on_demand") as twice:
        scene.daemon.attach(twice)
        eventually(lambda: scene.daemon.listeners_of(scene.daemon.monitor) == 3, "it is served twice")
        assert [ask(twice) for _ in range(20)] == ["pids= 1"] * 20
        scene.neighbour_is_served()
    record(Row(SECTION, "a runtime that sends a listener twice", 20, "translated", scene.leaks()))
