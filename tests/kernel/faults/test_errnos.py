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

from mpu_notify.notify.protocol import Cause

from ..conftest import StartStandIn
from ..harness import caller_host_pid, eventually, injected, scripted_supervisor, stop_and_wait_for, under_filter
from .conftest import MakeScene, Record
from .gate import CONTROL, QUERY, RECEIVE, SEND, VALID, Step, gate
from .record import Row
from .scene import THE_DRIVERS_OWN, TRANSLATED, Held, in_words, is_at_rest

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
    with scene.container(), scene.leaves_nothing():
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


def _words(refused: Refused) -> str:
    return ", ".join((*refused.errnos, *(["less than was asked for"] if refused.results else [])))


@pytest.mark.parametrize("error", ["EINTR", "ENOMEM", "EAGAIN", "EFAULT", "EINVAL"])
def test_a_wait_for_the_supervisor_that_is_refused_is_begun_again(
    make_scene: MakeScene, gate_program: Path, record: Record, error: str
) -> None:
    scene = make_scene()
    with scene.container(), scene.leaves_nothing():
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
def test_a_receive_that_is_refused_is_tried_again(
    make_scene: MakeScene, gate_program: Path, record: Record, error: str
) -> None:
    scene = make_scene()
    with scene.container(), scene.leaves_nothing():
        receive = Step("receive", "ioctl", request=RECEIVE, moment="enter")
        with gate(gate_program, scene.daemon.find_monitor(), receive, -getattr(errno, error)) as held:
            held.reached()
            held.open()
            assert scene.ask() == TRANSLATED
    record(Row(SECTION, "receiving: ENOENT, EINTR, ENOMEM, EFAULT, EINVAL", 1, "translated", "none"))


def test_a_monitor_that_has_no_file_left_answers_all_the_same(make_scene: MakeScene, record: Record) -> None:
    """A call takes four: memory, maps, a pidfd and the caller's file."""
    scene = make_scene()
    with scene.container(), scene.leaves_nothing():
        monitor = scene.daemon.find_monitor()
        eventually(lambda: is_at_rest(Path(f"/proc/{monitor}")), "it has let our question go")
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


#: How the owner of a user namespace opens what only the caller's own user may: a child does it and hands the file over.
AS_OWNER = [
    *("openat:error=EMFILE:when=2", "socketpair:error=EMFILE", "socketpair:error=ENFILE", "socketpair:error=ENOMEM"),
    *("clone:error=EAGAIN", "clone:error=ENOMEM", "recvmsg:error=ENOMEM", "wait4:error=EINTR:when=1"),
]


@pytest.mark.parametrize("refused", AS_OWNER)
def test_a_refused_way_round_for_a_rootless_caller_gives_it_a_good_answer(
    make_scene: MakeScene, record: Record, refused: str
) -> None:
    """Here the way round ends in vain even so: the caller has no user namespace of its own."""
    scene = make_scene()
    with scene.container(), scene.leaves_nothing():
        with injected(scene.daemon.find_monitor(), "--inject=openat:error=EACCES:when=1", f"--inject={refused}"):
            assert scene.ask() == THE_DRIVERS_OWN
        assert scene.ask() == TRANSLATED
    words = "opening as the owner of a user namespace: EMFILE, ENFILE, ENOMEM, EAGAIN, EINTR"
    record(Row(SECTION, words, 1, in_words(THE_DRIVERS_OWN), "none"))


#: What a monitor does besides before Linux 6.9 and 6.11: /proc/TID/status for the process, and the text of maps.
OLDER = [
    *(Step("open status", "openat", 3, moment="enter"), Step("duplicate maps", "fcntl", moment="enter")),
    *(Step("read maps", "read", moment="enter"), Step("read status", "read", 3, moment="enter")),
]


@pytest.mark.parametrize("step", OLDER, ids=lambda step: step.name)
def test_a_refused_system_call_of_the_way_on_an_older_kernel_gives_a_good_answer(
    standin: StartStandIn, caller_program: Path, gate_program: Path, record: Record, step: Step
) -> None:
    node = standin("--era", "host").control_node
    errors = ["EMFILE", "ENOENT", "ESRCH", "ENOMEM", "EIO", "EINTR"]
    with (
        scripted_supervisor(node, kernel="5.9") as supervisor,
        under_filter(caller_program, node.parent, "on_demand") as caller,
    ):
        assert supervisor.monitor.process is not None
        monitor = supervisor.monitor.process.pid
        channel = supervisor.attach(caller)
        caller.go()
        assert caller.line() == "up"
        before = Held(monitor)
        for error in errors:
            with gate(gate_program, monitor, step, -getattr(errno, error)) as held:
                caller.poke()
                held.reached()
                held.open()
                assert channel.pass_all_on() in (Cause.MEMORY_UNWRITABLE, Cause.FILE_UNAVAILABLE)
            assert caller.line() == f"pids= {caller_host_pid(caller)}"
            caller.poke()
            assert channel.pass_all_on() is Cause.TRANSLATED
            assert caller.line() == f"pids= {caller_host_pid(caller)}", "by a test that changes nothing"
        eventually(lambda: Held(monitor) == before, "nothing is left of the calls")
    words = f"as on Linux 5.9, reading /proc/TID/maps and status: {', '.join(errors)}"
    record(Row(SECTION, words, len(errors), in_words(THE_DRIVERS_OWN), "none"))
