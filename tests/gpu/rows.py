"""What each tool says about GPU processes, as rows; and what two lists of rows and the truth say about each other."""

from __future__ import annotations

import csv
import json
import re
from collections.abc import Collection, Iterable, Iterator, Mapping
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

    def __str__(self) -> str:
        memory = "" if self.memory_bytes is None else f"{self.memory_bytes / MIB:.10g} MiB"
        return " ".join(word for word in (str(self.pid), self.type, self.name, memory) if word)


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
    """The answer to --query-compute-apps=pid,process_name,used_memory --format=csv."""
    for cells in csv.reader(text.splitlines()):
        if len(cells) > 2 and cells[0].isdecimal():  # a process's name may have commas
            yield Row(int(cells[0]), name=_base(",".join(cells[1:-1])), memory_bytes=memory(cells[-1]))


def pmon(text: str) -> Iterator[Row]:
    """The answer of nvidia-smi pmon -s m -c 1: columns by the first heading, fb in MiB."""
    heads: list[str] = []
    for line in text.splitlines():
        if line.startswith("#"):
            heads = heads or line.lstrip("# ").split()
            continue
        cells = dict(zip(heads, line.split(maxsplit=max(len(heads) - 1, 0)), strict=False))
        if cells.get("pid", "-").isdecimal():
            used = cells.get("fb", "-")
            size = int(used) * MIB if used.isdecimal() else None
            yield Row(int(cells["pid"]), cells["gpu"], cells.get("type", ""), _base(cells.get("command", "")), size)


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
    """The answer of ask.py nvml and ask.py subdevices; the process that asked is not in it."""
    answer: dict[str, Any] = json.loads(text)
    for one in answer["rows"]:
        if one["pid"] != answer["asker"]:
            yield Row(one["pid"], str(one["gpu"]), memory_bytes=one["memory_bytes"])


class Verdict(Enum):
    """What a comparison showed."""

    EQUAL = "equal"
    EXPLAINED = "explained"
    DIFFERENT = "DIFFERENT"
    FAILED = "FAILED"
    NOT_INSTALLED = "not installed"


#: Which side is right where the driver repeats a process.
DUPLICATES = (
    "The driver lists a process once for each of its RM clients, with the same number; ours has it once. Ours is "
    "right: it is one process. The driver does remove repeats, but compares the host's id with ids that it has already "
    "translated into the namespace, and so misses them there."
)


class Judgement(NamedTuple):
    """A verdict, and why it is that one where that needs saying."""

    verdict: Verdict
    why: str = ""


def judge(ours: list[Row], drivers: list[Row], truth: Mapping[int, int] | Collection[int]) -> Judgement:
    """Compare two answers with each other, and ours with the truth: pids, with the least bytes each must have."""
    if order(ours) != order(drivers):
        repeats = len(set(drivers)) < len(drivers)
        if not (repeats and order(ours) == order(set(drivers))):
            return Judgement(Verdict.DIFFERENT, "not the same rows")
    if wrong := untrue(ours, truth):
        return Judgement(Verdict.DIFFERENT, f"{'both' if set(ours) == set(drivers) else 'ours'}: {wrong}")
    if order(ours) != order(drivers):
        return Judgement(Verdict.EXPLAINED, DUPLICATES)
    return Judgement(Verdict.EQUAL)


_ROUNDING = 0.99  # tools round what they show


def untrue(rows: list[Row], truth: Mapping[int, int] | Collection[int]) -> str:
    """What in these rows is not so; empty if all is."""
    pids = [row.pid for row in rows]
    wrong = []
    if missing := sorted(set(truth) - set(pids)):
        wrong.append(f"missing {missing}")
    if foreign := sorted(set(pids) - set(truth)):
        wrong.append(f"not of this namespace {foreign}")
    if len(pids) != len(set(pids)):
        wrong.append("a process twice")
    if isinstance(truth, Mapping):
        small = [row.pid for row in rows if (row.memory_bytes or 0) < truth.get(row.pid, 0) * _ROUNDING]
        if small:
            wrong.append(f"less memory than was allocated {small}")
    return "; ".join(wrong)
