"""Which calls the seccomp filter stops, by running its program in an interpreter, for every syscall ABI."""

from __future__ import annotations

import platform

import pytest
from hypothesis import given
from hypothesis import strategies as st

from mpu_notify.notify.filter import MACHINES, UnsupportedMachineError, build, build_native

from . import bpf

ALLOW = 0x7FFF0000  # SECCOMP_RET_ALLOW
NOTIFY = 0x7FC00000  # SECCOMP_RET_USER_NOTIF

# AUDIT_ARCH_* (linux/audit.h) and the number of ioctl there (asm/unistd.h)
X86_64 = (0xC000003E, 16)
X32 = (0xC000003E, 0x40000000 + 514)
I386 = (0x40000003, 54)
AARCH64 = (0xC00000B7, 29)
ARM = (0x40000028, 54)

ABIS = [
    pytest.param("x86_64", X86_64, id="x86-64"),
    pytest.param("x86_64", X32, id="x32"),
    pytest.param("x86_64", I386, id="i386"),
    pytest.param("aarch64", AARCH64, id="aarch64"),
    pytest.param("aarch64", ARM, id="arm"),
]

RM_CONTROL = 0xC020462A
XFER = 0xC01046D3


def verdict(machine: str, arch: int, number: int, *args: int) -> int:
    return bpf.run(build(machine), number, arch, [*args, *[0] * (6 - len(args))])


@pytest.mark.parametrize(("machine", "abi"), ABIS)
@pytest.mark.parametrize("cmd", [RM_CONTROL, XFER])
def test_an_rm_control_is_stopped_on_every_abi(machine: str, abi: tuple[int, int], cmd: int) -> None:
    assert verdict(machine, *abi, 3, cmd, 0x7FFF0000) == NOTIFY


@pytest.mark.parametrize(("machine", "abi"), ABIS)
@given(fd=st.integers(0, 2**64 - 1), cmd=st.integers(0, 2**64 - 1), pointer=st.integers(0, 2**64 - 1))
def test_an_ioctl_is_stopped_exactly_where_the_driver_would_see_a_control(
    machine: str, abi: tuple[int, int], fd: int, cmd: int, pointer: int
) -> None:
    number_and_size = (cmd & 0xFF, cmd >> 16 & 0x3FFF)
    expected = NOTIFY if number_and_size in ((0x2A, 32), (0xD3, 16)) else ALLOW
    assert verdict(machine, *abi, fd, cmd, pointer) == expected


@pytest.mark.parametrize(("machine", "abi"), ABIS)
@given(
    base=st.sampled_from([RM_CONTROL, XFER]),
    ignored=st.integers(0, 2**32 - 1).map(lambda high: high << 32),
    direction_and_type=st.integers(0, 2**10 - 1),
)
def test_bits_that_the_driver_ignores_are_ignored(
    machine: str, abi: tuple[int, int], base: int, ignored: int, direction_and_type: int
) -> None:
    kept = base & 0x3FFF00FF
    cmd = ignored | kept | (direction_and_type >> 8) << 30 | (direction_and_type & 0xFF) << 8
    assert verdict(machine, *abi, 3, cmd) == NOTIFY


@pytest.mark.parametrize("machine", MACHINES)
@given(arch=st.integers(0, 2**32 - 1), number=st.integers(-(2**31), 2**31 - 1))
def test_every_other_call_of_any_architecture_is_allowed(machine: str, arch: int, number: int) -> None:
    if (arch, number) not in (X86_64, X32, I386, AARCH64, ARM):
        assert verdict(machine, arch, number, 3, RM_CONTROL) == ALLOW


def test_an_unknown_machine_is_refused_by_name() -> None:
    with pytest.raises(UnsupportedMachineError, match=r"riscv64.*x86_64, aarch64"):
        build("riscv64")


def test_the_native_filter_is_the_running_machines() -> None:
    assert build_native() == build(platform.machine())
