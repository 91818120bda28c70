"""A flat directory of ioctl-only files over the raw ``/dev/fuse`` protocol: linux/fuse.h, version 7.31.

Files are regular ones, so an ioctl is *restricted*: the kernel copies the argument in and out by the size and
direction in the ioctl number. Requests are served one at a time.
"""

from __future__ import annotations

import ctypes
import errno
import os
import stat
import struct
from collections.abc import Callable, Mapping
from enum import IntEnum
from pathlib import Path
from typing import NamedTuple, Protocol


class IoctlCall(NamedTuple):
    """An ioctl on an open file.

    ``tid`` is the calling thread in the PID namespace that mounted; ``argument`` is the third of ioctl(); ``data``
    is what the kernel copied in, ``out_size`` the number of bytes that it will copy out.
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


#: Opens a file for a thread (its id in the PID namespace that mounted); raises OSError for an errno.
Opener = Callable[[int], OpenFile]


class _Op(IntEnum):
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


#: Nobody waits for an answer to these. An interrupted ioctl is answered before its INTERRUPT is read.
_UNANSWERED = frozenset({_Op.FORGET, _Op.BATCH_FORGET, _Op.INTERRUPT})

_HEADER = struct.Struct("<IIQQIIII")  # fuse_in_header: len opcode unique nodeid uid gid pid (total_extlen, padding)
_REPLY = struct.Struct("<IiQ")  # fuse_out_header: len error unique
_INIT_IN = struct.Struct("<II")  # major minor
_INIT_OUT = struct.Struct("<IIIIHHIIHHI28x")
_ATTR = struct.Struct("<QQQQQQIIIIIIIIII")  # fuse_attr
_ATTR_OUT = struct.Struct("<QII")  # attr_valid attr_valid_nsec dummy
_ENTRY_OUT = struct.Struct("<QQQQII")  # nodeid generation entry_valid attr_valid and their nsecs
_OPEN_OUT = struct.Struct("<QII")  # fh open_flags padding
_FILE_IN = struct.Struct("<Q")  # fh, first in fuse_release_in
_READ_IN = struct.Struct("<QQI")  # fh offset size
_DIRENT = struct.Struct("<QQII")  # ino off namelen type
_STATFS_OUT = struct.Struct("<QQQQQIIII24x")
_IOCTL_IN = struct.Struct("<QIIQII")  # fh flags cmd arg in_size out_size
_IOCTL_OUT = struct.Struct("<iIII")  # result flags in_iovs out_iovs

_MAJOR, _MINOR = 7, 31
_ROOT = 1
_OPEN_FLAGS = 1 << 0 | 1 << 5  # FOPEN_DIRECT_IO, FOPEN_NOFLUSH
_CACHE_SECONDS = 3600  # names and attributes never change
_MAX_WRITE = 4096
#: Requests without a waiting caller (RELEASE) that the kernel sends at once, so that they keep their order.
_MAX_BACKGROUND = 0xFFFF
#: An ioctl's argument is at most 16383 bytes.
_BUFFER = 5 * 4096
_NAME_MAX = 255
_BLOCK = 4096

_MS_NOSUID_NODEV = 2 | 4  # sys/mount.h
_MNT_DETACH = 2


class FuseServer:
    """One mounted directory of files, served by the thread that calls ``serve``."""

    def __init__(self, mountpoint: Path, nodes: Mapping[str, Opener]) -> None:
        """Mount ``nodes`` (name -> opener, mode 0666) on an existing directory; OSError where that fails."""
        self._mountpoint = mountpoint
        self._names = list(nodes)
        self._openers = list(nodes.values())
        self._files: dict[int, OpenFile] = {}
        self._last_file = 0
        self._libc = ctypes.CDLL(None, use_errno=True)
        self._fd = os.open("/dev/fuse", os.O_RDWR | os.O_CLOEXEC)
        options = f"fd={self._fd},rootmode=40000,user_id=0,group_id=0,allow_other,default_permissions"
        target = os.fsencode(mountpoint)
        if self._libc.mount(b"mpu-notify-standin", target, b"fuse", _MS_NOSUID_NODEV, options.encode()) < 0:
            error = ctypes.get_errno()
            os.close(self._fd)
            raise OSError(error, f"cannot mount a FUSE file system: {os.strerror(error)}", str(mountpoint))
        self._handlers: dict[int, Callable[[int, int, bytes], bytes]] = {
            _Op.LOOKUP: self._lookup,
            _Op.GETATTR: self._getattr,
            _Op.OPEN: self._open,
            _Op.STATFS: self._statfs,
            _Op.RELEASE: self._release,
            _Op.INIT: self._init,
            _Op.OPENDIR: self._opendir,
            _Op.READDIR: self._readdir,
            _Op.IOCTL: self._ioctl,
        }

    def close(self) -> None:
        """Unmount, even in use, and end the connection: calls on files still open fail with ENOTCONN."""
        failed = self._libc.umount2(os.fsencode(self._mountpoint), _MNT_DETACH) < 0
        error = ctypes.get_errno()
        os.close(self._fd)
        if failed and error != errno.EINVAL:  # EINVAL: somebody has unmounted it before us
            raise OSError(error, f"cannot unmount: {os.strerror(error)}", str(self._mountpoint))

    def serve(self) -> None:
        """Answer requests until the directory is unmounted."""
        while True:
            try:
                request = os.read(self._fd, _BUFFER)
            except FileNotFoundError:  # the request was withdrawn before we had it
                continue
            except OSError as error:
                if error.errno == errno.ENODEV:
                    return
                raise
            length, opcode, unique, node, _uid, _gid, tid, _ = _HEADER.unpack_from(request)
            if opcode in _UNANSWERED:
                continue
            try:
                payload = self._answer(opcode, node, tid, request[_HEADER.size : length])
                failed = 0
            except OSError as error:
                payload, failed = b"", error.errno or errno.EIO
            self._reply(unique, failed, payload)

    def _reply(self, unique: int, failed: int, payload: bytes) -> None:
        try:
            os.write(self._fd, _REPLY.pack(_REPLY.size + len(payload), -failed, unique) + payload)
        except FileNotFoundError:  # nobody waits any more: the connection was aborted
            return

    def _answer(self, opcode: int, node: int, tid: int, body: bytes) -> bytes:
        # The rest (FLUSH, ACCESS, READ, ...) is ENOSYS: for some the kernel then knows not to ask again.
        handler = self._handlers.get(opcode)
        if handler is None:
            raise OSError(errno.ENOSYS, "not served")
        return handler(node, tid, body)

    def _init(self, _node: int, _tid: int, body: bytes) -> bytes:
        major, minor = _INIT_IN.unpack_from(body)
        if major < _MAJOR:
            raise OSError(errno.EPROTO, f"the kernel speaks FUSE {major}.{minor}, too old for {_MAJOR}.{_MINOR}")
        minor = min(minor, _MINOR) if major == _MAJOR else _MINOR
        return _INIT_OUT.pack(_MAJOR, minor, 0, 0, _MAX_BACKGROUND, _MAX_BACKGROUND, _MAX_WRITE, 1, 0, 0, 0)

    def _attributes(self, node: int) -> bytes:
        if node == _ROOT:
            mode, links = stat.S_IFDIR | 0o755, 2
        elif _ROOT < node <= _ROOT + len(self._names):
            mode, links = stat.S_IFREG | 0o666, 1
        else:
            raise OSError(errno.ENOENT, "no such node")
        return _ATTR.pack(node, 0, 0, 0, 0, 0, 0, 0, 0, mode, links, 0, 0, 0, _BLOCK, 0)

    def _lookup(self, _node: int, _tid: int, body: bytes) -> bytes:
        name = os.fsdecode(body.rstrip(b"\0"))
        if name not in self._names:
            raise OSError(errno.ENOENT, "no such name")
        node = _ROOT + 1 + self._names.index(name)
        return _ENTRY_OUT.pack(node, 0, _CACHE_SECONDS, _CACHE_SECONDS, 0, 0) + self._attributes(node)

    def _getattr(self, node: int, _tid: int, _body: bytes) -> bytes:
        return _ATTR_OUT.pack(_CACHE_SECONDS, 0, 0) + self._attributes(node)

    def _open(self, node: int, tid: int, _body: bytes) -> bytes:
        self._visible(tid)
        opened = self._openers[node - _ROOT - 1](tid)
        self._last_file += 1
        self._files[self._last_file] = opened
        return _OPEN_OUT.pack(self._last_file, _OPEN_FLAGS, 0)

    def _opendir(self, _node: int, _tid: int, _body: bytes) -> bytes:
        return _OPEN_OUT.pack(0, 0, 0)

    def _readdir(self, _node: int, _tid: int, body: bytes) -> bytes:
        _, offset, size = _READ_IN.unpack_from(body)
        listing = b""
        for number, name in enumerate(self._names[offset:], start=offset + 1):
            raw = os.fsencode(name)
            entry = _DIRENT.pack(_ROOT + number, number, len(raw), stat.S_IFREG >> 12) + raw
            entry = entry.ljust(-(-len(entry) // 8) * 8, b"\0")
            if len(listing) + len(entry) > size:
                break
            listing += entry
        return listing

    def _statfs(self, _node: int, _tid: int, _body: bytes) -> bytes:
        return _STATFS_OUT.pack(0, 0, 0, len(self._names), 0, _BLOCK, _NAME_MAX, _BLOCK, 0)

    def _ioctl(self, _node: int, tid: int, body: bytes) -> bytes:
        self._visible(tid)
        fh, _flags, cmd, argument, in_size, out_size = _IOCTL_IN.unpack_from(body)
        opened = self._files.get(fh)
        if opened is None:  # an ioctl on the directory
            raise OSError(errno.ENOTTY, "no ioctl here")
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
            raise OSError(errno.EFAULT, "the caller is not in the PID namespace that mounted, nor below it")
