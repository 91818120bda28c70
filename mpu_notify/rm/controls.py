"""The control table: every RM control that carries process ids, and where in its params they are.

Sizes and offsets are those of the headers ``ctrl2080gpu.h`` in NVIDIA/open-gpu-kernel-modules; the two older layouts of
GPU_GET_PID_INFO are those of the R460 and R440 drivers. A pair (cmd, params size) has one layout only, in every
version.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from enum import Enum
from types import MappingProxyType

from mpu_notify.rm.abi import U32

_ASKED_BYTES = 8  # of an entry that is asked about: pid and index, which the caller gave


class Direction(Enum):
    """Who fills in the process ids of a control."""

    ANSWERED = "the driver answers with process ids"
    ASKED = "the caller asks about process ids"


@dataclass(frozen=True)
class PidTable:
    """A counted table of entries in the params; every offset and size is in bytes.

    The entry's process id is the u32 at its start.
    """

    count: int
    entries: int
    stride: int
    capacity: int

    def pids(self, params: bytes | bytearray) -> list[int] | None:
        """The process ids of the counted entries; None where the count is over the capacity."""
        (count,) = U32.unpack_from(params, self.count)
        if count > self.capacity:
            return None
        return [U32.unpack_from(params, self.entries + self.stride * index)[0] for index in range(count)]

    def put(self, params: bytearray, index: int, pid: int) -> None:
        """Write one entry's process id; the count and the rest of the entry stay."""
        U32.pack_into(params, self.entries + self.stride * index, pid)

    def blank(self, params: bytearray, index: int) -> None:
        """Make an entry what the driver answers for a process that it does not know: result 0 and zeroed data."""
        start = self.entries + self.stride * index
        params[start + _ASKED_BYTES : start + self.stride] = bytes(self.stride - _ASKED_BYTES)

    def replace(self, params: bytearray, pids: Sequence[int]) -> None:
        """Make the table exactly this list: ids, count, and zeros up to the table's end."""
        end = self.entries + self.stride * self.capacity
        params[self.entries : end] = bytes(end - self.entries)
        for index, pid in enumerate(pids):
            self.put(params, index, pid)
        U32.pack_into(params, self.count, len(pids))


@dataclass(frozen=True)
class Control:
    """One row of the control table: a control of one params size, in bytes."""

    name: str
    cmd: int
    size: int
    direction: Direction
    table: PidTable


GPU_GET_PIDS = 0x2080018D
GPU_GET_PID_INFO = 0x2080018E

#: GPU_GET_PIDS: idType u32 @0, id u32 @4, count u32 @8, u32[950] @12.
GPU_PIDS = Control("GPU_GET_PIDS", GPU_GET_PIDS, 3812, Direction.ANSWERED, PidTable(8, 12, 4, 950))


def _pid_info(size: int, stride: int) -> Control:
    return Control("GPU_GET_PID_INFO", GPU_GET_PID_INFO, size, Direction.ASKED, PidTable(0, 8, stride, 200))


#: GPU_GET_PID_INFO: count u32 @0, then 200 entries of pid u32 @0, index u32 @4, result u32 @8, data @16.
GPU_PID_INFO = _pid_info(14408, 72)  # 515 and later
GPU_PID_INFO_R460 = _pid_info(9608, 48)
GPU_PID_INFO_R440 = _pid_info(8008, 40)

CONTROLS = (GPU_PIDS, GPU_PID_INFO, GPU_PID_INFO_R460, GPU_PID_INFO_R440)

CONTROL_TABLE: Mapping[tuple[int, int], Control] = MappingProxyType({(c.cmd, c.size): c for c in CONTROLS})
