"""What was found on a GPU, and how the results tell it."""

from __future__ import annotations

import platform
import re
import shutil
import subprocess
import textwrap
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from datetime import datetime, timezone
from functools import cache
from pathlib import Path

from tests.gpu.rows import Judgement, Verdict
from tests.gpu.scene import Answer


@dataclass
class Comparison:
    """A tool in a place: what it said under the filter, what outside, and what to think of it."""

    tool: str
    place: str
    ours: Sequence[object] = ()
    drivers: Sequence[object] = ()
    note: str = ""
    show: bool = False  # the answers, though they be equal
    judgement: Judgement = field(default_factory=lambda: Judgement(Verdict.FAILED))
    tries: int = 0
    translated: int = 0
    raw: list[tuple[str, Answer]] = field(default_factory=list)


@dataclass
class Timing:
    """One quantity with and without the filter."""

    name: str
    unit: str
    with_filter: float | None = None
    without: float | None = None
    ratio: float | None = None
    limit: float | None = None
    note: str = ""


@dataclass
class Findings:
    """All that the results tell."""

    comparisons: list[Comparison] = field(default_factory=list)
    host: list[tuple[str, str, str]] = field(default_factory=list)  # what was checked, what was wrong, a remark
    timings: list[Timing] = field(default_factory=list)
    problems: list[str] = field(default_factory=list)
    workers: list[str] = field(default_factory=list)
    untranslated: list[str] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)
    runtime: str | None = None  # the name of the OCI runtime whose containers it was in
    seconds: float = 0
    complete: bool = False

    def good(self) -> bool:
        bad = any(one.judgement.verdict in (Verdict.DIFFERENT, Verdict.FAILED) for one in self.comparisons)
        bad = bad or any(wrong for _, wrong, _ in self.host) or bool(self.problems)
        return self.complete and bool(self.comparisons) and not bad


def facts(*, real: bool) -> list[tuple[str, str]]:
    """What it ran on. No host's name, and of the kernel its version only."""
    kernel = re.match(r"[\d.]*\d", platform.release())
    known = [
        ("date", datetime.now(timezone.utc).date().isoformat()),
        ("kernel", f"Linux {kernel[0] if kernel else platform.release()}"),
        ("Python", platform.python_version()),
    ]
    return [*known, *(_driver() if real else [("driver", "the stand-in, era native: a rehearsal, not a result")])]


@cache
def _driver() -> list[tuple[str, str]]:
    try:
        first = Path("/proc/driver/nvidia/version").read_text(encoding="ascii").splitlines()[0]
        version = re.search(r"\d+\.\d+(?:\.\d+)?", first.partition("Module")[2])
        flavour = "open" if "Open Kernel Module" in first else "proprietary"
        driver = f"{version[0] if version else '?'}, {flavour} flavour"
    except (OSError, IndexError) as error:
        driver = f"unknown: {error}"
    gpus = "unknown"
    if smi := shutil.which("nvidia-smi"):
        command = [smi, "--query-gpu=name", "--format=csv,noheader"]
        try:
            done = subprocess.run(command, capture_output=True, text=True, timeout=20, check=False)
            gpus = ", ".join(done.stdout.split("\n")[:-1]) or gpus
        except subprocess.TimeoutExpired:
            pass
    return [("GPU", gpus), ("driver", driver)]


def timing_cells(timing: Timing) -> str:
    """The cells of a timing after its name."""
    scale = {"ms": 1e3, "us": 1e6}.get(timing.unit, 1)
    figures = (timing.with_filter, timing.without)
    cells = ["-" if one is None else f"{one * scale:.4g} {timing.unit}" for one in figures]
    cells.append("-" if timing.ratio is None else f"{timing.ratio:.3f}")
    limit = "-" if timing.limit is None else f"{timing.limit:g}"
    if timing.limit is not None and timing.ratio is not None and timing.ratio > timing.limit:
        limit += ": **over**"
    return " | ".join((*cells, limit, timing.note))


def _table(head: str, lines: Iterable[str]) -> list[str]:
    return [f"| {head} |", "|" + " --- |" * (head.count("|") + 1), *(f"| {line} |" for line in lines), ""]


_CELL = 48  # characters of a remark that still fit a cell


def _how(findings: Findings) -> list[str]:
    runtime = findings.runtime
    where, repeat = "under the filter of `mpu-notify run --translate always`", ""
    if runtime:
        where = f"in a container of {runtime} that opted in, with `mpu-notify serve --translate always`"
        repeat = f" --runtime {runtime}"
    told = (
        "On a driver that translates PIDs by itself, its own answer is the oracle for ours. Each tool is asked twice "
        f"in the same PID namespace: {where}, and outside the filter (entered by nsenter). *equal*: the same rows. "
        "*explained*: they differ, and it is known which is right and why (below). *refused alike*: the driver refuses "
        "both, with the same status. Where both agree they also agree with the truth: the PIDs that the processes "
        "themselves told, and at least the memory that they allocated on each GPU. The processes compute in bursts. No "
        f"setting of the card is changed. Repeat it as root with `python tests/gpu/oracle.py{repeat}`."
    )
    if runtime:
        told += (
            " *A* and *B* are containers, *A, by exec* is a further process in A. At the end the supervisor is killed: "
            "without one the driver's own answer stands, and the next one serves the containers that there are."
        )
    return textwrap.wrap(told, 120, break_on_hyphens=False)


def text(findings: Findings, known: list[tuple[str, str]]) -> str:
    """The results, as Markdown."""
    lines = ["# Our answers and the driver's own, on a real GPU", ""]
    took = f"{findings.seconds:.0f} s" + ("" if findings.complete else ": **not complete, the run was ended early**")
    lines += _table("what | which", (f"{what} | {which}" for what, which in (*known, ("wall time", took))))
    lines += [*_how(findings), ""]
    lines += [
        *_table("GPU process | GPU | allocated | PID, from the host's to that in its own namespace", findings.workers),
        "## Comparison",
        "",
    ]
    places = list(dict.fromkeys(one.place for one in findings.comparisons))
    cells: dict[str, dict[str, str]] = {}
    for one in findings.comparisons:
        cells.setdefault(one.tool, {})[one.place] = _cell(one)
    lines += _table(
        " | ".join(["tool", *places]),
        (" | ".join([f"`{tool}`", *(by.get(place, "-") for place in places)]) for tool, by in cells.items()),
    )
    told: set[str] = set()
    for one in findings.comparisons:
        lines += _detail(one, told)
    lines += ["## On the host, unaided", ""]
    lines += _table(
        "tool | every process of the scene by its host PID",
        (f"`{name}`{remark} | {wrong or 'yes'}" for name, wrong, remark in findings.host),
    )
    if findings.timings:
        lines += ["## Speed", ""]
        head = "what | with the filter | without | ratio | limit | note"
        lines += _table(head, (f"{one.name} | {timing_cells(one)}" for one in findings.timings))
        lines += ["Medians; the ratio is the median over interleaved pairs in alternate order.", ""]
    lines += ["## Calls that were left untranslated, and problems", ""]
    lines += [f"- {one}" for one in (*findings.untranslated, *findings.problems)] or ["None."]
    if findings.notes:
        lines += ["", "## Remarks", "", *(f"- {one}" for one in findings.notes)]
    return "\n".join(lines) + "\n"


def _cell(one: Comparison) -> str:
    remark = one.note if len(one.note) <= _CELL else "see below"
    again = f"asked {one.tries} times" if one.tries > 1 else ""
    count = ", ".join(filter(None, (remark, f"{one.translated} calls translated", again)))
    return f"{one.judgement.verdict.value} ({count})"


def _detail(one: Comparison, told: set[str]) -> list[str]:
    """Both sides, where they are not equal or of interest all the same."""
    verdict, why = one.judgement
    if verdict in (Verdict.EQUAL, Verdict.REFUSED) and not one.show:
        return []
    head = [f"### {one.place}: {one.tool}: {verdict.value}", ""]
    if why:
        head += ["For the reason given above." if why in told else why, ""]
        told.add(why)
    if len(one.note) > _CELL:
        head += [*(f"- {part}" for part in one.note.split("; ")), ""]
    if verdict is Verdict.NOT_INSTALLED:
        return head
    if verdict in (Verdict.EQUAL, Verdict.REFUSED) and list(map(str, one.ours)) == list(map(str, one.drivers)):
        return [*head, "Both:", "", *_indented(one.ours), ""]
    return [*head, "Ours:", "", *_indented(one.ours), "", "The driver's own:", "", *_indented(one.drivers), ""]


def _indented(found: Sequence[object]) -> list[str]:
    return [f"    {one}" for one in found] or ["    (nothing)"]
