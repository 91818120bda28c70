"""GPU_GET_PIDS of a container beside another whose 1,000 threads call without pause: trapped, and not."""

from __future__ import annotations

import os
import sys
import time
from collections.abc import Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from statistics import quantiles

from bench.containers import daemon, start_filtered
from bench.pids import standin
from bench.processes import BenchError, compile_c

RATIO_LIMIT = 2.0  # of the p99 beside trapped calls over that beside untrapped ones

_SCRIPT = Path(__file__).with_name("users.py")
_ASKS = 200  # a round
_GOING_SECONDS = 0.2  # until all of the crowd call
_USERS = 1
_THREADS = 1000  # crowd.c

#: What the crowd calls: see crowd.c.
_NOTHING, _UNTRAPPED, _TRAPPED, _SUPERVISED = range(4)


def p99(times: Sequence[float]) -> float:
    """The 99th percentile."""
    return quantiles(times, n=100)[-1]


@dataclass(frozen=True)
class Neighbour:
    """Nanoseconds of each of the neighbour's calls, by what the crowd calls meanwhile."""

    nothing: Sequence[float]
    untrapped: Sequence[float]
    trapped: Sequence[float]
    supervised: Sequence[float]

    @property
    def ratio(self) -> float:
        """What the limit is about: the worse of the two."""
        return max(p99(self.trapped), p99(self.supervised)) / p99(self.untrapped)


def measure(rounds: int, directory: Path) -> Neighbour:
    """Interleaved rounds; the C program, the daemon's sockets and the stand-in are below the directory."""
    program = compile_c(Path(__file__).with_name("crowd.c"), directory)
    series: tuple[list[float], ...] = ([], [], [], [])
    with ExitStack() as cleanup:
        node = cleanup.enter_context(standin(directory / "neighbours-standin"))
        served = cleanup.enter_context(daemon(directory / "neighbours", "--device", str(node)))
        inside = ["unshare", "--pid", "--fork", "--mount-proc", "--kill-child"]
        commands = {
            # In a session of its own, which the scheduler treats as one: as a container's group is.
            "crowd": ["setsid", "--wait", str(program)],
            "neighbour": [*inside, sys.executable, str(_SCRIPT), str(node), str(_USERS)],
        }
        helpers = []
        for count, (name, command) in enumerate(commands.items(), 1):
            listener, helper = start_filtered(*command)
            try:
                helpers.append(cleanup.enter_context(helper))
                served.attach(name, listener)
            finally:
                os.close(listener)
            served.wait_for(count)
        crowd, neighbour = helpers
        neighbour.line()
        for number in range(1 + rounds):
            order = (_NOTHING, _UNTRAPPED, _TRAPPED, _SUPERVISED)
            for what in order if number % 2 else reversed(order):
                crowd.ask(what)
                time.sleep(_GOING_SECONDS)
                series[what].extend(neighbour.ask(_ASKS))
                (calls,) = crowd.ask(_NOTHING)
                if what != _NOTHING and calls <= _THREADS:  # some end a call of the round before
                    raise BenchError(f"cannot measure beside {calls:.0f} calls of {_THREADS} threads")
    return Neighbour(*(times[_ASKS:] for times in series))
