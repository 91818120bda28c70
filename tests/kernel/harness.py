"""What the tests of filter and monitor share: callers under a filter, and a supervisor that is the test itself."""

from __future__ import annotations

import os
import select
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path

from mpu_notify.notify.monitor import Channel, Monitor, identify
from mpu_notify.notify.protocol import Begun, Cause, Message, Outcome, Performed, Request, Step
from mpu_notify.supervisor.service import MONITORED

SECONDS = 20.0

#: What the kernel under test has: pidfds of threads (Linux 6.9).
HAS_PIDFD_THREAD = tuple(int(word) for word in os.uname().release.split("-")[0].split(".")[:2]) >= (6, 9)

_UNDER_FILTER = """
import os, socket, sys
from mpu_notify.notify import filter
program = filter.build_native()
handover = socket.socket(fileno=int(sys.argv[1]))
listener = filter.install(program)
socket.send_fds(handover, [b"L"], [listener])
os.close(listener)
handover.recv(1)
handover.close()
os.execv(sys.argv[2], sys.argv[2:])
"""


def compile_c(source: Path, directory: Path, *options: str) -> Path:
    """Compile one of the tests' C programs."""
    program = directory / source.stem
    flags = ["-std=c11", "-D_GNU_SOURCE", "-O1", "-Wall", "-Wextra", "-Werror"]
    subprocess.run(["gcc", *flags, *options, "-o", program, source, "-lpthread"], check=True)
    return program


@dataclass
class Caller:
    """A process in a PID namespace of its own, under the filter; `listener` is ours to hand on."""

    process: subprocess.Popen[str]
    listener: int
    handover: socket.socket

    def go(self) -> None:
        """Let it execute its command."""
        self.handover.send(b"g")

    def line(self) -> str:
        """The next line it prints."""
        assert self.process.stdout is not None
        ready, _, _ = select.select([self.process.stdout], [], [], SECONDS)
        assert ready, "the caller printed nothing"
        return self.process.stdout.readline().strip()

    def says_something_within(self, seconds: float) -> bool:
        return bool(select.select([self.process.stdout], [], [], seconds)[0])

    def poke(self, byte: str = "x") -> None:
        """One byte on its standard input."""
        assert self.process.stdin is not None
        self.process.stdin.write(byte)
        self.process.stdin.flush()

    def end(self) -> int:
        """Close its standard input and wait for it."""
        assert self.process.stdin is not None
        self.process.stdin.close()
        return self.process.wait(SECONDS)


@contextmanager
def under_filter(*command: str | Path, inside: Caller | None = None) -> Iterator[Caller]:
    """Start a command under the filter; it waits before the exec until it may go.

    In a PID and mount namespace of its own, or in those of another caller, as `exec` does.
    """
    ours, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
    script = [sys.executable, "-c", _UNDER_FILTER, str(theirs.fileno()), *map(str, command)]
    enter = ["unshare", "--pid", "--fork", "--mount-proc", "--kill-child"]
    if inside is not None:
        enter = ["nsenter", "--pid", "--mount", f"--target={caller_host_pid(inside)}"]
    process = subprocess.Popen(
        [*enter, *script],
        pass_fds=[theirs.fileno()],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
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


def kill_container(caller: Caller) -> None:
    """All its processes, as cgroup.kill does: one that is the file server of another cannot die after it."""

    def below(pid: int) -> Iterator[int]:
        yield pid
        for children in Path(f"/proc/{pid}/task").glob("*/children"):
            for child in children.read_text().split():
                yield from below(int(child))

    for pid in [*below(caller.process.pid)][1:]:
        with suppress(ProcessLookupError):
            os.kill(pid, signal.SIGKILL)


def caller_host_pid(caller: Caller) -> int:
    """The command's process on the host: the child of unshare."""
    parent = caller.process.pid
    return int(Path(f"/proc/{parent}/task/{parent}/children").read_text().split()[0])


class ScriptedChannel:
    """A listener's channel to a real monitor, with a test at the supervisor's end."""

    def __init__(self, channel: Channel) -> None:
        self.channel = channel

    def readable(self, seconds: float) -> bool:
        return bool(select.select([self.channel], [], [], seconds)[0])

    def next(self) -> Message:
        assert self.readable(SECONDS), "the monitor said nothing"
        message = self.channel.receive()
        assert message is not None, "the monitor hung up"
        return message

    def begun(self) -> Begun:
        message = self.next()
        assert isinstance(message, Begun), message
        return message

    def request(self) -> Request:
        message = self.next()
        assert isinstance(message, Request), message
        return message

    def performed(self) -> Performed:
        message = self.next()
        assert isinstance(message, Performed), message
        return message

    def up_to(self, step: Step) -> Request:
        """The request of this step of a call, those before it passed on."""
        self.begun()
        while (request := self.request()).step is not step:
            self.pass_on(request)
        return request

    def pass_on(self, request: Request) -> None:
        """Answer with the params as they are."""
        self.channel.answer(request, request.params)

    def outcome(self) -> Cause:
        message = self.next()
        assert isinstance(message, Outcome), message
        return message.cause

    def pass_all_on(self) -> Cause:
        """Answer all requests of the call under way with the params as they are; what became of it."""
        while not isinstance(message := self.next(), Outcome):
            if isinstance(message, Request):
                self.pass_on(message)
        return message.cause


class ScriptedSupervisor:
    """A real monitor with a test in the supervisor's place, which decides what is answered, when, and what happens."""

    def __init__(self, device: Path, silence_ms: int = 1000, kernel: str | None = None) -> None:
        self.monitor = Monitor.start(identify(device), MONITORED, silence_ms, kernel=kernel)

    def attach(self, caller: Caller) -> ScriptedChannel:
        self.monitor.attach(caller.listener, b"{}")
        arrival = self.monitor.receive()
        assert arrival is not None, "the monitor is gone"
        return ScriptedChannel(arrival.channel)


@contextmanager
def scripted_supervisor(
    device: Path, silence_ms: int = 1000, kernel: str | None = None
) -> Iterator[ScriptedSupervisor]:
    supervisor = ScriptedSupervisor(device, silence_ms, kernel)
    try:
        yield supervisor
    finally:
        supervisor.monitor.close()
        process = supervisor.monitor.process
        assert process is not None
        try:
            process.wait(SECONDS)
        finally:
            process.kill()
            process.wait()


def eventually(condition: Callable[[], bool], what: str) -> None:
    """Wait until a condition holds."""
    deadline = time.monotonic() + SECONDS
    while not condition():
        assert time.monotonic() < deadline, f"never came true: {what}"
        time.sleep(0.005)


def stop_and_wait_for(pid: int) -> None:
    """SIGSTOP a process, and wait until none of its threads runs."""
    os.kill(pid, signal.SIGSTOP)
    tasks = Path(f"/proc/{pid}/task")
    eventually(lambda: all(state_of(task) in "Tt" for task in tasks.iterdir()), f"process {pid} is stopped")


def state_of(task: Path) -> str:
    """Of a task in /proc: its letter."""
    return (task / "stat").read_text().rpartition(")")[2].split()[0]


@contextmanager
def injected(pid: int, *options: str) -> Iterator[None]:
    """Have strace(1) meddle with the system calls of a process: options such as "--inject=openat:delay_enter=1s"."""
    command = ["strace", "--follow-forks", "--quiet=all", f"--attach={pid}", "--output=/dev/null", *options]
    strace = subprocess.Popen(command, stdin=subprocess.DEVNULL)
    try:
        tasks = Path(f"/proc/{pid}/task")
        traced = f"TracerPid:\t{strace.pid}\n"
        eventually(lambda: all(traced in (task / "status").read_text() for task in tasks.iterdir()), "strace is there")
        yield
    finally:
        strace.terminate()
        strace.wait(SECONDS)


def kill_and_wait_for(pid: int) -> None:
    """SIGKILL a process that a test started, and wait until the kernel has ended it."""
    os.kill(pid, signal.SIGKILL)
    eventually(lambda: _is_dead(pid), f"process {pid} is dead")


def _is_dead(pid: int) -> bool:
    try:
        return state_of(Path(f"/proc/{pid}")) in "ZX"
    except (FileNotFoundError, ProcessLookupError):
        return True


def system_calls(pid: int) -> set[int]:
    """Those that the threads of a process are in."""
    words = [task.read_text().split()[0] for task in Path(f"/proc/{pid}/task").glob("*/syscall")]
    return {int(word) for word in words if word.isdigit()}
