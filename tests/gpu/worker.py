"""A process that uses a GPU and waits: ``python worker.py MIB (--cuda | --device PATH) [options]``.

Prints one JSON line once it holds MIB of GPU memory, and stays until it is killed or its parent ends.
"""

from __future__ import annotations

import argparse
import json
import os
import signal
from concurrent.futures import ThreadPoolExecutor
from contextlib import AbstractContextManager
from pathlib import Path

from mpu_notify.notify import native
from mpu_notify.rm.abi import CONTROL_NODE
from mpu_notify.rm.client import GpuUser, RmClient, RmError
from mpu_notify.rm.cuda import CudaUser

MIB = 1 << 20


def main() -> None:
    parser = argparse.ArgumentParser(prog="worker.py", allow_abbrev=False)
    parser.add_argument("mib", type=int)
    driver = parser.add_mutually_exclusive_group(required=True)
    driver.add_argument("--cuda", action="store_true")
    driver.add_argument("--device", type=Path, help="the control node of a stand-in")
    parser.add_argument("--off-main-thread", action="store_true", help="make the context in another thread")
    parser.add_argument("--clients", type=int, default=0, help="so many more RM clients, each with a subdevice")
    args = parser.parse_args()
    native.die_with_parent()

    def use() -> AbstractContextManager[object]:
        if args.device is None:
            return CudaUser(args.mib * MIB)
        return GpuUser(args.device, memory_bytes=args.mib * MIB)

    # The other thread stays alive, as a program's would.
    thread = ThreadPoolExecutor(1)
    held: list[object] = [thread.submit(use).result() if args.off_main_thread else use()]
    error = None
    try:  # a worker without its further clients is still a process to compare
        for _ in range(args.clients):
            client = RmClient(args.device or CONTROL_NODE)
            held.append(client)
            client.gpus()
    except RmError as refused:
        error = str(refused)
    print(json.dumps({"pid": os.getpid(), "error": error}), flush=True)
    while True:
        signal.pause()


if __name__ == "__main__":
    main()
