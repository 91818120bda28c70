"""Asking the driver which era it is of.

A process in a fresh PID namespace, where its numbers are others than on the host, becomes a user of a GPU by a thread
other than its first one, and looks for itself in what the driver answers. It takes the power to make a PID namespace,
and no other GPU program notices.
"""

from __future__ import annotations

import contextlib
import errno
import json
import os
import select
import signal
import threading
from pathlib import Path
from typing import Any, NamedTuple

from mpu_notify.errors import MpuNotifyError
from mpu_notify.notify import native
from mpu_notify.notify.process import fork
from mpu_notify.pidns import PidNamespaceError, require_initial_namespace
from mpu_notify.rm import abi, controls
from mpu_notify.rm.abi import U64
from mpu_notify.rm.client import Gpu, RmClient, RmError
from mpu_notify.rm.eras import Era
from mpu_notify.supervisor.driver import Finding, Places, conclude, find, look

SECONDS = 20.0  # a GPU that nobody uses is initialised first

_MEMORY = 1 << 20  # bytes; to be found again
_SAMPLES_TYPE = 2  # of the utilisation samples, as nvidia-smi asks for them
_MESSAGE_BYTES = 1 << 20


class ProbeError(MpuNotifyError):
    """The driver could not be asked; the text says why."""


class Answers(NamedTuple):
    """What the driver said to a process of three numbers: on the host, in its namespace, and its thread's there.

    `listed` are the users of the GPU; the memory is that of the process when asked for by host number, and by thread.
    `sampled` are the processes of the utilisation samples, and whether each had a kernel address.
    """

    host_pid: int
    pid: int
    tid: int
    listed: list[int]
    memory_by_host: int
    memory_by_thread: int
    sampled: list[tuple[int, bool]]


def finding(node: Path, places: Places | None = None) -> Finding:
    """The era of the driver behind a control node, by asking it. Raises ProbeError."""
    identity = look(node, places or Places())
    return conclude(identity, *decide(ask(node)))


def finding_if_possible(node: Path, places: Places | None = None) -> Finding:
    """The same, by what else is known where it cannot be asked."""
    try:
        return finding(node, places)
    except ProbeError:
        return find(node, places)


def decide(answers: Answers) -> tuple[frozenset[Era], str]:
    """Which eras the answers leave possible, and what was seen."""
    if answers.host_pid in answers.listed:
        return frozenset({Era.HOST}), f"a process in a PID namespace is listed by its PID on the host {_of(answers)}"
    if answers.pid in answers.listed:
        return frozenset({Era.NATIVE}), f"a process in a PID namespace is listed by its PID there {_of(answers)}"
    if answers.tid not in answers.listed:
        return frozenset(Era), f"a process in a PID namespace is not listed at all {_of(answers)}"
    possible, seen = _decide_among_thread_eras(answers)
    return frozenset(possible), f"a process in a PID namespace is listed by a thread {_of(answers)}, {seen}"


def _decide_among_thread_eras(answers: Answers) -> tuple[set[Era], str]:
    if answers.memory_by_host > answers.memory_by_thread:
        return {Era.THREAD_LIST}, "and its memory found by its PID on the host"
    if answers.memory_by_thread == 0:
        return {Era.THREAD_LIST, Era.THREAD_BOTH, Era.THREAD_ALL}, "and its memory found by no number"
    if any(pid == answers.tid or has_address for pid, has_address in answers.sampled):
        return {Era.THREAD_ALL}, "and so is its memory and what the utilisation samples have"
    if any(pid == answers.host_pid for pid, _ in answers.sampled):
        return {Era.THREAD_BOTH}, "and so is its memory, but not what the utilisation samples have"
    return {Era.THREAD_BOTH, Era.THREAD_ALL}, "and so is its memory; there are no utilisation samples that tell more"


def _of(answers: Answers) -> str:
    return f"(host {answers.host_pid}, there {answers.pid}, thread {answers.tid}; listed: {answers.listed})"


def ask(node: Path, seconds: float = SECONDS) -> Answers:
    """Be that process for a moment. Raises ProbeError."""
    try:
        require_initial_namespace()
    except PidNamespaceError as error:
        raise ProbeError(str(error)) from error
    reader, writer = os.pipe()
    helper = fork(lambda: _enter(node, writer))
    os.close(writer)
    try:
        said = _read(reader, seconds)
    finally:
        os.close(reader)
        os.kill(helper, signal.SIGKILL)  # its child ends with it
        os.waitpid(helper, 0)
    if "error" in said:
        raise ProbeError(f"cannot ask the driver: {said['error']}")
    return Answers(**{**said, "sampled": [(pid, has_address) for pid, has_address in said["sampled"]]})


def _read(reader: int, seconds: float) -> dict[str, Any]:
    if not select.select([reader], [], [], seconds)[0]:
        raise ProbeError(f"cannot ask the driver: it did not answer within {seconds:g} s")
    text = os.read(reader, _MESSAGE_BYTES)
    if not text:
        raise ProbeError("cannot ask the driver: the process that did so ended")
    said: dict[str, Any] = json.loads(text)
    return said


def _enter(node: Path, writer: int) -> int:
    """Start the process in its namespace and stay until it has ended."""
    native.die_with_parent()
    try:
        _unshare()
    except OSError as error:
        return _tell(writer, {"error": f"a PID namespace is needed: {error.strerror}; run this as root"})
    hears, tells = os.pipe()

    def child() -> int:
        native.die_with_parent()
        os.close(tells)
        return _tell(writer, _be_user(node, int(os.read(hears, 32))))

    pid = fork(child)
    os.write(tells, str(pid).encode())
    os.waitpid(pid, 0)
    return 0


def _unshare() -> None:
    try:
        native.unshare(native.CLONE_NEWPID)
    except OSError as error:
        if error.errno != errno.EPERM:
            raise
        native.unshare(native.CLONE_NEWPID | native.CLONE_NEWUSER)


def _tell(writer: int, what: dict[str, object]) -> int:
    os.write(writer, json.dumps(what).encode())
    return 0


def _be_user(node: Path, host_pid: int) -> dict[str, object]:
    said: dict[str, object] = {}

    def body() -> None:
        try:
            said.update(_find_oneself(node, host_pid))
        except RmError as error:
            said["error"] = str(error)

    # Not the first thread: its id is that of its process, whichever of the two the driver counts by.
    thread = threading.Thread(target=body)
    thread.start()
    thread.join()
    return said


def _find_oneself(node: Path, host_pid: int) -> dict[str, object]:
    pid, tid = os.getpid(), threading.get_native_id()
    with RmClient(node) as client:
        gpu = client.gpus(at_most=1)[0]
        with contextlib.suppress(RmError):  # it may want more of an allocation than we say
            client.alloc(gpu.device, abi.MEMORY_LOCAL_USER, abi.MemoryParams(_MEMORY).pack())
        memory = gpu.memory([host_pid, tid])
        return Answers(
            *(host_pid, pid, tid),
            listed=gpu.pids(abi.SUBDEVICE),
            memory_by_host=memory[host_pid] or 0,
            memory_by_thread=memory[tid] or 0,
            sampled=_sampled(gpu),
        )._asdict()


def _sampled(gpu: Gpu) -> list[tuple[int, bool]]:
    for layout in (controls.UTIL_SAMPLES_570, controls.UTIL_SAMPLES_550, controls.UTIL_SAMPLES_525):
        table = layout.table
        params = bytearray(abi.pack_words([_SAMPLES_TYPE, table.stride * table.capacity]).ljust(layout.size, b"\0"))
        try:
            gpu.client.control(gpu.subdevice, layout.cmd, params)
        except RmError:  # another layout, or not on this GPU
            continue
        found: dict[tuple[int, bool], None] = {}
        for engine in layout.tables:
            for index, pid in enumerate(engine.pids(params) or ()):
                at = engine.entries + engine.stride * index + (engine.kernel_address or 0)
                has_address = engine.kernel_address is not None and U64.unpack_from(params, at) != (0,)
                if pid not in (0, engine.invalid):
                    found.setdefault((pid, has_address))
        return list(found)
    return []
