"""A call that is not in the control table: untrapped, over a bare C loop, over the real monitor."""

from __future__ import annotations

import os
import subprocess
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from statistics import median

from bench.processes import Helper, compile_c, ending
from mpu_notify.notify import filter as seccomp_filter
from mpu_notify.notify.monitor import Monitor, identify
from mpu_notify.supervisor.service import MONITORED

#: Of the monitor over the bare loop.
RATIO_LIMIT = 1.25

_CALLS = 10_000
_WARM_UP_ROUNDS = 2

Serve = Callable[[int, ExitStack], None]


@dataclass(frozen=True)
class Traps:
    """Nanoseconds per call, a number a round; numbers at one index are of one round."""

    untrapped: Sequence[float]
    bare_loop: Sequence[float]
    monitor: Sequence[float]

    @property
    def ratios(self) -> list[float]:
        """The monitor over the bare loop, round by round."""
        return [ours / bare for ours, bare in zip(self.monitor, self.bare_loop, strict=True)]

    @property
    def ratio(self) -> float:
        """What the limit is about."""
        return median(self.ratios)


def _start_filtered(program: Path) -> tuple[int, Helper]:
    """A caller under the filter, and its listener.

    A filter belongs to a thread and what that starts: a thread of our own takes it, starts the caller and ends.
    """
    filter_program = seccomp_filter.build_native()
    with ThreadPoolExecutor(1) as thread:
        return thread.submit(lambda: (seccomp_filter.install(filter_program), Helper(program))).result()


def _filtered(program: Path, serve: Serve, cleanup: ExitStack) -> Helper:
    listener, caller = _start_filtered(program)
    try:
        serve(listener, cleanup)
    finally:
        cleanup.enter_context(caller)  # last, so that it ends first: it is what its server lives for
        os.close(listener)
    return caller


def _bare_loop(program: Path) -> Serve:
    def serve(listener: int, cleanup: ExitStack) -> None:
        # In a session of its own, as the monitor is: the scheduler may group by session.
        process = subprocess.Popen([program, str(listener)], pass_fds=[listener], start_new_session=True)
        cleanup.enter_context(ending(process))

    return serve


def _monitor(listener: int, cleanup: ExitStack) -> None:
    monitor = Monitor.start(identify(Path("/dev/null")), MONITORED)
    if monitor.process is not None:
        cleanup.enter_context(ending(monitor.process))
    cleanup.enter_context(monitor)
    monitor.attach(listener, b"{}")
    monitor.receive()


def measure(rounds: int, directory: Path) -> Traps:
    """Interleaved rounds in alternating order; the C programs go into the directory. Nothing is pinned to a core."""
    calls = compile_c(Path(__file__).with_name("calls.c"), directory)
    loop = compile_c(Path(__file__).with_name("loop.c"), directory)
    with ExitStack() as cleanup:
        callers = (
            cleanup.enter_context(Helper(calls)),
            _filtered(calls, _bare_loop(loop), cleanup),
            _filtered(calls, _monitor, cleanup),
        )
        series: tuple[list[float], ...] = ([], [], [])
        for number in range(_WARM_UP_ROUNDS + rounds):
            pairs = list(zip(callers, series, strict=True))
            for caller, times in pairs if number % 2 else reversed(pairs):
                times.extend(caller.ask(_CALLS))
    return Traps(*(times[_WARM_UP_ROUNDS:] for times in series))
