"""readers.c as a library: what csrc/ makes of a text."""

from __future__ import annotations

import subprocess
from functools import cache
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import cffi

_CALLS = """
int find(const char *text, size_t size, const char *name, size_t *first, size_t *end);
void runtime_section(char *path, size_t size, int *by_name);
"""
_PATH_MAX = 4096
_ffi = cffi.FFI()
_ffi.cdef(_CALLS)


@cache
def compile_readers() -> Any:
    """The library; before the first example of a test, because compiling takes a while."""
    source = Path(__file__).with_suffix(".c")
    with TemporaryDirectory() as folder:
        made = Path(folder, "readers.so")
        flags = ["-std=c11", "-D_GNU_SOURCE", "-O1", "-Wall", "-Wextra", "-Werror", "-shared", "-fPIC"]
        subprocess.run(["gcc", *flags, "-o", made, source], check=True)
        return _ffi.dlopen(str(made))


def find(text: bytes, name: str) -> bytes | int:
    """The text of a member's value as json_scan.h finds it, or the negative errno for which it does not."""
    first, end = _ffi.new("size_t *"), _ffi.new("size_t *")
    room = _ffi.from_buffer(text) if text else _ffi.new("char[1]")
    error: int = compile_readers().find(_ffi.cast("char *", room), len(text), name.encode(), first, end)
    return error or text[first[0] : end[0]]


def runtime_section() -> tuple[str, bool]:
    """What runtime.c reads of the file that the environment names: the runtime's path, and whether all opted in."""
    path, by_name = _ffi.new("char[]", _PATH_MAX), _ffi.new("int *")
    compile_readers().runtime_section(path, _PATH_MAX, by_name)
    return _ffi.string(path).decode(errors="surrogateescape"), bool(by_name[0])
