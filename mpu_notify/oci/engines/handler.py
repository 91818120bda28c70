"""A handler: the file that an engine calls as the runtime, and which says what stands behind it.

Its first line makes the kernel start our program with the file's name (see csrc/runtime.c). So each engine goes on with
the runtime that it had, for as long as nobody runs `configure` again: not with what is found in PATH at each call.
"""

from __future__ import annotations

import hashlib
import os
import posixpath
import subprocess
from collections.abc import Iterable, Iterator
from pathlib import Path

from mpu_notify.oci import settings
from mpu_notify.oci.engines.files import Tree
from mpu_notify.oci.engines.plan import RUNTIME, ConfigurationError

_FOLDERS = ("/usr/local/sbin", "/usr/local/bin", "/usr/sbin", "/usr/bin", "/sbin", "/bin", "/usr/libexec/crio")
_LONGEST_PROGRAM = 240  # what the kernel reads of a first line, less what else is there
_SECONDS = 30


def path(engine: str, config: str, default_config: str) -> str:
    """Where the handler of an engine's configuration lies; it is an ordinary user's own where one runs this."""
    name = engine if config == default_config else f"{engine}-{hashlib.sha256(config.encode()).hexdigest()[:8]}"
    return posixpath.join(settings.folder(), "runtimes", name)


def contents(shim: str, real: str) -> bytes:
    """What the handler says. Raises ConfigurationError."""
    if len(shim) > _LONGEST_PROGRAM or any(character.isspace() for character in shim):
        raise ConfigurationError(
            f"the path {shim!r} cannot be in the first line of a script, it is too long or has a space: install "
            "mpu-notify elsewhere, or name another place of the program with --runtime-path"
        )
    lines = [f"#!{shim} --handler", "# Written by `mpu-notify configure`, removed by `mpu-notify unconfigure`."]
    lines.append(f"runtime = {_quoted(real)}")
    if os.geteuid() != 0:
        lines.append(f"config = {_quoted(os.path.expanduser(settings.OWN_FILE))}")  # noqa: PTH111 - text
    return ("\n".join(lines) + "\n").encode()


def _quoted(text: str) -> str:
    if any(character in "\"'\\" or not character.isprintable() for character in text):
        raise ConfigurationError(f"cannot name {text!r} in a handler: it has a quote, a backslash or worse")
    return f'"{text}"'


class Finder:
    """Finds what an engine uses by default, in a machine's files."""

    def __init__(self, tree: Tree, ours: Iterable[str]) -> None:
        """`ours` are the programs that cannot be behind themselves."""
        self._tree = tree
        self._ours = {tree.find(each) for each in ours}

    def program(self, *names: str) -> str | None:
        """The first of these that is a program and not ours, as an absolute path."""
        return next((found for found in self._programs(names) if self._tree.find(found) not in self._ours), None)

    def is_ours(self, name: str) -> bool:
        """Whether an engine that is to start this starts ours."""
        found = next(self._programs([name]), None)
        return found is not None and self._tree.find(found) in self._ours

    def _programs(self, names: Iterable[str]) -> Iterator[str]:
        for name in names:
            folders = ("",) if name.startswith("/") else _FOLDERS
            for found in (posixpath.join(folder, name) for folder in folders):
                place = self._tree.find(found)
                if place.is_file() and os.access(place, os.X_OK):
                    yield found

    def podman(self) -> str | None:
        """What Podman says that it uses; what it would take first where it cannot be asked."""
        asked = ("podman", "info", "--format", "{{.Host.OCIRuntime.Path}}")
        said = _output(asked) if self._tree.root == Path("/") else ""
        return self.program(*([said] if said.startswith("/") else []), "crun", "runc")

    def crio(self) -> str | None:
        """What crio.conf and crio.conf.d name as the default. Raises ConfigurationError."""
        from mpu_notify.oci.engines.containerd import parse  # noqa: PLC0415 - TOML is for those who need it

        folder = "/etc/crio/crio.conf.d"
        drop_ins = self._tree.find(folder)
        names = sorted(each.name for each in drop_ins.iterdir()) if drop_ins.is_dir() else []
        files = self._tree.read(["/etc/crio/crio.conf", *(posixpath.join(folder, name) for name in names)])
        default = ""
        paths: dict[str, str] = {}
        for path, text in files.items():
            section = parse(path, text).get("crio", {}).get("runtime", {})
            default = section.get("default_runtime") or default
            paths |= {name: entry.get("runtime_path") or name for name, entry in section.get("runtimes", {}).items()}
        names = [default] if default and default != RUNTIME else ["crun", "runc"]
        return self.program(*(paths.get(name, name) for name in names))


def _output(command: tuple[str, ...]) -> str:
    try:
        return subprocess.run(command, check=True, capture_output=True, text=True, timeout=_SECONDS).stdout.strip()
    except (OSError, subprocess.SubprocessError):
        return ""
