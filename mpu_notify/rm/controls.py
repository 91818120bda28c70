"""The control table: every RM control that carries process ids, and where in its params they are.

Sizes and offsets are those of the headers ``ctrl2080gpu.h``, ``ctrl2080perf.h``, ``ctrl0000gpuacct.h`` and
``ctrl90cchwpm.h`` in NVIDIA/open-gpu-kernel-modules; the two older layouts of GPU_GET_PID_INFO are those of the R460
and R440 drivers. A pair (cmd, params size) has one layout only, in every version.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from enum import Enum
from types import MappingProxyType

from mpu_notify.rm.abi import U32, U64, pack_words, unpack_words

_ASKED_BYTES = 8  # of an entry that is asked about: pid and index, which the caller gave
_RESULT_BYTES = 16  # of the same: pid, index and result, and 4 bytes of padding


class Direction(Enum):
    """Who fills in the process ids of a control."""

    ANSWERED = "the driver answers with process ids"
    ASKED = "the caller asks about process ids"


@dataclass(frozen=True)
class PidTable:
    """A table of entries in the params that have a process id (u32) each; every offset and size is in bytes.

    An entry whose process is not visible in the caller's namespace is dropped and the table closed up, or, where the
    entries are no list (``count`` is None), it is emptied and its process id becomes ``invalid``.
    """

    count: int | None  # where the u32 count of the entries is; None: all of them are always there
    entries: int
    stride: int
    capacity: int
    pid: int = 0  # where in an entry its process id is
    size: int = 0  # of an entry, where that is less than the stride; 0: the stride
    unique: bool = False  # the only table; an entry is a process id and nothing else, so a second one says nothing
    invalid: int = 0  # what the field says where there is no process
    kernel_address: int | None = None  # where in an entry is a u64 that is not for a caller's eyes
    counters: int = 0  # of an entry that is asked about: how many u64 there are behind its result
    subscription: int | None = None  # of the same: where its two u32 of a MIG instance are

    def pids(self, params: bytes | bytearray) -> list[int] | None:
        """The process ids of the entries that are there; None where the count is over the capacity."""
        count = self.capacity if self.count is None else U32.unpack_from(params, self.count)[0]
        if count > self.capacity:
            return None
        if self.stride == U32.size:
            return unpack_words(params[self.entries : self.entries + self.stride * count])
        first = self.entries + self.pid
        return [U32.unpack_from(params, first + self.stride * index)[0] for index in range(count)]

    @property
    def nobody(self) -> frozenset[int]:
        """What an entry may say in the place of a process id."""
        return frozenset({0, self.invalid}) if self.count is None else frozenset()

    def put(self, params: bytearray, index: int, pid: int) -> None:
        """Write one entry's process id; the count and the rest of the entry stay."""
        U32.pack_into(params, self.entries + self.stride * index + self.pid, pid)

    def blank(self, params: bytearray, index: int) -> None:
        """Make an entry that is asked about what the driver answers for a process that it does not know.

        Result 0 and zeroed data.
        """
        start = self.entries + self.stride * index
        params[start + _ASKED_BYTES : start + self.stride] = bytes(self.stride - _ASKED_BYTES)

    def empty(self, params: bytearray, index: int) -> None:
        """Make an entry one without a process: zeros, and ``invalid``."""
        start, size = self.entries + self.stride * index, self.size or self.stride
        params[start : start + size] = bytes(size)
        self.put(params, index, self.invalid)

    def hide_kernel_addresses(self, params: bytearray) -> None:
        """Zero them, in all of the table, filled in or not."""
        if self.kernel_address is not None:
            for index in range(self.capacity):
                U64.pack_into(params, self.entries + self.stride * index + self.kernel_address, 0)

    def add(self, params: bytearray, index: int, other: bytes | bytearray, other_index: int) -> None:
        """Add to an entry's counters those of an entry of other params, where the driver filled in both.

        A MIG instance that only the other names is taken over.
        """
        to, of = (self.entries + self.stride * number for number in (index, other_index))
        results = U32.unpack_from(params, to + _ASKED_BYTES)[0], U32.unpack_from(other, of + _ASKED_BYTES)[0]
        if any(results):
            return
        for number in range(self.counters):
            at = _RESULT_BYTES + U64.size * number
            total = U64.unpack_from(params, to + at)[0] + U64.unpack_from(other, of + at)[0]
            U64.pack_into(params, to + at, total & 0xFFFFFFFFFFFFFFFF)
        if self.subscription is not None:
            mine, theirs = (slice(start + self.subscription, start + self.subscription + 8) for start in (to, of))
            if params[mine] == b"\xff" * 8:
                params[mine] = other[theirs]

    def close_up(self, params: bytearray, kept: Mapping[int, int]) -> None:
        """Keep just these entries, by index, each with this process id, in order; zeros up to the table's end."""
        end = self.entries + self.stride * self.capacity
        starts = (self.entries + self.stride * index for index in kept)
        rows = b"".join(params[start : start + self.stride] for start in starts)
        params[self.entries : end] = rows.ljust(end - self.entries, b"\0")
        for index, pid in enumerate(kept.values()):
            self.put(params, index, pid)
        if self.count is not None:
            U32.pack_into(params, self.count, len(kept))

    def replace(self, params: bytearray, pids: Sequence[int]) -> None:
        """Make the table exactly this list: ids, count, and zeros up to the table's end."""
        end = self.entries + self.stride * self.capacity
        if self.stride == U32.size:
            params[self.entries : end] = pack_words(pids).ljust(end - self.entries, b"\0")
        else:
            params[self.entries : end] = bytes(end - self.entries)
            for index, pid in enumerate(pids):
                self.put(params, index, pid)
        if self.count is not None:
            U32.pack_into(params, self.count, len(pids))


@dataclass(frozen=True)
class Pointer:
    """A table that is not in the params but behind a pointer (u64) in them.

    What translates sees it behind the params, as if it were a part of them. The caller must have room for exactly
    ``capacity`` entries, and says so where the count will be; with a null pointer it asks for the count alone.
    """

    at: int
    stride: int
    capacity: int

    @property
    def size(self) -> int:
        """Of the table, in bytes."""
        return self.stride * self.capacity


@dataclass(frozen=True)
class Control:
    """One row of the control table: a control of one params size, in bytes."""

    name: str
    cmd: int
    size: int
    direction: Direction
    tables: tuple[PidTable, ...]
    pointer: Pointer | None = None

    @property
    def table(self) -> PidTable:
        """Its table; the first, where it has one for each engine."""
        return self.tables[0]

    @property
    def whole_size(self) -> int:
        """Of the params and of what is behind their pointer."""
        return self.size + (self.pointer.size if self.pointer else 0)


# -------------------------------------------------------------------------------- the processes of a GPU

GPU_GET_PIDS = 0x2080018D
GPU_GET_PID_INFO = 0x2080018E

#: GPU_GET_PIDS: idType u32 @0, id u32 @4, count u32 @8, u32[950] @12.
GPU_PIDS = Control(
    "GPU_GET_PIDS", GPU_GET_PIDS, 3812, Direction.ANSWERED, (PidTable(8, 12, 4, 950, unique=True),)
)  # fmt: skip


def _pid_info(size: int, stride: int, counters: int, subscription: int | None) -> Control:
    table = PidTable(0, 8, stride, 200, counters=counters, subscription=subscription)
    return Control("GPU_GET_PID_INFO", GPU_GET_PID_INFO, size, Direction.ASKED, (table,))


#: GPU_GET_PID_INFO: count u32 @0, then 200 entries of pid u32 @0, index u32 @4, result u32 @8, data (u64s of memory
#: use) @16, and from R460 on the MIG instance at the end.
GPU_PID_INFO = _pid_info(14408, 72, 6, 64)  # 515 and later
GPU_PID_INFO_R460 = _pid_info(9608, 48, 3, 40)
GPU_PID_INFO_R440 = _pid_info(8008, 40, 3, None)

# -------------------------------------------------------------------------------- utilisation samples

PERF_GET_GPUMON_PERFMON_UTIL_SAMPLES_V2 = 0x20802096
NO_PROCESS = 0xFFFFFFFF  # procId of an engine that nobody used
_FIRST_SAMPLE = 16  # behind type u8 @0, bufSize u32 @4, count u32 @8, tracker u32 @12
_FIRST_ENGINE = 8  # of a sample, behind timeStamp u64
_ENGINE_PID = 8  # of an engine, behind util u32 and vgpuScale u32; then subProcessID u32, subProcessName char[100]
_ENGINE_POINTER = 120  # pOsPidInfo u64, from 570.86.15 on: a struct pid of the kernel's


def _samples(size: int, samples: int, engines: int, engine_size: int) -> Control:
    pointer = _ENGINE_POINTER if engine_size > _ENGINE_POINTER else None
    tables = [
        PidTable(
            None,
            _FIRST_SAMPLE + _FIRST_ENGINE + engine_size * number,
            _FIRST_ENGINE + engine_size * engines,
            samples,
            pid=_ENGINE_PID,
            size=engine_size,
            invalid=NO_PROCESS,
            kernel_address=pointer,
        )
        for number in range(engines)  # fb, gr, nvenc, nvdec, and later nvjpg, nvofa
    ]
    name = "PERF_GET_GPUMON_PERFMON_UTIL_SAMPLES_V2"
    return Control(name, PERF_GET_GPUMON_PERFMON_UTIL_SAMPLES_V2, size, Direction.ANSWERED, tuple(tables))


UTIL_SAMPLES_515 = _samples(47216, 100, 4, 116)  # 515.43.04 to 515.76, 520
UTIL_SAMPLES_525 = _samples(34000, 72, 4, 116)  # 515.86.01 and later 515, 525 to 545
UTIL_SAMPLES_550 = _samples(50704, 72, 6, 116)  # 550 to 565
UTIL_SAMPLES_570 = _samples(55888, 72, 6, 128)  # 570 and later

# -------------------------------------------------------------------------------- accounting

GPUACCT_GET_PROC_ACCOUNTING_INFO = 0xB03
GPUACCT_GET_ACCOUNTING_PIDS = 0xB04

#: GPUACCT_GET_ACCOUNTING_PIDS: gpuId u32 @0, pid u32 @4 (of a virtual machine; 0), u32[4000] @8, count u32 @16008.
ACCOUNTING_PIDS = Control(
    "GPUACCT_GET_ACCOUNTING_PIDS", GPUACCT_GET_ACCOUNTING_PIDS, 16012, Direction.ANSWERED,
    (PidTable(16008, 8, 4, 4000, unique=True),),
)  # fmt: skip
#: GPUACCT_GET_PROC_ACCOUNTING_INFO: gpuId u32 @0, pid u32 @4, subPid u32 @8, then the record.
ACCOUNTING_INFO = Control(
    "GPUACCT_GET_PROC_ACCOUNTING_INFO", GPUACCT_GET_PROC_ACCOUNTING_INFO, 48, Direction.ASKED,
    (PidTable(None, 4, 44, 1),),
)  # fmt: skip

# -------------------------------------------------------------------------------- sessions and reservations

GPU_GET_NVENC_SW_SESSION_INFO = 0x2080016E
GPU_GET_NVENC_SW_SESSION_INFO_V2 = 0x208001AF
GPU_GET_NVENC_SW_SESSION_INFO_V2_525 = 0x208001A9  # its number in 525 only; reset, without params, from 565.57.01 on
GPU_GET_NVFBC_SW_SESSION_INFO = 0x2080017C
HWPM_GET_RESERVATION_INFO = 0x90CC0103

#: GPU_GET_NVENC_SW_SESSION_INFO: count u32 @0, pointer @8 to 512 entries of processId u32 @0 and what it encodes.
NVENC_SESSIONS = Control(
    "GPU_GET_NVENC_SW_SESSION_INFO", GPU_GET_NVENC_SW_SESSION_INFO, 16, Direction.ANSWERED,
    (PidTable(0, 16, 32, 512),), Pointer(8, 32, 512),
)  # fmt: skip


def _nvenc_sessions_v2(cmd: int) -> Control:
    name = "GPU_GET_NVENC_SW_SESSION_INFO_V2"
    return Control(name, cmd, 16388, Direction.ANSWERED, (PidTable(0, 4, 32, 512),))


#: GPU_GET_NVENC_SW_SESSION_INFO_V2: count u32 @0, the same entries @4.
NVENC_SESSIONS_V2 = _nvenc_sessions_v2(GPU_GET_NVENC_SW_SESSION_INFO_V2)
NVENC_SESSIONS_V2_525 = _nvenc_sessions_v2(GPU_GET_NVENC_SW_SESSION_INFO_V2_525)
#: GPU_GET_NVFBC_SW_SESSION_INFO: count u32 @0, 256 entries of processId u32 @0 and what it captures.
NVFBC_SESSIONS = Control(
    "GPU_GET_NVFBC_SW_SESSION_INFO", GPU_GET_NVFBC_SW_SESSION_INFO, 13316, Direction.ANSWERED,
    (PidTable(0, 4, 52, 256),),
)  # fmt: skip
#: HWPM_GET_RESERVATION_INFO: reservationCount u32 @0, pid u32 @4, bGlobal @8. pid 0: of nobody who is visible.
HWPM_RESERVATION = Control(
    "HWPM_GET_RESERVATION_INFO", HWPM_GET_RESERVATION_INFO, 12, Direction.ANSWERED, (PidTable(None, 4, 4, 1),)
)

# -------------------------------------------------------------------------------- all of them

CONTROLS = (
    GPU_PIDS,
    *(GPU_PID_INFO, GPU_PID_INFO_R460, GPU_PID_INFO_R440),
    *(UTIL_SAMPLES_515, UTIL_SAMPLES_525, UTIL_SAMPLES_550, UTIL_SAMPLES_570),
    *(ACCOUNTING_PIDS, ACCOUNTING_INFO),
    *(NVENC_SESSIONS, NVENC_SESSIONS_V2, NVENC_SESSIONS_V2_525, NVFBC_SESSIONS),
    HWPM_RESERVATION,
)

CONTROL_TABLE: Mapping[tuple[int, int], Control] = MappingProxyType({(c.cmd, c.size): c for c in CONTROLS})

#: Controls that carry process ids and are not in the table, and why.
LEFT_ALONE: Mapping[int, tuple[str, str]] = MappingProxyType(
    {
        0x607: (
            "NVD_GET_RCERR_RPT",
            "the driver answers with the reports of the very process that calls: nobody can ask in its place",
        ),
        0x2080A083: (
            "PERF_GET_GPUMON_PERFMON_UTIL_SAMPLES",
            "the first version of the utilisation samples, which no current library asks for",
        ),
        0x901: ("SET_SUB_PROCESS_ID", "a label of the caller's own, no PID of the kernel's"),
        0xB01: ("GPUACCT_SET_ACCOUNTING_STATE", "its PID is one of a virtual machine's guest; 0 else"),
        0xB02: ("GPUACCT_GET_ACCOUNTING_STATE", "its PID is one of a virtual machine's guest; 0 else"),
        0xB05: ("GPUACCT_CLEAR_ACCOUNTING_DATA", "its PID is one of a virtual machine's guest; 0 else"),
        0xA0810102: ("VGPU_CONFIG_ENUMERATE_VGPU_PER_PGPU", "for the host of virtual machines, not for containers"),
    }
)


def sizes_of(cmd: int) -> Iterator[int]:
    """The params sizes that a control in the table has had."""
    return (size for number, size in CONTROL_TABLE if number == cmd)
