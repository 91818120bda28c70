"""The units of deploy/ with systemd as PID 1, installed as deploy/README.md says: whatever ends, no call fails."""

from __future__ import annotations

import errno
import json
import subprocess
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from tests.kernel.units import Unit

from .guest import BUILD, Guest
from .life import MONITOR, PROBE, SUPERVISOR, UNITS

LIFE_SECONDS = 300  # on a machine with other work; else 50
pytestmark = pytest.mark.timeout(2 * LIFE_SECONDS)
CAPABILITIES = {"CAP_DAC_OVERRIDE": 1 << 1, "CAP_SYS_PTRACE": 1 << 19}

Told = dict[str, Any]


@pytest.fixture(scope="module")
def told(caller_program: Path, hostile_program: Path) -> Iterator[Told]:
    """What life.py has to say: one boot for all."""
    subprocess.run([Path(__file__).with_name("systemd.sh")], check=True)
    with Guest(BUILD / "systemd" / "root") as guest:
        done = guest.run("python", "-m", "tests.vm.life", caller_program, hostile_program, seconds=LIFE_SECONDS)
        assert done.status == 0, guest.console()
        yield json.loads(done.output.splitlines()[-1])


def test_what_the_readme_says_to_type_enables_and_starts_every_unit(told: Told) -> None:
    assert told["states"] == dict.fromkeys(UNITS, "active")
    assert told["enabled"] == dict.fromkeys(UNITS, "enabled")


def test_the_driver_is_asked_when_it_appears(told: Told) -> None:
    assert told["era"]["era"] == "host"


CHANGED = {
    "supervisor killed": ["supervisor"],
    "monitor killed": ["monitor"],
    "both killed": ["monitor", "supervisor"],
    "supervisor restarted": ["supervisor"],
    "monitor upgraded": ["monitor"],
    "monitor stopped": ["monitor"],
    "monitor killed, and cannot end": ["monitor"],
}


@pytest.mark.parametrize("what", CHANGED)
def test_no_call_fails_and_the_list_is_right_again_when(told: Told, what: str) -> None:
    """Whatever is told is the list, or the driver's own: never an error."""
    change = told["changes"][what]
    assert "pids= 1" in change["told"]
    untranslated = [answer.split() for answer in change["told"] if answer != "pids= 1"]
    assert all(words[:2] == ["pids=", str(told["host"])] for words in untranslated)
    others = [name for name, pid in change["after"].items() if pid != change["before"][name]]
    assert others == CHANGED[what], "each outlives the other"


def test_only_with_all_units_stopped_the_listeners_are_let_go(told: Told) -> None:
    assert f" errno={errno.ENOSYS} " in told["all stopped"]


def test_the_upgraded_monitor_is_the_one_that_was_put_there(told: Told) -> None:
    assert not told["program"].endswith("(deleted)")


@pytest.mark.parametrize(("process", "unit"), [("monitor", MONITOR), ("supervisor", SUPERVISOR)])
def test_the_processes_have_what_their_units_say_and_no_more(told: Told, process: str, unit: str) -> None:
    rights = told["rights"][process]
    granted = sum(CAPABILITIES[name] for name in Unit(unit).capabilities)
    sets = {name: int(rights[name][0], 16) for name in ("CapEff", "CapPrm", "CapBnd", "CapInh", "CapAmb")}
    assert sets == {"CapEff": granted, "CapPrm": granted, "CapBnd": granted, "CapInh": 0, "CapAmb": 0}
    assert rights["NoNewPrivs"] == ["1"]
    assert rights["Seccomp"] == ["2"]
    assert set(rights["Uid"]) == {told["user"]}


#: As deploy/README.md has it.
@pytest.mark.parametrize(("unit", "most"), [(MONITOR, 1.4), (SUPERVISOR, 1.0), (PROBE, 2.0)])
def test_what_the_loaded_units_are_exposed_to_is_little(told: Told, unit: str, most: float) -> None:
    assert told["exposed"][unit] <= most
