"""NVIDIA's own nvidia-smi of old branches, unmodified, in a PID namespace: what it shows with us, and without."""

from __future__ import annotations

import re

import pytest

from mpu_notify.rm.eras import Era

from .conftest import Play

#: Proprietary drivers of all branches are of the host era; the open ones of 550 are of the thread-list era.
DRIVERS = [("470", Era.HOST), ("535", Era.HOST), ("550", Era.HOST), ("550", Era.THREAD_LIST)]

_TABLE_ROW = re.compile(r"\| +0 +N/A +N/A +(\d+) +C +(\S+) +(\S+) \|")


@pytest.mark.parametrize(("branch", "era"), DRIVERS, ids=[f"{branch}-{era.value}" for branch, era in DRIVERS])
def test_nvidia_smi_shows_the_namespaces_own_processes(play: Play, branch: str, era: Era) -> None:
    seen = play("clients", branch, era.value)

    aided = seen["aided"]
    assert aided["listed"] == [f"{pid}, {name}, {mib} MiB" for pid, name, mib in aided["used"]]
    assert _rows(aided["table"]) == [(pid, name, f"{mib}MiB") for pid, name, mib in aided["used"]]

    unaided = seen["unaided"]
    if era is Era.HOST:
        assert _rows(unaided["table"]) == []
        assert {line.split(", ")[1] for line in unaided["listed"]} == {"[Not Found]"}
    else:
        assert [row[:2] for row in _rows(unaided["table"])] == [(pid, name) for pid, name, _mib in unaided["used"]]
        assert {row[2] for row in _rows(unaided["table"])} == {"0MiB"}, "memory is told by host id only"


def _rows(table: list[str]) -> list[tuple[int, str, str]]:
    found = [_TABLE_ROW.fullmatch(line) for line in table]
    return [(int(row[1]), row[2], row[3]) for row in found if row]
