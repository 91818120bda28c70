"""Which era is believed: what was asked, for as long as the same driver is loaded, then its version."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from mpu_notify.notify.protocol import Device
from mpu_notify.rm.eras import Era
from mpu_notify.supervisor.driver import (
    EraFileError,
    Finding,
    How,
    Identity,
    Places,
    Watch,
    conclude,
    find,
    look,
    write,
)

NODE = Path("/dev/nvidiactl")  # its device number is fixed, whether it is there or not
NATIVE_TEXT = "NVRM version: NVIDIA UNIX Open Kernel Module for x86_64  580.159.04  Release Build  (x)\n"
HOST_TEXT = "NVRM version: NVIDIA UNIX x86_64 Kernel Module  580.159.04  Thu May  9 10:00:00 UTC 2026\n"
NEW_TEXT = NATIVE_TEXT.replace("580.159.04", "700.10.01")


@pytest.fixture
def places(tmp_path: Path) -> Places:
    return Places(tmp_path / "version", tmp_path / "run" / "era.json")


def asked(places: Places, era: Era | None, node: Path = NODE) -> Finding:
    return Finding(look(node, places), era, How.ASKED, "seen")


@pytest.mark.parametrize(
    ("text", "era", "how"),
    [(NATIVE_TEXT, Era.NATIVE, How.VERSION), (HOST_TEXT, Era.HOST, How.VERSION), (NEW_TEXT, None, How.NOT)],
)
def test_without_an_answer_the_version_tells(places: Places, text: str, era: Era | None, how: How) -> None:
    places.version_file.write_text(text)
    found = find(NODE, places)
    assert (found.era, found.how) == (era, how)


def test_without_a_driver_nothing_is_known(places: Places) -> None:
    assert find(NODE, places).how is How.NOT


def test_the_version_file_says_nothing_of_another_control_node(places: Places, tmp_path: Path) -> None:
    places.version_file.write_text(NATIVE_TEXT)
    other = tmp_path / "nvidiactl"
    other.touch()
    assert find(other, places).how is How.NOT
    assert find(tmp_path / "absent", places).how is How.NOT


def test_what_was_asked_is_believed_while_that_driver_is_loaded(places: Places) -> None:
    places.version_file.write_text(NEW_TEXT)
    write(asked(places, Era.THREAD_LIST), places.era_file)
    assert find(NODE, places) == asked(places, Era.THREAD_LIST)
    places.version_file.write_text(HOST_TEXT)
    assert find(NODE, places).era is Era.HOST, "by version"


def test_what_was_asked_of_another_node_is_not_believed(places: Places, tmp_path: Path) -> None:
    node = tmp_path / "nvidiactl"
    node.touch()
    write(asked(places, Era.NATIVE, node), places.era_file)
    assert find(node, places).era is Era.NATIVE
    node.unlink()
    (tmp_path / "takes the inode").touch()
    node.touch()
    assert find(node, places).era is None


@pytest.mark.parametrize(
    "text",
    [
        "",
        "{",
        "[]",
        "null",
        "{}",
        '{"era": "native"}',
        '{"era": 1, "how": "asked", "seen": "", "version_text": null, "node": 3}',
    ],
)
def test_a_file_with_nonsense_is_not_believed(places: Places, text: str) -> None:
    places.era_file.parent.mkdir()
    places.era_file.write_text(text)
    assert find(NODE, places).how is How.NOT


@pytest.mark.skipif(os.geteuid() != 0, reason="giving a file away takes root")
def test_a_file_that_another_user_could_write_is_not_believed(places: Places) -> None:
    write(asked(places, Era.NATIVE), places.era_file)
    os.chown(places.era_file, 65534, 65534)
    assert find(NODE, places).how is How.NOT


def test_a_file_that_cannot_be_written_is_named(places: Places) -> None:
    places.era_file.parent.touch()
    with pytest.raises(EraFileError, match=r"cannot write .*era\.json"):
        write(asked(places, Era.NATIVE), places.era_file)


def test_a_written_file_is_whole_and_alone(places: Places) -> None:
    for era in Era:
        write(asked(places, era), places.era_file)
        assert find(NODE, places).era is era
    assert list(places.era_file.parent.iterdir()) == [places.era_file]


def identity(text: str | None) -> Identity:
    return Identity(text, Device(is_device=True, major=195, minor=255, inode=0))


def test_where_the_answers_leave_several_eras_the_version_decides() -> None:
    text = NATIVE_TEXT.replace("580.159.04", "550.54.14")
    possible = frozenset({Era.THREAD_LIST, Era.THREAD_BOTH, Era.THREAD_ALL})
    found = conclude(identity(text), possible, "seen")
    assert (found.era, found.how) == (Era.THREAD_LIST, How.ASKED)
    assert conclude(identity(NATIVE_TEXT), possible, "seen").era is None, "what it says contradicts its version"
    assert conclude(identity(None), possible, "seen").era is None
    assert conclude(identity(NATIVE_TEXT), frozenset({Era.HOST}), "seen").era is Era.HOST, "the answer is stronger"


def test_two_eras_that_are_translated_alike_need_not_be_told_apart() -> None:
    found = conclude(identity(None), frozenset({Era.THREAD_BOTH, Era.THREAD_ALL}), "seen")
    assert (found.era, found.how) == (Era.THREAD_BOTH, How.ASKED)


def test_a_watch_sees_a_driver_appear_and_change_and_what_was_asked_of_it(places: Places) -> None:
    watch = Watch(NODE, "auto", find(NODE, places), places)
    assert not watch.changed()
    everything = watch.treatment.rows
    places.version_file.write_text(NATIVE_TEXT)
    assert watch.changed()
    assert watch.finding.era is Era.NATIVE
    assert len(watch.treatment.rows) < len(everything)
    assert not watch.changed()
    write(asked(places, Era.HOST), places.era_file)
    assert watch.changed()
    assert watch.finding.how is How.ASKED
    places.era_file.unlink()
    assert not watch.changed(), "what was asked stays, for as long as the driver does"
    places.version_file.write_text(NEW_TEXT)
    assert watch.changed()
    assert watch.treatment == (everything, True)


def test_always_translates_everything_whatever_the_driver(places: Places) -> None:
    everything = Watch(NODE, "auto", find(NODE, places), places).treatment.rows
    places.version_file.write_text(NATIVE_TEXT)
    assert Watch(NODE, "always", find(NODE, places), places).treatment == (everything, False)
