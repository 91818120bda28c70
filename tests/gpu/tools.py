"""The tools that are compared: how each is asked, and how two of its answers are judged."""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NamedTuple

from tests.gpu import raw, rows
from tests.gpu.raw import Outcome
from tests.gpu.rows import Judgement, Row, Truth, Verdict
from tests.gpu.scene import CONTROL_NODE, HERE, Answer, ask, mpu_notify_command, python

ASK_PY = str(HERE / "ask.py")
_PROBE_S = 5  # to find out whether a tool ends by itself
_SAID = 12  # lines of text that are shown

Judge = Callable[[Answer, Answer, Truth], Outcome]


class Tool(NamedTuple):
    """A tool that tells about GPU processes."""

    name: str
    command: list[str]
    judge: Judge
    #: What checks its answer on the host, where the driver is right without us: what is wrong, and a remark.
    check: Callable[[Answer, Truth], tuple[str, str]] | None = None
    #: Whether it wants to know the processes to ask about.
    about: bool = False
    #: Whether the answers are of interest where they are equal, too.
    show: bool = False

    def unaided(self) -> Tool:
        """The same, where nothing is there that translates."""
        return self._replace(judge=lambda *answers: self.judge(*answers)._replace(translated=False))

    def asked(self, truth: Truth) -> list[str]:
        """The command in a place where this is so."""
        if not self.about:
            return self.command
        asked = (*sorted(truth.pids), *sorted(truth.others - truth.pids)[:1])
        return [*self.command, "--pids", ",".join(map(str, asked))]


def parsed(parse: Callable[[str], Iterable[Row]], answer: Answer, gpus: Mapping[str, str] | None = None) -> list[Row]:
    """The rows of an answer, with the GPUs named as in the scene. ValueError where there is none to read."""
    found: list[Row] = []
    try:
        found = list(parse(answer.out))
    except (ValueError, KeyError, TypeError, IndexError) as error:
        if not answer.status:
            raise ValueError(f"cannot read the answer: {error!r}") from error
    if answer.status and not found:  # nvitop has its rows and a status of 1 where it misses some figure
        raise ValueError(f"exit status {answer.status}: {answer.said}")
    return rows.order(row._replace(gpu=(gpus or {}).get(row.gpu, row.gpu)) for row in found)


@dataclass(frozen=True)
class Listing:
    """Judges two lists of processes, and one on the host."""

    parse: Callable[[str], Iterable[Row]]
    gpus: Mapping[str, str] | None = None
    tells_memory: bool = True

    def judge(self, ours: Answer, drivers: Answer, truth: Truth) -> Outcome:
        left, right = (parsed(self.parse, one, self.gpus) for one in (ours, drivers))
        need = truth.memory if self.tells_memory else truth.memory.keys()
        return Outcome(rows.judge(left, right, need), left, right, f"{len(left)} rows")

    def check(self, answer: Answer, truth: Truth) -> tuple[str, str]:
        """On the host every process is listed by its number there; the machine may have others too."""
        known = [row for row in parsed(self.parse, answer, self.gpus) if row.pid in truth.pids]
        repeats = len(known) - len(set(known))
        wrong = rows.untrue(list(set(known)), truth.memory if self.tells_memory else truth.memory.keys())
        return wrong, f" ({repeats} rows are repeats)" if repeats else ""


@dataclass(frozen=True)
class Use:
    """Judges two tellings of who uses the GPUs how much."""

    parse: Callable[[str], Iterable[Row]]
    lists_all: bool = False
    tells_memory: bool = False

    def judge(self, ours: Answer, drivers: Answer, truth: Truth) -> Outcome:
        left, right = (parsed(self.parse, one) for one in (ours, drivers))
        if not (left or right or self.lists_all):
            return judge_words(ours, drivers, truth)
        need = (truth.memory if self.tells_memory else truth.memory.keys()) if self.lists_all else None
        judgement = rows.judge_use(left, right, truth, all_of=need)
        used = sum(bool(row.use) for row in left)
        return Outcome(judgement, left, right, f"{len(left)} rows, {used} with utilisation", translated=bool(left))


def judge_words(ours: Answer, drivers: Answer, truth: Truth) -> Outcome:
    """Compare what is said word by word; no host PID of another process of the scene is to be among it."""
    left, right = (_lines(one) for one in (ours, drivers))
    if leaked := sorted({int(word) for word in re.findall(r"\d+", "\n".join(left))} & truth.others - truth.pids):
        judgement = Judgement(Verdict.DIFFERENT, f"ours: host PIDs {leaked}")
    elif (ours.status, left) != (drivers.status, right):
        judgement = Judgement(Verdict.DIFFERENT, f"not the same words (exit status {ours.status} and {drivers.status})")
    elif ours.status:
        judgement = Judgement(Verdict.REFUSED, f"exit status {ours.status}")
    else:
        judgement = Judgement(Verdict.EQUAL)
    return Outcome(judgement, left[:_SAID], right[:_SAID], f"{len(left)} lines of text", translated=False)


def _lines(answer: Answer) -> list[str]:
    """What is said, without what is the asker's own."""
    said = answer.out if answer.out.strip() or not answer.status else answer.err
    if not said.startswith("{"):
        return [line.rstrip() for line in said.splitlines() if line.strip()]
    told = json.loads(said)  # of ask.py
    return [str(one) for name in ("words", "lists", "errors") for one in told.get(name, ())]


@dataclass(frozen=True)
class Accounts:
    """Judges two lists of the processes that there are accounts of."""

    parse: Callable[[str], Iterable[int]]

    def judge(self, ours: Answer, drivers: Answer, truth: Truth) -> Outcome:
        outcome = judge_words(ours, drivers, truth)
        if ours.status or drivers.status:
            return outcome
        left, right = (list(self.parse(one.out)) for one in (ours, drivers))
        if not (left or right):
            return outcome
        return outcome._replace(judgement=raw.judge_pids(left, right, truth), translated=True)


def judge_raw(ours: Answer, drivers: Answer, truth: Truth) -> Outcome:
    """Compare what ask.py was told by raw controls."""
    for one in (ours, drivers):
        if one.status:
            raise ValueError(f"exit status {one.status}: {one.said}")
    return raw.judge(raw.answers(ours.out), raw.answers(drivers.out), truth)


def check_samples(answer: Answer, truth: Truth) -> tuple[str, str]:
    """On the host: the utilisation samples name no process of the scene that is none."""
    if answer.status:
        raise ValueError(f"exit status {answer.status}: {answer.said}")
    remarks = []
    for told in raw.answers(answer.out):
        if told.status != 0:
            remarks.append(f"GPU {told.gpu}: {told.outcome}")
            continue
        found = raw.samples(told.params)
        there = {pid for gpu, pid in truth.memory if gpu == told.gpu}
        seen = there & set(found.processes())
        remarks.append(
            f"GPU {told.gpu}: {len(seen)} of {len(there)} in the samples, {found.addresses} kernel addresses"
        )
    return "", f" ({'; '.join(remarks)})"


@dataclass(frozen=True)
class Machine:
    """What the scene runs on: a real GPU, or a stand-in driver at this control node."""

    stand_in: Path | None = None
    gpus: Mapping[str, str] = field(default_factory=dict)
    """The scene's numbers of the GPUs, "0" and on: by their PCI addresses."""

    @property
    def control_node(self) -> Path:
        return self.stand_in or CONTROL_NODE

    @property
    def device(self) -> list[str]:
        return ["--device", str(self.stand_in)] if self.stand_in else []

    def tools(self) -> list[Tool]:
        """Those that work on it."""
        return [*([] if self.stand_in else self._real()), *self._ours()]

    def _ours(self) -> list[Tool]:
        def controls(name: str, what: str, **options: Any) -> Tool:
            return Tool(name, python(ASK_PY, what, *self.device), judge_raw, **options)

        ps, users = Listing(rows.mpu_notify_ps), Listing(rows.ask, tells_memory=False)
        subdevices = python(ASK_PY, "subdevices", *self.device)
        return [
            Tool("mpu-notify ps --json", mpu_notify_command("ps", "--json", *self.device), ps.judge, ps.check),
            Tool("raw GET_PIDS of class 0x2080", subdevices, users.judge, users.check),
            controls("raw 0x20802096, utilisation samples", "utilisation", check=check_samples, show=True),
            controls("raw 0xb04, accounted processes", "accounting-pids"),
            controls("raw 0xb03, accounts of processes", "accounting-info", about=True),
            controls("raw 0x2080016e, 0x208001af and 0x2080017c, sessions", "sessions"),
        ]

    def _real(self) -> list[Tool]:
        apps = "--query-compute-apps=gpu_bus_id,pid,process_name,used_memory"
        accounted = "--query-accounted-apps=gpu_bus_id,pid,gpu_utilization,max_memory_usage"

        def pmon(what: str) -> tuple[str, list[str]]:
            command = ["nvidia-smi", "pmon", "-s", what, "-c", "1"]
            return " ".join(command), command

        memory, use = Listing(rows.pmon), Use(rows.pmon, lists_all=True)
        both = Use(rows.pmon, lists_all=True, tells_memory=True)
        sampled = Use(rows.ask)
        return [
            Tool("nvidia-smi", ["nvidia-smi"], Listing(rows.nvidia_smi).judge),
            Tool(
                f"nvidia-smi {apps} --format=csv",
                ["nvidia-smi", apps, "--format=csv"],
                Listing(rows.compute_apps, self.gpus).judge,
            ),
            Tool(*pmon("m"), memory.judge),
            Tool(*pmon("u"), use.judge, show=True),
            Tool(*pmon("um"), both.judge, show=True),
            Tool("nvidia-ml-py, running processes v3", python(ASK_PY, "nvml"), Listing(rows.ask).judge),
            Tool(
                "nvidia-ml-py, process utilisation",
                python(ASK_PY, "nvml-use", "--times", "6"),
                sampled.judge,
                show=True,
            ),
            Tool("nvitop -1", python("-m", "nvitop", "-1"), Listing(rows.nvitop).judge),
            Tool("gpustat --json", python("-m", "gpustat", "--json"), Listing(rows.gpustat).judge),
            Tool("nvidia-ml-py, accounting mode and sessions", python(ASK_PY, "nvml-words"), judge_words, show=True),
            Tool(
                "nvidia-ml-py, accounted processes",
                python(ASK_PY, "nvml-accounted"),
                Accounts(rows.ask_accounted).judge,
                show=True,
            ),
            Tool(
                f"nvidia-smi {accounted} --format=csv",
                ["nvidia-smi", accounted, "--format=csv"],
                Accounts(rows.accounted_apps).judge,
                show=True,
            ),
        ]

    def table(self) -> list[str]:
        """The command whose wall time is compared."""
        return mpu_notify_command("ps", "--json", *self.device) if self.stand_in else ["nvidia-smi"]

    def run(self, *options: str) -> list[str]:
        """Everything is translated, unless the options say something else."""
        return mpu_notify_command("run", "--translate", "always", *self.device, *options, "--")


def session_tools() -> tuple[list[Tool], list[str], list[tuple[str, Answer]]]:
    """nvidia-smi's lists of sessions, if they end by themselves; what is to be said of others; what they said."""
    found, notes, probes = [], [], []
    for name in ("encodersessions", "fbcsessions"):
        told = ask(["nvidia-smi", name, "-h"], _PROBE_S)
        command = ["nvidia-smi", name, *(["-c", "1"] if "--count" in told.out + told.err else [])]
        tried = ask(command, _PROBE_S)
        probes += [(f"nvidia-smi {name} -h", told), (" ".join(command), tried)]
        if tried.seconds < _PROBE_S:
            found.append(Tool(" ".join(command), command, judge_words, show=True))
        else:
            notes.append(f"{' '.join(command)}: not compared, it does not end by itself")
    return found, notes, probes
