"""What csrc/json_scan.h finds in a text is what Python's json reads there, and what it refuses is no use."""

from __future__ import annotations

import errno
import json
from typing import Any

import pytest
from hypothesis import assume, given
from hypothesis import strategies as st

from .readers import compile_readers, find

DEPTH = 64
NAMES = ("a", "pid", "annotations", "")

numbers = st.integers() | st.floats(allow_nan=False, allow_infinity=False)
values = st.recursive(
    st.none() | st.booleans() | numbers | st.text(max_size=5),
    lambda x: st.lists(x, max_size=3) | st.dictionaries(st.sampled_from(NAMES) | st.text(max_size=2), x, max_size=3),
    max_leaves=8,
)
objects = st.dictionaries(st.sampled_from(NAMES) | st.text(max_size=2), values, max_size=4)
TOKENS = rb"""{ } [ ] , : " \ 0 - . e5 01 1. NaN -Infinity true nul \u00e9 \u12 \x "a":1 "\u0061":2, //"""
pieces = st.sampled_from([*TOKENS.split(), b" ", b"\n", b"\0", b"\x1f", b"\x7f", b"\xff"])


@pytest.fixture(scope="module", autouse=True)
def _compiled() -> None:
    compile_readers()


@st.composite
def texts(draw: st.DrawFn) -> bytes:
    """JSON objects in several notations, most of them damaged here and there."""
    text = json.dumps(
        draw(objects),
        ensure_ascii=draw(st.booleans()),
        indent=draw(st.none() | st.integers(0, 2)),
        separators=draw(st.sampled_from([(",", ":"), (", ", ": "), (" ,\r\n", "\t: ")])),
    ).encode()
    for _ in range(draw(st.integers(0, 3))):
        at = draw(st.integers(0, len(text)))
        text = text[:at] + draw(pieces) + text[at + draw(st.integers(0, 2)) :]
    return text


def refuse(constant: str) -> float:
    raise ValueError(constant)


class Repeated(dict[str, Any]):
    """An object that has a name more than once."""


def collect(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    return dict(pairs) if len(dict(pairs)) == len(pairs) else Repeated(pairs)


def strictly(text: bytes) -> Any:
    """What Python makes of it, without Python's extensions. Raises ValueError. What is no UTF-8 is let pass."""
    return json.loads(text.decode(errors="surrogateescape"), parse_constant=refuse, object_pairs_hook=collect)


@given(texts() | st.binary(max_size=30), st.sampled_from(NAMES))
def test_what_is_found_is_what_python_reads(text: bytes, name: str) -> None:
    found = find(text, name)
    if found == -errno.EINVAL:
        return
    whole = strictly(text)
    assert isinstance(whole, dict)
    if isinstance(found, bytes):
        value = strictly(found)
        assert value is not None
        assert whole[name] == value or b"\\" in text  # an escaped name is not looked for
    else:
        assert found == -errno.ENOENT
        assert whole.get(name) is None or b"\\" in text


@given(texts(), st.sampled_from(NAMES))
def test_only_what_is_no_strict_json_is_refused(text: bytes, name: str) -> None:
    try:
        whole = strictly(text)
    except ValueError:
        whole = None
    assume(isinstance(whole, dict) and not isinstance(whole, Repeated))
    assert find(text, name) != -errno.EINVAL


@given(objects, st.sampled_from(NAMES))
def test_a_member_is_found(members: dict[str, Any], name: str) -> None:
    found = find(json.dumps(members).encode(), name)
    wanted = members.get(name)
    assert (json.loads(found) if isinstance(found, bytes) else None) == wanted


@pytest.mark.parametrize(
    "text",
    [
        *(
            b"",
            b" ",
            b"[]",
            b"1",
            b"{",
            b"{}}",
            b"{}{}",
            b"{},",
            b"{]",
            b"{,}",
            b'{"a"}',
            b'{"a":}',
            b'{"a":1,}',
            b"{1:2}",
        ),
        *(b'{"a":01}', b'{"a":+1}', b'{"a":1.}', b'{"a":.5}', b'{"a":1e}', b'{"a":-}', b'{"a":NaN}', b'{"a":Infinity}'),
        *(
            b'{"a":"\n"}',
            b'{"a":"\\x"}',
            b'{"a":"\\u12g4"}',
            b'{"a":"',
            b"{'a':1}",
            b'{"a":tru}',
            b'{"a":true1}',
            b'{"a":1}\0',
        ),
        *(b'\xef\xbb\xbf{"a":1}', b'{"a":1 /* */}', b'{"a":1,"a":1}', b'{"a":' + b"[" * DEPTH + b"]" * DEPTH + b"}"),
    ],
)
def test_this_is_no_object_that_may_be_looked_into(text: bytes) -> None:
    assert find(text, "a") == -errno.EINVAL


def test_as_deep_as_it_may_be() -> None:
    deep = b"[" * (DEPTH - 1) + b"]" * (DEPTH - 1)
    assert find(b'{"a":' + deep + b"}", "a") == deep
    assert find(b'{"a":[' + deep + b"]}", "a") == -errno.EINVAL


def test_a_name_with_an_escape_is_no_name_that_is_looked_for() -> None:
    assert find(rb'{"\u0061": 1}', "a") == -errno.ENOENT
    assert find(rb'{"\u0061": 1, "a": 2}', "a") == b"2"
