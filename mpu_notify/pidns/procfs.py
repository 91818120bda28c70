"""What is read from /proc about one process: its ids per namespace, its start, our own namespace."""

from __future__ import annotations

import io
import os
from pathlib import Path

from mpu_notify.pidns.errors import NotInitialNamespace

# PROC_PID_INIT_INO, include/linux/proc_ns.h: the inode of the initial PID namespace on every kernel.
PROC_PID_INIT_INO = 0xEFFFFFFC

_SELF_NAMESPACE = Path("/proc/self/ns/pid")

# proc_pid_stat(5): starttime is field 22; field 3 is the first one behind the name.
_START_TIME_INDEX = 22 - 3

_STAT_BYTES = 4096  # the file is shorter: a name of 15 bytes and some 50 numbers


def parse_nstgid(status: bytes) -> tuple[int, ...]:
    """Return the NStgid line of a /proc/PID/status: the process id in each namespace, outermost first.

    The first is the one in the namespace of the /proc mount. A task that was reaped while the file was
    written has zeros. Raises ValueError if there is no such line (Linux before 4.1).
    """
    _, found, rest = status.partition(b"\nNStgid:")
    if not found:
        problem = "no NStgid line in /proc/PID/status"
        raise ValueError(problem)
    return tuple(int(number) for number in rest.partition(b"\n")[0].split())


def parse_start_ticks(stat: bytes) -> int:
    """Return starttime of a /proc/PID/stat: ticks of CLOCK_BOOTTIME (SC_CLK_TCK a second), rounded down.

    The name in the second field may hold spaces and parentheses, so the fields count from the last ")".
    """
    return int(stat.rpartition(b")")[2].split()[_START_TIME_INDEX])


def started_by(host_id: int, when_ns: int) -> bool:
    """Tell whether the task that has this host id now started no later than when_ns (CLOCK_BOOTTIME).

    The kernel tells the start in clock ticks (10 ms): a task started in the same tick counts as started.
    False if there is no such task. Ask this *after* translating the id: then a number that was reused
    after when_ns is found out whether that happened before or after the translation.
    """
    try:
        with io.FileIO(f"/proc/{host_id}/stat") as file:
            stat = file.read()
    except (FileNotFoundError, ProcessLookupError):
        return False
    return parse_start_ticks(stat) <= when_ns * os.sysconf("SC_CLK_TCK") // 1_000_000_000


def in_initial_namespace() -> bool:
    """Tell whether this process runs in the initial PID namespace. OSError if /proc does not show it."""
    return _SELF_NAMESPACE.stat().st_ino == PROC_PID_INIT_INO


def require_initial_namespace() -> None:
    """Raise NotInitialNamespace, saying what was seen and what to do, unless in the initial PID namespace."""
    todo = (
        "The driver's process ids are those of the host, so run this on the host, not in a container, "
        "or in a container that shares the host's PID namespace and /proc "
        "(docker/podman: --pid=host; Kubernetes: hostPID: true)."
    )
    try:
        if in_initial_namespace():
            return
        inode = _SELF_NAMESPACE.stat().st_ino
    except OSError as error:
        problem = f"cannot tell the PID namespace of this process: {_SELF_NAMESPACE}: {error.strerror}. {todo}"
        raise NotInitialNamespace(problem) from error
    problem = (
        f"not in the initial PID namespace: {_SELF_NAMESPACE} is pid:[{inode}], "
        f"the initial one is pid:[{PROC_PID_INIT_INO}]. {todo}"
    )
    raise NotInitialNamespace(problem)
