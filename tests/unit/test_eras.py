"""Eras by flavour and version, and what a driver's answers say of its era."""

from __future__ import annotations

import pytest

from mpu_notify.rm import controls, eras
from mpu_notify.rm.eras import Driver, Era, Flavour
from mpu_notify.supervisor.probe import Answers, decide

OPEN = (
    "NVRM version: NVIDIA UNIX Open Kernel Module for x86_64  {}  Release Build  (dvs-builder@U22)\nGCC version:  x\n"
)
PROPRIETARY = "NVRM version: NVIDIA UNIX x86_64 Kernel Module  {}  Thu May  9 10:00:00 UTC 2026\nGCC version:  x\n"


@pytest.mark.parametrize(("text", "flavour"), [(OPEN, Flavour.OPEN), (PROPRIETARY, Flavour.PROPRIETARY)])
@pytest.mark.parametrize("version", ["580.159.04", "470.256.02", "565.77"])
def test_the_version_file_names_flavour_and_version(text: str, flavour: Flavour, version: str) -> None:
    assert eras.parse_version(text.format(version)) == Driver(flavour, version)


@pytest.mark.parametrize("text", ["", "NVRM version: something else\n", "GCC version:  gcc version 12.2.0\n"])
def test_another_text_names_nothing(text: str) -> None:
    assert eras.parse_version(text) is None


@pytest.mark.parametrize(
    ("era", "versions"),
    [
        (Era.HOST, ["515.43.04", "530.41.03", "535.43.02", "535.54.03", "535.104.12"]),
        (Era.THREAD_LIST, ["535.43.24", "535.43.28", "535.113.01", "535.261.03", "545.29.06", "550.163.01"]),
        (Era.THREAD_LIST, ["550.40.07", "555.42.02", "560.35.03"]),
        (Era.THREAD_BOTH, ["565.57.01", "565.77"]),
        (Era.THREAD_ALL, ["570.86.15", "570.123.19", "570.133.20", "570.144", "575.51.02"]),
        (Era.NATIVE, ["570.148.08", "570.211.01", "575.57.08", "580.65.06", "590.44.01", "595.45.04"]),
    ],
)
def test_the_open_flavour_changed_with_these_versions(era: Era, versions: list[str]) -> None:
    assert {eras.by_version(Driver(Flavour.OPEN, version)) for version in versions} == {era}


@pytest.mark.parametrize("version", ["440.100", "470.256.02", "535.261.03", "570.211.01", "595.45.04"])
def test_the_proprietary_flavour_knows_no_namespaces(version: str) -> None:
    assert eras.by_version(Driver(Flavour.PROPRIETARY, version)) is Era.HOST


@pytest.mark.parametrize("flavour", Flavour)
def test_nobody_knows_what_a_version_does_that_was_not_read(flavour: Flavour) -> None:
    assert eras.by_version(Driver(flavour, "600.10.01")) is None


def test_where_nothing_is_known_everything_is_translated_and_summed_up() -> None:
    assert eras.table_for(None) == controls.CONTROLS
    assert eras.counts_by_thread(None)


def test_always_is_everything() -> None:
    assert {eras.table_for(era, everything=True) for era in Era} == {controls.CONTROLS}


@pytest.mark.parametrize("era", Era)
def test_only_a_native_driver_gets_something_right_by_itself(era: Era) -> None:
    left = set(controls.CONTROLS) - set(eras.table_for(era))
    assert {control.name for control in left} == ({"GPU_GET_PID_INFO"} if era is Era.NATIVE else set())


HOST, PID, TID = 4711, 1, 2


def answers(
    listed: list[int], by_host: int = 0, by_thread: int = 0, sampled: list[tuple[int, bool]] | None = None
) -> Answers:
    return Answers(HOST, PID, TID, listed, by_host, by_thread, sampled or [])


@pytest.mark.parametrize(
    ("said", "possible"),
    [
        (answers([55, HOST], by_host=9), {Era.HOST}),
        (answers([PID], by_thread=9), {Era.NATIVE}),
        (answers([TID], by_host=9), {Era.THREAD_LIST}),
        (answers([TID], by_thread=9, sampled=[(HOST, False)]), {Era.THREAD_BOTH}),
        (answers([TID], by_thread=9, sampled=[(TID, False)]), {Era.THREAD_ALL}),
        (answers([TID], by_thread=9, sampled=[(55, True)]), {Era.THREAD_ALL}),
        (answers([TID], by_thread=9, sampled=[(55, False)]), {Era.THREAD_BOTH, Era.THREAD_ALL}),
        (answers([TID], by_thread=9), {Era.THREAD_BOTH, Era.THREAD_ALL}),
        (answers([TID]), {Era.THREAD_LIST, Era.THREAD_BOTH, Era.THREAD_ALL}),
        (answers([]), set(Era)),
        (answers([55]), set(Era)),
    ],
)
def test_what_a_driver_says_leaves_these_eras_possible(said: Answers, possible: set[Era]) -> None:
    assert decide(said)[0] == possible
