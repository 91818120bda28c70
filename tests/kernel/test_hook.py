"""The OCI hook: with real runtimes, and on processes of the test's own that wait in every way."""

from __future__ import annotations

import errno
import fcntl
import json
import os
import random
import select
import shutil
import signal
import socket
import statistics
import struct
import subprocess
import tempfile
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from mpu_notify.notify.filter import build
from mpu_notify.notify.monitor import PROGRAM

from .harness import SECONDS, compile_c, eventually

HOOK = PROGRAM.with_name("mpu-notify-hook")
CSRC = Path(__file__).parents[2] / "csrc"
ANNOTATION = "io.mpu-notify.enable"
ENGINES = ["runc", "crun"]
PHASES = ["createRuntime", "prestart"]
REPEATED = 50

RM_CONTROL = 0xC020462A
ANSWER = errno.EUCLEAN  # what no driver says
NOTIF = struct.Struct("<QIIiIQ6Q")  # struct seccomp_notif with its struct seccomp_data
NOTIF_RESP = struct.Struct("<QqiI")
NOTIF_RECV = 0xC0502100
NOTIF_SEND = 0xC0182101

# The errno of an RM control and of any other ioctl, on a file that knows neither; then no_new_privs.
PROBE = r"""
#include <errno.h>
#include <fcntl.h>
#include <stdio.h>
#include <sys/ioctl.h>
#include <sys/prctl.h>

int main(void)
{
    char params[32] = {0};
    int file = open("/dev/null", O_RDWR), control, other;

    control = ioctl(file, 0xC020462A, params) ? errno : 0;
    other = ioctl(file, 0xC020462B, params) ? errno : 0;
    printf("control=%d other=%d no_new_privs=%d\n", control, other, prctl(PR_GET_NO_NEW_PRIVS, 0, 0, 0, 0));
    return 0;
}
"""

# Runs a command and appends to a file how many nanoseconds that took.
TIMED = r"""
#include <stdint.h>
#include <stdio.h>
#include <sys/wait.h>
#include <time.h>
#include <unistd.h>

static int64_t now(void)
{
    struct timespec at;

    clock_gettime(CLOCK_MONOTONIC, &at);
    return at.tv_sec * INT64_C(1000000000) + at.tv_nsec;
}

int main(int argc, char **argv)
{
    const int64_t start = now();
    int64_t duration;
    int status = 1;
    pid_t pid = vfork();
    FILE *file;

    if (pid == 0) {
        execv(argv[2], argv + 2);
        _exit(127);
    }
    waitpid(pid, &status, 0);
    duration = now() - start;
    file = fopen(argv[1], "a");
    fprintf(file, "%lld\n", (long long)duration);
    fclose(file);
    return argc < 3 || status != 0;
}
"""

# Waits as CASE says for one byte on its standard input or for its time, and says what came of it. What must not be
# disturbed says so itself: a call that fails, a signal that is lost, a blocked one that is not blocked any more.
WAITER = r"""
#include <errno.h>
#include <poll.h>
#include <pthread.h>
#include <signal.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/epoll.h>
#include <sys/prctl.h>
#include <sys/time.h>
#include <time.h>
#include <unistd.h>

static volatile sig_atomic_t caught;

static void on_signal(int number)
{
    (void)number;
    caught = caught + 1;
}

static void handle(int number, int flags)
{
    struct sigaction action = {.sa_handler = on_signal, .sa_flags = flags};

    sigaction(number, &action, NULL);
}

static void say(const char *what, long value)
{
    printf("%s %ld\n", what, value < 0 ? -errno : value);
    fflush(stdout);
}

static void take_byte(void)
{
    char byte;

    say("read", read(0, &byte, 1));
}

static void wait_in_poll(void)
{
    struct pollfd polled = {.fd = 0, .events = POLLIN};

    say("poll", poll(&polled, 1, 60000));
}

static void wait_in_epoll(void)
{
    struct epoll_event event = {.events = EPOLLIN};
    int epoll = epoll_create1(0);
    sigset_t none;
    int ready;

    sigemptyset(&none);
    epoll_ctl(epoll, EPOLL_CTL_ADD, 0, &event);
    do /* the kernel restarts it after no stop, whoever asked for that */
        ready = epoll_pwait(epoll, &event, 1, 60000, &none);
    while (ready < 0 && errno == EINTR);
    say("epoll", ready);
}

static void sleep_a_second(void)
{
    struct timespec start, end, most = {1, 0};
    long ms;

    clock_gettime(CLOCK_MONOTONIC, &start);
    if (clock_nanosleep(CLOCK_MONOTONIC, 0, &most, NULL))
        say("sleep", -1);
    clock_gettime(CLOCK_MONOTONIC, &end);
    ms = (end.tv_sec - start.tv_sec) * 1000 + (end.tv_nsec - start.tv_nsec) / 1000000;
    say("slept", ms >= 1000 && ms < 1500);
}

/* SIGUSR1 is blocked but in sigsuspend, which it ends once. */
static void suspend(void)
{
    sigset_t blocked, now;

    handle(SIGUSR1, 0);
    sigemptyset(&blocked);
    sigaddset(&blocked, SIGUSR1);
    sigprocmask(SIG_BLOCK, &blocked, NULL);
    sigemptyset(&blocked);
    printf("up\n");
    fflush(stdout);
    sigsuspend(&blocked);
    say("suspended", errno == EINTR);
    sigprocmask(SIG_BLOCK, NULL, &now);
    say("blocked", sigismember(&now, SIGUSR1) && !sigismember(&now, SIGUSR2));
    say("caught", caught);
}

/* Pipes and files never fail with EINTR under SA_RESTART, whatever comes between. */
static void storm(void)
{
    struct itimerval timer = {{0, 200}, {0, 200}};

    handle(SIGALRM, SA_RESTART);
    setitimer(ITIMER_REAL, &timer, NULL);
    take_byte();
    say("caught", caught > 100);
}

static void *idle(void *nothing)
{
    for (;;)
        pause();
    return nothing;
}

static void threads(void)
{
    pthread_t thread;

    for (int i = 0; i < 30; i++)
        pthread_create(&thread, NULL, idle, NULL);
    take_byte();
}

static void spin(int seconds)
{
    struct timespec start, now;

    clock_gettime(CLOCK_MONOTONIC, &start);
    do
        clock_gettime(CLOCK_MONOTONIC, &now);
    while (now.tv_sec < start.tv_sec + seconds);
    say("spun", 1);
}

static void spin_long(void)
{
    spin(7);
}

static void late(void)
{
    spin(2);
    take_byte();
}

static void unprivileged(void)
{
    if (setresuid(65534, 65534, 65534))
        say("setresuid", -1);
    take_byte();
}

struct named {
    const char *name;
    void (*run)(void);
};

static const struct named CASES[] = {
    {"read", take_byte}, {"poll", wait_in_poll}, {"epoll", wait_in_epoll}, {"sleep", sleep_a_second},
    {"suspend", suspend}, {"storm", storm}, {"threads", threads}, {"spin", spin_long}, {"late", late},
    {"unprivileged", unprivileged},
};

int main(int argc, char **argv)
{
    (void)argc;
    for (size_t i = 0; i < sizeof(CASES) / sizeof(CASES[0]); i++)
        if (strcmp(argv[1], CASES[i].name) == 0)
            CASES[i].run();
    say("no_new_privs", prctl(PR_GET_NO_NEW_PRIVS, 0, 0, 0, 0));
    return 0;
}
"""


class Agent:
    """An OCI seccomp agent for one container, which answers each RM control with ANSWER."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self.message: dict[str, Any] | None = None
        self.links: list[str] = []
        self.trapped: list[int] = []
        self._stop = threading.Event()
        self._socket = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
        self._socket.bind(str(path))
        self._socket.listen()
        self._thread = threading.Thread(target=self._serve)
        self._thread.start()

    def close(self) -> None:
        """End, and raise what went wrong."""
        self._stop.set()
        self._thread.join(SECONDS)
        self._socket.close()
        self.path.unlink()
        assert not self._thread.is_alive()

    def _readable(self, fd: int) -> int:
        poller = select.poll()
        poller.register(fd, select.POLLIN)
        while not self._stop.is_set():
            if ready := poller.poll(20):
                return ready[0][1]
        return 0

    def _serve(self) -> None:
        while self._readable(self._socket.fileno()):
            connection, _ = self._socket.accept()
            with connection:
                self._receive(connection)

    def _receive(self, connection: socket.socket) -> None:
        connection.settimeout(SECONDS)
        text, fds, _, _ = socket.recv_fds(connection, 65536, 4)
        while part := connection.recv(65536):
            text += part
        try:
            if text:
                self.links = [str(Path(f"/proc/self/fd/{fd}").readlink()) for fd in fds]
                self.message = json.loads(text)
                self._answer(fds[0])
        finally:
            for fd in fds:
                os.close(fd)

    def _answer(self, listener: int) -> None:
        while self._readable(listener) & select.POLLIN:
            notif = bytearray(NOTIF.size)
            try:
                fcntl.ioctl(listener, NOTIF_RECV, notif)
                call = NOTIF.unpack(notif)
                self.trapped.append(call[7])
                fcntl.ioctl(listener, NOTIF_SEND, NOTIF_RESP.pack(call[0], 0, -ANSWER, 0))
            except OSError as error:
                if error.errno != errno.ENOENT:
                    raise


@contextmanager
def agent_at(path: Path) -> Iterator[Agent]:
    agent = Agent(path)
    try:
        yield agent
    finally:
        agent.close()


def compile_text(name: str, source: str, directory: Path, *options: str) -> Path:
    file = directory / f"{name}.c"
    file.write_text(source)
    return compile_c(file, directory, *options)


@dataclass
class Bundle:
    """A busybox container, the hook in its config.json as a test wants it."""

    directory: Path
    config: dict[str, Any] = field(default_factory=dict)

    @property
    def socket(self) -> Path:
        return self.directory / "agent.sock"

    def hook(self, phase: str, *options: str) -> None:
        arguments = ["mpu-notify-hook", "--listen", str(self.socket), *options]
        self.config["hooks"] = {phase: [{"path": str(HOOK), "args": arguments}]}

    def run(self, engine: str, identity: str = "test") -> subprocess.CompletedProcess[str]:
        (self.directory / "config.json").write_text(json.dumps(self.config))
        command = [engine, "--root", str(self.directory / "root"), "run", "--bundle", str(self.directory), identity]
        if engine == "crun" and Path("/sys/fs/cgroup/unified").is_mount():
            # crun refuses hybrid cgroups
            script = 'umount /sys/fs/cgroup/unified; exec "$@"'
            command = ["unshare", "--mount", "--propagation", "private", "sh", "-c", script, "sh", *command]
        done = subprocess.run(
            command, stdin=subprocess.DEVNULL, capture_output=True, text=True, timeout=SECONDS, check=False
        )
        assert not (self.directory / "root" / identity).exists(), "the container is still there"
        return done


def plain_config() -> dict[str, Any]:
    """What `runc spec` says, for a command that needs no terminal."""
    with tempfile.TemporaryDirectory() as directory:
        subprocess.run(["runc", "spec"], cwd=directory, check=True)
        config: dict[str, Any] = json.loads(Path(directory, "config.json").read_text())
    config["process"]["terminal"] = False
    config["process"]["args"] = ["/bin/probe"]
    config["mounts"] = [mount for mount in config["mounts"] if mount["type"] != "cgroup"]
    return config


@pytest.fixture(scope="session")
def rootfs() -> Iterator[Path]:
    """Where any user may look, for containers in a user namespace."""
    with tempfile.TemporaryDirectory() as directory:
        Path(directory).chmod(0o755)
        binaries = Path(directory, "rootfs", "bin")
        binaries.mkdir(parents=True)
        shutil.copy(shutil.which("busybox") or "busybox", binaries)
        (binaries / "sh").symlink_to("busybox")
        shutil.copy(compile_text("probe", PROBE, Path(directory), "-static"), binaries)
        yield Path(directory, "rootfs")


@pytest.fixture
def bundle(rootfs: Path) -> Iterator[Bundle]:
    with tempfile.TemporaryDirectory() as directory:
        Path(directory).chmod(0o755)
        config = plain_config()
        config["root"]["path"] = str(rootfs)
        config["annotations"] = {ANNOTATION: "true"}
        yield Bundle(Path(directory), config)


def covered(*, no_new_privs: bool = True) -> str:
    return f"control={ANSWER} other={errno.ENOTTY} no_new_privs={no_new_privs:d}\n"


UNCOVERED = f"control={errno.ENOTTY} other={errno.ENOTTY} no_new_privs=1\n"


def check_covered(bundle: Bundle, engine: str, expected: str) -> Agent:
    with agent_at(bundle.socket) as agent:
        done = bundle.run(engine)
    assert (done.returncode, done.stdout) == (0, expected), done.stderr
    assert agent.trapped == [RM_CONTROL]
    assert agent.message is not None
    init = Path("/proc", str(agent.message["pid"]))
    eventually(lambda: not init.exists(), "the container's init is gone")
    return agent


# ---- with real runtimes ----


@pytest.mark.parametrize("phase", PHASES)
@pytest.mark.parametrize("engine", ENGINES)
def test_opted_in(bundle: Bundle, engine: str, phase: str) -> None:
    bundle.hook(phase)
    agent = check_covered(bundle, engine, covered())
    assert agent.message is not None
    assert agent.links == ["anon_inode:seccomp notify"]
    assert agent.message["fds"] == ["seccompFd"]
    assert json.loads(agent.message["metadata"]) == {"container": "test", "route": "hook"}
    assert agent.message["state"]["id"] == "test"
    assert agent.message["state"]["bundle"] == str(bundle.directory)
    assert agent.message["state"]["annotations"] == {ANNOTATION: "true"}
    assert agent.message["pid"] == agent.message["state"]["pid"]
    assert agent.message["ociVersion"]


@pytest.mark.parametrize("annotations", [{}, {ANNOTATION: "false"}, {"other": "true"}, None])
@pytest.mark.parametrize("engine", ENGINES)
def test_not_opted_in(bundle: Bundle, engine: str, annotations: dict[str, str] | None) -> None:
    bundle.hook("createRuntime", "--absent", "refuse")
    bundle.config.pop("annotations")
    if annotations is not None:
        bundle.config["annotations"] = annotations
    with agent_at(bundle.socket) as agent:
        done = bundle.run(engine)
    assert (done.returncode, done.stdout) == (0, UNCOVERED), done.stderr
    assert agent.message is None


@pytest.mark.parametrize("engine", ENGINES)
def test_always(bundle: Bundle, engine: str) -> None:
    bundle.hook("createRuntime", "--always")
    bundle.config.pop("annotations")
    check_covered(bundle, engine, covered())


@pytest.mark.parametrize("engine", ENGINES)
def test_agent_absent_start(bundle: Bundle, engine: str) -> None:
    bundle.hook("createRuntime")
    done = bundle.run(engine)
    assert (done.returncode, done.stdout) == (0, UNCOVERED), done.stderr


@pytest.mark.parametrize("engine", ENGINES)
def test_agent_absent_refuse(bundle: Bundle, engine: str) -> None:
    bundle.hook("createRuntime", "--absent", "refuse")
    done = bundle.run(engine)
    assert done.returncode != 0
    assert done.stdout == ""
    assert str(bundle.socket) in done.stderr or engine == "crun"  # crun does not pass a hook's message on
    assert "mpu-notify serve" in done.stderr or engine == "crun"


@pytest.mark.parametrize("engine", ENGINES)
def test_where_new_privileges_are_allowed_they_stay_so(bundle: Bundle, engine: str) -> None:
    bundle.hook("createRuntime")
    bundle.config["process"]["noNewPrivileges"] = False
    check_covered(bundle, engine, covered(no_new_privs=False))


@pytest.mark.parametrize("engine", ENGINES)
def test_user_namespace(bundle: Bundle, engine: str) -> None:
    bundle.hook("createRuntime")
    bundle.config["linux"]["namespaces"].append({"type": "user"})
    for mapping in ("uidMappings", "gidMappings"):
        bundle.config["linux"][mapping] = [{"containerID": 0, "hostID": 100000, "size": 65536}]
    check_covered(bundle, engine, covered())


@pytest.mark.parametrize("engine", ENGINES)
def test_unprivileged_user(bundle: Bundle, engine: str) -> None:
    bundle.hook("createRuntime")
    bundle.config["process"]["user"] = {"uid": 65534, "gid": 65534}
    check_covered(bundle, engine, covered())


#: As in Docker's default profile: an errno for all calls but those named, ioctl among these.
ALLOWED = """
access arch_prctl brk capget capset chdir clone clone3 close close_range dup dup2 dup3 epoll_create1 epoll_ctl
epoll_pwait execve execveat exit exit_group faccessat fchdir fchown fcntl fstat fstatfs futex getcwd getdents64 getpid
getppid getrandom gettid getuid getgid geteuid getegid ioctl lseek madvise mmap mount mprotect mremap munmap nanosleep
newfstatat open openat openat2 pipe2 poll ppoll prctl pread64 prlimit64 read readlink readlinkat readv rseq
rt_sigaction rt_sigprocmask rt_sigreturn sched_getaffinity sched_yield seccomp sendmsg set_robust_list
set_tid_address setgid setgroups setresgid setresuid setsid setuid sigaltstack stat statfs statx sysinfo tgkill umask
uname unlink wait4 write writev
""".split()  # noqa: SIM905 - as a list it is not to be read


def profile(**more: object) -> dict[str, Any]:
    return {
        "defaultAction": "SCMP_ACT_ERRNO",
        "architectures": ["SCMP_ARCH_X86_64", "SCMP_ARCH_X86", "SCMP_ARCH_X32"],
        "syscalls": [{"names": ALLOWED, "action": "SCMP_ACT_ALLOW"}],
        **more,
    }


@pytest.mark.parametrize("no_new_privs", [False, True])
@pytest.mark.parametrize("engine", ENGINES)
def test_composes_with_a_profile(bundle: Bundle, engine: str, no_new_privs: bool) -> None:  # noqa: FBT001
    bundle.hook("createRuntime")
    bundle.config["process"]["noNewPrivileges"] = no_new_privs
    bundle.config["linux"]["seccomp"] = profile()
    check_covered(bundle, engine, covered(no_new_privs=no_new_privs))


@pytest.mark.parametrize("absent", ["start", "refuse"])
@pytest.mark.parametrize("engine", ENGINES)
def test_profile_with_a_listener(bundle: Bundle, engine: str, absent: str) -> None:
    theirs = bundle.directory / "theirs.sock"
    bundle.hook("createRuntime", "--absent", absent)
    bundle.config["linux"]["seccomp"] = profile(listenerPath=str(theirs))
    bundle.config["linux"]["seccomp"]["syscalls"].append({"names": ["acct"], "action": "SCMP_ACT_NOTIFY"})
    with agent_at(bundle.socket) as agent, agent_at(theirs) as their_agent:
        done = bundle.run(engine)
    assert agent.message is None
    if absent == "start":
        assert (done.returncode, done.stdout) == (0, UNCOVERED), done.stderr
        assert their_agent.message is not None
    else:
        assert done.returncode != 0
        assert "seccomp profile has an agent of its own" in done.stderr or engine == "crun"


@pytest.mark.parametrize("engine", ENGINES)
def test_a_profile_that_has_our_own_listener_is_no_other(bundle: Bundle, engine: str) -> None:
    bundle.hook("createRuntime", "--absent", "refuse")
    bundle.config["linux"]["seccomp"] = profile(listenerPath=str(bundle.socket))
    bundle.config["linux"]["seccomp"]["syscalls"].append({"names": ["acct"], "action": "SCMP_ACT_NOTIFY"})
    with agent_at(bundle.socket) as agent:
        done = bundle.run(engine)
    assert (done.returncode, done.stdout) == (0, UNCOVERED), done.stderr
    assert agent.message is not None
    assert "hook" not in str(agent.message)


@pytest.mark.parametrize("engine", ENGINES)
def test_it_is_as_configured(bundle: Bundle, engine: str) -> None:
    file = bundle.directory / "ours.toml"
    words = ["mpu-notify-hook", "--config", str(file)]
    bundle.config["hooks"] = {"createRuntime": [{"path": str(HOOK), "args": words}]}
    file.write_text(f"# ours\n[runtime]\nsocket = '/not/this'\n[ agent ]\n  socket='{bundle.socket}' # here\n")
    check_covered(bundle, engine, covered())
    file.write_text(file.read_text() + 'absent = "refuse"\n')
    assert bundle.run(engine).returncode != 0
    words += ["--absent", "start"]
    assert bundle.run(engine).returncode == 0


@pytest.mark.parametrize("engine", ENGINES)
def test_many_times(
    bundle: Bundle, engine: str, tmp_path: Path, record_property: Callable[[str, object], None]
) -> None:
    timed = compile_text("timed", TIMED, tmp_path, "-static")
    times = {name: tmp_path / name for name in ("hook", "true")}
    options = [str(HOOK), "--listen", str(bundle.socket)]
    commands = {"hook": options, "true": [shutil.which("true") or "true"]}
    bundle.config["hooks"] = {
        "createRuntime": [
            {"path": str(timed), "args": ["timed", str(times[name]), *command]} for name, command in commands.items()
        ]
    }
    for _ in range(REPEATED):
        check_covered(bundle, engine, covered())
    for name, file in times.items():
        ms = sorted(int(line) / 1e6 for line in file.read_text().split())
        assert len(ms) == REPEATED
        record_property(f"{name}_median_ms", statistics.median(ms))
        print(f"{engine}: {name}: median {statistics.median(ms):.2f} ms, most {ms[-1]:.2f} ms")


# ---- on processes of the test's own ----


@pytest.fixture(scope="session")
def waiter(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return compile_text("waiter", WAITER, tmp_path_factory.mktemp("waiter"))


@contextmanager
def waiting(program: Path, case: str) -> Iterator[subprocess.Popen[str]]:
    with subprocess.Popen(
        [program, case], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, bufsize=1
    ) as process:
        try:
            time.sleep(0.05)  # until it waits; where it does not yet, the hook has to cope
            yield process
        finally:
            process.kill()


def state_of(pid: object, bundle: Path, **more: object) -> str:
    return json.dumps({"ociVersion": "1.0.2", "id": "test", "pid": pid, "bundle": str(bundle), **more})


def hook_at(directory: Path, *options: str) -> list[str]:
    return [str(HOOK), "--always", "--listen", str(directory / "agent.sock"), *options]


def call_hook(directory: Path, state: str, *options: str) -> subprocess.CompletedProcess[str]:
    command = hook_at(directory, *options)
    return subprocess.run(command, input=state, capture_output=True, text=True, timeout=SECONDS, check=False)


@pytest.fixture
def directory(tmp_path: Path) -> Path:
    """A bundle of nothing."""
    (tmp_path / "config.json").write_text("{}")
    return tmp_path


def status(pid: int, name: str) -> str:
    lines = Path(f"/proc/{pid}/status").read_text().splitlines()
    return next(line.split()[1] for line in lines if line.startswith(f"{name}:"))


def check_free(pid: int) -> None:
    assert status(pid, "TracerPid") == "0"
    assert status(pid, "State") not in "tT"


def end(process: subprocess.Popen[str]) -> list[str]:
    output, _ = process.communicate("x", SECONDS)
    assert process.returncode == 0
    return output.splitlines()


WAITS = {
    "read": ["read 1"],
    "poll": ["poll 1"],
    "epoll": ["epoll 1"],
    "sleep": ["slept 1"],
    "storm": ["read 1", "caught 1"],
    "threads": ["read 1"],
}


@pytest.mark.parametrize("case", WAITS)
def test_waits_go_on(waiter: Path, directory: Path, case: str) -> None:
    with waiting(waiter, case) as process, agent_at(directory / "agent.sock") as agent:
        files = set(Path(f"/proc/{process.pid}/fd").iterdir())
        maps = Path(f"/proc/{process.pid}/maps").read_text()
        done = call_hook(directory, state_of(process.pid, directory))
        assert (done.returncode, done.stderr) == (0, "")
        assert set(Path(f"/proc/{process.pid}/fd").iterdir()) == files
        assert Path(f"/proc/{process.pid}/maps").read_text() == maps
        for thread in Path(f"/proc/{process.pid}/task").iterdir():
            check_free(int(thread.name))
            assert status(int(thread.name), "Seccomp_filters") == "1"
        assert end(process) == [*WAITS[case], "no_new_privs 0"]
    assert agent.links == ["anon_inode:seccomp notify"]


def test_a_signal_still_ends_a_suspension(waiter: Path, directory: Path) -> None:
    with waiting(waiter, "suspend") as process, agent_at(directory / "agent.sock"):
        assert process.stdout is not None
        assert process.stdout.readline() == "up\n"
        assert call_hook(directory, state_of(process.pid, directory)).returncode == 0
        process.send_signal(signal.SIGUSR1)
        assert end(process) == ["suspended 1", "blocked 1", "caught 1", "no_new_privs 0"]


@pytest.mark.parametrize("case", ["storm", "threads", "sleep", "epoll"])
def test_a_second_listener_is_refused_and_harms_nothing(waiter: Path, directory: Path, case: str) -> None:
    with waiting(waiter, case) as process, agent_at(directory / "agent.sock"):
        assert call_hook(directory, state_of(process.pid, directory)).returncode == 0
        for _ in range(5 if case == "sleep" else 100):  # it sleeps for a second, and a hook may take a tenth of one
            done = call_hook(directory, state_of(process.pid, directory), "--absent", "refuse")
            assert done.returncode == 1
            assert "a seccomp listener is there already" in done.stderr
            check_free(process.pid)
        assert end(process) == [*WAITS[case], "no_new_privs 0"]


@pytest.mark.parametrize(("absent", "expected"), [("start", 0), ("refuse", 1)])
def test_without_the_right_to_filter_none_is_forced(waiter: Path, directory: Path, absent: str, expected: int) -> None:
    with waiting(waiter, "unprivileged") as process, agent_at(directory / "agent.sock") as agent:
        done = call_hook(directory, state_of(process.pid, directory), "--absent", absent)
        assert done.returncode == expected
        assert "Permission denied" in done.stderr
        check_free(process.pid)
        assert end(process) == ["read 1", "no_new_privs 0"]
    assert agent.message is None


def test_a_program_that_never_waits_is_left_alone(waiter: Path, directory: Path) -> None:
    with waiting(waiter, "spin") as process, agent_at(directory / "agent.sock") as agent:
        done = call_hook(directory, state_of(process.pid, directory), "--absent", "refuse")
        assert done.returncode == 1
        check_free(process.pid)
        assert end(process) == ["spun 1", "no_new_privs 0"]
    assert agent.message is None


def test_a_stopped_program_stays_stopped(waiter: Path, directory: Path) -> None:
    with waiting(waiter, "read") as process, agent_at(directory / "agent.sock"):
        process.send_signal(signal.SIGSTOP)
        eventually(lambda: status(process.pid, "State") == "T", "it is stopped")
        assert call_hook(directory, state_of(process.pid, directory)).returncode == 0
        eventually(lambda: status(process.pid, "State") == "T", "it is stopped again")
        process.send_signal(signal.SIGCONT)
        assert end(process) == ["read 1", "no_new_privs 0"]


def test_an_agent_that_hangs_up_fails_the_hook(waiter: Path, directory: Path) -> None:
    """Whatever --absent says: the filter is in, and nobody has its listener."""
    with waiting(waiter, "late") as process, socket.socket(socket.AF_UNIX) as listening:
        listening.bind(str(directory / "agent.sock"))
        listening.listen()
        with subprocess.Popen(hook_at(directory), stdin=subprocess.PIPE, stderr=subprocess.PIPE, text=True) as hook:
            assert hook.stdin is not None
            hook.stdin.write(state_of(process.pid, directory))
            hook.stdin.close()
            hook.stdin = None
            connection, _ = listening.accept()
            connection.close()
            _, said = hook.communicate(timeout=SECONDS)
        assert hook.returncode == 1
        assert "cannot hand the listener" in said
        assert "the container does not start" in said
        check_free(process.pid)
        assert end(process) == ["spun 1", "read 1", "no_new_privs 0"]


def test_a_hook_that_is_killed_leaves_nobody_stopped(waiter: Path, directory: Path) -> None:
    lives = 0
    chance = random.Random(1)  # noqa: S311 - which moments are hit
    with agent_at(directory / "agent.sock"):
        for _ in range(60):
            with waiting(waiter, "storm") as process:
                with subprocess.Popen(hook_at(directory), stdin=subprocess.PIPE, text=True) as hook:
                    assert hook.stdin is not None
                    hook.stdin.write(state_of(process.pid, directory))
                    hook.stdin.close()
                    time.sleep(chance.uniform(0, 0.002))
                    hook.kill()
                if process.poll() is None and status(process.pid, "State") not in "ZX":
                    try:
                        assert end(process)[:1] == ["read 1"]
                        lives += 1
                    except AssertionError:
                        assert process.returncode == -signal.SIGKILL
    assert lives > 0


def test_a_target_that_dies_ends_the_hook(waiter: Path, directory: Path) -> None:
    chance = random.Random(2)  # noqa: S311 - which moments are hit
    with agent_at(directory / "agent.sock"):
        for _ in range(60):
            with (
                waiting(waiter, "threads") as process,
                subprocess.Popen(
                    hook_at(directory), stdin=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True
                ) as hook,
            ):
                assert hook.stdin is not None
                hook.stdin.write(state_of(process.pid, directory))
                hook.stdin.close()
                time.sleep(chance.uniform(0, 0.002))
                process.kill()
                assert hook.wait(SECONDS) in (0, 1)


# ---- the command itself ----


def test_filter_is_the_one_that_is_built() -> None:
    printed = subprocess.run([HOOK, "--print-filter"], stdout=subprocess.PIPE, check=True).stdout
    assert printed == build("x86_64")


def test_help_says_what_is_not_covered() -> None:
    printed = subprocess.run([HOOK, "--help"], stdout=subprocess.PIPE, check=True, text=True).stdout
    assert "does NOT cover what is started by `exec`" in printed


@pytest.mark.parametrize(
    "arguments", [["extra"], ["--absent", "perhaps"], ["--absent"], ["--listen"], ["--unknown"], ["--always=1"]]
)
def test_usage(arguments: list[str]) -> None:
    done = subprocess.run([HOOK, *arguments], stdin=subprocess.DEVNULL, capture_output=True, text=True, check=False)
    assert done.returncode == 2
    assert "usage:" in done.stderr


# ---- what comes in ----


@pytest.fixture(scope="session")
def checked_hook(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The hook, built so that any bad access ends it."""
    sanitizers = ["-fsanitize=address,undefined", "-fno-sanitize-recover=all"]
    return compile_c(CSRC / "hook.c", tmp_path_factory.mktemp("checked"), *sanitizers, str(CSRC / "inject.c"))


def refused(hook: Path, directory: Path, state: bytes, *options: str) -> str:
    """What the hook says where nobody listens: so nothing is injected whatever the state says."""
    command = [str(hook), "--listen", str(directory / "nobody.sock"), "--absent", "refuse", *options]
    done = subprocess.run(command, input=state, capture_output=True, timeout=SECONDS, check=False)
    text = done.stderr.decode(errors="replace")
    assert done.returncode == (1 if text else 0), text
    assert text.count("\n") <= 1
    assert not text or text.startswith("mpu-notify-hook: ")
    return text


NOT_UNDERSTOOD = "cannot understand the container's state"
NO_AGENT = "cannot connect to the agent"


@pytest.mark.parametrize(
    "state",
    [
        "",
        "{",
        "[]",
        "null",
        "{}",
        '{"pid": 2}',
        '{"pid": 1, "id": "a", "bundle": "/"}',
        '{"pid": 0, "id": "a", "bundle": "/"}',
        '{"pid": -7, "id": "a", "bundle": "/"}',
        '{"pid": 7e3, "id": "a", "bundle": "/"}',
        '{"pid": "700", "id": "a", "bundle": "/"}',
        '{"pid": 99999999999999999999, "id": "a", "bundle": "/"}',
        '{"pid": 99999999, "pid": 99999998, "id": "a", "bundle": "/"}',
        '{"pid": 99999999, "id": "", "bundle": "/"}',
        '{"pid": 99999999, "id": "a\\"b", "bundle": "/"}',
        '{"pid": 99999999, "id": "a b", "bundle": "/"}',
        '{"pid": 99999999, "id": 5, "bundle": "/"}',
        '{"pid": 99999999, "id": "%s", "bundle": "/"}' % ("a" * 2000),
        '{"pid": 99999999, "id": "a", "bundle": "/%s"}' % ("a" * 5000),
        '{"pid": 99999999, "id": "a", "bundle": "/", "annotations": []}',
        '{"pid": 99999999, "id": "a", "bundle": "/"} x',
        '{"pid": 99999999, "id": "a", "bundle": "/", "more": %s}' % ("[" * 100000),
        '{"pid": 99999999, "id": "a", "bundle": "/", "more": "%s"}' % ("a" * 2000000),
    ],
)
def test_bad_state(checked_hook: Path, directory: Path, state: str) -> None:
    assert NOT_UNDERSTOOD in refused(checked_hook, directory, state.encode(), "--always")


def test_own_parent_is_not_a_target(checked_hook: Path, directory: Path) -> None:
    state = state_of(os.getpid(), directory).encode()
    assert NOT_UNDERSTOOD in refused(checked_hook, directory, state, "--always")


TREES = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False, allow_infinity=False) | st.text(max_size=20),
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(st.text(max_size=8), inner, max_size=4),
    max_leaves=20,
)
FUZZ = settings(
    max_examples=100, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture, HealthCheck.too_slow]
)


@FUZZ
@given(tree=TREES, value=st.sampled_from(["true", "false", "", "True"]) | TREES, ascii_only=st.booleans())
def test_any_json_is_understood(
    checked_hook: Path,
    directory: Path,
    tree: object,
    value: object,
    ascii_only: bool,  # noqa: FBT001
) -> None:
    annotations = {"before": "x", ANNOTATION: value, "after": "true"}
    state = {"tree": tree, "pid": 99999999, "id": "a", "annotations": annotations, "bundle": str(directory)}
    said = refused(checked_hook, directory, json.dumps(state, ensure_ascii=ascii_only).encode(errors="replace"))
    assert (NO_AGENT in said) == (value == "true")
    assert (said == "") == (value != "true")


def is_json(text: bytes) -> bool:
    try:
        json.loads(text)
    except ValueError:
        return False
    return True


@FUZZ
@given(data=st.data())
def test_damaged_json_is_refused(checked_hook: Path, directory: Path, data: st.DataObject) -> None:
    state = bytearray(
        state_of(99999999, directory, annotations={ANNOTATION: "true"}, more=[1.5e3, None, "\u1234"]).encode()
    )
    start = data.draw(st.integers(0, len(state) - 1))
    state[start : start + data.draw(st.integers(0, 9))] = data.draw(st.binary(max_size=9))
    said = refused(checked_hook, directory, bytes(state))
    if not is_json(bytes(state).decode(errors="replace").encode()):
        assert NOT_UNDERSTOOD in said


@FUZZ
@given(state=st.binary(max_size=200))
def test_garbage_is_refused(checked_hook: Path, directory: Path, state: bytes) -> None:
    assert NOT_UNDERSTOOD in refused(checked_hook, directory, state, "--always")
