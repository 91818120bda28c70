"""A model of the NVIDIA resource manager, as far as listing the processes of a GPU needs it.

What it answers, to which mistake with which status, and who may use which handle follows the open driver; where
that would set up hardware, this only keeps books. It makes no system call: what it must know of the task that calls
comes through ``Task``.
"""

from __future__ import annotations

import errno
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field, replace
from enum import Enum
from typing import NamedTuple, Protocol, TypeVar

from mpu_notify.rm import abi
from mpu_notify.rm.abi import Escape, Status
from mpu_notify.rm.controls import CONTROL_TABLE as PID_CONTROLS
from mpu_notify.rm.controls import GPU_GET_PID_INFO, GPU_GET_PIDS, GPU_PIDS


class MemoryFault(Exception):  # noqa: N818 - it is what the kernel calls it
    """The caller's memory cannot be read or written there, by itself."""


class Process(NamedTuple):
    """A process: its id for the driver, and (PID namespace, id) from its own namespace upwards."""

    tgid: int
    numbers: tuple[tuple[int, int], ...]


class Task(Protocol):
    """The task that performs an ioctl, as the kernel's ``current``."""

    def read(self, address: int, size: int) -> bytes:
        """Copy from its memory; MemoryFault where it may not read."""

    def write(self, address: int, data: bytes) -> None:
        """Copy to its memory; MemoryFault where it may not write."""

    def process(self) -> Process:
        """The process it belongs to."""

    def namespace(self) -> int:
        """An identifier of its PID namespace."""


class Era(Enum):
    """What the driver does with process ids by itself."""

    HOST = "host"
    NATIVE = "native"


class Chip(NamedTuple):
    """The object classes of a generation, and a PCI device id of it."""

    channel: int
    compute: int
    graphics: int
    pci_device: int


#: Class headers clc06f.h, clc0c0.h, clc097.h and so on.
CHIPS = {
    "pascal": Chip(0xC06F, 0xC0C0, 0xC097, 0x15F8),
    "volta": Chip(0xC36F, 0xC3C0, 0xC397, 0x1DB6),
    "turing": Chip(0xC46F, 0xC5C0, 0xC597, 0x1EB8),
    "ampere": Chip(0xC56F, 0xC6C0, 0xC697, 0x20B5),
    "ada": Chip(0xC56F, 0xC9C0, 0xC997, 0x26B9),
    "hopper": Chip(0xC86F, 0xCBC0, 0xCB97, 0x2335),
    "blackwell": Chip(0xC96F, 0xCDC0, 0xCD97, 0x2901),
}


@dataclass(frozen=True)
class Options:
    """What kind of driver to be. ``old_alloc``: RM_ALLOC's argument as it was up to 530.41.03."""

    era: Era = Era.HOST
    gpus: int = 1
    chip: Chip = CHIPS["hopper"]
    version: str = "580.159.04"
    old_alloc: bool = False


_VENDOR = 0x10DE
_FIRST_SLOT = 6
_FIRST_CLIENT = 0xC1D00000
_FIRST_GENERATED = 0xCAF00000
_MAX_PARAMS = 1 << 20
_NO_INSTANCE = 0xFFFFFFFF  # not a MIG instance
_PID_INFO_ENTRY_TAIL = 8  # computeInstanceId, gpuInstanceId: last in the entries that have them
_PID_INFO_WITH_TAIL = 48
_CLASS_MASK = 0xFFFF
_SYS_MEMBLOCK = 0x40000000
_GPU_MEMORY = 144 << 30


class _RefusedError(Exception):
    """An RM status that is not OK; the ioctl itself succeeds."""

    def __init__(self, status: Status) -> None:
        super().__init__(status)
        self.status = status


def _failed(code: int) -> OSError:
    return OSError(code, f"the stand-in driver answers {errno.errorcode[code]}")


_Key = TypeVar("_Key")


@dataclass(eq=False)
class _GpuState:
    """A GPU and the books about it. ``nodes`` counts the open files of its node by process id."""

    card: abi.CardInfo
    nodes: dict[int, int] = field(default_factory=dict)
    holders: dict[int, dict[Process, int]] = field(default_factory=dict)
    memory: dict[Process, int] = field(default_factory=dict)


def _count(books: dict[_Key, int], key: _Key, change: int) -> None:
    total = books.get(key, 0) + change
    if total:
        books[key] = total
    else:
        books.pop(key, None)


@dataclass(eq=False)
class _Object:
    """An object of a client: a node in its tree. ``size`` is GPU memory in bytes."""

    handle: int
    class_number: int
    parent: _Object | None = None
    gpu: _GpuState | None = None
    size: int = 0
    children: dict[int, _Object] = field(default_factory=dict)

    def subtree(self) -> Iterable[_Object]:
        """All objects below it, then itself."""
        for child in self.children.values():
            yield from child.subtree()
        yield self


@dataclass(eq=False)
class _Client:
    """A root client, of the open file and of the process that allocated it."""

    root: _Object
    process: Process
    objects: dict[int, _Object]

    def has_device(self, gpu: _GpuState) -> bool:
        """Whether it has a device object of a GPU."""
        return any(each.class_number == abi.DEVICE and each.gpu is gpu for each in self.objects.values())


class Driver:
    """The driver's state, shared by all open files."""

    def __init__(self, options: Options) -> None:
        """With ``options.gpus`` GPUs of one kind on PCI bus 0."""
        self.options = options
        slots = range(_FIRST_SLOT, _FIRST_SLOT + options.gpus)
        self.gpus = [
            _GpuState(abi.CardInfo(0, 0, slot, 0, _VENDOR, options.chip.pci_device, slot, minor))
            for minor, slot in enumerate(slots)
        ]
        self.alloc_status = abi.ALLOC_STATUS_TO_530 if options.old_alloc else abi.ALLOC_STATUS_FROM_535
        chip = options.chip
        self.classes = [
            abi.ROOT_CLIENT, abi.DEVICE, abi.SUBDEVICE, abi.MEMORY_LOCAL_USER, abi.MPS_COMPUTE,
            chip.channel, chip.compute, chip.graphics,
        ]  # fmt: skip
        #: Clients with MPS objects, and how many each has.
        self.mps: dict[_Client, int] = {}
        self._clients_made = 0

    def open_control(self) -> ControlFile:
        """Open the control node."""
        return ControlFile(self)

    def open_gpu(self, minor: int, task: Task) -> GpuFile:
        """Open the node of GPU ``minor``."""
        return GpuFile(self.gpus[minor], task.process())

    def new_client_handle(self) -> int:
        """A client handle that was never used."""
        self._clients_made += 1
        return _FIRST_CLIENT + self._clients_made

    def attached(self) -> list[_GpuState]:
        """The GPUs whose node somebody has open."""
        return [gpu for gpu in self.gpus if gpu.nodes]


class File(ABC):
    """An open file of one of the driver's nodes."""

    def ioctl(self, task: Task, cmd: int, argument: int, copied: bytes) -> bytes | None:
        """Perform ioctl number ``cmd`` with its third argument ``argument``.

        ``copied`` is the structure there, where it was copied in already, and then the new one is returned.
        Else it is read from, and written to, the task. OSError for an errno.
        """
        number, size = abi.ioctl_parts(cmd)
        try:
            before = copied or task.read(argument, size)
            after = self._unwrap(task, number, before)
            if copied:
                return after
            task.write(argument, after)
        except MemoryFault as error:
            raise _failed(errno.EFAULT) from error
        return None

    def _unwrap(self, task: Task, number: int, raw: bytes) -> bytes:
        if number != Escape.IOCTL_XFER_CMD:
            return self._perform(task, number, raw)
        if len(raw) != abi.XferCmd.LAYOUT.size:
            raise _failed(errno.EINVAL)
        inner = abi.XferCmd.unpack(raw)
        if inner.size > abi.XferCmd.MAX_SIZE:
            raise _failed(errno.EINVAL)
        task.write(inner.pointer, self._perform(task, inner.cmd, task.read(inner.pointer, inner.size)))
        return raw

    @abstractmethod
    def _perform(self, task: Task, number: int, raw: bytes) -> bytes:
        """Perform an escape with its whole argument; the argument as it is afterwards."""

    @abstractmethod
    def release(self) -> None:
        """The last reference is gone."""


class GpuFile(File):
    """An open /dev/nvidiaN. It refuses what belongs to the control node."""

    def __init__(self, gpu: _GpuState, process: Process) -> None:
        """Opened by ``process``, which may then allocate devices of the GPU."""
        self._gpu = gpu
        self._tgid = process.tgid
        _count(gpu.nodes, self._tgid, 1)

    def release(self) -> None:
        """Close."""
        _count(self._gpu.nodes, self._tgid, -1)

    def _perform(self, task: Task, number: int, raw: bytes) -> bytes:  # noqa: ARG002 - interface
        sizes = {Escape.REGISTER_FD: 4, Escape.WAIT_OPEN_COMPLETE: 8}
        if len(raw) != next((size for escape, size in sizes.items() if escape == number), None):
            raise _failed(errno.EINVAL)
        return raw


class ControlFile(File):
    """An open /dev/nvidiactl, with the clients that were allocated through it and are good through it only."""

    def __init__(self, driver: Driver) -> None:
        """Without clients yet."""
        self._driver = driver
        self._clients: dict[int, _Client] = {}
        self._escapes: dict[int, Callable[[Task, bytes], bytes]] = {
            Escape.RM_CONTROL: self._rm_control,
            Escape.RM_ALLOC: self._rm_alloc,
            Escape.RM_FREE: self._rm_free,
            Escape.CARD_INFO: self._card_info,
            Escape.CHECK_VERSION_STR: self._check_version,
            Escape.SYS_PARAMS: self._sys_params,
        }
        root, device, subdevice = abi.ROOT_CLIENT, abi.DEVICE, abi.SUBDEVICE
        # (class of the object, control) -> (sizes of params, what fills them in)
        self._controls: dict[tuple[int, int], tuple[tuple[int, ...], _Control]] = {
            (root, abi.GPU_GET_PROBED_IDS): (abi.PROBED_IDS_SIZES, self._get_probed_ids),
            (root, abi.GPU_GET_ATTACHED_IDS): ((abi.ATTACHED_IDS_SIZE,), self._get_attached_ids),
            (root, abi.GPU_GET_ID_INFO_V2): ((abi.IdInfo.LAYOUT.size,), self._get_id_info),
            (device, abi.GPU_GET_CLASSLIST): ((abi.ClassList.LAYOUT.size,), self._get_class_list),
            (device, abi.GPU_GET_CLASSLIST_V2): ((abi.CLASSLIST_V2_SIZE,), self._get_class_list_v2),
            (subdevice, GPU_GET_PIDS): (_sizes(GPU_GET_PIDS), self._get_pids),
            (subdevice, GPU_GET_PID_INFO): (_sizes(GPU_GET_PID_INFO), self._get_pid_info),
        }

    def release(self) -> None:
        """Close: all clients of this file are freed."""
        for client in self._clients.values():
            self._forget(client, client.root)
        self._clients.clear()

    def _perform(self, task: Task, number: int, raw: bytes) -> bytes:
        escape = self._escapes.get(number)
        if escape is None:
            raise _failed(errno.EINVAL)
        return escape(task, raw)

    # ---------------------------------------------------------------------------- what is not RM

    def _card_info(self, _task: Task, raw: bytes) -> bytes:
        answer = b"".join(gpu.card.pack() for gpu in self._driver.gpus)
        if len(raw) % abi.CardInfo.LAYOUT.size or len(raw) < len(answer):
            raise _failed(errno.EINVAL)
        return answer.ljust(len(raw), b"\0")

    def _check_version(self, _task: Task, raw: bytes) -> bytes:
        if len(raw) != abi.VersionCheck.LAYOUT.size:
            raise _failed(errno.EINVAL)
        asked = abi.VersionCheck.unpack(raw)
        ours = self._driver.options.version.encode()
        if asked.cmd != abi.VersionCheck.QUERY and asked.version.rstrip(b"\0") != ours:
            raise _failed(errno.EINVAL)
        return abi.VersionCheck(asked.cmd, abi.VersionCheck.RECOGNIZED, ours).pack()

    def _sys_params(self, _task: Task, raw: bytes) -> bytes:
        if len(raw) != abi.U64.size:
            raise _failed(errno.EINVAL)
        return abi.U64.pack(_SYS_MEMBLOCK)

    # ---------------------------------------------------------------------------- objects

    def _rm_alloc(self, task: Task, raw: bytes) -> bytes:
        status_at = self._driver.alloc_status.get(len(raw))
        if status_at is None:
            raise _failed(errno.EINVAL)
        answer = bytearray(raw)
        request = abi.RmAlloc.unpack(raw[: abi.RmAlloc.LAYOUT.size])
        try:
            handle = self._alloc(task, request)
            answer[: abi.RmAlloc.LAYOUT.size] = replace(request, new=handle).pack()
            status = Status.OK
        except _RefusedError as error:
            status = error.status
        except MemoryFault:
            status = Status.INVALID_ADDRESS
        abi.U32.pack_into(answer, status_at, status)
        return bytes(answer)

    def _alloc(self, task: Task, request: abi.RmAlloc) -> int:
        if request.class_number in (abi.ROOT, abi.ROOT_NON_PRIV, abi.ROOT_CLIENT):
            root = _Object(self._driver.new_client_handle(), abi.ROOT_CLIENT)
            self._clients[root.handle] = _Client(root, task.process(), {root.handle: root})
            return root.handle
        client = self._client(request.root)
        parent = self._object(client, request.parent)
        handle = request.new or self._generate(client)
        if handle in client.objects:
            raise _RefusedError(Status.INSERT_DUPLICATE_NAME)
        made = self._make(task, parent, handle, request)
        parent.children[handle] = client.objects[handle] = made
        self._book(client, made, 1)
        return handle

    def _make(self, task: Task, parent: _Object, handle: int, request: abi.RmAlloc) -> _Object:
        number, chip = request.class_number, self._driver.options.chip
        engines = (chip.compute, chip.graphics)
        parents = {
            abi.DEVICE: abi.ROOT_CLIENT, abi.SUBDEVICE: abi.DEVICE, abi.MEMORY_LOCAL_USER: abi.DEVICE,
            abi.MPS_COMPUTE: abi.ROOT_CLIENT, chip.channel: abi.DEVICE, **dict.fromkeys(engines, chip.channel),
        }  # fmt: skip
        if number not in parents:
            raise _RefusedError(Status.INVALID_CLASS)
        if parent.class_number != parents[number]:
            raise _RefusedError(Status.INVALID_OBJECT_PARENT)
        made = _Object(handle, number, parent, parent.gpu)
        if number == abi.DEVICE:
            params = self._alloc_params(task, request, abi.DeviceParams.LAYOUT.size, required=True)
            made.gpu = self._gpu_of(task, abi.DeviceParams.unpack(params).device_instance)
        elif number == abi.SUBDEVICE:
            self._alloc_params(task, request, abi.SubdeviceParams.LAYOUT.size, required=False)
        elif number == abi.MEMORY_LOCAL_USER:
            params = self._alloc_params(task, request, abi.MemoryParams.LAYOUT.size, required=True)
            made.size = abi.MemoryParams.unpack(params).size
            if not made.size:
                raise _RefusedError(Status.INVALID_ARGUMENT)
            if parent.gpu is None or made.size > _GPU_MEMORY - sum(parent.gpu.memory.values()):
                raise _RefusedError(Status.NO_MEMORY)
        elif number == chip.channel:
            self._alloc_params(task, request, abi.CHANNEL_PARAMS_SIZE, required=True)
        return made

    def _gpu_of(self, task: Task, instance: int) -> _GpuState:
        if instance >= len(self._driver.gpus):
            raise _RefusedError(Status.INVALID_ARGUMENT)
        gpu = self._driver.gpus[instance]
        if task.process().tgid not in gpu.nodes:
            raise _RefusedError(Status.INSUFFICIENT_PERMISSIONS)
        return gpu

    @staticmethod
    def _alloc_params(task: Task, request: abi.RmAlloc, size: int, *, required: bool) -> bytes:
        if request.params:
            return task.read(request.params, size)
        if required:
            raise _RefusedError(Status.INVALID_ARGUMENT)
        return bytes(size)

    @staticmethod
    def _generate(client: _Client) -> int:
        handle = _FIRST_GENERATED + len(client.objects)
        while handle in client.objects:
            handle += 1
        return handle

    def _rm_free(self, _task: Task, raw: bytes) -> bytes:
        if len(raw) != abi.Nvos00.LAYOUT.size:
            raise _failed(errno.EINVAL)
        request = abi.Nvos00.unpack(raw)
        try:
            client = self._client(request.root)
            freed = client.objects.get(request.old)
            if freed is not None:  # freeing what is not there succeeds
                self._free(client, freed)
            status = Status.OK
        except _RefusedError as error:
            status = error.status
        return replace(request, status=status).pack()

    def _free(self, client: _Client, freed: _Object) -> None:
        self._forget(client, freed)
        if freed.parent is None:
            del self._clients[freed.handle]
        else:
            del freed.parent.children[freed.handle]

    def _forget(self, client: _Client, freed: _Object) -> None:
        for each in freed.subtree():
            self._book(client, each, -1)
            del client.objects[each.handle]

    def _book(self, client: _Client, each: _Object, change: int) -> None:
        if each.class_number == abi.MPS_COMPUTE:
            _count(self._driver.mps, client, change)
        if each.gpu is None:
            return
        _count(each.gpu.holders.setdefault(each.class_number, {}), client.process, change)
        _count(each.gpu.memory, client.process, change * each.size)

    def _client(self, handle: int) -> _Client:
        client = self._clients.get(handle)
        if client is None:
            raise _RefusedError(Status.INVALID_CLIENT)
        return client

    @staticmethod
    def _object(client: _Client, handle: int) -> _Object:
        found = client.objects.get(handle)
        if found is None:
            raise _RefusedError(Status.OBJECT_NOT_FOUND)
        return found

    # ---------------------------------------------------------------------------- controls

    def _rm_control(self, task: Task, raw: bytes) -> bytes:
        if len(raw) != abi.Nvos54.LAYOUT.size:
            raise _failed(errno.EINVAL)
        request = abi.Nvos54.unpack(raw)
        try:
            self._control(task, request)
            status = Status.OK
        except _RefusedError as error:
            status = error.status
        except MemoryFault:
            status = Status.INVALID_ADDRESS
        return replace(request, status=status).pack()

    def _control(self, task: Task, request: abi.Nvos54) -> None:
        no_params, no_size = request.params == 0, request.params_size == 0
        if request.flags or no_params != no_size or request.params_size > _MAX_PARAMS:
            raise _RefusedError(Status.INVALID_ARGUMENT)
        handle = self._object(self._client(request.client), request.handle)
        if request.cmd & _CLASS_MASK == 0:  # neither category nor index: the null command
            return
        row = self._controls.get((handle.class_number, request.cmd))
        if row is None:
            raise _RefusedError(Status.NOT_SUPPORTED)
        sizes, fill = row
        if request.params_size not in sizes:
            raise _RefusedError(Status.INVALID_ARGUMENT)
        params = bytearray(task.read(request.params, request.params_size))
        fill(task, handle, params)
        task.write(request.params, bytes(params))

    def _get_probed_ids(self, _task: Task, _handle: _Object, params: bytearray) -> None:
        params[:] = abi.pack_gpu_ids([gpu.card.gpu_id for gpu in self._driver.gpus], len(params))

    def _get_attached_ids(self, _task: Task, _handle: _Object, params: bytearray) -> None:
        params[:] = abi.pack_gpu_ids([gpu.card.gpu_id for gpu in self._driver.attached()], len(params))

    def _get_id_info(self, _task: Task, _handle: _Object, params: bytearray) -> None:
        gpu_id = abi.IdInfo.unpack(params).gpu_id
        gpu = next((gpu for gpu in self._driver.attached() if gpu.card.gpu_id == gpu_id), None)
        if gpu is None:
            raise _RefusedError(Status.INVALID_ARGUMENT)
        minor = gpu.card.minor
        info = abi.IdInfo(gpu_id, 1, device_instance=minor, board_id=gpu_id, gpu_instance=minor, numa_id=-1)
        params[:] = info.pack()

    def _get_class_list(self, task: Task, _handle: _Object, params: bytearray) -> None:
        asked, classes = abi.ClassList.unpack(params), self._driver.classes
        if asked.pointer:
            if asked.count < len(classes):
                raise _RefusedError(Status.INVALID_PARAM_STRUCT)
            task.write(asked.pointer, abi.pack_words(classes))
        params[:] = replace(asked, count=len(classes)).pack()

    def _get_class_list_v2(self, _task: Task, _handle: _Object, params: bytearray) -> None:
        params[:] = abi.pack_class_list_v2(self._driver.classes)

    def _get_pids(self, task: Task, handle: _Object, params: bytearray) -> None:
        id_type, number = abi.unpack_words(params[:8])
        if id_type not in (abi.PIDS_ID_TYPE_CLASS, abi.PIDS_ID_TYPE_VGPU_GUEST) or handle.gpu is None:
            raise _RefusedError(Status.INVALID_ARGUMENT)
        table = GPU_PIDS.table
        holders = self._holders(handle.gpu, number) if id_type == abi.PIDS_ID_TYPE_CLASS else {}
        pids = list(dict.fromkeys(pid for pid, _ in self._as_seen_by(task, holders)))[: table.capacity]
        answer = abi.pack_words(pids)  # what lies behind stays the caller's own
        params[table.entries : table.entries + len(answer)] = answer
        abi.U32.pack_into(params, table.count or 0, len(pids))

    def _holders(self, gpu: _GpuState, number: int) -> dict[Process, int]:
        chip = self._driver.options.chip
        if number == abi.MPS_COMPUTE:
            return {client.process: 1 for client in self._driver.mps if client.has_device(gpu)}
        # Only engine objects and subdevices make a holder: no process "holds" a class of channels or of memory.
        return gpu.holders.get(number, {}) if number in (abi.SUBDEVICE, chip.compute, chip.graphics) else {}

    def _get_pid_info(self, task: Task, handle: _Object, params: bytearray) -> None:
        table = PID_CONTROLS[GPU_GET_PID_INFO, len(params)].table
        pids = table.pids(params)
        if not pids or handle.gpu is None:
            raise _RefusedError(Status.INVALID_ARGUMENT)
        memory: dict[int, int] = {}
        for pid, size in self._as_seen_by(task, handle.gpu.memory):
            _count(memory, pid, size)
        for index, pid in enumerate(pids):
            start = table.entries + index * table.stride
            (kind,) = abi.U32.unpack_from(params, start + 4)
            refused = pid == 0 or kind != abi.PID_INFO_INDEX_MEMORY
            use = abi.MemoryUse(0 if refused else memory.get(pid, 0), 0, 0).pack()
            result = Status.INVALID_ARGUMENT if refused else Status.OK
            abi.U32.pack_into(params, start + abi.MemoryUse.RESULT, result)
            data, end = start + abi.MemoryUse.OFFSET, start + table.stride
            if table.stride >= _PID_INFO_WITH_TAIL:
                end -= _PID_INFO_ENTRY_TAIL
                params[end : end + _PID_INFO_ENTRY_TAIL] = abi.pack_words([_NO_INSTANCE, _NO_INSTANCE])
            params[data:end] = use.ljust(end - data, b"\0")

    def _as_seen_by(self, task: Task, books: dict[Process, int]) -> Iterable[tuple[int, int]]:
        """The processes' ids as this driver tells them to the task, with what the books say of each."""
        if self._driver.options.era is Era.HOST:
            return [(process.tgid, value) for process, value in books.items()]
        namespace = task.namespace()
        seen = ((dict(process.numbers).get(namespace), value) for process, value in books.items())
        return [(pid, value) for pid, value in seen if pid is not None]


_Control = Callable[[Task, _Object, bytearray], None]


def _sizes(cmd: int) -> tuple[int, ...]:
    return tuple(size for number, size in PID_CONTROLS if number == cmd)
