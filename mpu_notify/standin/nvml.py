"""The controls that NVML needs to come up with the GPUs: what they are and what they are called.

What it can do without is not supported. Layouts that grew from one driver to the next are taken in every size.
"""

from __future__ import annotations

import struct

from mpu_notify.rm import abi
from mpu_notify.rm.abi import Status
from mpu_notify.standin.model import CHIPS, GPU_MEMORY, GpuState, Key, Object, RefusedError, Row, State, Task

SYSTEM_GET_BUILD_VERSION = 0x101  # ctrl0000system.h
GPU_GET_ID_INFO = 0x202  # ctrl0000gpu.h, as the next six
GPU_ATTACH_IDS = 0x215
GPU_DETACH_IDS = 0x216
GPU_GET_PCI_INFO = 0x21B
GPU_QUERY_DRAIN_STATE = 0x279
GPU_ASYNC_ATTACH_ID = 0x289
GPU_GET_VIRTUALIZATION_MODE = 0x800289  # ctrl0080gpu.h
GPU_GET_INFO = 0x20800101  # ctrl2080gpu.h, as the next four
GPU_GET_INFO_V2 = 0x20800102
GPU_GET_NAME_STRING = 0x20800110
GPU_QUERY_COMPUTE_MODE_RULES = 0x20800131
GPU_GET_GID_INFO = 0x2080014A
TIMER_GET_GPU_CPU_TIME_CORRELATION_INFO = 0x20800406  # ctrl2080tmr.h
FB_GET_INFO_V2 = 0x20801303  # ctrl2080fb.h
MC_GET_ARCH_INFO = 0x20801701  # ctrl2080mc.h
BUS_GET_PCI_INFO = 0x20801801  # ctrl2080bus.h

#: ctrl2080mc.h NV2080_CTRL_MC_ARCH_INFO_ARCHITECTURE_*.
_ARCHITECTURES = {
    "pascal": 0x130, "volta": 0x140, "turing": 0x160, "ampere": 0x170,
    "hopper": 0x180, "ada": 0x190, "blackwell": 0x1A0,
}  # fmt: skip
#: ctrl2080gpu.h NV2080_CTRL_GPU_INFO_INDEX_GPU_SMC_MODE, and _DISABLED: no MIG instances. Then one that the recorded
#: driver answers with 1, and without which NVML lists no processes.
_INFO = {0x2A: 2, 0x11: 1}
#: ctrl2080fb.h NV2080_CTRL_FB_INFO_INDEX_TOTAL_RAM_SIZE, _HEAP_SIZE, _HEAP_FREE, in KiB.
TOTAL_RAM_SIZE, HEAP_SIZE, HEAP_FREE = 0x08, 0x09, 0x16

_PAIR = 8  # bytes of an index and its data in the _V2 lists, behind a count of 4
_MOST_INFO = 256
_LISTS = tuple(range(4, 4 + _MOST_INFO * _PAIR, _PAIR))
_BOARD, _REVISION = 0x18BF, 0xA1
_NAME = b"mpu-notify stand-in"
_UUID = struct.Struct("<12sI")


def controls_for(state: State) -> dict[Key, Row]:
    """The controls of a driver."""
    nvml = _Nvml(state)
    root, device, subdevice = abi.ROOT_CLIENT, abi.DEVICE, abi.SUBDEVICE
    return {
        (root, SYSTEM_GET_BUILD_VERSION): Row((40,), nvml.get_build_version),
        (root, GPU_GET_ID_INFO): Row((40,), nvml.get_id_info),
        (root, GPU_ATTACH_IDS): Row((132,), nvml.accept),
        (root, GPU_DETACH_IDS): Row((128,), nvml.accept),
        (root, GPU_GET_PCI_INFO): Row((12,), nvml.get_pci_info),
        (root, GPU_QUERY_DRAIN_STATE): Row((12,), nvml.accept),
        (root, GPU_ASYNC_ATTACH_ID): Row((4,), nvml.accept),
        (device, GPU_GET_VIRTUALIZATION_MODE): Row((4, 8), nvml.accept),
        (subdevice, GPU_GET_INFO): Row((16,), nvml.get_info_elsewhere),
        (subdevice, GPU_GET_INFO_V2): Row(_LISTS, nvml.get_info),
        (subdevice, GPU_GET_NAME_STRING): Row((132,), nvml.get_name),
        (subdevice, GPU_QUERY_COMPUTE_MODE_RULES): Row((4,), nvml.accept),
        (subdevice, GPU_GET_GID_INFO): Row((268,), nvml.get_uuid),
        (subdevice, TIMER_GET_GPU_CPU_TIME_CORRELATION_INFO): Row((264,), nvml.get_times),
        (subdevice, FB_GET_INFO_V2): Row(_LISTS, nvml.get_memory),
        (subdevice, MC_GET_ARCH_INFO): Row((12, 16), nvml.get_architecture),
        (subdevice, BUS_GET_PCI_INFO): Row((16,), nvml.get_pci_ids),
    }


class _Nvml:
    def __init__(self, state: State) -> None:
        self._state = state
        self._moment = 0

    def accept(self, _task: Task, _object: Object, _params: bytearray) -> None:
        """What it asks for is so already, or what it asks is answered by what it has put there: 0."""

    def get_build_version(self, task: Task, _object: Object, params: bytearray) -> None:
        size, *buffers = struct.unpack_from("<I4xQQQ", params)
        text = self._state.options.version.encode()
        if size <= len(text):
            raise RefusedError(Status.INVALID_PARAM_STRUCT)
        for buffer in buffers:
            task.write(buffer, text + b"\0")

    def get_id_info(self, _task: Task, _object: Object, params: bytearray) -> None:
        card = self._gpu(params).card
        struct.pack_into("<III", params, 4, 1, card.minor, 0)  # flags deviceInstance subDeviceInstance
        struct.pack_into("<IIIi", params, 24, 0, card.gpu_id, card.minor, -1)  # sliStatus boardId gpuInstance numaId

    def get_pci_info(self, _task: Task, _object: Object, params: bytearray) -> None:
        card = self._gpu(params).card
        struct.pack_into("<IHH", params, 4, card.domain, card.bus, card.slot)

    def get_pci_ids(self, _task: Task, each: Object, params: bytearray) -> None:
        card = _gpu_of(each).card
        ids = card.device << 16 | card.vendor, _BOARD << 16 | card.vendor, _REVISION, card.device
        params[:] = abi.pack_words(ids)

    def get_info(self, _task: Task, _object: Object, params: bytearray) -> None:
        _fill_in(params, _INFO)

    def get_info_elsewhere(self, task: Task, _object: Object, params: bytearray) -> None:
        """The same in a list that the params point to."""
        size, address = struct.unpack("<I4xQ", params)
        if size > _MOST_INFO:
            raise RefusedError(Status.INVALID_ARGUMENT)
        pairs = bytearray(task.read(address, size * _PAIR))
        answered = bytearray(abi.U32.pack(size) + pairs)
        _fill_in(answered, _INFO)
        task.write(address, bytes(answered[abi.U32.size :]))

    def get_name(self, _task: Task, _object: Object, params: bytearray) -> None:
        params[4:] = _NAME.ljust(len(params) - 4, b"\0")

    def get_uuid(self, _task: Task, each: Object, params: bytearray) -> None:
        uuid = _UUID.pack(_NAME[: _UUID.size - 4], _gpu_of(each).card.minor)
        struct.pack_into(f"<I{len(uuid)}s", params, 8, len(uuid), uuid)  # length data, behind index flags

    def get_times(self, _task: Task, _object: Object, params: bytearray) -> None:
        """Pairs of the CPU's and the GPU's time, of a clock that ticks when it is asked."""
        for number in range(min(params[1], 16)):
            self._moment += 1
            struct.pack_into("<QQ", params, 8 + 16 * number, self._moment, self._moment * 1000)

    def get_memory(self, _task: Task, each: Object, params: bytearray) -> None:
        free = GPU_MEMORY - sum(_gpu_of(each).memory.values())
        sizes = {TOTAL_RAM_SIZE: GPU_MEMORY, HEAP_SIZE: GPU_MEMORY, HEAP_FREE: free}
        _fill_in(params, {index: size >> 10 for index, size in sizes.items()})

    def get_architecture(self, _task: Task, _object: Object, params: bytearray) -> None:
        chip = self._state.options.chip
        (name,) = [name for name, each in CHIPS.items() if each == chip]
        struct.pack_into("<III", params, 0, _ARCHITECTURES[name], 0, _REVISION)

    def _gpu(self, params: bytearray) -> GpuState:
        (gpu_id,) = abi.U32.unpack_from(params)
        for gpu in self._state.gpus:
            if gpu.card.gpu_id == gpu_id:
                return gpu
        raise RefusedError(Status.INVALID_ARGUMENT)


def _gpu_of(each: Object) -> GpuState:
    if each.gpu is None:
        raise RefusedError(Status.INVALID_ARGUMENT)
    return each.gpu


def _fill_in(params: bytearray, data: dict[int, int]) -> None:
    """The data of each index in a list that begins with its length; 0 for what is not known."""
    (count,) = abi.U32.unpack_from(params)
    for at in range(4, min(len(params), 4 + _PAIR * count), _PAIR):
        (index,) = abi.U32.unpack_from(params, at)
        abi.U32.pack_into(params, at + 4, data.get(index, 0))
