"""Answers to raw RM controls, decoded by a model of their own, and what two of them and the truth say of each other.

Offsets are those of the headers of NVIDIA/open-gpu-kernel-modules 580; they are written down here once more, so that
the package is not measured by its own tables.
"""

from __future__ import annotations

import json
import struct
from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import NamedTuple

from tests.gpu.rows import FOREIGN, Judgement, Truth, Verdict

UTILISATION = 0x20802096
ACCOUNTING_INFO = 0xB03
ACCOUNTING_PIDS = 0xB04
ENCODER_SESSIONS_V1 = 0x2080016E  # as ask.py gives it: params without their pointer, then the table
ENCODER_SESSIONS = 0x208001AF
CAPTURE_SESSIONS = 0x2080017C

NO_PROCESS = 0xFFFFFFFF
_ENGINES = ("fb", "gr", "nvenc", "nvdec", "nvjpg", "nvofa")
_SAMPLES, _SAMPLE_SIZE, _BLOCK_SIZE = 16, 776, 128
_BLOCK = struct.Struct("<IIII100s4xQ")

#: Which side is right where the driver's own answer has what belongs to no one in the namespace.
FOREIGN_SAMPLES = (
    "Where the process of a sample is not in the namespace, the driver's own answer keeps its host PID in procId and "
    "the address of a kernel structure in pOsPidInfo; ours has 0xFFFFFFFF, the field's own value for no process, and "
    "0. Ours is right: the one is not the namespace's to know, and the other no program's. Samples of the namespace's "
    "own processes are the same in both, time by time."
)
#: What both sides are where the driver refuses the question that we put in the place of one about a foreign number.
LEFT_TO_THE_DRIVER = (
    "Asked for the account of a number that is not in the namespace, the driver is asked about nobody. It refuses, and "
    "a refused call goes to it unchanged, so that no program is worse off than without us: the answer is the driver's "
    "own, to the byte."
)
#: Which side is right where a list of the driver's own has host PIDs.
UNTRANSLATED = (
    "The driver does not translate this list: its own has host PIDs, of the namespace's processes and of others. Ours "
    "has the namespace's own, by their numbers there, and no others. Ours is right: a host PID means nothing in the "
    "namespace, or another process, and who else uses the machine is not the namespace's to know."
)
#: Which side is right where the driver gives the host PID back.
HOST_PID_BACK = (
    "The driver writes the host PID into the caller's params where it finds the process; ours has the number that the "
    "caller asked about. Ours is right: it is the process's number in the namespace."
)
_STATUSES = {0: "ok", 0x1B: "insufficient permissions", 0x1F: "invalid argument", 0x56: "not supported"}
_STATUSES[0x57] = "object not found"


class Told(NamedTuple):
    """One control, asked once."""

    gpu: str
    control: int
    about: int | None  # the process asked about
    status: int | None  # None where the ioctl itself failed
    params: bytes
    error: str = ""
    asker: int = 0

    @property
    def key(self) -> tuple[str, int, int]:
        return self.gpu, self.control, self.about or 0

    @property
    def outcome(self) -> str:
        if self.status is None:
            return self.error
        return f"{self.status:#x} ({_STATUSES.get(self.status, 'see nvstatuscodes.h')})"


def answers(text: str) -> list[Told]:
    """The answer of ask.py raw."""
    told = json.loads(text)
    found = []
    for one in told["answers"]:
        params = bytes.fromhex(one["params"]).ljust(one["size"], b"\0")
        answered = (one["about"], one["status"], params, one.get("error", ""))
        found.append(Told(str(one["gpu"]), one["control"], *answered, told.get("asker", 0)))
    return found


class Outcome(NamedTuple):
    """What two answers showed."""

    judgement: Judgement
    ours: Sequence[object] = ()
    drivers: Sequence[object] = ()
    note: str = ""
    #: Whether the driver gave such an answer that ours cannot but be a translated one.
    translated: bool = True


_RANK = (Verdict.REFUSED, Verdict.EQUAL, Verdict.EXPLAINED, Verdict.FAILED, Verdict.DIFFERENT)


def judge(ours: list[Told], drivers: list[Told], truth: Truth) -> Outcome:
    """Compare two askings of the same raw controls."""
    others = {one.key: one for one in drivers}
    if len(others) != len(ours) or {one.key for one in ours} != set(others):
        return Outcome(Judgement(Verdict.FAILED, "the two sides were not asked the same"))
    outcomes = [_judge_one(one, others[one.key], truth) for one in ours]
    if not outcomes:
        return Outcome(Judgement(Verdict.FAILED, "nothing was asked"))
    worst = max((one.judgement.verdict for one in outcomes), key=_RANK.index)
    whys = dict.fromkeys(one.judgement.why for one in outcomes if one.judgement.verdict is worst and one.judgement.why)
    return Outcome(
        Judgement(worst, "; ".join(whys)),
        [line for one in outcomes for line in one.ours],
        [line for one in outcomes for line in one.drivers],
        "; ".join(dict.fromkeys(one.note for one in outcomes if one.note)),
        any(one.translated for one in outcomes),
    )


def _judge_one(ours: Told, drivers: Told, truth: Truth) -> Outcome:
    name = f"GPU {ours.gpu}, {ours.control:#x}" + ("" if ours.about is None else f" about {ours.about}")
    lines = [f"{name}: {ours.outcome}"], [f"{name}: {drivers.outcome}"]
    if ours.about is not None and ours.about not in truth.pids:
        return _judge_hidden(ours, drivers, lines)
    if (ours.status, ours.error) != (drivers.status, drivers.error):
        return Outcome(Judgement(Verdict.DIFFERENT, f"{name}: not the same status"), *lines, translated=False)
    if ours.status != 0:
        return Outcome(Judgement(Verdict.REFUSED), *lines, note=f"{ours.control:#x}: {ours.outcome}", translated=False)
    if ours.control == UTILISATION:
        return judge_samples(ours, drivers, truth)
    if ours.control == ACCOUNTING_INFO:
        return _judge_accounting(ours, drivers, truth)
    return _judge_list(ours, drivers, truth)


def _judge_hidden(ours: Told, drivers: Told, lines: tuple[list[str], list[str]]) -> Outcome:
    """Asked about a number that is no process of the namespace, but the host PID of another."""
    if ours.status == drivers.status == 0 and ours.params == drivers.params:
        return Outcome(Judgement(Verdict.EXPLAINED, LEFT_TO_THE_DRIVER), *lines, translated=False)
    if ours.status == 0:
        why = f"GPU {ours.gpu}, {ours.control:#x}: ours tells about {ours.about}, which is not of this namespace"
        return Outcome(Judgement(Verdict.DIFFERENT, why), *lines, translated=False)
    if drivers.status == 0:
        return Outcome(Judgement(Verdict.EXPLAINED, FOREIGN), *lines, translated=False)
    return Outcome(Judgement(Verdict.REFUSED), *lines, f"{ours.control:#x}: {ours.outcome}", translated=False)


def _judge_accounting(ours: Told, drivers: Told, truth: Truth) -> Outcome:
    """Both found the process: u32 pid @4, percentages @12 and @16, most memory u64 @24."""
    (told,), (own,) = (struct.unpack_from("<I", one.params, 4) for one in (ours, drivers))
    lines = [_account(ours)], [_account(drivers)]
    if told != ours.about:
        return Outcome(Judgement(Verdict.DIFFERENT, f"asked about {ours.about}, ours answers about {told}"), *lines)
    if own == told:
        return Outcome(Judgement(Verdict.EQUAL), *lines)
    if truth.hosts.get(own) == told:
        return Outcome(Judgement(Verdict.EXPLAINED, HOST_PID_BACK), *lines)
    return Outcome(Judgement(Verdict.DIFFERENT, f"asked about {told}, the driver answers about {own}"), *lines)


def _account(told: Told) -> str:
    (pid,), use = struct.unpack_from("<I", told.params, 4), struct.unpack_from("<II", told.params, 12)
    (most,) = struct.unpack_from("<Q", told.params, 24)
    return f"GPU {told.gpu}: pid {pid}: GPU and memory in %: {use}, most bytes: {most}"


class _Table(NamedTuple):
    """Offsets of a counted table of entries that begin with a process id."""

    count: int
    entries: int
    stride: int
    capacity: int


_TABLES = {
    ACCOUNTING_PIDS: _Table(16008, 8, 4, 4000),
    ENCODER_SESSIONS_V1: _Table(0, 16, 32, 512),
    ENCODER_SESSIONS: _Table(0, 4, 32, 512),
    CAPTURE_SESSIONS: _Table(0, 4, 52, 256),
}


def listed(told: Told) -> list[int]:
    """The process ids in an answer that is a list."""
    table = _TABLES[told.control]
    (count,) = struct.unpack_from("<I", told.params, table.count)
    if count > table.capacity:
        raise ValueError(f"{told.control:#x} counts {count} entries")
    return [struct.unpack_from("<I", told.params, table.entries + table.stride * n)[0] for n in range(count)]


def _judge_list(ours: Told, drivers: Told, truth: Truth) -> Outcome:
    name = f"GPU {ours.gpu}, {ours.control:#x}"
    told, own = ([pid for pid in listed(one) if pid != one.asker] for one in (ours, drivers))
    lines = [f"{name}: {told}"], [f"{name}: {own}"]
    note = f"{ours.control:#x}: {len(told)} entries" + ("" if len(own) == len(told) else f", the driver's {len(own)}")
    return Outcome(judge_pids(told, own, truth), *lines, note, translated=bool(told or own))


def judge_pids(ours: Sequence[int], drivers: Sequence[int], truth: Truth) -> Judgement:
    """Compare two lists of process ids, where the driver's own may have host PIDs."""
    expected = []
    for pid in drivers:
        if pid in truth.hosts:
            expected.append(truth.hosts[pid])
        elif pid in truth.pids:  # translated already
            expected.append(pid)
    if foreign := sorted(set(ours) - truth.pids):
        return Judgement(Verdict.DIFFERENT, f"ours: not of this namespace {foreign}")
    if sorted(ours) != sorted(expected):
        return Judgement(Verdict.DIFFERENT, f"ours: {sorted(ours)}, expected {sorted(expected)}")
    return Judgement(Verdict.EQUAL) if sorted(ours) == sorted(drivers) else Judgement(Verdict.EXPLAINED, UNTRANSLATED)


class Block(NamedTuple):
    """One engine in one sample."""

    use: int
    scale: int
    pid: int
    sub_pid: int
    name: bytes
    address: int


@dataclass(frozen=True)
class Samples:
    """Utilisation samples: (time, how many of that time came before) -> one block an engine."""

    head: tuple[int, int]
    by_time: dict[tuple[int, int], tuple[Block, ...]]

    def blocks(self) -> Iterator[Block]:
        for sample in self.by_time.values():
            yield from sample

    @property
    def addresses(self) -> int:
        """How many blocks have something in pOsPidInfo."""
        return sum(bool(block.address) for block in self.blocks())

    def processes(self) -> Counter[int]:
        """How many blocks name each process."""
        return Counter(block.pid for block in self.blocks() if block.pid != NO_PROCESS)


def samples(params: bytes) -> Samples:
    """Decode UTILISATION: type u8 @0, buffer size u32 @4, count u32 @8, cursor u32 @12, a ring of samples @16."""
    by_time: dict[tuple[int, int], tuple[Block, ...]] = {}
    again: Counter[int] = Counter()
    for start in range(_SAMPLES, len(params) - _SAMPLE_SIZE + 1, _SAMPLE_SIZE):
        (time,) = struct.unpack_from("<Q", params, start)
        blocks = (
            Block(*_BLOCK.unpack_from(params, start + 8 + _BLOCK_SIZE * number)) for number in range(len(_ENGINES))
        )
        by_time[time, again[time]] = tuple(blocks)
        again[time] += 1
    return Samples((params[0], struct.unpack_from("<I", params, 4)[0]), by_time)


@dataclass
class _Tally:
    """What came of the blocks of the samples that both sides have."""

    own: int = 0  # of the namespace's processes, alike
    hidden: int = 0  # of others, without them in ours
    kept: int = 0  # of these, with their utilisation
    wrong: list[str] = field(default_factory=list)

    def see(self, time: int, engine: str, ours: Block, drivers: Block, truth: Truth) -> None:
        """Compare one engine at one time."""
        elsewhere = drivers.address and drivers.pid in truth.foreign  # though there may be such a number here too
        if drivers.pid == NO_PROCESS or (drivers.pid in truth.pids and not elsewhere):
            if ours._replace(address=0) != drivers._replace(address=0):
                self.wrong.append(f"at {time} {engine} has {ours[:4]}, the driver's own {drivers[:4]}")
            else:
                self.own += ours.pid != NO_PROCESS
        elif ours.pid != NO_PROCESS or ours.name.strip(b"\0"):
            self.wrong.append(f"at {time} {engine} has {ours[:4]} for a process elsewhere, {drivers.pid}")
        else:
            self.hidden += 1
            self.kept += ours.use == drivers.use


def kernel_addresses(params: bytes) -> list[int]:
    """Offsets of what looks like an address in the kernel's half, anywhere in an answer."""
    words = [fields[0] for fields in struct.iter_unpack("<I", params[: len(params) // 4 * 4])]
    return [4 * (number - 1) for number, word in enumerate(words) if number and 0xFFFF8000 <= word < NO_PROCESS]


def judge_samples(ours: Told, drivers: Told, truth: Truth) -> Outcome:
    """Compare two utilisation answers of moments close to each other: they have most of the ring in common."""
    told, own = samples(ours.params), samples(drivers.params)
    common = sorted(told.by_time.keys() & own.by_time.keys())
    tally = _Tally()
    for key in common:
        for engine, mine, theirs in zip(_ENGINES, told.by_time[key], own.by_time[key], strict=True):
            tally.see(key[0], engine, mine, theirs, truth)
    wrong = tally.wrong[:4]
    if len(tally.wrong) > len(wrong):
        wrong.append(f"and {len(tally.wrong) - len(wrong)} more")
    if foreign := sorted(set(told.processes()) - truth.pids):
        wrong.insert(0, f"not of this namespace {foreign}")
    if addresses := max(told.addresses, len(kernel_addresses(ours.params))):
        wrong.insert(0, f"{addresses} kernel addresses")
    if told.head != own.head:
        wrong.append(f"type and size {told.head}, the driver's own {own.head}")
    if not common and set(told.processes()) != set(own.processes()) & truth.pids:
        wrong.append("no sample in common, and not the same processes")
    note = "; ".join(
        (
            f"GPU {ours.gpu}: {len(common)} samples in common",
            f"{tally.own} entries of the namespace's own processes, alike",
            f"{tally.hidden} of others, hidden ({tally.kept} keep their utilisation)",
            f"kernel addresses: ours {told.addresses}, the driver's own {own.addresses}",
        )
    )
    verdict = Verdict.DIFFERENT if wrong else Verdict.EQUAL
    if not wrong and (set(own.processes()) - truth.pids or own.addresses):
        verdict = Verdict.EXPLAINED
    why = {Verdict.DIFFERENT: "ours: " + "; ".join(wrong), Verdict.EXPLAINED: FOREIGN_SAMPLES}.get(verdict, "")
    someone = bool(told.processes() or own.processes() or own.addresses)
    return Outcome(Judgement(verdict, why), _seen(ours.gpu, told), _seen(drivers.gpu, own), note, translated=someone)


def _seen(gpu: str, found: Samples) -> list[str]:
    processes: Iterable[tuple[int, int]] = sorted(found.processes().items())
    lines = [f"GPU {gpu}: procId {pid} in {count} entries" for pid, count in processes] or [f"GPU {gpu}: no process"]
    return [*lines, f"GPU {gpu}: pOsPidInfo set in {found.addresses} entries"]
