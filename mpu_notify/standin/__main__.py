"""Serve the stand-in driver from a mounted directory, or as character devices, until told to stop."""

from __future__ import annotations

import argparse
import ctypes
import os
import signal
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import TextIO

from mpu_notify.rm.abi import CONTROL_NODE, CONTROL_NODE_MAJOR, CONTROL_NODE_MINOR, CardInfo
from mpu_notify.standin.callers import Caller
from mpu_notify.standin.connection import IoctlCall, Opener
from mpu_notify.standin.cuse import CuseServer, DeviceNumber
from mpu_notify.standin.driver import CHIPS, Driver, Era, File, Options
from mpu_notify.standin.fuse import FuseServer
from mpu_notify.standin.trace import TracedFile

_PR_SET_PDEATHSIG = 1  # linux/prctl.h
_STOP = (signal.SIGTERM, signal.SIGINT, signal.SIGHUP)


@dataclass(frozen=True)
class _Node:
    """An open file of the driver's, as the server wants it."""

    file: File

    def ioctl(self, call: IoctlCall) -> bytes:
        # Where the ioctl number has no direction the kernel copied nothing; the driver copies all the same.
        both_ways = bool(call.data) and len(call.data) == call.out_size
        copied = call.data if both_ways else b""
        return self.file.ioctl(Caller(call.tid), call.cmd, call.argument, copied) or b""

    def release(self) -> None:
        self.file.release()


def _traced(name: str, opener: Opener, to: TextIO) -> Opener:
    return lambda tid: TracedFile(name, tid, opener(tid), to)


def _nodes(driver: Driver, trace: TextIO | None) -> dict[str, tuple[DeviceNumber, Opener]]:
    def gpu(minor: int) -> Opener:
        return lambda tid: _Node(driver.open_gpu(minor, Caller(tid)))

    control = DeviceNumber(CONTROL_NODE_MAJOR, CONTROL_NODE_MINOR)
    gpus = {
        f"nvidia{minor}": (DeviceNumber(CONTROL_NODE_MAJOR, minor), gpu(minor)) for minor in range(len(driver.gpus))
    }
    nodes: dict[str, tuple[DeviceNumber, Opener]] = {
        CONTROL_NODE.name: (control, lambda _tid: _Node(driver.open_control())),
        **gpus,
    }
    if trace is None:
        return nodes
    return {name: (number, _traced(name, opener, trace)) for name, (number, opener) in nodes.items()}


def _server(driver: Driver, mountpoint: Path | None, trace: TextIO | None) -> FuseServer | CuseServer:
    nodes = _nodes(driver, trace)
    if mountpoint is None:
        return CuseServer(nodes)
    return FuseServer(mountpoint, {name: opener for name, (_, opener) in nodes.items()})


def _gpu_count(word: str) -> int:
    count = int(word)
    if not 1 <= count <= CardInfo.MAX_ENTRIES:
        message = f"{word} is not between 1 and {CardInfo.MAX_ENTRIES}"
        raise argparse.ArgumentTypeError(message)
    return count


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="python -m mpu_notify.standin",
        description="Serve files that answer like the NVIDIA driver's nodes: nvidiactl, nvidia0, ...\n"
        "They speak the RM ioctls that list the processes of a GPU, and keep books instead of hardware.",
        epilog="Run it as root in the initial PID namespace. It prints one line, READY and the path of\n"
        "nvidiactl, when the files are there, and unmounts and exits 0 on SIGTERM, SIGINT or SIGHUP. The\n"
        "files can be bind-mounted into containers. They are no character devices, so name the control\n"
        "node with --device. With --cuse they are: /dev/nvidiactl, 195:255, and so on; that needs a kernel\n"
        "with CUSE, and no driver of NVIDIA's.",
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    place = parser.add_mutually_exclusive_group(required=True)
    place.add_argument("mountpoint", type=Path, nargs="?", metavar="MOUNTPOINT", help="an existing directory")
    place.add_argument("--cuse", action="store_true", help="make character devices in /dev instead of files")
    parser.add_argument(
        "--era",
        type=Era,
        choices=list(Era),
        metavar="{" + ",".join(era.value for era in Era) + "}",
        default=Era.HOST,
        help="what it does with process ids by itself: tell those of the initial PID namespace (host, default), those "
        "of the caller's namespace, as drivers from 570.148.08 and 575.57.08 on do (native), or what those in between "
        "do (thread-list, thread-both, thread-all)",
    )
    parser.add_argument("--gpus", type=_gpu_count, default=1, metavar="N", help="how many GPUs (default 1)")
    parser.add_argument("--chip", choices=sorted(CHIPS), default="hopper", help="generation (default hopper)")
    parser.add_argument("--driver-version", default=Options.version, metavar="V", help="default %(default)s")
    parser.add_argument(
        "--old-alloc", action="store_true", help="take RM_ALLOC's argument as drivers up to 530.41.03 do"
    )
    parser.add_argument(
        "--trace", type=argparse.FileType("w"), metavar="FILE", help="write down every ioctl, one JSON object a line"
    )
    parser.add_argument("--exit-with-parent", action="store_true", help="stop when the thread that started it ends")
    return parser


def main(arguments: list[str] | None = None) -> int:
    """Run the command line; the exit status."""
    asked = _parser().parse_args(arguments)
    # Blocked until there is something to undo, so that no signal can leave the mount behind.
    signal.pthread_sigmask(signal.SIG_BLOCK, _STOP)
    if asked.exit_with_parent:
        parent = os.getppid()
        ctypes.CDLL(None).prctl(_PR_SET_PDEATHSIG, signal.SIGTERM, 0, 0, 0)
        if os.getppid() != parent:  # it ended before we asked to be told
            return 0
    driver = Driver(Options(asked.era, asked.gpus, CHIPS[asked.chip], asked.driver_version, asked.old_alloc))
    directory = CONTROL_NODE.parent if asked.cuse else asked.mountpoint.absolute()
    try:
        server = _server(driver, None if asked.cuse else directory, asked.trace)
    except OSError as error:
        needed = "the kernel's module cuse" if asked.cuse else "an existing directory"
        print(f"mpu-notify standin: {error}; it needs root and {needed}", file=sys.stderr)
        return 1
    try:
        for number in _STOP:
            signal.signal(number, _stop)
        signal.pthread_sigmask(signal.SIG_UNBLOCK, _STOP)
        print("READY", directory / CONTROL_NODE.name, flush=True)
        server.serve()
    except SystemExit:
        signal.pthread_sigmask(signal.SIG_BLOCK, _STOP)
    finally:
        server.close()
    return 0


def _stop(_number: int, _frame: object) -> None:
    raise SystemExit(0)


if __name__ == "__main__":
    sys.exit(main())
