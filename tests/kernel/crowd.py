"""GPU processes in namespaces of every kind, which do and ask what a test says.

Run as a program, this file grows the processes that it is given as JSON, and each connects to a socket and obeys. Who
is who on the host comes from that socket's credentials, and who is who elsewhere from the kernel's NStgid and NSpid.
"""

from __future__ import annotations

import ctypes
import json
import os
import select
import signal
import socket
import struct
import subprocess
import sys
import tempfile
import threading
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any, NamedTuple, NoReturn

from mpu_notify.notify import filter as seccomp
from mpu_notify.notify import native
from mpu_notify.rm import abi
from mpu_notify.rm.client import RmClient, RmError

_MESSAGE_BYTES = 1 << 18
_SECONDS = 20


class Node(NamedTuple):
    """A process; "namespace" and "user" are the first process of a new PID (and user) namespace."""

    name: str
    kind: str = "process"
    children: tuple[Node, ...] = ()


# -------------------------------------------------------------------------------- the test's side


class Member:
    """One of the processes, as the test knows it; ids by namespace, which are called after their first process."""

    def __init__(self, name: str, namespaces: Sequence[str], connection: socket.socket) -> None:
        self.name = name
        self.namespaces = tuple(namespaces)  # outermost ("host") first
        self._connection = connection
        credentials = connection.getsockopt(socket.SOL_SOCKET, socket.SO_PEERCRED, 12)
        self.host_pid: int = struct.unpack("3i", credentials)[0]
        self._pidfd = os.pidfd_open(self.host_pid)
        self.pids = self._numbers(Path(f"/proc/{self.host_pid}/status"), "NStgid")

    def _numbers(self, status: Path, line: str) -> dict[str, int]:
        fields = dict(text.split(":", 1) for text in status.read_text().splitlines())
        return dict(zip(self.namespaces, map(int, fields[line].split()), strict=True))

    def say(self, **words: Any) -> dict[str, Any]:
        """Have it do something; what it answers."""
        self._connection.send(json.dumps(words).encode())
        answer = self._connection.recv(_MESSAGE_BYTES)
        assert answer, f"{self.name} is gone"
        found: dict[str, Any] = json.loads(answer)
        assert "error" not in found, found
        return found

    def listener(self) -> int:
        """Have it put itself under the filter; the listener."""
        self._connection.send(json.dumps({"do": "listen"}).encode())
        _, fds, _, _ = socket.recv_fds(self._connection, 1, 1)
        return fds[0]

    def ask(self, on: str, cmd: int, params: bytes, table: tuple[int, bytes] | None = None) -> tuple[int, bytes, bytes]:
        """A control on its "root", "subdevice" or "profiler"; status, params and the table behind the pointer."""
        words = {"do": "ask", "on": on, "cmd": cmd, "params": params.hex()}
        if table is not None:
            words |= {"pointer_at": table[0], "table": table[1].hex()}
        answer = self.say(**words)
        return answer["status"], bytes.fromhex(answer["params"]), bytes.fromhex(answer["table"])

    def end(self) -> None:
        """Let it end."""
        self._connection.close()

    def await_end(self) -> None:
        """Wait until it has ended. May be repeated."""
        if self._pidfd >= 0:
            assert select.select([self._pidfd], [], [], _SECONDS)[0], f"{self.name} does not end"
            os.close(self._pidfd)
            self._pidfd = -1


class Crowd(NamedTuple):
    """The living processes by name."""

    members: dict[str, Member]

    def __getitem__(self, name: str) -> Member:
        return self.members[name]


def _paths(node: Node, outer: tuple[str, ...] = ("host",)) -> Iterator[tuple[str, tuple[str, ...]]]:
    inner = outer if node.kind == "process" else (*outer, node.name)
    yield node.name, inner
    for child in node.children:
        yield from _paths(child, inner)


@contextmanager
def crowd(control_node: Path, nodes: Sequence[Node]) -> Iterator[Crowd]:
    """Grow the processes and wait until all are connected; the end of the context ends them."""
    root = Node("", children=tuple(nodes))
    places = dict(_paths(root))
    with tempfile.TemporaryDirectory() as directory, socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET) as server:
        address = str(Path(directory) / "crowd.sock")
        server.bind(address)
        server.listen(len(places))
        server.settimeout(_SECONDS)
        command = [sys.executable, "-m", "tests.kernel.crowd", address, str(control_node), json.dumps(root)]
        with subprocess.Popen(command, stdin=subprocess.PIPE) as process:
            members: dict[str, Member] = {}
            try:
                for _ in range(len(places) - 1):
                    connection, _ = server.accept()
                    connection.settimeout(_SECONDS)
                    name = connection.recv(_MESSAGE_BYTES).decode()
                    members[name] = Member(name, places[name], connection)
                yield Crowd(members)
            finally:
                assert process.stdin is not None
                process.stdin.close()
                assert process.wait(_SECONDS) == 0
                for member in members.values():
                    member.end()
                    member.await_end()


# -------------------------------------------------------------------------------- the processes' side


class Worker:
    """One of the processes: obeys until the test hangs up."""

    def __init__(self, node: Path) -> None:
        self._node = node
        self._clients: list[RmClient] = []
        self._objects: dict[str, tuple[RmClient, int]] = {}

    def obey(self, connection: socket.socket) -> None:
        while request := connection.recv(_MESSAGE_BYTES):
            words = json.loads(request)
            if words["do"] == "listen":
                listener = seccomp.install(seccomp.build_native())
                socket.send_fds(connection, [b"L"], [listener])
                os.close(listener)
                continue
            try:
                answer = getattr(self, f"do_{words.pop('do')}")(**words)
            except (RmError, OSError) as error:
                answer = {"error": str(error)}
            connection.send(json.dumps(answer).encode())

    def do_use(self, *, thread: str = "main", **what: Any) -> dict[str, Any]:
        """Make a client in the "main" thread, or in "another" that stays, or in one that "ends"."""
        if thread == "main":
            self._use(**what)
            return {}
        made, stay = threading.Event(), threading.Event()
        if thread == "ends":
            stay.set()

        def body() -> None:
            self._use(**what)
            made.set()
            stay.wait()

        other = threading.Thread(target=body, daemon=True)
        other.start()
        if thread == "ends":
            other.join(_SECONDS)
        assert made.wait(_SECONDS)
        return {}

    def _use(self, memory: int, classes: Sequence[str] = "C", *, encodes: bool = False, captures: bool = False) -> None:
        client = RmClient(self._node)
        self._clients.append(client)
        gpu = client.gpus()[0]
        tests = {"C": abi.is_compute_class, "G": abi.is_graphics_class}
        for letter in classes:
            if letter == "M":
                client.alloc(client.handle, abi.MPS_COMPUTE)
                continue
            channel_class = max(filter(abi.is_channel_class, gpu.classes))
            channel = client.alloc(gpu.device, channel_class, bytes(abi.CHANNEL_PARAMS_SIZE))
            client.alloc(channel, max(filter(tests[letter], gpu.classes)))
        if memory:
            client.alloc(gpu.device, abi.MEMORY_LOCAL_USER, abi.MemoryParams(memory).pack())
        if encodes:
            client.alloc(gpu.device, abi.NVENC_SW_SESSION)
        if captures:
            client.alloc(gpu.device, abi.NVFBC_SW_SESSION)

    def do_prepare(self) -> dict[str, Any]:
        """Make the objects to ask of."""
        client = RmClient(self._node)
        gpu = client.gpus()[0]
        profiler = client.alloc(gpu.subdevice, abi.PROFILER)
        handles = {"root": client.handle, "subdevice": gpu.subdevice, "profiler": profiler}
        self._objects = {name: (client, handle) for name, handle in handles.items()}
        return {"gpu_id": gpu.gpu_id}

    def do_ask(
        self, *, on: str, cmd: int, params: str, pointer_at: int | None = None, table: str = ""
    ) -> dict[str, Any]:
        client, handle = self._objects[on]
        raw = bytearray.fromhex(params)
        behind = ctypes.create_string_buffer(bytes.fromhex(table), len(table) // 2 or 1)
        if pointer_at is not None:
            struct.pack_into("<Q", raw, pointer_at, ctypes.addressof(behind))
        status = 0
        try:
            client.control(handle, cmd, raw)
        except RmError as error:
            if error.status is None:
                raise
            status = error.status
        if pointer_at is not None:
            assert struct.unpack_from("<Q", raw, pointer_at) == (ctypes.addressof(behind),), "its own pointer"
            struct.pack_into("<Q", raw, pointer_at, 0)
        return {"status": status, "params": raw.hex(), "table": behind.raw.hex() if table else ""}


def _grow(children: Sequence[Node], address: str, control_node: Path) -> None:
    """Start the children; those that end leave no zombie."""
    signal.signal(signal.SIGCHLD, signal.SIG_IGN)
    for child in children:
        if os.fork() == 0:
            native.die_with_parent()
            if child.kind != "process":
                _enter_namespace(child.kind)
            _be(child, address, control_node)


def _be(node: Node, address: str, control_node: Path) -> NoReturn:
    _grow(node.children, address, control_node)
    with socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET) as connection:
        connection.connect(address)
        connection.send(node.name.encode())
        Worker(control_node).obey(connection)
    os._exit(0)


def _enter_namespace(kind: str) -> None:
    """Return as the first process of a new namespace; its parent, this process until then, stays outside and waits."""
    signal.signal(signal.SIGCHLD, signal.SIG_DFL)
    native.unshare(native.CLONE_NEWPID | (native.CLONE_NEWUSER if kind == "user" else 0))
    if kind == "user":
        for name, text in (("setgroups", "deny"), ("uid_map", "0 0 1"), ("gid_map", "0 0 1")):
            Path(f"/proc/self/{name}").write_text(text, encoding="ascii")
    pid = os.fork()
    if pid:
        os.waitpid(pid, 0)
        os._exit(0)
    native.die_with_parent()


def _node(name: str, kind: str, children: list[Any]) -> Node:
    return Node(name, kind, tuple(_node(*child) for child in children))


def main() -> None:
    _, address, control_node, root = sys.argv
    _grow(_node(*json.loads(root)).children, address, Path(control_node))
    sys.stdin.read()


if __name__ == "__main__":
    main()
