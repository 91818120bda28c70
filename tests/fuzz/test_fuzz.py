"""The C entry points take any bytes: a few seconds for each target, from the inputs that are kept.

`make fuzz SECONDS=600` goes on for longer.
"""

from __future__ import annotations

import pytest

from .fuzzing import CORPUS, TARGETS, FuzzError, fuzz_all

SECONDS = 5
MAX_CORPUS = 200_000  # bytes


@pytest.fixture(scope="module")
def outcomes() -> dict[str, str | FuzzError]:
    return fuzz_all(TARGETS, SECONDS)


@pytest.mark.parametrize("target", TARGETS)
def test_no_input_makes_it_fail(outcomes: dict[str, str | FuzzError], target: str) -> None:
    outcome = outcomes[target]
    assert isinstance(outcome, str), str(outcome)
    assert outcome.startswith("Done ")


def test_the_kept_inputs_are_few_and_each_target_has_some() -> None:
    assert sum(file.stat().st_size for file in CORPUS.rglob("*") if file.is_file()) < MAX_CORPUS
    assert [target for target in TARGETS if not any((CORPUS / target).iterdir())] == []
