"""Monitor and supervisor end, one or both, are replaced and upgraded: no call fails, and the listing is right again."""

from __future__ import annotations

import contextlib
import os
import random
import re
import shutil
import signal
import socket
import struct
import subprocess
import time
from collections.abc import Iterator, Sequence
from pathlib import Path

import pytest

from mpu_notify.notify import protocol
from mpu_notify.notify.monitor import (
    PROGRAM,
    Monitor,
    MonitorError,
    ReplacedError,
    Sockets,
    identify,
    replace_daemon,
    start_daemon,
)
from mpu_notify.notify.protocol import Cause, Step
from mpu_notify.supervisor.service import MONITORED

from .conftest import StartStandIn
from .harness import (
    SECONDS,
    Caller,
    ScriptedChannel,
    caller_host_pid,
    eventually,
    injected,
    kill_and_wait_for,
    stop_and_wait_for,
    under_filter,
)
from .test_serve import Daemon, ask, untranslated, up

CSRC = Path(__file__).parents[2] / "csrc"


@pytest.fixture
def daemon(tmp_path: Path, standin: StartStandIn) -> Iterator[Daemon]:
    driver = standin("--era", "host")
    started = Daemon(tmp_path, driver.control_node)
    started.driver = driver.pid
    yield started
    started.end()


@pytest.fixture
def caller(daemon: Daemon, caller_program: Path) -> Iterator[Caller]:
    """A caller in a container that is attached and translated."""
    with attached(daemon, caller_program) as one:
        yield one


@contextlib.contextmanager
def attached(daemon: Daemon, caller_program: Path) -> Iterator[Caller]:
    with under_filter(caller_program, daemon.node.parent, "on_demand") as one:
        daemon.attach(one)
        up(one)
        eventually(lambda: ask(one) == "pids= 1", "the caller is translated")
        yield one


def is_good(answer: str, caller: Caller) -> bool:
    """Translated, or the driver's own, which may name others, too."""
    return answer == "pids= 1" or str(caller_host_pid(caller)) in answer.removeprefix("pids= ").split()


def test_a_killed_monitor_is_replaced_and_no_call_fails(daemon: Daemon, caller: Caller) -> None:
    for _ in range(5):
        kill_and_wait_for(daemon.find_monitor())
        assert is_good(ask(caller), caller)
        eventually(lambda: ask(caller) == "pids= 1", "the listing is right again")


def test_no_caller_waits_for_another_monitor_for_long(daemon: Daemon, caller: Caller) -> None:
    """Of a killed process the connections may end a little before it does."""
    longest = 0.0
    for _ in range(40):
        begun = time.monotonic()
        kill_and_wait_for(daemon.find_monitor())
        eventually(lambda: ask(caller) == "pids= 1", "the listing is right again")
        longest = max(longest, time.monotonic() - begun)
    assert longest < 5, "a refusal to answer takes 10 seconds to notice"


def test_a_call_that_a_killed_monitor_had_received_is_left_to_the_driver(daemon: Daemon, caller: Caller) -> None:
    monitor = daemon.find_monitor()
    os.kill(daemon.driver, signal.SIGSTOP)
    try:
        caller.poke()
        eventually(lambda: daemon.calls_of(monitor) == 1, "the monitor waits for the driver")
        os.kill(monitor, signal.SIGKILL)
    finally:
        os.kill(daemon.driver, signal.SIGCONT)
    assert is_good(caller.line(), caller)
    eventually(lambda: ask(caller) == "pids= 1", "the listing is right again")


def test_a_monitor_killed_at_any_moment_of_a_call_fails_none(daemon: Daemon, caller: Caller) -> None:
    chance = random.Random(1)  # noqa: S311 - for moments, not for secrets
    for _ in range(30):
        monitor = daemon.find_monitor()
        caller.poke()
        time.sleep(chance.random() / 1000)
        os.kill(monitor, signal.SIGKILL)
        assert is_good(caller.line(), caller)
        eventually(lambda gone=monitor: daemon.find_monitor() != gone, "another monitor is there")
    eventually(lambda: ask(caller) == "pids= 1", "the listing is right again")


def test_monitor_and_supervisor_killed_in_turn_fail_no_call(daemon: Daemon, caller: Caller) -> None:
    for _ in range(4):
        kill_and_wait_for(daemon.find_monitor())
        assert is_good(ask(caller), caller)
        eventually(lambda: ask(caller) == "pids= 1", "the listing is right again")
        daemon.process.kill()
        daemon.process.wait()
        assert ask(caller) == untranslated(caller)
        daemon.start()
        eventually(lambda: ask(caller) == "pids= 1", "the listing is right again")


def test_a_container_that_starts_while_there_is_no_monitor_waits_and_attaches(
    daemon: Daemon, caller: Caller, caller_program: Path
) -> None:
    stop_and_wait_for(daemon.process.pid)
    kill_and_wait_for(daemon.find_monitor())
    try:
        with under_filter(caller_program, daemon.node.parent, "on_demand") as late:
            daemon.attach(late)
            late.go()
            os.kill(daemon.process.pid, signal.SIGCONT)
            assert late.line() == "up"
            eventually(lambda: ask(late) == "pids= 1", "the late one is translated")
            eventually(lambda: ask(caller) == "pids= 1", "and so is the other")
    finally:
        os.kill(daemon.process.pid, signal.SIGCONT)


def test_a_replaced_monitor_leaves_nothing_behind(daemon: Daemon, caller: Caller) -> None:
    def fds() -> list[int]:
        with daemon.greeted() as monitor:  # so that it always has this one more
            return [len(list(Path(f"/proc/{pid}/fd").iterdir())) for pid in (daemon.process.pid, monitor)]

    eventually(lambda: daemon.log.read_text().count("outcome=translated") == 1, "the first call is over for all")
    before = fds()
    for _ in range(5):
        kill_and_wait_for(daemon.find_monitor())
        eventually(lambda: ask(caller) == "pids= 1", "the listing is right again")
        eventually(lambda: fds() == before, "both have the files that they had")
    caller.end()
    eventually(lambda: daemon.says("ended container=one"), "the container's end is told")
    ended = re.search(r"ended container=one calls=(\d+).* translated=(\d+)", daemon.log.read_text())
    assert ended, daemon.log.read_text()
    assert int(ended[2]) >= 5, "what earlier monitors counted is in the sum"


def test_a_monitor_takes_the_place_of_a_living_one(daemon: Daemon, caller: Caller, caller_program: Path) -> None:
    before = daemon.find_monitor()
    replace_daemon(daemon.control)
    eventually(lambda: not Path(f"/proc/{before}").exists(), "the old one has ended")
    assert is_good(ask(caller), caller)
    eventually(lambda: ask(caller) == "pids= 1", "the listing is right again")
    assert daemon.find_monitor() != before
    with attached(daemon, caller_program) as another:
        assert ask(another) == "pids= 1"


def test_a_monitor_that_is_replaced_finishes_the_call_that_it_received(
    daemon: Daemon, caller: Caller, caller_program: Path
) -> None:
    """And nobody waits for that but its own container."""
    before = daemon.find_monitor()
    with attached(daemon, caller_program) as other:
        os.kill(daemon.driver, signal.SIGSTOP)
        try:
            caller.poke()
            eventually(lambda: daemon.calls_of(before) == 1, "the old one waits for the driver")
            replace_daemon(daemon.control)
            eventually(lambda: daemon.listeners_of(before) == 1, "the other container has changed hands")
            assert Path(f"/proc/{before}").exists()
        finally:
            os.kill(daemon.driver, signal.SIGCONT)
        assert is_good(caller.line(), caller)
        eventually(lambda: not Path(f"/proc/{before}").exists(), "the old one has ended")
        for one in (caller, other):
            eventually(lambda one=one: ask(one) == "pids= 1", "the listing is right again")


def test_a_replaced_monitor_that_is_killed_in_a_call_leaves_it_to_the_driver(daemon: Daemon, caller: Caller) -> None:
    before = daemon.find_monitor()
    os.kill(daemon.driver, signal.SIGSTOP)
    try:
        caller.poke()
        eventually(lambda: daemon.calls_of(before) == 1, "the old one waits for the driver")
        replace_daemon(daemon.control)
        os.kill(before, signal.SIGKILL)
    finally:
        os.kill(daemon.driver, signal.SIGCONT)
    assert is_good(caller.line(), caller)
    eventually(lambda: ask(caller) == "pids= 1", "the listing is right again")


def test_a_successor_that_dies_at_once_is_made_good_for(daemon: Daemon, caller: Caller) -> None:
    with socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET) as successor:
        successor.connect(str(daemon.control))
        _, sockets, _, _ = socket.recv_fds(successor, 100, 2)
        successor.send(struct.pack("=IHHII", 16, OTHER_VERSION, TAKE_OVER, 0, 0))
        _, files, _, _ = socket.recv_fds(successor, 100, 3)
        assert (len(sockets), len(files)) == (2, 3)
        for fd in (*sockets, *files):
            os.close(fd)
    assert is_good(ask(caller), caller)
    eventually(lambda: ask(caller) == "pids= 1", "the listing is right again")
    eventually(lambda: len(daemon.monitors()) == 1, "there is the one monitor")


HELLO, TAKE_OVER = 1, 13
OTHER_VERSION = 99


@pytest.fixture(scope="session")
def other_version(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The monitor, built with another version of the protocol."""
    directory = tmp_path_factory.mktemp("other-version")
    sources = shutil.copytree(CSRC, directory / "csrc")
    header = sources / "protocol.h"
    text = header.read_text()
    former = f"#define MPU_PROTOCOL_VERSION {protocol.VERSION}\n"
    assert former in text
    header.write_text(text.replace(former, f"#define MPU_PROTOCOL_VERSION {protocol.VERSION + 1}\n"))
    program = directory / PROGRAM.name
    others = ("hook", "inject", "runtime")
    files = [str(file) for file in sources.glob("*.c") if file.stem not in others]
    subprocess.run(["gcc", "-std=c11", "-D_GNU_SOURCE", "-O1", "-o", str(program), *files, "-lpthread"], check=True)
    return program


def test_a_supervisor_of_another_version_brings_its_own_monitor(
    daemon: Daemon, caller: Caller, other_version: Path
) -> None:
    replace_daemon(daemon.control, other_version)
    eventually(lambda: ask(caller) == "pids= 1", "the supervisor has put its own in the place of that")
    assert daemon.program_of(daemon.find_monitor()) == PROGRAM.resolve()
    assert not daemon.says("does not have; answering")


def test_a_second_supervisor_is_left_in_peace_by_the_first_one_when_that_wakes_up(
    daemon: Daemon, caller: Caller
) -> None:
    first = daemon.process
    stop_and_wait_for(first.pid)
    daemon.start()
    eventually(lambda: ask(caller) == "pids= 1", "the caller is translated")
    os.kill(first.pid, signal.SIGCONT)
    assert first.wait(SECONDS) == 1
    assert daemon.says("another supervisor has taken this one's place")
    assert ask(caller) == "pids= 1"
    assert daemon.process.poll() is None


def test_a_supervisor_that_slept_through_it_all_does_no_harm_when_it_wakes_up(daemon: Daemon, caller: Caller) -> None:
    """Another supervisor has come, the monitor was killed, and that one has started another."""
    first = daemon.process
    stop_and_wait_for(first.pid)
    daemon.start()
    eventually(lambda: ask(caller) == "pids= 1", "the other one knows the caller")
    kill_and_wait_for(daemon.monitor)
    eventually(lambda: ask(caller) == "pids= 1", "the listing is right again")
    after = daemon.monitors()
    assert len(after) == 1
    os.kill(first.pid, signal.SIGCONT)
    assert first.wait(SECONDS) == 1
    assert daemon.monitors() == after
    assert daemon.process.poll() is None
    assert ask(caller) == "pids= 1"


@contextlib.contextmanager
def another_ones(daemon: Daemon) -> Iterator[Monitor]:
    """A monitor that is lost, with the daemon's sockets, as a supervisor knows it that slept meanwhile."""
    ours, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
    with theirs, Monitor(ours, 1000) as lost:
        lost.sockets = sockets_of(daemon)
        yield lost


def sockets_of(daemon: Daemon) -> Sockets:
    with socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET) as control:
        control.connect(str(daemon.control))
        _, fds, _, _ = socket.recv_fds(control, 100, 2)
    return Sockets(*fds)


def test_a_supervisor_that_was_not_told_of_another_one_finds_it(daemon: Daemon, caller: Caller) -> None:
    with another_ones(daemon) as lost:
        assert lost.is_in_use()
        with pytest.raises(ReplacedError, match=f"process {daemon.process.pid}"):
            Monitor.connect(daemon.control, identify(daemon.node), MONITORED, 1000, lost)
    assert ask(caller) == "pids= 1"


def test_a_monitor_that_ends_before_it_greets_is_not_waited_for(tmp_path: Path) -> None:
    control = tmp_path / "agent.control"
    ours, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
    with socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET) as kept, theirs, Monitor(ours, 1000) as lost:
        kept.bind(str(control))
        kept.listen()
        lost.sockets = Sockets(os.dup(kept.fileno()), os.dup(kept.fileno()))
        with pytest.raises(MonitorError, match="it ended before it greeted"):
            Monitor.connect(control, identify(Path("/dev/null")), MONITORED, 1000, lost)


def started_beside(daemon: Daemon, *options: str, fds: Sequence[int] = ()) -> str:
    """What a monitor says that ends at once."""
    done = subprocess.run(
        [PROGRAM, *options], pass_fds=fds, capture_output=True, text=True, check=False, timeout=SECONDS
    )
    assert (done.returncode, done.stdout) == (1, "")
    assert daemon.socket.exists()
    assert daemon.control.exists()
    return done.stderr


def test_a_monitor_whose_queue_is_full_is_not_waited_for(tmp_path: Path) -> None:
    """As that of one that is stopped."""
    place = str(tmp_path / "control")
    with contextlib.ExitStack() as opened:
        kind = (socket.AF_UNIX, socket.SOCK_SEQPACKET | socket.SOCK_NONBLOCK)
        listening = opened.enter_context(socket.socket(*kind))
        listening.bind(place)
        listening.listen(0)
        with contextlib.suppress(BlockingIOError):
            while True:
                opened.enter_context(socket.socket(*kind)).connect(place)
        command = [PROGRAM, "--take-over", place]
        done = subprocess.run(command, capture_output=True, text=True, check=False, timeout=SECONDS)
        assert done.returncode == 1
        assert "Resource temporarily unavailable" in done.stderr


def test_two_monitors_do_not_serve_one_path(daemon: Daemon, caller: Caller) -> None:
    other = daemon.socket.with_name("other")
    for agent, control in ((daemon.socket, other), (other, daemon.control), (daemon.socket, daemon.control)):
        said = started_beside(daemon, "--listen", str(agent), "--control", str(control))
        assert "Address already in use" in said
    assert ask(caller) == "pids= 1"


def test_two_monitors_do_not_serve_one_socket(daemon: Daemon, caller: Caller) -> None:
    sockets = sockets_of(daemon)
    options = ["--agent-fd", str(sockets.agent), "--control-fd", str(sockets.control)]
    assert "another monitor serves these sockets" in started_beside(daemon, *options, fds=sockets)
    for fd in sockets:
        os.close(fd)
    assert ask(caller) == "pids= 1"


def test_serve_starts_no_monitor_beside_one_that_hangs(daemon: Daemon, caller: Caller) -> None:
    daemon.process.kill()
    daemon.process.wait()
    stop_and_wait_for(daemon.monitor)
    try:
        done = subprocess.run(daemon.command(), capture_output=True, text=True, check=False, timeout=2 * SECONDS)
        assert done.returncode == 1
        assert "the monitor did not come up: timed out" in done.stderr
        assert daemon.monitors() == [daemon.monitor]
    finally:
        os.kill(daemon.monitor, signal.SIGCONT)
    daemon.start()
    eventually(lambda: ask(caller) == "pids= 1", "the listing is right again")


@contextlib.contextmanager
def given_up_successor(daemon: Daemon, directory: Path) -> Iterator[tuple[int, socket.socket]]:
    """A monitor that was given the daemon's sockets, and the end of the one that gave them, which has not ended."""
    place = directory / "place"
    with socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET) as listening:
        listening.bind(str(place))
        listening.listen()
        command = [PROGRAM, "--take-over", place]
        with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as successor:
            predecessor, _ = listening.accept()
            with predecessor:
                sockets = sockets_of(daemon)
                hello = struct.pack("=IHHIIIIII", 32, protocol.VERSION, HELLO, 0, 0, os.getpid(), 0, 0, 0)
                socket.send_fds(predecessor, [hello], list(sockets))
                for fd in sockets:
                    os.close(fd)
                assert successor.stdout is not None
                assert successor.stdout.readline() == "READY\n"
                yield successor.pid, predecessor
                assert successor.wait(SECONDS) == 0


def test_a_successor_that_was_given_up_gives_back_what_it_has(
    daemon: Daemon, caller: Caller, caller_program: Path, tmp_path: Path
) -> None:
    """As one that was stopped in the middle of the change."""
    with (
        given_up_successor(daemon, tmp_path) as (successor, predecessor),
        under_filter(caller_program, daemon.node.parent, "on_demand") as late,
    ):
        stop_and_wait_for(daemon.monitor)
        daemon.attach(late)
        eventually(lambda: daemon.listeners_of(successor) == 1, "the late one is the successor's")
        os.kill(daemon.monitor, signal.SIGCONT)
        predecessor.close()
        late.go()
        assert late.line() == "up"
        eventually(lambda: ask(late) == "pids= 1", "the late one is translated")
        assert ask(caller) == "pids= 1"
        eventually(lambda: daemon.monitors() == [daemon.monitor], "there is the one monitor")


def test_a_monitor_killed_before_it_can_say_that_it_was_replaced_leaves_one_that_serves_all(
    daemon: Daemon, caller: Caller
) -> None:
    before = daemon.find_monitor()
    with injected(before, "--trace=sendmsg", "--inject=sendmsg:signal=KILL:when=2"):  # the first is HELLO
        replace_daemon(daemon.control)
        eventually(lambda: before not in daemon.monitors(), "it is killed")
    eventually(lambda: ask(caller) == "pids= 1", "the listing is right again")
    eventually(lambda: len(daemon.monitors()) == 1, "there is the one monitor")
    assert daemon.says("the monitor is lost")


def test_a_monitor_killed_in_the_middle_of_the_change_leaves_one_that_serves_all(
    daemon: Daemon, caller: Caller, caller_program: Path
) -> None:
    """Whether the successor or the supervisor's new one comes first."""
    for _ in range(5):
        before = daemon.find_monitor()
        replace_daemon(daemon.control)
        os.kill(before, signal.SIGKILL)
        eventually(lambda: ask(caller) == "pids= 1", "the listing is right again")
        eventually(lambda: len(daemon.monitors()) == 1, "there is the one monitor")
        with attached(daemon, caller_program) as another:
            assert ask(another) == "pids= 1"


class ShiftOfSupervisors:
    """A daemon's monitor, before which one supervisor after the other is the test."""

    def __init__(self, directory: Path, node: Path, silence_ms: int) -> None:
        self.control = directory / "agent.control"
        self.node, self.silence_ms = node, silence_ms
        start_daemon(directory / "agent.sock", self.control)
        self.present = self._connect()

    def _connect(self) -> Monitor:
        monitor = Monitor.connect(self.control, identify(self.node), MONITORED, self.silence_ms)
        assert monitor is not None
        return monitor

    def attach(self, caller: Caller) -> ScriptedChannel:
        self.present.attach(caller.listener, b"{}")
        return self.channel()

    def channel(self) -> ScriptedChannel:
        arrival = self.present.receive()
        assert arrival is not None
        arrival.files.close()
        return ScriptedChannel(arrival.channel)

    def change(self) -> ScriptedChannel:
        """The next supervisor takes over, with the only listener that there is."""
        former, self.present = self.present, self._connect()
        channel = self.channel()
        former.close()
        return channel

    def end(self) -> None:
        self.present.leave()
        self.present.close()
        eventually(lambda: not self.control.exists(), "the monitor ended")


@pytest.fixture
def shift(tmp_path: Path, standin: StartStandIn, silence_ms: int) -> Iterator[ShiftOfSupervisors]:
    started = ShiftOfSupervisors(tmp_path, standin("--era", "host").control_node, silence_ms)
    yield started
    started.end()


@pytest.mark.parametrize("silence_ms", [2 * 1000])
def test_a_new_supervisor_is_asked_at_once_however_silent_the_one_before_was(
    shift: ShiftOfSupervisors, caller_program: Path
) -> None:
    with under_filter(caller_program, shift.node.parent, "on_demand") as caller:
        silent = shift.attach(caller)
        up(caller)
        caller.poke()
        silent.up_to(Step.OUT)
        assert caller.line() == untranslated(caller)
        assert silent.outcome() is Cause.SUPERVISOR_SILENT
        fresh = shift.change()
        caller.poke()
        assert fresh.pass_all_on() is Cause.TRANSLATED


@pytest.mark.parametrize("silence_ms", [60 * 1000])
def test_a_call_that_waits_for_a_supervisor_does_not_wait_for_its_successor(
    shift: ShiftOfSupervisors, caller_program: Path
) -> None:
    with under_filter(caller_program, shift.node.parent, "on_demand") as caller:
        waited_for = shift.attach(caller)
        up(caller)
        for _ in range(10):
            caller.poke()
            waited_for.up_to(Step.OUT)
            waited_for = shift.change()
            assert caller.line() == untranslated(caller)


def test_a_private_monitor_that_is_killed_is_replaced(standin: StartStandIn, caller_program: Path) -> None:
    node = standin("--era", "host").control_node
    command = ["mpu-notify", "run", "--device", node, "--", caller_program, node.parent, "on_demand"]
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True) as run:
        assert run.stdin is not None
        assert run.stdout is not None

        def answer() -> str:
            run.stdin.write("x")  # type: ignore[union-attr]
            run.stdin.flush()  # type: ignore[union-attr]
            return run.stdout.readline().strip()  # type: ignore[union-attr]

        assert run.stdout.readline() == "up\n"
        for _ in range(3):
            eventually(lambda: answer() == "pids= 2", "the listing is right")
            (monitor,) = [pid for pid in descendants(run.pid) if name_of(pid).startswith("mpu-notify-moni")]
            kill_and_wait_for(monitor)
            assert answer().startswith("pids= ")
        run.stdin.close()
        assert run.wait(SECONDS) == 0


def name_of(pid: int) -> str:
    return Path(f"/proc/{pid}/comm").read_text()


def descendants(pid: int) -> list[int]:
    children = [int(word) for word in Path(f"/proc/{pid}/task/{pid}/children").read_text().split()]
    return children + [below for child in children for below in descendants(child)]


class Keeper:
    """A service manager that starts the monitor, keeps what it is given, and starts it again with that."""

    def __init__(self, directory: Path, **environment: str) -> None:
        self.environment = environment
        self.sockets = [socket.socket(socket.AF_UNIX), socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET)]
        for listening, name in zip(self.sockets, ("agent.sock", "agent.control"), strict=True):
            listening.bind(str(directory / name))
            listening.listen()
        self.notify = socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM)
        self.notify.bind(str(directory / "notify"))
        self.notify.settimeout(SECONDS)
        self.address = directory / "notify"
        self.stored: dict[str, list[int]] = {}
        self.start()

    def start(self) -> None:
        given = [one.fileno() for one in self.sockets] + [fd for fds in self.stored.values() for fd in fds]
        names = ["agent", "control"] + [name for name, fds in self.stored.items() for _ in fds]
        # As systemd does: from 3 on, and LISTEN_PID is the program's own.
        moves = "; ".join(f"os.dup2({fd}, {1000 + number})" for number, fd in enumerate(given))
        settle = "; ".join(f"os.dup2({1000 + number}, {3 + number})" for number in range(len(given)))
        environment = f"LISTEN_PID=str(os.getpid()), LISTEN_FDS='{len(given)}', LISTEN_FDNAMES='{':'.join(names)}'"
        options = "'--agent-fd', '3', '--control-fd', '4'"
        script = (
            f"import os; {moves}; {settle}; os.closerange(3 + {len(given)}, 2000);"
            f"os.environ.update({environment}, NOTIFY_SOCKET={str(self.address)!r}, **{self.environment!r});"
            f"os.execv({str(PROGRAM)!r}, [{str(PROGRAM)!r}, {options}])"
        )
        self.process = subprocess.Popen(["python3", "-c", script], pass_fds=given, stdout=subprocess.DEVNULL)
        while self.hear() != "READY=1":
            pass

    def hear(self) -> str:
        """The next thing that it says; what it wants kept is kept."""
        text, fds, _, _ = socket.recv_fds(self.notify, 1000, 10)
        first, _, rest = text.decode().strip().partition("\n")
        name = rest.removeprefix("FDNAME=")
        if first == "FDSTORE=1":
            duplicates = self.stored.get(name, [])
            self.stored[name] = duplicates or fds
            for fd in fds if duplicates else ():
                os.close(fd)
        elif first == "FDSTOREREMOVE=1":
            for fd in self.stored.pop(name):
                os.close(fd)
        return first

    def end(self) -> None:
        self.process.terminate()
        self.process.wait(SECONDS)
        for fds in self.stored.values():
            for fd in fds:
                os.close(fd)
        for one in (*self.sockets, self.notify):
            one.close()


@pytest.fixture
def keeper(tmp_path: Path) -> Iterator[Keeper]:
    one = Keeper(tmp_path)
    yield one
    one.end()


@pytest.fixture(params=["", "--no-monitor"])
def kept(tmp_path: Path, standin: StartStandIn, keeper: Keeper, request: pytest.FixtureRequest) -> Iterator[Daemon]:
    """A supervisor whose monitor the service manager keeps."""
    started = Daemon(tmp_path, standin("--era", "host").control_node, *request.param.split())
    assert started.find_monitor() == keeper.process.pid
    yield started
    with started.process:
        started.process.terminate()


def test_a_service_manager_that_watches_the_monitor_hears_that_it_is_well(tmp_path: Path) -> None:
    watching = Keeper(tmp_path, WATCHDOG_USEC="100000")
    try:
        assert [watching.hear() for _ in range(3)] == ["WATCHDOG=1"] * 3
    finally:
        watching.end()


def test_what_a_service_manager_keeps_outlives_monitor_and_supervisor_both(
    kept: Daemon, keeper: Keeper, caller_program: Path
) -> None:
    with attached(kept, caller_program) as caller:
        assert keeper.hear() == "FDSTORE=1"
        for process in (keeper.process, kept.process):
            process.kill()
            process.wait()
        caller.poke()
        assert not caller.says_something_within(0.1), "it waits, and does not fail"
        keeper.start()
        assert caller.line() == untranslated(caller)
        kept.start()
        eventually(lambda: ask(caller) == "pids= 1", "the listing is right again")
        caller.end()
        eventually(lambda: keeper.hear() == "FDSTOREREMOVE=1", "what is over is not kept")
        assert not keeper.stored


def test_a_monitor_that_its_service_manager_restarts_lets_its_listeners_go_at_once(
    kept: Daemon, keeper: Keeper, caller_program: Path
) -> None:
    with attached(kept, caller_program) as caller:
        assert keeper.hear() == "FDSTORE=1"
        keeper.process.terminate()
        assert keeper.process.wait(SECONDS) == 0
        caller.poke()
        keeper.start()
        assert is_good(caller.line(), caller)
        eventually(lambda: ask(caller) == "pids= 1", "the listing is right again, by the same supervisor")
        assert kept.socket.exists(), "the socket is the service manager's"


def test_a_supervisor_waits_for_the_service_manager_to_start_the_monitor(
    kept: Daemon, keeper: Keeper, caller_program: Path
) -> None:
    with attached(kept, caller_program) as caller:
        assert keeper.hear() == "FDSTORE=1"
        keeper.process.kill()
        keeper.process.wait()
        eventually(lambda: kept.says("its containers get another"), "the supervisor noticed")
        keeper.start()
        eventually(lambda: ask(caller) == "pids= 1", "the listing is right again")
        assert kept.find_monitor() == keeper.process.pid
