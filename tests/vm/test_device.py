"""The real thing but for the GPU: character devices with the driver's numbers, found by them, on an old kernel."""

from __future__ import annotations

from pathlib import Path

import pytest

from mpu_notify.standin.driver import Era
from tests.kernel.test_calls import REFUSED, TRANSLATED_ON_ANY_KERNEL

from .conftest import Play
from .guest import Guest


def test_the_kernel_lacks_what_newer_ones_have(play: Play) -> None:
    """Else the tests here would show nothing that those of tests/kernel do not."""
    assert play("kernel") == {"release": "6.1", "view": "NSpidView", "pidfd_thread": False, "wait_killable": True}


@pytest.mark.parametrize("era", list(Era), ids=lambda era: era.value)
def test_a_namespace_sees_its_own_processes_whatever_the_driver_does(play: Play, era: Era) -> None:
    seen = play("rows", era.value)
    assert seen["aided"]["told"] == seen["aided"]["used"]
    assert seen["outcomes"] == ["translated"]
    unaided = seen["unaided"]
    assert (unaided["told"] == unaided["used"]) == (era is Era.NATIVE)
    told = {pid for _gpu, pid, _type, _mib in unaided["told"]}
    assert set(seen["elsewhere"]) <= told or era is not Era.HOST, "it even names processes of others"


def test_every_way_to_call_is_served_on_every_node_of_the_devices_number(play: Play, caller_program: Path) -> None:
    cases = TRANSLATED_ON_ANY_KERNEL
    seen = play("calls", caller_program, *cases)
    lines = [line.split(": ") for line in seen["aided"]]
    assert [case for case, _said in lines] == cases
    pids = [int(said.removeprefix("pids= ")) for _case, said in lines]
    assert pids == sorted(pids), "numbers of the namespace, in the order of its processes"
    assert 2 < pids[0] < pids[-1] < 10 * len(cases)
    assert seen["aided, other node"] == seen["aided"]
    assert not set(seen["unaided"]) & set(seen["aided"])


def test_a_refused_call_is_refused_just_as_without_us(play: Play, caller_program: Path) -> None:
    seen = play("calls", caller_program, *REFUSED)
    assert seen["aided"] == seen["unaided"] == seen["aided, other node"]
    assert [line.split(": ")[0] for line in seen["aided"] if ": " in line] == REFUSED


def test_a_thread_with_files_of_its_own_is_left_to_the_driver(play: Play, caller_program: Path) -> None:
    """Its files cannot be had there, and its process's are others."""
    seen = play("calls", caller_program, "unshared_files", "plain")
    (_, of_the_thread), (_, plain) = (line.split(": pids= ") for line in seen["aided"])
    assert int(of_the_thread) > 100, "an id on the host"
    assert 2 < int(plain) < 10


def test_devices_that_are_there_are_not_taken_over_and_go_with_their_stand_in(play: Play) -> None:
    seen = play("taken")
    assert "its number or name is taken: '/dev/nvidiactl'" in seen["refusal"]
    assert seen["nodes"] == [["nvidia0", 195, 0, "0o20666"], ["nvidiactl", 195, 255, "0o20666"]]
    assert seen["nodes left"] == []


def test_pid_views_hold_there(guest: Guest) -> None:
    options = ["-p", "no:cacheprovider", "-q", "-k", "rich_tree or open_view or moves_between or thread_of"]
    assert guest.run("pytest", *options, "tests/kernel/test_pidns.py").status == 0
