"""The stand-in driver over a real FUSE mount: processes on the host and in fresh PID namespaces, and `ps` on them."""

from __future__ import annotations

import ctypes
import errno
import fcntl
import json
import mmap
import os
import select
import signal
import stat
import subprocess
import sys
import threading
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from mpu_notify.rm import abi
from mpu_notify.rm.client import GpuUser, RmClient, RmError
from mpu_notify.rm.controls import GPU_PID_INFO, GPU_PIDS
from tests.kernel.conftest import StartStandIn

MIB = 1 << 20
HOPPER_COMPUTE = 0xCBC0
CONTROL = abi.ioctl_number(abi.Escape.RM_CONTROL, 32)

HOLD = """
import json, sys
from pathlib import Path
from mpu_notify.rm.client import GpuUser
with GpuUser(Path(sys.argv[1]), **json.loads(sys.argv[2])):
    print("READY", flush=True)
    sys.stdin.read()
"""
NAMESPACE = ("unshare", "--pid", "--fork", "--kill-child", "--mount-proc")


class Holder:
    """A process that holds a GPU; ``pid`` is its number on the host."""

    def __init__(self, control_node: Path, *wrap: str, **user: Any) -> None:
        command = [*wrap, sys.executable, "-c", HOLD, str(control_node), json.dumps(user)]
        self.process = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
        assert self.process.stdout is not None
        assert self.process.stdout.readline() == "READY\n"
        self.pid = self.process.pid
        if wrap:
            children = Path(f"/proc/{self.pid}/task/{self.pid}/children").read_text().split()
            self.pid = int(children[0])

    def inside(self, *command: str) -> list[str]:
        """A command line that runs ``command`` in this process's PID and mount namespace."""
        return ["nsenter", "--target", str(self.pid), "--pid", "--mount", "--", *command]

    def end(self) -> None:
        """Let it end in peace."""
        self.process.communicate(timeout=20)


@pytest.fixture
def hold() -> Iterator[Callable[..., Holder]]:
    holders: list[Holder] = []

    def start(control_node: Path, *wrap: str, **user: Any) -> Holder:
        holders.append(Holder(control_node, *wrap, **user))
        return holders[-1]

    yield start
    for each in holders:
        each.end()


def ps(control_node: Path, *options: str, inside: Holder | None = None) -> subprocess.CompletedProcess[str]:
    command = ["mpu-notify", "ps", "--device", str(control_node), *options]
    command = inside.inside(*command) if inside else command
    return subprocess.run(command, capture_output=True, text=True, check=False, timeout=30)


def listed(control_node: Path, inside: Holder | None = None) -> list[tuple[int, int, str, int]]:
    answer = ps(control_node, "--json", inside=inside)
    assert answer.returncode == 0, answer.stderr
    return [(row["gpu"], row["pid"], row["type"], row["memory_bytes"]) for row in json.loads(answer.stdout)]


# ---------------------------------------------------------------------------- files


def test_files(standin: StartStandIn) -> None:
    directory = standin("--gpus", "2").control_node.parent
    assert sorted(path.name for path in directory.iterdir()) == ["nvidia0", "nvidia1", "nvidiactl"]
    assert stat.S_IMODE((directory / "nvidia1").stat().st_mode) == 0o666
    assert os.statvfs(directory).f_files == 3
    assert os.access(directory / "nvidiactl", os.R_OK | os.W_OK)
    assert not (directory / "nvidia2").exists()
    descriptor = os.open(directory, os.O_RDONLY)
    try:
        with pytest.raises(OSError, match="Inappropriate"):
            fcntl.ioctl(descriptor, CONTROL, bytes(32))
    finally:
        os.close(descriptor)


def test_stops_and_unmounts_with_files_open(standin: StartStandIn) -> None:
    started = standin()
    client = RmClient(started.control_node)
    assert started.stop() == 0
    with pytest.raises(RmError) as caught:
        client.gpus()
    assert caught.value.errno in (errno.ENOTCONN, errno.ECONNABORTED)
    client.close()


def test_refuses_a_missing_directory(tmp_path: Path) -> None:
    command = [sys.executable, "-m", "mpu_notify.standin", str(tmp_path / "none")]
    answer = subprocess.run(command, capture_output=True, text=True, check=False, timeout=30)
    assert answer.returncode == 1
    assert "Traceback" not in answer.stderr
    assert str(tmp_path / "none") in answer.stderr


def test_refuses_to_be_devices_where_the_kernel_has_no_cuse() -> None:
    if Path("/dev/cuse").exists():
        pytest.skip("this kernel has CUSE: tests/vm shows what then happens")
    command = [sys.executable, "-m", "mpu_notify.standin", "--cuse"]
    answer = subprocess.run(command, capture_output=True, text=True, check=False, timeout=30)
    assert answer.returncode == 1
    assert answer.stderr.count("\n") == 1
    assert "/dev/cuse" in answer.stderr


def test_traces_what_it_is_asked(standin: StartStandIn, tmp_path: Path) -> None:
    trace = tmp_path / "trace"
    with RmClient(standin("--trace", str(trace)).control_node) as client:
        (gpu,) = client.gpus()
        with pytest.raises(RmError):
            client.control(gpu.subdevice, 0x2080FFFF, bytearray(8))
        with pytest.raises(RmError):
            client.alloc(client.handle, 0xFFFF)
    lines = [json.loads(line) for line in trace.read_text().splitlines()]
    control = {"control": "0x2080ffff", "object": hex(gpu.subdevice), "size": 8, "params_in": "", "status": "0x56"}
    file = {"device": "nvidiactl", "by": threading.get_native_id(), "opened_by": threading.get_native_id()}
    assert {**control, **file, "params_out": ""} in lines
    assert [line["alloc"] for line in lines if "alloc" in line] == ["0x41", "0x80", "0x2080", "0xffff"]
    (cards,) = [line for line in lines if line.get("nr") == 200]
    assert (cards["device"], cards["size"], cards["in"]) == ("nvidiactl", 32 * 72, "")
    assert cards["out"].startswith("01")


def test_ends_with_its_parent(tmp_path: Path) -> None:
    starter = (
        "import subprocess, sys\n"
        "child = subprocess.Popen([sys.executable, '-m', 'mpu_notify.standin', sys.argv[1], '--exit-with-parent'],"
        " stdout=subprocess.PIPE)\n"
        "child.stdout.readline()\nprint(child.pid)"
    )
    command = [sys.executable, "-c", starter, str(tmp_path)]
    child = int(subprocess.run(command, stdout=subprocess.PIPE, text=True, check=True, timeout=30).stdout)
    try:
        pidfd = os.pidfd_open(child)
    except ProcessLookupError:
        pass
    else:
        with os.fdopen(pidfd):
            assert select.select([pidfd], [], [], 20)[0]
    assert str(tmp_path) not in Path("/proc/self/mounts").read_text()


# ---------------------------------------------------------------------------- processes


@pytest.mark.parametrize("options", [(), ("--old-alloc",), ("--chip", "turing"), ("--era", "native")])
def test_processes_of_the_host(standin: StartStandIn, hold: Callable[..., Holder], options: tuple[str, ...]) -> None:
    node = standin("--gpus", "2", *options).control_node
    assert listed(node) == []
    assert ps(node).stdout == "No process uses a GPU.\n"
    both = hold(node, memory_bytes=3 * MIB, types="CG", clients=3)
    mps = hold(node, memory_bytes=5 * MIB, types="CM", gpu=1)
    assert listed(node) == [(0, both.pid, "C+G", 3 * MIB), (1, mps.pid, "M+C", 5 * MIB)]
    name = Path(f"/proc/{both.pid}/comm").read_text().strip()
    lines = ps(node).stdout.splitlines()
    assert [line.split() for line in lines] == [
        ["GPU", "PID", "TYPE", "NAME", "MEMORY"],
        ["0", str(both.pid), "C+G", name, "3", "MiB"],
        ["1", str(mps.pid), "M+C", name, "5", "MiB"],
    ]
    assert len({len(line) for line in lines}) == 1


def test_host_era_in_a_namespace(standin: StartStandIn, hold: Callable[..., Holder]) -> None:
    node = standin().control_node
    outer = hold(node, memory_bytes=MIB)
    inner = hold(node, *NAMESPACE, memory_bytes=2 * MIB)
    everybody = sorted([(0, outer.pid, "C", MIB), (0, inner.pid, "C", 2 * MIB)])
    assert listed(node) == everybody
    assert listed(node, inside=inner) == everybody
    assert any("  -  " in line for line in ps(node, inside=inner).stdout.splitlines())


def test_native_era_in_a_namespace(standin: StartStandIn, hold: Callable[..., Holder]) -> None:
    node = standin("--era", "native").control_node
    outer = hold(node, memory_bytes=MIB)
    inner = hold(node, *NAMESPACE, memory_bytes=2 * MIB, clients=2)
    other = hold(node, *NAMESPACE, memory_bytes=3 * MIB)
    pids = {outer.pid: MIB, inner.pid: 2 * MIB, other.pid: 3 * MIB}
    assert listed(node) == [(0, pid, "C", pids[pid]) for pid in sorted(pids)]
    assert listed(node, inside=inner) == [(0, 1, "C", 2 * MIB)]
    assert listed(node, inside=other) == [(0, 1, "C", 3 * MIB)]


def test_native_era_in_a_namespace_within_a_namespace(standin: StartStandIn, hold: Callable[..., Holder]) -> None:
    node = standin("--era", "native").control_node
    inner = hold(node, *NAMESPACE, memory_bytes=2 * MIB)
    innermost = hold(node, *inner.inside(*NAMESPACE), memory_bytes=3 * MIB)
    # nsenter -> its child in the namespace (unshare) -> the process
    while children := Path(f"/proc/{innermost.pid}/task/{innermost.pid}/children").read_text().split():
        innermost.pid = int(children[0])
    status = Path(f"/proc/{innermost.pid}/status").read_text()
    numbers = next(line for line in status.splitlines() if line.startswith("NStgid")).split()[1:]
    assert len(numbers) == 3
    seen = listed(node, inside=inner)
    assert seen == sorted([(0, 1, "C", 2 * MIB), (0, int(numbers[1]), "C", 3 * MIB)])
    assert listed(node, inside=innermost) == [(0, 1, "C", 3 * MIB)]


def test_a_killed_process_is_off_the_list(standin: StartStandIn) -> None:
    node = standin().control_node
    holder = Holder(node, memory_bytes=MIB)
    with RmClient(node) as client:
        (gpu,) = client.gpus()
        assert gpu.pids(HOPPER_COMPUTE) == [holder.pid]
        holder.process.send_signal(signal.SIGKILL)
        holder.end()
        assert gpu.pids(HOPPER_COMPUTE) == []


def test_a_container_with_some_of_the_gpus(standin: StartStandIn, tmp_path: Path) -> None:
    node = standin("--gpus", "3").control_node
    for name in ("nvidiactl", "nvidia2"):
        (tmp_path / name).symlink_to(node.with_name(name))
    with GpuUser(tmp_path / "nvidiactl", gpu=2), RmClient(tmp_path / "nvidiactl") as client:
        assert [(gpu.index, gpu.minor) for gpu in client.gpus()] == [(2, 2)]
        assert [process.pid for process in client.gpus()[0].processes()] == [os.getpid()]
    (tmp_path / "nvidia2").unlink()
    answer = ps(tmp_path / "nvidiactl")
    assert answer.returncode == 1
    assert "nvidia0" in answer.stderr
    assert answer.stderr.count("\n") == 1


def test_ps_without_a_driver(tmp_path: Path) -> None:
    answer = ps(tmp_path / "nvidiactl")
    assert answer.returncode == 1
    assert answer.stdout == ""
    assert answer.stderr.startswith(f"mpu-notify: cannot open the driver: {tmp_path}/nvidiactl: No such file")
    assert answer.stderr.count("\n") == 1


# ---------------------------------------------------------------------------- strictness that only the kernel shows


@pytest.fixture
def client(standin: StartStandIn) -> Iterator[RmClient]:
    with RmClient(standin().control_node) as made:
        made.gpus()
        yield made


def raw_ioctl(client: RmClient, number: int, address: int) -> int:
    """An ioctl on any address, which Python's own does not allow; 0 or an errno."""
    libc = ctypes.CDLL(None, use_errno=True)
    libc.ioctl.argtypes = (ctypes.c_int, ctypes.c_ulong, ctypes.c_void_p)
    return ctypes.get_errno() if libc.ioctl(client._fd, number, address) < 0 else 0


def control(client: RmClient, cmd: int, address: int, size: int, number: int = CONTROL) -> int:
    raw = bytearray(abi.Nvos54(client.handle, client.gpus()[0].subdevice, cmd, 0, address, size).pack())
    buffer = (ctypes.c_char * len(raw)).from_buffer(raw)
    assert raw_ioctl(client, number, ctypes.addressof(buffer)) == 0
    return abi.Nvos54.unpack(raw).status


def pages(protection: int) -> int:
    """The address of two fresh pages, the second of them inaccessible."""
    libc = ctypes.CDLL(None, use_errno=True)
    libc.mmap.restype = ctypes.c_void_p
    libc.mmap.argtypes = (ctypes.c_void_p, ctypes.c_size_t, *[ctypes.c_int] * 3, ctypes.c_long)
    libc.mprotect.argtypes = (ctypes.c_void_p, ctypes.c_size_t, ctypes.c_int)
    address = libc.mmap(None, 2 * mmap.PAGESIZE, protection, mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS, -1, 0)
    assert libc.mprotect(address + mmap.PAGESIZE, mmap.PAGESIZE, 0) == 0
    return int(address)


def test_params_must_be_readable_and_writable(client: RmClient) -> None:
    size = GPU_PIDS.size
    writable, read_only = pages(mmap.PROT_READ | mmap.PROT_WRITE), pages(mmap.PROT_READ)
    assert control(client, GPU_PIDS.cmd, writable, size) == abi.Status.OK
    assert control(client, GPU_PIDS.cmd, read_only, size) == abi.Status.INVALID_ADDRESS
    assert control(client, GPU_PIDS.cmd, writable + mmap.PAGESIZE - size + 1, size) == abi.Status.INVALID_ADDRESS
    assert control(client, GPU_PIDS.cmd, 8, size) == abi.Status.INVALID_ADDRESS
    assert control(client, GPU_PIDS.cmd, (1 << 64) - 8, size) == abi.Status.INVALID_ADDRESS
    assert control(client, GPU_PIDS.cmd, 0, size) == abi.Status.INVALID_ARGUMENT


def test_ioctl_number_without_direction_or_with_another_type(client: RmClient) -> None:
    address = pages(mmap.PROT_READ | mmap.PROT_WRITE)
    for number in (0x0020002A, 0x4020002A, 0x8020992A, 0xC020002A):
        assert control(client, GPU_PIDS.cmd, address, GPU_PIDS.size, number) == abi.Status.OK


def test_argument_must_be_readable_and_writable(client: RmClient) -> None:
    for address in (8, pages(mmap.PROT_READ)):
        assert raw_ioctl(client, CONTROL, address) == errno.EFAULT


def test_handles_of_another_open_file(client: RmClient) -> None:
    with RmClient(client.control_node) as other:
        other.handle = client.handle
        with pytest.raises(RmError, match="0x23") as caught:
            other.control(client.gpus()[0].subdevice, GPU_PIDS.cmd, bytearray(GPU_PIDS.size))
    assert caught.value.status == abi.Status.INVALID_CLIENT


def test_a_duplicate_of_the_open_file_is_as_good(client: RmClient) -> None:
    duplicate = os.dup(client._fd)
    try:
        raw = bytearray(abi.Nvos54(client.handle, client.handle, 0x0, 0, 0, 0).pack())
        fcntl.ioctl(duplicate, CONTROL, raw)
    finally:
        os.close(duplicate)
    assert abi.Nvos54.unpack(raw).status == abi.Status.OK


def test_control_on_a_gpu_node(client: RmClient) -> None:
    descriptor = os.open(client.control_node.with_name("nvidia0"), os.O_RDWR)
    try:
        with pytest.raises(OSError, match="Invalid argument"):
            fcntl.ioctl(descriptor, CONTROL, bytearray(32))
    finally:
        os.close(descriptor)


def test_long_pid_info(client: RmClient) -> None:
    with GpuUser(client.control_node, memory_bytes=MIB):
        params = bytearray(GPU_PID_INFO.size)
        GPU_PID_INFO.table.replace(params, [os.getpid()] * 200)
        client.control(client.gpus()[0].subdevice, GPU_PID_INFO.cmd, params)
        assert abi.U64.unpack_from(params, 8 + 199 * 72 + 16) == (MIB,)
