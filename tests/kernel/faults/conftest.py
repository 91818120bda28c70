"""Fixtures of the fault matrix."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest

from .record import Row, append

#: Notes what a fault did.
Record = Callable[[Row], None]


@pytest.fixture(scope="session")
def record(pytestconfig: pytest.Config) -> Record:
    """A function that appends a row to the file of the option --rows; without that, to none."""
    file: Path | None = pytestconfig.getoption("rows")
    return lambda row: append(file, row) if file else None
