"""What the stand-in keeps books of: processes, clients, objects, GPUs. It makes no system call."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from typing import NamedTuple, Protocol, TypeVar

from mpu_notify.rm import abi
from mpu_notify.rm.abi import Status
from mpu_notify.rm.eras import Era


class MemoryFault(Exception):  # noqa: N818 - it is what the kernel calls it
    """The caller's memory cannot be read or written there, by itself."""


class Process(NamedTuple):
    """A process: its id for the driver, and (PID namespace, id) from its own namespace upwards."""

    tgid: int
    numbers: tuple[tuple[int, int], ...]

    def in_namespace(self, namespace: int) -> int | None:
        """Its id in a PID namespace; None where it has none there."""
        return dict(self.numbers).get(namespace)


class Thread(NamedTuple):
    """A thread: its id for the driver, and as of a process. It keeps its numbers when it has ended."""

    tid: int
    numbers: tuple[tuple[int, int], ...]

    def in_namespace(self, namespace: int) -> int | None:
        """Its id in a PID namespace; None where it has none there."""
        return dict(self.numbers).get(namespace)


class Task(Protocol):
    """The task that performs an ioctl, as the kernel's ``current``."""

    def read(self, address: int, size: int) -> bytes:
        """Copy from its memory; MemoryFault where it may not read."""

    def write(self, address: int, data: bytes) -> None:
        """Copy to its memory; MemoryFault where it may not write."""

    def process(self) -> Process:
        """The process it belongs to."""

    def thread(self) -> Thread:
        """The thread that it is."""

    def namespace(self) -> int:
        """An identifier of its PID namespace."""


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


#: Bytes of each GPU.
GPU_MEMORY = 144 << 30


@dataclass(frozen=True)
class Options:
    """What kind of driver to be. ``old_alloc``: RM_ALLOC's argument as it was up to 530.41.03."""

    era: Era = Era.HOST
    gpus: int = 1
    chip: Chip = CHIPS["hopper"]
    version: str = "580.159.04"
    old_alloc: bool = False


class RefusedError(Exception):
    """An RM status that is not OK; the ioctl itself succeeds."""

    def __init__(self, status: Status) -> None:
        super().__init__(status)
        self.status = status


@dataclass(eq=False)
class Object:
    """An object of a client: a node in its tree.

    ``size`` is GPU memory in bytes, ``session`` the number of a session.
    """

    handle: int
    class_number: int
    parent: Object | None = None
    gpu: GpuState | None = None
    size: int = 0
    children: dict[int, Object] = field(default_factory=dict)
    client: Client | None = None
    session: int = 0

    def subtree(self) -> Iterable[Object]:
        """All objects below it, then itself."""
        for child in self.children.values():
            yield from child.subtree()
        yield self


@dataclass(eq=False)
class Client:
    """A root client, of the open file, and of the process and the thread that allocated it."""

    root: Object
    process: Process
    thread: Thread
    objects: dict[int, Object]

    def has_device(self, gpu: GpuState) -> bool:
        """Whether it has a device object of a GPU."""
        return any(each.class_number == abi.DEVICE and each.gpu is gpu for each in self.objects.values())


_Key = TypeVar("_Key")


def count(books: dict[_Key, int], key: _Key, change: int) -> None:
    """Add to a number in a book; one that becomes 0 is struck out."""
    total = books.get(key, 0) + change
    if total:
        books[key] = total
    else:
        books.pop(key, None)


@dataclass(eq=False)
class Record:
    """What accounting knows of a process: its most memory, and the times of its first and last engine object."""

    client: Client
    started: int
    most_memory: int = 0
    ended: int = 0


_DEAD_RECORDS = 128


@dataclass(eq=False)
class GpuState:
    """A GPU and the books about it.

    ``nodes`` counts the open files of its node by process id; ``holders`` is by class, ``sessions`` are the encoders
    and captures, ``reservation`` is who has the hardware's performance counters. Accounting is by process id.
    """

    card: abi.CardInfo
    nodes: dict[int, int] = field(default_factory=dict)
    holders: dict[int, dict[Client, int]] = field(default_factory=dict)
    memory: dict[Client, int] = field(default_factory=dict)
    sessions: list[Object] = field(default_factory=list)
    reservation: Object | None = None
    accounted: dict[int, Record] = field(default_factory=dict)
    accounted_dead: list[Record] = field(default_factory=list)
    moment: int = 0

    def book(self, client: Client, each: Object, change: int) -> None:
        """An object of a client's came (1) or went (-1)."""
        count(self.holders.setdefault(each.class_number, {}), client, change)
        count(self.memory, client, change * each.size)
        if each.class_number in (abi.NVENC_SW_SESSION, abi.NVFBC_SW_SESSION):
            (self.sessions.append if change > 0 else self.sessions.remove)(each)
            each.session = self.moment
        if each is self.reservation:
            self.reservation = None
        self._account(client)

    def clients_of(self, *class_numbers: int) -> list[Client]:
        """Those that hold an object of any of these classes, each once."""
        return list(dict.fromkeys(client for number in class_numbers for client in self.holders.get(number, {})))

    def _account(self, client: Client) -> None:
        self.moment += 1
        tgid = client.process.tgid
        engines = [number for number in self.holders if abi.is_compute_class(number) or abi.is_graphics_class(number)]
        if any(each.process.tgid == tgid for each in self.clients_of(*engines)):
            record = self.accounted.setdefault(tgid, Record(client, self.moment))
            used = sum(size for each, size in self.memory.items() if each.process.tgid == tgid)
            record.most_memory = max(record.most_memory, used)
        elif tgid in self.accounted:
            record = self.accounted.pop(tgid)
            record.ended = self.moment
            self.accounted_dead = [*self.accounted_dead, record][-_DEAD_RECORDS:]


_VENDOR = 0x10DE
_FIRST_SLOT = 6
_FIRST_CLIENT = 0xC1D00000


class State:
    """What all open files of the driver share."""

    def __init__(self, options: Options) -> None:
        """With ``options.gpus`` GPUs of one kind on PCI bus 0."""
        self.options = options
        slots = range(_FIRST_SLOT, _FIRST_SLOT + options.gpus)
        self.gpus = [
            GpuState(abi.CardInfo(0, 0, slot, 0, _VENDOR, options.chip.pci_device, slot, minor))
            for minor, slot in enumerate(slots)
        ]
        self.alloc_status = abi.ALLOC_STATUS_FROM_535
        if options.old_alloc:
            old = int(options.version.split(".")[0]) < abi.FIRST_BRANCH_WITH_ALLOC_FLAGS
            self.alloc_status = abi.ALLOC_STATUS_TO_520 if old else abi.ALLOC_STATUS_TO_530
        chip = options.chip
        self.classes = [
            abi.ROOT_CLIENT, abi.DEVICE, abi.SUBDEVICE, abi.MEMORY_LOCAL_USER, abi.MPS_COMPUTE,
            abi.NVENC_SW_SESSION, abi.NVFBC_SW_SESSION, abi.PROFILER,
            chip.channel, chip.compute, chip.graphics,
        ]  # fmt: skip
        #: Clients with MPS objects, and how many each has.
        self.mps: dict[Client, int] = {}
        self._clients_made = 0

    def new_client_handle(self) -> int:
        """A client handle that was never used."""
        self._clients_made += 1
        return _FIRST_CLIENT + self._clients_made

    def attached(self) -> list[GpuState]:
        """The GPUs whose node somebody has open."""
        return [gpu for gpu in self.gpus if gpu.nodes]

    def book(self, client: Client, each: Object, change: int) -> None:
        """An object of a client's came (1) or went (-1)."""
        if each.class_number == abi.MPS_COMPUTE:
            count(self.mps, client, change)
        if each.gpu is not None:
            each.gpu.book(client, each, change)


#: What performs a control: with the task that asks, the object that it asks of, and its params, to be filled in.
#: RefusedError for a status that is not OK.
Fill = Callable[[Task, Object, bytearray], None]


class Row(NamedTuple):
    """A control that the stand-in has: the sizes of its params, and what performs it."""

    sizes: tuple[int, ...]
    fill: Fill


#: By class of the object, and cmd.
Key = tuple[int, int]
