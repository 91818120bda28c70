"""Numbers and structures of the resource manager's user-space ABI: ioctls on /dev/nvidiactl and /dev/nvidiaN.

Every constant names its header in NVIDIA/open-gpu-kernel-modules and is called what the header calls it,
without prefix. Structures are little-endian and alike for 32-bit callers. Controls with process ids are in
``controls.py``.
"""

from __future__ import annotations

import struct
from collections.abc import Sequence
from dataclasses import dataclass
from enum import IntEnum
from pathlib import Path
from typing import ClassVar, TypeVar

U32 = struct.Struct("<I")
U64 = struct.Struct("<Q")

CONTROL_NODE = Path("/dev/nvidiactl")
#: nv.h: the device number of the control node.
CONTROL_NODE_MAJOR, CONTROL_NODE_MINOR = 195, 255  # NV_MAJOR_DEVICE_NUMBER, NV_MINOR_DEVICE_NUMBER_CONTROL_DEVICE


# -------------------------------------------------------------------------------- ioctl numbers


class Escape(IntEnum):
    """``_IOC_NR`` of an ioctl: nv_escape.h (RM_*), nv-ioctl-numbers.h (the others)."""

    RM_FREE = 0x29
    RM_CONTROL = 0x2A
    RM_ALLOC = 0x2B
    CARD_INFO = 200
    REGISTER_FD = 201
    CHECK_VERSION_STR = 210
    IOCTL_XFER_CMD = 211
    SYS_PARAMS = 214
    WAIT_OPEN_COMPLETE = 218


#: nv-ioctl-numbers.h NV_IOCTL_MAGIC.
IOCTL_MAGIC = ord("F")
#: asm-generic/ioctl.h: the driver looks only at number and size; user space asks with read and write set.
_IOC_READ_WRITE = 3 << 30


def ioctl_number(escape: int, size: int) -> int:
    """The number of an ioctl for a structure of ``size`` bytes, as user-space libraries make it."""
    return _IOC_READ_WRITE | size << 16 | IOCTL_MAGIC << 8 | escape


def ioctl_parts(cmd: int) -> tuple[int, int]:
    """(``_IOC_NR``, ``_IOC_SIZE``) of an ioctl number, which is all the driver looks at."""
    return cmd & 0xFF, cmd >> 16 & 0x3FFF


# -------------------------------------------------------------------------------- classes

ROOT = 0x0  # cl0000.h NV01_ROOT
ROOT_NON_PRIV = 0x1  # cl0001.h NV01_ROOT_NON_PRIV
ROOT_CLIENT = 0x41  # cl0041.h NV01_ROOT_CLIENT
DEVICE = 0x80  # cl0080.h NV01_DEVICE_0
SUBDEVICE = 0x2080  # cl2080.h NV20_SUBDEVICE_0
MEMORY_LOCAL_USER = 0x40  # cl0040.h NV01_MEMORY_LOCAL_USER
MPS_COMPUTE = 0x900E  # cl900e.h
PROFILER = 0x90CC  # cl90cc.h GF100_PROFILER
NVENC_SW_SESSION = 0xA0BC  # cla0bc.h
NVFBC_SW_SESSION = 0xA0BD  # cla0bd.h

# Engine classes are numbered by generation and kind: clcbc0.h HOPPER_COMPUTE_A, clcb97.h HOPPER_A, clc86f.h
# HOPPER_CHANNEL_GPFIFO_A. Fermi's 90C0 and 9097 are the first of their line.
_FIRST_ENGINE_CLASS = 0x9000


_COMPUTE, _GRAPHICS, _CHANNEL = 0xC0, 0x97, 0x6F


def is_compute_class(number: int) -> bool:
    """Whether a class is a generation's compute engine: xxC0."""
    return number & 0xFF == _COMPUTE and number >= _FIRST_ENGINE_CLASS


def is_graphics_class(number: int) -> bool:
    """Whether a class is a generation's graphics engine: xx97."""
    return number & 0xFF == _GRAPHICS and number >= _FIRST_ENGINE_CLASS


def is_channel_class(number: int) -> bool:
    """Whether a class is a generation's channel: xx6F."""
    return number & 0xFF == _CHANNEL and number >= _FIRST_ENGINE_CLASS


# -------------------------------------------------------------------------------- controls

GPU_GET_ATTACHED_IDS = 0x201  # ctrl0000gpu.h
GPU_GET_ID_INFO_V2 = 0x205  # ctrl0000gpu.h
GPU_GET_PROBED_IDS = 0x214  # ctrl0000gpu.h
GPU_GET_CLASSLIST = 0x800201  # ctrl0080gpu.h
GPU_GET_CLASSLIST_V2 = 0x800292  # ctrl0080gpu.h
HWPM_RESERVE = 0x90CC0101  # ctrl90cchwpm.h; its params are a byte, whether contexts are switched

#: ctrl2080gpu.h NV2080_CTRL_GPU_GET_PIDS_ID_TYPE_CLASS: ask for the processes that hold objects of a class.
PIDS_ID_TYPE_CLASS = 0
#: ctrl2080gpu.h NV2080_CTRL_GPU_GET_PIDS_ID_TYPE_VGPU_GUEST: ask for those of a virtual machine.
PIDS_ID_TYPE_VGPU_GUEST = 1
#: ctrl2080gpu.h NV2080_CTRL_GPU_PID_INFO_INDEX_VIDEO_MEMORY_USAGE: ask for a process's GPU memory.
PID_INFO_INDEX_MEMORY = 0


# -------------------------------------------------------------------------------- status codes


class Status(IntEnum):
    """The status codes that this project makes or explains: nvstatuscodes.h."""

    OK = 0x00
    BUFFER_TOO_SMALL = 0x02
    INSERT_DUPLICATE_NAME = 0x19
    INSUFFICIENT_RESOURCES = 0x1A
    INSUFFICIENT_PERMISSIONS = 0x1B
    INVALID_ADDRESS = 0x1E
    INVALID_ARGUMENT = 0x1F
    INVALID_CLASS = 0x22
    INVALID_CLIENT = 0x23
    INVALID_OBJECT_PARENT = 0x36
    INVALID_PARAM_STRUCT = 0x3A
    NO_MEMORY = 0x51
    NOT_SUPPORTED = 0x56
    OBJECT_NOT_FOUND = 0x57


def status_text(status: int) -> str:
    """A status in hex, with its name where it is known."""
    try:
        name = Status(status).name.lower().replace("_", " ")
    except ValueError:
        name = "see nvstatuscodes.h"
    return f"0x{status:02x} ({name})"


# -------------------------------------------------------------------------------- ioctl arguments

_StructureT = TypeVar("_StructureT", bound="Structure")


@dataclass(frozen=True)
class Structure:
    """A C structure: the fields of ``LAYOUT``, in order."""

    LAYOUT: ClassVar[struct.Struct]

    @classmethod
    def unpack(cls: type[_StructureT], raw: bytes | bytearray) -> _StructureT:
        """From exactly ``LAYOUT.size`` bytes; struct.error else."""
        return cls(*cls.LAYOUT.unpack(raw))

    def pack(self) -> bytes:
        """To ``LAYOUT.size`` bytes."""
        return bytes(self.LAYOUT.pack(*vars(self).values()))


@dataclass(frozen=True, order=True)
class Nvos54(Structure):
    """The argument of RM_CONTROL: nvos.h NVOS54_PARAMETERS."""

    client: int
    handle: int
    cmd: int
    flags: int
    params: int
    params_size: int
    status: int = 0

    LAYOUT: ClassVar[struct.Struct] = struct.Struct("<IIIIQII")


@dataclass(frozen=True, order=True)
class Nvos00(Structure):
    """The argument of RM_FREE: nvos.h NVOS00_PARAMETERS."""

    root: int
    parent: int
    old: int
    status: int = 0

    LAYOUT: ClassVar[struct.Struct] = struct.Struct("<IIII")


@dataclass(frozen=True, order=True)
class RmAlloc(Structure):
    """What every layout of RM_ALLOC's argument begins with: nvos.h NVOS21_PARAMETERS, NVOS64_PARAMETERS."""

    root: int
    parent: int
    new: int
    class_number: int
    params: int

    LAYOUT: ClassVar[struct.Struct] = struct.Struct("<IIIIQ")


#: nvos.h NVOS21_PARAMETERS, every version.
NVOS21_SIZE = 32

#: Size of RM_ALLOC's argument -> offset of its u32 status, up to 520. Read in NVOS64 of 515 and 520.
ALLOC_STATUS_TO_520 = {NVOS21_SIZE: 24, 40: 32}
FIRST_BRANCH_WITH_ALLOC_FLAGS = 525
#: The same up to 530.41.03, where NVOS64 has flags before the status.
ALLOC_STATUS_TO_530 = {NVOS21_SIZE: 24, 40: 36}
#: The same from 535.43.02 on, where a u32 params size came before the status.
ALLOC_STATUS_FROM_535 = {NVOS21_SIZE: 28, 48: 40}


def nvos21_status(raw: bytes | bytearray) -> int:
    """The status in an answered NVOS21 whose bytes 24 to 31 were zero when asked, whichever the layout.

    The offset of one layout's status is padding in the other or the params size, which nobody fills in.
    """
    old, new = struct.unpack_from("<II", raw, 24)
    return int(old | new)


@dataclass(frozen=True, order=True)
class XferCmd(Structure):
    """The argument of IOCTL_XFER_CMD, an ioctl within an ioctl: nv-ioctl.h nv_ioctl_xfer_t."""

    cmd: int
    size: int
    pointer: int

    LAYOUT: ClassVar[struct.Struct] = struct.Struct("<IIQ")
    #: nv-ioctl.h NV_ABSOLUTE_MAX_IOCTL_SIZE, bytes.
    MAX_SIZE: ClassVar[int] = 16384


@dataclass(frozen=True, order=True)
class VersionCheck(Structure):
    """The argument of CHECK_VERSION_STR: nv-ioctl.h nv_ioctl_rm_api_version_t."""

    cmd: int
    reply: int
    version: bytes

    LAYOUT: ClassVar[struct.Struct] = struct.Struct("<II64s")
    #: nv-ioctl.h NV_RM_API_VERSION_CMD_QUERY: tell the version rather than compare it.
    QUERY: ClassVar[int] = ord("2")
    #: nv-ioctl.h NV_RM_API_VERSION_REPLY_RECOGNIZED.
    RECOGNIZED: ClassVar[int] = 1


@dataclass(frozen=True, order=True)
class CardInfo(Structure):
    """One entry of the array that CARD_INFO fills in: nv-ioctl.h nv_ioctl_card_info_t and nv_pci_info_t."""

    domain: int
    bus: int
    slot: int
    function: int
    vendor: int
    device: int
    gpu_id: int
    minor: int

    LAYOUT: ClassVar[struct.Struct] = struct.Struct("<B3xIBBBxHHI36xI12x")
    #: nv-ioctl.h NV_MAX_DEVICES: entries enough for every machine.
    MAX_ENTRIES: ClassVar[int] = 32

    @classmethod
    def unpack_all(cls, raw: bytes | bytearray) -> list[CardInfo]:
        """The valid entries of an array, in the driver's order."""
        return [cls(*fields[1:]) for fields in cls.LAYOUT.iter_unpack(raw) if fields[0]]

    def pack(self) -> bytes:
        """To one valid entry of 72 bytes."""
        return self.LAYOUT.pack(1, *vars(self).values())

    @property
    def address(self) -> str:
        """The PCI address as nvidia-smi writes it: ``00000000:06:00.0``."""
        return f"{self.domain:08X}:{self.bus:02X}:{self.slot:02X}.{self.function:X}"


# -------------------------------------------------------------------------------- control params

#: ctrl0000gpu.h: ids in a list of GPU ids; the first INVALID_GPU_ID ends it.
MAX_GPU_IDS = 32
INVALID_GPU_ID = 0xFFFFFFFF
#: NV0000_CTRL_GPU_GET_ATTACHED_IDS_PARAMS, bytes.
ATTACHED_IDS_SIZE = 128
#: NV0000_CTRL_GPU_GET_PROBED_IDS_PARAMS, bytes: a second list (excluded GPUs), and a third from 580.65.06.
PROBED_IDS_SIZES = (256, 384)


def pack_gpu_ids(ids: Sequence[int], size: int) -> bytes:
    """A list of GPU ids in ``size`` bytes, ended and filled with INVALID_GPU_ID."""
    return b"".join(map(U32.pack, ids)).ljust(size, b"\xff")


def unpack_gpu_ids(raw: bytes | bytearray) -> list[int]:
    """The GPU ids of the first list, up to its end mark."""
    ids = [fields[0] for fields in U32.iter_unpack(raw[: 4 * MAX_GPU_IDS])]
    return ids[: ids.index(INVALID_GPU_ID)] if INVALID_GPU_ID in ids else ids


@dataclass(frozen=True, order=True)
class IdInfo(Structure):
    """A GPU's instance numbers: ctrl0000gpu.h NV0000_CTRL_GPU_GET_ID_INFO_V2_PARAMS."""

    gpu_id: int
    flags: int = 0
    device_instance: int = 0
    subdevice_instance: int = 0
    sli_status: int = 0
    board_id: int = 0
    gpu_instance: int = 0
    numa_id: int = 0

    LAYOUT: ClassVar[struct.Struct] = struct.Struct("<IIIIIIIi")


@dataclass(frozen=True, order=True)
class ClassList(Structure):
    """Count and pointer of a GPU's classes: ctrl0080gpu.h NV0080_CTRL_GPU_GET_CLASSLIST_PARAMS.

    With a null pointer only the count is filled in.
    """

    count: int = 0
    pointer: int = 0

    LAYOUT: ClassVar[struct.Struct] = struct.Struct("<I4xQ")


def pack_words(words: Sequence[int]) -> bytes:
    """A C array of u32."""
    return struct.pack(f"<{len(words)}I", *words)


def unpack_words(raw: bytes | bytearray) -> list[int]:
    """The u32 of a C array."""
    return list(struct.unpack(f"<{len(raw) // U32.size}I", raw))


#: ctrl0080gpu.h NV0080_CTRL_GPU_GET_CLASSLIST_V2_PARAMS, bytes: count u32 @0, u32[] @4. There are 200 of them in
#: 580, 174 in 550, 116 in the oldest seen: any length in between is taken.
CLASSLIST_V2_SIZES = tuple(4 + 4 * length for length in range(116, 201))


def pack_class_list_v2(classes: Sequence[int], size: int) -> bytes:
    """GET_CLASSLIST_V2's answer in ``size`` bytes, enough for all of them."""
    return pack_words([len(classes), *classes]).ljust(size, b"\0")


@dataclass(frozen=True, order=True)
class MemoryUse(Structure):
    """Bytes of GPU memory: ctrl2080gpu.h NV2080_CTRL_GPU_PID_INFO_VIDEO_MEMORY_USAGE_DATA, its start."""

    private: int
    shared_owned: int
    shared_duped: int

    LAYOUT: ClassVar[struct.Struct] = struct.Struct("<QQQ")
    #: Offset of ``result`` (u32) and of this structure in an entry of GPU_GET_PID_INFO.
    RESULT: ClassVar[int] = 8
    OFFSET: ClassVar[int] = 16


# -------------------------------------------------------------------------------- allocation params


@dataclass(frozen=True, order=True)
class DeviceParams(Structure):
    """Params of class DEVICE: cl0080.h NV0080_ALLOC_PARAMETERS."""

    device_instance: int

    LAYOUT: ClassVar[struct.Struct] = struct.Struct("<I52x")


@dataclass(frozen=True, order=True)
class SubdeviceParams(Structure):
    """Params of class SUBDEVICE: cl2080.h NV2080_ALLOC_PARAMETERS."""

    subdevice_instance: int

    LAYOUT: ClassVar[struct.Struct] = struct.Struct("<I")


@dataclass(frozen=True, order=True)
class MemoryParams(Structure):
    """Params of class MEMORY_LOCAL_USER: nvos.h NV_MEMORY_ALLOCATION_PARAMS; the size is in bytes."""

    size: int

    LAYOUT: ClassVar[struct.Struct] = struct.Struct("<64xQ56x")


#: Params of a channel class, bytes: alloc_channel.h NV_CHANNEL_ALLOC_PARAMS of 515; later ones are longer.
CHANNEL_PARAMS_SIZE = 304
