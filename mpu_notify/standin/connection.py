"""What FUSE files and CUSE devices have in common: the requests of open ioctl-only files, linux/fuse.h 7.31.

A connection is an open ``/dev/fuse`` or ``/dev/cuse``. Requests are served one at a time.
"""

from __future__ import annotations

import errno
import os
import struct
from abc import ABC, abstractmethod
from collections.abc import Callable
from enum import IntEnum
from pathlib import Path
from typing import NamedTuple, Protocol


class IoctlCall(NamedTuple):
    """An ioctl on an open file.

    ``tid`` is the calling thread in the PID namespace that opened the connection; ``argument`` is the third of
    ioctl(); ``data`` is what the kernel copied in, ``out_size`` the number of bytes that it will copy out.
    """

    tid: int
    cmd: int
    argument: int
    data: bytes
    out_size: int


class OpenFile(Protocol):
    """What an opener returns: one open file."""

    def ioctl(self, call: IoctlCall) -> bytes:
        """Answer with at most ``out_size`` bytes; raise OSError for an errno."""

    def release(self) -> None:
        """The last reference is gone."""


#: Opens a file for a thread (its id in the PID namespace that opened the connection); raises OSError for an errno.
Opener = Callable[[int], OpenFile]


class Op(IntEnum):
    """linux/fuse.h enum fuse_opcode."""

    LOOKUP = 1
    FORGET = 2
    GETATTR = 3
    OPEN = 14
    STATFS = 17
    RELEASE = 18
    INIT = 26
    OPENDIR = 27
    READDIR = 28
    INTERRUPT = 36
    IOCTL = 39
    BATCH_FORGET = 42
    CUSE_INIT = 4096


#: Nobody waits for an answer to these. An interrupted ioctl is answered before its INTERRUPT is read.
_UNANSWERED = frozenset({Op.FORGET, Op.BATCH_FORGET, Op.INTERRUPT})

_HEADER = struct.Struct("<IIQQIIII")  # fuse_in_header: len opcode unique nodeid uid gid pid (total_extlen, padding)
_REPLY = struct.Struct("<IiQ")  # fuse_out_header: len error unique
_INIT_IN = struct.Struct("<II")  # major minor: first in fuse_init_in and cuse_init_in
OPEN_OUT = struct.Struct("<QII")  # fh open_flags padding
_FILE_IN = struct.Struct("<Q")  # fh, first in fuse_release_in
_IOCTL_IN = struct.Struct("<QIIQII")  # fh flags cmd arg in_size out_size
_IOCTL_OUT = struct.Struct("<iIII")  # result flags in_iovs out_iovs
_IOCTL_IOVEC = struct.Struct("<QQ")  # base len

MAJOR, MINOR = 7, 31
_OPEN_FLAGS = 1 << 0 | 1 << 5  # FOPEN_DIRECT_IO, FOPEN_NOFLUSH
_UNRESTRICTED, _RETRY = 1 << 1, 1 << 2  # FUSE_IOCTL_*
MAX_WRITE = 4096
#: An ioctl's argument is at most 16383 bytes.
_BUFFER = 5 * 4096

Handler = Callable[[int, int, bytes], bytes]


class Connection(ABC):
    """The server's end: reads requests and answers them. ``fd`` is open until whoever made it closes it."""

    def __init__(self, device: Path, *, nonblocking: bool = False) -> None:
        """Open the device; OSError where that fails."""
        self.fd = os.open(device, os.O_RDWR | os.O_CLOEXEC | (os.O_NONBLOCK if nonblocking else 0))
        self._files: dict[int, OpenFile] = {}
        self._last_file = 0
        #: Opcode -> what answers, given the node, the thread and the request's body.
        self.handlers: dict[int, Handler] = {Op.OPEN: self._open, Op.RELEASE: self._release, Op.IOCTL: self._ioctl}

    @abstractmethod
    def opener(self, node: int) -> Opener:
        """What opens a node."""

    def answer_next(self) -> bool:
        """Answer the next request, if there is one; False when the kernel has ended the connection."""
        try:
            request = os.read(self.fd, _BUFFER)
        except (FileNotFoundError, BlockingIOError):  # the request was withdrawn before we had it
            return True
        except OSError as error:
            if error.errno == errno.ENODEV:
                return False
            raise
        length, opcode, unique, node, _uid, _gid, tid, _ = _HEADER.unpack_from(request)
        if opcode in _UNANSWERED:
            return True
        try:
            payload = self._answer(opcode, node, tid, request[_HEADER.size : length])
            failed = 0
        except OSError as error:
            payload, failed = b"", error.errno or errno.EIO
        self._reply(unique, failed, payload)
        return True

    def _reply(self, unique: int, failed: int, payload: bytes) -> None:
        try:
            os.write(self.fd, _REPLY.pack(_REPLY.size + len(payload), -failed, unique) + payload)
        except FileNotFoundError:  # nobody waits any more: the connection was aborted
            return

    def _answer(self, opcode: int, node: int, tid: int, body: bytes) -> bytes:
        # The rest (FLUSH, ACCESS, READ, ...) is ENOSYS: for some the kernel then knows not to ask again.
        handler = self.handlers.get(opcode)
        if handler is None:
            raise OSError(errno.ENOSYS, "not served")
        return handler(node, tid, body)

    def _open(self, node: int, tid: int, _body: bytes) -> bytes:
        self._visible(tid)
        opened = self.opener(node)(tid)
        self._last_file += 1
        self._files[self._last_file] = opened
        return OPEN_OUT.pack(self._last_file, _OPEN_FLAGS, 0)

    def _ioctl(self, _node: int, tid: int, body: bytes) -> bytes:
        self._visible(tid)
        fh, flags, cmd, argument, in_size, out_size = _IOCTL_IN.unpack_from(body)
        opened = self._files.get(fh)
        if opened is None:  # an ioctl on the directory
            raise OSError(errno.ENOTTY, "no ioctl here")
        size = cmd >> 16 & 0x3FFF
        if flags & _UNRESTRICTED and size and not in_size:
            # The kernel has copied nothing and asks what to copy: the whole argument, both ways.
            whole = _IOCTL_IOVEC.pack(argument, size)
            return _IOCTL_OUT.pack(0, _RETRY, 1, 1) + whole + whole
        data = body[_IOCTL_IN.size : _IOCTL_IN.size + in_size]
        answer = opened.ioctl(IoctlCall(tid, cmd, argument, data, out_size))
        return _IOCTL_OUT.pack(0, 0, 0, 0) + answer

    def _release(self, _node: int, _tid: int, body: bytes) -> bytes:
        (fh,) = _FILE_IN.unpack_from(body)
        self._files.pop(fh).release()
        return b""

    @staticmethod
    def _visible(tid: int) -> None:
        if tid == 0:
            raise OSError(errno.EFAULT, "the caller is not in the PID namespace of the stand-in, nor below it")


def require_version(body: bytes) -> int:
    """The minor version that kernel and server both speak, from an initial request; OSError where there is none."""
    major, minor = _INIT_IN.unpack_from(body)
    if major < MAJOR:
        raise OSError(errno.EPROTO, f"the kernel speaks FUSE {major}.{minor}, too old for {MAJOR}.{MINOR}")
    return min(minor, MINOR) if major == MAJOR else MINOR
