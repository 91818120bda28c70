"""What the stand-in asks the kernel about the task that calls it: its memory, its process, its PID namespace.

Thread ids are those of this process's own PID namespace and of the /proc that it sees.
"""

from __future__ import annotations

import ctypes
import errno
import fcntl
import os
from collections.abc import Callable
from functools import cache
from pathlib import Path

from mpu_notify.standin.model import MemoryFault, Process, Thread

_NS_GET_PARENT = 0xB702  # linux/nsfs.h


class _IoVec(ctypes.Structure):
    _fields_ = (("base", ctypes.c_void_p), ("length", ctypes.c_size_t))


@cache
def _libc_transfer(name: str) -> Callable[..., int]:
    function = ctypes.CDLL(None, use_errno=True)[name]
    vector = ctypes.POINTER(_IoVec)
    function.argtypes = (ctypes.c_int, vector, ctypes.c_ulong, vector, ctypes.c_ulong, ctypes.c_ulong)
    function.restype = ctypes.c_ssize_t
    return function


class Caller:
    """The thread ``tid`` while it waits for our answer, so that it can be neither gone nor somebody else."""

    def __init__(self, tid: int) -> None:
        """Asks nothing yet."""
        self._tid = tid

    def read(self, address: int, size: int) -> bytes:
        """``size`` bytes of its memory; MemoryFault where not all of them can be read by it."""
        buffer = ctypes.create_string_buffer(size)
        self._transfer("process_vm_readv", buffer, address, size)
        return buffer.raw

    def write(self, address: int, data: bytes) -> None:
        """Put ``data`` into its memory; MemoryFault where not all of it can be written by it."""
        self._transfer("process_vm_writev", ctypes.create_string_buffer(data, len(data)), address, len(data))

    def process(self) -> Process:
        """Its process, with its number in every PID namespace from its own up to ours."""
        return Process(*self._numbers("Tgid", "NStgid"))

    def thread(self) -> Thread:
        """The thread itself, with its numbers as of a process."""
        return Thread(*self._numbers("Pid", "NSpid"))

    def _numbers(self, own: str, by_namespace: str) -> tuple[int, tuple[tuple[int, int], ...]]:
        fields = dict(line.split(":", 1) for line in Path(f"/proc/{self._tid}/status").read_text().splitlines())
        numbers = [int(word) for word in fields[by_namespace].split()]
        return int(fields[own]), tuple(zip(self._namespaces(), reversed(numbers), strict=True))

    def namespace(self) -> int:
        """The inode number of its PID namespace."""
        return Path(f"/proc/{self._tid}/ns/pid").stat().st_ino

    def _namespaces(self) -> list[int]:
        """Inode numbers of its PID namespace and of those above it, up to ours."""
        ours = Path("/proc/self/ns/pid").stat().st_ino
        found = []
        fd = os.open(f"/proc/{self._tid}/ns/pid", os.O_RDONLY | os.O_CLOEXEC)
        try:
            while True:
                found.append(os.fstat(fd).st_ino)
                if found[-1] == ours:
                    return found
                parent = fcntl.ioctl(fd, _NS_GET_PARENT)
                os.close(fd)
                fd = parent
        finally:
            os.close(fd)

    def _transfer(self, function: str, buffer: ctypes.Array[ctypes.c_char], address: int, size: int) -> None:
        ours = _IoVec(ctypes.addressof(buffer), size)
        theirs = _IoVec(address, size)
        done = _libc_transfer(function)(self._tid, ctypes.byref(ours), 1, ctypes.byref(theirs), 1, 0)
        error = ctypes.get_errno()
        if done < 0 and error not in (errno.EFAULT, errno.EINVAL):  # EINVAL: the range wraps around
            raise OSError(error, f"{function} on thread {self._tid}: {os.strerror(error)}")
        if done != size:
            raise MemoryFault
