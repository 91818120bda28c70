"""Limits that are reached: files, memory, the disk of the log; and a clock that jumps.

What there is no room for waits, and nobody spins.
"""

from __future__ import annotations

import contextlib
import os
import re
import resource
import signal
import socket
import subprocess
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.kernel.conftest import StartStandIn
from tests.kernel.harness import Caller, caller_host_pid, compile_c, eventually, stop_and_wait_for, under_filter
from tests.kernel.test_handover import attached
from tests.kernel.test_serve import Daemon, ask, up

from .conftest import Record
from .record import Row

SECTION = "Limits"


@contextlib.contextmanager
def limited(pid: int, what: int, most: int) -> Iterator[None]:
    """A process's soft limit is lowered."""
    soft, hard = resource.prlimit(pid, what)
    resource.prlimit(pid, what, (most, hard))
    try:
        yield
    finally:
        resource.prlimit(pid, what, (soft, hard))


def the_drivers_own(*callers: Caller) -> str:
    """What an untranslated call is told where these use the GPU."""
    return " ".join(["pids=", *(str(caller_host_pid(each)) for each in callers)])


def files_of(pid: int) -> int:
    return len(list(Path(f"/proc/{pid}/fd").iterdir()))


def running_seconds(pid: int) -> float:
    """How long its threads have run: sched-stats.rst, in ns."""
    return sum(int(task.read_text().split()[0]) for task in Path(f"/proc/{pid}/task").glob("*/schedstat")) / 1e9


def assert_it_sleeps(pid: int) -> None:
    before = running_seconds(pid)
    time.sleep(0.5)
    assert running_seconds(pid) - before < 0.1, "it does not spin"


@pytest.mark.parametrize("left", range(5))
def test_a_monitor_without_files_lets_those_who_come_wait(
    daemon: Daemon, caller_program: Path, record: Record, left: int
) -> None:
    with attached(daemon, caller_program) as first:
        before = files_of(daemon.monitor)
        with (
            under_filter(caller_program, daemon.node.parent, "on_demand") as second,
            socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET) as supervisor,
        ):
            with limited(daemon.monitor, resource.RLIMIT_NOFILE, files_of(daemon.monitor) + left):
                daemon.attach(second)
                supervisor.connect(str(daemon.control))
                assert_it_sleeps(daemon.monitor)
                if left == 0:
                    assert ask(first) == the_drivers_own(first)
                assert daemon.says("a container or a supervisor has to wait: Too many open files; trying on")
            up(second)
            eventually(lambda: ask(second) == "pids= 1", "it is translated")
            eventually(lambda: ask(first) == "pids= 1", "and the first again")
        eventually(lambda: files_of(daemon.monitor) <= before, "nothing is left")
    record(Row(SECTION, "no more files for the monitor", 2, "the driver's own; translated when there are", "none"))


def test_listeners_that_cannot_be_passed_on_yet_are_passed_on_later(
    daemon: Daemon, caller_program: Path, record: Record
) -> None:
    """For a user whose processes have sent too many files that nobody has taken yet, the kernel sends no more."""
    with (
        attached(daemon, caller_program) as first,
        under_filter(caller_program, daemon.node.parent, "on_demand") as second,
    ):
        ours, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_DGRAM)
        with limited(daemon.monitor, resource.RLIMIT_NOFILE, files_of(daemon.monitor) + 20), ours, theirs:
            for _ in range(4):
                socket.send_fds(ours, [b"x"], [ours.fileno()] * 100)
            daemon.attach(second)
            up(second)
            assert ask(second) == the_drivers_own(first, second)
            assert daemon.says("a container or a supervisor has to wait: Too many references: cannot splice; trying on")
            assert_it_sleeps(daemon.monitor)
            assert ask(first) == "pids= 1"
        eventually(lambda: ask(second) == "pids= 1", "it is translated")
    record(Row(SECTION, "no more files in flight", 1, "the driver's own; translated when there are", "none"))


def test_a_supervisor_takes_as_many_files_as_it_may(daemon: Daemon) -> None:
    soft, hard = resource.prlimit(daemon.process.pid, resource.RLIMIT_NOFILE)
    assert soft == hard


def test_a_supervisor_without_files_leaves_calls_to_the_driver(
    daemon: Daemon, caller_program: Path, record: Record
) -> None:
    with (
        attached(daemon, caller_program) as first,
        under_filter(caller_program, daemon.node.parent, "on_demand") as second,
    ):
        with limited(daemon.process.pid, resource.RLIMIT_NOFILE, files_of(daemon.process.pid)):
            daemon.attach(second)
            up(second)
            assert ask(second) == the_drivers_own(first, second)
            eventually(lambda: daemon.says("are there too many open?"), "it is said")
            assert [ask(first) for _ in range(5)] == [the_drivers_own(first, second)] * 5
            assert daemon.log.read_text().count("cannot translate") == 1
            assert_it_sleeps(daemon.process.pid)
        eventually(lambda: ask(first) == "pids= 1", "it is translated")
        daemon.start()
        eventually(lambda: ask(second) == "pids= 1", "by the next supervisor, the other is as well")
    record(Row(SECTION, "no more files for the supervisor", 7, "the driver's own", "none"))


def memory_of(pid: int) -> int:
    """Bytes of address space: proc(5), statm."""
    return int(Path(f"/proc/{pid}/statm").read_text().split()[0]) * resource.getpagesize()


def test_a_monitor_without_memory_serves_and_lets_those_who_come_wait(
    daemon: Daemon, caller_program: Path, record: Record
) -> None:
    with (
        attached(daemon, caller_program) as first,
        under_filter(caller_program, daemon.node.parent, "on_demand") as second,
    ):
        with limited(daemon.monitor, resource.RLIMIT_AS, memory_of(daemon.monitor)):
            daemon.attach(second)
            eventually(lambda: daemon.says("has to wait: Cannot allocate memory; trying on"), "it is said")
            assert_it_sleeps(daemon.monitor)
            assert [ask(first) for _ in range(20)] == ["pids= 1"] * 20
        up(second)
        eventually(lambda: ask(second) == "pids= 1", "it is translated")
    record(Row(SECTION, "no more memory for the monitor", 21, "translated; who comes waits", "none"))


def test_a_supervisor_without_memory_leaves_calls_to_the_driver_at_worst(
    daemon: Daemon, caller_program: Path, record: Record
) -> None:
    with attached(daemon, caller_program) as caller:
        with limited(daemon.process.pid, resource.RLIMIT_AS, 1 << 20):
            got = {ask(caller) for _ in range(20)}
        assert got <= {"pids= 1", the_drivers_own(caller)}
        if daemon.process.poll() is not None:
            daemon.start()
        eventually(lambda: ask(caller) == "pids= 1", "it is translated")
    record(Row(SECTION, "no more memory for the supervisor", 20, "translated or the driver's own", "none"))


@pytest.fixture
def small_disk(tmp_path: Path) -> Iterator[Path]:
    disk = tmp_path / "disk"
    disk.mkdir()
    subprocess.run(["mount", "-t", "tmpfs", "-o", "size=32k", "tmpfs", disk], check=True)
    yield disk
    subprocess.run(["umount", "--lazy", disk], check=True)


def test_lines_that_a_full_disk_does_not_take_are_counted_and_told(
    tmp_path: Path, small_disk: Path, standin: StartStandIn, caller_program: Path, record: Record
) -> None:
    log = small_disk / "log"
    daemon = Daemon(tmp_path, standin("--era", "host").control_node, "--log-file", log)
    try:
        with attached(daemon, caller_program) as caller:
            filler = small_disk / "filler"
            with contextlib.suppress(OSError), filler.open("wb", buffering=0) as full:
                while full.write(bytes(100)):
                    pass
            for _ in range(100):
                assert ask(caller) == "pids= 1"
            assert "were lost" not in log.read_text()
            filler.unlink()
            assert ask(caller) == "pids= 1"
            eventually(lambda: "were lost" in log.read_text(), "the loss is told")
            (told,) = (line for line in log.read_text().splitlines() if "were lost" in line)
            lost = int(told.rpartition("lines=")[2])
            assert lost > 0
            eventually(
                lambda: lost + log.read_text().count(" debug call ") > 101, "each call has a line, or is counted"
            )
    finally:
        daemon.end()
    record(Row(SECTION, "no more disk for the log", 101, "translated; how many lines were lost is told", "none"))


def test_no_wait_goes_by_a_clock_that_jumps(
    tmp_path: Path, standin: StartStandIn, caller_program: Path, record: Record, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Of monitor and supervisor; how far the lines of the log are apart shows that it does."""
    library = compile_c(Path(__file__).with_name("jumping_clock.c"), tmp_path, "-shared", "-fPIC")
    node = standin("--era", "host").control_node
    monkeypatch.setenv("LD_PRELOAD", str(library))
    daemon = Daemon(tmp_path, node)
    monkeypatch.delenv("LD_PRELOAD")
    try:
        assert str(library) in Path(f"/proc/{daemon.monitor}/maps").read_text()
        with attached(daemon, caller_program) as caller:
            assert [ask(caller) for _ in range(20)] == ["pids= 1"] * 20
            stop_and_wait_for(daemon.process.pid)
            try:
                assert ask(caller) == the_drivers_own(caller), "after a second, and not after a year"
                with under_filter(caller_program, node.parent, "on_demand") as second:
                    daemon.attach(second)
                    up(second)
                    assert ask(second) == the_drivers_own(caller, second)
            finally:
                os.kill(daemon.process.pid, signal.SIGCONT)
            eventually(lambda: ask(caller) == "pids= 1", "it is translated again")
        years = {line[:4] for line in daemon.log.read_text().splitlines() if re.match(r"\d{4}-", line)}
        assert len(years) > 1
    finally:
        daemon.end()
    record(
        Row(SECTION, "a clock that jumps by a year", 22, "translated; the driver's own where nobody answers", "none")
    )
