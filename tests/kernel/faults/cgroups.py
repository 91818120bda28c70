"""Processes that are frozen, or get next to no processor, by control groups of either version."""

from __future__ import annotations

import os
import subprocess
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import NamedTuple

import pytest

from ..harness import eventually

#: Of a processor, both together: 1 ms of each 10 ms.
_QUOTA_US, _PERIOD_US = 1000, 10_000


class _Hierarchy(NamedTuple):
    """A mounted file system of control groups."""

    kind: str
    place: Path
    controllers: list[str]  # of version 1, among other mount options

    def home(self, pid: int) -> Path:
        """The group that a process is in."""
        for line in Path(f"/proc/{pid}/cgroup").read_text().splitlines():
            _, controllers, path = line.split(":", 2)
            if controllers == "" if self.kind == "cgroup2" else set(controllers.split(",")) & set(self.controllers):
                return self.place / path.lstrip("/")
        raise AssertionError(f"process {pid} is in no group of {self.place}")


def _hierarchies() -> Iterator[_Hierarchy]:
    for line in Path("/proc/self/mounts").read_text().splitlines():
        _, place, kind, options, *_ = line.split()
        if kind in ("cgroup", "cgroup2"):
            yield _Hierarchy(kind, Path(place), options.split(","))


@contextmanager
def _mounted(kind: str, *controllers: str) -> Iterator[_Hierarchy]:
    """One that has these controllers: of the system, or for as long as this lasts."""
    for each in _hierarchies():
        if each.kind == kind and set(controllers) <= set(each.controllers):
            yield each
            return
    with tempfile.TemporaryDirectory(prefix="mpu-notify-test-") as place:
        options = ["-o", ",".join(controllers)] if controllers else []
        subprocess.run(["mount", "-t", kind, *options, "none", place], check=True)
        try:
            yield _Hierarchy(kind, Path(place), list(controllers))
        finally:
            subprocess.run(["umount", place], check=True)


@contextmanager
def _moved(pid: int, hierarchy: _Hierarchy, settings: dict[str, str]) -> Iterator[Path]:
    """A process in a new group of its own, and afterwards back where it was."""
    home = hierarchy.home(pid)
    group = hierarchy.place / f"mpu-notify-test-{os.getpid()}"
    group.mkdir()
    try:
        for name, value in settings.items():
            (group / name).write_text(value)
        (group / "cgroup.procs").write_text(str(pid))
        yield group
    finally:
        if Path(f"/proc/{pid}").exists():
            (home / "cgroup.procs").write_text(str(pid))
        group.rmdir()


@contextmanager
def starved(pid: int) -> Iterator[None]:
    """Have a process share next to nothing of a processor with one that takes all it can."""
    for each in _hierarchies():
        if each.kind == "cgroup" and "cpu" in each.controllers:
            settings = {"cpu.cfs_period_us": str(_PERIOD_US), "cpu.cfs_quota_us": str(_QUOTA_US)}
        elif each.kind == "cgroup2" and "cpu" in (each.place / "cgroup.subtree_control").read_text().split():
            settings = {"cpu.max": f"{_QUOTA_US} {_PERIOD_US}"}
        else:
            continue
        with _moved(pid, each, settings) as group, _hog(group):
            yield
        return
    pytest.fail("no cgroup file system with a cpu controller is mounted, which this test needs")


@contextmanager
def _hog(group: Path) -> Iterator[None]:
    with subprocess.Popen(["sh", "-c", "while :; do :; done"]) as hog:
        try:
            (group / "cgroup.procs").write_text(str(hog.pid))
            eventually(lambda: "nr_throttled 0" not in (group / "cpu.stat").read_text(), "the group is throttled")
            yield
        finally:
            hog.kill()


class _Freezer(NamedTuple):
    controllers: list[str]
    file: str
    freeze: str
    thaw: str
    state: str
    frozen: str


_FREEZERS = {
    "cgroup": _Freezer(["freezer"], "freezer.state", "FROZEN", "THAWED", "freezer.state", "FROZEN"),
    "cgroup2": _Freezer([], "cgroup.freeze", "1", "0", "cgroup.events", "frozen 1"),
}


@contextmanager
def frozen(pid: int, kind: str) -> Iterator[None]:
    """Freeze a process by the groups of a version; when this is left it is frozen, at the latest after its call."""
    freezer = _FREEZERS[kind]
    with _mounted(kind, *freezer.controllers) as hierarchy, _moved(pid, hierarchy, {}) as group:
        (group / freezer.file).write_text(freezer.freeze)
        try:
            yield
            eventually(lambda: freezer.frozen in (group / freezer.state).read_text(), "it is frozen")
        finally:
            (group / freezer.file).write_text(freezer.thaw)
