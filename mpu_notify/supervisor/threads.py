"""GPU_GET_PID_INFO where the driver counts by the thread that made an RM client, not by process.

What a process uses is then the sum over those of its threads that the driver knows. Which these are, it tells for the
same object; both take more controls in the same call. Works on every driver: one that counts processes names no thread.
"""

from __future__ import annotations

from collections.abc import Generator, Mapping, Sequence
from typing import NamedTuple, TypeVar

from mpu_notify.rm.abi import PIDS_ID_TYPE_CLASS, SUBDEVICE, pack_words
from mpu_notify.rm.controls import GPU_PIDS, Control
from mpu_notify.supervisor.translation import UNKNOWN_PID, Pids, Translated, visible_pids


class Ask(NamedTuple):
    """One more control to perform on the object of the call."""

    control: Control
    params: bytes


class Told(NamedTuple):
    """What the driver answered to it, None where it refused; begun_ns is CLOCK_BOOTTIME just before."""

    params: bytes | None
    begun_ns: int


_Result = TypeVar("_Result")

#: Yields what to perform, is sent what came of it, returns the result.
Steps = Generator[Ask, Told, _Result]


class Threads(NamedTuple):
    """Host thread ids that the driver counts by, besides the processes' own, by process id in the namespace."""

    of: Mapping[int, Sequence[int]]
    begun_ns: int


def find(asked: Translated, view: Pids) -> Steps[Threads | None]:
    """The threads of the processes that are asked about. None where the driver does not tell."""
    question = pack_words([PIDS_ID_TYPE_CLASS, SUBDEVICE]).ljust(GPU_PIDS.size, b"\0")
    told = yield Ask(GPU_PIDS, question)
    named = None if told.params is None else GPU_PIDS.table.pids(told.params)
    if named is None:
        return None
    processes = {pid: host for pid, host in zip(asked.before, asked.after, strict=True) if host not in (0, UNKNOWN_PID)}
    of: dict[int, list[int]] = {}
    for thread, pid in visible_pids(list(dict.fromkeys(named)), view, told.begun_ns).items():
        if processes.get(pid, thread) != thread:
            of.setdefault(pid, []).append(thread)
    return Threads(of, told.begun_ns)


def add(
    control: Control, asked: Translated, threads: Threads, answered: Translated, view: Pids
) -> Steps[Translated | None]:
    """The answer with what the threads use added to their processes. None where the driver does not tell."""
    answer = bytearray(answered.params)
    pending = [(pid, thread) for pid, several in threads.of.items() for thread in several]
    for start in range(0, len(pending), control.table.capacity):
        batch = pending[start : start + control.table.capacity]
        question = bytearray(control.size)
        control.table.replace(question, [thread for _, thread in batch])
        told = yield Ask(control, bytes(question))
        if told.params is None:
            return None
        # A thread that ended meanwhile may have left its number to another.
        still = visible_pids([thread for _, thread in batch], view, threads.begun_ns)
        for number, (pid, thread) in enumerate(batch):
            if still.get(thread) != pid:
                continue
            for index, of in enumerate(asked.before):
                if of == pid:
                    control.table.add(answer, index, told.params, number)
    return answered._replace(params=bytes(answer))
