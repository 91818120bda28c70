"""Serve the stand-in driver from a mounted directory until told to stop."""

from __future__ import annotations

import argparse
import ctypes
import os
import signal
import sys
from dataclasses import dataclass
from pathlib import Path

from mpu_notify.rm.abi import CardInfo
from mpu_notify.standin.callers import Caller
from mpu_notify.standin.driver import CHIPS, Driver, Era, File, Options
from mpu_notify.standin.fuse import FuseServer, IoctlCall, Opener

_PR_SET_PDEATHSIG = 1  # linux/prctl.h
_STOP = (signal.SIGTERM, signal.SIGINT, signal.SIGHUP)


@dataclass(frozen=True)
class _Node:
    """An open file of the driver's, as the FUSE server wants it."""

    file: File

    def ioctl(self, call: IoctlCall) -> bytes:
        # Where the ioctl number has no direction the kernel copied nothing; the driver copies all the same.
        both_ways = bool(call.data) and len(call.data) == call.out_size
        copied = call.data if both_ways else b""
        return self.file.ioctl(Caller(call.tid), call.cmd, call.argument, copied) or b""

    def release(self) -> None:
        self.file.release()


def _nodes(driver: Driver) -> dict[str, Opener]:
    def gpu(minor: int) -> Opener:
        return lambda tid: _Node(driver.open_gpu(minor, Caller(tid)))

    gpus = {f"nvidia{minor}": gpu(minor) for minor in range(len(driver.gpus))}
    return {"nvidiactl": lambda _tid: _Node(driver.open_control()), **gpus}


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
        "node with --device.",
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("mountpoint", type=Path, metavar="MOUNTPOINT", help="an existing directory")
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
    try:
        server = FuseServer(asked.mountpoint.absolute(), _nodes(driver))
    except OSError as error:
        print(f"mpu-notify standin: {error}; it needs root and an existing directory", file=sys.stderr)
        return 1
    try:
        for number in _STOP:
            signal.signal(number, _stop)
        signal.pthread_sigmask(signal.SIG_UNBLOCK, _STOP)
        print("READY", asked.mountpoint.absolute() / "nvidiactl", flush=True)
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
