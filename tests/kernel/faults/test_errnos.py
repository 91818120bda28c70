"""Each system call of a call's way through fails with each errno that it can give: the caller gets a good answer.

Errnos are those of the manual pages and, for files in /proc, of the kernel's source. `close` is left out: whatever it
says, the file is closed. So is a reply that fails for good, which the kernel does only to a caller that is gone.
"""

from __future__ import annotations

import errno
import os
import resource
import signal
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

import pytest

from ..harness import (
    eventually,
    injected,
    stop_and_wait_for,
)
from .conftest import MakeScene, Record
from .gate import CONTROL, QUERY, SEND, VALID, Step, gate
from .record import Row
from .scene import THE_DRIVERS_OWN, TRANSLATED, in_words

SECTION = "Each system call of the monitor for a call, refused"


class Refused(NamedTuple):
    """A system call of the way through, which of them in a call, what it gives, and what that gives the caller."""

    what: str
    syscall: str
    calls: tuple[int, ...]
    errnos: tuple[str, ...]
    gives: str
    request: int | None = None
    results: tuple[int, ...] = ()  # that are no errors: less than was asked for

    def tries(self) -> Iterator[tuple[Step, int]]:
        for nth in self.calls:
            step = Step(self.what, self.syscall, nth, self.request, "enter")
            for result in (*(-getattr(errno, name) for name in self.errnos), *self.results):
                yield step, result


_MEMORY = ("EFAULT", "EIO", "EINTR", "ENOMEM", "EINVAL", "ESRCH", "EBADF", "EAGAIN")
_SOCKET = ("ECONNRESET", "EPIPE", "ENOTCONN", "ENOBUFS", "ENOMEM", "EBADF", "EMSGSIZE", "EFAULT", "EINVAL")
_OPEN = ("EACCES", "EPERM", "ENOENT", "ESRCH", "EMFILE", "ENFILE", "ENOMEM", "EINTR", "ELOOP", "ENXIO", "EIO", "ENODEV")

REFUSED = [
    Refused(
        "the first look at NVOS54",
        "process_vm_readv",
        (1,),
        ("EFAULT", "EPERM", "ESRCH", "ENOMEM", "EINVAL", "EINTR"),
        THE_DRIVERS_OWN,
        results=(0, 8),
    ),
    Refused("opening memory and maps", "openat", (1, 2), _OPEN, THE_DRIVERS_OWN),
    Refused("a check of the id", "ioctl", (1, 2, 3, 4), ("ENOENT", "EINVAL"), THE_DRIVERS_OWN, request=VALID),
    Refused("a check of the id, interrupted", "ioctl", (1, 2, 3, 4), ("EINTR",), TRANSLATED, request=VALID),
    Refused("reading NVOS54 and params", "pread64", (1, 2), _MEMORY, THE_DRIVERS_OWN, results=(0, 16)),
    Refused(
        "asking for a mapping",
        "ioctl",
        (1, 2, 3, 4),
        ("ENOENT", "EFAULT", "EINVAL", "ESRCH", "ENAMETOOLONG", "E2BIG", "EINTR", "ENOTTY"),
        THE_DRIVERS_OWN,
        request=QUERY,
    ),
    Refused("sending to the supervisor (told, two requests)", "sendmsg", (1, 2, 3), _SOCKET, THE_DRIVERS_OWN),
    Refused("sending to the supervisor, not now", "sendmsg", (1, 2, 3, 4), ("EAGAIN", "EINTR"), TRANSLATED),
    Refused("telling the supervisor the outcome", "sendmsg", (4,), _SOCKET, TRANSLATED),
    Refused("looking for an answer", "recvfrom", (1,), ("ECONNRESET", "ENOMEM", "EBADF", "EINVAL"), THE_DRIVERS_OWN),
    Refused("looking for an answer, not now", "recvfrom", (1,), ("EAGAIN", "EINTR"), TRANSLATED),
    Refused("taking an answer", "recvmsg", (1, 2), ("ECONNRESET", "ENOMEM", "EFAULT", "EBADF"), THE_DRIVERS_OWN),
    Refused(
        "looking at the file, and at the fetched one",
        "statx",
        (1, 2),
        ("EACCES", "ENOENT", "ENOMEM", "EBADF", "ELOOP", "ENOTDIR", "EFAULT", "EINVAL", "EIO", "ESTALE"),
        THE_DRIVERS_OWN,
    ),
    Refused(
        "pidfd_open",
        "pidfd_open",
        (1,),
        ("EINVAL", "EMFILE", "ENFILE", "ENODEV", "ENOMEM", "ESRCH", "ENOSYS"),
        THE_DRIVERS_OWN,
    ),
    Refused(
        "pidfd_getfd",
        "pidfd_getfd",
        (1,),
        ("EBADF", "EINVAL", "EMFILE", "ENFILE", "EPERM", "ESRCH", "ENOMEM", "ENOSYS"),
        THE_DRIVERS_OWN,
    ),
    Refused(
        "the driver's ioctl",
        "ioctl",
        (1,),
        (
            "EBADF",
            "EFAULT",
            "EINVAL",
            "ENOTTY",
            "EIO",
            "ENODEV",
            "ENOMEM",
            "EACCES",
            "EPERM",
            "EAGAIN",
            "ENOTCONN",
            "EBUSY",
        ),
        THE_DRIVERS_OWN,
        request=CONTROL,
    ),
    Refused("the driver's ioctl, interrupted", "ioctl", (1,), ("EINTR",), TRANSLATED, request=CONTROL),
    Refused("writing params, then NVOS54", "pwrite64", (1, 2), _MEMORY, THE_DRIVERS_OWN, results=(0, 16)),
    Refused("the reply, interrupted", "ioctl", (1,), ("EINTR",), TRANSLATED, request=SEND),
]


@pytest.mark.parametrize("refused", REFUSED, ids=lambda refused: refused.what)
def test_a_refused_system_call_gives_the_caller_a_good_answer(
    make_scene: MakeScene, gate_program: Path, record: Record, refused: Refused
) -> None:
    scene = make_scene()
    with scene.container():
        before = scene.held()
        monitor = scene.daemon.find_monitor()
        for step, result in refused.tries():
            with gate(gate_program, monitor, step, result) as held:
                scene.caller.poke("i")
                held.reached()
                held.open()
            got = scene.caller.line()
            assert got == refused.gives, (step, result)
            assert scene.ask() == TRANSLATED, ("the next call", step, result)
            record(Row(SECTION, f"{refused.what}: {_words(refused)}", 1, in_words(got), "none"))
        eventually(lambda: scene.held() == before, "nothing is left of them")


def _words(refused: Refused) -> str:
    return ", ".join((*refused.errnos, *(["less than was asked for"] if refused.results else [])))


@pytest.mark.parametrize("error", ["EINTR", "ENOMEM", "EAGAIN", "EFAULT", "EINVAL"])
def test_a_wait_for_the_supervisor_that_is_refused_is_begun_again(
    make_scene: MakeScene, gate_program: Path, record: Record, error: str
) -> None:
    scene = make_scene()
    with scene.container():
        wait = Step("poll", "poll", moment="enter")
        with gate(gate_program, scene.daemon.find_monitor(), wait, -getattr(errno, error)) as held:
            stop_and_wait_for(scene.daemon.process.pid)  # or its answer comes before anybody waits
            scene.caller.poke("i")
            held.reached()
            held.open()
            os.kill(scene.daemon.process.pid, signal.SIGCONT)
            assert scene.caller.line() == TRANSLATED
    record(Row(SECTION, "waiting for an answer: EINTR, ENOMEM, EAGAIN, EFAULT, EINVAL", 1, "translated", "none"))


@pytest.mark.parametrize("error", ["ENOENT", "EINTR", "ENOMEM", "EFAULT", "EINVAL"])
def test_a_receive_that_is_refused_is_tried_again(make_scene: MakeScene, record: Record, error: str) -> None:
    scene = make_scene()
    with scene.container():
        with injected(scene.daemon.find_monitor(), f"--inject=ioctl:error={error}:when=1"):
            assert scene.ask() == TRANSLATED
        assert scene.ask() == TRANSLATED
    record(Row(SECTION, "receiving: ENOENT, EINTR, ENOMEM, EFAULT, EINVAL", 1, "translated", "none"))


def test_a_monitor_that_has_no_file_left_answers_all_the_same(make_scene: MakeScene, record: Record) -> None:
    """A call takes four: memory, maps, a pidfd and the caller's file."""
    scene = make_scene()
    with scene.container():
        monitor = scene.daemon.find_monitor()
        before = scene.held()
        taken = {int(fd.name) for fd in Path(f"/proc/{monitor}/fd").iterdir()}
        free = [number for number in range(len(taken) + 5) if number not in taken]
        limits = resource.prlimit(monitor, resource.RLIMIT_NOFILE)
        for number in free[:4]:
            resource.prlimit(monitor, resource.RLIMIT_NOFILE, (number, limits[1]))
            assert scene.ask() == THE_DRIVERS_OWN
            record(Row(SECTION, "fd limit of the monitor (RLIMIT_NOFILE)", 1, in_words(THE_DRIVERS_OWN), "none"))
        resource.prlimit(monitor, resource.RLIMIT_NOFILE, (free[4], limits[1]))
        assert scene.ask() == TRANSLATED
        resource.prlimit(monitor, resource.RLIMIT_NOFILE, limits)
        eventually(lambda: scene.held() == before, "nothing is left of them")
