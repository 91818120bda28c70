"""A command in a PID and a mount namespace of its own, with its own /proc, under the filter, behind a small init.

The calling process is the front: it passes signals on and learns how the command ended. Its child is the init, PID 1 of
the namespace; when the init ends, the kernel ends what is left there, and when the front dies, it ends the init.
"""

from __future__ import annotations

import errno
import os
import select
import shlex
import shutil
import signal
import socket
from collections.abc import Sequence
from contextlib import suppress
from pathlib import Path
from typing import NamedTuple

from mpu_notify.errors import MpuNotifyError
from mpu_notify.notify import filter as seccomp_filter
from mpu_notify.notify import native
from mpu_notify.notify.process import fork

#: Not passed on: those that nobody can, those that the terminal's job control needs, and those of our own faults.
_OWN_SIGNALS = frozenset(
    {
        *(signal.SIGKILL, signal.SIGSTOP, signal.SIGTSTP, signal.SIGTTIN, signal.SIGTTOU, signal.SIGCONT),
        *(signal.SIGSEGV, signal.SIGBUS, signal.SIGFPE, signal.SIGILL, signal.SIGTRAP, signal.SIGSYS, signal.SIGPIPE),
    }
)
_SI_KERNEL = 0x80  # asm-generic/siginfo.h
_MESSAGE_BYTES = 4096

#: The answer to a listener that was handed over.
SERVED = b"served"

NAMESPACES_NEEDED = (
    "run needs root, or user namespaces for ordinary users (sysctl kernel.unprivileged_userns_clone=1, "
    "user.max_user_namespaces>0, and kernel.apparmor_restrict_unprivileged_userns=0 where these exist)"
)


class SandboxError(MpuNotifyError):
    """The namespace could not be made; the text names what was attempted and says what to do."""


class CommandError(MpuNotifyError):
    """The command could not be executed; `status` is what a shell would exit with (127 not found, 126 otherwise)."""

    def __init__(self, command: str, number: int) -> None:
        super().__init__(f"cannot run {shlex.quote(command)}: {os.strerror(number)}")
        self.status = 127 if number in (errno.ENOENT, errno.ENOTDIR) else 126


class Forwarding(NamedTuple):
    """The signals that the front and the init wait for, and what the command shall have."""

    signals: frozenset[int]
    original_mask: set[int | signal.Signals]
    children_were_ignored: bool

    @classmethod
    def begin(cls) -> Forwarding:
        """Block the signals that are passed on: from now on they wait for until_exit."""
        wanted = frozenset(signal.valid_signals() - _OWN_SIGNALS)
        # Where it is inherited as ignored, the kernel reaps children unseen.
        children = signal.signal(signal.SIGCHLD, signal.SIG_DFL)
        return cls(wanted, signal.pthread_sigmask(signal.SIG_BLOCK, wanted), children is signal.SIG_IGN)

    def until_exit(self, child: int, *, as_init: bool = False) -> int:
        """Pass signals on to a child until it ends; returns its wait status.

        The init passes on only what came from outside its namespace: a process in there that signals its whole group
        has reached the command already.
        """
        while True:
            pid, status = os.waitpid(-1 if as_init else child, os.WNOHANG)
            if pid == child:
                return status
            if pid:
                continue
            came = signal.sigwaitinfo(self.signals)
            from_inside = as_init and came.si_pid != 0
            if came.si_signo != signal.SIGCHLD and not from_inside and not _is_the_terminals(came):
                _send(child, came.si_signo)

    def restore(self) -> None:
        """Give the calling process, which is to become the command, what it would have had."""
        for ignored_by_python in (signal.SIGPIPE, signal.SIGXFSZ):
            signal.signal(ignored_by_python, signal.SIG_DFL)
        if signal.getsignal(signal.SIGINT) is signal.default_int_handler:
            signal.signal(signal.SIGINT, signal.SIG_DFL)
        if self.children_were_ignored:
            signal.signal(signal.SIGCHLD, signal.SIG_IGN)
        signal.pthread_sigmask(signal.SIG_SETMASK, self.original_mask)


def _is_the_terminals(came: signal.struct_siginfo) -> bool:
    """Sent by the terminal, to the command as well; but a hang-up it sends to the session's leader only."""
    return came.si_code == _SI_KERNEL and came.si_signo != signal.SIGHUP


def _send(pid: int, number: int) -> None:
    with suppress(ProcessLookupError):  # it ended meanwhile: waitpid tells
        os.kill(pid, number)


def run(command: Sequence[str], handover: socket.socket, forwarding: Forwarding) -> int:
    """Run a command in the sandbox and return its wait status (os.WIFEXITED, os.WIFSIGNALED).

    `handover` is a SOCK_SEQPACKET socket to whoever serves the filter: the listener goes out with one byte, and one
    packet comes back: SERVED, or the reason why not. Raises SandboxError and CommandError.
    """
    program = seccomp_filter.build_native()  # here, because loading libseccomp starts helper processes
    enter_namespaces()
    report_in, report_out = os.pipe()
    init = fork(lambda: _run_init(command, program, handover, forwarding, report_out))
    os.close(report_out)
    handover.close()
    init_status = forwarding.until_exit(init)
    with os.fdopen(report_in, "rb") as pipe:
        return _read_report(pipe.read(), command[0], init_status)


def enter_namespaces() -> None:
    """Have the next child be PID 1 of a PID namespace, over a user namespace where we are not privileged."""
    try:
        native.unshare(native.CLONE_NEWPID)
    except PermissionError:
        _enter_user_namespace()
    except OSError as error:
        raise SandboxError(f"cannot make a PID namespace: {error.strerror}; see user.max_pid_namespaces") from error


def _enter_user_namespace() -> None:
    uid, gid = os.getuid(), os.getgid()
    try:
        native.unshare(native.CLONE_NEWUSER | native.CLONE_NEWPID)
        Path("/proc/self/setgroups").write_text("deny", encoding="ascii")
        Path("/proc/self/uid_map").write_text(f"{uid} {uid} 1", encoding="ascii")
        Path("/proc/self/gid_map").write_text(f"{gid} {gid} 1", encoding="ascii")
    except OSError as error:
        raise SandboxError(f"cannot make a user namespace: {error.strerror}; {NAMESPACES_NEEDED}") from error


def _run_init(
    command: Sequence[str], program: bytes, handover: socket.socket, forwarding: Forwarding, report: int
) -> int:
    """PID 1 of the namespace. What it has to say is a line on the report pipe; its own exit status means nothing."""
    try:
        native.die_with_parent()
        if _is_broken(report):
            return 1  # the front died before we could ask to be told
        _mount_proc()
        _hand_over_listener(program, handover)
        child = fork(lambda: _exec(command, forwarding, report))
    except (OSError, SandboxError) as error:
        reason = f"{error}; {NAMESPACES_NEEDED}" if isinstance(error, PermissionError) else str(error)
        _say(report, f"failed {reason}")
        return 1
    _say(report, f"ended {forwarding.until_exit(child, as_init=True)}")
    return 0


def _mount_proc() -> None:
    native.unshare(native.CLONE_NEWNS)
    native.mount("none", "/", None, native.MS_REC | native.MS_PRIVATE)
    native.mount("proc", "/proc", "proc", native.MS_NOSUID | native.MS_NODEV | native.MS_NOEXEC)


def _hand_over_listener(program: bytes, handover: socket.socket) -> None:
    listener = seccomp_filter.install(program)
    with handover:
        socket.send_fds(handover, [b"L"], [listener])
        os.close(listener)
        refusal = handover.recv(_MESSAGE_BYTES)
    if refusal != SERVED:
        raise SandboxError(refusal.decode() or "nobody serves the filter: the supervisor ended while starting")


def _is_broken(pipe: int) -> bool:
    poll = select.poll()
    poll.register(pipe, 0)  # POLLERR is told unasked
    return bool(poll.poll(0))


def _exec(command: Sequence[str], forwarding: Forwarding, report: int) -> int:
    forwarding.restore()
    _say(report, f"exec {_become(command)}")
    return 1


def _become(command: Sequence[str]) -> int:
    """Execute a command in the place of this process; returns the errno where that fails."""
    if not command[0]:
        return errno.ENOENT  # as execvp(3) says; Python does not even try
    try:
        os.execvp(command[0], list(command))  # noqa: S606 - what we are for
    except OSError as error:
        if error.errno == errno.ENOEXEC:  # a script without a first line that says whose: as execvp(3) does
            with suppress(OSError):
                os.execv("/bin/sh", ["sh", _found(command[0]), *command[1:]])  # noqa: S606
        return error.errno or errno.EIO  # it always has one


def _found(program: str) -> str:
    return shutil.which(program) or program


def _say(report: int, line: str) -> None:
    os.write(report, line.encode() + b"\n")


def _read_report(report: bytes, command: str, init_status: int) -> int:
    lines = dict(line.split(" ", 1) for line in report.decode().splitlines())
    if "exec" in lines:
        raise CommandError(command, int(lines["exec"]))
    if "failed" in lines:
        raise SandboxError(lines["failed"])
    if "ended" in lines:
        return int(lines["ended"])
    return init_status  # the init itself was killed, and its namespace with it


def end_like(status: int) -> int:
    """End this process the way a wait status tells: dies of the same signal, or returns the exit status."""
    if os.WIFSIGNALED(status):
        number = os.WTERMSIG(status)
        _without_core_dump()
        if number not in (signal.SIGKILL, signal.SIGSTOP):
            signal.signal(number, signal.SIG_DFL)
            signal.pthread_sigmask(signal.SIG_UNBLOCK, [number])
        os.kill(os.getpid(), number)
    return os.waitstatus_to_exitcode(status)


def _without_core_dump() -> None:
    import resource  # noqa: PLC0415 - rarely needed

    resource.setrlimit(resource.RLIMIT_CORE, (0, resource.getrlimit(resource.RLIMIT_CORE)[1]))
