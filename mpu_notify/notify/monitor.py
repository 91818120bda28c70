"""A monitor process and the socket to it."""

from __future__ import annotations

import errno
import os
import select
import socket
import stat
import struct
import subprocess
import time
from collections.abc import Iterable, Sequence
from contextlib import suppress
from pathlib import Path
from types import TracebackType
from typing import NamedTuple

from mpu_notify.errors import MpuNotifyError
from mpu_notify.notify import native, protocol
from mpu_notify.notify.process import fork
from mpu_notify.rm.abi import CONTROL_NODE, CONTROL_NODE_MAJOR, CONTROL_NODE_MINOR

PROGRAM = Path(__file__).parent.parent / "_bin" / "mpu-notify-monitor"
DEFAULT_SILENCE_MS = 1000

_ANSWER_SECONDS = 10.0
_LOOK_SECONDS = 0.1  # between two looks whether there is a monitor at all
_ATTACHED_FDS = 4  # channel, listener, state and slot, protocol.h
_SERVICE_MANAGERS = frozenset({"NOTIFY_SOCKET", "LISTEN_PID", "LISTEN_FDS", "LISTEN_FDNAMES"})
_HELLO_FDS = 2  # agent and control, protocol.h


class MonitorError(MpuNotifyError):
    """The monitor could not be started or did not do what it was asked; the text says what to do."""


class OtherVersionError(MonitorError):
    """The monitor speaks another version of the protocol; `is_kept` as in protocol.Hello."""

    def __init__(self, hello: protocol.Hello) -> None:
        text = f"it speaks protocol version {hello.version}, this supervisor {protocol.VERSION}"
        super().__init__(f"{text}; restart mpu-notify-monitor.service" if hello.is_kept else text)
        self.is_kept = hello.is_kept


class ReplacedError(MonitorError):
    """Another supervisor has taken our place."""


class ListenerError(MonitorError):
    """The monitor cannot have a listener's calls translated: they are answered with continue."""


class ControlNodeError(MpuNotifyError):
    """The control node that was named cannot be looked at; the text says what to do."""


def identify(control_node: Path) -> protocol.Device:
    """What the monitor must compare a caller's file with.

    Where the default node does not exist yet (nvidia-modprobe may make it later), its fixed device number is used.
    """
    try:
        found = control_node.stat()
    except FileNotFoundError as error:
        if control_node == CONTROL_NODE:
            return protocol.Device(is_device=True, major=CONTROL_NODE_MAJOR, minor=CONTROL_NODE_MINOR, inode=0)
        raise ControlNodeError(
            f"no control node at {control_node}: name the driver's with --device (default {CONTROL_NODE})"
        ) from error
    except OSError as error:
        raise ControlNodeError(f"cannot look at the control node {control_node}: {error.strerror}") from error
    is_device = stat.S_ISCHR(found.st_mode)
    number = found.st_rdev if is_device else found.st_dev
    inode = 0 if is_device else found.st_ino
    return protocol.Device(is_device, os.major(number), os.minor(number), inode)


class Channel:
    """A listener's own socket to its monitor."""

    def __init__(self, connection: socket.socket, listener: int) -> None:
        self._socket = connection
        self.listener = listener

    def fileno(self) -> int:
        """The socket's fd, for select."""
        return self._socket.fileno()

    def receive(self) -> protocol.Message | None:
        """The next message; None where the monitor has hung up. Raises ProtocolError."""
        return _receive(self._socket)

    def answer(self, request: protocol.Request | protocol.Performed, params: bytes | None) -> None:
        """Answer a request; see protocol.answer. Nothing happens where the monitor has hung up: receive tells."""
        self._send(protocol.answer(request, params))

    def perform(self, request: protocol.Request | protocol.Performed, cmd: int, params: bytes) -> None:
        """Have one more control performed before the answer; see protocol.perform."""
        self._send(protocol.perform(request, cmd, params))

    def _send(self, packet: bytes) -> None:
        try:
            self._socket.send(packet)
        except OSError as error:
            if error.errno not in (errno.EPIPE, errno.ECONNRESET):
                raise

    def close(self) -> None:
        """Hang up: the listener's calls are answered with continue from now on."""
        self._socket.close()


class Files(NamedTuple):
    """A listener and what goes with it, as fds that are ours: while we have them, its callers outlive a monitor."""

    listener: int
    state: int
    slot: int

    def close(self) -> None:
        """Let them go."""
        for fd in self:
            os.close(fd)


class Arrival(NamedTuple):
    """A listener that the monitor serves, and the ContainerProcessState (OCI runtime-spec, JSON) that it came with.

    `identity` is the listener's, whichever monitor serves it.
    """

    channel: Channel
    state: bytes
    identity: int
    files: Files


class Sockets(NamedTuple):
    """The sockets that a daemon's monitor serves, as fds that are ours: while we have them, nobody is refused there."""

    agent: int
    control: int


class Monitor:
    """A connected monitor. Not for use by several threads.

    `pid` is its process; `process` is None where it was not started by us. `sockets` is None of a private one.
    """

    def __init__(
        self, connection: socket.socket, silence_ms: int, process: subprocess.Popen[bytes] | None = None
    ) -> None:
        self._socket = connection
        self.silence_ms = silence_ms
        self.process = process
        self.pid = 0
        self.is_kept = False
        self.sockets: Sockets | None = None

    @classmethod
    def start(
        cls,
        device: protocol.Device,
        controls: Iterable[protocol.Control],
        silence_ms: int = DEFAULT_SILENCE_MS,
        program: Path = PROGRAM,
        kernel: str | None = None,
    ) -> Monitor:
        """Start a monitor of our own, which ends with its last listener, and configure it. Raises MonitorError.

        `silence_ms` is how long one call may wait for answers. With `kernel`, a release as `uname -r` says it, the
        monitor uses no more than such a kernel has.
        """
        options = () if kernel is None else ("--kernel", kernel)
        ours, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        with theirs:
            try:
                process = _spawn([program, "--supervisor", str(theirs.fileno()), *options], theirs.fileno())
            except MonitorError:
                ours.close()
                raise
        return _configured(cls(ours, silence_ms, process), protocol.configure(device, controls, silence_ms))

    @classmethod
    def connect(
        cls,
        control: Path,
        device: protocol.Device,
        controls: Iterable[protocol.Control],
        silence_ms: int,
        lost: Monitor | None = None,
    ) -> Monitor | None:
        """Take over a running monitor by its control socket; None where there is none.

        With the one that was lost before, its supervisor is still the one that was there, and not another one that has
        come since. Raises MonitorError; OtherVersionError where the monitor must be replaced first; ReplacedError.
        """
        connection = socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        connection.settimeout(_ANSWER_SECONDS)
        try:
            connection.connect(str(control))
        except (FileNotFoundError, ConnectionRefusedError):
            connection.close()
            return None
        except OSError as error:
            connection.close()
            raise MonitorError(f"cannot connect to the monitor at {control}: {error.strerror}") from error
        whose = _listening_user(connection)
        if whose not in (0, os.geteuid()):
            connection.close()
            raise MonitorError(f"the monitor at {control} is of user {whose}, neither root's nor our own")
        return _configured(cls(connection, silence_ms), protocol.configure(device, controls, silence_ms), lost)

    def configure(self, packet: bytes, lost: Monitor | None = None) -> None:
        """Hear its greeting and send it protocol.configure. Raises MonitorError, ProtocolError, OSError."""
        self._socket.settimeout(_ANSWER_SECONDS)
        if lost is not None and lost.may_be_replaced():
            self._await_greeting(lost)
        hello, fds = self._receive(_HELLO_FDS)
        self._socket.settimeout(None)
        if len(fds) == _HELLO_FDS:
            self.sockets = Sockets(*fds)
        if not isinstance(hello, protocol.Hello):
            raise MonitorError(f"expected its greeting, got {hello}")
        if hello.version != protocol.VERSION:
            raise OtherVersionError(hello)
        if lost is not None and hello.supervisor not in (0, os.getpid()):
            raise ReplacedError(f"another supervisor, process {hello.supervisor}, has taken this one's place")
        self.pid, self.is_kept = hello.pid, hello.is_kept
        self._socket.send(packet)

    def _await_greeting(self, lost: Monitor) -> None:
        """Who connects to sockets that we ourselves keep open is not refused where there is no monitor."""
        deadline = time.monotonic() + _ANSWER_SECONDS
        while not select.select([self._socket], [], [], _LOOK_SECONDS)[0]:
            if not lost.is_in_use():
                raise MonitorError("it ended before it greeted")
            if time.monotonic() > deadline:
                raise MonitorError("it does not greet")

    def reconfigure(self, device: protocol.Device, controls: Iterable[protocol.Control]) -> None:
        """Give it another control node and table, for the calls from now on; its patience stays."""
        self._socket.send(protocol.configure(device, controls, self.silence_ms))

    def fileno(self) -> int:
        """The socket's fd, for select."""
        return self._socket.fileno()

    def may_be_replaced(self) -> bool:
        """Whether it is for us to start another one where it has ended, on its sockets."""
        return self.sockets is not None and not self.is_kept

    def is_in_use(self) -> bool:
        """Whether a living monitor, it or another, serves its sockets."""
        assert self.sockets is not None  # noqa: S101 - see may_be_replaced
        return native.has_monitor(self.sockets.control)

    def is_dead(self) -> bool:
        """Whether it was killed. The connection may last, for as long as a thread of it cannot end (csrc/claim.h)."""
        return native.is_dead(self.pid)

    def attach(self, fd: int, state: bytes) -> None:
        """Have a listener served; it comes back by `receive`. The fd stays open here. Raises MonitorError."""
        memory = os.memfd_create("mpu-notify state")
        try:
            os.write(memory, state)
            self._give(protocol.attach(), [fd, memory])
        finally:
            os.close(memory)

    def adopt(self, files: Files) -> None:
        """Have a listener served that another monitor served; it comes back by `receive`. The fds stay open here.

        Raises MonitorError.
        """
        self._give(protocol.adopt(), list(files))

    def _give(self, packet: bytes, fds: list[int]) -> None:
        try:
            socket.send_fds(self._socket, [packet], fds)
        except OSError as error:
            raise MonitorError(f"the monitor does not take a listener: {error.strerror}") from error

    def receive(self) -> Arrival | None:
        """Wait for the next listener; None where the monitor is gone or has hung up.

        Raises ReplacedError, ListenerError, ProtocolError.
        """
        message, fds = self._receive(_ATTACHED_FDS)
        if message is None or isinstance(message, protocol.Moved):
            return None
        if isinstance(message, protocol.Replaced):
            raise ReplacedError("another supervisor has taken this one's place")
        if isinstance(message, protocol.Attached) and message.error:
            raise ListenerError(f"the monitor cannot serve the listener: {os.strerror(message.error)}")
        if not isinstance(message, protocol.Attached) or len(fds) != _ATTACHED_FDS:
            for fd in fds:
                os.close(fd)
            raise ListenerError(f"the monitor sent {message} with {len(fds)} files: are there too many open?")
        channel, *files = fds
        arrived = Files(*files)
        state = os.pread(arrived.state, os.fstat(arrived.state).st_size, 0)
        return Arrival(Channel(socket.socket(fileno=channel), message.listener), state, message.identity, arrived)

    def hear_out(self) -> None:
        """Take in why it hung up, if it said so. Listeners that it named are left: another monitor names them again.

        Raises ReplacedError, ProtocolError.
        """
        self._socket.settimeout(0)
        with suppress(BlockingIOError):
            while (arrival := self._next()) is not None:
                arrival.channel.close()
                arrival.files.close()

    def _next(self) -> Arrival | None:
        while True:
            try:
                return self.receive()
            except ListenerError:  # noqa: PERF203 - one that could not be served is not ours to bother about any more
                continue

    def _receive(self, most_fds: int) -> tuple[protocol.Message | None, list[int]]:
        try:
            packet, fds, _, _ = socket.recv_fds(self._socket, protocol.MAX_PACKET, most_fds)
        except ConnectionResetError:
            return None, []
        return (protocol.decode(packet) if packet else None), fds

    def leave(self) -> None:
        """Tell the monitor that it may end once it has no listener. One that is gone has done so."""
        with suppress(BrokenPipeError, ConnectionResetError):
            self._socket.send(protocol.leave())

    def close(self) -> None:
        """Let the monitor go: it stays for as long as it has listeners, answering continue."""
        self._socket.close()
        for fd in self.sockets or ():
            os.close(fd)
        self.sockets = None

    def __enter__(self) -> Monitor:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()


def _listening_user(connection: socket.socket) -> int:
    """The user who made the socket that we are connected to (unix(7), SO_PEERCRED)."""
    ucred = struct.Struct("iII")
    uid: int = ucred.unpack(connection.getsockopt(socket.SOL_SOCKET, socket.SO_PEERCRED, ucred.size))[1]
    return uid


def _configured(monitor: Monitor, packet: bytes, lost: Monitor | None = None) -> Monitor:
    try:
        monitor.configure(packet, lost)
    except (OtherVersionError, ReplacedError):
        monitor.close()
        raise
    except (MonitorError, protocol.ProtocolError, OSError) as error:
        monitor.close()
        raise MonitorError(f"the monitor did not come up: {error}") from error
    return monitor


def start_daemon(agent: Path, control: Path, program: Path = PROGRAM) -> None:
    """Start a monitor that serves these two sockets for good, and wait until it does. Raises MonitorError."""
    _start(program, ["--listen", str(agent), "--control", str(control)])


def start_daemon_on(sockets: Sockets, program: Path = PROGRAM) -> None:
    """The same on the sockets of a monitor that is gone."""
    _start(program, ["--agent-fd", str(sockets.agent), "--control-fd", str(sockets.control)], *sockets)


def replace_daemon(control: Path, program: Path = PROGRAM) -> None:
    """Start a monitor that takes the place of the one that serves this socket; it gets the listeners by and by."""
    _start(program, ["--take-over", str(control)])


def _start(program: Path, options: Sequence[str], *fds: int) -> None:
    """By a child that ends at once, so that the monitor, which outlives us, is init's to reap and not ours."""
    failed, said = os.pipe()
    with os.fdopen(failed, "rb") as failures:
        child = fork(lambda: _start_and_leave(program, options, fds, said))
        os.close(said)
        reason = failures.read().decode()
        os.waitpid(child, 0)
    if reason:
        raise MonitorError(reason)


def _start_and_leave(program: Path, options: Sequence[str], fds: Sequence[int], said: int) -> int:
    try:
        process = _spawn([program, *options], *fds, stdout=subprocess.PIPE)
        _await_ready(process, options)
    except MonitorError as error:
        os.write(said, str(error).encode())
        return 1
    return 0


def _await_ready(process: subprocess.Popen[bytes], options: Sequence[str]) -> None:
    assert process.stdout is not None  # noqa: S101 - asked for
    if not select.select([process.stdout], [], [], _ANSWER_SECONDS)[0]:
        process.kill()
        raise MonitorError(f"the monitor did not become ready ({' '.join(options)})")
    if process.stdout.readline() != b"READY\n":
        raise MonitorError(f"the monitor ended while starting ({' '.join(options)}): see what it said above")


def accepts(path: Path) -> bool:
    """Whether somebody listens on a socket, without connecting to it (proc(5), /proc/net/unix: flag __SO_ACCEPTCON)."""
    wanted = str(path)
    with Path("/proc/net/unix").open(encoding="utf-8", errors="surrogateescape") as lines:
        return any(line.rstrip("\n").endswith(f" {wanted}") and line.split()[3] == "00010000" for line in lines)


def _spawn(command: Sequence[str | Path], *fds: int, stdout: int | None = None) -> subprocess.Popen[bytes]:
    # What a service manager tells us, it does not tell the monitor that we start.
    environment = {key: value for key, value in os.environ.items() if key not in _SERVICE_MANAGERS}
    try:
        return subprocess.Popen(
            command, pass_fds=fds, stdin=subprocess.DEVNULL, stdout=stdout, start_new_session=True, env=environment
        )
    except OSError as error:
        raise MonitorError(f"cannot start {command[0]}: {error.strerror}; is mpu-notify installed?") from error


def _receive(connection: socket.socket) -> protocol.Message | None:
    try:
        packet = connection.recv(protocol.MAX_PACKET + 1)
    except ConnectionResetError:
        return None
    return protocol.decode(packet) if packet else None
