"""A monitor and a supervisor for one listener, as processes of their own: what `run` starts."""

from __future__ import annotations

import logging
import os
import signal
import socket
from typing import NamedTuple

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


class Service(NamedTuple):
    """What is to be translated, on which control node, how the log names it, and the monitor's patience."""

    watch: Watch
    device: Device
    name: str
    silence_ms: int

    def start_monitor(self) -> Monitor:
        """Raises MonitorError."""
        return Monitor.start(self.device, map(monitored, self.watch.treatment.rows), self.silence_ms)


def start(service: Service) -> tuple[int, socket.socket]:
    """Fork a supervisor, which starts its monitor; returns its pid and the socket that takes the listener.

    The listener is sent as the one fd of a packet; the answer is SERVED, or the reason why it is not served. The
    supervisor ends when the last user of the filter is gone. Raises MonitorError where the two did not come up.
    """
    confined = confinement.build_native(starts_monitors=True)  # here, because that starts helper processes
    ours, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)

    def child() -> int:
        ours.close()
        return _run(theirs, service, confined)

    pid = fork(child)
    theirs.close()
    answer = ours.recv(_MESSAGE_BYTES)
    if answer != SERVED:
        ours.close()
        os.waitpid(pid, 0)
        raise MonitorError(answer.decode() or "the supervisor ended while starting")
    return pid, ours


def _run(handover: socket.socket, service: Service, confined: bytes) -> int:
    _detach_from_terminal()
    try:
        native.keep_needed_capabilities()
        native.confine(confined)
        monitor = service.start_monitor()
    except (MonitorError, OSError) as error:
        handover.send(str(error).encode())
        return 1
    try:
        with monitor:
            handover.send(SERVED)
            supervisor = Supervisor(monitor, watch=service.watch, reconnect=lambda lost: _another(lost, service))
            try:
                if not _take_listener(handover, supervisor, service.name):
                    return 1
                supervisor.serve_until_idle()
            finally:
                supervisor.monitor.leave()
    except (MonitorError, ProtocolError, OSError) as error:
        event(log, logging.ERROR, "supervisor ends", container=service.name, reason=str(error))
        return 1
    if supervisor.monitor.process is not None:
        supervisor.monitor.close()
        supervisor.monitor.process.wait()
    return 0


def _another(lost: Monitor, service: Service) -> Monitor:
    if lost.process is not None:
        lost.process.poll()  # reap it, if it ended
    return service.start_monitor()


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
