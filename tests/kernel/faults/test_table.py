"""How rows become the tables of docs/reliability.md."""

from __future__ import annotations

from pathlib import Path

from .record import Row, append, read
from .table import BEGIN, END, main, merged, tables

ROWS = [
    Row("Supervisor", "killed", 3, "translated", "none"),
    Row("Monitor", "killed", 1, "the driver's own", "none"),
    Row("Supervisor", "killed", 2, "the driver's own", "none"),
    Row("Supervisor", "stopped", 1200, "a | b", "1 fd"),
]


def test_rows_of_one_fault_become_one() -> None:
    first = merged(ROWS)[0]
    assert first == Row("Supervisor", "killed", 5, "translated: 3, the driver's own: 2", "none")


def test_a_leak_is_not_hidden_by_tries_without_one() -> None:
    both = [Row("Monitor", "killed", 1, "x", "none"), Row("Monitor", "killed", 1, "x", "1 fd")]
    assert merged(both) == [Row("Monitor", "killed", 2, "x", "1 fd")]


def test_each_section_has_a_table() -> None:
    lines = list(tables(merged(ROWS)))
    assert [line for line in lines if line.startswith("#")] == ["### Supervisor", "### Monitor"]
    assert "| stopped | 1,200 | a \\| b | 1 fd |" in lines
    assert lines.index("| stopped | 1,200 | a \\| b | 1 fd |") < lines.index("### Monitor")


def test_a_document_keeps_what_is_around_its_tables(tmp_path: Path) -> None:
    rows, document = tmp_path / "rows", tmp_path / "document.md"
    for row in ROWS:
        append(rows, row)
    assert list(read(rows)) == ROWS
    document.write_text(f"# Title\n\n{BEGIN}\nold\n{END}\nlast\n")
    main(rows, document)
    once = document.read_text()
    assert once.startswith(f"# Title\n\n{BEGIN}\n")
    assert once.endswith(f"{END}\nlast\n")
    assert "old" not in once
    assert "### Monitor" in once
    main(rows, document)
    assert document.read_text() == once
