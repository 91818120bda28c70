"""The steps of a call's way through the monitor, and a gate that holds a call at one of them (gate.c)."""

from __future__ import annotations

import select
import subprocess
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import NamedTuple

from ..harness import SECONDS

# linux/seccomp.h and nv_escape.h, as ioctl requests of a 64-bit machine.
RECEIVE, VALID, SEND = 0xC0502100, 0x40082102, 0xC0182101
QUERY = 0xC0686611  # linux/fs.h, PROCMAP_QUERY
CONTROL = 0xC020462A


class Step(NamedTuple):
    """A moment of a call that asks about PIDs: the entry into, or exit from, the nth such system call since receipt."""

    name: str
    syscall: str
    nth: int = 1
    request: int | None = None  # of an ioctl
    moment: str = "exit"


#: In the order in which a call goes through them.
STEPS = (
    Step("received", "ioctl", request=RECEIVE),
    Step("glanced at", "process_vm_readv"),
    Step("before opening memory", "openat", moment="enter"),
    Step("memory opened", "openat"),
    Step("maps opened", "openat", 2),
    Step("id checked for memory", "ioctl", request=VALID),
    Step("supervisor told", "sendmsg"),
    Step("NVOS54 read", "pread64"),
    Step("params read", "pread64", 2),
    Step("id checked for params", "ioctl", 2, request=VALID),
    Step("first request sent", "sendmsg", 2),
    Step("first answer taken", "recvmsg"),
    Step("file looked at", "statx"),
    Step("pidfd opened", "pidfd_open"),
    Step("file fetched", "pidfd_getfd"),
    Step("fetched file looked at", "statx", 2),
    Step("id checked for the ioctl", "ioctl", 3, request=VALID),
    Step("before the ioctl", "ioctl", request=CONTROL, moment="enter"),
    Step("ioctl made", "ioctl", request=CONTROL),
    Step("file closed", "close", 2),
    Step("second request sent", "sendmsg", 3),
    Step("second answer taken", "recvmsg", 2),
    Step("id checked for the answer", "ioctl", 4, request=VALID),
    Step("params written", "pwrite64"),
    Step("NVOS54 written", "pwrite64", 2),
    Step("before the reply", "ioctl", request=SEND, moment="enter"),
    Step("replied", "ioctl", request=SEND),
)

SECTION = f"At each of the {len(STEPS)} steps of a call"

_ORDER = {step.name: number for number, step in enumerate(STEPS)}


def is_from(step: Step, first: str) -> bool:
    """Whether a step is the one of that name, or comes after it."""
    return _ORDER[step.name] >= _ORDER[first]


class Gate:
    """Watches a monitor's only listener; the next call stops at the step.

    With a ``result`` the system call, at whose entry that is, is not made and returns it.
    """

    def __init__(self, program: Path, monitor: int, step: Step, result: int | None = None) -> None:
        (thread,) = [task.name for task in Path(f"/proc/{monitor}/task").iterdir() if task.name != str(monitor)]
        request = "-" if step.request is None else hex(step.request)
        command = [str(program), thread, step.syscall, request, step.moment, str(step.nth)]
        if result is not None:
            command.append(str(result))
        # Unbuffered: a line that is read ahead is one that select does not see.
        self.process = subprocess.Popen(command, bufsize=0, stdin=subprocess.PIPE, stdout=subprocess.PIPE)
        assert self._line() == "ready"

    def _line(self) -> str:
        assert self.process.stdout is not None
        assert select.select([self.process.stdout], [], [], SECONDS)[0], "the step is never reached"
        return self.process.stdout.readline().decode().strip()

    def reached(self) -> None:
        """Wait until the call stands there."""
        assert self._line() == "reached"

    def open(self) -> None:
        """Let the call go on, if its thread still lives."""
        self.process.communicate(timeout=SECONDS)
        assert self.process.returncode == 0


@contextmanager
def gate(program: Path, monitor: int, step: Step, result: int | None = None) -> Iterator[Gate]:
    one = Gate(program, monitor, step, result)
    try:
        yield one
    finally:
        with one.process:
            one.process.kill()
