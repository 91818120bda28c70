"""A program that uses a GPU and waits: ``python -m mpu_notify.standin.workload NAME MIB [--device PATH | --cuda]``.

It calls itself NAME (what process lists show), says "up" once it holds MIB of GPU memory, and stays until it is told to
end or its parent ends. With --device it uses a stand-in, with --cuda a real GPU.
"""

from __future__ import annotations

import argparse
import signal
import sys
from contextlib import AbstractContextManager
from pathlib import Path

from mpu_notify.notify import native
from mpu_notify.rm.client import GpuUser, RmError
from mpu_notify.rm.cuda import CudaError, CudaUser

_MIB = 1 << 20


def main() -> int:
    """Run the program; returns its exit status."""
    parser = argparse.ArgumentParser(prog="python -m mpu_notify.standin.workload", allow_abbrev=False)
    parser.add_argument("name", help="at most 15 characters")
    parser.add_argument("mib", type=int)
    driver = parser.add_mutually_exclusive_group(required=True)
    driver.add_argument("--device", type=Path)
    driver.add_argument("--cuda", action="store_true")
    args = parser.parse_args()
    native.die_with_parent()
    Path("/proc/self/comm").write_text(args.name, encoding="utf-8")
    try:
        with _use(args.device, args.mib * _MIB):
            print("up", flush=True)
            signal.sigwait({signal.SIGTERM, signal.SIGINT})
    except (RmError, CudaError) as error:
        print(f"{args.name}: {error}", file=sys.stderr)
        return 1
    return 0


def _use(device: Path | None, memory_bytes: int) -> AbstractContextManager[object]:
    signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGTERM, signal.SIGINT})
    return CudaUser(memory_bytes) if device is None else GpuUser(device, memory_bytes=memory_bytes)


if __name__ == "__main__":
    sys.exit(main())
