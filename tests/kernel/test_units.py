"""The systemd units: what systemd says of them, and the daemon with exactly the rights that they give it."""

from __future__ import annotations

import json
import os
import re
import shutil
import signal
import socket
import subprocess
import tempfile
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path

import pytest

from mpu_notify.notify import native
from mpu_notify.notify.monitor import PROGRAM
from mpu_notify.standin.process import StandIn
from tests import installation

from .conftest import StartStandIn
from .harness import _UNDER_FILTER, SECONDS, Caller, eventually, stop_and_wait_for, under_filter
from .units import DIRECTORY, USER, Unit

NOBODY = 65534
CAP_DAC_OVERRIDE, CAP_SYS_PTRACE = 1 << 1, 1 << 19
RM_CONTROL = "0xc020462a"
SERVICES = ["mpu-notify-monitor.service", "mpu-notify.service", "mpu-notify-probe.service"]
READY = re.compile(r"READY socket=(\S+) monitor=(\d+) supervisor=(\d+)")

#: What a container's processes may be: root, another user, and root of a user namespace that another user made.
CONTAINERS = {
    "root": ([], []),
    "another user": ([], ["setpriv", f"--reuid={NOBODY}", f"--regid={NOBODY}", "--clear-groups"]),
    "a user namespace": (
        ["setpriv", f"--reuid={NOBODY}", f"--regid={NOBODY}", "--clear-groups", "unshare", "--user", "--map-root-user"],
        [],
    ),
}

_SEND = """
import socket, sys
with socket.socket(socket.AF_UNIX) as runtime:
    runtime.connect(sys.argv[1])
    socket.send_fds(runtime, [sys.argv[2].encode()], [int(sys.argv[3])])
"""


@pytest.fixture
def units(tmp_path: Path) -> Path:
    """The units with the programs where this installation has them."""
    for unit in DIRECTORY.glob("mpu-notify*.*"):
        text = re.sub(r"^(ExecStart=-?)(\S+)", _installed, unit.read_text(), flags=re.MULTILINE)
        (tmp_path / unit.name).write_text(text)
    return tmp_path


def _installed(match: re.Match[str]) -> str:
    program = shutil.which(match[2])
    assert program, match[2]
    return match[1] + program


@pytest.mark.parametrize("name", [*SERVICES, "mpu-notify-monitor.socket", "mpu-notify-probe.path"])
def test_systemd_takes_it_without_a_complaint(units: Path, name: str) -> None:
    done = subprocess.run(
        ["systemd-analyze", "verify", "--man=no", units / name], capture_output=True, text=True, check=False
    )
    assert (done.returncode, done.stdout, done.stderr) == (0, "", "")


def test_systemd_takes_the_users_unit_without_a_complaint(units: Path, tmp_path: Path) -> None:
    text = (DIRECTORY / "user" / "mpu-notify.service").read_text()
    (units / "mpu-notify.service").write_text(re.sub(r"^(ExecStart=)(\S+)", _installed, text, flags=re.MULTILINE))
    done = subprocess.run(
        ["systemd-analyze", "verify", "--user", "--man=no", units / "mpu-notify.service"],
        capture_output=True,
        text=True,
        check=False,
        env={**os.environ, "XDG_RUNTIME_DIR": str(tmp_path)},
    )
    assert (done.returncode, done.stderr) == (0, "")


@pytest.mark.parametrize(("name", "most"), list(zip(SERVICES, (1.6, 1.3, 2.3), strict=True)))
def test_what_it_is_exposed_to_is_little(units: Path, name: str, most: float) -> None:
    """As systemd counts: 0 is nothing, 10 everything. docs/security.md has the figures."""
    command = ["systemd-analyze", "security", "--offline=yes", "--no-pager", f"--threshold={round(most * 10)}"]
    done = subprocess.run([*command, units / name], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout[-200:]


def test_the_user_is_made_by_sysusers(tmp_path: Path) -> None:
    (tmp_path / "etc").mkdir()
    command = ["systemd-sysusers", f"--root={tmp_path}", DIRECTORY / "mpu-notify.sysusers"]
    subprocess.run(command, check=True, capture_output=True)
    assert (tmp_path / "etc" / "passwd").read_text().startswith("mpu-notify:")


def test_the_sockets_are_what_the_monitor_is_told_they_are() -> None:
    unit = Unit("mpu-notify-monitor.socket")
    listened = [(key, value) for key, value in unit.settings if key.startswith("Listen")]
    assert listened == [
        ("ListenStream", "/run/mpu-notify/agent.sock"),
        ("ListenSequentialPacket", "/run/mpu-notify/agent.control"),
    ]
    assert unit.one("SocketMode") == "0600"
    monitor = Unit("mpu-notify-monitor.service")
    assert monitor.command == ["mpu-notify-monitor", "--agent-fd", "3", "--control-fd", "4"]
    assert unit.one("SocketUser") == monitor.one("User") == Unit("mpu-notify.service").one("User")


class Daemon:
    """Monitor and supervisor, each started by itself; `send` is done as a runtime of this user does it."""

    def __init__(self, socket_path: Path, node: Path, runtime: list[str]) -> None:
        self.socket = socket_path
        self.node = node
        self.supervisor = 0
        self.monitor = 0
        self._runtime = runtime

    def started(self, supervisor: subprocess.Popen[str]) -> None:
        assert supervisor.stdout is not None
        ready = READY.match(supervisor.stdout.readline())
        assert ready, "it did not come up"
        self.monitor, self.supervisor = int(ready[2]), int(ready[3])

    def attach(self, caller: Caller) -> None:
        state = json.dumps({"ociVersion": "1.1.0", "fds": ["seccompFd"], "pid": 1, "state": {"id": "one"}})
        python = [str(installation.PYTHON), "-c", _SEND, str(self.socket), state, str(caller.listener)]
        subprocess.run([*self._runtime, *python], pass_fds=[caller.listener], check=True, timeout=SECONDS, cwd="/")


@contextmanager
def ended(process: subprocess.Popen[str]) -> Iterator[None]:
    try:
        yield
    finally:
        with process:
            process.terminate()


@contextmanager
def units_sockets(directory: Path) -> Iterator[tuple[int, int]]:
    """Those of mpu-notify-monitor.socket, in its order."""
    with socket.socket(socket.AF_UNIX) as agent, socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET) as control:
        for one, name in ((agent, "agent.sock"), (control, "agent.control")):
            one.bind(str(directory / name))
            (directory / name).chmod(0o600)
            os.chown(directory / name, USER, USER)
            one.listen()
        yield agent.fileno(), control.fileno()


@contextmanager
def as_units_do(directory: Path, node: Path, log: Path) -> Iterator[Daemon]:
    """The monitor as mpu-notify-monitor.service starts it, the supervisor as mpu-notify.service does."""
    agent = directory / "agent.sock"
    daemon = Daemon(agent, node, runtime=[])
    program = installation.public_copy() / "mpu_notify" / "_bin" / PROGRAM.name
    name, *arguments = Unit("mpu-notify.service").command
    assert name == "mpu-notify"
    supervisor = [installation.PYTHON, "-m", "mpu_notify.cli.main", *arguments, "--listen", agent, "--device", node]
    with ExitStack() as ends:
        output = ends.enter_context(log.open("ab"))
        sockets = ends.enter_context(units_sockets(directory))
        starts = {
            "mpu-notify-monitor.service": [program, "--agent-fd", str(sockets[0]), "--control-fd", str(sockets[1])],
            "mpu-notify.service": [*supervisor, "--log-level", "debug"],
        }
        for unit, start in starts.items():
            command = Unit(unit).started_by_hand(start, directory)
            process = subprocess.Popen(
                command, stdout=subprocess.PIPE, stderr=output, text=True, cwd="/", pass_fds=sockets
            )
            ends.enter_context(ended(process))
            if unit == "mpu-notify-monitor.service":
                assert process.stdout is not None
                assert process.stdout.readline() == "READY\n", log.read_text()
        daemon.started(process)
        yield daemon


@contextmanager
def rootless(directory: Path, node: Path, log: Path) -> Iterator[Daemon]:
    """`serve` as a user of no account, without any capability."""
    become = ["setpriv", f"--reuid={NOBODY}", f"--regid={NOBODY}", "--clear-groups", "--inh-caps=-all"]
    become.append("--bounding-set=-all")
    daemon = Daemon(directory / "agent.sock", node, runtime=become)
    command = [*become, *installation.command(), "serve", "--listen", daemon.socket, "--device", node]
    with log.open("ab") as output:
        process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=output, text=True, cwd="/")
        with ended(process):
            daemon.started(process)
            yield daemon
    eventually(lambda: not daemon.socket.exists(), "the monitor has ended")


@contextmanager
def as_root(directory: Path, node: Path, log: Path) -> Iterator[Daemon]:
    """`serve` as root, with all that root has."""
    daemon = Daemon(directory / "agent.sock", node, runtime=[])
    command = ["mpu-notify", "serve", "--listen", daemon.socket, "--device", node]
    with log.open("ab") as output:
        process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=output, text=True)
        with ended(process):
            daemon.started(process)
            yield daemon
    eventually(lambda: not daemon.socket.exists(), "the monitor has ended")


@pytest.fixture
def public_directory() -> Iterator[Path]:
    """One that others can reach, unlike those of pytest."""
    directory = Path(tempfile.mkdtemp(prefix="mpu-notify-test-", dir="/tmp"))
    directory.chmod(0o755)
    yield directory
    shutil.rmtree(directory)


@pytest.fixture
def driver(standin: StartStandIn) -> StandIn:
    return standin("--era", "host")


@pytest.fixture
def own_directory(public_directory: Path, request: pytest.FixtureRequest) -> Path:
    """The daemon user's own."""
    directory = public_directory / "run"
    directory.mkdir()
    owner = {as_units_do: USER, rootless: NOBODY, as_root: 0}[request.getfixturevalue("way")]
    os.chown(directory, owner, owner)
    return directory


@pytest.fixture
def way() -> object:
    return as_units_do


@pytest.fixture
def daemon(way: object, own_directory: Path, driver: StandIn, tmp_path: Path) -> Iterator[Daemon]:
    assert callable(way)
    with way(own_directory, driver.control_node, tmp_path / "log") as started:
        yield started


@contextmanager
def container(kind: str, program: Path, daemon: Daemon, public: Path) -> Iterator[Caller]:
    """A caller in a PID namespace of its own whose processes are of this kind."""
    outside, inside = CONTAINERS[kind]
    program = Path(shutil.copy(program, public / "caller"))
    ours, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
    python = ["env", f"PYTHONPATH={installation.public_copy()}", str(installation.PYTHON), "-c", _UNDER_FILTER]
    namespace = ["unshare", "--pid", "--fork", "--mount-proc", "--kill-child"]
    if kind == "a user namespace":  # in one step, so that the mount of /proc is its own
        namespace = namespace[1:]
    command = [*outside, *namespace, *inside, *python, str(theirs.fileno()), program, daemon.node.parent, "on_demand"]
    pipe = subprocess.PIPE
    process = subprocess.Popen(
        command, pass_fds=[theirs.fileno()], stdin=pipe, stdout=pipe, text=True, cwd="/", bufsize=1
    )
    theirs.close()
    _, fds, _, _ = socket.recv_fds(ours, 1, 1)
    assert len(fds) == 1, "the filter was not installed"
    try:
        yield Caller(process, fds[0], ours)
    finally:
        ours.close()
        with process:
            process.kill()
        os.close(fds[0])


def ask(caller: Caller) -> str:
    caller.poke()
    return caller.line()


@pytest.mark.parametrize("kind", CONTAINERS)
def test_with_the_units_rights_a_container_is_translated_whoever_it_runs_as(
    daemon: Daemon, caller_program: Path, public_directory: Path, kind: str
) -> None:
    with container(kind, caller_program, daemon, public_directory) as caller:
        daemon.attach(caller)
        caller.go()
        assert caller.line() == "up"
        eventually(lambda: ask(caller) == "pids= 1", "the caller is translated")


@pytest.mark.parametrize("way", [rootless])
def test_without_any_capability_a_users_own_containers_are_translated(
    daemon: Daemon, caller_program: Path, public_directory: Path
) -> None:
    with container("a user namespace", caller_program, daemon, public_directory) as caller:
        daemon.attach(caller)
        caller.go()
        assert caller.line() == "up"
        eventually(lambda: ask(caller) == "pids= 1", "the caller is translated")


class Rights:
    """What the kernel lets a thread do, from its /proc/TID/status."""

    def __init__(self, status: Path) -> None:
        found = dict(line.split(":", 1) for line in status.read_text().splitlines() if ":" in line)
        self.effective, self.permitted, self.bounding, self.inheritable, self.ambient = (
            int(found[f"Cap{name}"], 16) for name in ("Eff", "Prm", "Bnd", "Inh", "Amb")
        )
        self.no_new_privileges = found["NoNewPrivs"].strip() == "1"
        self.is_filtered = found["Seccomp"].strip() == "2"


def thread_in_the_ioctl(monitor: int) -> Path | None:
    for task in Path(f"/proc/{monitor}/task").iterdir():
        words = (task / "syscall").read_text().split()
        if len(words) > 2 and words[2] == RM_CONTROL:
            return task
    return None


@pytest.mark.parametrize("way", [as_units_do, as_root])
def test_the_thread_that_performs_the_ioctl_can_raise_no_rm_privilege(
    daemon: Daemon, driver: StandIn, caller_program: Path
) -> None:
    with under_filter(caller_program, daemon.node.parent, "on_demand") as caller:
        daemon.attach(caller)
        caller.go()
        assert caller.line() == "up"
        eventually(lambda: ask(caller) == "pids= 1", "the caller is translated")
        stop_and_wait_for(driver.pid)
        try:
            caller.poke()
            eventually(lambda: thread_in_the_ioctl(daemon.monitor) is not None, "the monitor is in the ioctl")
            task = thread_in_the_ioctl(daemon.monitor)
            assert task is not None
            rights = Rights(task / "status")
        finally:
            os.kill(driver.pid, signal.SIGCONT)
        assert caller.line() == "pids= 1"
        needed = CAP_SYS_PTRACE | CAP_DAC_OVERRIDE
        assert (rights.effective, rights.permitted, rights.bounding) == (needed, needed, needed)
        assert (rights.inheritable, rights.ambient) == (0, 0)
        assert rights.no_new_privileges
        assert rights.is_filtered or native.IS_SANITIZED  # then it has no filter of its own, csrc/confine.h


def test_the_units_supervisor_can_look_at_other_processes_and_no_more(daemon: Daemon) -> None:
    rights = Rights(Path(f"/proc/{daemon.supervisor}/status"))
    assert (rights.effective, rights.permitted, rights.bounding) == (CAP_SYS_PTRACE,) * 3
    assert (rights.inheritable, rights.ambient) == (0, 0)
    assert rights.no_new_privileges
    assert rights.is_filtered


@pytest.mark.parametrize("way", [as_root])
def test_a_supervisor_that_starts_monitors_keeps_their_capabilities_for_them_only(daemon: Daemon) -> None:
    rights = Rights(Path(f"/proc/{daemon.supervisor}/status"))
    needed = CAP_SYS_PTRACE | CAP_DAC_OVERRIDE
    assert rights.effective == CAP_SYS_PTRACE
    assert (rights.permitted, rights.inheritable, rights.bounding) == (needed, needed, needed)
    assert rights.no_new_privileges
    assert rights.is_filtered


def test_without_a_monitor_a_supervisor_that_may_not_start_one_says_so(tmp_path: Path) -> None:
    command = ["mpu-notify", "serve", "--no-monitor", "--listen", tmp_path / "agent.sock"]
    done = subprocess.run(command, capture_output=True, text=True, check=False, timeout=SECONDS)
    assert done.returncode == 1
    assert done.stderr.splitlines()[-1] == (
        f"mpu-notify: no monitor listens on {tmp_path}/agent.control, and --no-monitor says not to start one"
    )
