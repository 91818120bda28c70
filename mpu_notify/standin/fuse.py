"""A flat directory of ioctl-only files over the raw ``/dev/fuse`` protocol: linux/fuse.h, version 7.31.

Files are regular ones, so an ioctl is *restricted*: the kernel copies the argument in and out by the size and
direction in the ioctl number.
"""

from __future__ import annotations

import ctypes
import errno
import os
import stat
import struct
from collections.abc import Mapping
from pathlib import Path

from mpu_notify.standin.connection import MAJOR, MAX_WRITE, OPEN_OUT, Connection, Op, Opener, require_version

_INIT_OUT = struct.Struct("<IIIIHHIIHHI28x")
_ATTR = struct.Struct("<QQQQQQIIIIIIIIII")  # fuse_attr
_ATTR_OUT = struct.Struct("<QII")  # attr_valid attr_valid_nsec dummy
_ENTRY_OUT = struct.Struct("<QQQQII")  # nodeid generation entry_valid attr_valid and their nsecs
_READ_IN = struct.Struct("<QQI")  # fh offset size
_DIRENT = struct.Struct("<QQII")  # ino off namelen type
_STATFS_OUT = struct.Struct("<QQQQQIIII24x")

_ROOT = 1
_CACHE_SECONDS = 3600  # names and attributes never change
#: Requests without a waiting caller (RELEASE) that the kernel sends at once, so that they keep their order.
_MAX_BACKGROUND = 0xFFFF
_NAME_MAX = 255
_BLOCK = 4096

_MS_NOSUID_NODEV = 2 | 4  # sys/mount.h
_MNT_DETACH = 2


class FuseServer(Connection):
    """One mounted directory of files, served by the thread that calls ``serve``."""

    def __init__(self, mountpoint: Path, nodes: Mapping[str, Opener]) -> None:
        """Mount ``nodes`` (name -> opener, mode 0666) on an existing directory; OSError where that fails."""
        super().__init__(Path("/dev/fuse"))
        self._mountpoint = mountpoint
        self._names = list(nodes)
        self._openers = list(nodes.values())
        self._libc = ctypes.CDLL(None, use_errno=True)
        options = f"fd={self.fd},rootmode=40000,user_id=0,group_id=0,allow_other,default_permissions"
        target = os.fsencode(mountpoint)
        if self._libc.mount(b"mpu-notify-standin", target, b"fuse", _MS_NOSUID_NODEV, options.encode()) < 0:
            error = ctypes.get_errno()
            os.close(self.fd)
            raise OSError(error, f"cannot mount a FUSE file system: {os.strerror(error)}", str(mountpoint))
        self.handlers.update(
            {
                Op.LOOKUP: self._lookup,
                Op.GETATTR: self._getattr,
                Op.STATFS: self._statfs,
                Op.INIT: self._init,
                Op.OPENDIR: self._opendir,
                Op.READDIR: self._readdir,
            }
        )

    def close(self) -> None:
        """Unmount, even in use, and end the connection: calls on files still open fail with ENOTCONN."""
        failed = self._libc.umount2(os.fsencode(self._mountpoint), _MNT_DETACH) < 0
        error = ctypes.get_errno()
        os.close(self.fd)
        if failed and error != errno.EINVAL:  # EINVAL: somebody has unmounted it before us
            raise OSError(error, f"cannot unmount: {os.strerror(error)}", str(self._mountpoint))

    def serve(self) -> None:
        """Answer requests until the directory is unmounted."""
        while self.answer_next():
            pass

    def opener(self, node: int) -> Opener:
        """That of the file with this node id."""
        return self._openers[node - _ROOT - 1]

    def _init(self, _node: int, _tid: int, body: bytes) -> bytes:
        minor = require_version(body)
        return _INIT_OUT.pack(MAJOR, minor, 0, 0, _MAX_BACKGROUND, _MAX_BACKGROUND, MAX_WRITE, 1, 0, 0, 0)

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

    def _opendir(self, _node: int, _tid: int, _body: bytes) -> bytes:
        return OPEN_OUT.pack(0, 0, 0)

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
