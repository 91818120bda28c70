"""A process that uses a GPU and waits: ``python worker.py MIB (--cuda | --device PATH) [options]``.

Prints one JSON line once it holds MIB of memory on each of its GPUs, and stays until it is killed or its parent ends.
With --busy it also computes, in bursts; a stand-in has nothing to compute with.
"""

from __future__ import annotations

import argparse
import ctypes
import json
import os
import signal
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from mpu_notify.notify import native
from mpu_notify.rm.abi import CONTROL_NODE
from mpu_notify.rm.client import GpuUser, RmClient, RmError
from mpu_notify.rm.cuda import CudaError, CudaUser

MIB = 1 << 20

#: One warp that does nothing but look at the clock, for so many nanoseconds. The driver compiles it for its GPU.
_SPIN = b"""
.version 6.0
.target sm_50
.address_size 64

.visible .entry spin(.param .u64 nanoseconds)
{
    .reg .pred %more;
    .reg .u64 %limit, %start, %now, %spent;
    ld.param.u64 %limit, [nanoseconds];
    mov.u64 %start, %globaltimer;
AGAIN:
    mov.u64 %now, %globaltimer;
    sub.u64 %spent, %now, %start;
    setp.lt.u64 %more, %spent, %limit;
    @%more bra AGAIN;
    ret;
}
"""
_WARP = 32
_KERNEL_S = 0.02
_FILLS = 64  # of the whole memory, where no kernel can be compiled: some milliseconds


class Computing(CudaUser):
    """A user of a GPU that can keep it busy."""

    def __init__(self, memory_bytes: int, gpu: int) -> None:
        super().__init__(memory_bytes, gpu)
        self._words = memory_bytes // 4
        self._kernel = ctypes.c_void_p()
        #: Why there is no kernel, should that be so.
        self.error = ""
        try:
            module = ctypes.c_void_p()
            self._call("cuModuleLoadData", ctypes.byref(module), _SPIN)  # bytes end in a NUL, as PTX must
            self._call("cuModuleGetFunction", ctypes.byref(self._kernel), module, b"spin")
        except CudaError as error:
            self.error = f"busy with memory only: {error}"

    def start(self) -> None:
        """Begin to keep the GPU busy for _KERNEL_S, by a kernel or else by filling memory."""
        self._call("cuCtxSetCurrent", self._context)
        if self.error:
            for _ in range(_FILLS):
                self._call("cuMemsetD32Async", self._memory, 0, ctypes.c_size_t(self._words), None)
            return
        nanoseconds = ctypes.c_uint64(int(_KERNEL_S * 1e9))
        arguments = (ctypes.c_void_p * 1)(ctypes.addressof(nanoseconds))
        self._call("cuLaunchKernel", self._kernel, 1, 1, 1, _WARP, 1, 1, 0, None, arguments, None)

    def finish(self) -> None:
        """Wait until that is done."""
        self._call("cuCtxSetCurrent", self._context)
        self._call("cuCtxSynchronize")


def burst(users: list[Computing], seconds: float) -> None:
    """Keep these GPUs busy, all at the same time."""
    end = time.monotonic() + seconds
    while True:
        for user in users:
            user.start()
        time.sleep(_KERNEL_S * 0.9)  # to wait in CUDA costs a CPU
        for user in users:
            user.finish()
        if time.monotonic() >= end:
            return


def compute(users: list[Computing]) -> None:
    """Bursts and pauses whose lengths differ from process to process, so that each is the busiest at times."""
    busy, idle = 0.2 + 0.1 * (os.getpid() % 5), 0.3 + 0.1 * (os.getpid() % 7)
    try:
        while True:
            burst(users, busy)
            time.sleep(idle)
    except CudaError as error:  # it still holds its memory
        print(f"stopped computing: {error}", file=sys.stderr, flush=True)


def use(args: argparse.Namespace, held: list[object]) -> list[Computing]:
    """Take memory on each GPU; those that compute are returned, the others held."""
    computing = []
    for gpu in args.gpu or [0]:
        if args.device is not None:
            held.append(GpuUser(args.device, gpu=gpu, memory_bytes=args.mib * MIB))
        elif args.busy:
            computing.append(Computing(args.mib * MIB, gpu))
        else:
            held.append(CudaUser(args.mib * MIB, gpu))
    if computing:
        burst(computing, 0)  # what the first kernel allocates is there before anyone looks
    return computing


def more_clients(args: argparse.Namespace, held: list[object]) -> str | None:
    """Make further RM clients; why not all, for a worker without them is still a process to compare."""
    try:
        for _ in range(args.clients):
            client = RmClient(args.device or CONTROL_NODE)
            held.append(client)
            client.gpus()
    except RmError as refused:
        return str(refused)
    return None


def main() -> None:
    parser = argparse.ArgumentParser(prog="worker.py", allow_abbrev=False)
    parser.add_argument("mib", type=int)
    driver = parser.add_mutually_exclusive_group(required=True)
    driver.add_argument("--cuda", action="store_true")
    driver.add_argument("--device", type=Path, help="the control node of a stand-in")
    parser.add_argument("--gpu", type=int, action="append", help="use this one (default 0); may be repeated")
    parser.add_argument("--busy", action="store_true", help="compute as well")
    parser.add_argument("--off-main-thread", action="store_true", help="make the contexts in another thread")
    parser.add_argument("--clients", type=int, default=0, help="so many more RM clients, each with a subdevice")
    args = parser.parse_args()
    native.die_with_parent()
    held: list[object] = []
    # The other thread stays alive, as a program's would.
    thread = ThreadPoolExecutor(1)
    computing = thread.submit(use, args, held).result() if args.off_main_thread else use(args, held)
    error = more_clients(args, held)
    note = "; ".join(filter(None, {one.error for one in computing}))
    print(json.dumps({"pid": os.getpid(), "error": error, "note": note}), flush=True)
    if computing and args.off_main_thread:
        thread.submit(compute, computing)
    elif computing:
        compute(computing)
    while True:
        signal.pause()


if __name__ == "__main__":
    main()
