"""Whose a listener is, from what a runtime says of its container."""

from __future__ import annotations

import contextlib
import json

import pytest
from hypothesis import given
from hypothesis import strategies as st

from mpu_notify.supervisor.containers import Description, StateError


def state(metadata: object = None, **more: object) -> bytes:
    inner = {"id": "the-runtimes-id", "pid": 41}
    return json.dumps({"ociVersion": "1.1.0", "pid": 42, "metadata": metadata, "state": inner, **more}).encode()


def test_our_metadata_names_the_container() -> None:
    metadata = json.dumps({"container": "blue", "route": "shim"})
    assert Description.of(state(metadata)) == Description("blue", "shim", 42)


@pytest.mark.parametrize("metadata", [None, "", json.dumps({"container": "", "route": "precreate"})])
def test_without_a_name_of_ours_the_runtimes_id_is_its_name(metadata: str | None) -> None:
    assert Description.of(state(metadata)).container == "the-runtimes-id"


def test_a_state_with_nothing_in_it_is_somebodys_all_the_same() -> None:
    assert Description.of(b"{}") == Description("unknown", "unknown", None)


def test_what_is_written_is_what_is_read() -> None:
    one = Description("pid 7", "run")
    assert Description.of(one.state()) == one


@pytest.mark.parametrize("bad", [b"", b"[]", b"{", b"\xff", state("no json"), state("[]"), b"[" * 100_000])
def test_a_bad_state_is_an_error_that_says_so(bad: bytes) -> None:
    with pytest.raises(StateError, match="no JSON"):
        Description.of(bad)


@given(st.recursive(st.none() | st.booleans() | st.integers() | st.text(), lambda x: st.dictionaries(st.text(), x)))
def test_no_state_does_more_than_that(document: object) -> None:
    with contextlib.suppress(StateError):
        Description.of(json.dumps(document).encode())
