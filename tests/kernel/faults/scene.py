"""A daemon, a container with a caller, and a stand-in driver, to put faults upon."""

from __future__ import annotations

import contextlib
import errno
import os
import re
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from mpu_notify.standin.process import StandIn

from ..harness import Caller, caller_host_pid, eventually, state_of, under_filter
from ..test_serve import Daemon, up

#: What GET_PID_INFO of itself says to the caller, which holds 1 MiB: with its own number; and to the driver, whose
#: process 1 is another one.
TRANSLATED = f"pid=1 result=0x0 private={1 << 20}"
THE_DRIVERS_OWN = "pid=1 result=0x0 private=0"
#: What the kernel says of a file whose FUSE server, here the driver, has died.
NOT_CONNECTED = f"ret=-1 errno={errno.ENOTCONN}"

#: What it says where nobody has the filter's listener any more.
NO_SYSTEM_CALL = f"ret=-1 errno={errno.ENOSYS}"

_WORDS = {
    TRANSLATED: "translated",
    THE_DRIVERS_OWN: "the driver's own",
    NOT_CONNECTED: "the kernel's own, ENOTCONN",
    NO_SYSTEM_CALL: "ENOSYS",
}


def in_words(answer: str) -> str:
    """How the tables call an answer."""
    return next((words for known, words in _WORDS.items() if answer.startswith(known)), answer)


def is_at_rest(process: Path) -> bool:
    """Whether all threads of a process in /proc wait."""
    try:
        return all(state_of(task) == "S" for task in (process / "task").iterdir())
    except (FileNotFoundError, ProcessLookupError):  # one of them ends
        return False


class Held(Counter[str]):
    """What a process at rest has: open files by kind, threads, children. Two of them differ by what was leaked."""

    def __init__(self, pid: int) -> None:
        super().__init__()
        process = Path(f"/proc/{pid}")
        eventually(lambda: is_at_rest(process), "it is at rest")
        for fd in (process / "fd").iterdir():
            with contextlib.suppress(FileNotFoundError):  # it was not at rest after all
                self[re.sub(r"\d+", "N", os.readlink(fd))] += 1  # noqa: PTH115 - "socket:[N]" is no path
        for task in (process / "task").iterdir():
            with contextlib.suppress(FileNotFoundError, ProcessLookupError):
                self["child"] += len((task / "children").read_text().split())
                self["thread"] += 1


class Scene:
    """All of them, the container attached and its caller up."""

    def __init__(self, directory: Path, driver: StandIn, caller_program: Path, silence_s: float = 10) -> None:
        self.driver, self.caller_program = driver, caller_program
        config = directory / "config.toml"
        config.write_text(f"[supervisor]\nanswer_timeout = {silence_s}\n")
        self.daemon = Daemon(directory, driver.control_node, "--config", config)
        self.caller: Caller

    @contextmanager
    def container(self) -> Iterator[None]:
        """A new container, whose caller is translated when this begins."""
        with under_filter(self.caller_program, self.daemon.node.parent, "holder") as self.caller:
            self.daemon.attach(self.caller)
            up(self.caller)
            self.wait_until_translated()
            self.host_pid = caller_host_pid(self.caller)
            yield

    def ask(self) -> str:
        self.caller.poke("i")
        return self.caller.line()

    def wait_until_translated(self) -> None:
        eventually(lambda: self.ask() == TRANSLATED, "the caller is translated")

    def held(self) -> tuple[Held, Held]:
        """By the monitor and by the supervisor."""
        return Held(self.daemon.find_monitor()), Held(self.daemon.process.pid)

    @contextmanager
    def leaves_nothing(self) -> Iterator[None]:
        """What is done in this context leaves nothing behind in either."""
        before = self.held()
        yield
        eventually(lambda: self.held() == before, "monitor and supervisor have what they had")
