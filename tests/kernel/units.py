"""The systemd units of deploy/ as they would run, where there is no systemd: their settings, put on by hand.

Taken from the unit: the user, the capabilities, no_new_privs, the system calls, whether memory may be executable, and
the file system, which is read-only but for a directory of the test's own. The rest (other namespaces, cgroups) is not.
"""

from __future__ import annotations

import errno
import os
import subprocess
from collections.abc import Iterator, Sequence
from functools import cache
from pathlib import Path

import pyseccomp

from tests import installation

DIRECTORY = Path(__file__).parent.parent.parent / "deploy" / "systemd"

#: Stands for the user mpu-notify, which the tests do not make.
USER = 64998

_PUT_ON = """
import ctypes, os, sys
from mpu_notify.notify import native
file, executable_memory, *command = sys.argv[1:]
with open(file, "rb") as program:
    filter = program.read()
PR_SET_MDWE = 65  # linux/prctl.h, Linux 6.3
if executable_memory == "no" and ctypes.CDLL(None, use_errno=True).prctl(PR_SET_MDWE, 1, 0, 0, 0):
    assert ctypes.get_errno() == 22, "an older kernel"
native.confine(filter)
os.execvp(command[0], command)
"""

_READ_ONLY = 'mount --bind "$0" "$0" && mount -o remount,bind,ro / && exec "$@"'


class Unit:
    """A unit file; a setting may be there several times."""

    def __init__(self, name: str) -> None:
        self.path = DIRECTORY / name
        lines = (line.strip() for line in self.path.read_text().splitlines())
        pairs = [line.split("=", 1) for line in lines if line and line[0] not in "#;["]
        self.settings = [(key, value) for key, value in pairs]

    def all(self, key: str) -> list[str]:
        return [value for name, value in self.settings if name == key]

    def one(self, key: str) -> str:
        (value,) = self.all(key)
        return value

    @property
    def command(self) -> list[str]:
        return self.one("ExecStart").lstrip("-").split()

    @property
    def capabilities(self) -> list[str]:
        """Both sets: what it begins with and all that it can ever have."""
        ambient = self.all("AmbientCapabilities")
        assert ambient == self.all("CapabilityBoundingSet")
        return " ".join(ambient).split()

    def system_calls(self) -> set[str]:
        """As systemd.exec(5) reads the lines: the first says whether it is an allow-list, later ones add or take."""
        allowed: set[str] = set()
        for line in self.all("SystemCallFilter"):
            named = {call for word in line.removeprefix("~").split() for call in _expanded(word)}
            allowed = allowed - named if line.startswith("~") else allowed | named
        return allowed | set(_expanded("@default"))

    def filter(self) -> bytes:
        """What systemd makes of SystemCallFilter."""
        assert self.one("SystemCallErrorNumber") == "ENOSYS"
        rules = pyseccomp.SyscallFilter(pyseccomp.ERRNO(errno.ENOSYS))
        for call in self.system_calls():
            if pyseccomp.resolve_syscall(pyseccomp.Arch.NATIVE, call) != -1:  # of another machine
                rules.add_rule(pyseccomp.ALLOW, call)
        with os.fdopen(os.memfd_create("filter"), "w+b") as file:
            rules.export_bpf(file)
            file.seek(0)
            return file.read()

    def started_by_hand(self, program: Sequence[str | Path], writable: Path) -> list[str]:
        """A command line that starts a program as the unit starts its own."""
        assert self.one("NoNewPrivileges") == "yes"
        assert self.one("ProtectSystem") == "strict"
        filter_file = writable / f"{self.path.name}.bpf"
        filter_file.write_bytes(self.filter())
        sets = ",".join(["-all", *(f"+{name.removeprefix('CAP_').lower()}" for name in self.capabilities)])
        return [
            *("unshare", "--mount", "--propagation", "private", "sh", "-c", _READ_ONLY, str(writable)),
            *("setpriv", f"--reuid={USER}", f"--regid={USER}", "--clear-groups", "--no-new-privs"),
            *(f"--bounding-set={sets}", f"--inh-caps={sets}", f"--ambient-caps={sets}"),
            *("env", f"PYTHONPATH={installation.public_copy()}", "PYTHONDONTWRITEBYTECODE=1"),
            *(str(installation.PYTHON), "-c", _PUT_ON, str(filter_file)),
            "no" if self.one("MemoryDenyWriteExecute") == "yes" else "yes",
            *map(str, program),
        ]


def _expanded(word: str) -> Iterator[str]:
    if not word.startswith("@"):
        yield word
        return
    for each in _sets()[word]:
        yield from _expanded(each)


@cache
def _sets() -> dict[str, list[str]]:
    """The groups that this systemd has."""
    text = subprocess.check_output(["systemd-analyze", "syscall-filter", "--no-pager"], text=True)
    sets: dict[str, list[str]] = {}
    for line in text.splitlines():
        word = line.strip()
        if line.startswith("@"):
            sets[word] = []
        elif line.startswith(" ") and word and not word.startswith("#"):
            list(sets.values())[-1].append(word)
    return sets
