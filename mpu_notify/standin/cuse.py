"""Ioctl-only character devices over the raw ``/dev/cuse`` protocol: linux/fuse.h, version 7.31.

They have the device number that they are given. An ioctl is *unrestricted*: the server says what the kernel copies.
"""

from __future__ import annotations

import errno
import os
import select
import struct
from collections.abc import Mapping
from pathlib import Path
from typing import NamedTuple

from mpu_notify.standin.connection import MAJOR, MAX_WRITE, Connection, Op, Opener, require_version

_INIT_OUT = struct.Struct("<IIIIIIII40x")  # major minor unused flags max_read max_write dev_major dev_minor
_UNRESTRICTED_IOCTL = 1 << 0  # CUSE_UNRESTRICTED_IOCTL
_MODE = 0o666
_DEV = Path("/dev")


class DeviceNumber(NamedTuple):
    """A character device's number."""

    major: int
    minor: int


class _Device(Connection):
    """One device, from the kernel's first request to the end of the connection."""

    def __init__(self, name: str, number: DeviceNumber, opener: Opener) -> None:
        """Make /dev/NAME; OSError where that fails."""
        super().__init__(_DEV / "cuse", nonblocking=True)
        self._path = _DEV / name
        self._number = number
        self._opener = opener
        self.handlers[Op.CUSE_INIT] = self._init
        try:
            self._come_up()
        except OSError:
            os.close(self.fd)
            raise

    def opener(self, _node: int) -> Opener:
        """The one that there is."""
        return self._opener

    def _come_up(self) -> None:
        poll = select.poll()
        poll.register(self.fd, select.POLLIN)
        poll.poll()
        self.answer_next()  # the kernel makes the device as it takes this answer
        if any(events & select.POLLERR for _, events in poll.poll(0)):
            raise OSError(errno.EBUSY, "the kernel refused the device; its number or name is taken", str(self._path))
        self._path.chmod(_MODE)

    def _init(self, _node: int, _tid: int, body: bytes) -> bytes:
        minor = require_version(body)
        answer = _INIT_OUT.pack(MAJOR, minor, 0, _UNRESTRICTED_IOCTL, MAX_WRITE, MAX_WRITE, *self._number)
        return answer + f"DEVNAME={self._path.name}\0".encode()


class CuseServer:
    """Character devices in /dev, which must be a devtmpfs, served by the thread that calls ``serve``."""

    def __init__(self, nodes: Mapping[str, tuple[DeviceNumber, Opener]]) -> None:
        """Make ``nodes`` (name -> number and opener, mode 0666); OSError where that fails."""
        self._devices: dict[int, _Device] = {}
        try:
            for name, (number, opener) in nodes.items():
                device = _Device(name, number, opener)
                self._devices[device.fd] = device
        except OSError:
            self.close()
            raise

    def close(self) -> None:
        """Remove the devices, even in use: calls on files still open fail with ENOTCONN."""
        while self._devices:
            fd, _ = self._devices.popitem()
            os.close(fd)

    def serve(self) -> None:
        """Answer requests until the kernel ends all connections."""
        poll = select.poll()
        for fd in self._devices:
            poll.register(fd, select.POLLIN)
        served = set(self._devices)
        while served:
            for fd, _ in poll.poll():
                if not self._devices[fd].answer_next():
                    poll.unregister(fd)
                    served.discard(fd)
