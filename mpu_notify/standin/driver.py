"""A model of the NVIDIA resource manager, as far as listing the processes of a GPU needs it.

What it answers, to which mistake with which status, and who may use which handle follows the open driver; where
that would set up hardware, this only keeps books. It makes no system call: what it must know of the task that calls
comes through ``Task``.
"""

from __future__ import annotations

import errno
from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping
from dataclasses import replace

from mpu_notify.rm import abi
from mpu_notify.rm.abi import Escape, Status
from mpu_notify.rm.eras import Era
from mpu_notify.standin import nvml, pids
from mpu_notify.standin.model import (
    CHIPS,
    GPU_MEMORY,
    Client,
    GpuState,
    Key,
    MemoryFault,
    Object,
    Options,
    Process,
    RefusedError,
    Row,
    State,
    Task,
    Thread,
    count,
)

__all__ = [
    "CHIPS",
    "MAX_PARAMS",
    "ControlFile",
    "Driver",
    "Era",
    "File",
    "GpuFile",
    "MemoryFault",
    "Options",
    "Process",
    "Thread",
]

_FIRST_GENERATED = 0xCAF00000
MAX_PARAMS = 1 << 20
_CLASS_MASK = 0xFFFF
_SYS_MEMBLOCK = 0x40000000


def _failed(code: int) -> OSError:
    return OSError(code, f"the stand-in driver answers {errno.errorcode[code]}")


class Driver(State):
    """The driver."""

    def __init__(self, options: Options) -> None:
        """With ``options.gpus`` GPUs of one kind on PCI bus 0."""
        super().__init__(options)
        root, device = abi.ROOT_CLIENT, abi.DEVICE
        self.controls: dict[Key, Row] = {
            (root, abi.GPU_GET_PROBED_IDS): Row(abi.PROBED_IDS_SIZES, self._get_probed_ids),
            (root, abi.GPU_GET_ATTACHED_IDS): Row((abi.ATTACHED_IDS_SIZE,), self._get_attached_ids),
            (root, abi.GPU_GET_ID_INFO_V2): Row((abi.IdInfo.LAYOUT.size,), self._get_id_info),
            (device, abi.GPU_GET_CLASSLIST): Row((abi.ClassList.LAYOUT.size,), self._get_class_list),
            (device, abi.GPU_GET_CLASSLIST_V2): Row(abi.CLASSLIST_V2_SIZES, self._get_class_list_v2),
        }
        self.register(pids.controls_for(self))
        self.register(nvml.controls_for(self))

    def register(self, controls: Mapping[Key, Row]) -> None:
        """Have more controls, or others in the place of those that there are."""
        self.controls.update(controls)

    def open_control(self) -> ControlFile:
        """Open the control node."""
        return ControlFile(self)

    def open_gpu(self, minor: int, task: Task) -> GpuFile:
        """Open the node of GPU ``minor``."""
        return GpuFile(self.gpus[minor], task.process())

    def _get_probed_ids(self, _task: Task, _object: Object, params: bytearray) -> None:
        params[:] = abi.pack_gpu_ids([gpu.card.gpu_id for gpu in self.gpus], len(params))

    def _get_attached_ids(self, _task: Task, _object: Object, params: bytearray) -> None:
        params[:] = abi.pack_gpu_ids([gpu.card.gpu_id for gpu in self.attached()], len(params))

    def _get_id_info(self, _task: Task, _object: Object, params: bytearray) -> None:
        gpu_id = abi.IdInfo.unpack(params).gpu_id
        gpu = next((gpu for gpu in self.attached() if gpu.card.gpu_id == gpu_id), None)
        if gpu is None:
            raise RefusedError(Status.INVALID_ARGUMENT)
        minor = gpu.card.minor
        info = abi.IdInfo(gpu_id, 1, device_instance=minor, board_id=gpu_id, gpu_instance=minor, numa_id=-1)
        params[:] = info.pack()

    def _get_class_list(self, task: Task, _object: Object, params: bytearray) -> None:
        asked, classes = abi.ClassList.unpack(params), self.classes
        if asked.pointer:
            if asked.count < len(classes):
                raise RefusedError(Status.INVALID_PARAM_STRUCT)
            task.write(asked.pointer, abi.pack_words(classes))
        params[:] = replace(asked, count=len(classes)).pack()

    def _get_class_list_v2(self, _task: Task, _object: Object, params: bytearray) -> None:
        params[:] = abi.pack_class_list_v2(self.classes, len(params))


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

    def __init__(self, gpu: GpuState, process: Process) -> None:
        """Opened by ``process``, which may then allocate devices of the GPU."""
        self._gpu = gpu
        self._tgid = process.tgid
        count(gpu.nodes, self._tgid, 1)

    def release(self) -> None:
        """Close."""
        count(self._gpu.nodes, self._tgid, -1)

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
        self._clients: dict[int, Client] = {}
        self._escapes: dict[int, Callable[[Task, bytes], bytes]] = {
            Escape.RM_CONTROL: self._rm_control,
            Escape.RM_ALLOC: self._rm_alloc,
            Escape.RM_FREE: self._rm_free,
            Escape.CARD_INFO: self._card_info,
            Escape.CHECK_VERSION_STR: self._check_version,
            Escape.SYS_PARAMS: self._sys_params,
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
        except RefusedError as error:
            status = error.status
        except MemoryFault:
            status = Status.INVALID_ADDRESS
        abi.U32.pack_into(answer, status_at, status)
        return bytes(answer)

    def _alloc(self, task: Task, request: abi.RmAlloc) -> int:
        if request.class_number in (abi.ROOT, abi.ROOT_NON_PRIV, abi.ROOT_CLIENT):
            root = Object(self._driver.new_client_handle(), abi.ROOT_CLIENT)
            client = Client(root, task.process(), task.thread(), {root.handle: root})
            root.client = self._clients[root.handle] = client
            return root.handle
        client = self._client(request.root)
        parent = self._object(client, request.parent)
        handle = request.new or self._generate(client)
        if handle in client.objects:
            raise RefusedError(Status.INSERT_DUPLICATE_NAME)
        made = self._make(task, parent, handle, request)
        made.client = client
        parent.children[handle] = client.objects[handle] = made
        self._driver.book(client, made, 1)
        return handle

    def _make(self, task: Task, parent: Object, handle: int, request: abi.RmAlloc) -> Object:
        number, chip = request.class_number, self._driver.options.chip
        engines = (chip.compute, chip.graphics)
        parents = {
            abi.DEVICE: abi.ROOT_CLIENT, abi.SUBDEVICE: abi.DEVICE, abi.MEMORY_LOCAL_USER: abi.DEVICE,
            abi.MPS_COMPUTE: abi.ROOT_CLIENT, chip.channel: abi.DEVICE, **dict.fromkeys(engines, chip.channel),
            abi.NVENC_SW_SESSION: abi.DEVICE, abi.NVFBC_SW_SESSION: abi.DEVICE, abi.PROFILER: abi.SUBDEVICE,
        }  # fmt: skip
        if number not in parents:
            raise RefusedError(Status.INVALID_CLASS)
        if parent.class_number != parents[number]:
            raise RefusedError(Status.INVALID_OBJECT_PARENT)
        made = Object(handle, number, parent, parent.gpu)
        if number == abi.DEVICE:
            params = self._alloc_params(task, request, abi.DeviceParams.LAYOUT.size, required=True)
            made.gpu = self._gpu_of(task, abi.DeviceParams.unpack(params).device_instance)
        elif number == abi.SUBDEVICE:
            self._alloc_params(task, request, abi.SubdeviceParams.LAYOUT.size, required=False)
        elif number == abi.MEMORY_LOCAL_USER:
            params = self._alloc_params(task, request, abi.MemoryParams.LAYOUT.size, required=True)
            made.size = abi.MemoryParams.unpack(params).size
            if not made.size:
                raise RefusedError(Status.INVALID_ARGUMENT)
            if parent.gpu is None or made.size > GPU_MEMORY - sum(parent.gpu.memory.values()):
                raise RefusedError(Status.NO_MEMORY)
        elif number == chip.channel:
            self._alloc_params(task, request, abi.CHANNEL_PARAMS_SIZE, required=True)
        return made

    def _gpu_of(self, task: Task, instance: int) -> GpuState:
        if instance >= len(self._driver.gpus):
            raise RefusedError(Status.INVALID_ARGUMENT)
        gpu = self._driver.gpus[instance]
        if task.process().tgid not in gpu.nodes:
            raise RefusedError(Status.INSUFFICIENT_PERMISSIONS)
        return gpu

    @staticmethod
    def _alloc_params(task: Task, request: abi.RmAlloc, size: int, *, required: bool) -> bytes:
        if request.params:
            return task.read(request.params, size)
        if required:
            raise RefusedError(Status.INVALID_ARGUMENT)
        return bytes(size)

    @staticmethod
    def _generate(client: Client) -> int:
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
        except RefusedError as error:
            status = error.status
        return replace(request, status=status).pack()

    def _free(self, client: Client, freed: Object) -> None:
        self._forget(client, freed)
        if freed.parent is None:
            del self._clients[freed.handle]
        else:
            del freed.parent.children[freed.handle]

    def _forget(self, client: Client, freed: Object) -> None:
        for each in freed.subtree():
            self._driver.book(client, each, -1)
            del client.objects[each.handle]

    def _client(self, handle: int) -> Client:
        client = self._clients.get(handle)
        if client is None:
            raise RefusedError(Status.INVALID_CLIENT)
        return client

    @staticmethod
    def _object(client: Client, handle: int) -> Object:
        found = client.objects.get(handle)
        if found is None:
            raise RefusedError(Status.OBJECT_NOT_FOUND)
        return found

    # ---------------------------------------------------------------------------- controls

    def _rm_control(self, task: Task, raw: bytes) -> bytes:
        if len(raw) != abi.Nvos54.LAYOUT.size:
            raise _failed(errno.EINVAL)
        request = abi.Nvos54.unpack(raw)
        try:
            self._control(task, request)
            status = Status.OK
        except RefusedError as error:
            status = error.status
        except MemoryFault:
            status = Status.INVALID_ADDRESS
        return replace(request, status=status).pack()

    def _control(self, task: Task, request: abi.Nvos54) -> None:
        no_params, no_size = request.params == 0, request.params_size == 0
        if request.flags or no_params != no_size or request.params_size > MAX_PARAMS:
            raise RefusedError(Status.INVALID_ARGUMENT)
        handle = self._object(self._client(request.client), request.handle)
        if request.cmd & _CLASS_MASK == 0:  # neither category nor index: the null command
            return
        row = self._driver.controls.get((handle.class_number, request.cmd))
        if row is None:
            raise RefusedError(Status.NOT_SUPPORTED)
        if request.params_size not in row.sizes:
            raise RefusedError(Status.INVALID_ARGUMENT)
        params = bytearray(task.read(request.params, request.params_size))
        row.fill(task, handle, params)
        task.write(request.params, bytes(params))
