"""Trees of real processes in nested and sibling PID namespaces, with their ids known independently.

Run as a program, this file grows the tree it is given and every process of it stays until its stdin ends: so
nothing outlives the test, however that ends. Who is who comes from the credentials of unix sockets: each
process writes to one socket for each namespace that it is in, and the kernel tells the reader, the first
process of that namespace, the writer's process id as seen there. Neither /proc nor an ioctl is asked.
"""

from __future__ import annotations

import contextlib
import ctypes
import json
import os
import select
import signal
import socket
import struct
import subprocess
import sys
import threading
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple, NoReturn

CLONE_NEWUSER = 0x10000000  # include/uapi/linux/sched.h
CLONE_NEWPID = 0x20000000
PR_SET_PDEATHSIG = 1  # include/uapi/linux/prctl.h
PR_SET_CHILD_SUBREAPER = 36
SYS_CLONE3 = 435  # the same on every architecture
_CREDENTIALS = struct.Struct("3i")  # struct ucred

# PyDLL keeps the GIL: a raw clone must not leave the child waiting for it.
_LIBC = ctypes.PyDLL(None, use_errno=True)


# By text, with the system's interpreter: another user may not be able to read where the tests lie.
_SOURCE = Path(__file__).read_text(encoding="utf-8") if "__file__" in globals() else ""
_PYTHON = Path(sys.executable).resolve()


class Node(NamedTuple):
    """One process of a tree, and what becomes of it."""

    kind: str = "process"  # or "namespace", "user": first process of a new PID (and user) namespace
    threads: int = 0  # besides the first
    reaps: bool = False  # at once; else its dead children stay zombies
    dies: bool = False  # in Tree.kill(); only leaves and first processes of namespaces
    children: tuple[Node, ...] = ()


class Plan(NamedTuple):
    """A node in its place. Namespaces are known by the number of their first process; the host's is 0."""

    number: int
    node: Node
    parent: int
    namespaces: tuple[int, ...]  # outermost (the host's) first


def plan(root: Node) -> list[Plan]:
    """Number the nodes, parents first."""
    plans: list[Plan] = []

    def add(node: Node, parent: int, outer: tuple[int, ...]) -> None:
        index = len(plans)
        inner = (*outer, index) if node.kind != "process" else outer
        plans.append(Plan(index, node, parent, inner))
        for child in node.children:
            add(child, index, inner)

    add(root, 0, (0,))
    return plans


class Tree:
    """A living tree; the root is a process in the host's namespace. A context manager."""

    def __init__(self, root: Node) -> None:
        """Grow the tree and learn its ids."""
        self.plans = plan(root)
        ours, theirs = _credential_pair()
        with ours, theirs:
            self._builder = subprocess.Popen(
                [_PYTHON, "-I", "-S", "-c", _SOURCE, json.dumps(root), str(theirs.fileno())],
                stdin=subprocess.PIPE,
                pass_fds=[theirs.fileno()],
            )
            theirs.close()
            # Process ids by (namespace, node); all are in namespace 0, the host's.
            self.pids: dict[tuple[int, int], int] = {}
            self.own_pid: dict[int, int] = {}  # what getpid() says in the node
            self.own_tids: dict[int, list[int]] = {}  # what gettid() says in its threads but the first
            try:
                self._learn(ours)
                self._pidfds = {p.number: os.pidfd_open(self.pids[0, p.number]) for p in self.plans}
            except BaseException:
                self._end()
                raise

    def _learn(self, sock: socket.socket) -> None:
        sock.settimeout(20)
        inits = sum(p.node.kind != "process" for p in self.plans)
        for _ in range(len(self.plans) + inits):
            message, sender = receive(sock)
            self.pids[0, message["node"]] = sender
            if "seen" in message:
                self.pids |= {(message["node"], node): pid for node, pid in message["seen"]}
            else:
                self.own_pid[message["node"]] = message["pid"]
                self.own_tids[message["node"]] = message["tids"]

    def kill(self) -> dict[int, str]:
        """Kill what dies; return each node's state, "alive", "zombie" or "gone", once it is reached."""
        states = {p.number: "alive" for p in self.plans}
        for index, node, parent, namespaces in self.plans:
            outer = namespaces[:-1] if node.kind != "process" else namespaces
            if any(states[namespace] != "alive" for namespace in outer):
                states[index] = "gone"  # the kernel empties a namespace before its first process is a zombie
            elif node.dies:
                states[index] = "gone" if self.plans[parent].node.reaps else "zombie"
        for p in self.plans:
            if p.node.dies:
                self._signal(p.number, signal.SIGKILL)
        deadline = time.monotonic() + 20
        while any(self._state(index) != state for index, state in states.items()):
            if time.monotonic() > deadline:
                problem = f"waited for {states}, have {[self._state(index) for index in states]}"
                raise TimeoutError(problem)
            time.sleep(0.001)
        return states

    def _signal(self, index: int, number: int) -> bool:
        try:
            signal.pidfd_send_signal(self._pidfds[index], number)
        except ProcessLookupError:
            return False
        return True

    def _state(self, index: int) -> str:
        if not self._signal(index, 0):
            return "gone"
        poll = select.poll()
        poll.register(self._pidfds[index], select.POLLIN)
        return "zombie" if poll.poll(0) else "alive"

    def _end(self) -> None:
        assert self._builder.stdin
        self._builder.stdin.close()
        try:
            assert self._builder.wait(20) == 0
        finally:
            self._builder.kill()

    def __enter__(self) -> Tree:
        return self

    def __exit__(self, *_: object) -> None:
        try:
            self._end()
            assert {self._state(p.number) for p in self.plans} == {"gone"}
        finally:
            for pidfd in self._pidfds.values():
                os.close(pidfd)


def receive(sock: socket.socket) -> tuple[dict[str, Any], int]:
    """Return one message and its sender's process id as seen from here."""
    data, ancillary, _, _ = sock.recvmsg(1 << 16, socket.CMSG_SPACE(_CREDENTIALS.size))
    if not data:
        problem = "the tree was not grown"
        raise ConnectionError(problem)
    ((_, _, credentials),) = ancillary
    message: dict[str, Any] = json.loads(data)
    return message, _CREDENTIALS.unpack(credentials)[0]


def _credential_pair() -> tuple[socket.socket, socket.socket]:
    reader, writer = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
    reader.setsockopt(socket.SOL_SOCKET, socket.SO_PASSCRED, 1)
    return reader, writer


def setns_pid(nsfd: int) -> None:
    """Have later children of this process start in that PID namespace."""
    _check(_LIBC.setns(ctypes.c_int(nsfd), ctypes.c_int(CLONE_NEWPID)))


def clone(flags: int = 0, pids: Sequence[int] = ()) -> int:
    """Fork, with flags; pids, innermost namespace first, are the ids that the child gets, or EEXIST."""
    wanted = (ctypes.c_int32 * len(pids))(*pids)
    # struct clone_args, include/uapi/linux/sched.h: flags, pidfd, child_tid, parent_tid, exit_signal,
    # stack, stack_size, tls, set_tid, set_tid_size
    fields = (flags, 0, 0, 0, signal.SIGCHLD, 0, 0, 0, ctypes.addressof(wanted) if pids else 0, len(pids))
    arguments = (ctypes.c_uint64 * len(fields))(*fields)
    pid = _LIBC.syscall(ctypes.c_long(SYS_CLONE3), arguments, ctypes.c_size_t(ctypes.sizeof(arguments)))
    _check(pid)
    return int(pid)


def sleeper(pids: Sequence[int]) -> int:
    """Start a process with these ids that sleeps until it is killed or its parent ends."""
    pid = clone(pids=pids)
    if pid == 0:
        _LIBC.prctl(ctypes.c_int(PR_SET_PDEATHSIG), ctypes.c_ulong(signal.SIGKILL))
        while True:
            _LIBC.pause()
    return pid


def end(pid: int) -> None:
    """Kill and reap a child of this process."""
    os.kill(pid, signal.SIGKILL)
    os.waitpid(pid, 0)


def _check(result: int) -> None:
    if result < 0:
        code = ctypes.get_errno()
        raise OSError(code, os.strerror(code))


def _be(plans: list[Plan], index: int, writers: list[socket.socket]) -> NoReturn:
    """Be node `index`: start the children, say who this is in each namespace, stay until stdin ends."""
    node = plans[index].node
    signal.signal(signal.SIGCHLD, signal.SIG_IGN if node.reaps else signal.SIG_DFL)
    reader = None
    if node.kind != "process":
        reader, writer = _credential_pair()
        reader.settimeout(10)
        writers = [*writers, writer]
    flags = {"process": 0, "namespace": CLONE_NEWPID, "user": CLONE_NEWPID | CLONE_NEWUSER}
    for child in plans[index + 1 :]:
        if child.parent == index:
            uid, gid = os.geteuid(), os.getegid()
            if clone(flags[child.node.kind]) == 0:
                if child.node.kind == "user":
                    _become_root(uid, gid)
                _be(plans, child.number, writers)
    tids = _start_threads(node.threads)
    # Not to oneself: the others may have filled that socket.
    for writer in writers[:-1] if reader else writers:
        writer.send(json.dumps({"node": index, "pid": os.getpid(), "tids": tids}).encode())
    if reader:
        others = sum(index in p.namespaces for p in plans) - 1
        seen = [(message["node"], pid) for message, pid in (receive(reader) for _ in range(others))]
        seen.append((index, os.getpid()))
        writers[0].send(json.dumps({"node": index, "seen": seen}).encode())
    os.read(0, 1)
    if index == 0:
        _reap_all()
    os._exit(0)


def _become_root(uid: int, gid: int) -> None:
    """In a new user namespace: be its root, else no further one can be made in it."""
    for name, text in (("setgroups", "deny"), ("uid_map", f"0 {uid} 1"), ("gid_map", f"0 {gid} 1")):
        with open(f"/proc/self/{name}", "w", encoding="ascii") as file:  # noqa: PTH123 - quicker to start
            file.write(text)


def _start_threads(count: int) -> list[int]:
    tids: list[int] = []
    started = threading.Barrier(count + 1)

    def body() -> None:
        tids.append(threading.get_native_id())
        started.wait()
        os.read(0, 1)

    for _ in range(count):
        threading.Thread(target=body, daemon=True).start()
    started.wait()
    return tids


def _reap_all() -> None:
    signal.signal(signal.SIGCHLD, signal.SIG_DFL)
    with contextlib.suppress(ChildProcessError):
        while True:
            os.waitpid(-1, 0)


def _node(kind: str, threads: int, reaps: bool, dies: bool, children: list[Any]) -> Node:  # noqa: FBT001 - a row
    return Node(kind, threads, reaps, dies, tuple(_node(*child) for child in children))


if __name__ == "__main__":
    _LIBC.prctl(ctypes.c_int(PR_SET_CHILD_SUBREAPER), ctypes.c_ulong(1))
    _be(plan(_node(*json.loads(sys.argv[1]))), 0, [socket.socket(fileno=int(sys.argv[2]))])
