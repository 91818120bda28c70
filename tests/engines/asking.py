"""What a container's processes are told, and where they tell it."""

from __future__ import annotations

import json
import secrets
from dataclasses import dataclass
from pathlib import Path

from . import images
from .engines import Container, Engine, Wish
from .place import eventually


@dataclass(frozen=True)
class Answer:
    """What one call of ask.c said: who it is, and whom the driver names."""

    pid: int
    pids: frozenset[int]

    @classmethod
    def parse(cls, line: str) -> Answer:
        said = json.loads(line)
        assert len(said["pids"]) == len(set(said["pids"])), f"named twice: {line}"
        return cls(said["pid"], frozenset(said["pids"]))


class Asking:
    """A container whose first process, or the child of its init, asks again and again."""

    def __init__(self, container: Container, file: Path) -> None:
        self.container = container
        self._file = file

    def answers(self) -> list[Answer]:
        """All that it was told so far."""
        text = self._file.read_text() if self._file.exists() else ""
        return [Answer.parse(line) for line in text.splitlines(keepends=True) if line.endswith("\n")]

    def next(self) -> Answer:
        """The answer to a call made from now on."""
        return self.after(len(self.answers()))

    def after(self, count: int) -> Answer:
        """The answer to a call made after there were so many."""
        # The next line may be of a call made before.
        eventually(lambda: len(self.answers()) >= count + 2, f"{self.container} asks again")
        return self.answers()[count + 1]

    def exec(self) -> Answer:
        """What a further process is told."""
        return Answer.parse(self.container.exec("/ask"))

    def restart(self) -> Asking:
        return Asking(self.container.restart(), self._file)


class Out:
    """The directory in which containers tell their answers."""

    def __init__(self, directory: Path) -> None:
        self.directory = directory
        directory.mkdir()
        directory.chmod(0o1777)

    def start(self, engine: Engine, wish: Wish | None = None, every_ms: int = 50) -> Asking:
        """Start a container that asks."""
        name = secrets.token_hex(6)
        container = engine.start("/ask", "every", str(every_ms), str(images.OUT / name), wish=wish)
        return Asking(container, self.directory / name)
