"""A small client of the resource manager: which GPUs are there, and which processes use them.

It speaks to drivers from 515 on, of both layouts of RM_ALLOC, on the host and in a container with only some
GPUs.
"""

from __future__ import annotations

import ctypes
import errno
import fcntl
import os
from collections.abc import Callable, Iterable
from contextlib import ExitStack
from dataclasses import dataclass, field
from pathlib import Path

from mpu_notify.errors import MpuNotifyError
from mpu_notify.rm import abi
from mpu_notify.rm.controls import (
    GPU_PID_INFO,
    GPU_PID_INFO_R440,
    GPU_PID_INFO_R460,
    GPU_PIDS,
    Control,
)

_WRONG_SIZE = (abi.Status.INVALID_ARGUMENT, abi.Status.INVALID_PARAM_STRUCT)
#: Order of the letters of a process's type, as nvidia-smi writes them: "C", "G", "C+G", "M+C".
_TYPES = "MCG"


class RmError(MpuNotifyError, OSError):
    """The driver refused something, or could not be reached.

    ``status`` is the RM status, or None where the ioctl or open itself failed and ``errno`` tells why.
    """

    def __init__(
        self, attempted: str, on: Path, advice: str, *, error: int = errno.EIO, status: int | None = None
    ) -> None:
        """``attempted`` completes "cannot ..."; ``advice`` is what the user can do."""
        why = os.strerror(error) if status is None else f"RM status {abi.status_text(status)}"
        super().__init__(error, f"cannot {attempted}: {on}: {why}; {advice}")
        self.status = status

    def __str__(self) -> str:
        """One sentence, without the errno in brackets."""
        return str(self.strerror)


_UNKNOWN_LAYOUT = "this driver's structures differ: see the supported versions in the documentation"
_ADVICE = {
    abi.Status.INSUFFICIENT_PERMISSIONS: (
        "with MIG, ask from where an instance or the MIG monitor capability is given; "
        "else check that the GPU's /dev/nvidiaN is there and may be opened"
    ),
    abi.Status.INVALID_CLIENT: "the handle belongs to another open file: use the one that made it",
    abi.Status.NOT_SUPPORTED: "this driver does not have it: see the supported versions in the documentation",
    abi.Status.INVALID_ARGUMENT: _UNKNOWN_LAYOUT,
    abi.Status.INVALID_PARAM_STRUCT: _UNKNOWN_LAYOUT,
}


def _refused(attempted: str, on: Path, status: int) -> RmError:
    advice = next((text for code, text in _ADVICE.items() if code == status), "the kernel log may tell more")
    return RmError(attempted, on, advice, status=status)


def _failed(attempted: str, on: Path, error: OSError) -> RmError:
    advice = "load the NVIDIA driver, give this container the GPU, or name the control node with --device"
    return RmError(attempted, on, advice, error=error.errno or errno.EIO)


def _no_gpu(on: Path, what: str) -> RmError:
    return RmError(f"find {what}", on, "is it bound to the driver, and its node here?", error=errno.ENODEV)


@dataclass(frozen=True)
class GpuProcess:
    """A process that uses a GPU.

    ``pid`` is what the driver says to this caller; ``types`` has "C" (compute), "G" (graphics) and
    "M" (MPS client); ``memory_bytes`` is GPU memory, None where the driver does not tell.
    """

    pid: int
    types: frozenset[str]
    memory_bytes: int | None

    @property
    def type(self) -> str:
        """The types as nvidia-smi writes them: "C", "G", "C+G", "M+C"."""
        return "+".join(letter for letter in _TYPES if letter in self.types)


class RmClient:
    """One root client of the driver, and its own open files. Use it as a context manager, or close it."""

    def __init__(self, control_node: Path = abi.CONTROL_NODE) -> None:
        """Open the control node and allocate the root client; RmError where that fails."""
        self.control_node = control_node
        self._gpus: list[Gpu] | None = None
        self._last_handle = 0x4D500000  # ours to choose: handles are the client's own
        with ExitStack() as files:
            self._fd = self._open(control_node, files)
            self.handle = self._alloc(abi.RmAlloc(0, 0, 0, abi.ROOT_CLIENT, 0), "allocate a client")
            self._files = files.pop_all()

    def __enter__(self) -> RmClient:
        """Itself."""
        return self

    def __exit__(self, *_: object) -> None:
        """Close."""
        self.close()

    def close(self) -> None:
        """Close the open files, which frees all that was allocated with them."""
        self._files.close()

    def gpus(self, at_most: int | None = None) -> list[Gpu]:
        """The GPUs whose node beside the control node can be opened, in PCI order; RmError where none can.

        Their numbers count all GPUs of the machine, so they are the same in a container that has only some. With
        ``at_most`` no more are opened, the first time: opening a GPU that nobody uses initialises it.
        """
        if self._gpus is None:
            cards = bytearray(abi.CardInfo.LAYOUT.size * abi.CardInfo.MAX_ENTRIES)
            self._ioctl(abi.Escape.CARD_INFO, cards, "list the GPUs")
            found = sorted(abi.CardInfo.unpack_all(cards))
            first_error: OSError | None = None
            gpus: list[Gpu] = []
            for index, card in enumerate(found):
                if len(gpus) == at_most:
                    break
                try:
                    self._open(self.control_node.with_name(f"nvidia{card.minor}"), self._files)
                except RmError as error:  # a container that has only some of the GPUs
                    first_error = first_error or error
                    continue
                gpus.append(self._gpu(index, card))
            if not gpus:
                raise first_error or _no_gpu(self.control_node, "a GPU")
            self._gpus = gpus
        return self._gpus

    def alloc(self, parent: int, class_number: int, params: bytes = b"") -> int:
        """Allocate an object of a class under ``parent``; its handle."""
        self._last_handle += 1
        buffer = ctypes.create_string_buffer(params, max(1, len(params)))
        request = abi.RmAlloc(
            self.handle, parent, self._last_handle, class_number, ctypes.addressof(buffer) if params else 0
        )
        return self._alloc(request, f"allocate an object of class 0x{class_number:x}")

    def free(self, handle: int) -> None:
        """Free an object and all below it."""
        raw = bytearray(abi.Nvos00(self.handle, 0, handle).pack())
        attempted = f"free object 0x{handle:x}"
        self._ioctl(abi.Escape.RM_FREE, raw, attempted)
        status = abi.Nvos00.unpack(raw).status
        if status:
            raise _refused(attempted, self.control_node, status)

    def control(self, handle: int, cmd: int, params: bytearray) -> None:
        """Perform a control on an object; ``params`` is filled in by the driver."""
        view = (ctypes.c_char * len(params)).from_buffer(params)
        request = abi.Nvos54(self.handle, handle, cmd, 0, ctypes.addressof(view), len(params))
        raw = bytearray(request.pack())
        attempted = f"perform RM control 0x{cmd:x} with {len(params)} bytes"
        self._ioctl(abi.Escape.RM_CONTROL, raw, attempted)
        status = abi.Nvos54.unpack(raw).status
        if status:
            raise _refused(attempted, self.control_node, status)

    def _open(self, node: Path, files: ExitStack) -> int:
        try:
            fd = os.open(node, os.O_RDWR | os.O_CLOEXEC)
        except OSError as error:
            raise _failed("open the driver", node, error) from error
        files.callback(os.close, fd)
        return fd

    def _ioctl(self, escape: abi.Escape, raw: bytearray, attempted: str) -> None:
        try:
            fcntl.ioctl(self._fd, abi.ioctl_number(escape, len(raw)), raw, True)  # noqa: FBT003 - positional only
        except OSError as error:
            raise _failed(attempted, self.control_node, error) from error

    def _alloc(self, request: abi.RmAlloc, attempted: str) -> int:
        raw = bytearray(request.pack().ljust(abi.NVOS21_SIZE, b"\0"))
        self._ioctl(abi.Escape.RM_ALLOC, raw, attempted)
        status = abi.nvos21_status(raw)
        if status:
            raise _refused(attempted, self.control_node, status)
        return abi.RmAlloc.unpack(raw[: abi.RmAlloc.LAYOUT.size]).new

    def _gpu(self, index: int, card: abi.CardInfo) -> Gpu:
        info = bytearray(abi.IdInfo(card.gpu_id).pack())
        self.control(self.handle, abi.GPU_GET_ID_INFO_V2, info)
        instances = abi.IdInfo.unpack(info)
        device = self.alloc(self.handle, abi.DEVICE, abi.DeviceParams(instances.device_instance).pack())
        params = abi.SubdeviceParams(instances.subdevice_instance).pack()
        subdevice = self.alloc(device, abi.SUBDEVICE, params)
        classes = tuple(self._class_list(device))
        return Gpu(index, card.minor, card.gpu_id, card.address, classes, device, subdevice, self)

    def _class_list(self, device: int) -> list[int]:
        # The first of the two class list controls, because its size is the same in every version.
        params = bytearray(abi.ClassList().pack())
        self.control(device, abi.GPU_GET_CLASSLIST, params)
        words = bytearray(4 * abi.ClassList.unpack(params).count)
        if not words:
            return []
        view = (ctypes.c_char * len(words)).from_buffer(words)
        params = bytearray(abi.ClassList(len(words) // 4, ctypes.addressof(view)).pack())
        self.control(device, abi.GPU_GET_CLASSLIST, params)
        return abi.unpack_words(words)[: abi.ClassList.unpack(params).count]


@dataclass(frozen=True)
class Gpu:
    """A GPU as one RM client sees it.

    ``index`` is its place in PCI order among all GPUs of the machine, ``minor`` the number in /dev/nvidiaN,
    ``classes`` the object classes it knows; ``device`` and ``subdevice`` are handles of the client.
    """

    index: int
    minor: int
    gpu_id: int
    pci_address: str
    classes: tuple[int, ...]
    device: int
    subdevice: int
    client: RmClient = field(repr=False)

    def pids(self, class_number: int) -> list[int]:
        """The ids of the processes that hold an object of a class, as the driver gives them to this caller.

        Class 0x2080 (subdevice) means every process that opened the GPU.
        """
        params = bytearray(abi.pack_words([abi.PIDS_ID_TYPE_CLASS, class_number]).ljust(GPU_PIDS.size, b"\0"))
        self.client.control(self.subdevice, GPU_PIDS.cmd, params)
        pids = GPU_PIDS.table.pids(params)
        if pids is None:
            attempted = "list the GPU processes: the driver counts more than its table holds"
            raise RmError(attempted, self.client.control_node, _UNKNOWN_LAYOUT, error=errno.EPROTO)
        return pids

    def processes(self) -> list[GpuProcess]:
        """The processes that compute or draw on the GPU, by pid; each once, whatever it does."""
        types: dict[int, set[str]] = {}
        asked = [(number, "C") for number in self.classes if abi.is_compute_class(number)]
        asked += [(number, "G") for number in self.classes if abi.is_graphics_class(number)]
        for number, letter in [*asked, (abi.MPS_COMPUTE, "M")]:
            for pid in self.pids(number):
                types.setdefault(pid, set()).add(letter)
        memory = self.memory(sorted(types))
        return [GpuProcess(pid, frozenset(types[pid]), memory[pid]) for pid in sorted(types)]

    def memory(self, pids: list[int]) -> dict[int, int | None]:
        """The GPU memory of processes in bytes, by the ids that the driver is to be asked with; None: not told."""
        memory: dict[int, int | None] = {}
        for start in range(0, len(pids), GPU_PID_INFO.table.capacity):
            memory.update(self._memory_of(pids[start : start + GPU_PID_INFO.table.capacity]))
        return memory

    def _memory_of(self, pids: list[int]) -> Iterable[tuple[int, int | None]]:
        for layout in (GPU_PID_INFO, GPU_PID_INFO_R460):
            try:
                return self._memory_by(layout, pids)
            except RmError as error:  # noqa: PERF203 - at most two rounds, and the exception decides
                if error.status not in _WRONG_SIZE:
                    raise
        return self._memory_by(GPU_PID_INFO_R440, pids)

    def _memory_by(self, layout: Control, pids: list[int]) -> Iterable[tuple[int, int | None]]:
        params = bytearray(layout.size)
        layout.table.replace(params, pids)  # index 0 in every entry: memory
        self.client.control(self.subdevice, layout.cmd, params)
        answers: list[tuple[int, int | None]] = []
        for number, pid in enumerate(pids):
            entry = layout.table.entries + layout.table.stride * number
            (result,) = abi.U32.unpack_from(params, entry + abi.MemoryUse.RESULT)
            use = abi.MemoryUse(*abi.MemoryUse.LAYOUT.unpack_from(params, entry + abi.MemoryUse.OFFSET))
            answers.append((pid, None if result else use.private + use.shared_owned))
        return answers


def _newest(gpu: Gpu, test: Callable[[int], bool]) -> int:
    return max(number for number in gpu.classes if test(number))


class GpuUser:
    """Makes this process a user of a GPU for as long as it is open, on the stand-in driver only.

    A real driver wants much more of a channel. Use it as a context manager, or close it.
    """

    def __init__(
        self,
        control_node: Path,
        *,
        gpu: int = 0,
        memory_bytes: int = 0,
        types: Iterable[str] = "C",
        clients: int = 1,
    ) -> None:
        """Hold a context of each of ``types`` ("C", "G", "M") on a GPU in each of ``clients`` RM clients.

        ``gpu`` is its index; ``memory_bytes`` is the GPU memory held in all, by the first client.
        """
        with ExitStack() as held:
            for number in range(clients):
                client = held.enter_context(RmClient(control_node))
                self._hold(client, gpu, types, memory_bytes if number == 0 else 0)
            self._held = held.pop_all()

    def __enter__(self) -> GpuUser:
        """Itself."""
        return self

    def __exit__(self, *_: object) -> None:
        """Close."""
        self.close()

    def close(self) -> None:
        """Stop using the GPU."""
        self._held.close()

    @staticmethod
    def _hold(client: RmClient, index: int, types: Iterable[str], memory_bytes: int) -> None:
        gpu = next((one for one in client.gpus() if one.index == index), None)
        if gpu is None:
            raise _no_gpu(client.control_node, f"GPU {index}")
        for other in client.gpus():
            if other is not gpu:  # else a client of MPS is one on every GPU
                client.free(other.device)
        if memory_bytes:
            client.alloc(gpu.device, abi.MEMORY_LOCAL_USER, abi.MemoryParams(memory_bytes).pack())
        for letter in types:
            if letter == "M":
                client.alloc(client.handle, abi.MPS_COMPUTE)
                continue
            test = {"C": abi.is_compute_class, "G": abi.is_graphics_class}[letter]
            channel_class = _newest(gpu, abi.is_channel_class)
            channel = client.alloc(gpu.device, channel_class, bytes(abi.CHANNEL_PARAMS_SIZE))
            client.alloc(channel, _newest(gpu, test))
