"""The monitor's protocol, the supervisor's side: what is not exactly a message is an error."""

from __future__ import annotations

import contextlib
import struct

import pytest
from hypothesis import given
from hypothesis import strategies as st

from mpu_notify.notify import protocol
from mpu_notify.notify.protocol import (
    Attached,
    Begun,
    Cause,
    Ended,
    Hello,
    Moved,
    Outcome,
    Performed,
    ProtocolError,
    Replaced,
    Request,
    Step,
)

HELLO, ATTACHED, BEGUN, CALL_IN, CALL_OUT, ANSWER, OUTCOME, ENDED = 1, 4, 5, 6, 7, 8, 9, 10
REPLACED, MOVED, PERFORMED = 14, 15, 20
GREETING = struct.pack("=IIII", 42, 1, 43, 0)


def packet(kind: int, body: bytes = b"", *, listener: int = 7, version: int = protocol.VERSION) -> bytes:
    return struct.pack("=IHHII", 16 + len(body), version, kind, listener, 0) + body


def call(kind: int, params: bytes, size: int | None = None) -> bytes:
    size = len(params) if size is None else size
    return packet(kind, struct.pack("=QQII", 11, 22, 0x2080018D, size) + params)


def performed(params: bytes, size: int | None = None) -> bytes:
    size = len(params) if size is None else size
    return packet(PERFORMED, struct.pack("=QQIIII", 11, 22, 0x2080018D, 0x1B, size, 0) + params)


def test_each_message_is_decoded() -> None:
    counts = struct.pack("=QQ16Q", 9, 4, *range(16))
    assert protocol.decode(packet(HELLO, GREETING)) == Hello(protocol.VERSION, 42, is_kept=True, supervisor=43)
    assert protocol.decode(packet(REPLACED)) == Replaced()
    assert protocol.decode(packet(MOVED)) == Moved()
    assert protocol.decode(packet(ATTACHED, struct.pack("=QiI", 5, 9, 0))) == Attached(7, 5, 9)
    assert protocol.decode(packet(BEGUN, struct.pack("=II", 33, 0))) == Begun(7, 33)
    assert protocol.decode(call(CALL_IN, b"abc")) == Request(7, 11, Step.IN, 0x2080018D, 22, b"abc")
    assert protocol.decode(call(CALL_OUT, b"")) == Request(7, 11, Step.OUT, 0x2080018D, 22, b"")
    assert protocol.decode(performed(b"abc")) == Performed(7, 11, 0x2080018D, 0x1B, 22, b"abc")
    outcome = struct.pack("=QIIIIiI", 5, 33, 0x2080018D, 3812, Cause.STATUS_BAD, 0x1F, 0)
    assert protocol.decode(packet(OUTCOME, outcome)) == Outcome(7, 33, 0x2080018D, 3812, Cause.STATUS_BAD, 0x1F, 5)
    assert protocol.decode(packet(ENDED, counts)) == Ended(7, 9, 4, {cause: int(cause) for cause in Cause})


@pytest.mark.parametrize(
    "wrong",
    [
        b"",
        packet(HELLO, GREETING)[:-1],
        packet(HELLO, GREETING + b"more"),
        packet(HELLO, GREETING) + b"x",
        packet(MOVED, bytes(8)),
        packet(REPLACED, version=protocol.VERSION + 1),
        packet(ATTACHED),
        packet(99),
        packet(2),
        packet(ANSWER, bytes(16)),
        packet(BEGUN),
        call(CALL_IN, b"abc", size=4),
        call(CALL_IN, b"abc", size=2),
        call(CALL_IN, b"abc", size=2**32 - 1),
        packet(CALL_OUT, bytes(23)),
        packet(PERFORMED, bytes(31)),
        performed(b"abc", size=4),
        packet(OUTCOME, struct.pack("=QIIIIiI", 5, 33, 1, 2, 15, 0, 0)),
        packet(ENDED, bytes(8)),
    ],
)
def test_anything_else_is_an_error(wrong: bytes) -> None:
    with pytest.raises(ProtocolError):
        protocol.decode(wrong)


def test_a_monitor_of_another_version_is_understood_to_greet() -> None:
    """Else a supervisor could not have it replaced."""
    assert protocol.decode(packet(HELLO, GREETING, version=99)) == Hello(99, 42, is_kept=True, supervisor=43)


@given(st.binary(max_size=300))
def test_no_bytes_do_more_than_raise_a_protocol_error(data: bytes) -> None:
    with contextlib.suppress(ProtocolError):
        protocol.decode(data)


@given(st.data(), st.integers(0, 12), st.integers(0, 2**32 - 1))
def test_nor_does_any_body_behind_a_sound_header(data: st.DataObject, kind: int, listener: int) -> None:
    size = data.draw(st.sampled_from([0, 8, 24, 25, 40, 144]) | st.integers(0, 200))
    sent = packet(kind, data.draw(st.binary(min_size=size, max_size=size)), listener=listener)
    try:
        message = protocol.decode(sent)
    except ProtocolError:
        return
    assert isinstance(message, Hello) or message.listener == listener
    if isinstance(message, Request):
        assert message.params == sent[40:]


@given(st.data(), st.sampled_from([CALL_IN, CALL_OUT]), st.binary(max_size=100))
def test_a_call_has_just_the_params_that_it_says(data: st.DataObject, kind: int, params: bytes) -> None:
    size = data.draw(st.just(len(params)) | st.integers(0, 2**32 - 1))
    sent = call(kind, params, size)
    if size == len(params):
        assert protocol.decode(sent) == Request(7, 11, Step(kind), 0x2080018D, 22, params)
    else:
        with pytest.raises(ProtocolError):
            protocol.decode(sent)


@given(params=st.binary(min_size=1, max_size=100))
def test_an_answer_repeats_its_requests_sequence(params: bytes) -> None:
    request = Request(7, 11, Step.IN, 0x2080018D, 0, params)
    head = struct.Struct("=IHHIIQIIII")
    go_on = protocol.answer(request, params)
    assert head.unpack_from(go_on) == (len(go_on), protocol.VERSION, ANSWER, 7, 0, 11, 1, len(params), 0, 0)
    assert go_on[head.size :] == params
    refuse = protocol.answer(request, None)
    assert head.unpack(refuse) == (head.size, protocol.VERSION, ANSWER, 7, 0, 11, 0, 0, 0, 0)
    more = protocol.perform(request, 0x2080018D, params)
    assert head.unpack_from(more) == (len(more), protocol.VERSION, ANSWER, 7, 0, 11, 2, len(params), 0x2080018D, 0)
    assert more[head.size :] == params


def test_a_configuration_has_the_whole_table() -> None:
    device = protocol.Device(is_device=True, major=195, minor=255, inode=0)
    rows = [
        protocol.Control(0x2080018D, 3812, asks=False, count_at=8, table_at=12, table_size=3800),
        protocol.Control(0x2080018E, 14408, asks=True, count_at=0, table_at=8, table_size=14400),
        protocol.Control(
            0x2080016E,
            16,
            asks=False,
            count_at=0,
            table_at=16,
            table_size=16384,
            pointer_at=8,
            entry_size=32,
            n_entries=512,
        ),
    ]
    sent = protocol.configure(device, rows, 1000)
    layout = struct.Struct("=IHHIIIIIIQ2I9I9I9I")
    assert layout.unpack(sent) == (
        *(len(sent), protocol.VERSION, 2, 0, 0),
        *(1000, 1, 195, 255, 0),
        *(3, 0),
        *(0x2080018D, 3812, 0, 8, 12, 3800, 0, 0, 0),
        *(0x2080018E, 14408, 1, 0, 8, 14400, 0, 0, 0),
        *(0x2080016E, 16, 0, 0, 16, 16384, 8, 32, 512),
    )
