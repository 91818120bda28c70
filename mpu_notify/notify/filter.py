"""The seccomp filter: stops the ioctls that can carry an RM control, allows everything else.

The driver looks at an ioctl's number and size and at nothing else of its 32 bits (``nvidia_ioctl`` in nv.c of
NVIDIA/open-gpu-kernel-modules), so the filter compares just those: other type or direction bits, or anything above the
32 bits, slip past neither. A control can also come wrapped in NV_ESC_IOCTL_XFER_CMD.
"""

from __future__ import annotations

import errno
import os
import platform
from collections.abc import Mapping
from types import MappingProxyType
from typing import Any

from mpu_notify.errors import MpuNotifyError
from mpu_notify.notify import native

RM_IOCTL_MASK = 0x3FFF00FF
RM_CONTROL_WANT = 0x0020002A  # NV_ESC_RM_CONTROL, 32 bytes
RM_XFER_WANT = 0x001000D3  # NV_ESC_IOCTL_XFER_CMD, 16 bytes


#: The syscall ABIs of a machine, by its name in `uname -m`, as seccomp(3)'s SCMP_ARCH_*.
#: The filter for aarch64 was checked in a BPF interpreter; it has not been run.
MACHINES: Mapping[str, tuple[str, ...]] = MappingProxyType(
    {"x86_64": ("X86_64", "X86", "X32"), "aarch64": ("AARCH64", "ARM")}
)


class UnsupportedMachineError(MpuNotifyError):
    """There is no filter for this machine."""


class LibseccompError(MpuNotifyError):
    """The library that builds filters cannot be loaded."""


def import_libseccomp() -> Any:
    """The module pyseccomp. Raises LibseccompError.

    It loads libseccomp.so.2, which processes that only look at a GPU do not need, and starts helper processes for that.
    """
    try:
        import pyseccomp  # noqa: PLC0415
    except (ImportError, OSError, RuntimeError) as error:
        raise LibseccompError(f"cannot load libseccomp.so.2 (Debian's package libseccomp2): {error}") from error
    return pyseccomp


def build(machine: str) -> bytes:
    """The filter as struct sock_filter[] for a machine as `uname -m` names it.

    Raises UnsupportedMachineError for a machine that is not in MACHINES.
    """
    if machine not in MACHINES:
        raise UnsupportedMachineError(
            f"no seccomp filter for machine {machine!r}: mpu-notify knows {', '.join(MACHINES)}"
        )
    seccomp = import_libseccomp()
    rules = seccomp.SyscallFilter(seccomp.ALLOW)
    rules.set_attr(seccomp.Attr.ACT_BADARCH, seccomp.ALLOW)
    rules.remove_arch(seccomp.Arch.NATIVE)
    for abi in MACHINES[machine]:
        rules.add_arch(getattr(seccomp.Arch, abi))
    for wanted in (RM_CONTROL_WANT, RM_XFER_WANT):
        rules.add_rule(seccomp.NOTIFY, "ioctl", seccomp.Arg(1, seccomp.MASKED_EQ, RM_IOCTL_MASK, wanted))
    with os.fdopen(os.memfd_create("mpu-notify filter"), "w+b") as file:
        rules.export_bpf(file)
        file.seek(0)
        return file.read()


def build_native() -> bytes:
    """The filter for the machine that this runs on. Raises UnsupportedMachineError."""
    return build(platform.machine())


def install(program: bytes) -> int:
    """Put a filter on the calling thread and all that it becomes; returns the listener's fd.

    Takes WAIT_KILLABLE_RECV where the kernel has it (Linux 5.19) and sets no_new_privs only where the kernel demands
    it, that is without CAP_SYS_ADMIN in the caller's user namespace.
    """
    try:
        return _install_with_best_flags(program)
    except PermissionError:
        native.set_no_new_privileges()
        return _install_with_best_flags(program)


def _install_with_best_flags(program: bytes) -> int:
    try:
        return native.install_filter(program, native.SPEC_ALLOW | native.WAIT_KILLABLE_RECV)
    except OSError as error:
        if error.errno != errno.EINVAL:
            raise
        return native.install_filter(program, native.SPEC_ALLOW)
