"""The controls of the stand-in that carry process ids, as the driver of each era performs them, mistakes included.

Which id a driver tells, and of whom it knows, follows ``gpu_rmapi.c``, ``kern_perf_ctrl.c``, ``gpu_acct.c`` and
``client_resource.c`` of the open driver; a client is known by the process and by the thread that made it.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from types import MappingProxyType

from mpu_notify.rm import abi, controls
from mpu_notify.rm.abi import U32, U64, Status
from mpu_notify.rm.controls import (
    ACCOUNTING_PIDS,
    CONTROL_TABLE,
    GPU_PIDS,
    NVENC_SESSIONS,
    NVFBC_SESSIONS,
    PidTable,
)
from mpu_notify.rm.eras import Era
from mpu_notify.standin.model import Client, GpuState, Key, Object, Record, RefusedError, Row, State, Task, count

_NO_INSTANCE = 0xFFFFFFFF  # not a MIG instance

#: Per cent of an engine's time, of a process that uses it at all: fb, gr, nvenc, and what nobody uses.
UTILISATION: Mapping[int, int] = MappingProxyType({0: 3, 1: 50, 2: 7})
_NVENC_ENGINE = 2
_KERNEL_MEMORY = 0xFFFF888000000000
_STRUCT_PID_SIZE = 0x80
_SAMPLE_NS = 200_000_000
_ENCODED = (1920, 1080, 30, 100)  # width, height, frames a second, latency in us


def _sizes_of(cmd: int) -> tuple[int, ...]:
    return tuple(controls.sizes_of(cmd))


def _table_of(cmd: int, params: bytearray) -> PidTable:
    return CONTROL_TABLE[cmd, len(params)].table


def _gpu_of(handle: Object) -> GpuState:
    if handle.gpu is None:
        raise RefusedError(Status.INVALID_ARGUMENT)
    return handle.gpu


def _is_in_initial(task: Task) -> bool:
    return len(task.process().numbers) == 1


def _named(era: Era, client: Client, namespace: int) -> int | None:
    """The id of a client that a driver which knows namespaces tells there."""
    return (client.process if era is Era.NATIVE else client.thread).in_namespace(namespace)


class PidControls:
    """Performs them on a driver's state."""

    def __init__(self, state: State) -> None:
        """Knows nothing but the state."""
        self._state = state
        self._era = state.options.era

    def rows(self) -> Mapping[Key, Row]:
        """All of them."""
        subdevice = {
            controls.GPU_GET_PIDS: self.get_pids,
            controls.GPU_GET_PID_INFO: self.get_pid_info,
            controls.PERF_GET_GPUMON_PERFMON_UTIL_SAMPLES_V2: self.get_samples,
            controls.GPU_GET_NVENC_SW_SESSION_INFO: self.get_encoders,
            controls.GPU_GET_NVENC_SW_SESSION_INFO_V2: self.get_encoders_inline,
            controls.GPU_GET_NVENC_SW_SESSION_INFO_V2_525: self.get_encoders_inline,
            controls.GPU_GET_NVFBC_SW_SESSION_INFO: self.get_captures,
        }
        root = {
            controls.GPUACCT_GET_ACCOUNTING_PIDS: self.get_accounted,
            controls.GPUACCT_GET_PROC_ACCOUNTING_INFO: self.get_account,
        }
        rows = {(abi.SUBDEVICE, cmd): Row(_sizes_of(cmd), fill) for cmd, fill in subdevice.items()}
        rows |= {(abi.ROOT_CLIENT, cmd): Row(_sizes_of(cmd), fill) for cmd, fill in root.items()}
        cmd = controls.HWPM_GET_RESERVATION_INFO
        rows[abi.PROFILER, cmd] = Row(_sizes_of(cmd), self.get_reservation)
        rows[abi.PROFILER, abi.HWPM_RESERVE] = Row((1,), self.reserve)
        return rows

    # ---------------------------------------------------------------------------- who uses the GPU

    def get_pids(self, task: Task, handle: Object, params: bytearray) -> None:
        """GPU_GET_PIDS. Repeats are told by the host's process id among what is listed, whatever that is."""
        id_type, number = abi.unpack_words(params[:8])
        if id_type not in (abi.PIDS_ID_TYPE_CLASS, abi.PIDS_ID_TYPE_VGPU_GUEST):
            raise RefusedError(Status.INVALID_ARGUMENT)
        gpu = _gpu_of(handle)
        table = GPU_PIDS.table
        pids: list[int] = []
        for client in self._holders(gpu, number) if id_type == abi.PIDS_ID_TYPE_CLASS else ():
            tgid = client.process.tgid
            pid = tgid if self._era is Era.HOST else _named(self._era, client, task.namespace())
            if tgid not in pids and pid is not None:
                pids.append(pid)
        del pids[table.capacity :]
        answer = abi.pack_words(pids)  # what lies behind stays the caller's own
        params[table.entries : table.entries + len(answer)] = answer
        U32.pack_into(params, table.count or 0, len(pids))

    def _holders(self, gpu: GpuState, number: int) -> Iterable[Client]:
        chip = self._state.options.chip
        if number == abi.MPS_COMPUTE:
            return [client for client in self._state.mps if client.has_device(gpu)]
        # Only engine objects and subdevices make a holder: no process "holds" a class of channels or of memory.
        return gpu.clients_of(number) if number in (abi.SUBDEVICE, chip.compute, chip.graphics) else ()

    def get_pid_info(self, task: Task, handle: Object, params: bytearray) -> None:
        """GPU_GET_PID_INFO: of all clients that have this id."""
        table = _table_of(controls.GPU_GET_PID_INFO, params)
        pids, gpu = table.pids(params), _gpu_of(handle)
        if not pids:
            raise RefusedError(Status.INVALID_ARGUMENT)
        memory: dict[int, int] = {}
        for client, size in gpu.memory.items():
            pid = client.process.tgid
            if self._era not in (Era.HOST, Era.THREAD_LIST):
                pid = _named(self._era, client, task.namespace()) or 0
            count(memory, pid, size)
        for index, pid in enumerate(pids):
            start = table.entries + index * table.stride
            (kind,) = U32.unpack_from(params, start + 4)
            refused = pid == 0 or kind != abi.PID_INFO_INDEX_MEMORY
            use = abi.MemoryUse(0 if refused else memory.get(pid, 0), 0, 0).pack()
            U32.pack_into(params, start + abi.MemoryUse.RESULT, Status.INVALID_ARGUMENT if refused else Status.OK)
            data, end = start + abi.MemoryUse.OFFSET, start + (table.subscription or table.stride)
            params[data:end] = use.ljust(end - data, b"\0")
            if table.subscription is not None:
                params[end : end + 8] = abi.pack_words([_NO_INSTANCE, _NO_INSTANCE])

    # ---------------------------------------------------------------------------- utilisation

    def get_samples(self, task: Task, handle: Object, params: bytearray) -> None:
        """The utilisation samples: one for each process that has a context, and of nobody before these."""
        row = CONTROL_TABLE[controls.PERF_GET_GPUMON_PERFMON_UTIL_SAMPLES_V2, len(params)]
        gpu, capacity, size = _gpu_of(handle), row.table.capacity, row.table.stride
        (room,) = U32.unpack_from(params, 4)
        if room > capacity * size:
            raise RefusedError(Status.BUFFER_TOO_SMALL)
        chip = self._state.options.chip
        users = {client.process.tgid: client for client in gpu.clients_of(chip.compute, chip.graphics)}
        encoding = {client.process.tgid for client in gpu.clients_of(abi.NVENC_SW_SESSION)}
        samples = [None] * max(0, capacity - len(users)) + list(users.values())[:capacity]
        for index, client in enumerate(samples):
            U64.pack_into(params, 16 + index * size, _SAMPLE_NS * (index + 1))
            for engine, table in enumerate(row.tables):
                table.empty(params, index)
                U32.pack_into(params, table.entries + size * index + 4, 1)  # vgpuScale
                encodes = client is not None and client.process.tgid in encoding
                if client is not None and (engine < _NVENC_ENGINE or (engine == _NVENC_ENGINE and encodes)):
                    self._fill_engine(table, params, index, (*self._sampled(task, client), UTILISATION[engine]))
        U32.pack_into(params, 12, capacity * size)  # tracker

    @staticmethod
    def _fill_engine(table: PidTable, params: bytearray, index: int, use: tuple[int, int, int]) -> None:
        pid, address, utilisation = use
        start = table.entries + table.stride * index
        U32.pack_into(params, start, utilisation)
        table.put(params, index, pid)
        if table.kernel_address is not None:
            U64.pack_into(params, start + table.kernel_address, address)

    def _sampled(self, task: Task, client: Client) -> tuple[int, int]:
        """The id and the pOsPidInfo of a process in a sample."""
        host = client.process.tgid
        if self._era not in (Era.THREAD_ALL, Era.NATIVE):
            return host, 0
        address = _KERNEL_MEMORY + _STRUCT_PID_SIZE * host
        if self._era is Era.NATIVE and _is_in_initial(task):
            return host, address
        pid = _named(self._era, client, task.namespace())
        return (host, address) if pid is None else (pid, 0)

    # ---------------------------------------------------------------------------- accounting

    def get_accounted(self, task: Task, _handle: Object, params: bytearray) -> None:
        """GPUACCT_GET_ACCOUNTING_PIDS, which never says who of these is dead."""
        gpu = self._gpu_by_id(params)
        pids = list(self._accounted(task, gpu))
        if self._era not in (Era.THREAD_ALL, Era.NATIVE) or _is_in_initial(task):
            pids += [record.client.process.tgid for record in gpu.accounted_dead]
        ACCOUNTING_PIDS.table.replace(params, pids[: ACCOUNTING_PIDS.table.capacity])

    def _accounted(self, task: Task, gpu: GpuState) -> Iterator[int]:
        for tgid, record in gpu.accounted.items():
            pid = _named(self._era, record.client, task.namespace()) if self._era is Era.THREAD_ALL else tgid
            if pid is not None:
                yield pid

    def get_account(self, task: Task, _handle: Object, params: bytearray) -> None:
        """GPUACCT_GET_PROC_ACCOUNTING_INFO, which says whom it took the number for."""
        gpu = self._gpu_by_id(params)
        (asked,) = U32.unpack_from(params, 4)
        tgid = self._meant(task, gpu, asked)
        dead: Iterable[Record] = (each for each in gpu.accounted_dead if each.client.process.tgid == tgid)
        record = gpu.accounted.get(tgid) or next(iter(dead), None)
        if record is None:
            raise RefusedError(Status.OBJECT_NOT_FOUND)
        U32.pack_into(params, 4, tgid)
        params[12:24] = abi.pack_words([UTILISATION[1], UTILISATION[0], 0])
        for at, value in ((24, record.most_memory), (32, record.started), (40, record.ended)):
            U64.pack_into(params, at, value)

    def _meant(self, task: Task, gpu: GpuState, asked: int) -> int:
        if self._era in (Era.THREAD_ALL, Era.NATIVE):
            for tgid, record in gpu.accounted.items():
                if _named(self._era, record.client, task.namespace()) == asked:
                    return tgid
        return asked

    def _gpu_by_id(self, params: bytearray) -> GpuState:
        (gpu_id,) = U32.unpack_from(params, 0)
        gpu = next((gpu for gpu in self._state.attached() if gpu.card.gpu_id == gpu_id), None)
        if gpu is None:
            raise RefusedError(Status.INVALID_ARGUMENT)
        return gpu

    # ---------------------------------------------------------------------------- sessions and reservations

    def get_encoders(self, task: Task, handle: Object, params: bytearray) -> None:
        """GPU_GET_NVENC_SW_SESSION_INFO: the count, and the table where there is a pointer to one."""
        pointer = NVENC_SESSIONS.pointer
        assert pointer is not None  # noqa: S101 - the table says so
        (room,), (address,) = U32.unpack_from(params, 0), U64.unpack_from(params, pointer.at)
        entries = self._encoders(_gpu_of(handle))
        if room != (pointer.capacity if address else 0) and (entries or not address):
            raise RefusedError(Status.INVALID_ARGUMENT)
        if address and room == pointer.capacity:
            task.write(address, b"".join(entries).ljust(pointer.size, b"\0"))
        U32.pack_into(params, 0, len(entries))

    def get_encoders_inline(self, _task: Task, handle: Object, params: bytearray) -> None:
        """GPU_GET_NVENC_SW_SESSION_INFO_V2: the same in the params."""
        entries = self._encoders(_gpu_of(handle))
        params[:] = (U32.pack(len(entries)) + b"".join(entries)).ljust(len(params), b"\0")

    def _encoders(self, gpu: GpuState) -> list[bytes]:
        capacity = NVENC_SESSIONS.table.capacity
        return [
            abi.pack_words([_tgid(each), 0, each.session, 0, *_ENCODED])
            for each in gpu.sessions
            if each.class_number == abi.NVENC_SW_SESSION
        ][:capacity]

    def get_captures(self, _task: Task, handle: Object, params: bytearray) -> None:
        """GPU_GET_NVFBC_SW_SESSION_INFO."""
        found = [each for each in _gpu_of(handle).sessions if each.class_number == abi.NVFBC_SW_SESSION]
        entries = [
            abi.pack_words([_tgid(each), 0, 0, each.session, 1, 0, 0, *_ENCODED[:2], *_ENCODED])
            for each in found[: NVFBC_SESSIONS.table.capacity]
        ]
        params[:] = (U32.pack(len(entries)) + b"".join(entries)).ljust(len(params), b"\0")

    def reserve(self, _task: Task, handle: Object, _params: bytearray) -> None:
        """HWPM_RESERVE: one at a time."""
        gpu = _gpu_of(handle)
        if gpu.reservation is not None:
            raise RefusedError(Status.INSUFFICIENT_RESOURCES)
        gpu.reservation = handle

    def get_reservation(self, _task: Task, handle: Object, params: bytearray) -> None:
        """HWPM_GET_RESERVATION_INFO: how many there are, and whose."""
        holder = _gpu_of(handle).reservation
        params[:] = abi.pack_words([0, 0, 0] if holder is None else [1, _tgid(holder), 0])


def _tgid(each: Object) -> int:
    assert each.client is not None  # noqa: S101 - it was allocated by one
    return each.client.process.tgid


def controls_for(state: State) -> Mapping[Key, Row]:
    """The controls, on a driver's state."""
    return PidControls(state).rows()
