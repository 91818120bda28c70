"""Write the rows of a run into a document:  python -m tests.kernel.faults.table ROWS DOCUMENT."""

from __future__ import annotations

import os
import sys
from collections.abc import Iterable, Iterator, Sequence
from datetime import datetime, timezone
from pathlib import Path

from .record import Row, read

BEGIN, END = "<!-- what follows is made by `make reliability` -->", "<!-- until here -->"


def _joined(rows: Sequence[Row]) -> str:
    """What the caller got, and how often where it was not always the same."""
    tries: dict[str, int] = {}
    for row in rows:
        tries[row.got] = tries.get(row.got, 0) + row.tries
    return next(iter(tries)) if len(tries) == 1 else ", ".join(f"{got}: {times:,}" for got, times in tries.items())


def _leaks(rows: Sequence[Row]) -> str:
    found = dict.fromkeys(row.leaks for row in rows)
    if len(found) > 1:
        found.pop("none", None)
    return "; ".join(found)


def merged(rows: Iterable[Row]) -> list[Row]:
    """One row for each section and fault, in the order in which they come first."""
    groups: dict[tuple[str, str], list[Row]] = {}
    for row in rows:
        groups.setdefault((row.section, row.fault), []).append(row)
    return [
        Row(section, fault, sum(row.tries for row in group), _joined(group), _leaks(group))
        for (section, fault), group in groups.items()
    ]


def _cell(text: str) -> str:
    return text.replace("|", "\\|").replace("\n", " ")


def tables(rows: Sequence[Row]) -> Iterator[str]:
    """The lines of one table for each section."""
    for section in dict.fromkeys(row.section for row in rows):
        yield from ("", f"### {section}", "", "| Fault | Tries | What the caller got | Leaks |", "|---|--:|---|---|")
        for row in rows:
            if row.section == section:
                yield f"| {_cell(row.fault)} | {row.tries:,} | {_cell(row.got)} | {_cell(row.leaks)} |"


def _run() -> str:
    day = datetime.now(tz=timezone.utc).date()
    return (
        f"Run on {day} on Linux {os.uname().release.split('-')[0]} ({os.uname().machine}, {os.cpu_count()} processors)."
    )


def main(rows: Path, document: Path) -> None:
    before, rest = document.read_text().split(BEGIN)
    _, after = rest.split(END)
    made = "\n".join([BEGIN, "", _run(), *tables(merged(read(rows))), "", END])
    document.write_text(before + made + after)


if __name__ == "__main__":
    main(Path(sys.argv[1]), Path(sys.argv[2]))
