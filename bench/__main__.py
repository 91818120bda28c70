"""Measure what mpu-notify costs here, and print it in a screenful."""

from __future__ import annotations

import argparse
import json
import os
import platform
import signal
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from statistics import median, quantiles
from time import perf_counter_ns

from bench import containers, neighbour, pids, traps
from bench.containers import CREATE_LIMIT, HOOK_LIMIT_MS, MEMORY_LIMIT_MIB, VERB_LIMIT, WAKE_UPS_LIMIT_HZ, Containers
from bench.neighbour import Neighbour, p99
from bench.pids import COMMAND, Pids
from bench.processes import BenchError
from bench.traps import RATIO_LIMIT, Traps
from mpu_notify.notify.monitor import MonitorError

PROCESS_COUNTS = (10, 500)
STARTS = {
    "mpu-notify run true": (str(COMMAND), "run", "true"),
    "unshare -pf --mount-proc true": ("unshare", "-pf", "--mount-proc", "true"),
    "python -c pass": (sys.executable, "-c", "pass"),
}
RUN, UNSHARE = list(STARTS)[:2]

Starts = dict[str, list[float]]


def _start_ns(command: Sequence[str]) -> float:
    begun = perf_counter_ns()
    status = subprocess.run(command, check=False).returncode
    taken = perf_counter_ns() - begun
    if status:
        raise BenchError(f"cannot time {' '.join(command)}: it exited with {status}")
    return taken


def _measure_starts(rounds: int) -> Starts:
    times: Starts = {name: [] for name in STARTS}
    for _ in range(1 + rounds):
        for name, command in STARTS.items():
            times[name].append(_start_ns(command))
    return {name: taken[1:] for name, taken in times.items()}


def _row(name: str, ns: Sequence[float], unit_ns: float, unit: str) -> str:
    low, _, high = quantiles(ns, n=4)
    return f"  {name:<34}{median(ns) / unit_ns:>10.2f} {unit}   ({low / unit_ns:.2f} to {high / unit_ns:.2f})"


def _show_limit(name: str, value: float, limit: float, unit: str = "") -> None:
    verdict = "kept" if value <= limit else "over"
    print(f"  {name:<34}{value:>10.2f} {unit:<4} limit {limit}: {verdict}")


def _show_traps(measured: Traps) -> None:
    print("\nAn RM control that is not in the control table, one call (/dev/null, which refuses it):")
    print(_row("untrapped", measured.untrapped, 1e3, "us"))
    print(_row("trapped, bare C loop", measured.bare_loop, 1e3, "us"))
    print(_row("trapped, mpu-notify-monitor", measured.monitor, 1e3, "us"))
    _show_limit("monitor / bare loop", measured.ratio, RATIO_LIMIT)


def _show_pids(measured: Pids) -> None:
    print(f"\nGPU_GET_PIDS of {measured.processes} processes on the stand-in driver, one call:")
    print(_row("direct: the stand-in itself", measured.direct, 1e3, "us"))
    print(_row("supervised", measured.supervised, 1e3, "us"))
    print(f"  {'added by supervision':<34}{measured.added / 1e3:>10.2f} us")


def _show_starts(measured: Starts) -> None:
    print("\nFrom start to end:")
    for name, taken in measured.items():
        print(_row(name, taken, 1e6, "ms"))
    print(f"  {'run / unshare':<34}{median(measured[RUN]) / median(measured[UNSHARE]):>10.2f}")


def _show_neighbour(measured: Neighbour) -> None:
    print("\nGPU_GET_PIDS of a container beside another with 1,000 threads that call without pause, 99th percentile:")
    print(f"  {'they wait':<34}{p99(measured.nothing) / 1e6:>10.2f} ms")
    print(f"  {'they call what is not trapped':<34}{p99(measured.untrapped) / 1e6:>10.2f} ms")
    print(f"  {'trapped, not in the table':<34}{p99(measured.trapped) / 1e6:>10.2f} ms")
    print(f"  {'trapped, in the table':<34}{p99(measured.supervised) / 1e6:>10.2f} ms")
    _show_limit("trapped / not trapped", measured.ratio, neighbour.RATIO_LIMIT)


def _show_containers(measured: Containers) -> None:
    print("\nWhat mpu-notify-runtime passes on to the runtime, from start to end:")
    for verb in measured.verbs:
        print(_row(f"{verb.command}, bare", verb.bare, 1e6, "ms"))
        print(_row(f"{verb.command}, by the shim", verb.shim, 1e6, "ms"))
        _show_limit("shim / bare", verb.ratio, VERB_LIMIT)
    create = measured.create
    print("\nCreating a container that opted in, with a profile like Docker's:")
    print(_row("runc create, bare", create.bare, 1e6, "ms"))
    print(_row("runc create, by the shim", create.shim, 1e6, "ms"))
    print(_row("added", create.added, 1e6, "ms"))
    print(_row("python3 -I -S -c 'import json'", create.python, 1e6, "ms"))
    _show_limit("added / python3", create.ratio, CREATE_LIMIT)
    print("\nA createRuntime hook on the waiting init, from start to end:")
    print(_row("/bin/true", measured.hook.true, 1e6, "ms"))
    print(_row("mpu-notify-hook", measured.hook.hook, 1e6, "ms"))
    _show_limit("mpu-notify-hook", measured.hook.median_ms, HOOK_LIMIT_MS, "ms")
    attached = measured.attached
    print(f"\nmpu-notify serve with {attached.containers} containers attached, idle:")
    for name, load in (("monitor", attached.monitor), ("supervisor", attached.supervisor)):
        print(f"  {name + ', RSS':<34}{load.rss_mib:>10.2f} MiB  ({load.pss_mib:.2f} PSS)")
    _show_limit("both, RSS", attached.rss_mib, MEMORY_LIMIT_MIB, "MiB")
    _show_limit("monitor, wake-ups", attached.monitor.wake_ups_hz, WAKE_UPS_LIMIT_HZ, "Hz")
    _show_limit("supervisor, wake-ups", attached.supervisor.wake_ups_hz, WAKE_UPS_LIMIT_HZ, "Hz")


def _containers_as_json(measured: Containers) -> dict[str, object]:
    create, hook, attached = measured.create, measured.hook, measured.attached
    return {
        "verbs_ns": [{**vars(verb), "ratio": verb.ratio, "limit": VERB_LIMIT} for verb in measured.verbs],
        "create_ns": {**vars(create), "added": create.added, "ratio": create.ratio, "limit": CREATE_LIMIT},
        "hook_ns": {**vars(hook), "median_ms": hook.median_ms, "limit_ms": HOOK_LIMIT_MS},
        "attached": {
            **asdict(attached),
            "rss_mib": attached.rss_mib,
            "pss_mib": attached.pss_mib,
            "rss_limit_mib": MEMORY_LIMIT_MIB,
            "wake_ups_limit_hz": WAKE_UPS_LIMIT_HZ,
        },
    }


def _as_json(
    measured: Traps, lists: Sequence[Pids], starts: Starts, contained: Containers, beside: Neighbour
) -> dict[str, object]:
    return {
        "machine": {"kernel": platform.release(), "cpus": os.cpu_count()},
        "untranslated_ns": {**vars(measured), "ratio": measured.ratio, "limit": RATIO_LIMIT},
        "get_pids_ns": [{**vars(one), "added": one.added} for one in lists],
        "start_ns": starts,
        "containers": _containers_as_json(contained),
        "neighbour_ns": {**vars(beside), "ratio": beside.ratio, "limit": neighbour.RATIO_LIMIT},
    }


def _rounds(word: str) -> int:
    rounds = int(word)
    if rounds < 2:  # noqa: PLR2004 - quartiles need two
        raise argparse.ArgumentTypeError(f"{word} is fewer than 2")
    return rounds


def _parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        prog="python -m bench",
        description="Measure what mpu-notify costs on this machine. Needs root, gcc, runc and no GPU. Exits 0 whatever "
        "the numbers are, 1 where something could not be measured.",
    )
    parser.add_argument("--rounds", type=_rounds, default=20, metavar="N", help="default %(default)s, at least 2")
    parser.add_argument("--json", type=Path, metavar="FILE", help="write every number to FILE as well")
    return parser.parse_args()


def main() -> int:
    """Run the command line; the exit status."""
    asked = _parse()
    for number in (signal.SIGTERM, signal.SIGHUP):  # so that what was started is ended
        signal.signal(number, lambda told, _: sys.exit(128 + told))
    print(f"mpu-notify bench: Linux {platform.release()}, {os.cpu_count()} CPUs, {asked.rounds} interleaved rounds")
    print("Medians, and the middle half of all in brackets.", flush=True)
    try:
        with tempfile.TemporaryDirectory(prefix="mpu-notify-bench-") as directory:
            measured = traps.measure(asked.rounds, Path(directory))
            _show_traps(measured)
            lists = pids.measure(asked.rounds, PROCESS_COUNTS, Path(directory))
            for one in lists:
                _show_pids(one)
            starts = _measure_starts(asked.rounds)
            _show_starts(starts)
            contained = containers.measure(asked.rounds, Path(directory))
            _show_containers(contained)
            beside = neighbour.measure(asked.rounds, Path(directory))
            _show_neighbour(beside)
        if asked.json:
            asked.json.write_text(
                json.dumps(_as_json(measured, lists, starts, contained, beside), indent=1), encoding="ascii"
            )
    except (BenchError, MonitorError, OSError, subprocess.SubprocessError) as error:
        print(f"mpu-notify bench: {error}", file=sys.stderr)
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
