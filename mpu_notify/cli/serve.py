"""``mpu-notify serve``: the daemon that containers attach to."""

from __future__ import annotations

import argparse
import fcntl
import logging
import os
import resource
import signal
import socket
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import NoReturn

from mpu_notify.cli import options
from mpu_notify.notify import confinement, native
from mpu_notify.notify.monitor import (
    Monitor,
    MonitorError,
    OtherVersionError,
    identify,
    replace_daemon,
    start_daemon,
    start_daemon_on,
)
from mpu_notify.observe import log
from mpu_notify.pidns import require_initial_namespace
from mpu_notify.supervisor import configuration, probe
from mpu_notify.supervisor.driver import How, Watch, find
from mpu_notify.supervisor.service import Supervisor, monitored

logger = logging.getLogger(__name__)

DESCRIPTION = """\
Serve containers: the OCI seccomp agent that runtimes hand a container's filter
to. Starts the monitor, which owns the sockets and the filters, unless one is
running, and the supervisor, which is this process.

The monitor outlives this process: without it, calls go to the driver
untranslated, new containers still attach, and a new serve takes all of them
over. Told to end (SIGTERM, SIGINT), serve ends, and the monitor once it has no
container any more.
"""

EPILOG = """\
When it accepts, it prints READY with the socket and both processes, and tells
systemd so (sd_notify) where that is asked for.

exit status:
  0 if it was told to end; 1 if it could not start, or the monitor ended; 2 for
  wrong usage.

examples:
  mpu-notify serve
  mpu-notify serve --listen /run/user/1000/mpu-notify/agent.sock --log-level debug
"""


class _ToldToEndError(BaseException):
    """A signal asks us to end; nothing is to catch it on its way."""


def register(subparsers: options.Subparsers) -> None:
    """Add the verb to the command line."""
    parser = options.add_verb(subparsers, "serve", "serve containers", DESCRIPTION, EPILOG)
    parser.add_argument(
        "--config",
        metavar="FILE",
        type=Path,
        help=f"the configuration (default: {configuration.FILE}, which need not exist)",
    )
    parser.add_argument(
        "--listen", metavar="SOCKET", type=Path, help="the agent's socket (default: agent.socket of the configuration)"
    )
    parser.add_argument(
        "--no-monitor",
        action="store_true",
        help="never start a monitor: the service manager does. The supervisor then keeps fewer rights",
    )
    options.add_device(parser, "supervisor")
    options.add_translate(parser, "supervisor")
    options.add_answer_timeout(parser, "supervisor")
    options.add_log(parser, "log")
    parser.set_defaults(func=main)


def main(args: argparse.Namespace) -> int:
    """Run the verb; returns the exit status."""
    wanted = _settings(args)
    log.configure(wanted.log.level, wanted.log.format, Path(wanted.log.file) if wanted.log.file else None)  # type: ignore[arg-type]
    require_initial_namespace()
    for number in (signal.SIGTERM, signal.SIGINT):
        signal.signal(number, _end)
    _take_files()
    supervisor: Supervisor | None = None
    try:
        watch = _watch(wanted)
        monitors = _Monitors(wanted, watch, may_start=not args.no_monitor)
        monitor = monitors.first()
        supervisor = Supervisor(monitor, watch=watch, reconnect=monitors.another)
        native.keep_needed_capabilities(starts_monitors=not args.no_monitor)
        native.confine(confinement.build_native(starts_monitors=not args.no_monitor))
        print(f"READY socket={wanted.socket} monitor={monitor.pid} supervisor={os.getpid()}", flush=True)
        _notify_systemd("READY=1")
        supervisor.serve()
    except _ToldToEndError:
        if supervisor is not None:
            supervisor.monitor.leave()
            supervisor.monitor.close()
    return 0


def _take_files() -> None:
    """As many as we may have: a container takes four, and each exec in one."""
    _, most = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (most, most))


def _settings(args: argparse.Namespace) -> configuration.Configuration:
    """The configuration, with what the command line says put over it."""
    file = configuration.load(args.config)
    said = {
        "socket": args.listen and str(args.listen.absolute()),
        "device": args.device and str(args.device),
        "translate": args.translate,
        "answer_timeout": args.answer_timeout_ms and args.answer_timeout_ms / 1000,
    }
    said_of_log = {"level": args.log_level, "format": args.log_format, "file": args.log_file and str(args.log_file)}
    log_settings = replace(file.log, **{key: value for key, value in said_of_log.items() if value is not None})
    return replace(file, log=log_settings, **{key: value for key, value in said.items() if value is not None})


def _watch(wanted: configuration.Configuration) -> Watch:
    """What is to be translated. A driver that nobody has asked yet is asked, as root, while we have the power to."""
    node = Path(wanted.device)
    found = find(node)
    if found.how is not How.ASKED and os.geteuid() == 0:
        found = probe.finding_if_possible(node)
    era = found.era.value if found.era else "unknown"
    log.event(logger, logging.INFO, "driver", device=str(node), era=era, how=found.how.value)
    return Watch(node, wanted.translate, found)


class _Monitors:
    """Comes by the monitor: the one that runs, else one that is started, of our version."""

    def __init__(self, wanted: configuration.Configuration, watch: Watch, *, may_start: bool) -> None:
        self._agent = Path(wanted.socket)
        self._control = self._agent.with_suffix(".control")
        self._device = identify(Path(wanted.device))
        self._watch = watch
        self._may_start = may_start
        self._silence_ms = max(1, round(wanted.answer_timeout * 1000))

    def first(self) -> Monitor:
        """Raises MonitorError."""
        try:
            self._agent.parent.mkdir(mode=0o755, parents=True, exist_ok=True)
        except OSError as error:
            raise MonitorError(f"cannot make {self._agent.parent} for the socket: {error.strerror}") from error
        if not self._may_start:
            return self._found(self._connect())
        with self._alone():
            monitor = self._connect()
            if monitor is None:
                start_daemon(self._agent, self._control)
                monitor = self._connect()
        return self._found(monitor)

    @contextmanager
    def _alone(self) -> Iterator[None]:
        """One at a time: of two that both found no monitor, each would start one, and take the other's sockets away."""
        place = self._agent.with_suffix(".lock")
        try:
            lock = os.open(place, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC | os.O_NOFOLLOW, 0o600)
        except OSError as error:
            raise MonitorError(f"cannot open {place}, for one serve to start at a time: {error.strerror}") from error
        try:
            fcntl.flock(lock, fcntl.LOCK_EX)
            yield
        finally:
            os.close(lock)

    def another(self, lost: Monitor) -> Monitor:
        """After one was lost. Its sockets live on in ours, so those who connect meanwhile wait. Raises MonitorError."""
        if self._may_start and lost.sockets is not None and lost.may_be_replaced() and not lost.is_in_use():
            start_daemon_on(lost.sockets)
        return self._found(self._connect(lost))

    def _connect(self, lost: Monitor | None = None) -> Monitor | None:
        try:
            return self._connect_once(lost)
        except OtherVersionError as error:
            if error.is_kept or not self._may_start:
                raise
        replace_daemon(self._control)
        return self._connect_once(lost)

    def _connect_once(self, lost: Monitor | None) -> Monitor | None:
        device = self._watch.finding.identity.node or self._device
        controls = map(monitored, self._watch.treatment.rows)
        return Monitor.connect(self._control, device, controls, self._silence_ms, lost)

    def _found(self, monitor: Monitor | None) -> Monitor:
        if monitor is None:
            why = "" if self._may_start else ", and --no-monitor says not to start one"
            raise MonitorError(f"no monitor listens on {self._control}{why}")
        return monitor


def _end(_number: int, _frame: object) -> NoReturn:
    raise _ToldToEndError


def _notify_systemd(state: str) -> None:
    """sd_notify(3), without its library."""
    address = os.environ.get("NOTIFY_SOCKET")
    if not address:
        return
    with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as notify:
        notify.connect("\0" + address[1:] if address.startswith("@") else address)
        notify.send(state.encode())
