"""Our answers and the driver's own, side by side, on a real GPU: ``python tests/gpu/oracle.py``.

On a driver that translates PIDs by itself (open flavour; 570.148.08, 575.57.08 or later) its own answer is the oracle
for ours. Needs root in the initial PID namespace, nvidia-smi, nvidia-ml-py, nvitop, gpustat and, for one of the
timings, torch; what is not there is said and left out. Takes about three minutes.

Exit status: 0 if no difference is unexplained, 1 if one is or something could not be compared.
"""

from __future__ import annotations

import argparse
import importlib.metadata
import json
import os
import signal
import statistics
import sys
import tempfile
import time
from collections.abc import Callable, Iterable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

try:
    import mpu_notify.notify.native
except ImportError:  # not installed, but built in place
    sys.path.insert(0, str(Path(__file__).resolve().parents[2]))
    import mpu_notify.notify.native
if __name__ == "__main__":
    sys.path.insert(0, str(Path(__file__).resolve().parents[2]))  # for tests.gpu, whatever else calls itself tests

from mpu_notify.pidns import require_initial_namespace
from mpu_notify.standin.process import StandIn
from tests.gpu import report, rows
from tests.gpu.report import Comparison, Findings, Timing
from tests.gpu.rows import Judgement, Row, Verdict
from tests.gpu.scene import (
    CONTROL_NODE,
    HERE,
    Answer,
    Place,
    Scene,
    SceneError,
    Shell,
    ask,
    left_behind,
    mpu_notify_command,
    open_shell,
    python,
    set_scene,
)

RESULTS = HERE.parents[1] / "docs" / "gpu-results.md"
BUDGET_S = 330.0
_TRIES = 3
_LIMIT_S = 20  # of one tool
_ASK_PY = str(HERE / "ask.py")


class Tool(NamedTuple):
    """A tool that lists GPU processes."""

    name: str
    command: list[str]
    parse: Callable[[str], Iterable[Row]]
    tells_memory: bool = True


@dataclass(frozen=True)
class Machine:
    """What the scene runs on: a real GPU, or a stand-in driver at this control node."""

    stand_in: Path | None = None

    @property
    def control_node(self) -> Path:
        return self.stand_in or CONTROL_NODE

    @property
    def device(self) -> list[str]:
        return ["--device", str(self.stand_in)] if self.stand_in else []

    def tools(self) -> list[Tool]:
        """Those that work on it."""
        apps = "--query-compute-apps=pid,process_name,used_memory"
        raw = python(_ASK_PY, "subdevices", *self.device)
        ours = [
            Tool("mpu-notify ps --json", mpu_notify_command("ps", "--json", *self.device), rows.mpu_notify_ps),
            Tool("raw GET_PIDS of class 0x2080", raw, rows.ask, tells_memory=False),
        ]
        if self.stand_in:
            return ours
        return [
            Tool("nvidia-smi", ["nvidia-smi"], rows.nvidia_smi),
            Tool(f"nvidia-smi {apps} --format=csv", ["nvidia-smi", apps, "--format=csv"], rows.compute_apps),
            Tool("nvidia-smi pmon -s m -c 1", ["nvidia-smi", "pmon", "-s", "m", "-c", "1"], rows.pmon),
            Tool("nvidia-ml-py, running processes v3", python(_ASK_PY, "nvml"), rows.ask),
            Tool("nvitop -1", python("-m", "nvitop", "-1"), rows.nvitop),
            Tool("gpustat --json", python("-m", "gpustat", "--json"), rows.gpustat),
            *ours,
        ]

    def table(self) -> list[str]:
        """The command whose wall time is compared."""
        return mpu_notify_command("ps", "--json", *self.device) if self.stand_in else ["nvidia-smi"]

    def run(self, *options: str) -> list[str]:
        return mpu_notify_command("run", "--translate", "always", *self.device, *options, "--")


_START = time.monotonic()


def say(text: str) -> None:
    print(f"[{time.monotonic() - _START:6.1f} s] {text}", flush=True)


class Log:
    """The debug log of a `run`: which calls were translated."""

    def __init__(self, file: Path) -> None:
        self._file = file

    def records(self) -> Iterator[dict[str, object]]:
        if self._file.exists():
            for line in self._file.read_text(errors="replace").splitlines(keepends=True):
                if line.endswith("\n"):
                    yield json.loads(line)

    def translated(self) -> int:
        return sum(one.get("outcome") == "translated" for one in self.records())

    def translated_since(self, before: int) -> int:
        """How many more there are; the last one is logged after the caller has its answer."""
        deadline = time.monotonic() + 2
        while (now := self.translated()) == before and time.monotonic() < deadline:
            time.sleep(0.02)
        return now - before


def compare(tool: Tool, scene: Scene, there: Place, log: Log) -> Comparison:
    """Ask a tool under the filter and outside; again where they differ, for processes come and go."""
    comparison = Comparison(tool.name, there.name)
    for _ in range(_TRIES):
        comparison.tries += 1
        start = time.monotonic()
        try:
            comparison.judgement = _try(comparison, tool, scene, there, log)
        except Exception as error:  # noqa: BLE001 - one failing tool must not hide the others
            comparison.judgement = Judgement(Verdict.FAILED, f"{type(error).__name__}: {error}")
        hung = time.monotonic() - start > _LIMIT_S
        if hung or comparison.judgement.verdict not in (Verdict.DIFFERENT, Verdict.FAILED):
            break
    return comparison


def _try(comparison: Comparison, tool: Tool, scene: Scene, there: Place, log: Log) -> Judgement:
    comparison.ours = comparison.drivers = []
    before = log.translated()
    ours = there.shell.run(tool.command, _LIMIT_S)
    comparison.raw.append(("ours", ours))
    if (ours.status and "No module named" in ours.err) or ours.status in (126, 127):
        return Judgement(Verdict.NOT_INSTALLED, ours.err.strip().splitlines()[-1] if ours.err.strip() else "")
    comparison.translated = log.translated_since(before)
    drivers = there.drivers_own(tool.command, _LIMIT_S)
    comparison.raw.append(("the driver's own", drivers))
    comparison.ours = rows.order(_parsed(tool, ours))
    comparison.drivers = rows.order(_parsed(tool, drivers))
    if not comparison.translated:
        return Judgement(Verdict.FAILED, "none of our side's calls was translated")
    truth = scene.truth(there)
    return rows.judge(comparison.ours, comparison.drivers, truth if tool.tells_memory else truth.keys())


def _parsed(tool: Tool, answer: Answer) -> list[Row]:
    found: list[Row] = []
    try:
        found = list(tool.parse(answer.out))
    except (ValueError, KeyError, TypeError) as error:
        if not answer.status:
            raise ValueError(f"cannot read the answer: {error!r}") from error
    if answer.status and not found:  # nvitop has its rows and a status of 1 where it misses some figure
        raise ValueError(f"exit status {answer.status}: {answer.err.strip()[-300:]}")
    return found


def compare_all(machine: Machine, work: Path, findings: Findings, raw: Path | None, deadline: float) -> None:
    """Set the scene and compare every tool in every namespace."""
    logs = {name: work / f"log-{name}.jsonl" for name in "AB"}

    def run(name: str) -> list[str]:
        log = ("--log-level", "debug", "--log-format", "json", "--log-file", str(logs[name]))
        return [*machine.run(*log), "sh"]

    with ExitStack() as stack:
        worker_options = machine.device or ["--cuda"]
        scene = set_scene(work, run, worker_options, stack)
        findings.problems += scene.problems
        findings.workers = [
            f"{one.name} | {one.mib} MiB | {', '.join(map(str, one.process.pids))}"
            for one in scene.workers
            if one.process
        ]
        say(f"the scene is set; problems: {scene.problems or 'none'}")
        for line in findings.workers:
            say(f"    {line}")
        if "host" in scene.places:
            _check_host(machine, scene, findings)
        for there in scene.places.values():
            if there.depth:
                _compare_in(there, machine, scene, findings, deadline)
    if left := left_behind(scene):
        findings.problems.append(f"left behind: {', '.join(left)}")
    for name, file in logs.items():
        found = [one for one in Log(file).records() if one["level"] in ("warning", "error")]
        findings.untranslated += [f"{name}: {one['message']}: {one.get('reason', '')}" for one in found]
        if raw and file.exists():
            (raw / file.name).write_bytes(file.read_bytes())
    if raw:
        _write_raw(raw, findings)


def _compare_in(there: Place, machine: Machine, scene: Scene, findings: Findings, deadline: float) -> None:
    log = Log(scene.work / f"log-{'B' if there.name == 'B' else 'A'}.jsonl")
    for tool in machine.tools():
        if time.monotonic() > deadline:
            findings.problems.append(f"{there.name}: {tool.name}: no time left to ask it")
            continue
        done = compare(tool, scene, there, log)
        findings.comparisons.append(done)
        why = f": {done.judgement.why}" if done.judgement.verdict is not Verdict.EQUAL else ""
        say(f"{there.name}: {tool.name}: {done.judgement.verdict.value}{why[:200]}")


def _check_host(machine: Machine, scene: Scene, findings: Findings) -> None:
    """On the host, unaided, every process is listed by its number there; the machine may have others too."""
    truth = scene.truth(scene.places["host"])
    for tool in machine.tools()[-2:]:
        try:
            found = _parsed(tool, ask(tool.command, 20))
            known = [row for row in found if row.pid in truth]
            repeats = len(known) - len(set(known))
            wrong = rows.untrue(list(set(known)), truth if tool.tells_memory else truth.keys())
            note = f" ({repeats} rows are repeats)" if repeats else ""
        except Exception as error:  # noqa: BLE001 - as above
            wrong, note = f"{type(error).__name__}: {error}", ""
        findings.host.append((tool.name + note, wrong))
        say(f"host: {tool.name}: {wrong or 'all of the scene by host PIDs'}{note}")


def _write_raw(raw: Path, findings: Findings) -> None:
    texts: dict[str, list[str]] = {}
    for one in findings.comparisons:
        for side, answer in one.raw:
            head = f"##### {one.tool} / {side} / status {answer.status} / {answer.seconds:.3f} s"
            texts.setdefault(one.place.replace(" ", "-"), []).append(f"{head}\n{answer.out}\n{answer.err}")
    for name, text in texts.items():
        (raw / f"{name}.txt").write_text("\n".join(text))


def _seconds(command: list[str]) -> Callable[[Shell], float]:
    """Ask for the time that a command itself tells."""

    def told(shell: Shell) -> float:
        answer = shell.run(command, 60)
        if answer.status:
            raise SceneError(answer.err.strip()[-300:] or f"exit status {answer.status}")
        return float(json.loads(answer.out)["seconds"])

    return told


def _wall(command: list[str]) -> Callable[[Shell], float]:
    def taken(shell: Shell) -> float:
        answer = shell.run(command)
        if answer.status:
            raise SceneError(answer.err.strip()[-300:] or f"exit status {answer.status}")
        return answer.seconds

    return taken


class Pair(NamedTuple):
    """A shell under the filter and one that is not, in like namespaces."""

    under: Shell
    plain: Shell


def time_pairs(timing: Timing, take: Callable[[Shell], float], pair: Pair, times: int, deadline: float) -> Timing:
    """Fill a timing in: the medians of interleaved pairs, in alternate order."""
    under: list[float] = []
    plain: list[float] = []
    try:
        for shell in pair:
            take(shell)  # what is slow the first time is no one's difference
        for number in range(times):
            if time.monotonic() > deadline:
                timing.note = "cut short for want of time"
                break
            order = [(pair.under, under), (pair.plain, plain)]
            for shell, taken in order if number % 2 else reversed(order):
                taken.append(take(shell))
    except (SceneError, OSError, ValueError, KeyError) as error:
        timing.note = f"failed: {error}"
    count = min(len(under), len(plain))
    if count:
        timing.with_filter, timing.without = statistics.median(under), statistics.median(plain)
        timing.ratio = statistics.median(one / other for one, other in zip(under, plain, strict=False))
        timing.note = "; ".join(filter(None, (f"{count} pairs", timing.note)))
    say(f"{timing.name}: {report.timing_cells(timing)}")
    return timing


def _table_name(machine: Machine) -> str:
    return "mpu-notify ps" if machine.stand_in else "nvidia-smi"


def measure(machine: Machine, work: Path, findings: Findings, deadline: float) -> None:
    """What the filter costs."""
    with ExitStack() as stack:
        try:
            under = open_shell("speed-filter", [*machine.run(), "sh"], work, stack)
            plain_command = ["unshare", "--pid", "--fork", "--mount-proc", "--kill-child", "sh"]
            pair = Pair(under, open_shell("speed-plain", plain_command, work, stack))
            idle = Timing(f"{_table_name(machine)}, wall time, no GPU process running", "ms", limit=1.03)
            findings.timings.append(time_pairs(idle, _wall(machine.table()), pair, 41, deadline))
            # A process each: rows to translate, and a GPU that stays initialised between the tools.
            scene = Scene(work, machine.device or ["--cuda"])
            for name, shell in pair._asdict().items():
                scene.add(name, lambda shell=shell: shell)  # type: ignore[misc]
                scene.start(f"for timing, {name}", name, 64)
            scene.wait()
            findings.problems += scene.problems
        except (SceneError, OSError) as error:
            findings.problems.append(f"timing: {error}")
            return
        question = python(_ASK_PY, "time-running", "--times", "50" if machine.stand_in else "2000", *machine.device)
        context = python(_ASK_PY, "time-context", *machine.device)
        for timing, take, times in (
            (
                Timing(f"{_table_name(machine)}, wall time, two GPU processes running", "ms", limit=1.03),
                _wall(machine.table()),
                31,
            ),
            (Timing("CUDA context, from cuInit to the first memory", "ms"), _seconds(context), 15),
            (Timing("NVML, one question for running processes", "us"), _seconds(question), 5),
        ):
            findings.timings.append(time_pairs(timing, take, pair, times, deadline))
    findings.timings.append(count_traps(machine, work, deadline))


def count_traps(machine: Machine, work: Path, deadline: float) -> Timing:
    """How many calls 100 more training steps trap."""
    timing = Timing("calls trapped by 100 training steps", "calls")
    calls: dict[str, int] = {}
    for name, steps in (("50", 50), ("150", 150), ("50 again", 50)):
        if time.monotonic() > deadline:
            timing.note = "cut short for want of time"
            break
        log = work / f"train-{name.replace(' ', '-')}.jsonl"
        options = ("--log-level", "info", "--log-format", "json", "--log-file", str(log))
        command = [*machine.run(*options), *python(_ASK_PY, "train", "--times", str(steps), *machine.device)]
        try:
            answer = ask(command, 120)
            ended = [one for one in Log(log).records() if one["message"] == "ended"]
            if answer.status or not ended:
                timing.note = f"failed: {answer.err.strip()[-300:] or f'exit status {answer.status}'}"
                break
            calls[name] = int(str(ended[-1]["calls"]))
        except (OSError, ValueError, KeyError) as error:
            timing.note = f"failed: {error}"
            break
    if "150" in calls:
        timing.with_filter = calls["150"] - calls["50"]
    counts = "whole runs: " + ", ".join(f"{name} steps {count}" for name, count in calls.items())
    timing.note = "; ".join(filter(None, (counts if calls else "", timing.note, "expected: 0")))
    say(f"{timing.name}: {report.timing_cells(timing)}")
    return timing


@contextmanager
def _environment() -> Iterator[Path]:
    """A work directory, and the environment in which every command finds the package and is not coloured."""
    kept = dict(os.environ)
    with tempfile.TemporaryDirectory(prefix="mpu-notify-oracle-") as name:
        work = Path(name)
        path = [str(Path(mpu_notify.__file__).resolve().parents[1]), *filter(None, [os.environ.get("PYTHONPATH")])]
        try:
            importlib.metadata.version("mpu-notify")
        except importlib.metadata.PackageNotFoundError:  # built in place: the command asks for its own version
            metadata = work / "metadata" / "mpu_notify-0.dist-info" / "METADATA"
            metadata.parent.mkdir(parents=True)
            metadata.write_text("Metadata-Version: 2.1\nName: mpu-notify\nVersion: 0\n")
            path.append(str(work / "metadata"))
        # The safe path: a checkout that is not built shall not hide the package that is installed.
        os.environ.update(PYTHONPATH=":".join(path), PYTHONSAFEPATH="1", PYTHONUTF8="1", LC_ALL="C.UTF-8")
        os.environ.update(NO_COLOR="1", COLUMNS="200")
        try:
            yield work
        finally:
            os.environ.clear()
            os.environ.update(kept)


def results_text(findings: Findings, *, real: bool) -> str:
    """The results, without the paths of this machine."""
    told = report.text(findings, report.facts(real=real))
    for path, name in ((sys.executable, "python"), (f"{HERE.parents[1]}/", "")):
        told = told.replace(path, name)
    return told


def examine(results: Path | None, raw: Path | None, *, stand_in: bool, seconds: float = BUDGET_S) -> Findings:
    """Compare, measure and write the results; all that was started is ended."""
    require_initial_namespace()
    findings = Findings()
    deadline = time.monotonic() + seconds

    def write() -> None:
        text = results_text(findings, real=not stand_in)
        if results:
            results.parent.mkdir(parents=True, exist_ok=True)
            results.write_text(text, encoding="utf-8")
        if raw:
            (raw / "results.md").write_text(text, encoding="utf-8")

    with ExitStack() as stack:
        work = stack.enter_context(_environment())
        machine = Machine(stack.enter_context(StandIn("--era", "native")).control_node if stand_in else None)
        if raw:
            raw.mkdir(parents=True, exist_ok=True)
        try:
            compare_all(machine, work, findings, raw, deadline)
            write()  # what is known is kept should the rest take too long
            measure(machine, work, findings, deadline)
        finally:
            write()
    return findings


def main() -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter, allow_abbrev=False
    )
    parser.add_argument("--results", metavar="FILE", type=Path, help="default: docs/gpu-results.md; none on a stand-in")
    parser.add_argument("--raw", metavar="DIR", type=Path, help="keep what every tool printed, and the logs")
    parser.add_argument("--stand-in", action="store_true", help="rehearse on a stand-in driver, where there is no GPU")
    parser.add_argument("--seconds", type=float, default=BUDGET_S, help="begin nothing later (default: %(default)g)")
    args = parser.parse_args()
    results = args.results or (None if args.stand_in else RESULTS)
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))
    findings = examine(results, args.raw, stand_in=args.stand_in, seconds=args.seconds)
    print(results_text(findings, real=not args.stand_in))
    if missing := sorted({one.tool for one in findings.comparisons if one.judgement.verdict is Verdict.NOT_INSTALLED}):
        say(f"not installed, so not compared: {', '.join(missing)}")
    say("no unexplained difference" if findings.good() else "NOT GOOD: see DIFFERENT, FAILED and problems above")
    return 0 if findings.good() else 1


if __name__ == "__main__":
    sys.exit(main())
