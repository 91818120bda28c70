"""docs/security.md names code and tests: they are there."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent.parent
PAGE = (ROOT / "docs" / "security.md").read_text(encoding="utf-8")
NAMED = sorted(set(re.findall(r"`((?:csrc|mpu_notify|tests|deploy)/[^`]*)`", PAGE)))


@pytest.mark.parametrize("named", NAMED)
def test_what_the_page_names_is_there(named: str) -> None:
    path, _, test = named.partition("::")
    assert (ROOT / path).exists()
    assert not test or f"def {test}(" in (ROOT / path).read_text(encoding="utf-8")


def test_every_rule_is_on_the_page() -> None:
    assert {int(number) for number in re.findall(r"^\| (\d+)\. ", PAGE, re.MULTILINE)} == set(range(1, 10))
    assert "(rule 10)" in PAGE
