"""The monitor's protocol: csrc/protocol.h as Python values. One packet is one message, both ways length-checked."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from enum import IntEnum
from types import MappingProxyType
from typing import Any, NamedTuple

from mpu_notify.notify._native import ffi, lib

VERSION: int = lib.MPU_PROTOCOL_VERSION
MAX_PARAMS: int = lib.MPU_MAX_PARAMS
MAX_PERFORMED: int = lib.MPU_MAX_PERFORMED
MAX_PACKET: int = ffi.sizeof("struct mpu_performed") + MAX_PARAMS


class ProtocolError(Exception):
    """The other end sent what this version of the protocol does not have."""


class Step(IntEnum):
    """Which way the params of a request are to be translated."""

    IN = lib.MPU_TRANSLATE_IN
    OUT = lib.MPU_TRANSLATE_OUT


class Cause(IntEnum):
    """What became of a call in the table: translated, or why it was answered with continue."""

    TRANSLATED = lib.MPU_TRANSLATED
    CALLER_GONE = lib.MPU_CALLER_GONE
    MEMORY_UNREADABLE = lib.MPU_MEMORY_UNREADABLE
    MEMORY_UNWRITABLE = lib.MPU_MEMORY_UNWRITABLE
    SIZE_UNKNOWN = lib.MPU_SIZE_UNKNOWN
    FLAGS_SET = lib.MPU_FLAGS_SET
    FILE_UNAVAILABLE = lib.MPU_FILE_UNAVAILABLE
    FILE_FOREIGN = lib.MPU_FILE_FOREIGN
    IOCTL_FAILED = lib.MPU_IOCTL_FAILED
    STATUS_BAD = lib.MPU_STATUS_BAD
    SUPERVISOR_GONE = lib.MPU_SUPERVISOR_GONE
    SUPERVISOR_SILENT = lib.MPU_SUPERVISOR_SILENT
    SUPERVISOR_DECLINED = lib.MPU_SUPERVISOR_DECLINED
    REPLY_FAILED = lib.MPU_REPLY_FAILED
    TABLE_UNUSUAL = lib.MPU_TABLE_UNUSUAL


class Device(NamedTuple):
    """The control node as the monitor compares it: st_rdev of a character device, else st_dev and st_ino."""

    is_device: bool
    major: int
    minor: int
    inode: int


class Control(NamedTuple):
    """A row of the control table as the monitor has it; `asks`: its params must be translated in, too.

    Where in the params, in bytes, the u32 count of PIDs and their table are: an answer without PIDs need not be
    translated. table_size 0: there is no count. Where in the params the u64 pointer to a table is, the size of that
    table's entries and how many there must be; entry_size 0: there is no pointer.
    """

    cmd: int
    size: int
    asks: bool
    count_at: int
    table_at: int
    table_size: int
    pointer_at: int = 0
    entry_size: int = 0
    n_entries: int = 0


class Hello(NamedTuple):
    """The monitor is there; is_kept: a service manager starts it again when it ends. The same in every version.

    `supervisor` is the pid of the one that it has, 0 where it has none.
    """

    version: int
    pid: int
    is_kept: bool
    supervisor: int


class Replaced(NamedTuple):
    """Another supervisor has taken our place; nothing follows."""


class Moved(NamedTuple):
    """Another monitor has taken the place of this one; nothing follows."""


class Attached(NamedTuple):
    """A listener is served now, and its channel and files came along; error is 0, or the errno for which it is not.

    `identity` is the listener's for good; `listener` is this monitor's number for it.
    """

    listener: int
    identity: int
    error: int


class Begun(NamedTuple):
    """A caller, by its thread id in the initial PID namespace, is in a call that is in the table."""

    listener: int
    tid: int


class Request(NamedTuple):
    """A call that waits for its params to be translated. begun_ns is CLOCK_BOOTTIME before the ioctl, 0 in Step.IN.

    Where the control's table is behind a pointer, it follows in `params`.
    """

    listener: int
    sequence: int
    step: Step
    cmd: int
    begun_ns: int
    params: bytes


class Performed(NamedTuple):
    """The one more control that an answer asked for; the call still waits. `status` is the RM status."""

    listener: int
    sequence: int
    cmd: int
    status: int
    begun_ns: int
    params: bytes


class Outcome(NamedTuple):
    """What became of a call; error is the errno or RM status that belongs to the cause."""

    listener: int
    tid: int
    cmd: int
    size: int
    cause: Cause
    error: int
    duration_ns: int


class Ended(NamedTuple):
    """The last user of a listener's filter is gone; how many calls it had."""

    listener: int
    received: int
    untranslated: int
    causes: Mapping[Cause, int]


Message = Hello | Replaced | Moved | Attached | Begun | Request | Performed | Outcome | Ended


def _view(packet: bytes, struct: str, size: int | None = None) -> Any:
    wanted = ffi.sizeof(struct) if size is None else size
    if len(packet) != wanted:
        raise ProtocolError(f"the monitor sent {struct} with {len(packet)} bytes instead of {wanted}")
    return ffi.cast(f"{struct} *", ffi.from_buffer(packet))


def _with_params(packet: bytes, struct: str) -> tuple[Any, bytes]:
    head = ffi.sizeof(struct)
    if len(packet) < head:
        raise ProtocolError(f"the monitor sent {struct} with {len(packet)} bytes, shorter than its head of {head}")
    it = ffi.cast(f"{struct} *", ffi.from_buffer(packet))
    if len(packet) != head + it.size:
        raise ProtocolError(f"the monitor sent {len(packet) - head} bytes of params where it said {it.size}")
    return it, packet[head:]


def _request(packet: bytes, step: Step) -> Request:
    it, params = _with_params(packet, "struct mpu_call")
    return Request(it.header.listener, it.sequence, step, it.cmd, it.begun_ns, params)


def _performed(packet: bytes) -> Performed:
    it, params = _with_params(packet, "struct mpu_performed")
    return Performed(it.header.listener, it.sequence, it.cmd, it.status, it.begun_ns, params)


def _cause(number: int) -> Cause:
    try:
        return Cause(number)
    except ValueError as error:
        raise ProtocolError(f"the monitor named a cause {number} that this version does not have") from error


def _outcome(packet: bytes) -> Outcome:
    it = _view(packet, "struct mpu_outcome")
    return Outcome(it.header.listener, it.tid, it.cmd, it.size, _cause(it.cause), it.error, it.duration_ns)


def _ended(packet: bytes) -> Ended:
    it = _view(packet, "struct mpu_ended")
    counts = it.counts
    causes = {cause: counts.causes[cause] for cause in Cause}
    return Ended(it.header.listener, counts.received, counts.untranslated, causes)


def _hello(packet: bytes) -> Hello:
    it = _view(packet, "struct mpu_hello")
    return Hello(it.header.version, it.pid, bool(it.is_kept), it.supervisor)


def _replaced(packet: bytes) -> Replaced:
    _view(packet, "struct mpu_replaced")
    return Replaced()


def _moved(packet: bytes) -> Moved:
    _view(packet, "struct mpu_moved")
    return Moved()


def _attached(packet: bytes) -> Attached:
    it = _view(packet, "struct mpu_attached")
    return Attached(it.header.listener, it.identity, it.error)


def _begun(packet: bytes) -> Begun:
    it = _view(packet, "struct mpu_begun")
    return Begun(it.header.listener, it.tid)


_DECODERS: Mapping[int, Callable[[bytes], Message]] = MappingProxyType(
    {
        lib.MPU_HELLO: _hello,
        lib.MPU_REPLACED: _replaced,
        lib.MPU_MOVED: _moved,
        lib.MPU_ATTACHED: _attached,
        lib.MPU_BEGUN: _begun,
        lib.MPU_TRANSLATE_IN: lambda packet: _request(packet, Step.IN),
        lib.MPU_TRANSLATE_OUT: lambda packet: _request(packet, Step.OUT),
        lib.MPU_PERFORMED: _performed,
        lib.MPU_OUTCOME: _outcome,
        lib.MPU_ENDED: _ended,
    }
)


def decode(packet: bytes) -> Message:
    """The message in a packet from the monitor. Raises ProtocolError for anything else.

    A greeting is decoded in every version.
    """
    size = ffi.sizeof("struct mpu_header")
    if len(packet) < size:
        raise ProtocolError(f"the monitor sent {len(packet)} bytes, shorter than a header")
    header = _view(packet[:size], "struct mpu_header")
    if header.version != VERSION and header.type != lib.MPU_HELLO:
        raise ProtocolError(f"the monitor speaks protocol version {header.version}, this supervisor {VERSION}")
    if header.length != len(packet):
        raise ProtocolError(f"the monitor sent {len(packet)} bytes where it said {header.length}")
    if header.type not in _DECODERS:
        raise ProtocolError(f"the monitor sent a packet of type {header.type}, which is not for a supervisor")
    return _DECODERS[header.type](packet)


def _packet(struct: str, kind: int, fields: Mapping[str, object], listener: int = 0, body: bytes = b"") -> bytes:
    it = ffi.new(f"{struct} *", dict(fields))
    it.header.length = ffi.sizeof(struct) + len(body)
    it.header.version = VERSION
    it.header.type = kind
    it.header.listener = listener
    return bytes(ffi.buffer(it, ffi.sizeof(struct))) + body


def configure(device: Device, controls: Iterable[Control], silence_ms: int) -> bytes:
    """The first packet to a monitor: control node, control table, and its patience with us."""
    rows = [ffi.new("struct mpu_control *", control) for control in controls]
    fields = {
        "silence_ms": silence_ms,
        "is_device": int(device.is_device),
        "major": device.major,
        "minor": device.minor,
        "ino": device.inode,
        "n_controls": len(rows),
    }
    body = b"".join(bytes(ffi.buffer(row)) for row in rows)
    return _packet("struct mpu_configure", lib.MPU_CONFIGURE, fields, body=body)


def attach() -> bytes:
    """A listener comes with the packet, and a memfd with the state of its container."""
    return _packet("struct mpu_attach", lib.MPU_ATTACH, {})


def adopt() -> bytes:
    """A listener that another monitor served comes with the packet, with its state and its slot."""
    return _packet("struct mpu_adopt", lib.MPU_ADOPT, {})


def leave() -> bytes:
    """The monitor may end once it has no listener."""
    return _packet("struct mpu_leave", lib.MPU_LEAVE, {})


def answer(request: Request | Performed, params: bytes | None) -> bytes:
    """The params to go on with, as long as those of the call; None to have the call answered with continue."""
    verdict = lib.MPU_CONTINUE if params is None else lib.MPU_PROCEED
    return _answer(request, verdict, 0, params or b"")


def perform(request: Request | Performed, cmd: int, params: bytes) -> bytes:
    """In the place of an answer: one more control of the table, without a pointer, to be performed before it.

    It comes back as Performed; at most MAX_PERFORMED of them in a call.
    """
    return _answer(request, lib.MPU_PERFORM, cmd, params)


def _answer(request: Request | Performed, verdict: int, cmd: int, body: bytes) -> bytes:
    fields = {"sequence": request.sequence, "verdict": verdict, "cmd": cmd, "size": len(body)}
    return _packet("struct mpu_answer", lib.MPU_ANSWER, fields, request.listener, body)
