"""The few kernel calls that Python's library lacks, over cffi. All raise OSError naming what was tried."""

from __future__ import annotations

import os

from mpu_notify.notify._native import ffi, lib

CLONE_NEWNS: int = lib.CLONE_NEWNS
CLONE_NEWPID: int = lib.CLONE_NEWPID
CLONE_NEWUSER: int = lib.CLONE_NEWUSER
MS_REC: int = lib.MS_REC
MS_PRIVATE: int = lib.MS_PRIVATE
MS_NOSUID: int = lib.MS_NOSUID
MS_NODEV: int = lib.MS_NODEV
MS_NOEXEC: int = lib.MS_NOEXEC
SPEC_ALLOW: int = lib.SECCOMP_FILTER_FLAG_SPEC_ALLOW
WAIT_KILLABLE_RECV: int = lib.SECCOMP_FILTER_FLAG_WAIT_KILLABLE_RECV

#: Whether the C programs were built with a sanitizer, whose runtime makes calls of its own.
IS_SANITIZED = bool(lib.MPU_IS_SANITIZED)

INSTRUCTION_BYTES = 8  # struct sock_filter, linux/filter.h


def _checked(result: int, what: str) -> int:
    if result < 0:
        raise OSError(-result, f"{what}: {os.strerror(-result)}")
    return result


def install_filter(program: bytes, flags: int) -> int:
    """Put a seccomp filter on the calling thread and what it becomes; returns its listener's fd."""
    count = len(program) // INSTRUCTION_BYTES
    return _checked(lib.mpu_install_filter(program, count, flags), "install the seccomp filter")


def filter_flags_known(flags: int) -> bool:
    """Whether the running kernel takes these flags of a seccomp filter with a listener."""
    return bool(lib.mpu_filter_flags_known(flags))


def set_no_new_privileges() -> None:
    """Give up, for good, gaining privileges by exec (prctl(2), PR_SET_NO_NEW_PRIVS)."""
    _checked(lib.mpu_no_new_privileges(), "set no_new_privs")


def unshare(flags: int) -> None:
    """unshare(2): CLONE_NEWPID takes effect for the next child."""
    _checked(lib.mpu_unshare(flags), f"unshare namespaces ({flags:#x})")


def mount(source: str, target: str, fstype: str | None, flags: int) -> None:
    """mount(2), without data."""
    kind = ffi.NULL if fstype is None else fstype.encode()
    _checked(lib.mpu_mount(source.encode(), target.encode(), kind, flags), f"mount {source} on {target}")


def die_with_parent() -> None:
    """Have the kernel kill this process when its parent dies."""
    _checked(lib.mpu_die_with_parent(), "set the parent death signal")


def is_dead(pid: int) -> bool:
    """Whether a process was killed or has ended, though it may not be gone: csrc/claim.h."""
    return bool(lib.mpu_is_dead(pid))


def has_monitor(control: int) -> bool:
    """Whether a living monitor serves the sockets of which this is the one that supervisors connect to."""
    return bool(lib.mpu_has_monitor(control))


def keep_needed_capabilities(*, starts_monitors: bool = True) -> None:
    """Drop every capability but those that the supervisor needs, and those that monitors which it starts need.

    The latter are not in effect here. Exec gains none back.
    """
    _checked(lib.mpu_keep_needed_capabilities(starts_monitors), "drop capabilities")


def confine(program: bytes) -> None:
    """Put a seccomp filter without a listener on this process, all its threads and what it becomes."""
    count = len(program) // INSTRUCTION_BYTES
    _checked(lib.mpu_confine(program, count), "install the supervisor's own seccomp filter")
