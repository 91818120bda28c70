"""A call that is not in the control table allocates nothing in the monitor."""

from __future__ import annotations

import shlex
import sys
from pathlib import Path

import pytest

from mpu_notify.notify.monitor import PROGRAM, Monitor, identify
from mpu_notify.notify.protocol import Ended
from mpu_notify.supervisor.service import MONITORED

from .harness import SECONDS, Caller, compile_c, under_filter

FIRST, ALL = 100, 10_000

# Makes as many calls as each line says; /dev/null answers every ioctl that it does not know with ENOTTY.
CALLS = """
import errno, fcntl, struct, sys
null = open("/dev/null", "r+b", buffering=0)
for line in sys.stdin:
    for _ in range(int(line)):
        try:
            fcntl.ioctl(null, 0xC020462A, bytearray(struct.pack("<4IQ2I", 0, 0, 0x2080FFF0, 0, 0, 0, 0)))
        except OSError as error:
            assert error.errno == errno.ENOTTY
    print("done", flush=True)
"""


class Counter:
    """How many times a program that runs with the preloaded library has allocated or freed."""

    def __init__(self, directory: Path) -> None:
        self._file = directory / "count"
        self._file.write_bytes(bytes(8))
        source = Path(__file__).with_name("count_allocations.c")
        self._library = compile_c(source, directory, "-shared", "-fPIC")

    def wrap(self, program: Path) -> Path:
        """A program that runs this one, and only it, with the library."""
        wrapper = self._file.with_name("wrapper")
        variables = [f"LD_PRELOAD={self._library}", f"COUNT_ALLOCATIONS_IN={self._file}"]
        wrapper.write_text(f'#!/bin/sh\nexec env {shlex.join([*variables, str(program)])} "$@"\n')
        wrapper.chmod(0o755)
        return wrapper

    def read(self) -> int:
        return int.from_bytes(self._file.read_bytes(), sys.byteorder)


@pytest.fixture
def counter(tmp_path: Path) -> Counter:
    return Counter(tmp_path)


def make_calls(caller: Caller, count: int) -> None:
    assert caller.process.stdin is not None
    caller.process.stdin.write(f"{count}\n")
    caller.process.stdin.flush()
    assert caller.line() == "done"


def test_untranslated_calls_allocate_nothing(counter: Counter) -> None:
    with Monitor.start(identify(Path("/dev/null")), MONITORED, program=counter.wrap(PROGRAM)) as monitor:
        with under_filter(sys.executable, "-c", CALLS) as caller:
            started = counter.read()
            monitor.attach(caller.listener, b"{}")
            arrival = monitor.receive()
            assert arrival is not None
            caller.go()
            make_calls(caller, FIRST)
            early = counter.read()
            make_calls(caller, ALL - FIRST)
            late = counter.read()
        ended = arrival.channel.receive()
    assert monitor.process is not None
    assert monitor.process.wait(SECONDS) == 0
    assert 0 < started < early, "attaching a listener allocates, and the counter does not show it"
    assert late == early
    assert isinstance(ended, Ended)
    assert (ended.received, ended.untranslated) == (ALL, ALL)
