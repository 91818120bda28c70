"""Translation of a control's params, both ways, by the rules of the design: pure functions over a PID view.

A PID that is not visible in the caller's namespace is removed and the list closed up; where there is no list, the entry
is emptied. Asked about a number that is not in its namespace, the driver is asked about UNKNOWN_PID instead, and the
caller gets its own number back. Kernel addresses go to nobody.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import NamedTuple, Protocol

from mpu_notify.rm.controls import Control, Direction, PidTable

#: The largest pid_t, above the kernel's PID_MAX_LIMIT of 2**22: no process has it.
UNKNOWN_PID = 0x7FFFFFFF


class Pids(Protocol):
    """What translation needs of a PID view."""

    def to_views(self, host_ids: Sequence[int]) -> list[int | None]:
        """Host ids to process ids in the namespace; None where not visible there."""

    def to_hosts(self, pids: Sequence[int]) -> list[int | None]:
        """Process ids in the namespace to host process ids; None where there is no such process."""

    def started_by(self, host_id: int, when_ns: int) -> bool:
        """Did the task that has this host id now start no later than CLOCK_BOOTTIME when_ns?"""


class Translated(NamedTuple):
    """Translated params, and the process ids before and after (for the log)."""

    params: bytes
    before: Sequence[int]
    after: Sequence[int]


def translate_in(control: Control, params: bytes, view: Pids) -> Translated | None:
    """The params to ask the driver with, of a control that asks about PIDs.

    None where they make no sense: the driver itself shall say so.
    """
    pids = control.table.pids(params)
    if not pids:
        return None
    hosts = [_asked(pid, host) for pid, host in zip(pids, view.to_hosts(pids), strict=True)]
    asked = bytearray(params)
    for index, host in enumerate(hosts):
        control.table.put(asked, index, host)
    return Translated(bytes(asked), pids, hosts)


def _asked(pid: int, host: int | None) -> int:
    if pid == 0:
        return 0
    return UNKNOWN_PID if host is None else host


def translate_out(
    control: Control, asked: Translated | None, params: bytes, view: Pids, begun_ns: int
) -> Translated | None:
    """The params to give the caller, from what the driver answered to `asked`. None where that makes no sense.

    begun_ns is CLOCK_BOOTTIME just before the ioctl: a process that started later is not the one the driver meant.
    """
    if control.direction is Direction.ANSWERED:
        return _listed(control, params, view, begun_ns)
    if asked is None:
        return None
    return _given_back(control, asked, params, view, begun_ns)


def _listed(control: Control, params: bytes, view: Pids, begun_ns: int) -> Translated | None:
    tables = [(table, table.pids(params)) for table in control.tables]
    named = [(table, hosts) for table, hosts in tables if hosts is not None]
    if len(named) < len(tables):
        return None
    nobody = control.table.nobody
    before = list(dict.fromkeys(host for _, hosts in named for host in hosts if host not in nobody))
    visible = visible_pids(before, view, begun_ns)
    after = list(dict.fromkeys(visible.values()))
    answer = bytearray(params)
    for table, hosts in named:
        if table.unique:
            table.replace(answer, after)
        elif table.count is None:
            _put_in_place(table, answer, hosts, visible)
        else:
            table.close_up(answer, {index: visible[host] for index, host in enumerate(hosts) if host in visible})
        table.hide_kernel_addresses(answer)
    return Translated(bytes(answer), before, after)


def visible_pids(hosts: Sequence[int], view: Pids, begun_ns: int) -> dict[int, int]:
    """Of these host ids of processes or threads those of a process in the namespace, with its number there.

    begun_ns is CLOCK_BOOTTIME just before the driver named them: what started later is not what it meant.
    """
    pairs = zip(hosts, view.to_views(hosts), strict=True)
    return {host: pid for host, pid in pairs if pid is not None and view.started_by(host, begun_ns)}


def _put_in_place(table: PidTable, answer: bytearray, hosts: Sequence[int], visible: Mapping[int, int]) -> None:
    nobody = table.nobody
    for index, host in enumerate(hosts):
        if host in visible:
            table.put(answer, index, visible[host])
        elif host not in nobody:
            table.empty(answer, index)


def _given_back(control: Control, asked: Translated, params: bytes, view: Pids, begun_ns: int) -> Translated | None:
    hosts = control.table.pids(params)
    if hosts is None or len(hosts) != len(asked.before):
        return None
    answer = bytearray(params)
    now = view.to_hosts(asked.before)
    for index, (pid, host) in enumerate(zip(asked.before, asked.after, strict=True)):
        known = host not in (0, UNKNOWN_PID)
        if known and not (now[index] == host and view.started_by(host, begun_ns)):
            control.table.blank(answer, index)  # its number may have been another's when the driver was asked
        control.table.put(answer, index, pid)
    return Translated(bytes(answer), asked.after, asked.before)
