"""GPU_GET_PID_INFO summed up over the threads that a driver counts by."""

from __future__ import annotations

import struct
from collections.abc import Mapping, Sequence
from typing import TypeVar

import pytest
from hypothesis import given
from hypothesis import strategies as st

from mpu_notify.notify.protocol import MAX_PERFORMED
from mpu_notify.rm.controls import GPU_PID_INFO, GPU_PID_INFO_R440, GPU_PID_INFO_R460, GPU_PIDS, Control
from mpu_notify.supervisor import threads
from mpu_notify.supervisor.threads import Ask, Steps, Told
from mpu_notify.supervisor.translation import Translated, translate_in, translate_out

LAYOUTS = [GPU_PID_INFO, GPU_PID_INFO_R460, GPU_PID_INFO_R440]
NOW = 1_000_000
T = TypeVar("T")


class ThreadedDriver:
    """Counts by thread: host thread id to bytes; and is a PID view: thread id to process id in the namespace."""

    def __init__(self, memory: Mapping[int, int], processes: Mapping[int, int], leaders: Mapping[int, int]) -> None:
        self.memory = memory
        self.processes = dict(processes)
        self.leaders = leaders  # process id in the namespace to the process's on the host
        self.refuses: set[str] = set()
        self.performed: list[str] = []

    def to_views(self, host_ids: Sequence[int]) -> list[int | None]:
        return [self.processes.get(host) for host in host_ids]

    def to_hosts(self, pids: Sequence[int]) -> list[int | None]:
        return [self.leaders.get(pid) for pid in pids]

    def started_by(self, host_id: int, when_ns: int) -> bool:  # noqa: ARG002 - all have been there for long
        return when_ns == NOW

    def perform(self, control: Control, params: bytes) -> bytes:
        answer = bytearray(params)
        if control is GPU_PIDS:
            assert struct.unpack_from("<II", params) == (0, 0x2080)
            GPU_PIDS.table.replace(answer, list(self.memory))
            return bytes(answer)
        for index, tid in enumerate(control.table.pids(params) or ()):
            at = 8 + control.table.stride * index
            struct.pack_into("<IQQQ", answer, at + 8, *(0, 0, 0, 0))
            struct.pack_into("<IIQ", answer, at + 8, 0, 0, self.memory.get(tid, 0))
            if control.table.subscription is not None:
                instance = (7, 8) if tid in self.memory else (0xFFFFFFFF, 0xFFFFFFFF)
                struct.pack_into("<II", answer, at + control.table.subscription, *instance)
        return bytes(answer)

    def go_through(self, steps: Steps[T]) -> T:
        """Perform what the steps ask for; what they return."""
        told: Told | None = None
        while True:
            try:
                step = next(steps) if told is None else steps.send(told)
            except StopIteration as end:
                result: T = end.value
                return result
            assert isinstance(step, Ask)
            assert len(step.params) == step.control.size
            self.performed.append(step.control.name)
            refused = step.control.name in self.refuses
            told = Told(None if refused else self.perform(step.control, step.params), NOW)

    def answer(self, control: Control, pids: Sequence[int]) -> Translated | None:
        """The whole way of one question."""
        question = bytearray(control.size)
        control.table.replace(question, pids)
        asked = translate_in(control, bytes(question), self)
        assert asked is not None
        found = self.go_through(threads.find(asked, self))
        if found is None:
            return None
        answered = translate_out(control, asked, self.perform(control, asked.params), self, NOW)
        assert answered is not None
        return self.go_through(threads.add(control, asked, found, answered, self))


def memory_of(control: Control, params: bytes, count: int) -> list[int]:
    return [struct.unpack_from("<Q", params, 8 + control.table.stride * index + 16)[0] for index in range(count)]


@pytest.fixture
def driver() -> ThreadedDriver:
    """Process 1 (host 100) with threads 100, 101, 102; process 2 (host 200) with thread 205; 300 is foreign."""
    memory = {100: 5, 101: 7, 102: 11, 205: 13, 300: 17}
    return ThreadedDriver(memory, {100: 1, 101: 1, 102: 1, 200: 2, 205: 2}, {1: 100, 2: 200})


@pytest.mark.parametrize("control", LAYOUTS, ids=lambda control: str(control.size))
def test_a_process_has_what_its_threads_have(driver: ThreadedDriver, control: Control) -> None:
    answer = driver.answer(control, [2, 1, 9, 0, 1])
    assert answer is not None
    assert control.table.pids(answer.params) == [2, 1, 9, 0, 1]
    assert memory_of(control, answer.params, 5) == [13, 23, 0, 0, 23]


def test_a_mig_instance_that_only_a_thread_names_is_the_processs(driver: ThreadedDriver) -> None:
    answer = driver.answer(GPU_PID_INFO, [2, 1, 9])
    assert answer is not None
    found = [struct.unpack_from("<II", answer.params, 8 + 72 * index + 64) for index in range(3)]
    assert found == [(7, 8), (7, 8), (0xFFFFFFFF, 0xFFFFFFFF)]


def test_where_every_client_is_the_first_threads_nothing_more_is_asked(driver: ThreadedDriver) -> None:
    driver.memory = {100: 5, 300: 17}
    answer = driver.answer(GPU_PID_INFO, [1])
    assert answer is not None
    assert memory_of(GPU_PID_INFO, answer.params, 1) == [5]
    assert driver.performed == ["GPU_GET_PIDS"]


def test_a_thread_that_has_ended_counts_no_more(driver: ThreadedDriver) -> None:
    del driver.processes[101]
    answer = driver.answer(GPU_PID_INFO, [1])
    assert answer is not None
    assert memory_of(GPU_PID_INFO, answer.params, 1) == [16]


@pytest.mark.parametrize("refused", ["GPU_GET_PIDS", "GPU_GET_PID_INFO"])
def test_where_the_driver_refuses_nothing_is_given(driver: ThreadedDriver, refused: str) -> None:
    driver.refuses = {refused}
    assert driver.answer(GPU_PID_INFO, [1]) is None


def test_an_entry_that_the_driver_refused_stays_as_it_is(driver: ThreadedDriver) -> None:
    params = bytearray(GPU_PID_INFO.size)
    GPU_PID_INFO.table.replace(params, [1])
    other = driver.perform(GPU_PID_INFO, struct.pack("<III", 1, 0, 100).ljust(GPU_PID_INFO.size, b"\0"))
    struct.pack_into("<I", params, 8 + 8, 0x1F)
    before = bytes(params)
    GPU_PID_INFO.table.add(params, 0, other, 0)
    assert params == before


@given(st.dictionaries(st.integers(2, 9000), st.tuples(st.integers(0, 2**40), st.integers(1, 200)), max_size=950))
def test_any_crowd_is_summed_up_within_the_monitors_limit(crowd: dict[int, tuple[int, int]]) -> None:
    memory = {tid: size for tid, (size, _) in crowd.items()}
    processes = {tid: pid for tid, (_, pid) in crowd.items()}
    leaders = {pid: 10_000 + pid for pid in processes.values()}
    driver = ThreadedDriver(memory, {**processes, **{host: pid for pid, host in leaders.items()}}, leaders)
    pids = list(range(1, 201))
    answer = driver.answer(GPU_PID_INFO, pids)
    assert answer is not None
    expected = [sum(size for size, owner in crowd.values() if owner == pid) for pid in pids]
    assert memory_of(GPU_PID_INFO, answer.params, 200) == expected
    assert len(driver.performed) <= MAX_PERFORMED
