"""Many calls through one daemon: files, threads and processes are what they were, and memory has not grown."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

from ..conftest import StartStandIn
from ..harness import eventually, under_filter
from ..test_serve import Daemon
from .conftest import Record
from .record import Row
from .scene import Held

#: Calls after which caches are filled and allocators have what they need.
WARM_UP = 1000
#: What may come and go: a page here and there.
SLACK_MIB = 1.0


def resident_mib(pid: int) -> float:
    status = Path(f"/proc/{pid}/status").read_text()
    found = re.search(r"^VmRSS:\s+(\d+) kB$", status, re.MULTILINE)
    assert found
    return int(found[1]) / 1024


def make_calls(daemon: Daemon, caller_program: Path, count: int) -> None:
    """In a container of its own, which has ended when this returns."""
    ended = f"ended container=one calls={count} untranslated=0 translated={count}\n"
    before = daemon.log.read_text().count(ended)
    with under_filter(caller_program, daemon.node.parent, "many", str(count)) as caller:
        daemon.attach(caller)
        caller.go()
        assert caller.process.stdout is not None
        said = caller.process.stdout.readline()
        assert said == f"lists={(count + 1) // 2} infos={count // 2}\n", "each has the caller in it and nobody else"
    eventually(lambda: daemon.log.read_text().count(ended) > before, "all of them were translated")


@pytest.mark.timeout(1800)
def test_many_calls_leave_nothing_behind(
    tmp_path: Path, standin: StartStandIn, caller_program: Path, record: Record, pytestconfig: pytest.Config
) -> None:
    calls: int = pytestconfig.getoption("calls")
    daemon = Daemon(tmp_path, standin("--era", "host").control_node, "--log-level", "info")
    processes = {"monitor": daemon.monitor, "supervisor": daemon.process.pid}
    make_calls(daemon, caller_program, WARM_UP)
    held = {name: Held(pid) for name, pid in processes.items()}
    memory = {name: resident_mib(pid) for name, pid in processes.items()}
    make_calls(daemon, caller_program, calls)
    eventually(lambda: held == {name: Held(pid) for name, pid in processes.items()}, "both have what they had")
    after = {name: resident_mib(pid) for name, pid in processes.items()}
    for name in processes:
        assert after[name] < memory[name] + SLACK_MIB, name
    sizes = ", ".join(f"{name} {memory[name]:.1f} MiB before, {after[name]:.1f} after" for name in processes)
    record(Row("Many calls through one daemon", "none: lists and infos in turn", calls, "translated", f"none; {sizes}"))
    daemon.end()
