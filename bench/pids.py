"""GPU_GET_PIDS on the stand-in driver: straight from the host, and supervised from a namespace."""

from __future__ import annotations

import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from statistics import median

from bench.processes import BenchError, Helper
from bench.users import Asker

#: The installed command, beside the Python that runs this.
COMMAND = Path(sys.executable).with_name("mpu-notify")

_ASKS = 5  # a round
_SCRIPT = Path(__file__).with_name("users.py")


@dataclass(frozen=True)
class Pids:
    """Nanoseconds of each call that listed this many processes."""

    processes: int
    direct: Sequence[float]
    supervised: Sequence[float]

    @property
    def added(self) -> float:
        """What supervision adds to the median call."""
        return median(self.supervised) - median(self.direct)


@contextmanager
def standin(directory: Path) -> Iterator[Path]:
    """A stand-in driver that is mounted on a new directory; its control node."""
    directory.mkdir()
    with Helper(sys.executable, "-m", "mpu_notify.standin", directory, "--exit-with-parent") as server:
        try:
            ready, _, control_node = server.line().rstrip("\n").partition(" ")
            if ready != "READY":
                raise BenchError(f"cannot start the stand-in driver: it said {ready}")
            yield Path(control_node)
        finally:
            server.terminate()


def _measure(rounds: int, count: int, control_node: Path) -> Pids:
    inside = Helper(COMMAND, "run", "--device", control_node, "--", sys.executable, _SCRIPT, control_node, str(count))
    with inside:
        inside.line()
        direct: list[float] = []
        supervised: list[float] = []
        with Asker(control_node) as outside:
            for _ in range(1 + rounds):
                direct += [outside.ask(count) for _ in range(_ASKS)]
                supervised += inside.ask(_ASKS)
    return Pids(count, direct[_ASKS:], supervised[_ASKS:])


def measure(rounds: int, counts: Sequence[int], directory: Path) -> list[Pids]:
    """For each number of processes, interleaved rounds; the stand-in is mounted below the directory."""
    with standin(directory / "standin") as control_node:
        return [_measure(rounds, count, control_node) for count in counts]
