"""PID views: the two-way map between host PIDs and one PID namespace.

A view holds its namespace open and asks the kernel anew each time. Nothing is remembered by number: a PID
is only good together with its namespace, and only now.
"""

from __future__ import annotations

import errno
import fcntl
import io
import os
from abc import ABC, abstractmethod
from collections.abc import Sequence
from functools import cache
from types import TracebackType
from typing import NamedTuple, Protocol

from mpu_notify.pidns import procfs
from mpu_notify.pidns.errors import NamespaceAccessDenied, ProcessGone

# include/uapi/linux/nsfs.h
_NS_GET_PARENT = 0xB702  # Linux 4.9; returns a new fd, close-on-exec
# Linux 6.11. The id is the argument, the answer is the return value.
_NS_GET_PID_FROM_PIDNS = 0x8004B706
_NS_GET_TGID_FROM_PIDNS = 0x8004B707
_NS_GET_TGID_IN_PIDNS = 0x8004B709

_PID_T_MAX = 0x7FFFFFFF

# What /proc answers for a task that is gone or hidden from us. Denied means: of a user namespace over
# which we have no power. A container that we may serve at all is ours, and so is all that runs in it;
# whatever is denied is therefore not in the view's namespace.
_NOT_OURS = (FileNotFoundError, ProcessLookupError, PermissionError)


class PidView(Protocol):
    """The two-way map between host PIDs and one PID namespace.

    Ids that no task can have (0, negative, above 0x7FFFFFFF) give None. OSError only for want of a
    resource (file descriptors, memory). Not for use by two threads at once with close().
    """

    def to_view(self, host_id: int) -> int | None:
        """Map a host process or thread id to its process id (TGID) in the namespace.

        None if the task is neither in the namespace nor in a descendant of it, or is gone.
        """

    def to_views(self, host_ids: Sequence[int]) -> list[int | None]:
        """Do to_view for each id, in order."""

    def to_host(self, pid: int) -> int | None:
        """Map a process id in the namespace to the host process id.

        None if no process has it; the id of a thread other than the leader is not a process id.
        """

    def to_hosts(self, pids: Sequence[int]) -> list[int | None]:
        """Do to_host for each id, in order. Where /proc must be searched, it is searched once."""

    def started_by(self, host_id: int, when_ns: int) -> bool:
        """Do procfs.started_by; to be asked after to_view of the same id."""

    def close(self) -> None:
        """Let go of the namespace. May be repeated."""

    def __enter__(self) -> PidView:
        """Return the view; leaving the context closes it."""

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None, /
    ) -> None:
        """Close the view."""


class _NamespaceView(ABC):
    """What both views share: the open namespace."""

    def __init__(self, nsfd: int) -> None:
        """Take over nsfd, an open /proc/TID/ns/pid."""
        self._nsfd = nsfd

    @abstractmethod
    def to_view(self, host_id: int) -> int | None:
        """See PidView."""

    @abstractmethod
    def to_hosts(self, pids: Sequence[int]) -> list[int | None]:
        """See PidView."""

    def to_views(self, host_ids: Sequence[int]) -> list[int | None]:
        """See PidView."""
        return [self.to_view(host_id) for host_id in host_ids]

    def to_host(self, pid: int) -> int | None:
        """See PidView."""
        return self.to_hosts([pid])[0]

    def started_by(self, host_id: int, when_ns: int) -> bool:
        """See PidView."""
        return procfs.started_by(host_id, when_ns)

    def close(self) -> None:
        """See PidView."""
        nsfd, self._nsfd = self._nsfd, -1
        if nsfd >= 0:
            os.close(nsfd)

    def __enter__(self) -> PidView:
        """See PidView."""
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None, /
    ) -> None:
        """See PidView."""
        self.close()


class NamespaceIoctlView(_NamespaceView):
    """A PID view by the ioctls of a PID namespace (Linux 6.11)."""

    def to_view(self, host_id: int) -> int | None:
        """See PidView."""
        return self._ask(_NS_GET_TGID_IN_PIDNS, host_id)

    def to_hosts(self, pids: Sequence[int]) -> list[int | None]:
        """See PidView."""
        return [self._leader(pid) for pid in pids]

    def _leader(self, pid: int) -> int | None:
        host_tgid = self._ask(_NS_GET_TGID_FROM_PIDNS, pid)
        if host_tgid is None or self._ask(_NS_GET_PID_FROM_PIDNS, pid) != host_tgid:
            return None
        return host_tgid

    def _ask(self, operation: int, number: int) -> int | None:
        # The kernel takes the argument as a pid_t: a wider number would be cut to another process's.
        if not 0 < number <= _PID_T_MAX:
            return None
        try:
            return fcntl.ioctl(self._nsfd, operation, number)
        except OSError as error:
            # Some kernels answer ENOTTY where they mean ESRCH; that the ioctls exist was probed.
            if error.errno in (errno.ESRCH, errno.ENOTTY):
                return None
            raise


class _Member(NamedTuple):
    """The process of a task that is in the view's namespace."""

    host: int  # process id on the host
    pid: int  # process id in the view's namespace


class NSpidView(_NamespaceView):
    """A PID view by /proc: NStgid for the numbers, the namespaces themselves for membership."""

    def __init__(self, nsfd: int) -> None:
        """Take over nsfd, an open /proc/TID/ns/pid."""
        super().__init__(nsfd)
        # No other namespace gets this identity while nsfd keeps ours alive.
        self._identity = _identity(nsfd)

    def to_view(self, host_id: int) -> int | None:
        """See PidView."""
        member = self._member(host_id)
        return member.pid if member else None

    def to_hosts(self, pids: Sequence[int]) -> list[int | None]:
        """See PidView."""
        missing = {pid for pid in pids if 0 < pid <= _PID_T_MAX}
        found: dict[int, int] = {}
        # /proc lists leaders only; should a number pass to a thread meanwhile, its process is as good a find.
        for name in os.listdir("/proc") if missing else ():  # noqa: PTH208 - names, and many of them
            if not name.isdecimal():
                continue
            member = self._member(int(name))
            if member and member.pid in missing:
                found[member.pid] = member.host
                missing.remove(member.pid)
                if not missing:
                    break
        return [found.get(pid) for pid in pids]

    def _member(self, host_id: int) -> _Member | None:
        if not 0 < host_id <= _PID_T_MAX:
            return None
        try:
            # Bound to the task, not to its number: once it is gone, every lookup below this fails.
            task = os.open(f"/proc/{host_id}", os.O_PATH | os.O_DIRECTORY | os.O_CLOEXEC)
        except _NOT_OURS:
            return None
        try:
            # Membership first: a foreign process can make its status long (Groups) and so slow to read.
            above = self._levels_above(task)
            if above is None:
                return None
            status = os.open("status", os.O_RDONLY | os.O_CLOEXEC, dir_fd=task)
            with io.FileIO(status) as file:
                tgids = procfs.parse_nstgid(file.read())
        except _NOT_OURS:
            return None
        finally:
            os.close(task)
        if len(tgids) <= above or 0 in (tgids[0], tgids[-1 - above]):  # reaped meanwhile
            return None
        return _Member(host=tgids[0], pid=tgids[-1 - above])

    def _levels_above(self, task: int) -> int | None:
        """Return how many levels the view's namespace is above the task's own; None if it is not above."""
        namespace = os.open("ns/pid", os.O_RDONLY | os.O_CLOEXEC, dir_fd=task)
        above = 0
        while True:
            try:
                if _identity(namespace) == self._identity:
                    return above
                parent = fcntl.ioctl(namespace, _NS_GET_PARENT)
            except PermissionError:  # no parent, or none within our own namespace
                return None
            finally:
                os.close(namespace)
            namespace = parent
            above += 1


def namespace_of(tid: int) -> int:
    """Open the PID namespace of host task tid (a thread id will do) and return the file descriptor.

    Raises ProcessGone, NamespaceAccessDenied, or OSError for want of a resource.
    """
    path = f"/proc/{tid}/ns/pid"
    try:
        return os.open(path, os.O_RDONLY | os.O_CLOEXEC)
    except (FileNotFoundError, ProcessLookupError) as error:
        problem = f"open {path}: there is no task {tid} (any more)"
        raise ProcessGone(problem) from error
    except PermissionError as error:
        problem = f"open {path}: {error.strerror}; this needs CAP_SYS_PTRACE in the user namespace of task {tid}"
        raise NamespaceAccessDenied(problem) from error


def open_view(tid: int) -> PidView:
    """Open the PID view of the namespace that host task tid is in (a thread id will do).

    Raises ProcessGone, NamespaceAccessDenied, or OSError for want of a resource.
    """
    kind = NamespaceIoctlView if namespace_ioctls_work() else NSpidView
    return kind(namespace_of(tid))


@cache
def namespace_ioctls_work() -> bool:
    """Tell whether this kernel has the ioctls of NamespaceIoctlView. Asked of the kernel once."""
    namespace = namespace_of(os.getpid())
    try:
        return fcntl.ioctl(namespace, _NS_GET_TGID_IN_PIDNS, os.getpid()) == os.getpid()
    except OSError:  # any: they are not there, or not for us
        return False
    finally:
        os.close(namespace)


def _identity(namespace: int) -> tuple[int, int]:
    stat = os.fstat(namespace)
    return stat.st_dev, stat.st_ino
