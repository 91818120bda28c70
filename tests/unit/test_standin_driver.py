"""The stand-in's model of the driver, strictness above all, without a kernel: a caller is a dict of its memory."""

from __future__ import annotations

import contextlib
import errno
import struct
from dataclasses import dataclass, field

import pytest
from hypothesis import given
from hypothesis import strategies as st

from mpu_notify.rm import abi
from mpu_notify.rm.abi import Escape, Status
from mpu_notify.standin.driver import CHIPS, ControlFile, Driver, Era, File, MemoryFault, Options, Process, Thread

HOST, INNER, INNERMOST = 100, 200, 300  # PID namespaces
HOPPER = CHIPS["hopper"]
GET_PIDS, GET_PID_INFO = 0x2080018D, 0x2080018E
DEVICE, SUBDEVICE, CHANNEL = 0x10, 0x11, 0x12
PARAMS, OUTER = 0x1000, 0x9000


@dataclass
class FakeTask:
    """A task whose memory is a few pages; those in ``read_only`` cannot be written."""

    tgid: int = 500
    numbers: tuple[tuple[int, int], ...] = ((HOST, 500),)
    pages: dict[int, bytearray] = field(default_factory=dict)
    read_only: frozenset[int] = frozenset()
    thread_numbers: tuple[tuple[int, int], ...] | None = None  # None: those of the process's first thread

    def _page(self, address: int, size: int) -> tuple[int, int]:
        for base, page in self.pages.items():
            if base <= address and address + size <= base + len(page):
                return base, address - base
        raise MemoryFault

    def read(self, address: int, size: int) -> bytes:
        base, offset = self._page(address, size)
        return bytes(self.pages[base][offset : offset + size])

    def write(self, address: int, data: bytes) -> None:
        base, offset = self._page(address, len(data))
        if base in self.read_only:
            raise MemoryFault
        self.pages[base][offset : offset + len(data)] = data

    def process(self) -> Process:
        return Process(self.tgid, self.numbers)

    def thread(self) -> Thread:
        if self.thread_numbers is None:
            return Thread(self.tgid, self.numbers)
        return Thread(self.thread_numbers[-1][1], self.thread_numbers)

    def namespace(self) -> int:
        return self.numbers[0][0]


def call(file: File, task: FakeTask, escape: int, raw: bytes) -> bytes:
    answer = file.ioctl(task, abi.ioctl_number(escape, len(raw)), OUTER, raw)
    assert answer is not None
    assert len(answer) == len(raw)
    return answer


@dataclass
class Session:
    """A task with the control node and one GPU node open, and a client."""

    driver: Driver
    task: FakeTask
    file: ControlFile = field(init=False)
    client: int = field(init=False)

    def __post_init__(self) -> None:
        self.gpu_file = self.driver.open_gpu(0, self.task)
        self.file = self.driver.open_control()
        status, self.client = self.alloc(0, 0, 0, abi.ROOT_CLIENT)
        assert status == 0

    def alloc(self, root: int, parent: int, new: int, number: int, params: bytes = b"") -> tuple[int, int]:
        if params:
            self.task.pages[PARAMS] = bytearray(params)
        raw = abi.RmAlloc(root, parent, new, number, PARAMS if params else 0).pack().ljust(32, b"\0")
        answer = call(self.file, self.task, Escape.RM_ALLOC, raw)
        return struct.unpack_from("<I", answer, 28)[0], abi.RmAlloc.unpack(answer[:24]).new

    def open_gpu(self) -> None:
        assert self.alloc(self.client, self.client, DEVICE, abi.DEVICE, bytes(56)) == (0, DEVICE)
        assert self.alloc(self.client, DEVICE, SUBDEVICE, abi.SUBDEVICE, bytes(4)) == (0, SUBDEVICE)

    def compute(self, memory: int = 0) -> None:
        self.open_gpu()
        assert self.alloc(self.client, DEVICE, CHANNEL, HOPPER.channel, bytes(abi.CHANNEL_PARAMS_SIZE))[0] == 0
        assert self.alloc(self.client, CHANNEL, 0, HOPPER.compute)[0] == 0
        if memory:
            assert self.alloc(self.client, DEVICE, 0, 0x40, abi.MemoryParams(memory).pack())[0] == 0

    def control(  # noqa: PLR0913 - each is something to get wrong
        self, handle: int, cmd: int, params: bytes, *, flags: int = 0, size: int | None = None, at: int = PARAMS
    ) -> int:
        self.task.pages[PARAMS] = bytearray(params)
        request = abi.Nvos54(self.client, handle, cmd, flags, at, len(params) if size is None else size)
        answer = abi.Nvos54.unpack(call(self.file, self.task, Escape.RM_CONTROL, request.pack()))
        return answer.status

    def params(self) -> bytes:
        return bytes(self.task.pages[PARAMS])

    def pids(self, number: int) -> list[int]:
        assert self.control(SUBDEVICE, GET_PIDS, struct.pack("<II", 0, number).ljust(3812, b"\xaa")) == 0
        (count,) = struct.unpack_from("<I", self.params(), 8)
        assert self.params()[12 + 4 * count :] == b"\xaa" * (3800 - 4 * count)
        return list(struct.unpack_from(f"<{count}I", self.params(), 12))

    def info(self, pid: int, size: int = 14408, index: int = 0) -> tuple[int, int]:
        params = struct.pack("<IIII", 1, 0, pid, index).ljust(size, b"\xbb")
        assert self.control(SUBDEVICE, GET_PID_INFO, params) == 0
        result, memory = struct.unpack_from("<I4xQ", self.params(), 16)
        return result, memory

    def free(self, handle: int, root: int | None = None) -> int:
        raw = abi.Nvos00(self.client if root is None else root, 0, handle).pack()
        return abi.Nvos00.unpack(call(self.file, self.task, Escape.RM_FREE, raw)).status


@pytest.fixture
def driver() -> Driver:
    return Driver(Options())


@pytest.fixture
def session(driver: Driver) -> Session:
    return Session(driver, FakeTask())


def errno_of(file: File, task: FakeTask, cmd: int, raw: bytes) -> int | None:
    with pytest.raises(OSError, match="stand-in") as caught:
        file.ioctl(task, cmd, OUTER, raw)
    return caught.value.errno


# ---------------------------------------------------------------------------- who is listed


def test_a_process_is_listed_by_what_it_holds(session: Session) -> None:
    session.open_gpu()
    assert session.pids(abi.SUBDEVICE) == [500]
    assert session.pids(HOPPER.compute) == []
    assert session.alloc(session.client, DEVICE, CHANNEL, HOPPER.channel, bytes(304))[0] == 0
    assert session.pids(HOPPER.channel) == []
    assert session.alloc(session.client, CHANNEL, 0x20, HOPPER.compute)[0] == 0
    assert session.pids(HOPPER.compute) == [500]
    assert session.pids(HOPPER.graphics) == []
    assert session.alloc(session.client, DEVICE, 0x21, abi.MPS_COMPUTE)[0] == Status.INVALID_OBJECT_PARENT
    assert session.alloc(session.client, session.client, 0x21, abi.MPS_COMPUTE)[0] == 0
    assert session.pids(abi.MPS_COMPUTE) == [500]


def test_several_clients_are_one_entry_with_all_the_memory(driver: Driver) -> None:
    asker = Session(driver, FakeTask(501, ((HOST, 501),)))
    asker.open_gpu()
    user = FakeTask()
    for _ in range(3):
        Session(driver, user).compute(1 << 20)
    assert asker.pids(HOPPER.compute) == [500]
    assert asker.info(500) == (0, 3 << 20)
    assert asker.info(501) == (0, 0)


def test_nine_hundred_and_fifty_at_most(driver: Driver, session: Session) -> None:
    session.open_gpu()
    for tgid in range(1000, 2000):
        Session(driver, FakeTask(tgid, ((HOST, tgid),))).compute()
    assert session.pids(HOPPER.compute) == list(range(1000, 1950))


def test_an_mps_client_is_listed_where_it_has_a_device(driver: Driver) -> None:
    asker = Session(driver, FakeTask(501, ((HOST, 501),)))
    asker.open_gpu()
    user = Session(driver, FakeTask())
    assert user.alloc(user.client, user.client, 0x21, abi.MPS_COMPUTE)[0] == 0
    assert asker.pids(abi.MPS_COMPUTE) == []
    user.open_gpu()
    assert asker.pids(abi.MPS_COMPUTE) == [500]
    assert user.free(0x21) == 0
    assert asker.pids(abi.MPS_COMPUTE) == []


def test_other_gpu_is_another_list() -> None:
    driver = Driver(Options(gpus=2))
    session = Session(driver, FakeTask())
    session.compute()
    assert session.alloc(session.client, session.client, 0x50, abi.DEVICE, struct.pack("<I52x", 1))[0] == 0x1B
    driver.open_gpu(1, session.task)
    assert session.alloc(session.client, session.client, 0x50, abi.DEVICE, struct.pack("<I52x", 1))[0] == 0
    assert session.alloc(session.client, 0x50, 0x51, abi.SUBDEVICE)[0] == 0
    params = struct.pack("<II", 0, HOPPER.compute).ljust(3812, b"\0")
    assert session.control(0x51, GET_PIDS, params) == 0
    assert struct.unpack_from("<I", session.params(), 8) == (0,)


def test_memory_ends(session: Session) -> None:
    session.compute(100 << 30)
    params = abi.MemoryParams(100 << 30).pack()
    assert session.alloc(session.client, DEVICE, 0, abi.MEMORY_LOCAL_USER, params)[0] == Status.NO_MEMORY
    huge = abi.MemoryParams((1 << 64) - 1).pack()
    assert session.alloc(session.client, DEVICE, 0, abi.MEMORY_LOCAL_USER, huge)[0] == Status.NO_MEMORY
    assert session.info(500) == (0, 100 << 30)


def test_freeing_takes_off_the_list(session: Session) -> None:
    session.compute(7 << 20)
    assert session.info(500) == (0, 7 << 20)
    assert session.free(CHANNEL) == 0
    assert session.pids(HOPPER.compute) == []
    assert session.info(500) == (0, 7 << 20)
    assert session.free(CHANNEL) == 0
    assert session.free(DEVICE) == 0
    assert session.control(SUBDEVICE, GET_PIDS, bytes(3812)) == Status.OBJECT_NOT_FOUND
    assert session.free(session.client) == 0
    assert session.free(session.client) == Status.INVALID_CLIENT


def test_release_frees_all_clients_of_the_file(driver: Driver, session: Session) -> None:
    asker = Session(driver, FakeTask(501, ((HOST, 501),)))
    asker.open_gpu()
    session.compute(1 << 20)
    assert asker.pids(abi.SUBDEVICE) == [501, 500]
    session.file.release()
    assert asker.pids(abi.SUBDEVICE) == [501]
    assert asker.info(500) == (0, 0)


# ---------------------------------------------------------------------------- process ids by era


def nested(driver: Driver) -> tuple[Session, Session, Session]:
    """A process on the host, one in a namespace, one in a namespace within that one; all compute."""
    host = Session(driver, FakeTask())
    inner = Session(driver, FakeTask(600, ((INNER, 6), (HOST, 600))))
    innermost = Session(driver, FakeTask(700, ((INNERMOST, 1), (INNER, 7), (HOST, 700))))
    for number, each in enumerate((host, inner, innermost), start=1):
        each.compute(number << 20)
    return host, inner, innermost


def test_host_era_tells_host_ids_to_everybody() -> None:
    for each in nested(Driver(Options(Era.HOST))):
        assert each.pids(HOPPER.compute) == [500, 600, 700]
        assert each.info(700) == (0, 3 << 20)
        assert each.info(7) == (0, 0)


def test_native_era_tells_what_the_caller_can_see() -> None:
    host, inner, innermost = nested(Driver(Options(Era.NATIVE)))
    assert host.pids(HOPPER.compute) == [500, 600, 700]
    assert inner.pids(HOPPER.compute) == [6, 7]
    assert innermost.pids(HOPPER.compute) == [1]
    assert inner.info(7) == (0, 3 << 20)
    assert inner.info(500) == (0, 0)
    assert inner.info(700) == (0, 0)
    assert innermost.info(1) == (0, 3 << 20)


def threaded(driver: Driver) -> tuple[Session, Session, Session]:
    """On the host; in a namespace, with a client by its first thread and one by another; and beside the first again."""
    host = Session(driver, FakeTask())
    numbers = ((INNER, 6), (HOST, 600))
    first = Session(driver, FakeTask(600, numbers))
    other = Session(driver, FakeTask(600, numbers, thread_numbers=((INNER, 8), (HOST, 608))))
    for number, each in enumerate((host, first, other), start=1):
        each.compute(number << 20)
    return host, first, other


@pytest.mark.parametrize("era", [Era.THREAD_LIST, Era.THREAD_BOTH, Era.THREAD_ALL])
def test_thread_eras_list_the_threads_that_made_a_client(era: Era) -> None:
    host, inner, _ = threaded(Driver(Options(era)))
    assert inner.pids(HOPPER.compute) == [6, 8]
    assert host.pids(HOPPER.compute) == [500, 600], "the host's id of a process tells a repeat only there"


def test_the_thread_list_era_is_asked_about_host_pids() -> None:
    _, inner, _ = threaded(Driver(Options(Era.THREAD_LIST)))
    assert inner.info(600) == (0, 5 << 20)
    assert inner.info(6) == inner.info(8) == (0, 0), "what it listed has no memory"


@pytest.mark.parametrize("era", [Era.THREAD_BOTH, Era.THREAD_ALL])
def test_the_later_thread_eras_are_asked_about_threads(era: Era) -> None:
    host, inner, _ = threaded(Driver(Options(era)))
    assert (inner.info(6), inner.info(8), inner.info(600)) == ((0, 2 << 20), (0, 3 << 20), (0, 0))
    assert (host.info(600), host.info(608)) == ((0, 2 << 20), (0, 3 << 20))


def test_a_native_driver_lists_a_process_with_two_clients_twice_in_a_namespace() -> None:
    host, inner, _ = threaded(Driver(Options(Era.NATIVE)))
    assert inner.pids(HOPPER.compute) == [6, 6]
    assert host.pids(HOPPER.compute) == [500, 600]


def test_a_native_driver_never_lists_a_process_whose_host_pid_was_listed_for_another() -> None:
    driver = Driver(Options(Era.NATIVE))
    early = Session(driver, FakeTask(900, ((INNER, 77), (HOST, 900))))
    unlucky = Session(driver, FakeTask(77, ((INNER, 5), (HOST, 77))))
    early.compute()
    unlucky.compute()
    assert early.pids(HOPPER.compute) == [77]


SAMPLES, ACCOUNT, ACCOUNTED, ENCODERS, ENCODERS_2 = 0x20802096, 0xB03, 0xB04, 0x2080016E, 0x208001AF
CAPTURES, RESERVE, RESERVATION = 0x2080017C, 0x90CC0101, 0x90CC0103
GPU_ID = 6


def sampled(session: Session) -> set[tuple[int, bool]]:
    """Process ids of the frame buffer's samples, and whether each has a kernel address."""
    params = struct.pack("<4I", 2, 72 * 776, 0, 0).ljust(55888, b"\xee")
    assert session.control(SUBDEVICE, SAMPLES, params) == 0
    found = (struct.unpack_from("<I108xQ", session.params(), 32 + 776 * index) for index in range(72))
    return {(pid, address != 0) for pid, address in found if pid != 0xFFFFFFFF}


@pytest.mark.parametrize(
    ("era", "on_host", "inside"),
    [
        (Era.HOST, {(500, False), (600, False)}, {(500, False), (600, False)}),
        (Era.THREAD_LIST, {(500, False), (600, False)}, {(500, False), (600, False)}),
        (Era.THREAD_BOTH, {(500, False), (600, False)}, {(500, False), (600, False)}),
        (Era.THREAD_ALL, {(500, False), (608, False)}, {(500, True), (8, False)}),
        (Era.NATIVE, {(500, True), (600, True)}, {(500, True), (6, False)}),
    ],
)
def test_utilisation_samples_by_era(era: Era, on_host: set[tuple[int, bool]], inside: set[tuple[int, bool]]) -> None:
    host, inner, _ = threaded(Driver(Options(era)))
    assert sampled(host) == on_host
    assert sampled(inner) == inside, "of a process outside the host's PID and the kernel's address"


def test_samples_want_no_more_room_than_there_is(session: Session) -> None:
    session.compute()
    params = struct.pack("<4I", 2, 72 * 776 + 1, 0, 0).ljust(55888, b"\0")
    assert session.control(SUBDEVICE, SAMPLES, params) == Status.BUFFER_TOO_SMALL


def accounted(session: Session) -> list[int]:
    assert session.control(session.client, ACCOUNTED, struct.pack("<I", GPU_ID).ljust(16012, b"\0")) == 0
    (count,) = struct.unpack_from("<I", session.params(), 16008)
    return list(struct.unpack_from(f"<{count}I", session.params(), 8))


def account(session: Session, pid: int) -> tuple[int, int] | int:
    """The process id that comes back and the most memory; or the status."""
    status = session.control(session.client, ACCOUNT, struct.pack("<II", GPU_ID, pid).ljust(48, b"\0"))
    return status or struct.unpack_from("<4xI16xQ", session.params())


@pytest.mark.parametrize(
    ("era", "on_host", "inside"),
    [
        (Era.HOST, [500, 600, 700], [500, 600, 700]),
        (Era.THREAD_LIST, [500, 600, 700], [500, 600, 700]),
        (Era.THREAD_BOTH, [500, 600, 700], [500, 600, 700]),
        (Era.THREAD_ALL, [500, 600, 700], [6]),
        (Era.NATIVE, [500, 600, 700], [500, 600]),
    ],
)
def test_accounted_processes_by_era(era: Era, on_host: list[int], inside: list[int]) -> None:
    """700 is dead."""
    driver = Driver(Options(era))
    host, inner, _ = threaded(driver)
    dead = Session(driver, FakeTask(700, ((INNER, 7), (HOST, 700))))
    dead.compute(9 << 20)
    dead.file.release()
    assert accounted(host) == on_host
    assert accounted(inner) == inside
    assert account(host, 700) == (700, 9 << 20)
    assert account(host, 701) == Status.OBJECT_NOT_FOUND


@pytest.mark.parametrize("era", Era)
def test_an_account_comes_back_with_the_host_pid(era: Era) -> None:
    _, inner, _ = threaded(Driver(Options(era)))
    assert account(inner, 600) == (600, 5 << 20)
    knows_namespaces = era in (Era.THREAD_ALL, Era.NATIVE)
    assert account(inner, 6) == ((600, 5 << 20) if knows_namespaces else Status.OBJECT_NOT_FOUND)


def encoding(session: Session) -> None:
    assert session.alloc(session.client, DEVICE, 0, abi.NVENC_SW_SESSION)[0] == 0
    assert session.alloc(session.client, DEVICE, 0, abi.NVFBC_SW_SESSION)[0] == 0
    assert session.alloc(session.client, SUBDEVICE, 0x77, abi.PROFILER)[0] == 0


@pytest.mark.parametrize("era", Era)
def test_sessions_and_reservations_have_host_pids_in_every_era(era: Era) -> None:
    driver = Driver(Options(era))
    _, inner, _ = threaded(driver)
    encoding(inner)
    for cmd, size in ((ENCODERS_2, 16388), (CAPTURES, 13316)):
        assert inner.control(SUBDEVICE, cmd, bytes(size)) == 0
        assert struct.unpack_from("<II", inner.params()) == (1, 600)
    assert inner.control(0x77, RESERVATION, bytes(12)) == 0
    assert struct.unpack("<III", inner.params()) == (0, 0, 0)
    assert inner.control(0x77, RESERVE, b"\0") == 0
    assert inner.control(0x77, RESERVE, b"\0") == Status.INSUFFICIENT_RESOURCES
    assert inner.control(0x77, RESERVATION, bytes(12)) == 0
    assert struct.unpack("<III", inner.params()) == (1, 600, 0)
    assert inner.free(0x77) == 0
    inner.file.release()
    assert not driver.gpus[0].sessions
    assert driver.gpus[0].reservation is None


@pytest.mark.parametrize(
    ("count", "address", "status"),
    [
        (512, 0x5000, 0),
        (0, 0, 0),
        (512, 0, 0x1F),
        (1, 0, 0x1F),
        (511, 0x5000, 0x1F),
        (0, 0x5000, 0x1F),
        (512, 0x6000, 0x1E),
    ],
)
def test_the_encoders_table_is_behind_a_pointer(driver: Driver, count: int, address: int, status: int) -> None:
    session = Session(driver, FakeTask())
    session.compute()
    encoding(session)
    session.task.pages[0x5000] = bytearray(b"\xee" * 16384)
    assert session.control(SUBDEVICE, ENCODERS, struct.pack("<IIQ", count, 0, address)) == status
    if status == 0:
        assert session.params() == struct.pack("<IIQ", 1, 0, address)
    if status == 0 and address:
        assert session.task.pages[0x5000][:4] == struct.pack("<I", 500)
        assert not any(session.task.pages[0x5000][32:])


def test_without_encoders_their_room_does_not_matter(session: Session) -> None:
    session.compute()
    session.task.pages[0x5000] = bytearray(16384)
    assert session.control(SUBDEVICE, ENCODERS, struct.pack("<IIQ", 3, 0, 0x5000)) == 0
    assert session.params() == struct.pack("<IIQ", 0, 0, 0x5000)


# ---------------------------------------------------------------------------- GET_PID_INFO


@pytest.mark.parametrize(("size", "stride"), [(14408, 72), (9608, 48), (8008, 40)])
def test_pid_info_layouts(session: Session, size: int, stride: int) -> None:
    session.compute(9 << 20)
    params = bytearray(b"\xbb" * size)
    struct.pack_into("<I", params, 0, 3)
    for index, pid in enumerate((500, 0, 4_000_000)):
        struct.pack_into("<II", params, 8 + index * stride, pid, 0)
    assert session.control(SUBDEVICE, GET_PID_INFO, bytes(params)) == 0
    after = session.params()
    tail = b"\xff" * 8 if stride > 40 else b""
    for index, (result, memory) in enumerate(((0, 9 << 20), (0x1F, 0), (0, 0))):
        entry = after[8 + index * stride : 8 + (index + 1) * stride]
        assert struct.unpack_from("<I", entry, 8) == (result,)
        assert struct.unpack_from("<Q", entry, 16) == (memory,)
        assert entry[24:] == bytes(stride - 24 - len(tail)) + tail
    assert after[8 + 3 * stride :] == bytes(params[8 + 3 * stride :])


@pytest.mark.parametrize("count", [0, 201, 0xFFFFFFFF])
def test_pid_info_count(session: Session, count: int) -> None:
    session.compute()
    params = struct.pack("<I", count).ljust(14408, b"\x01")
    assert session.control(SUBDEVICE, GET_PID_INFO, params) == Status.INVALID_ARGUMENT
    assert session.params() == params


def test_pid_info_of_something_else_than_memory(session: Session) -> None:
    session.compute(1 << 20)
    assert session.info(500, index=1) == (0x1F, 0)


# ---------------------------------------------------------------------------- strictness of RM_CONTROL


@pytest.mark.parametrize("flags", [1, 2, 4, 0x80000000])
def test_flags(session: Session, flags: int) -> None:
    session.open_gpu()
    assert session.control(SUBDEVICE, GET_PIDS, bytes(3812), flags=flags) == 0x1F


@pytest.mark.parametrize("cmd", [GET_PIDS, GET_PID_INFO])
@pytest.mark.parametrize("size", [1, 4, 3811, 3813, 8007, 14407, 14409, (1 << 20) + 1, 0xFFFFFFFF])
def test_wrong_size(session: Session, cmd: int, size: int) -> None:
    session.open_gpu()
    params = struct.pack("<I", 1).ljust(20000, b"\x01")
    assert session.control(SUBDEVICE, cmd, params, size=size) == 0x1F
    assert session.params() == params


def test_null_params_and_no_size(session: Session) -> None:
    session.open_gpu()
    assert session.control(SUBDEVICE, GET_PIDS, bytes(3812), at=0) == 0x1F
    assert session.control(SUBDEVICE, GET_PIDS, bytes(3812), size=0) == 0x1F


@pytest.mark.parametrize("at", [1, PARAMS + 1, PARAMS - 1, 1 << 63, (1 << 64) - 1])
def test_bad_address(session: Session, at: int) -> None:
    session.open_gpu()
    assert session.control(SUBDEVICE, GET_PIDS, bytes(3812), at=at) == 0x1E


def test_read_only_params(session: Session) -> None:
    session.open_gpu()
    session.task.read_only = frozenset({PARAMS})
    assert session.control(SUBDEVICE, GET_PIDS, bytes(3812)) == 0x1E
    assert session.params() == bytes(3812)


def test_id_type(session: Session) -> None:
    session.open_gpu()
    assert session.control(SUBDEVICE, GET_PIDS, struct.pack("<II", 1, 0x2080).ljust(3812, b"\x05")) == 0
    assert struct.unpack_from("<I", session.params(), 8) == (0,)
    params = struct.pack("<II", 2, 0xCBC0).ljust(3812, b"\x05")
    assert session.control(SUBDEVICE, GET_PIDS, params) == 0x1F
    assert session.params() == params


@pytest.mark.parametrize(
    ("handle", "cmd"), [(SUBDEVICE, 0x2080FFFF), (DEVICE, GET_PIDS), (SUBDEVICE, 0x201), (SUBDEVICE, 0xFFFFFFFF)]
)
def test_unknown_control(session: Session, handle: int, cmd: int) -> None:
    session.open_gpu()
    assert session.control(handle, cmd, bytes(3812)) == 0x56


def test_null_control(session: Session) -> None:
    session.open_gpu()
    assert session.control(SUBDEVICE, 0x20800000, b"\x01" * 12) == 0


def test_clients_belong_to_their_open_file(driver: Driver, session: Session) -> None:
    session.open_gpu()
    other = Session(driver, session.task)
    other.client, theirs = session.client, other.client
    assert other.control(SUBDEVICE, GET_PIDS, bytes(3812)) == 0x23
    assert other.free(session.client, root=session.client) == 0x23
    assert other.alloc(session.client, session.client, 0x77, abi.DEVICE)[0] == 0x23
    other.client = theirs
    assert other.control(SUBDEVICE, GET_PIDS, bytes(3812)) == Status.OBJECT_NOT_FOUND


# ---------------------------------------------------------------------------- strictness of the rest


def test_device_needs_the_gpu_node_open_in_the_same_process(driver: Driver, session: Session) -> None:
    other = Session(driver, FakeTask(501, ((HOST, 501),)))
    other.gpu_file.release()
    assert other.alloc(other.client, other.client, DEVICE, abi.DEVICE, bytes(56))[0] == 0x1B
    assert session.alloc(session.client, session.client, DEVICE, abi.DEVICE, bytes(56))[0] == 0


def test_allocations_that_are_refused(session: Session) -> None:
    session.open_gpu()
    client = session.client
    assert session.alloc(client, client, 0, abi.DEVICE)[0] == Status.INVALID_ARGUMENT
    assert session.alloc(client, client, DEVICE, abi.DEVICE)[0] == Status.INSERT_DUPLICATE_NAME
    assert session.alloc(client, client, 0, abi.SUBDEVICE)[0] == Status.INVALID_OBJECT_PARENT
    assert session.alloc(client, DEVICE, 0, HOPPER.compute)[0] == Status.INVALID_OBJECT_PARENT
    assert session.alloc(client, DEVICE, 0, 0x1234)[0] == Status.INVALID_CLASS
    assert session.alloc(client, DEVICE, 0, HOPPER.channel)[0] == Status.INVALID_ARGUMENT
    assert session.alloc(client, DEVICE, 0, HOPPER.channel, bytes(303))[0] == Status.INVALID_ADDRESS
    assert session.alloc(client, DEVICE, 0, 0x40, bytes(128))[0] == Status.INVALID_ARGUMENT
    assert session.alloc(client, 0x999, 0, abi.SUBDEVICE)[0] == Status.OBJECT_NOT_FOUND
    assert session.alloc(client, client, 0, abi.DEVICE, b"\x07".ljust(56, b"\0"))[0] == Status.INVALID_ARGUMENT
    assert session.pids(abi.SUBDEVICE) == [500]


@pytest.mark.parametrize(
    ("version", "size", "status_at"),
    [
        ("470.256.02", 32, 24),
        ("470.256.02", 40, 32),
        ("530.41.03", 32, 24),
        ("530.41.03", 40, 36),
        ("535.43.02", 32, 28),
        ("535.43.02", 48, 40),
    ],
)
def test_layouts_of_alloc(version: str, size: int, status_at: int) -> None:
    old = version < "535"
    file, task = Driver(Options(old_alloc=old, version=version)).open_control(), FakeTask()
    good = call(file, task, Escape.RM_ALLOC, abi.RmAlloc(0, 0, 0, 0x41, 0).pack().ljust(size, b"\0"))
    assert abi.RmAlloc.unpack(good[:24]).new
    bad = call(file, task, Escape.RM_ALLOC, abi.RmAlloc(1, 1, 0, 0x80, 0).pack().ljust(size, b"\0"))
    assert struct.unpack_from("<I", bad, status_at) == (0x23,)
    wrong = {True: 48, False: 40}[old]
    assert errno_of(file, task, abi.ioctl_number(Escape.RM_ALLOC, wrong), bytes(wrong)) == errno.EINVAL


@pytest.mark.parametrize(
    ("escape", "size"),
    [
        (Escape.RM_CONTROL, 31),
        (Escape.RM_CONTROL, 33),
        (Escape.RM_FREE, 15),
        (Escape.RM_ALLOC, 31),
        (Escape.CARD_INFO, 71),
        (Escape.CARD_INFO, 73),
        (Escape.CHECK_VERSION_STR, 71),
        (Escape.SYS_PARAMS, 4),
        (Escape.IOCTL_XFER_CMD, 15),
        (Escape.REGISTER_FD, 4),
        (99, 8),
    ],
)
def test_wrong_ioctls_of_the_control_node(session: Session, escape: int, size: int) -> None:
    assert errno_of(session.file, session.task, abi.ioctl_number(escape, size), bytes(size)) == errno.EINVAL


@pytest.mark.parametrize("escape", [Escape.RM_CONTROL, Escape.RM_ALLOC, Escape.RM_FREE, Escape.CARD_INFO])
def test_gpu_node_refuses_what_is_the_control_nodes(session: Session, escape: Escape) -> None:
    size = {Escape.RM_FREE: 16, Escape.CARD_INFO: 72}.get(escape, 32)
    assert errno_of(session.gpu_file, session.task, abi.ioctl_number(escape, size), bytes(size)) == errno.EINVAL


def test_gpu_node_takes_its_own(session: Session) -> None:
    assert call(session.gpu_file, session.task, Escape.REGISTER_FD, b"\x05\0\0\0") == b"\x05\0\0\0"
    assert call(session.gpu_file, session.task, Escape.WAIT_OPEN_COMPLETE, bytes(8)) == bytes(8)


def test_card_info_wants_room_for_all() -> None:
    driver, task = Driver(Options(gpus=3)), FakeTask()
    file = driver.open_control()
    assert errno_of(file, task, abi.ioctl_number(Escape.CARD_INFO, 144), bytes(144)) == errno.EINVAL
    cards = abi.CardInfo.unpack_all(call(file, task, Escape.CARD_INFO, bytes(72 * 32)))
    assert [card.minor for card in cards] == [0, 1, 2]


def test_version(session: Session) -> None:
    ask = abi.VersionCheck(0, 0, b"580.159.04").pack()
    assert abi.VersionCheck.unpack(call(session.file, session.task, Escape.CHECK_VERSION_STR, ask)).reply == 1
    query = abi.VersionCheck(ord("2"), 0, b"").pack()
    answer = abi.VersionCheck.unpack(call(session.file, session.task, Escape.CHECK_VERSION_STR, query))
    assert answer.version.rstrip(b"\0") == b"580.159.04"
    wrong = abi.VersionCheck(0, 0, b"1.2").pack()
    assert errno_of(session.file, session.task, 0xC04846D2, wrong) == errno.EINVAL


def test_class_lists(session: Session) -> None:
    session.open_gpu()
    for size in (468, 700, 804):  # older drivers have shorter ones
        assert session.control(DEVICE, abi.GPU_GET_CLASSLIST_V2, bytes(size)) == 0
    (count,) = struct.unpack_from("<I", session.params())
    classes = session.params()[4 : 4 + 4 * count]
    assert HOPPER.compute in abi.unpack_words(classes)
    assert session.control(DEVICE, abi.GPU_GET_CLASSLIST, bytes(16)) == 0
    assert abi.ClassList.unpack(session.params()) == abi.ClassList(count, 0)
    session.task.pages[0x5000] = bytearray(4 * count)
    assert session.control(DEVICE, abi.GPU_GET_CLASSLIST, abi.ClassList(count, 0x5000).pack()) == 0
    assert session.task.pages[0x5000] == classes
    assert session.control(DEVICE, abi.GPU_GET_CLASSLIST, abi.ClassList(count, 0x6000).pack()) == 0x1E
    assert session.control(DEVICE, abi.GPU_GET_CLASSLIST, abi.ClassList(1, 0x5000).pack()) == 0x3A


@pytest.mark.parametrize("size", [256, 384])
def test_gpu_ids(session: Session, size: int) -> None:
    client = session.client
    assert session.control(client, abi.GPU_GET_PROBED_IDS, bytes(size)) == 0
    assert abi.unpack_gpu_ids(session.params()) == [6]
    assert session.control(client, abi.GPU_GET_ATTACHED_IDS, bytes(128)) == 0
    assert abi.unpack_gpu_ids(session.params()) == [6]
    assert session.control(client, abi.GPU_GET_ID_INFO_V2, abi.IdInfo(99).pack()) == 0x1F
    session.gpu_file.release()
    assert session.control(client, abi.GPU_GET_ATTACHED_IDS, bytes(128)) == 0
    assert abi.unpack_gpu_ids(session.params()) == []


# ---------------------------------------------------------------------------- the argument itself


def test_control_within_xfer(session: Session) -> None:
    session.compute()
    session.task.pages[PARAMS] = bytearray(struct.pack("<II", 0, HOPPER.compute).ljust(3812, b"\0"))
    inner = abi.Nvos54(session.client, SUBDEVICE, GET_PIDS, 0, PARAMS, 3812)
    session.task.pages[0x7000] = bytearray(inner.pack())
    raw = abi.XferCmd(Escape.RM_CONTROL, 32, 0x7000).pack()
    assert call(session.file, session.task, Escape.IOCTL_XFER_CMD, raw) == raw
    assert abi.Nvos54.unpack(session.task.pages[0x7000]) == inner
    assert struct.unpack_from("<II", session.params(), 8) == (1, 500)


@pytest.mark.parametrize(
    ("cmd", "size", "pointer", "code"),
    [
        (0x2A, 31, 0x7000, errno.EINVAL),
        (0x2A, 16385, 0x7000, errno.EINVAL),
        (0x2A, 32, 0x6000, errno.EFAULT),
        (0x12A, 32, 0x7000, errno.EINVAL),
        (211, 16, 0x7000, errno.EINVAL),
    ],
)
def test_wrong_xfer(session: Session, cmd: int, size: int, pointer: int, code: int) -> None:
    session.task.pages[0x7000] = bytearray(64)
    assert errno_of(session.file, session.task, 0xC01046D3, abi.XferCmd(cmd, size, pointer).pack()) == code


def test_argument_that_was_not_copied_in(session: Session) -> None:
    session.open_gpu()
    request = abi.Nvos54(session.client, SUBDEVICE, 0x2080FFFF, 0, PARAMS, 4)
    session.task.pages[OUTER] = bytearray(request.pack())
    assert session.file.ioctl(session.task, 0x0020002A, OUTER, b"") is None
    assert abi.Nvos54.unpack(session.task.pages[OUTER]).status == 0x56
    del session.task.pages[OUTER]
    assert errno_of(session.file, session.task, 0x0020002A, b"") == errno.EFAULT


WORDS = st.sampled_from(
    [0, 1, 2, DEVICE, SUBDEVICE, CHANNEL, 0x41, 0x80, 0x2080, 0x900E, 0x40, PARAMS, 0x7000, 0xFFFFFFFF]
)
CONTROLS = st.sampled_from([0x201, 0x205, 0x214, 0x800201, 0x800292, GET_PIDS, GET_PID_INFO, 0x20800000])
SIZES = st.sampled_from([0, 1, 4, 16, 32, 56, 128, 256, 384, 804, 3812, 8008, 9608, 14408, 16384])


@given(st.data())
def test_no_call_is_a_bug(data: st.DataObject) -> None:
    """Whatever a caller does, the answer is a status or an errno."""
    session = Session(Driver(Options(gpus=2)), FakeTask())
    session.compute(1 << 20)
    session.task.pages |= {PARAMS: bytearray(data.draw(st.binary(max_size=64)).ljust(16384, b"\xff"))}
    session.task.pages |= {0x7000: bytearray(16384)}
    handles = st.one_of(WORDS, st.just(session.client))
    for _ in range(data.draw(st.integers(1, 6))):
        words = [data.draw(handles) for _ in range(6)]
        raw = data.draw(
            st.one_of(
                st.binary(max_size=80),
                st.just(abi.pack_words(words[:4]).ljust(16, b"\0")),
                st.just(abi.pack_words(words[:4]) + abi.U64.pack(words[4]) + abi.U64.pack(words[5])),
                st.builds(
                    lambda handle, cmd, size: abi.Nvos54(session.client, handle, cmd, 0, PARAMS, size).pack(),
                    handles,
                    CONTROLS,
                    SIZES,
                ),
            )
        )
        number = abi.ioctl_number(
            data.draw(st.sampled_from([0x29, 0x2A, 0x2B, 200, 201, 210, 211, 214, 218])), len(raw)
        )
        for file in (session.file, session.gpu_file):
            with contextlib.suppress(OSError):
                file.ioctl(session.task, number, OUTER, raw)
    session.file.release()
    assert session.driver.gpus[0].memory == {}
    assert not any(session.driver.gpus[0].holders.values())
    assert session.driver.mps == {}
