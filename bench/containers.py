"""Containers: the runtime shim before runc and crun, the hook, and a daemon with many containers attached."""

from __future__ import annotations

import json
import os
import platform
import shutil
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import dataclass, field
from pathlib import Path
from statistics import median
from typing import Any

import pyseccomp

from bench.pids import COMMAND
from bench.processes import BenchError, Helper, compile_c, ending
from mpu_notify.notify import filter as seccomp_filter
from mpu_notify.notify.monitor import PROGRAM as MONITOR
from mpu_notify.oci.settings import VARIABLE
from mpu_notify.oci.spec import ANNOTATION, MACHINES

VERB_LIMIT = 1.2  # of the shim over the bare runtime
CREATE_LIMIT = 2.0  # of what the shim adds over a Python that imports json
HOOK_LIMIT_MS = 2.0
MEMORY_LIMIT_MIB = 64.0  # of monitor and supervisor together
WAKE_UPS_LIMIT_HZ = 2.0  # of each

_SHIM = MONITOR.with_name("mpu-notify-runtime")
_HOOK = MONITOR.with_name("mpu-notify-hook")
_CALLS = 5  # of a verb, a round
_ATTACHED = 200
_READY_SECONDS = 20.0
_SETTLE_SECONDS = 1.0
_IDLE_SECONDS = 5.0
# Of what Docker's default profile keeps from a container without capabilities.
_DENIED = """
bpf delete_module finit_module init_module io_uring_enter io_uring_register io_uring_setup kexec_load keyctl mount
move_mount open_by_handle_at perf_event_open pivot_root quotactl reboot setns swapoff swapon syslog umount2 unshare
userfaultfd vhangup
"""
_SYSCALL_NUMBERS = range(600)

_Word = str | Path


@dataclass(frozen=True)
class Verb:
    """Nanoseconds of each call that the shim passes on; numbers at one index are of one pair."""

    command: str
    bare: Sequence[float]
    shim: Sequence[float]

    @property
    def ratio(self) -> float:
        """What the limit is about: the median of the pairs."""
        return median(ours / bare for ours, bare in zip(self.shim, self.bare, strict=True))


@dataclass(frozen=True)
class Create:
    """Nanoseconds until a container that opted in is created; numbers at one index are of one round."""

    bare: Sequence[float]
    shim: Sequence[float]
    python: Sequence[float]

    @property
    def added(self) -> list[float]:
        """What the shim adds, round by round: what the runtime then does for the listener included."""
        return [ours - bare for ours, bare in zip(self.shim, self.bare, strict=True)]

    @property
    def ratio(self) -> float:
        """What the limit is about."""
        return median(self.added) / median(self.python)


@dataclass(frozen=True)
class Hook:
    """Nanoseconds of each hook of a container, from its start by the runtime to its end."""

    hook: Sequence[float]
    true: Sequence[float]

    @property
    def median_ms(self) -> float:
        """What the limit is about."""
        return median(self.hook) / 1e6


@dataclass(frozen=True)
class Load:
    """What one process of the daemon takes while nothing happens."""

    rss_mib: float
    pss_mib: float
    wake_ups_hz: float


@dataclass(frozen=True)
class Attached:
    """The daemon with so many containers."""

    containers: int
    monitor: Load
    supervisor: Load

    @property
    def rss_mib(self) -> float:
        """What the limit is about: both together, shared pages counted twice."""
        return self.monitor.rss_mib + self.supervisor.rss_mib

    @property
    def pss_mib(self) -> float:
        """Both together, shared pages shared out."""
        return self.monitor.pss_mib + self.supervisor.pss_mib


@dataclass(frozen=True)
class Containers:
    """All of it."""

    verbs: Sequence[Verb]
    create: Create
    hook: Hook
    attached: Attached


# ---- the daemon ----


@dataclass
class Daemon:
    """`mpu-notify serve`."""

    socket: Path
    log: Path
    monitor: int
    supervisor: int

    def attach(self, name: str, listener: int) -> None:
        """Be a runtime: one ContainerProcessState with its listener."""
        state = {"ociVersion": "1.1.0", "fds": ["seccompFd"], "pid": 1, "state": {"id": name, "status": "creating"}}
        with socket.socket(socket.AF_UNIX) as runtime:
            runtime.connect(str(self.socket))
            socket.send_fds(runtime, [json.dumps(state).encode()], [listener])

    def wait_for(self, count: int) -> None:
        """Until so many containers are attached."""
        _eventually(lambda: self.log.read_text().count(" attached ") >= count, f"attach {count} containers")


def _eventually(condition: Callable[[], bool], attempt: str) -> None:
    deadline = time.monotonic() + _READY_SECONDS
    while not condition():
        if time.monotonic() > deadline:
            raise BenchError(f"cannot {attempt} within {_READY_SECONDS:.0f} seconds")
        time.sleep(0.01)


@contextmanager
def _told_to_end(process: subprocess.Popen[bytes]) -> Iterator[None]:
    with ending(process):
        try:
            yield
        finally:
            process.terminate()


@contextmanager
def daemon(directory: Path, *options: str) -> Iterator[Daemon]:
    """The monitor is started here and not by `serve`, so that it is ours to end whatever happens."""
    directory.mkdir()
    agent, log_file = directory / "agent.sock", directory / "log"
    with ExitStack() as cleanup, log_file.open("wb") as log:
        monitor = subprocess.Popen(
            [MONITOR, "--listen", agent, "--control", agent.with_suffix(".control")], stderr=log, start_new_session=True
        )
        cleanup.enter_context(_told_to_end(monitor))
        _eventually(agent.exists, "start the monitor")
        command: list[_Word] = [COMMAND, "serve", "--listen", agent, *options]
        serve = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=log, start_new_session=True)
        cleanup.enter_context(_told_to_end(serve))
        if serve.stdout is None:
            raise BenchError("cannot read what mpu-notify serve says")
        cleanup.enter_context(serve.stdout)
        if f" monitor={monitor.pid} ".encode() not in serve.stdout.readline():
            raise BenchError(f"cannot start mpu-notify serve: {log_file.read_text().strip()}")
        yield Daemon(agent, log_file, monitor.pid, serve.pid)


# ---- containers of a real runtime ----


def _run(command: Sequence[_Word], said: Path, environment: Mapping[str, str]) -> None:
    """Run a command, which is never cut off in the middle: a runtime would leave half a container."""
    with said.open("wb") as errors:
        process = subprocess.Popen(
            command,
            stdin=subprocess.DEVNULL,
            stdout=subprocess.DEVNULL,
            stderr=errors,  # no pipe: the container keeps it open
            env={**os.environ, **environment},
            start_new_session=True,
        )
        with ending(process):
            status = process.wait()
    if status:
        words = " ".join(map(str, command))
        raise BenchError(f"cannot run {words}: it failed: {said.read_text(errors='replace').strip()}")


@dataclass
class _Stopwatch:
    """Times commands with timed.c."""

    program: Path
    directory: Path

    def command(self, name: str, *command: _Word) -> list[str]:
        """A command that runs this one and writes its time down under the name."""
        return [str(self.program), str(self._file(name)), *map(str, command)]

    def times(self, name: str) -> list[float]:
        """All that was written down under a name."""
        return [float(line) for line in self._file(name).read_text().split()]

    def time(self, name: str, *command: _Word, **environment: str) -> None:
        """Run a command and write its time down."""
        _run(self.command(name, *command), self.directory / "said", environment)

    def _file(self, name: str) -> Path:
        return self.directory / f"{name}.ns"


def _stopwatch(directory: Path) -> _Stopwatch:
    times = directory / "times"
    times.mkdir()
    return _Stopwatch(compile_c(Path(__file__).with_name("timed.c"), directory), times)


def _profile() -> dict[str, Any]:
    """A profile of the form and size of Docker's default one: a list of what is allowed, and some conditions."""
    names = []
    for number in _SYSCALL_NUMBERS:
        with suppress(ValueError):  # no such syscall
            names.append(pyseccomp.resolve_syscall(pyseccomp.Arch.NATIVE, number).decode())
    apart = {*_DENIED.split(), "personality", "clone", "clone3", "socket"}
    allowed = [name for name in names if name not in apart]

    def rule(name: str, index: int, value: int, operator: str, value_two: int = 0) -> dict[str, Any]:
        condition = {"index": index, "value": value, "valueTwo": value_two, "op": f"SCMP_CMP_{operator}"}
        return {"names": [name], "action": "SCMP_ACT_ALLOW", "args": [condition]}

    return {
        "defaultAction": "SCMP_ACT_ERRNO",
        "defaultErrnoRet": 1,
        "architectures": [f"SCMP_ARCH_{abi}" for abi in MACHINES[platform.machine()]],
        "syscalls": [
            {"names": allowed, "action": "SCMP_ACT_ALLOW"},
            *(rule("personality", 0, value, "EQ") for value in (0x0, 0x8, 0x20000, 0x20008, 0xFFFFFFFF)),
            rule("socket", 0, 40, "NE"),  # AF_VSOCK
            rule("clone", 0, 0x7E020000, "MASKED_EQ"),  # new namespaces
            {"names": ["clone3"], "action": "SCMP_ACT_ERRNO", "errnoRet": 38},
        ],
    }


@dataclass
class _Bundle:
    """A container that opted in, of runc; it is created and deleted, never started."""

    runtime: str
    directory: Path
    spec: dict[str, Any] = field(default_factory=dict)

    def __post_init__(self) -> None:
        program = self.directory / "rootfs/bin/never-started"
        program.parent.mkdir(parents=True)
        program.touch(0o755)
        self._id = f"mpu-notify-bench-{os.getpid()}"
        self._root = self.directory / "state"
        subprocess.run([self.runtime, "spec"], cwd=self.directory, check=True)
        self.spec = json.loads(self._config.read_text())
        self.spec["process"].update(terminal=False, args=["/bin/never-started"])
        self.spec["annotations"] = {ANNOTATION: "true"}
        self.spec["linux"]["seccomp"] = _profile()

    @property
    def _config(self) -> Path:
        return self.directory / "config.json"

    def words(self, verb: str, program: _Word) -> list[_Word]:
        """The command line of a verb on this container."""
        options: list[_Word] = ["--bundle", self.directory] if verb == "create" else []
        return [program, "--root", self._root, verb, *options, self._id]

    @contextmanager
    def created(
        self, watch: _Stopwatch, name: str, program: _Word, hooks: Sequence[Sequence[str]] = (), **environment: str
    ) -> Iterator[None]:
        """Time `create` of it; it is deleted on exit, also where creating it failed."""
        entries = [{"path": words[0], "args": words} for words in hooks]
        spec = {**self.spec, **({"hooks": {"createRuntime": entries}} if entries else {})}
        self._config.write_text(json.dumps(spec))  # the shim changed it
        try:
            watch.time(name, *self.words("create", program), **environment)
            yield
        finally:
            _run([*self.words("delete", self.runtime), "--force"], self.directory / "said", {})


def _settings(directory: Path, runtime: str, agent: Path) -> dict[str, str]:
    """The environment in which the shim stands before this runtime."""
    file = directory / f"{Path(runtime).name}.toml"
    file.write_text(f'[agent]\nsocket = "{agent}"\nabsent = "refuse"\n[runtime]\npath = "{runtime}"\n')
    return {VARIABLE: str(file)}


def _alternating(watch: _Stopwatch, number: int, series: Mapping[str, Sequence[_Word]], **environment: str) -> None:
    names = list(series)
    for name in names if number % 2 else reversed(names):
        watch.time(name, *series[name], **environment)


def _measure_verb(
    rounds: int, watch: _Stopwatch, name: str, arguments: Sequence[_Word], runtime: str, **environment: str
) -> Verb:
    series = {f"{name}-bare": [runtime, *arguments], f"{name}-shim": [_SHIM, *arguments]}
    for number in range((1 + rounds) * _CALLS):
        _alternating(watch, number, series, **environment)
    bare, shim = (watch.times(each)[_CALLS:] for each in series)
    return Verb(name.replace("-", " "), bare, shim)


def _measure_verbs(rounds: int, watch: _Stopwatch, bundle: _Bundle, agent: Path) -> list[Verb]:
    """Of crun, which takes no hybrid cgroups, one that needs no container."""
    directory = watch.directory
    runc = _settings(directory, bundle.runtime, agent)
    with bundle.created(watch, "unused", bundle.runtime):
        arguments = bundle.words("state", "")[1:]
        verbs = [_measure_verb(rounds, watch, "runc-state", arguments, bundle.runtime, **runc)]
    crun = shutil.which("crun")
    if crun:
        arguments = ["--root", str(directory / "crun"), "list"]
        settings = _settings(directory, crun, agent)
        verbs.append(_measure_verb(rounds, watch, "crun-list", arguments, crun, **settings))
    return verbs


def _shims_python() -> str:
    """The Python that the shim starts, see csrc/runtime.c."""
    if MONITOR.parents[2].name in ("site-packages", "dist-packages"):
        return str(Path(sys.prefix, "bin/python3"))
    return shutil.which("/usr/bin/python3") or "python3"


def _measure_create(rounds: int, watch: _Stopwatch, bundle: _Bundle, agent: Path) -> Create:
    settings = _settings(watch.directory, bundle.runtime, agent)
    python = [_shims_python(), "-I", "-S", "-c", "import json"]
    programs: dict[str, _Word] = {"create-bare": bundle.runtime, "create-shim": _SHIM}
    for number in range(1 + rounds):
        for name in programs if number % 2 else reversed(programs):
            with bundle.created(watch, name, programs[name], **settings):
                watch.time("python", *python)
    bare, shim = (watch.times(name)[1:] for name in programs)
    return Create(bare, shim, watch.times("python")[2:])


def _measure_hook(rounds: int, watch: _Stopwatch, bundle: _Bundle, agent: Path) -> Hook:
    hooks = [
        watch.command("hook", _HOOK, "--listen", agent, "--absent", "refuse"),
        watch.command("true", shutil.which("true") or "true"),
    ]
    for number in range(1 + rounds):
        with bundle.created(watch, "unused", bundle.runtime, hooks if number % 2 else hooks[::-1]):
            pass
    return Hook(watch.times("hook")[1:], watch.times("true")[1:])


# ---- many containers ----


def start_filtered(*command: str) -> tuple[int, Helper]:
    """A helper under a filter of its own, and its listener.

    A filter belongs to a thread and what that starts: a thread of our own takes it, starts the process and ends.
    """
    program = seccomp_filter.build_native()
    with ThreadPoolExecutor(1) as thread:
        return thread.submit(lambda: (seccomp_filter.install(program), Helper(*command))).result()


def _wake_ups(pid: int) -> int:
    """Voluntary context switches of all threads up to now."""
    lines = [line for task in Path(f"/proc/{pid}/task").iterdir() for line in (task / "status").open()]
    return sum(int(line.split()[1]) for line in lines if line.startswith("voluntary_ctxt_switches:"))


def _memory_mib(pid: int, name: str) -> float:
    lines = Path(f"/proc/{pid}/smaps_rollup").read_text().splitlines()
    return next(int(line.split()[1]) / 1024 for line in lines if line.startswith(f"{name}:"))


def _measure_attached(served: Daemon) -> Attached:
    with ExitStack() as cleanup:
        for number in range(_ATTACHED):
            listener, process = start_filtered("cat")
            try:
                cleanup.enter_context(process)
                served.attach(f"container-{number}", listener)
            finally:
                os.close(listener)
        served.wait_for(_ATTACHED)
        time.sleep(_SETTLE_SECONDS)
        pids = (served.monitor, served.supervisor)
        before, start = [_wake_ups(pid) for pid in pids], time.monotonic()
        time.sleep(_IDLE_SECONDS)
        seconds = time.monotonic() - start
        rates = [(_wake_ups(pid) - earlier) / seconds for pid, earlier in zip(pids, before, strict=True)]
        loads = [
            Load(_memory_mib(pid, "Rss"), _memory_mib(pid, "Pss"), rate) for pid, rate in zip(pids, rates, strict=True)
        ]
    return Attached(_ATTACHED, *loads)


def measure(rounds: int, directory: Path) -> Containers:
    """Interleaved pairs in alternating order; all that is made goes into the directory."""
    runc = shutil.which("runc")
    if not runc:
        raise BenchError("cannot create containers: install runc")
    watch = _stopwatch(directory)
    bundle = _Bundle(runc, directory / "bundle")
    with daemon(directory / "daemon") as served:
        verbs = _measure_verbs(rounds, watch, bundle, served.socket)
        create = _measure_create(rounds, watch, bundle, served.socket)
        hook = _measure_hook(rounds, watch, bundle, served.socket)
    with daemon(directory / "many") as served:
        attached = _measure_attached(served)
    return Containers(verbs, create, hook, attached)
