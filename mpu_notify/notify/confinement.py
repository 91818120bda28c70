"""The supervisor's own seccomp filter: an allow-list of the system calls that it makes once it has started.

What is not in the list fails with ENOSYS, as on a kernel that does not have it: C libraries know a way around that, so
a call that a later Python makes costs what it was for, and not all translation. A supervisor that starts no monitors
opens nothing to be written, executes nothing and touches no other process: its CAP_SYS_PTRACE is good for looking at
namespaces only. One that starts monitors allows what these need, too, for they inherit the filter: csrc/confine.h is
theirs, and takes back from them what only the start needs.
"""

from __future__ import annotations

import errno
import os
import platform
import socket
import struct
from typing import TYPE_CHECKING, Any, NamedTuple

from mpu_notify.notify import native
from mpu_notify.notify.filter import MACHINES, UnsupportedMachineError, import_libseccomp

if TYPE_CHECKING:
    from collections.abc import Iterable

_CLONE_THREAD = 0x00010000  # linux/sched.h
_NEW_NAMESPACES = 0x7E020080  # every CLONE_NEW*
_CLONE_NEWUSER = 0x10000000
_O_TMPFILE = os.O_TMPFILE & ~os.O_DIRECTORY
_O_MAKES = os.O_CREAT | os.O_TRUNC | _O_TMPFILE


class _Where(NamedTuple):
    """A system call that is allowed where an argument, under a mask, has a value."""

    name: str
    argument: int
    mask: int
    value: int


_ALLOW_ALL = struct.pack("=HBBI", 0x06, 0, 0, 0x7FFF0000)  # BPF_RET, SECCOMP_RET_ALLOW

_ANY = (1 << 32) - 1
_UNKNOWN = -1  # __NR_SCMP_ERROR, seccomp.h

#: Files and memory, sockets to the monitor and the service manager, waiting, and what Python and the C library do.
_ALWAYS: tuple[str, ...] = (
    *("read", "write", "writev", "pread64", "close", "lseek", "ftruncate", "memfd_create", "getdents64"),
    *("fstat", "newfstatat", "statx", "readlink", "readlinkat", "fcntl", "dup", "dup2", "dup3", "pipe2", "eventfd2"),
    *("mmap", "mprotect", "munmap", "mremap", "madvise", "brk"),
    *("connect", "socketpair", "sendto", "sendmsg", "recvfrom", "recvmsg", "shutdown"),
    *("getsockopt", "setsockopt", "getsockname", "getpeername"),
    *("epoll_create1", "epoll_ctl", "epoll_wait", "epoll_pwait", "poll", "ppoll", "select", "pselect6"),
    *("futex", "sched_yield", "sched_getaffinity", "restart_syscall", "nanosleep", "clock_nanosleep"),
    *("clock_gettime", "clock_getres", "gettimeofday", "getrandom", "uname", "sysinfo"),
    *("rt_sigaction", "rt_sigprocmask", "rt_sigreturn", "rt_sigtimedwait", "sigaltstack"),
    *("getpid", "getppid", "gettid", "getuid", "geteuid", "getgid", "getegid"),
    *("set_robust_list", "rseq", "exit", "exit_group"),
)
_ALWAYS_WHERE = (_Where("socket", 0, _ANY, socket.AF_UNIX), _Where("prlimit64", 0, _ANY, 0))

#: Only without monitors of our own. The ioctls: of namespaces (linux/nsfs.h), and those of Python's own files.
_ALONE_WHERE = (
    _Where("openat", 2, os.O_ACCMODE | _O_MAKES, os.O_RDONLY),
    _Where("clone", 0, _CLONE_THREAD, _CLONE_THREAD),
    _Where("ioctl", 1, 0xFF00, 0xB700),
    # TCGETS, FIONBIO, FIONCLEX, FIOCLEX
    *(_Where("ioctl", 1, _ANY, each) for each in (0x5401, 0x5421, 0x5450, 0x5451)),
)

#: To start a monitor, and what it does. Its program is executed, and its sockets are made, under this filter.
_WITH_MONITORS: tuple[str, ...] = (
    *("fork", "vfork", "execve", "wait4", "waitid", "kill", "tgkill", "pidfd_open", "pidfd_send_signal", "setsid"),
    *("access", "faccessat", "faccessat2", "arch_prctl", "set_tid_address", "close_range", "chdir"),
    *("ioctl", "process_vm_readv", "pwrite64", "pidfd_getfd", "kcmp", "signalfd4", "seccomp", "capget", "capset"),
    *("bind", "listen", "accept4", "umask", "unlink", "unlinkat", "prctl"),
)
_WITH_MONITORS_WHERE = (
    _Where("openat", 2, _O_MAKES, 0),
    _Where("clone", 0, _NEW_NAMESPACES, 0),
    _Where("setns", 1, _ANY, _CLONE_NEWUSER),
)


def build(machine: str, *, starts_monitors: bool) -> bytes:
    """The filter as struct sock_filter[] for a machine as `uname -m` names it.

    Raises UnsupportedMachineError for a machine that is not in filter.MACHINES, LibseccompError.
    """
    if machine not in MACHINES:
        raise UnsupportedMachineError(f"no filter for machine {machine!r}: mpu-notify knows {', '.join(MACHINES)}")
    seccomp = import_libseccomp()
    rules = seccomp.SyscallFilter(seccomp.ERRNO(errno.ENOSYS))
    rules.set_attr(seccomp.Attr.ACT_BADARCH, seccomp.ERRNO(errno.ENOSYS))
    rules.remove_arch(seccomp.Arch.NATIVE)
    rules.add_arch(getattr(seccomp.Arch, MACHINES[machine][0]))
    _allow(rules, seccomp, _ALWAYS, _ALWAYS_WHERE)
    if starts_monitors:
        _allow(rules, seccomp, _WITH_MONITORS, _WITH_MONITORS_WHERE)
    else:
        _allow(rules, seccomp, (), _ALONE_WHERE)
    with os.fdopen(os.memfd_create("mpu-notify confinement"), "w+b") as file:
        rules.export_bpf(file)
        file.seek(0)
        return file.read()


def _allow(rules: Any, seccomp: Any, names: Iterable[str], conditions: Iterable[_Where]) -> None:
    for name in names:
        if seccomp.resolve_syscall(seccomp.Arch.NATIVE, name) != _UNKNOWN:  # newer than this libseccomp
            rules.add_rule(seccomp.ALLOW, name)
    for at in conditions:
        # libseccomp compares 64 bits; the kernel looks at 32 of these arguments, which the mask leaves.
        rules.add_rule(seccomp.ALLOW, at.name, seccomp.Arg(at.argument, seccomp.MASKED_EQ, at.mask, at.value))


def build_native(*, starts_monitors: bool) -> bytes:
    """The filter for the machine that this runs on, for native.confine. Raises as `build` does.

    A monitor that was built with a sanitizer could not even start under it: there it allows everything.
    """
    if starts_monitors and native.IS_SANITIZED:
        return _ALLOW_ALL
    return build(platform.machine(), starts_monitors=starts_monitors)
