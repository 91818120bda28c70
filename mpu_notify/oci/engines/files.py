"""Engine configuration on disk: read it, show what would change, change it."""

from __future__ import annotations

import difflib
import glob
import os
import posixpath
import re
import stat
import tempfile
from collections.abc import Callable, Iterable, Mapping
from contextlib import suppress
from pathlib import Path

from mpu_notify.oci import settings
from mpu_notify.oci.engines.plan import ConfigurationError, Files, Plan, copied_file


class Tree:
    """The files of this machine, or of an image that lies unpacked in a directory."""

    def __init__(self, root: Path = Path("/")) -> None:
        self.root = root.resolve()

    def find(self, path: str) -> Path:
        """Where `path` really is, symbolic links followed. Raises ConfigurationError."""
        found = self.root.joinpath(path.lstrip("/")).resolve()
        if not found.is_relative_to(self.root):
            raise ConfigurationError(f"{path} is a symbolic link that leads out of {self.root}")
        return found

    def read(self, paths: Iterable[str]) -> dict[str, bytes]:
        """The files that exist. Raises ConfigurationError."""
        found = ((path, self._read(path)) for path in paths)
        return {path: contents for path, contents in found if contents is not None}

    def _read(self, path: str) -> bytes | None:
        try:
            return self.find(path).read_bytes()
        except FileNotFoundError:
            return None
        except (OSError, RuntimeError) as error:  # RuntimeError: a loop of symbolic links
            raise _failed("read", path, error) from error

    def follow(self, start: str, imported: Callable[[str, bytes], list[str]]) -> dict[str, bytes]:
        """`start`, what it imports, what that imports, in that order. Raises ConfigurationError."""
        contents: dict[str, bytes] = {}
        pending = [start]
        while pending:
            path = pending.pop(0)
            if path not in contents:
                found = self.read([path])
                contents |= found
                for text in found.values():
                    pending += [match for pattern in imported(path, text) for match in self._glob(pattern)]
        return contents

    def _glob(self, pattern: str) -> list[str]:
        return [f"/{match}" for match in sorted(glob.glob(pattern.lstrip("/"), root_dir=self.root))]  # noqa: PTH207 - of text

    def apply(self, plan: Plan) -> None:
        """Make the files what the plan says: all, or none where one cannot be. Raises ConfigurationError."""
        before: dict[str, bytes | None] = {}
        made: list[Path] = []
        try:
            for path, contents in plan.files.items():
                before[path] = self._read(path)
                self._write(path, contents, made)
        except ConfigurationError as error:
            self._take_back(before, made, error)
            raise

    def _take_back(self, before: Mapping[str, bytes | None], made: list[Path], because: ConfigurationError) -> None:
        for path, contents in reversed(list(before.items())):
            try:
                if self._read(path) != contents:
                    self._write(path, contents, made)
            except ConfigurationError as error:  # noqa: PERF203 - few
                raise ConfigurationError(f"{because}; and what was done to {path} is not undone: {error}") from error
        _remove_empty(reversed(made))

    def _write(self, path: str, contents: bytes | None, made: list[Path]) -> None:
        """Put a file there, or none, at once or not at all; directories that this takes are added to `made`."""
        try:
            target = self.find(path)
            if contents is not None:
                _make_directory(target.parent, made)
                _replace(target, contents, like=self.find(copied_file(path) or path))
                _sync_directory(target.parent)
            elif target.exists():
                target.unlink()
                _sync_directory(target.parent)
                ours = self.find(settings.folder())
                _remove_empty(each for each in target.parents if each.is_relative_to(ours))
        except (OSError, RuntimeError) as error:
            raise _failed("remove" if contents is None else "write", path, error) from error


def diff(files: Files, plan: Plan) -> bytes:
    """What the plan changes, as `patch -p1` takes it; without our own notes."""
    lines: list[bytes] = []
    for path, contents in plan.files.items():
        if copied_file(path):
            continue
        before = files.get(path)
        # Not splitlines(): for patch a carriage return ends no line.
        old, new = (re.findall(rb"[^\n]*\n|[^\n]+", text or b"") for text in (before, contents))
        name = os.fsencode(path).lstrip(b"/")
        one = b"/dev/null" if before is None else b"a/" + name
        other = b"/dev/null" if contents is None else b"b/" + name
        changes = difflib.diff_bytes(difflib.unified_diff, old, new, one, other)
        lines += [line if line.endswith(b"\n") else line + b"\n\\ No newline at end of file\n" for line in changes]
    return b"".join(lines)


def _replace(target: Path, contents: bytes, like: Path) -> None:
    """Write a file under another name and rename it, with the owner and mode of `like`, if that exists."""
    descriptor, temporary = tempfile.mkstemp(prefix=f".{target.name}.", dir=target.parent)
    try:
        with os.fdopen(descriptor, "wb") as file:
            mode = 0o755 if contents.startswith(b"#!") else 0o644
            with suppress(FileNotFoundError):
                status = like.stat()
                mode = stat.S_IMODE(status.st_mode)
                if (status.st_uid, status.st_gid) != (os.geteuid(), os.getegid()):
                    os.fchown(file.fileno(), status.st_uid, status.st_gid)
            os.fchmod(file.fileno(), mode)
            file.write(contents)
            file.flush()
            os.fsync(file.fileno())
        Path(temporary).replace(target)
    except BaseException:
        Path(temporary).unlink(missing_ok=True)
        raise


def _make_directory(directory: Path, made: list[Path]) -> None:
    if not directory.is_dir():
        _make_directory(directory.parent, made)
        directory.mkdir(mode=0o755)
        made.append(directory)


def _remove_empty(directories: Iterable[Path]) -> None:
    for each in directories:
        with suppress(OSError):  # there is more in it, or it is gone
            each.rmdir()


def _sync_directory(directory: Path) -> None:
    descriptor = os.open(directory, os.O_RDONLY | os.O_DIRECTORY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def _failed(verb: str, path: str, error: Exception) -> ConfigurationError:
    reason = error.strerror if isinstance(error, OSError) else str(error)
    hint = "; run this as root" if isinstance(error, PermissionError) else ""
    return ConfigurationError(f"cannot {verb} {posixpath.normpath(path)}: {reason}{hint}")
