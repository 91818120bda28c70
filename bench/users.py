"""GPU processes for the stand-in driver, and one more that asks for their list. Run as a script in a namespace.

usage: users.py CONTROL_NODE COUNT

Prints READY when the processes are up. Each line on standard input is a number of asks; the answer is a line with the
nanoseconds of each. At the end of input it leaves its children to the namespace's init, which ends them.
"""

from __future__ import annotations

import os
import signal
import sys
from pathlib import Path
from time import perf_counter_ns

from mpu_notify.notify.process import fork
from mpu_notify.rm.abi import PIDS_ID_TYPE_CLASS, is_compute_class, pack_words
from mpu_notify.rm.client import GpuUser, RmClient
from mpu_notify.rm.controls import GPU_PIDS


class Asker:
    """Asks for the processes that compute on the first GPU, and computes on none itself."""

    def __init__(self, control_node: Path) -> None:
        self._client = RmClient(control_node)
        self._gpu = self._client.gpus()[0]
        compute = max(number for number in self._gpu.classes if is_compute_class(number))
        self._question = pack_words([PIDS_ID_TYPE_CLASS, compute]).ljust(GPU_PIDS.size, b"\0")

    def ask(self, expected: int) -> int:
        """The nanoseconds of one GPU_GET_PIDS that lists so many processes."""
        params = bytearray(self._question)
        start = perf_counter_ns()
        self._client.control(self._gpu.subdevice, GPU_PIDS.cmd, params)
        taken = perf_counter_ns() - start
        found = len(GPU_PIDS.table.pids(params) or ())
        if found != expected:
            raise SystemExit(f"users.py: GPU_GET_PIDS listed {found} processes, {expected} are there")
        return taken

    def __enter__(self) -> Asker:
        return self

    def __exit__(self, *_: object) -> None:
        self._client.close()


def _start_user(control_node: Path) -> None:
    up_in, up_out = os.pipe()

    def use() -> int:
        with GpuUser(control_node):
            os.write(up_out, b"u")
            signal.pause()
        return 0

    fork(use)
    os.close(up_out)
    if not os.read(up_in, 1):
        raise SystemExit("users.py: a GPU process did not come up, its reason is above")
    os.close(up_in)


def main() -> None:
    """Run the script."""
    control_node, count = Path(sys.argv[1]), int(sys.argv[2])
    for _ in range(count):
        _start_user(control_node)
    with Asker(control_node) as asker:
        print("READY", flush=True)
        for line in sys.stdin:
            print(*(asker.ask(count) for _ in range(int(line))), flush=True)


if __name__ == "__main__":
    main()
