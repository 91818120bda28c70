"""A monitor and a supervisor for one listener, as processes of their own: what `run` starts."""

from __future__ import annotations

import logging
import os
import signal
import socket

from mpu_notify.notify import confinement, native
from mpu_notify.notify.monitor import Monitor, MonitorError
from mpu_notify.notify.process import fork
from mpu_notify.notify.protocol import Device, ProtocolError
from mpu_notify.notify.sandbox import SERVED
from mpu_notify.observe.log import event
from mpu_notify.supervisor.driver import Watch
from mpu_notify.supervisor.service import Supervisor, monitored

log = logging.getLogger(__name__)

_MESSAGE_BYTES = 4096


def start(watch: Watch, device: Device, name: str, silence_ms: int) -> tuple[int, socket.socket]:
    """Fork a supervisor, which starts its monitor; returns its pid and the socket that takes the listener.

    `watch` says what is to be translated.

    The listener is sent as the one fd of a packet; the answer is SERVED, or the reason why it is not served. The
    supervisor ends when the last user of the filter is gone. Raises MonitorError where the two did not come up.
    """
    confined = confinement.build_native(starts_monitors=True)  # here, because that starts helper processes
    ours, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)

    def child() -> int:
        ours.close()
        return _run(theirs, watch, device, name, silence_ms, confined)

    pid = fork(child)
    theirs.close()
    answer = ours.recv(_MESSAGE_BYTES)
    if answer != SERVED:
        ours.close()
        os.waitpid(pid, 0)
        raise MonitorError(answer.decode() or "the supervisor ended while starting")
    return pid, ours


def _run(
    handover: socket.socket, watch: Watch, device: Device, name: str, silence_ms: int, confined: bytes
) -> int:
    _detach_from_terminal()
    try:
        native.keep_needed_capabilities()
        native.confine(confined)
        monitor = Monitor.start(device, map(monitored, watch.treatment.rows), silence_ms)
    except (MonitorError, OSError) as error:
        handover.send(str(error).encode())
        return 1
    try:
        with monitor:
            handover.send(SERVED)
            supervisor = Supervisor(
                monitor, watch=watch, reconnect=lambda lost: _another(lost, watch, device, silence_ms)
            )
            if not _take_listener(handover, supervisor, name):
                return 1
            supervisor.serve_until_idle()
    except (MonitorError, ProtocolError, OSError) as error:
        event(log, logging.ERROR, "supervisor ends", container=name, reason=str(error))
        return 1
    if supervisor.monitor.process is not None:
        supervisor.monitor.close()
        supervisor.monitor.process.wait()
    return 0


def _another(lost: Monitor, watch: Watch, device: Device, silence_ms: int) -> Monitor:
    if lost.process is not None:
        lost.process.poll()  # reap it, if it ended
    return Monitor.start(device, map(monitored, watch.treatment.rows), silence_ms)


def _detach_from_terminal() -> None:
    """Neither the terminal's signals nor its hang-up are ours, and no pipe of the command is kept open."""
    os.setsid()
    # Whoever signals all processes of a job means the command; it ends with that.
    for number in (signal.SIGHUP, signal.SIGINT, signal.SIGQUIT, signal.SIGTERM, signal.SIGUSR1, signal.SIGUSR2):
        signal.signal(number, signal.SIG_IGN)
    signal.pthread_sigmask(signal.SIG_SETMASK, [])
    nothing = os.open(os.devnull, os.O_RDWR)
    os.dup2(nothing, 0)
    os.dup2(nothing, 1)
    os.close(nothing)


def _take_listener(handover: socket.socket, supervisor: Supervisor, name: str) -> bool:
    """Whether there is a listener now; where not, the front knows why and says so."""
    with handover:
        _, fds, _, _ = socket.recv_fds(handover, 1, 1)
        if not fds:
            return False  # it could not make its namespace
        try:
            supervisor.attach(name, fds[0])
        except MonitorError as error:
            handover.send(str(error).encode())
            return False
        finally:
            os.close(fds[0])
        handover.send(SERVED)
    return True
