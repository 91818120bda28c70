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


@pytest.mark.parametrize(
    "bad",
    [
        b"",
        b"[]",
        b"{",
        b"\xff",
        state("no json"),
        state("[]"),
        b"[" * 100_000,
        state("\ud800"),
        b'{"a": ' + b"9" * 5000,
    ],
)
def test_a_bad_state_is_an_error_that_says_so(bad: bytes) -> None:
    with pytest.raises(StateError, match="no JSON"):
        Description.of(bad)


@pytest.mark.parametrize("name", [["a", "list"], {"an": "object"}, 7, True])
def test_what_is_no_text_is_no_name(name: object) -> None:
    metadata = json.dumps({"container": name, "route": name})
    assert Description.of(state(metadata)) == Description("the-runtimes-id", "unknown", 42)
    assert Description.of(state(None, state={"id": name}, pid=name)).container == "unknown"


def test_only_a_number_is_a_pid() -> None:
    assert [Description.of(state(pid=pid)).pid for pid in (7, True, "7", 7.0, None)] == [7, None, None, None, None]


anything = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text() | st.just("\ud800"),
    lambda x: st.lists(x, max_size=3) | st.dictionaries(st.text(), x, max_size=3),
)
known_names = st.fixed_dictionaries(
    {},
    optional={
        "metadata": anything
        | st.fixed_dictionaries({}, optional={"container": anything, "route": anything}).map(json.dumps),
        "state": anything | st.fixed_dictionaries({}, optional={"id": anything}),
        "pid": anything,
    },
)


@given(anything | known_names)
def test_no_state_does_more_than_that(document: object) -> None:
    with contextlib.suppress(StateError):
        whose = Description.of(json.dumps(document).encode())
        assert Description.of(whose.state()) == whose._replace(pid=None)


@given(st.binary(max_size=200), st.integers(0, 200), st.binary(max_size=8))
def test_nor_do_any_bytes(data: bytes, at: int, more: bytes) -> None:
    good = state(json.dumps({"container": "blue", "route": "shim"}))
    for text in (data, good[:at], good[:at] + more + good[at:], good[:at] + more + good[at + len(more) :]):
        with contextlib.suppress(StateError):
            Description.of(text)
