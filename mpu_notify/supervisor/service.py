"""The supervisor: answers the monitor's requests, one at a time, and tells the log what became of each call."""

from __future__ import annotations

import logging
import os
import selectors
import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import TypeVar

from mpu_notify.notify import protocol
from mpu_notify.notify.monitor import Arrival, Channel, Files, ListenerError, Monitor, MonitorError, ReplacedError
from mpu_notify.notify.protocol import Begun, Cause, Ended, Outcome, Performed, Request, Step
from mpu_notify.observe.log import OncePer, event
from mpu_notify.pidns import PidNamespaceError, PidView, open_view
from mpu_notify.rm.controls import CONTROL_TABLE, CONTROLS, Control, Direction
from mpu_notify.supervisor import threads
from mpu_notify.supervisor.containers import Description, StateError
from mpu_notify.supervisor.driver import Watch
from mpu_notify.supervisor.threads import Ask, Steps, Threads, Told
from mpu_notify.supervisor.translation import Translated, translate_in, translate_out

T = TypeVar("T")

log = logging.getLogger(__name__)

OpenView = Callable[[int], PidView]

#: Comes by a monitor after this one was lost. Raises MonitorError where it must be tried again.
Reconnect = Callable[[Monitor], Monitor]


def monitored(control: Control) -> protocol.Control:
    """A row of the control table as the monitor has it."""
    table, pointer = control.table, control.pointer
    asks = control.direction is Direction.ASKED
    counted = (0, 0, 0) if table.count is None else (table.count, table.entries, table.stride * table.capacity)
    pointed = (pointer.at, pointer.stride, pointer.capacity) if pointer else (0, 0, 0)
    return protocol.Control(control.cmd, control.size, asks, *counted, *pointed)


#: The whole control table as the monitor has it.
MONITORED = tuple(monitored(control) for control in CONTROLS)

#: A row by what a request names: the params' size with what is behind their pointer.
_ROWS = {(control.cmd, control.whole_size): control for control in CONTROLS}

# Between two attempts to come by a monitor: the first at once, then twice as long each time, up to the last.
_RETRY_SECONDS = 0.05, 2.0

# Between two looks at whether the monitor was killed, where nothing else happens: its connection need not end then.
_LOOK_SECONDS = 1.0

# Messages come close together, and waking up takes longer than most of them: look again for a while before sleeping.
_SPIN_SECONDS = 2e-3

#: Why a call was answered with continue, for the person who reads the log. A caller that died is no cause for it.
EXPLANATIONS = {
    Cause.MEMORY_UNREADABLE: "the caller's memory could not be read",
    Cause.MEMORY_UNWRITABLE: "the caller's memory could not be written",
    Cause.SIZE_UNKNOWN: "this params size of the control is not known to this version of mpu-notify",
    Cause.FLAGS_SET: "the call has flags, which no known client sets on this control",
    Cause.FILE_UNAVAILABLE: "the caller's file could not be fetched",
    Cause.FILE_FOREIGN: "the caller's file is not the control node (see --device)",
    Cause.IOCTL_FAILED: "the ioctl failed",
    Cause.STATUS_BAD: "the driver refused the control",
    Cause.SUPERVISOR_GONE: "there was no supervisor",
    Cause.SUPERVISOR_SILENT: "the supervisor did not answer in time",
    Cause.SUPERVISOR_DECLINED: "the params could not be translated",
    Cause.REPLY_FAILED: "the kernel did not take the reply",
    Cause.TABLE_UNUSUAL: "the call has not as much room for its answer as known clients have",
}


class _MonitorLostError(Exception):
    """The monitor has ended, or hung up."""


@dataclass
class Container:
    """What a listener belongs to: how the log names it, its files, and its call under way.

    It has no channel while no monitor serves it.
    """

    name: str
    channel: Channel | None
    files: Files
    view: PidView | None = None
    asked: Translated | None = None
    threads: Threads | None = None
    answered: Translated | None = None
    steps: Steps[bytes | None] | None = None

    def forget_call(self) -> None:
        """Close what the call under way holds."""
        if self.view is not None:
            self.view.close()
        self.view = self.asked = self.threads = self.answered = self.steps = None


class Supervisor:
    """Serves the listeners of a monitor, and has another monitor serve them where that one is lost.

    Without `reconnect` the loss is the end: MonitorError. `watch` says what is to be translated on the loaded driver;
    without it, everything.
    """

    def __init__(
        self,
        monitor: Monitor,
        open_pid_view: OpenView = open_view,
        watch: Watch | None = None,
        reconnect: Reconnect | None = None,
    ) -> None:
        self.monitor = monitor
        self._open_view = open_pid_view
        self._watch = watch
        self._reconnect = reconnect
        self._containers: dict[int, Container] = {}  # by the listener's identity
        self._causes = OncePer()  # a container has a listener for each exec, too
        self._awake_until = 0.0
        self._ready = selectors.DefaultSelector()
        self._ready.register(monitor, selectors.EVENT_READ)

    def attach(self, name: str, listener_fd: int) -> None:
        """Have the monitor serve a listener under this name; returns when it does. Raises MonitorError."""
        self.monitor.attach(listener_fd, Description(name, "run").state())
        self._arrive()

    def serve_until_idle(self) -> None:
        """Answer until the last container has ended. Raises MonitorError where there is no monitor any more."""
        while self._containers:
            self._serve_some()

    def serve(self) -> None:
        """Answer for good. Raises MonitorError where there is no monitor any more."""
        while True:
            self._serve_some()

    def _serve_some(self) -> None:
        is_awake = time.monotonic() < self._awake_until
        ready = self._ready.select(0 if is_awake else _LOOK_SECONDS if self._containers else None)
        if not ready and is_awake:
            os.sched_yield()
            return
        if not ready:
            if self.monitor.is_dead():
                self._replace_monitor()
            return
        try:
            for key, _ in ready:
                if isinstance(key.fileobj, Channel):
                    self._serve_one(key.fileobj, key.data)
                else:
                    self._arrive()
        except _MonitorLostError:
            self._replace_monitor()
        except ListenerError as error:
            event(log, logging.ERROR, "a container stays untranslated", reason=str(error))
        self._awake_until = time.monotonic() + _SPIN_SECONDS

    def _arrive(self) -> None:
        """Take the next listener from the monitor."""
        arrival = self.monitor.receive()
        if arrival is None:
            raise _MonitorLostError
        known = self._containers.get(arrival.identity)
        if known is None:
            self._look_at_driver()
            self._containers[arrival.identity] = self._described(arrival)
        else:
            self._hang_up(known)
            known.files.close()
            known.channel, known.files = arrival.channel, arrival.files
        self._ready.register(arrival.channel, selectors.EVENT_READ, arrival.identity)

    def _described(self, arrival: Arrival) -> Container:
        number = arrival.channel.listener
        try:
            whose = Description.of(arrival.state)
        except StateError as error:
            whose = Description(f"listener {number}", "unknown")
            event(log, logging.WARNING, "bad message with a listener", container=whose.container, reason=str(error))
        event(log, logging.INFO, "attached", container=whose.container, route=whose.route, pid=whose.pid)
        return Container(whose.container, arrival.channel, arrival.files)

    def _replace_monitor(self) -> None:
        """Come by another monitor and have it serve every listener; until then its callers wait."""
        self.monitor.hear_out()
        if self._reconnect is None:
            raise MonitorError(f"the monitor ended; {len(self._containers)} containers lose it")
        event(log, logging.WARNING, "the monitor is lost, its containers get another", containers=len(self._containers))
        self._ready.unregister(self.monitor)
        for container in self._containers.values():
            self._hang_up(container)
        pause, longest = _RETRY_SECONDS
        while not self._move_to_another(self._reconnect):
            time.sleep(pause)
            pause = min(2 * pause, longest)
        self._ready.register(self.monitor, selectors.EVENT_READ)

    def _hang_up(self, container: Container) -> None:
        container.forget_call()
        if container.channel is not None:
            self._ready.unregister(container.channel)
            container.channel.close()
            container.channel = None

    def _move_to_another(self, reconnect: Reconnect) -> bool:
        """Whether there is another monitor now that has been given every listener."""
        try:
            another = reconnect(self.monitor)
            self.monitor.close()
            self.monitor = another
            for container in self._containers.values():
                another.adopt(container.files)
        except ReplacedError:
            raise
        except MonitorError as error:
            event(log, logging.ERROR, "no other monitor yet", reason=str(error))
            return False
        return True

    def _look_at_driver(self) -> None:
        """A driver that was loaded since the last container came may want another control table."""
        if self._watch is not None and self._watch.changed():
            found = self._watch.finding
            if found.identity.node is not None:
                self.monitor.reconfigure(found.identity.node, map(monitored, self._watch.treatment.rows))
            era = found.era.value if found.era else "unknown"
            event(log, logging.INFO, "another driver", era=era, how=found.how.value)

    def _serve_one(self, channel: Channel, identity: int) -> None:
        """One message of one listener: so that none keeps the others waiting."""
        container = self._containers[identity]
        message = channel.receive()
        if isinstance(message, Request):
            container.steps = self._translate(container, message)
            self._go_on(container, channel, message, None)
        elif isinstance(message, Performed):
            told = Told(None if message.status else message.params, message.begun_ns)
            self._go_on(container, channel, message, told)
        elif isinstance(message, Begun):
            container.forget_call()
            container.view = self._guarded(container, lambda: self._open_view(message.tid))
        elif isinstance(message, Outcome):
            self._outcome(container, message)
        elif isinstance(message, Ended):
            self._ended(identity, message)
        else:
            raise _MonitorLostError

    def _guarded(self, container: Container, attempt: Callable[[], T]) -> T | None:
        """What was attempted; None, which has the call answered with continue, where the system did not let us."""
        try:
            return attempt()
        except PidNamespaceError as error:
            # Mostly the caller was killed: the monitor will notice the same.
            event(log, logging.DEBUG, "no PID view", container=container.name, reason=str(error))
        except OSError as error:
            if self._causes.first((container.name, "cannot translate", error.errno)):
                event(log, logging.ERROR, "cannot translate", container=container.name, reason=str(error))
        return None

    def _go_on(self, container: Container, channel: Channel, message: Request | Performed, told: Told | None) -> None:
        """Do the next step of a call's translation, up to its answer or what must be performed before."""
        step = self._guarded(container, lambda: _next(container.steps, told))
        if isinstance(step, Ask):
            channel.perform(message, step.control.cmd, step.params)
        else:
            container.steps = None
            channel.answer(message, step)

    def _translate(self, container: Container, request: Request) -> Steps[bytes | None]:
        control = _ROWS[request.cmd, len(request.params)]
        view = container.view
        if view is None:
            return None
        if request.step is Step.IN:
            asked = container.asked = translate_in(control, request.params, view)
            if asked and control.table.counters and self._by_thread:
                container.threads = yield from threads.find(asked, view)
                if container.threads is None:
                    return None
            return asked.params if asked else None
        answered = translate_out(control, container.asked, request.params, view, request.begun_ns)
        if answered and container.asked and container.threads:
            answered = yield from threads.add(control, container.asked, container.threads, answered, view)
        container.answered = answered
        return answered.params if answered else None

    @property
    def _by_thread(self) -> bool:
        return self._watch is None or self._watch.treatment.by_thread

    def _outcome(self, container: Container, outcome: Outcome) -> None:
        shown = {
            "container": container.name,
            "tid": outcome.tid,
            "control": _control_name(outcome),
            "outcome": outcome.cause.name.lower(),
            "us": outcome.duration_ns // 1000,
        }
        if container.answered is not None:
            shown["before"] = list(container.answered.before)
            shown["after"] = list(container.answered.after)
        if outcome.error:
            shown["error"] = outcome.error
        container.forget_call()
        event(log, logging.DEBUG, "call", **shown)
        about = outcome.cmd if outcome.cause is Cause.SIZE_UNKNOWN else None
        if outcome.cause in EXPLANATIONS and self._causes.first((container.name, outcome.cause, about)):
            reason = EXPLANATIONS[outcome.cause]
            event(log, logging.WARNING, "not translated, the driver's own answer stands", reason=reason, **shown)

    def _ended(self, identity: int, ended: Ended) -> None:
        container = self._containers.pop(identity)
        self._hang_up(container)
        container.files.close()
        counts = {cause.name.lower(): count for cause, count in ended.causes.items() if count}
        shown = {"calls": ended.received, "untranslated": ended.untranslated, **counts}
        event(log, logging.INFO, "ended", container=container.name, **shown)


def _next(steps: Steps[bytes | None] | None, told: Told | None) -> Ask | bytes | None:
    """What a translation wants performed next, or its result; None where nothing is being translated."""
    if steps is None:
        return None
    try:
        return next(steps) if told is None else steps.send(told)
    except StopIteration as end:
        result: bytes | None = end.value
        return result


def _control_name(outcome: Outcome) -> str:
    known = CONTROL_TABLE.get((outcome.cmd, outcome.size))
    if known:
        return known.name
    name = next((control.name for control in CONTROLS if control.cmd == outcome.cmd), f"{outcome.cmd:#010x}")
    return f"{name}/{outcome.size}"
