"""The daemon: containers attach by the agent's socket, supervisors come and go, and nobody else gets in."""

from __future__ import annotations

import contextlib
import json
import os
import re
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from mpu_notify.notify import protocol
from tests import installation

from .conftest import StartStandIn
from .harness import SECONDS, Caller, caller_host_pid, eventually, stop_and_wait_for, under_filter

STATE = {"ociVersion": "1.1.0", "fds": ["seccompFd"], "pid": 1, "state": {"id": "one", "status": "creating"}}
READY = re.compile(r"READY socket=(\S+) monitor=(\d+) supervisor=(\d+)")


class Daemon:
    """`mpu-notify serve` on a socket of a test's own."""

    def __init__(self, directory: Path, node: Path, *options: str | Path) -> None:
        self.socket = directory / "agent.sock"
        self.control = directory / "agent.control"
        self.driver = 0
        self.log = directory / "log"
        self.node = node
        self.options = options
        self.start()

    def start(self, **environment: str) -> None:
        """Start it, or start it again beside its monitor."""
        command = [*self.command(), "--log-level", "debug", *self.options]
        with self.log.open("ab") as log:
            self.process = subprocess.Popen(
                command, stdout=subprocess.PIPE, stderr=log, text=True, env={**os.environ, **environment}
            )
        assert self.process.stdout is not None
        line = self.process.stdout.readline()
        ready = READY.match(line)
        assert ready, (line, self.log.read_text())
        assert ready[1] == str(self.socket)
        self.monitor = int(ready[2])
        assert int(ready[3]) == self.process.pid

    def command(self) -> list[str]:
        """What starts it, but for its log and options."""
        return ["mpu-notify", "serve", "--listen", str(self.socket), "--device", str(self.node)]

    def send(self, data: bytes, *fds: int) -> None:
        """Be a runtime: one message with its files, then the end."""
        with socket.socket(socket.AF_UNIX) as runtime:
            runtime.connect(str(self.socket))
            if fds:
                socket.send_fds(runtime, [data], list(fds))
            elif data:
                runtime.sendall(data)

    def attach(self, caller: Caller) -> None:
        self.send(json.dumps(STATE).encode(), caller.listener)

    def says(self, text: str) -> bool:
        return text in self.log.read_text()

    def find_monitor(self) -> int:
        """The process that serves the control socket now."""
        with self.greeted() as monitor:
            return monitor

    @contextlib.contextmanager
    def greeted(self) -> Iterator[int]:
        """Be connected to the control socket, and say no more; the process that serves it now."""
        with socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET) as control:
            control.connect(str(self.control))
            control.settimeout(SECONDS)
            packet, fds, _, _ = socket.recv_fds(control, 100, 2)
            for fd in fds:
                os.close(fd)
            hello = protocol.decode(packet)
            assert isinstance(hello, protocol.Hello)
            yield hello.pid

    def monitors(self) -> list[int]:
        """The monitors that have the control socket, whether they serve it or not."""
        lines = (line.split() for line in Path("/proc/net/unix").read_text().splitlines())
        sockets = {f"socket:[{line[6]}]" for line in lines if line[-1] == str(self.control) and line[3] == "00010000"}
        every = [one for one in Path("/proc").glob("[0-9]*") if _bytes(one / "comm") == b"mpu-notify-moni\n"]
        return [int(one.name) for one in every if _links(one / "fd") & sockets]

    def program_of(self, pid: int) -> Path:
        return Path(f"/proc/{pid}/exe").readlink()

    def listeners_of(self, monitor: int) -> int:
        """How many listeners a monitor serves: threads, but the main one."""
        return len(list(Path(f"/proc/{monitor}/task").iterdir())) - 1

    def calls_of(self, monitor: int) -> int:
        """How many of them wait for the stand-in driver."""
        waits = [task / "wchan" for task in Path(f"/proc/{monitor}/task").iterdir()]
        return sum("fuse" in wait.read_text() or "request_wait" in wait.read_text() for wait in waits)

    def monitor_fds(self) -> int:
        return len(list(Path(f"/proc/{self.monitor}/fd").iterdir()))

    def end(self) -> None:
        """End both, the monitor even where a test killed its supervisor."""
        with self.process:
            self.process.terminate()
        with contextlib.suppress(ConnectionRefusedError, FileNotFoundError, ConnectionResetError):
            os.kill(self.find_monitor(), signal.SIGTERM)
        eventually(lambda: not self.socket.exists(), "the monitor ended and took its socket away")


@pytest.fixture
def daemon(tmp_path: Path, standin: StartStandIn) -> Iterator[Daemon]:
    started = Daemon(tmp_path, standin("--era", "host").control_node)
    yield started
    started.end()


@pytest.fixture
def caller(daemon: Daemon, caller_program: Path) -> Iterator[Caller]:
    """A caller whose filter nobody has been given yet."""
    with under_filter(caller_program, daemon.node.parent, "on_demand") as one:
        yield one


def ask(caller: Caller) -> str:
    caller.poke()
    return caller.line()


def untranslated(caller: Caller) -> str:
    return f"pids= {caller_host_pid(caller)}"


def up(caller: Caller) -> None:
    caller.go()
    assert caller.line() == "up"


def test_a_container_that_attaches_sees_its_own_pids(daemon: Daemon, caller: Caller) -> None:
    daemon.attach(caller)
    up(caller)
    eventually(lambda: ask(caller) == "pids= 1", "the caller is translated")
    assert daemon.says("container=one")


def test_what_a_native_driver_gets_right_is_left_to_it(
    tmp_path: Path, standin: StartStandIn, caller_program: Path
) -> None:
    daemon = Daemon(tmp_path, standin("--era", "native").control_node)
    try:
        with under_filter(caller_program, daemon.node.parent, "on_demand") as caller:
            daemon.attach(caller)
            up(caller)
            caller.poke("i")
            assert caller.line() == "pid=1 result=0x0 private=0"
            assert ask(caller) == "pids= 1"
            eventually(lambda: daemon.says("control=GPU_GET_PIDS"), "the list is translated")
            assert daemon.says("era=native")
            assert not daemon.says("GPU_GET_PID_INFO")
    finally:
        daemon.end()


def test_each_cause_is_warned_of_once_however_many_execs_a_container_has(daemon: Daemon, caller_program: Path) -> None:
    for number in range(3):
        with under_filter(caller_program, daemon.node.parent, "flags") as caller:
            daemon.attach(caller)
            caller.go()
            assert caller.line().startswith("ret=0")
            caller.end()
        ended = number + 1
        eventually(lambda ended=ended: daemon.log.read_text().count(" info ended ") == ended, "it has ended")
    assert daemon.log.read_text().count("outcome=flags_set") == 4, "each call, and one warning"
    assert daemon.log.read_text().count(" warning ") == 1


def test_a_container_is_known_by_our_metadata(daemon: Daemon, caller: Caller) -> None:
    metadata = json.dumps({"container": "blue", "route": "shim"})
    daemon.send(json.dumps({**STATE, "metadata": metadata}).encode(), caller.listener)
    eventually(lambda: daemon.says("container=blue") and daemon.says("route=shim"), "it is attached by its name")


def test_a_container_attaches_without_a_supervisor_and_is_translated_when_one_comes(
    daemon: Daemon, caller: Caller
) -> None:
    daemon.process.kill()
    daemon.process.wait()
    daemon.attach(caller)
    up(caller)
    assert ask(caller) == untranslated(caller)
    daemon.start()
    eventually(lambda: ask(caller) == "pids= 1", "the caller is translated")


def test_a_supervisor_that_is_killed_and_started_again_takes_its_containers_over(
    daemon: Daemon, caller: Caller
) -> None:
    daemon.attach(caller)
    up(caller)
    monitor = daemon.monitor
    for _ in range(3):
        eventually(lambda: ask(caller) == "pids= 1", "the caller is translated")
        daemon.process.kill()
        daemon.process.wait()
        assert ask(caller) == untranslated(caller)
        daemon.start()
        assert daemon.monitor == monitor, "the monitor went on"
    eventually(lambda: ask(caller) == "pids= 1", "the caller is translated")


def test_a_second_supervisor_takes_the_place_of_the_first(daemon: Daemon, caller: Caller) -> None:
    daemon.attach(caller)
    up(caller)
    first = daemon.process
    daemon.start()
    assert first.wait(SECONDS) == 1
    eventually(lambda: ask(caller) == "pids= 1", "the caller is translated")


def test_of_several_that_start_at_once_one_stays_and_all_have_the_same_monitor(
    standin: StartStandIn, tmp_path: Path
) -> None:
    node = standin("--era", "host").control_node
    command = ["mpu-notify", "serve", "--listen", tmp_path / "agent.sock", "--device", node]

    def monitors() -> list[int]:
        wanted = os.fsencode(tmp_path / "agent.control")
        return [int(one.parent.name) for one in Path("/proc").glob("[0-9]*/cmdline") if wanted in _bytes(one)]

    for _ in range(5):
        started = []
        for number in range(4):
            with (tmp_path / f"said-{number}").open("w") as said:  # no pipe: the monitor has it, too, and lives on
                started.append(subprocess.Popen(command, stdout=said, stderr=said))

        def staying(started: list[subprocess.Popen[bytes]] = started) -> list[int]:
            return [number for number, one in enumerate(started) if one.poll() is None]

        try:
            eventually(lambda staying=staying: len(staying()) == 1, "one stays")
            assert len(monitors()) == 1
            for number in {*range(4)} - {*staying()}:
                assert "another supervisor has taken this one's place" in (tmp_path / f"said-{number}").read_text()
        finally:
            for one in started:
                one.terminate()
                one.wait(SECONDS)
            eventually(lambda: not monitors(), "the monitor ends as well")


def _links(directory: Path) -> set[str]:
    found = set()
    with contextlib.suppress(FileNotFoundError, ProcessLookupError):
        for link in directory.iterdir():
            with contextlib.suppress(FileNotFoundError, ProcessLookupError):
                found.add(os.readlink(link))  # noqa: PTH115 - not a path
    return found


def _bytes(file: Path) -> bytes:
    try:
        return file.read_bytes()
    except (FileNotFoundError, ProcessLookupError):
        return b""


@pytest.mark.parametrize(
    ("message", "why"),
    [
        (b"nonsense", "no JSON object"),
        (json.dumps(STATE).encode(), "no seccomp listener"),
        (b"{" + b" " * (1 << 20) + b"}", "over 1 MiB"),
    ],
    ids=["nonsense", "no listener", "oversized"],
)
def test_a_message_that_is_refused_harms_nobody(daemon: Daemon, caller: Caller, message: bytes, why: str) -> None:
    before = daemon.monitor_fds()
    with contextlib.suppress(BrokenPipeError):  # refused before all of it was sent
        daemon.send(message)
    eventually(lambda: daemon.says(why), "the refusal is logged")
    eventually(lambda: daemon.monitor_fds() == before, "all that came is closed")
    daemon.attach(caller)
    up(caller)
    eventually(lambda: ask(caller) == "pids= 1", "the next container attaches")


def test_files_that_come_with_a_refused_message_are_closed(daemon: Daemon) -> None:
    before = daemon.monitor_fds()
    with Path("/dev/null").open("rb") as one, Path("/dev/zero").open("rb") as other:
        daemon.send(json.dumps(STATE).encode(), one.fileno(), other.fileno())
    eventually(lambda: daemon.says("no seccomp listener"), "the refusal is logged")
    assert daemon.monitor_fds() == before


def test_a_listener_with_a_message_that_is_no_json_is_refused(daemon: Daemon, caller: Caller) -> None:
    before = daemon.monitor_fds()
    daemon.send(b"nonsense", caller.listener)
    eventually(lambda: daemon.says("no JSON object"), "the refusal is logged")
    assert daemon.monitor_fds() == before


def test_a_slow_message_is_refused_and_holds_up_nobody(daemon: Daemon, caller: Caller) -> None:
    with socket.socket(socket.AF_UNIX) as slow:
        slow.connect(str(daemon.socket))
        slow.sendall(b"{")
        daemon.attach(caller)
        up(caller)
        eventually(lambda: ask(caller) == "pids= 1", "another container attaches meanwhile")
        eventually(lambda: daemon.says("did not come within 5 seconds"), "the slow one is refused")


def test_whoever_only_looks_whether_it_is_there_is_not_complained_of(daemon: Daemon, caller: Caller) -> None:
    daemon.send(b"")
    daemon.attach(caller)
    up(caller)
    eventually(lambda: ask(caller) == "pids= 1", "the caller is translated")
    assert not daemon.says("refused")


_CONNECT = """
import contextlib, socket, sys
for _ in range(int(sys.argv[2])):
    s = socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET if sys.argv[1].endswith("control") else socket.SOCK_STREAM)
    s.connect(sys.argv[1])
    with contextlib.suppress(BrokenPipeError, ConnectionResetError):
        s.sendall(b"{}")
        s.shutdown(socket.SHUT_WR)
        assert not s.recv(1), "it is greeted"
"""

IN_ANOTHER_NAMESPACE = ("unshare", "--pid", "--fork", "--mount-proc")
AS_ANOTHER_USER = ("setpriv", "--reuid=65534", "--regid=65534", "--clear-groups")


def connect_as(stranger: tuple[str, ...], to: Path, times: int = 1) -> None:
    """Connect as somebody else, who reaches the socket, and see that nothing is said to them."""
    for directory in (to, *to.parents):
        if directory.stat().st_uid == os.getuid() and directory != Path("/"):
            directory.chmod(directory.stat().st_mode | 0o007)
    command = [*stranger, installation.PYTHON, "-c", _CONNECT, to, str(times)]
    subprocess.run(command, check=True, timeout=SECONDS, cwd="/")


def test_a_stranger_does_not_become_the_supervisor(daemon: Daemon, caller: Caller) -> None:
    daemon.attach(caller)
    up(caller)
    eventually(lambda: ask(caller) == "pids= 1", "the caller is translated")
    for stranger in (IN_ANOTHER_NAMESPACE, AS_ANOTHER_USER):
        connect_as(stranger, daemon.control)
    said = "on the control socket: it is neither root nor our user in our PID namespace"
    eventually(lambda: daemon.log.read_text().count(said) == 2, "the refusals are logged")
    assert ask(caller) == "pids= 1"


def test_strangers_cannot_flood_the_log(daemon: Daemon) -> None:
    for to in (daemon.socket, daemon.control):
        connect_as(AS_ANOTHER_USER, to, times=100)
    assert 0 < daemon.log.read_text().count("refused process") < 100

    def says_how_many() -> bool:
        connect_as(AS_ANOTHER_USER, daemon.control)
        return re.search(r"refused \d+ more processes", daemon.log.read_text()) is not None

    eventually(says_how_many, "those that were left out are counted")


_LISTEN = """
import socket, sys
s = socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET)
s.bind(sys.argv[1])
s.listen()
print("listens", flush=True)
s.accept()[0].recv(1)
"""


def test_a_monitor_of_another_user_is_not_spoken_to_nor_replaced(tmp_path: Path) -> None:
    control = tmp_path / "agent.control"
    for directory in tmp_path.parents:
        if directory.stat().st_uid == os.getuid() and directory != Path("/"):
            directory.chmod(directory.stat().st_mode | 0o001)
    tmp_path.chmod(0o777)
    command = [*AS_ANOTHER_USER, installation.PYTHON, "-c", _LISTEN, control]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True, cwd="/") as other:
        try:
            assert other.stdout is not None
            assert other.stdout.readline() == "listens\n"
            serve = ["mpu-notify", "serve", "--listen", tmp_path / "agent.sock", "--device", "/dev/null"]
            done = subprocess.run(serve, capture_output=True, text=True, check=False, timeout=SECONDS)
            assert done.returncode == 1
            assert "agent.control is of user 65534" in done.stderr
            assert control.exists()
            assert not (tmp_path / "agent.sock").exists()
        finally:
            other.kill()


def test_a_process_in_another_pid_namespace_does_not_get_in(daemon: Daemon) -> None:
    """As a container's root with the socket mounted is."""
    connect_as(IN_ANOTHER_NAMESPACE, daemon.socket)
    eventually(lambda: daemon.says("neither root nor our user in our PID namespace"), "the refusal is logged")


_CONNECT_AND_EXIT = """
import os, socket, sys, time
for _ in range(20):
    child = os.fork()
    if child == 0:
        s = socket.socket(socket.AF_UNIX)
        s.connect(sys.argv[1])
        s.sendall(b"{}")
        os._exit(0)
    os.waitid(os.P_PID, child, os.WEXITED | os.WNOWAIT)
print("all have exited", flush=True)
time.sleep(1000)
"""


def test_a_process_in_another_pid_namespace_that_exits_at_once_does_not_get_in_either(daemon: Daemon) -> None:
    enter = ["unshare", "--pid", "--fork", "--kill-child", "--mount-proc", sys.executable, "-c", _CONNECT_AND_EXIT]
    stop_and_wait_for(daemon.monitor)
    with subprocess.Popen([*enter, str(daemon.socket)], stdout=subprocess.PIPE, text=True) as container:
        try:
            assert container.stdout is not None
            assert container.stdout.readline() == "all have exited\n"
            os.kill(daemon.monitor, signal.SIGCONT)
            eventually(lambda: daemon.log.read_text().count("in our PID namespace") == 20, "all are refused")
        finally:
            container.kill()
            os.kill(daemon.monitor, signal.SIGCONT)
    assert not daemon.says("no seccomp listener")


def test_another_user_does_not_get_in_even_where_the_socket_is_open_to_all(daemon: Daemon) -> None:
    connect_as(AS_ANOTHER_USER, daemon.socket)
    eventually(lambda: daemon.says("refused process") and daemon.says("of user 65534"), "the refusal is logged")


def test_told_to_end_it_leaves_the_monitor_to_its_containers(daemon: Daemon, caller: Caller) -> None:
    daemon.attach(caller)
    up(caller)
    eventually(lambda: ask(caller) == "pids= 1", "the caller is translated")
    daemon.process.terminate()
    assert daemon.process.wait(SECONDS) == 0
    assert ask(caller) == untranslated(caller)
    caller.end()
    eventually(lambda: not daemon.socket.exists(), "the monitor ends with its last container")


def test_systemd_is_told_when_it_is_ready(daemon: Daemon, tmp_path: Path) -> None:
    daemon.process.terminate()
    daemon.process.wait(SECONDS)
    with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as notify:
        notify.bind(str(tmp_path / "notify"))
        notify.settimeout(SECONDS)
        daemon.start(NOTIFY_SOCKET=str(tmp_path / "notify"))
        assert notify.recv(100) == b"READY=1"


def test_containers_come_and_go_and_leave_nothing_behind(daemon: Daemon, caller_program: Path) -> None:
    before = daemon.monitor_fds()
    for _ in range(4):
        started = [under_filter(caller_program, daemon.node.parent, "plain") for _ in range(10)]
        callers = [one.__enter__() for one in started]
        for caller in callers:
            daemon.attach(caller)
        time.sleep(0.1)
        for caller in callers:
            caller.go()
        assert [caller.line() for caller in callers] == ["pids= 1"] * len(callers)
        for one in started:
            one.__exit__(None, None, None)
    eventually(lambda: daemon.monitor_fds() == before, "every fd is closed again")


@pytest.mark.parametrize(
    ("text", "named"),
    [
        ("[supervisor]\nspeed = 9\n", "supervisor.speed"),
        ("[nonsense]\n", "[nonsense]"),
        ("[agent]\nsoket = 'x'\n", "agent.soket"),
        ("[supervisor]\nanswer_timeout = 'long'\n", "supervisor.answer_timeout"),
        ("[supervisor]\ntranslate = 'never'\n", "supervisor.translate"),
        ("[log]\nlevel = 3\n", "log.level"),
        ("supervisor = 1\n", "supervisor"),
        ("this is no TOML", "no TOML"),
    ],
)
def test_a_wrong_configuration_is_one_line_that_names_key_and_file(tmp_path: Path, text: str, named: str) -> None:
    file = tmp_path / "config.toml"
    file.write_text(text)
    done = subprocess.run(
        ["mpu-notify", "serve", "--config", file], capture_output=True, text=True, check=False, timeout=SECONDS
    )
    assert (done.returncode, done.stdout) == (1, "")
    assert named in done.stderr
    assert str(file) in done.stderr
    assert done.stderr.count("\n") == 1


def test_outside_the_initial_pid_namespace_it_refuses(tmp_path: Path) -> None:
    command = ["unshare", "--pid", "--fork", "--mount-proc", "mpu-notify", "serve", "--listen", tmp_path / "agent.sock"]
    done = subprocess.run(command, capture_output=True, text=True, check=False, timeout=SECONDS)
    assert done.returncode == 1
    assert "not in the initial PID namespace" in done.stderr
