"""Our answers and the driver's own, side by side, on a real GPU: ``python tests/gpu/oracle.py``.

On a driver that translates PIDs by itself (open flavour; 570.148.08, 575.57.08 or later) its own answer is the oracle
for ours. Needs root in the initial PID namespace, nvidia-smi, nvidia-ml-py, nvitop, gpustat and, for one of the
timings, torch; what is not there is said and left out. Where there are two GPUs, both are used. No setting of the card
is changed. Takes about four minutes, and ends itself before five.

Exit status: 0 if no difference is unexplained, 1 if one is or something could not be compared.
"""

from __future__ import annotations

import argparse
import importlib.metadata
import json
import os
import shutil
import signal
import statistics
import sys
import tempfile
import time
import traceback
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import NamedTuple

try:
    import mpu_notify.notify.native
except ImportError:  # not installed, but built in place
    sys.path.insert(0, str(Path(__file__).resolve().parents[2]))
    import mpu_notify.notify.native
if __name__ == "__main__":
    sys.path.insert(0, str(Path(__file__).resolve().parents[2]))  # for tests.gpu, whatever else calls itself tests

from mpu_notify.errors import MpuNotifyError
from mpu_notify.pidns import require_initial_namespace
from mpu_notify.rm.abi import CONTROL_NODE
from mpu_notify.rm.client import RmClient
from mpu_notify.standin.process import StandIn
from tests.gpu import ask as questions
from tests.gpu import raw, report
from tests.gpu.containers import Containers
from tests.gpu.report import Comparison, Findings, Timing
from tests.gpu.rows import Judgement, Verdict
from tests.gpu.scene import (
    HERE,
    Answer,
    Place,
    Scene,
    SceneError,
    Shell,
    ask,
    left_behind,
    open_shell,
    python,
    set_scene,
)
from tests.gpu.tools import ASK_PY, Machine, Tool, session_tools

RESULTS = HERE.parents[1] / "docs" / "gpu-results.md"
RESULTS_OF_CONTAINERS = RESULTS.with_name("gpu-containers.md")
BUDGET_S = 230.0
_GRACE_S = 55.0  # what was begun within the budget ends within this, or is ended
_TRIES = 3
_LIMIT_S = 15  # of one tool
_TRAINING_LIMIT_S = 50
_SAMPLES_S = 15  # the driver's ring of utilisation samples spans so much
_MOST_GPUS = 2


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


@dataclass
class Run:
    """One run of this script."""

    machine: Machine
    work: Path
    raw: Path | None
    deadline: float
    findings: Findings
    write: Callable[[], None]
    runtime: Path | None = None
    """The OCI runtime whose containers the namespaces are of; None: they are of `mpu-notify run`."""

    def in_time(self) -> bool:
        return time.monotonic() < self.deadline


def compare(tool: Tool, scene: Scene, there: Place, log: Log) -> Comparison:
    """Ask a tool under the filter and outside; again where they differ, for processes come and go."""
    comparison = Comparison(tool.name, there.name, show=tool.show)
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
    comparison.note = ""
    truth = scene.truth(there)
    command = tool.asked(truth)
    before = log.translated()
    ours = there.shell.run(command, _LIMIT_S)
    comparison.raw.append(("ours", ours))
    if (ours.status and "No module named" in ours.err) or ours.status in (126, 127):
        return Judgement(Verdict.NOT_INSTALLED, ours.said)
    drivers = there.drivers_own(command, _LIMIT_S)
    comparison.raw.append(("the driver's own", drivers))
    comparison.translated = log.translated() - before
    outcome = tool.judge(ours, drivers, truth)
    comparison.ours, comparison.drivers, comparison.note = outcome.ours, outcome.drivers, outcome.note
    if outcome.translated and not comparison.translated:
        comparison.translated = log.translated_since(before)
    verdict, why = outcome.judgement
    if outcome.translated and not comparison.translated:
        why = "; ".join(filter(None, ("none of our side's calls was translated", why)))
        return Judgement(verdict if verdict is Verdict.DIFFERENT else Verdict.FAILED, why)
    return outcome.judgement


@dataclass
class Stage:
    """The scene, where the calls of its namespaces are logged, and the containers that they are of, if they are."""

    scene: Scene
    logs: Mapping[str, Path]
    containers: Containers | None = None

    def log(self, place: str) -> Log:
        return Log(self.logs["B" if place == "B" else "A"])

    def container(self, record: Mapping[str, object], name: str) -> str:
        """Whose record it is, by the name of the place; that of its log where it has one of its own."""
        return str(record.get("container", "")).rpartition("-")[2] if self.containers else name


def _set_stage(run: Run, stack: ExitStack) -> Stage:
    machine, runtime = run.machine, run.runtime
    stage = Stage(Scene(run.work, ()), {name: run.work / f"log-{name}.jsonl" for name in "AB"})
    if runtime:
        stage.logs = dict.fromkeys(stage.logs, run.work / "log.jsonl")
        options = ["--translate", "always", *machine.device]
        stage.containers = Containers(runtime, run.work, stage.logs["A"], options, stack)

    def command(name: str) -> list[str]:
        if stage.containers:
            return stage.containers.command(name, *([machine.stand_in.parent] if machine.stand_in else []))
        log = ("--log-level", "debug", "--log-format", "json", "--log-file", str(stage.logs[name]))
        return [*machine.run(*log), "sh"]

    options = machine.device or ["--cuda"]
    scene = stage.scene = set_scene(run.work, command, [*options, "--busy"], min(_MOST_GPUS, len(machine.gpus)), stack)
    if stage.containers and "A" in scene.places:
        by_exec = stage.containers.exec_command("A")
        scene.add("A, by exec", lambda: open_shell("exec", by_exec, run.work, stack))
    findings = run.findings
    findings.problems += scene.problems
    findings.notes += scene.notes
    findings.workers = [
        f"{one.name} | {', '.join(map(str, one.gpus))} | {one.mib} MiB | {', '.join(map(str, one.process.pids))}"
        for one in scene.workers
        if one.process
    ]
    say(f"the scene is set; problems: {scene.problems or 'none'}")
    for line in findings.workers:
        say(f"    {line}")
    return stage


def compare_all(run: Run) -> None:
    """Set the scene and compare every tool in every namespace."""
    findings = run.findings
    with ExitStack() as stack:
        stage = _set_stage(run, stack)
        scene = stage.scene
        _wait_for_samples(run, scene)
        tools = run.machine.tools()
        if not run.machine.stand_in:
            further, notes, probes = session_tools()
            tools += further
            findings.notes += notes
            _write_raw(run.raw, "host", "probe", probes)
        if "host" in scene.places:
            _check_host(tools, scene, run)
        run.write()
        for there in scene.places.values():
            if there.depth:
                _compare_in(there, tools, stage, run)
                run.write()  # what is known is kept should the rest fail or take too long
        if stage.containers and "A" in scene.places:
            _change_supervisors(stage.containers, tools, stage, run)
    if left := left_behind(scene):
        findings.problems.append(f"left behind: {', '.join(left)}")
    _gather_complaints(stage, run)


def _gather_complaints(stage: Stage, run: Run) -> None:
    for file, name in {file: name for name, file in stage.logs.items()}.items():
        found = [one for one in Log(file).records() if one["level"] in ("warning", "error")]
        run.findings.untranslated += [
            f"{stage.container(one, name)}: {one['message']}: {one.get('reason', '')}" for one in found
        ]
        if run.raw and file.exists():
            (run.raw / file.name).write_bytes(file.read_bytes())


def _change_supervisors(containers: Containers, tools: Sequence[Tool], stage: Stage, run: Run) -> None:
    """Without a supervisor the driver's own answer stands; the next one serves the containers that there are."""
    inside = stage.scene.places["A"]
    containers.kill_supervisor()
    untranslated = [tool.unaided() for tool in tools if tool.command == run.machine.table()]
    _compare_in(replace(inside, name="A, no supervisor"), untranslated, stage, run)
    containers.start_supervisor()
    _compare_in(replace(inside, name="A, the next supervisor"), tools, stage, run)
    run.write()


def _compare_in(there: Place, tools: Iterable[Tool], stage: Stage, run: Run) -> None:
    log = stage.log(there.name)
    for tool in tools:
        if not run.in_time():
            run.findings.problems.append(f"{there.name}: {tool.name}: no time left to ask it")
            continue
        done = compare(tool, stage.scene, there, log)
        run.findings.comparisons.append(done)
        why = f": {done.judgement.why}" if done.judgement.verdict is not Verdict.EQUAL else ""
        say(f"{there.name}: {tool.name}: {done.judgement.verdict.value}: {done.note}{why[:300]}")
        _write_raw(run.raw, there.name, tool.name, done.raw)


def _wait_for_samples(run: Run, scene: Scene) -> None:
    """Wait until the driver has utilisation samples of every worker, as far as it ever has."""
    workers = scene.truth(scene.places["host"]).memory if "host" in scene.places else {}
    wanted, start, refused = set(workers), time.monotonic(), ""
    limit = start + (1 if run.machine.stand_in else _SAMPLES_S)  # a stand-in's workers do not compute
    while wanted and not refused and time.monotonic() < limit:
        try:
            for told in raw.answers(
                json.dumps({"answers": list(questions.raw(run.machine.stand_in, "utilisation", ()))})
            ):
                refused = refused if told.status == 0 else f"GPU {told.gpu}: {told.outcome}"
                seen = raw.samples(told.params).processes()
                wanted -= {(gpu, pid) for gpu, pid in wanted if gpu == told.gpu and pid in seen}
        except (MpuNotifyError, ValueError) as error:
            refused = str(error)
        time.sleep(0.3)
    if refused:
        run.findings.notes.append(f"no utilisation samples: {refused}")
    elif wanted == set(workers) and workers and not run.machine.stand_in:
        run.findings.problems.append(f"the driver has no utilisation sample of any process, after {_SAMPLES_S} s")
    elif wanted:
        never = ", ".join(f"{pid} on GPU {gpu}" for gpu, pid in sorted(wanted))
        run.findings.notes.append(f"never in the driver's utilisation samples of {_SAMPLES_S} s, by host PID: {never}")
    say(
        f"utilisation samples: {refused or f'{len(workers) - len(wanted)} of {len(workers)} in'} "
        f"{time.monotonic() - start:.1f} s"
    )


def _check_host(tools: Iterable[Tool], scene: Scene, run: Run) -> None:
    """On the host, unaided, the driver tells of every process by its number there."""
    truth = scene.truth(scene.places["host"])
    for tool in tools:
        if tool.check is None:
            continue
        try:
            answer = ask(tool.asked(truth), _LIMIT_S)
            _write_raw(run.raw, "host", tool.name, [("unaided", answer)])
            wrong, note = tool.check(answer, truth)
        except Exception as error:  # noqa: BLE001 - as above
            wrong, note = f"{type(error).__name__}: {error}", ""
        run.findings.host.append((tool.name, wrong, note))
        say(f"host: {tool.name}: {wrong or 'all of the scene by host PIDs'}{note}")


def _write_raw(directory: Path | None, place: str, tool: str, answers: Iterable[tuple[str, Answer]]) -> None:
    if directory is None:
        return
    with (directory / f"{place.replace(' ', '-')}.txt").open("a", encoding="utf-8") as file:
        for side, answer in answers:
            file.write(f"##### {tool} / {side} / status {answer.status} / {answer.seconds:.3f} s\n")
            file.write(f"{answer.out}\n{answer.err}\n")


def _seconds(command: list[str]) -> Callable[[Shell], float]:
    """Ask for the time that a command itself tells."""

    def told(shell: Shell) -> float:
        answer = shell.run(command, 60)
        if answer.status:
            raise SceneError(answer.said or f"exit status {answer.status}")
        return float(json.loads(answer.out)["seconds"])

    return told


def _wall(command: list[str]) -> Callable[[Shell], float]:
    def taken(shell: Shell) -> float:
        answer = shell.run(command)
        if answer.status:
            raise SceneError(answer.said or f"exit status {answer.status}")
        return answer.seconds

    return taken


class Pair(NamedTuple):
    """A shell under the filter and one that is not, in like namespaces."""

    under: Shell
    plain: Shell


_PAIRS = 61
_REHEARSED = 4  # pairs, where the figures mean nothing


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


def measure(run: Run) -> None:
    """What the filter costs."""
    machine, work, findings, deadline = run.machine, run.work, run.findings, run.deadline

    def pairs(number: int) -> int:
        return min(number, _REHEARSED) if machine.stand_in else number

    with ExitStack() as stack:
        try:
            under = open_shell("speed-filter", [*machine.run(), "sh"], work, stack)
            auto_shell = open_shell("speed-auto", [*machine.run("--translate", "auto"), "sh"], work, stack)
            plain_command = ["unshare", "--pid", "--fork", "--mount-proc", "--kill-child", "sh"]
            pair = Pair(under, open_shell("speed-plain", plain_command, work, stack))
            idle = Timing(f"{_table_name(machine)}, wall time, no GPU process running", "ms", limit=1.03)
            findings.timings.append(time_pairs(idle, _wall(machine.table()), pair, pairs(_PAIRS), deadline))
            # A process each: rows to translate (without any nvidia-smi takes longer), and a GPU that stays initialised.
            scene = Scene(work, machine.device or ["--cuda"])
            for name, shell in (*pair._asdict().items(), ("auto", auto_shell)):
                scene.add(name, lambda shell=shell: shell)  # type: ignore[misc]
                scene.start(f"for timing, {name}", name, 64)
            scene.wait()
            findings.problems += scene.problems
        except (SceneError, OSError) as error:
            findings.problems.append(f"timing: {error}")
            return
        question = python(ASK_PY, "time-running", "--times", "50" if machine.stand_in else "2000", *machine.device)
        context = python(ASK_PY, "time-context", *machine.device)
        busy = f"{_table_name(machine)}, wall time, a GPU process in each namespace"
        auto = Pair(auto_shell, pair.plain)
        for timing, take, two, times in (
            (Timing(busy, "ms", limit=1.03), _wall(machine.table()), pair, _PAIRS),
            (Timing(f"{busy}, `--translate auto`", "ms", limit=1.03), _wall(machine.table()), auto, _PAIRS),
            (Timing("CUDA context, from cuInit to the first memory", "ms"), _seconds(context), pair, 15),
            (Timing("NVML, one question for running processes", "us"), _seconds(question), pair, 5),
            (Timing("the same, `--translate auto`", "us"), _seconds(question), auto, 5),
        ):
            findings.timings.append(time_pairs(timing, take, two, pairs(times), deadline))
            run.write()
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
        command = [*machine.run(*options), *python(ASK_PY, "train", "--times", str(steps), *machine.device)]
        try:
            answer = ask(command, _TRAINING_LIMIT_S)
            ended = [one for one in Log(log).records() if one["message"] == "ended"]
            if answer.status or not ended:
                timing.note = f"failed: {answer.said or f'exit status {answer.status}'}"
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
        # CUDA shall count the GPUs as nvidia-smi does, and keep nothing of what it compiles.
        os.environ.update(CUDA_DEVICE_ORDER="PCI_BUS_ID", CUDA_CACHE_DISABLE="1")
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


def _gpus(control_node: Path, findings: Findings) -> dict[str, str]:
    """The GPUs' numbers by their PCI addresses; one of no address where the driver does not tell."""
    try:
        with RmClient(control_node) as client:
            found = {gpu.pci_address: str(gpu.index) for gpu in client.gpus()}
    except MpuNotifyError as error:
        findings.problems.append(f"GPUs: {error}")
        found = {"": "0"}
    if list(found.values()) != [str(number) for number in range(len(found))]:
        findings.notes.append(f"this is not all of the machine's GPUs: {', '.join(found.values())}")
    return found


def examine(
    results: Path | None, raw: Path | None, *, stand_in: bool, seconds: float = BUDGET_S, runtime: Path | None = None
) -> Findings:
    """Compare, measure and write the results; all that was started is ended.

    With `runtime` the namespaces are of its containers, and nothing is measured.
    """
    require_initial_namespace()
    findings = Findings(runtime=runtime.name if runtime else None)
    start = time.monotonic()

    def write() -> None:
        findings.seconds = time.monotonic() - start
        text = results_text(findings, real=not stand_in)
        if results:
            results.parent.mkdir(parents=True, exist_ok=True)
            results.write_text(text, encoding="utf-8")
        if raw:
            (raw / "results.md").write_text(text, encoding="utf-8")

    with ExitStack() as stack:
        work = stack.enter_context(_environment())
        if raw:
            raw.mkdir(parents=True, exist_ok=True)
        node = stack.enter_context(StandIn("--era", "native", "--gpus", "2")).control_node if stand_in else None
        machine = Machine(node, _gpus(node or CONTROL_NODE, findings))
        run = Run(machine, work, raw, start + seconds, findings, write, runtime)
        try:
            for part in (compare_all,) if runtime else (compare_all, measure):
                try:
                    part(run)
                except Exception as error:  # noqa: BLE001 - what is broken in one part must not hide the other
                    findings.problems.append(f"{part.__name__} broke off: {type(error).__name__}: {error}")
                    traceback.print_exc()
                write()
            findings.complete = True
        finally:
            write()
    return findings


def _program(parser: argparse.ArgumentParser, name: str) -> Path:
    found = shutil.which(name)
    if found is None:
        parser.error(f"there is no program {name}")
    return Path(found).resolve()


def main() -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter, allow_abbrev=False
    )
    parser.add_argument("--results", metavar="FILE", type=Path, help="default: in docs/; none on a stand-in")
    parser.add_argument("--raw", metavar="DIR", type=Path, help="keep what every tool printed, and the logs")
    parser.add_argument(
        "--runtime",
        metavar="PROGRAM",
        help="compare in containers of this OCI runtime, with mpu-notify serve as their agent; nothing is timed",
    )
    parser.add_argument("--stand-in", action="store_true", help="rehearse on a stand-in driver, where there is no GPU")
    parser.add_argument("--seconds", type=float, default=BUDGET_S, help="begin nothing later (default: %(default)g)")
    args = parser.parse_args()
    runtime = _program(parser, args.runtime) if args.runtime else None
    results = args.results or (None if args.stand_in else RESULTS_OF_CONTAINERS if runtime else RESULTS)
    for number in (signal.SIGTERM, signal.SIGALRM):
        signal.signal(number, lambda number, _: sys.exit(128 + number))
    signal.setitimer(signal.ITIMER_REAL, args.seconds + _GRACE_S)
    findings = examine(results, args.raw, stand_in=args.stand_in, seconds=args.seconds, runtime=runtime)
    print(results_text(findings, real=not args.stand_in))
    if missing := sorted({one.tool for one in findings.comparisons if one.judgement.verdict is Verdict.NOT_INSTALLED}):
        say(f"not installed, so not compared: {', '.join(missing)}")
    say("no unexplained difference" if findings.good() else "NOT GOOD: see DIFFERENT, FAILED and problems above")
    return 0 if findings.good() else 1


if __name__ == "__main__":
    sys.exit(main())
