"""What the planners share: a plan, and the two ways a file of ours can be undone."""

from __future__ import annotations

import hashlib
import json
import posixpath
from collections.abc import Mapping
from dataclasses import dataclass, field

from mpu_notify.errors import MpuNotifyError
from mpu_notify.oci import settings

RUNTIME = "mpu-notify"
ANNOTATIONS = "io.mpu-notify.*"

_UNDO = "mpu-notify undo 1"
_OURS = "# Written by `mpu-notify configure`, removed by `mpu-notify unconfigure`. sha256 of the rest: "

Files = Mapping[str, bytes]  # by path, those that exist, in the order in which the engine reads them


class ConfigurationError(MpuNotifyError):
    """An engine's configuration cannot be read, written, or changed safely. Plans are made before anything changes."""


@dataclass
class Plan:
    """What files become, in the order in which to write them, and what the user should know."""

    files: dict[str, bytes | None] = field(default_factory=dict)  # None: the file goes
    notes: list[str] = field(default_factory=list)
    behind: str = "runc"  # what the engine uses by default, which goes behind our runtime

    def set(self, files: Files, path: str, contents: bytes | None) -> None:
        """`path` becomes `contents`, if it is not that already."""
        if files.get(path) != contents:
            self.files[path] = contents

    def rewrite(self, files: Files, path: str, original: bytes | None, contents: bytes | None) -> None:
        """A user's file becomes `contents`; `original` is kept for as long as the two differ."""
        if contents is None or contents == original:
            self.set(files, path, contents)
            self.set(files, undo_copy(path), None)
        else:
            # The note first: a crash in between leaves a note that matches nothing, which is harmless.
            self.set(files, undo_copy(path), _undo_note(contents, original))
            self.set(files, path, contents)


def undo_copy(path: str) -> str:
    """Where the original of a file is kept: not beside it, where the engine may take it for configuration."""
    return _undo_folder() + path


def copied_file(path: str) -> str | None:
    """The file that this one is the undo copy of, if it is one."""
    return path.removeprefix(_undo_folder()) if path.startswith(f"{_undo_folder()}/") else None


def _undo_folder() -> str:
    return posixpath.join(settings.folder(), "undo")


def _digest(contents: bytes) -> str:
    return hashlib.sha256(contents).hexdigest()


def _undo_note(written: bytes, original: bytes | None) -> bytes:
    existed = "absent" if original is None else "present"
    return f"{_UNDO} {_digest(written)} {existed}\n".encode() + (original or b"")


def is_as_written(files: Files, path: str) -> bool:
    """Whether `path` is byte for byte what `Plan.rewrite` made of it."""
    note, now = files.get(undo_copy(path)), files.get(path)
    return note is not None and now is not None and note.startswith(f"{_UNDO} {_digest(now)} ".encode())


def original(files: Files, path: str) -> bytes | None:
    """What `path` was before it was rewritten, where `is_as_written`."""
    head, _, contents = files[undo_copy(path)].partition(b"\n")
    return contents if head.endswith(b" present") else None


def drop_in(body: str) -> bytes:
    """A file that is ours alone, and can tell whether it was edited."""
    return f"{_OURS}{_digest(body.encode())}\n{body}".encode()


def check_drop_in(files: Files, path: str) -> None:
    """Raises ConfigurationError if there is a file at `path` that is not, or no longer, just ours."""
    now = files.get(path)
    if now is None:
        return
    head, _, body = now.partition(b"\n")
    if not head.startswith(_OURS.encode()):
        raise ConfigurationError(f"{path} was not written by mpu-notify: move it away, or give another --config")
    if head != f"{_OURS}{_digest(body)}".encode():
        raise ConfigurationError(
            f"{path} was edited after mpu-notify wrote it: move your changes to a file of your own and delete it"
        )


def quoted(value: object) -> str:
    """A string, number, boolean or list of them, as JSON and TOML both write it."""
    return json.dumps(value, ensure_ascii=False).replace("\x7f", "\\u007f")
