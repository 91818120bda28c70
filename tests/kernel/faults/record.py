"""What a fault did, as a line of a file: the tests write rows, docs/reliability.md is made of them (table.py)."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple


class Row(NamedTuple):
    """One fault. Rows of the same section and fault become one, their tries added up."""

    section: str
    fault: str
    tries: int
    got: str  # by the caller
    leaks: str  # "none", or what is left behind


def append(file: Path, row: Row) -> None:
    with file.open("a") as lines:
        lines.write(json.dumps(row) + "\n")


def read(file: Path) -> Iterator[Row]:
    for line in file.read_text().splitlines():
        yield Row(*json.loads(line))
