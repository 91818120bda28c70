"""Helper processes that end with the measurement that needs them."""

from __future__ import annotations

import socket
import subprocess
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

_CFLAGS = ("-O2", "-std=c11", "-Wall", "-Wextra", "-Werror")
_END_SECONDS = 20


class BenchError(Exception):
    """A measurement could not be made; the text says what was attempted."""


def compile_c(source: Path, directory: Path) -> Path:
    """Compile one C file into the directory; the program."""
    program = directory / source.stem
    try:
        done = subprocess.run(["gcc", *_CFLAGS, "-o", program, source], check=False)
    except FileNotFoundError as error:
        raise BenchError(f"cannot compile {source.name}: install gcc") from error
    if done.returncode:
        raise BenchError(f"cannot compile {source.name}: what gcc said is above")
    return program


@contextmanager
def ending(process: subprocess.Popen[bytes]) -> Iterator[None]:
    """On exit, wait for a process that has a reason to end by then; kill it where it does not."""
    try:
        yield
    finally:
        try:
            process.wait(_END_SECONDS)
        finally:
            process.kill()
            process.wait()


class Helper:
    """A process that answers each line on its standard input with a line, and ends with its input."""

    def __init__(self, *command: str | Path) -> None:
        self._name = " ".join(Path(word).name for word in command)
        self._socket, theirs = socket.socketpair()
        self._lines = self._socket.makefile()
        with theirs:
            self._process = subprocess.Popen(command, stdin=theirs.fileno(), stdout=theirs.fileno())

    def __enter__(self) -> Helper:
        return self

    def __exit__(self, *_: object) -> None:
        with ending(self._process), self._socket, self._lines:
            pass

    def terminate(self) -> None:
        """Ask a process to end that does not read its input."""
        self._process.terminate()

    def line(self) -> str:
        """The next line that it says."""
        line = self._lines.readline()
        if not line:
            raise BenchError(f"cannot measure with {self._name}: it ended, its reason is above")
        return line

    def ask(self, count: int) -> list[float]:
        """The numbers with which it answers a number."""
        with suppress(BrokenPipeError):  # it ended: line tells
            self._socket.sendall(f"{count}\n".encode())
        return [float(word) for word in self.line().split()]
