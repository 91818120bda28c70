"""The scene: GPU processes on the host, in two sibling PID namespaces and in one nested in the first of them.

Where there are two GPUs there are processes on the one, on the other and on both.
"""

from __future__ import annotations

import json
import os
import select
import shlex
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, field
from pathlib import Path
from typing import NamedTuple

from tests.gpu.rows import Truth

HERE = Path(__file__).resolve().parent
CONTROL_NODE = Path("/dev/nvidiactl")
MIB = 1 << 20
_SECONDS_TO_COME_UP = 45
_SECONDS_TO_END = 20
_GRACE = 8  # beyond the limit that timeout(1) keeps


class SceneError(Exception):
    """Something of the scene could not be started, or does not answer any more."""


class Answer(NamedTuple):
    """What a command said."""

    status: int
    out: str
    err: str
    seconds: float

    @property
    def said(self) -> str:
        """The last line of its complaint, which of a traceback is the error."""
        return self.err.strip().rpartition("\n")[2][-300:]


def python(*arguments: str) -> list[str]:
    return [sys.executable, *arguments]


def mpu_notify_command(*arguments: str) -> list[str]:
    return python("-m", "mpu_notify.cli.main", *arguments)


def _limited(command: Sequence[str], limit: int) -> list[str]:
    return ["timeout", "--kill-after=2", str(limit), *command]


def ask(command: Sequence[str], limit: int) -> Answer:
    """Run a command from here."""
    start = time.perf_counter()
    try:
        done = subprocess.run(
            _limited(command, limit),
            stdin=subprocess.DEVNULL,
            capture_output=True,
            encoding="utf-8",
            errors="replace",
            timeout=limit + _GRACE,
            check=False,
        )
    except subprocess.TimeoutExpired:
        return Answer(124, "", f"no answer within {limit} s", time.perf_counter() - start)
    return Answer(done.returncode, done.stdout, done.stderr, time.perf_counter() - start)


class Shell:
    """A shell whose commands are fed one by one, so that they share its namespaces and its filter."""

    def __init__(self, name: str, work: Path, to_shell: int, from_shell: int) -> None:
        self.name = name
        self._work, self._in, self._out = work, to_shell, from_shell
        self._asked = 0
        self._heard = b""

    def run(self, command: Sequence[str], limit: int = 20) -> Answer:
        """Run a command and wait for it. SceneError where the shell itself is gone or stuck."""
        out, err = self._work / f"{self.name}.out", self._work / f"{self.name}.err"
        start = time.perf_counter()
        status = self.say(f"{shlex.join(_limited(command, limit))} </dev/null >{out} 2>{err}", limit + _GRACE)
        seconds = time.perf_counter() - start
        said, complained = (file.read_text(encoding="utf-8", errors="replace") for file in (out, err))
        return Answer(status, said, complained, seconds)

    def say(self, line: str, limit: float = 20) -> int:
        """Have a line of shell executed; its exit status."""
        self._asked += 1
        mark = f"-- {self._asked} "  # so that a late answer to an earlier line is not taken for this one's
        try:
            os.write(self._in, f"{line}\necho '{mark}'$?\n".encode())
        except OSError as error:
            raise SceneError(f"shell {self.name}: {error.strerror}") from error
        deadline = time.monotonic() + limit
        while True:
            for said in self._lines(deadline):
                if said.startswith(mark):
                    return int(said[len(mark) :])

    def _lines(self, deadline: float) -> Iterator[str]:
        ready, _, _ = select.select([self._out], [], [], max(0.0, deadline - time.monotonic()))
        if not ready:
            raise SceneError(f"shell {self.name} does not answer")
        chunk = os.read(self._out, 4096)
        if not chunk:
            raise SceneError(f"shell {self.name} ended")
        *lines, self._heard = (self._heard + chunk).split(b"\n")
        return iter([line.decode(errors="replace") for line in lines])


def open_shell(name: str, command: Sequence[str], work: Path, stack: ExitStack) -> Shell:
    """Start a command that is or becomes a shell. SceneError, with what it said, where it does not answer."""
    errors = work / f"{name}.shell"
    with errors.open("wb") as err:
        process = subprocess.Popen([*command], stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=err, bufsize=0)
    stack.callback(_end, process)
    assert process.stdin is not None
    assert process.stdout is not None
    shell = Shell(name, work, process.stdin.fileno(), process.stdout.fileno())
    try:
        shell.say(":")
    except SceneError as error:
        raise SceneError(f"{error}: {errors.read_text(errors='replace').strip()}") from error
    return shell


def _end(process: subprocess.Popen[bytes]) -> None:
    assert process.stdin is not None
    process.stdin.close()
    try:
        process.wait(_SECONDS_TO_END)
    except subprocess.TimeoutExpired:
        process.kill()  # of `run` and of unshare --kill-child alike, this ends the whole namespace
        process.wait(_SECONDS_TO_END)
    assert process.stdout is not None
    process.stdout.close()


def open_nested_shell(name: str, outer: Shell, work: Path, stack: ExitStack) -> Shell:
    """Start a shell in a PID namespace nested in that of another shell, under the same filter."""
    fds = []
    for end in ("in", "out"):
        fifo = work / f"{name}.fifo-{end}"
        os.mkfifo(fifo)
        fds.append(os.open(fifo, os.O_RDWR | os.O_CLOEXEC))  # for both, so that neither side waits for the other
        stack.callback(os.close, fds[-1])
    command = shlex.join(["unshare", "--pid", "--fork", "--mount-proc", "--kill-child", "sh"])
    outer.say(f"{command} <{work}/{name}.fifo-in >{work}/{name}.fifo-out 2>{work}/{name}.shell &")
    shell = Shell(name, work, fds[0], fds[1])
    shell.say(":")
    return shell


class Process(NamedTuple):
    """A process by its id in each PID namespace from the host's on, and the innermost of these namespaces."""

    pids: tuple[int, ...]
    namespace: str


def processes() -> Iterator[Process]:
    """All processes, as the host's /proc shows them."""
    for entry in Path("/proc").iterdir():
        if entry.name.isdecimal():
            try:
                status = (entry / "status").read_text(errors="replace")
                namespace = str((entry / "ns/pid").readlink())
            except OSError:  # it ended meanwhile
                continue
            line = status.partition("\nNSpid:")[2].partition("\n")[0]
            yield Process(tuple(map(int, line.split())), namespace)


@dataclass
class Place:
    """A PID namespace with a shell in it."""

    name: str
    shell: Shell
    namespace: str = ""
    init: int = 0  # the host's pid of its pid 1
    depth: int = 0

    def find(self, pid: int) -> Process:
        """The process of this number in this very namespace."""
        for process in processes():
            if process.namespace == self.namespace and process.pids[-1] == pid:
                return process
        raise SceneError(f"{self.name} has no process {pid}")

    def drivers_own(self, command: Sequence[str], limit: int = 20) -> Answer:
        """Run a command in the same namespaces, but outside the filter."""
        # timeout(1) inside too: what nsenter forks would outlive it.
        enter = ["nsenter", "--target", str(self.init), "--pid", "--mount", "--"]
        return ask([*enter, *_limited(command, limit)], limit + 4)


def place(name: str, shell: Shell) -> Place:
    """Find out which namespace a shell is in."""
    answer = shell.run(["readlink", "/proc/self/ns/pid"])
    there = Place(name, shell, answer.out.strip())
    if there.namespace != os.readlink("/proc/self/ns/pid"):  # noqa: PTH115 - the text is wanted, not a path
        init = there.find(1)
        there.init, there.depth = init.pids[0], len(init.pids) - 1
    return there


@dataclass
class Worker:
    """A GPU process of the scene, with so much memory on each of its GPUs; `process` is known once it is up."""

    name: str
    place: Place
    mib: int
    out: Path
    gpus: tuple[int, ...] = (0,)
    process: Process | None = None

    @property
    def errors(self) -> Path:
        return self.out.with_suffix(".err")


@dataclass
class Scene:
    """The places, and the workers in them."""

    work: Path
    worker_options: Sequence[str]
    places: dict[str, Place] = field(default_factory=dict)
    workers: list[Worker] = field(default_factory=list)
    problems: list[str] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)

    def add(self, name: str, open_it: Callable[[], Shell]) -> None:
        """Add a place; where that fails the others still serve."""
        try:
            self.places[name] = place(name, open_it())
        except (SceneError, OSError) as error:
            self.problems.append(f"{name}: {error}")

    def start(self, name: str, where: str, mib: int, *options: str, gpus: tuple[int, ...] = (0,)) -> None:
        """Start a worker, without waiting for it."""
        if where not in self.places:
            self.problems.append(f"{name}: no {where} to start it in")
            return
        there = self.places[where]
        worker = Worker(name, there, mib, self.work / f"worker-{len(self.workers)}", gpus)
        options = (*self.worker_options, *options, *(f"--gpu={gpu}" for gpu in gpus))
        command = shlex.join(python(str(HERE / "worker.py"), str(mib), *options))
        for file in (worker.out, worker.errors):
            file.touch()  # a shell opens those of a background command only after it answered
        there.shell.say(f"{command} </dev/null >{worker.out} 2>{worker.errors} &")
        self.workers.append(worker)

    def wait(self) -> None:
        """Wait until every worker is up; those that do not come up are left out of the scene."""
        deadline = time.monotonic() + _SECONDS_TO_COME_UP
        for worker in self.workers:
            try:
                self._up(worker, deadline)
            except (SceneError, OSError, ValueError) as error:  # noqa: PERF203 - each worker by itself
                said = worker.errors.read_text(errors="replace").strip()
                self.problems.append(f"worker {worker.name} did not come up: {error}: {said[-500:]}")
        self.workers = [worker for worker in self.workers if worker.process]

    def _up(self, worker: Worker, deadline: float) -> None:
        while not (said := worker.out.read_text()).endswith("\n"):
            if time.monotonic() > deadline or "Error" in worker.errors.read_text(errors="replace"):
                raise SceneError("it said nothing")
            time.sleep(0.02)
        line = json.loads(said)
        worker.process = worker.place.find(line["pid"])
        if line["error"]:
            self.problems.append(f"worker {worker.name} has not all of its RM clients: {line['error']}")
        if line["note"]:
            self.notes.append(f"worker {worker.name}: {line['note']}")

    def truth(self, there: Place) -> Truth:
        """What a place sees of the workers, and which other processes there are."""
        namespaces = {there.namespace, *(within.namespace for within in [self._within(there)] if within)}
        seen = [one for one in self.workers if one.process and (not there.depth or one.process.namespace in namespaces)]
        memory = {
            (str(gpu), one.process.pids[there.depth]): one.mib * MIB for one in seen for gpu in one.gpus if one.process
        }
        hosts = {one.process.pids[0]: one.process.pids[there.depth] for one in seen if one.process}
        others = {one.process.pids[0] for one in self.workers if one.process} - hosts.keys()
        foreign = (one.pids[0] for one in processes() if there.depth and one.namespace not in namespaces)
        return Truth(memory, hosts, frozenset(foreign) | others, frozenset(others))

    def _within(self, there: Place) -> Place | None:
        outer = self.places.get("A")
        return self.places.get(NESTED) if outer and there.namespace == outer.namespace else None


NESTED = "nested in A"


def left_behind(scene: Scene) -> list[str]:
    """The workers that are still there after the end."""
    deadline = time.monotonic() + _SECONDS_TO_END
    while True:
        here = {(process.pids, process.namespace) for process in processes()}
        left = [worker.name for worker in scene.workers if worker.process and tuple(worker.process) in here]
        if not left or time.monotonic() > deadline:
            return left
        time.sleep(0.1)


def set_scene(
    work: Path, run: Callable[[str], list[str]], worker_options: Sequence[str], gpus: int, stack: ExitStack
) -> Scene:
    """Set the scene on one or two GPUs; `run` gives the command that opens a shell in the namespace of a name."""
    scene = Scene(work, worker_options)
    scene.add("host", lambda: open_shell("host", ["sh"], work, stack))
    for name in ("A", "B"):
        scene.add(name, lambda name=name: open_shell(name, run(name), work, stack))  # type: ignore[misc]
    if "A" in scene.places:
        scene.add(NESTED, lambda: open_nested_shell("nested", scene.places["A"].shell, work, stack))
    scene.start("host", "host", 96)
    scene.start("A plain", "A", 160)
    scene.start("A off the main thread", "A", 224, "--off-main-thread")
    scene.start("A several RM clients", "A", 288, "--clients", "3")
    scene.start("B plain", "B", 352)
    scene.start("nested plain", NESTED, 416)
    if gpus > 1:
        scene.start("host, the other GPU", "host", 112, gpus=(1,))
        scene.start("A, the other GPU", "A", 176, gpus=(1,))
        scene.start("A, both GPUs", "A", 240, gpus=(0, 1))
        scene.start("B, the other GPU", "B", 368, gpus=(1,))
        scene.start("nested, both GPUs", NESTED, 432, gpus=(0, 1))
    scene.wait()
    return scene
