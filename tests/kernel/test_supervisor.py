"""The real supervisor and monitor, with processes that change between the driver's answer and its translation."""

from __future__ import annotations

import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

import pytest

from mpu_notify.notify.monitor import Monitor, identify
from mpu_notify.pidns import PidView, open_view
from mpu_notify.pidns.views import namespace_of
from mpu_notify.rm.eras import Era
from mpu_notify.supervisor.driver import Finding, How, Places, Watch, find, look, write
from mpu_notify.supervisor.service import MONITORED, Supervisor, monitored

from .conftest import StartStandIn
from .harness import Caller, caller_host_pid, eventually, kill_and_wait_for, under_filter
from .pidtree import end, setns_pid, sleeper

Meddle = Callable[[], None]


class Meddler:
    """A PID view during whose translation of a list something happens to a process in it."""

    def __init__(self, view: PidView, meddle: Meddle) -> None:
        self._view = view
        self._meddle = meddle

    def to_views(self, host_ids: Sequence[int]) -> list[int | None]:
        self._meddle()
        return self._view.to_views(host_ids)

    def __getattr__(self, name: str) -> object:
        return getattr(self._view, name)


@contextmanager
def gpu_user(node: Path, beside: int) -> Iterator[int]:
    """A GPU process in the PID namespace of another; its host PID."""
    workload = [sys.executable, "-m", "mpu_notify.standin.workload", "user", "1", "--device", str(node)]
    command = ["nsenter", "--target", str(beside), "--pid", "--mount", *workload]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as entered:
        try:
            assert entered.stdout is not None
            assert entered.stdout.readline() == "up\n"
            children = Path(f"/proc/{entered.pid}/task/{entered.pid}/children").read_text()
            yield int(children.split()[0])
        finally:
            entered.terminate()


def answers(node: Path, caller: Caller, meddle: Meddle, afterwards: Meddle = lambda: None) -> str:
    """What the caller is told, by the real supervisor, when this happens in the middle."""

    def view(tid: int) -> PidView:
        return Meddler(open_view(tid), meddle)  # type: ignore[return-value]

    with Monitor.start(identify(node), MONITORED) as monitor:
        supervisor = Supervisor(monitor, view)
        supervisor.attach("test", caller.listener)
        thread = threading.Thread(target=supervisor.serve_until_idle)
        thread.start()
        try:
            caller.go()
            assert caller.line() == "up"
            caller.poke()
            return caller.line()
        finally:
            afterwards()
            caller.end()
            thread.join()


class Scene:
    """A caller, which is PID 1 of its namespace, and a GPU process beside it."""

    def __init__(self, node: Path, caller: Caller, host_pid: int) -> None:
        self.node = node
        self.caller = caller
        self.host_pid = host_pid
        with open_view(host_pid) as view:
            pid = view.to_view(host_pid)
        assert pid is not None
        self.pid = pid


@pytest.fixture
def scene(standin: StartStandIn, caller_program: Path) -> Iterator[Scene]:
    node = standin("--era", "host").control_node
    with (
        under_filter(caller_program, node.parent, "on_demand") as caller,
        gpu_user(node, caller_host_pid(caller)) as host_pid,
    ):
        yield Scene(node, caller, host_pid)


def test_another_driver_is_seen_when_a_container_comes(
    standin: StartStandIn, caller_program: Path, tmp_path: Path
) -> None:
    """Nothing was known of the driver; then somebody asked it, and it needs no help with GPU_GET_PID_INFO."""
    node = standin("--era", "native").control_node
    places = Places(tmp_path / "version", tmp_path / "era.json")
    watch = Watch(node, "auto", find(node, places), places)
    supervised: list[int] = []

    def view(tid: int) -> PidView:
        supervised.append(tid)
        return open_view(tid)

    def asks_about_itself(caller: Caller) -> bool:
        """Whether that was supervised; right it is in any case."""
        before = len(supervised)
        caller.poke("i")
        assert caller.line() == "pid=1 result=0x0 private=0"
        return len(supervised) > before

    with Monitor.start(identify(node), map(monitored, watch.treatment.rows)) as monitor:
        supervisor = Supervisor(monitor, view, watch)
        with (
            under_filter(caller_program, node.parent, "on_demand") as early,
            under_filter(caller_program, node.parent, "on_demand") as late,
        ):
            supervisor.attach("early", early.listener)
            thread = threading.Thread(target=supervisor.serve_until_idle)
            thread.start()
            early.go()
            assert early.line() == "up"
            assert asks_about_itself(early)
            write(Finding(look(node, places), Era.NATIVE, How.ASKED), places.era_file)
            monitor.attach(late.listener, b"{}")
            late.go()
            assert late.line() == "up"
            eventually(lambda: not asks_about_itself(late), "the driver is left to itself")
            assert not asks_about_itself(early), "for the others, too"
            early.end()
            late.end()
            thread.join()


def test_both_processes_of_the_namespace_are_listed(scene: Scene) -> None:
    with_both = answers(scene.node, scene.caller, lambda: None)
    assert sorted(with_both.split()[1:], key=int) == ["1", str(scene.pid)]


def test_a_process_that_exits_before_its_translation_is_not_listed(scene: Scene) -> None:
    def exits() -> None:
        kill_and_wait_for(scene.host_pid)
        eventually(lambda: not Path(f"/proc/{scene.host_pid}").exists(), "the process is reaped")

    assert answers(scene.node, scene.caller, exits) == "pids= 1"


def test_a_process_that_got_the_number_after_the_driver_answered_is_not_listed(scene: Scene) -> None:
    successors: list[int] = []

    def is_replaced() -> None:
        namespace = namespace_of(caller_host_pid(scene.caller))
        kill_and_wait_for(scene.host_pid)
        eventually(lambda: not Path(f"/proc/{scene.host_pid}").exists(), "the process is reaped")
        time.sleep(0.03)  # the kernel tells a start to 10 ms
        setns_pid(namespace)  # of this thread, which starts nothing else
        successors.append(sleeper([scene.pid, scene.host_pid]))

    def reap() -> None:
        for pid in successors:
            end(pid)  # a namespace ends when all its processes are reaped

    assert answers(scene.node, scene.caller, is_replaced, reap) == "pids= 1"
    assert successors == [scene.host_pid], "the number really was another's"
