"""A monitor process and the socket to it."""

from __future__ import annotations

import errno
import os
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
from mpu_notify.notify import protocol
from mpu_notify.rm.abi import CONTROL_NODE, CONTROL_NODE_MAJOR, CONTROL_NODE_MINOR

PROGRAM = Path(__file__).parent.parent / "_bin" / "mpu-notify-monitor"
DEFAULT_SILENCE_MS = 1000

_ANSWER_SECONDS = 10.0
_ATTACHED_FDS = 2  # channel and state, protocol.h
_UCRED = struct.Struct("3i")  # unix(7)


class MonitorError(MpuNotifyError):
    """The monitor could not be started or did not do what it was asked; the text says what to do."""


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

    def answer(self, request: protocol.Request, params: bytes | None) -> None:
        """Answer a request; see protocol.answer. Nothing happens where the monitor has hung up: receive tells."""
        try:
            self._socket.send(protocol.answer(request, params))
        except OSError as error:
            if error.errno not in (errno.EPIPE, errno.ECONNRESET):
                raise

    def close(self) -> None:
        """Hang up: the listener's calls are answered with continue from now on."""
        self._socket.close()


class Arrival(NamedTuple):
    """A listener that the monitor serves, and the ContainerProcessState (OCI runtime-spec, JSON) that it came with."""

    channel: Channel
    state: bytes


class Monitor:
    """A connected monitor. Not for use by several threads.

    `pid` is its process; `process` is None where it was not started by us.
    """

    def __init__(self, connection: socket.socket, process: subprocess.Popen[bytes] | None = None) -> None:
        self._socket = connection
        self.process = process
        self.pid = _peer_pid(connection) if process is None else process.pid

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
        return _configured(cls(ours, process), protocol.configure(device, controls, silence_ms))

    @classmethod
    def connect(
        cls, control: Path, device: protocol.Device, controls: Iterable[protocol.Control], silence_ms: int
    ) -> Monitor | None:
        """Take over a running monitor by its control socket; None where there is none. Raises MonitorError."""
        connection = socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        try:
            connection.connect(str(control))
        except (FileNotFoundError, ConnectionRefusedError):
            connection.close()
            return None
        except OSError as error:
            connection.close()
            raise MonitorError(f"cannot connect to the monitor at {control}: {error.strerror}") from error
        return _configured(cls(connection), protocol.configure(device, controls, silence_ms))

    def configure(self, packet: bytes) -> None:
        """Hear its greeting and send it protocol.configure. Raises MonitorError, ProtocolError, OSError."""
        self._socket.settimeout(_ANSWER_SECONDS)
        message = _receive(self._socket)
        self._socket.settimeout(None)
        if not isinstance(message, protocol.Hello):
            raise MonitorError(f"expected its greeting, got {message}")
        self._socket.send(packet)

    def fileno(self) -> int:
        """The socket's fd, for select."""
        return self._socket.fileno()

    def attach(self, fd: int, state: bytes) -> None:
        """Have a listener served; it comes back by `receive`. The fd stays open here."""
        memory = os.memfd_create("mpu-notify state")
        try:
            os.write(memory, state)
            socket.send_fds(self._socket, [protocol.attach()], [fd, memory])
        finally:
            os.close(memory)

    def receive(self) -> Arrival | None:
        """Wait for the next listener; None where the monitor is gone. Raises ListenerError, ProtocolError."""
        try:
            packet, fds, _, _ = socket.recv_fds(self._socket, protocol.MAX_PACKET, _ATTACHED_FDS)
        except ConnectionResetError:
            return None
        message = protocol.decode(packet) if packet else None
        if message is None:
            return None
        if isinstance(message, protocol.Attached) and message.error:
            raise ListenerError(f"the monitor cannot serve the listener: {os.strerror(message.error)}")
        if not isinstance(message, protocol.Attached) or len(fds) != _ATTACHED_FDS:
            for fd in fds:
                os.close(fd)
            raise ListenerError(f"the monitor sent {message} with {len(fds)} of 2 files: are there too many open?")
        channel, state = fds
        with os.fdopen(state, "rb") as file:
            file.seek(0)
            return Arrival(Channel(socket.socket(fileno=channel), message.listener), file.read())

    def leave(self) -> None:
        """Tell the monitor that it may end once it has no listener. One that is gone has done so."""
        with suppress(BrokenPipeError, ConnectionResetError):
            self._socket.send(protocol.leave())

    def close(self) -> None:
        """Let the monitor go: it stays for as long as it has listeners, answering continue."""
        self._socket.close()

    def __enter__(self) -> Monitor:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()


def _configured(monitor: Monitor, packet: bytes) -> Monitor:
    try:
        monitor.configure(packet)
    except (MonitorError, protocol.ProtocolError, OSError) as error:
        monitor.close()
        raise MonitorError(f"the monitor did not come up: {error}") from error
    return monitor


def start_daemon(agent: Path, control: Path, program: Path = PROGRAM) -> None:
    """Start a monitor that serves these two sockets for good, and wait until it does. Raises MonitorError."""
    process = _spawn([program, "--listen", agent, "--control", control], stdout=subprocess.DEVNULL)
    deadline = time.monotonic() + _ANSWER_SECONDS
    while not _accepts(agent):
        if process.poll() is not None:
            raise MonitorError(f"the monitor ended while starting on {agent}: see what it said above")
        if time.monotonic() > deadline:
            raise MonitorError(f"the monitor does not accept on {agent}")
        time.sleep(0.01)


def _accepts(path: Path) -> bool:
    """Whether somebody listens on a socket, without connecting to it (proc(5), /proc/net/unix: flag __SO_ACCEPTCON)."""
    wanted = str(path)
    with Path("/proc/net/unix").open(encoding="utf-8", errors="surrogateescape") as lines:
        return any(line.rstrip("\n").endswith(f" {wanted}") and line.split()[3] == "00010000" for line in lines)


def _spawn(command: Sequence[str | Path], *fds: int, stdout: int | None = None) -> subprocess.Popen[bytes]:
    try:
        return subprocess.Popen(command, pass_fds=fds, stdin=subprocess.DEVNULL, stdout=stdout, start_new_session=True)
    except OSError as error:
        raise MonitorError(f"cannot start {command[0]}: {error.strerror}; is mpu-notify installed?") from error


def _peer_pid(connection: socket.socket) -> int:
    credentials = connection.getsockopt(socket.SOL_SOCKET, socket.SO_PEERCRED, _UCRED.size)
    pid: int = _UCRED.unpack(credentials)[0]
    return pid


def _receive(connection: socket.socket) -> protocol.Message | None:
    try:
        packet = connection.recv(protocol.MAX_PACKET + 1)
    except ConnectionResetError:
        return None
    return protocol.decode(packet) if packet else None
