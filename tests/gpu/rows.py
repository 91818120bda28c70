"""What each tool says about GPU processes, as rows; and what two lists of rows and the truth say about each other."""

from __future__ import annotations

import csv
import json
import re
from collections.abc import Collection, Iterable, Iterator, Mapping
from dataclasses import dataclass
from enum import Enum
from typing import Any, NamedTuple

MIB = 1 << 20
_UNITS = {"B": 1, "KiB": 1 << 10, "MiB": MIB, "GiB": 1 << 30, "TiB": 1 << 40}


class Row(NamedTuple):
    """A process as a tool shows it; empty or None where the tool does not tell."""

    pid: int
    gpu: str = ""
    type: str = ""
    name: str = ""
    memory_bytes: int | None = None
    use: str = ""  # per cent of the GPU's engines, which no two moments have alike

    def __str__(self) -> str:
        gpu = f"GPU {self.gpu}:" if self.gpu else ""
        memory = "" if self.memory_bytes is None else f"{self.memory_bytes / MIB:.10g} MiB"
        return " ".join(word for word in (gpu, str(self.pid), self.type, self.name, memory, self.use) if word)


def order(rows: Iterable[Row]) -> list[Row]:
    """Sorted, also where rows that are else alike differ in having a memory figure."""
    return sorted(rows, key=lambda row: row._replace(memory_bytes=-1 if row.memory_bytes is None else row.memory_bytes))


def memory(text: str) -> int | None:
    """Parse "1634 MiB", "1634MiB", "19.53GiB"; None for "N/A" and "[N/A]"."""
    match = re.fullmatch(r"([\d.]+) ?([KMGT]?i?B)", text.strip())
    return round(float(match[1]) * _UNITS[match[2]]) if match else None


def _base(name: str) -> str:
    return name.strip().rpartition("/")[2]


_SMI = re.compile(
    r"\|\s+(?P<gpu>\d+)\s+(?:N/A|\d+)\s+(?:N/A|\d+)\s+(?P<pid>\d+)\s+(?P<type>[MCG](?:\+[MCG])*)"
    r"\s+(?P<name>.*?)\s+(?P<memory>\d+MiB|N/A)\s+\|"
)


def nvidia_smi(text: str) -> Iterator[Row]:
    """The process table of nvidia-smi."""
    for line in text.partition("Processes:")[2].splitlines():
        if match := _SMI.fullmatch(line.strip()):
            yield Row(int(match["pid"]), match["gpu"], match["type"], _base(match["name"]), memory(match["memory"]))


def compute_apps(text: str) -> Iterator[Row]:
    """The answer to --query-compute-apps=gpu_bus_id,pid,process_name,used_memory --format=csv."""
    for cells in csv.reader(text.splitlines()):
        if len(cells) > 3 and cells[1].strip().isdecimal():  # a process's name may have commas
            name = _base(",".join(cells[2:-1]))
            yield Row(int(cells[1]), cells[0].strip(), name=name, memory_bytes=memory(cells[-1]))


_ENGINES = ("sm", "mem", "enc", "dec", "jpg", "ofa")


def pmon(text: str) -> Iterator[Row]:
    """The answer of nvidia-smi pmon -s m, u or um, -c 1: columns by the first heading, fb in MiB, engines in %."""
    heads: list[str] = []
    for line in text.splitlines():
        if line.startswith("#"):
            heads = heads or line.lstrip("# ").split()
            continue
        cells = dict(zip(heads, line.split(maxsplit=max(len(heads) - 1, 0)), strict=False))
        if cells.get("pid", "-").isdecimal():
            used = cells.get("fb", "-")
            size = int(used) * MIB if used.isdecimal() else None
            use = " ".join(f"{engine} {cells[engine]}" for engine in _ENGINES if cells.get(engine, "-") != "-")
            name = _base(cells.get("command", ""))
            yield Row(int(cells["pid"]), cells["gpu"], cells.get("type", ""), name, size, use)


_NVITOP = re.compile(
    r"[│|]\s+(?P<gpu>\d+)\s+(?P<pid>\d+) (?P<type>[CGX])\s+\S+\s+(?P<memory>[\d.]+[KMGT]?i?B|N/A)\s.*[│|]"
)


def nvitop(text: str) -> Iterator[Row]:
    """The process table of nvitop -1."""
    for line in re.sub(r"\x1b\[[0-9;]*m", "", text).partition("Processes:")[2].splitlines():
        if match := _NVITOP.fullmatch(line.strip()):
            yield Row(int(match["pid"]), match["gpu"], match["type"], memory_bytes=memory(match["memory"]))


def gpustat(text: str) -> Iterator[Row]:
    """The answer of gpustat --json."""
    for gpu in json.loads(text)["gpus"]:
        for process in gpu["processes"] or ():
            used = process["gpu_memory_usage"]
            size = None if used is None else used * MIB
            yield Row(process["pid"], str(gpu["index"]), name=process["command"], memory_bytes=size)


def mpu_notify_ps(text: str) -> Iterator[Row]:
    """The answer of mpu-notify ps --json."""
    for one in json.loads(text):
        yield Row(one["pid"], str(one["gpu"]), one["type"], one["name"] or "-", one["memory_bytes"])


def ask(text: str) -> Iterator[Row]:
    """The answer of ask.py nvml, use and subdevices; the process that asked is not in it."""
    answer: dict[str, Any] = json.loads(text)
    for one in answer["rows"]:
        if one["pid"] != answer["asker"]:
            yield Row(one["pid"], str(one["gpu"]), memory_bytes=one["memory_bytes"], use=one.get("use", ""))


def ask_accounted(text: str) -> Iterator[int]:
    """The process ids in the answer of ask.py nvml-accounted."""
    for one in json.loads(text)["lists"]:
        yield from one["pids"]


def accounted_apps(text: str) -> Iterator[int]:
    """The process ids in the answer to --query-accounted-apps=gpu_bus_id,pid,... --format=csv."""
    for cells in csv.reader(text.splitlines()):
        if len(cells) > 1 and cells[1].strip().isdecimal():
            yield int(cells[1])


class Verdict(Enum):
    """What a comparison showed."""

    EQUAL = "equal"
    EXPLAINED = "explained"
    REFUSED = "refused alike"
    DIFFERENT = "DIFFERENT"
    FAILED = "FAILED"
    NOT_INSTALLED = "not installed"


#: Which side is right where the driver repeats a process.
DUPLICATES = (
    "The driver lists a process once for each of its RM clients, with the same number; ours has it once. Ours is "
    "right: it is one process. The driver does remove repeats, but compares the host's id with ids that it has already "
    "translated into the namespace, and so misses them there."
)
#: Which side is right where the driver's own answer has processes of other namespaces.
FOREIGN = (
    "The driver's own answer has processes that are not in the namespace, by their host PIDs; ours has not. Ours is "
    "right: these numbers mean nothing in the namespace, or another process, and who else computes on the machine is "
    "not the namespace's to know. The driver translates the id of a process that it finds in the namespace and leaves "
    "that of any other as it is."
)


class Judgement(NamedTuple):
    """A verdict, and why it is that one where that needs saying."""

    verdict: Verdict
    why: str = ""


#: A process on a GPU: the GPU's number as text, and the process id.
Key = tuple[str, int]


@dataclass(frozen=True)
class Truth:
    """What is so in a place, told by the processes themselves."""

    memory: Mapping[Key, int]
    """The processes that it sees, by GPU and by its own numbers, and the least bytes of memory that each must have."""
    hosts: Mapping[int, int]
    """The same processes: host PID -> PID in the place."""
    foreign: frozenset[int] = frozenset()
    """Host PIDs of all processes of the machine that it does not see."""
    others: frozenset[int] = frozenset()
    """Those of them that use a GPU: the rest of the scene."""

    @property
    def pids(self) -> frozenset[int]:
        """The processes that it sees, by its own numbers."""
        return frozenset(self.hosts.values())


def judge(ours: list[Row], drivers: list[Row], truth: Mapping[Key, int] | Collection[Key]) -> Judgement:
    """Compare two answers with each other, and ours with the truth: who is there, with the least bytes of each."""
    ours, drivers = still(ours), still(drivers)
    if ours != drivers:
        repeats = len(set(drivers)) < len(drivers)
        if not (repeats and ours == order(set(drivers))):
            return Judgement(Verdict.DIFFERENT, "not the same rows")
    if wrong := untrue(ours, truth):
        return Judgement(Verdict.DIFFERENT, f"{'both' if set(ours) == set(drivers) else 'ours'}: {wrong}")
    if ours != drivers:
        return Judgement(Verdict.EXPLAINED, DUPLICATES)
    return Judgement(Verdict.EQUAL)


def judge_use(ours: list[Row], drivers: list[Row], truth: Truth, *, all_of: Collection[Key] | None) -> Judgement:
    """Compare two answers about who uses the GPUs how much, at two moments.

    The driver's own may have processes of other namespaces, by host PID. ``all_of``: who must be in ours; None where
    only who was sampled is.
    """
    known = [row for row in still(drivers) if row.pid in truth.pids or row.pid not in truth.foreign]
    ours, drivers = still(ours), still(drivers)
    if foreign := sorted({row.pid for row in ours} - truth.pids):
        return Judgement(Verdict.DIFFERENT, f"{'both' if ours == drivers else 'ours'}: not of this namespace {foreign}")
    if ours != known:
        return Judgement(Verdict.DIFFERENT, "not the same rows")
    if all_of is not None and (wrong := untrue(ours, all_of)):
        return Judgement(Verdict.DIFFERENT, f"both: {wrong}")
    return Judgement(Verdict.EXPLAINED, FOREIGN) if known != drivers else Judgement(Verdict.EQUAL)


def still(rows: Iterable[Row]) -> list[Row]:
    """In order, without what no two moments have alike."""
    return order(row._replace(use="") for row in rows)


_ROUNDING = 0.99  # tools round what they show


def untrue(rows: list[Row], truth: Mapping[Key, int] | Collection[Key]) -> str:
    """What in these rows is not so; empty if all is.

    A process that is there may be on more GPUs than those that it computes on, since CUDA opens all.
    """
    keys = [(row.gpu, row.pid) for row in rows]
    wrong = []
    if missing := sorted(set(truth) - set(keys)):
        wrong.append(f"missing {_told(missing)}")
    if foreign := sorted({pid for _, pid in keys} - {pid for _, pid in truth}):
        wrong.append(f"not of this namespace {foreign}")
    if len(keys) != len(set(keys)):
        wrong.append("a process twice")
    if isinstance(truth, Mapping):
        small = [
            (row.gpu, row.pid) for row in rows if (row.memory_bytes or 0) < truth.get((row.gpu, row.pid), 0) * _ROUNDING
        ]
        if small:
            wrong.append(f"less memory than was allocated {_told(small)}")
    return "; ".join(wrong)


def _told(keys: Iterable[Key]) -> str:
    return ", ".join(f"{pid} on GPU {gpu}" for gpu, pid in keys)
