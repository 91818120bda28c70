"""What the tests run in the guest: a stand-in as real devices, processes that use it, and what they are told.

    python -m tests.vm.scene kernel         what the kernel has
    python -m tests.vm.scene taken          the devices of a stand-in, and what another one says that wants the same
    python -m tests.vm.scene rows ERA       processes in and out of a namespace of `run`
    python -m tests.vm.scene inside         what `rows` runs in a namespace: uses the GPUs, asks, and says it in JSON
    python -m tests.vm.scene calls CALLER CASE…   a C program's calls, with and without `run`
    python -m tests.vm.scene clients BRANCH ERA   NVIDIA's own nvidia-smi, in and out of a namespace of `run`
    python -m tests.vm.scene client BRANCH        what `clients` runs in a namespace: uses the GPU, asks, and says it

The last line of the output is JSON.
"""

from __future__ import annotations

import errno
import json
import os
import signal
import subprocess
import sys
import tempfile
import threading
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import NamedTuple

from mpu_notify.notify import filter as seccomp_filter
from mpu_notify.notify import native
from mpu_notify.pidns import open_view
from mpu_notify.rm import abi
from mpu_notify.rm.client import GpuUser, RmClient
from mpu_notify.standin.process import StandIn, StandInError

from .guest import BUILD

GPUS = 2
MIB = 1 << 20


class Row(NamedTuple):
    """A process on a GPU, as whoever asks is told; as JSON it is a list."""

    gpu: int
    pid: int
    type: str
    mib: int


# ------------------------------------------------------------------------- processes that use GPUs


def _use(gpu: int, mib: int, types: str) -> None:
    """Use a GPU from this thread, for good."""
    GpuUser(abi.CONTROL_NODE, gpu=gpu, memory_bytes=mib * MIB, types=types, clients=2)


def _use_in_a_thread(gpu: int, mib: int, types: str) -> None:
    """The same from a thread that goes on living; the main thread never speaks to the driver."""
    used = threading.Event()

    def work() -> None:
        _use(gpu, mib, types)
        used.set()
        signal.pause()

    threading.Thread(target=work, daemon=True).start()
    used.wait()


@contextmanager
def _process(then: Callable[[], None]) -> Iterator[int]:
    """A child that does something and stays; its process id."""
    ready, tell = os.pipe()
    pid = os.fork()
    if pid == 0:
        os.close(ready)
        native.die_with_parent()
        then()
        os.write(tell, b"r")
        signal.pause()
    os.close(tell)
    try:
        assert os.read(ready, 1) == b"r", "the child ended instead"
        yield pid
    finally:
        os.close(ready)
        os.kill(pid, signal.SIGKILL)
        os.waitpid(pid, 0)


@contextmanager
def _process_in_a_nested_namespace(then: Callable[[], None]) -> Iterator[int]:
    """The same in a PID namespace below; its process id in ours."""
    told, tell = os.pipe()

    def nest() -> None:
        native.unshare(native.CLONE_NEWPID)
        with _process(then) as nested:
            os.write(tell, b"%d" % nested)
            signal.pause()

    pid = os.fork()
    if pid == 0:
        os.close(told)
        native.die_with_parent()
        nest()
    os.close(tell)
    try:
        yield int(os.read(told, 16))
    finally:
        os.close(told)
        os.kill(pid, signal.SIGKILL)
        os.waitpid(pid, 0)


def _ask() -> list[Row]:
    with RmClient() as client:
        return sorted(
            Row(gpu.index, process.pid, process.type, (process.memory_bytes or 0) // MIB)
            for gpu in client.gpus()
            for process in gpu.processes()
        )


def inside() -> dict[str, object]:
    """Use the GPUs in several ways, and ask who does."""
    with ExitStack() as stack:
        rows = [
            Row(0, stack.enter_context(_process(lambda: _use(0, 64, "C"))), "C", 64),
            Row(0, stack.enter_context(_process(lambda: _use_in_a_thread(0, 96, "CG"))), "C+G", 96),
            Row(0, stack.enter_context(_process_in_a_nested_namespace(lambda: _use(0, 128, "C"))), "C", 128),
            Row(1, stack.enter_context(_process(lambda: _use(1, 160, "G"))), "G", 160),
        ]
        return {"used": sorted(rows), "told": _ask()}


# ------------------------------------------------------------------------- what is run in the guest


def kernel() -> dict[str, object]:
    """Which kernel it is, and whether it has what newer ones have."""
    with open_view(os.getpid()) as view:
        name = type(view).__name__
    flags = native.SPEC_ALLOW | native.WAIT_KILLABLE_RECV
    return {
        "release": ".".join(os.uname().release.split(".")[:2]),
        "view": name,
        "pidfd_thread": _is_known(lambda: os.pidfd_open(os.getpid(), os.O_EXCL)),
        # On this process, for the rest of its short life.
        "wait_killable": _is_known(lambda: native.install_filter(seccomp_filter.build_native(), flags)),
    }


def _is_known(attempt: Callable[[], int]) -> bool:
    try:
        os.close(attempt())
    except OSError as error:
        if error.errno != errno.EINVAL:
            raise
        return False
    return True


def taken() -> dict[str, object]:
    """The devices while a stand-in has them, what another one says, and the devices afterwards."""
    with StandIn(devices=True):
        refusal = ""
        try:
            StandIn(devices=True).stop()
        except StandInError as error:
            refusal = str(error)
        nodes = _nodes()
    return {"refusal": refusal, "nodes": nodes, "nodes left": _nodes()}


def _nodes() -> list[tuple[str, int, int, str]]:
    found = [(path.name, path.stat()) for path in sorted(Path("/dev").glob("nvidia*"))]
    return [(name, os.major(each.st_rdev), os.minor(each.st_rdev), oct(each.st_mode)) for name, each in found]


def _last_json(*command: str | Path) -> dict[str, object]:
    done = subprocess.run(command, stdout=subprocess.PIPE, check=True, text=True)
    answer: dict[str, object] = json.loads(done.stdout.splitlines()[-1])
    return answer


def rows(era: str) -> dict[str, object]:
    """What `inside` is told by itself, and under `run`; somebody else uses the GPUs as well."""
    this = [sys.executable, "-m", "tests.vm.scene", "inside"]
    with ExitStack() as stack:
        stack.enter_context(StandIn("--era", era, "--gpus", str(GPUS), devices=True))
        elsewhere = [stack.enter_context(_process(lambda gpu=gpu: _use(gpu, 512, "C"))) for gpu in range(GPUS)]
        log = Path(stack.enter_context(tempfile.TemporaryDirectory())) / "log"
        options = ["--translate", "always", "--log-level", "debug", "--log-format", "json", "--log-file", log]
        unaided = _last_json("unshare", "--pid", "--fork", "--mount-proc", *this)
        aided = _last_json("mpu-notify", "run", *options, "--", *this)
        lines = [json.loads(line) for line in log.read_text().splitlines()]
        outcomes = sorted({line["outcome"] for line in lines if line["message"] == "call"})
    return {"unaided": unaided, "aided": aided, "elsewhere": elsewhere, "outcomes": outcomes}


def calls(caller: str, *cases: str) -> dict[str, object]:
    """What a caller in C gets for each of the cases, by itself and under `run`, on the node that `run` expects.

    And with another node of the same device number.
    """
    script = 'for case; do echo "$case: $("$caller" "$nodes" "$case")"; done'
    aided, unaided = ["mpu-notify", "run", "--log-level", "error", "--"], ["unshare", "--pid", "--fork", "--mount-proc"]

    def ask(before: list[str], nodes: Path) -> list[str]:
        shell = ["env", f"caller={caller}", f"nodes={nodes}", "sh", "-c", script, "sh", *cases]
        # As in `run`, the shell is the second process.
        shell = ["sh", "-c", '"$@"; exit $?', "sh", *shell] if before is unaided else shell
        return subprocess.run([*before, *shell], stdout=subprocess.PIPE, check=True, text=True).stdout.splitlines()

    with StandIn("--era", "host", devices=True), tempfile.TemporaryDirectory() as directory:
        other = Path(directory)
        for node in (abi.CONTROL_NODE, abi.CONTROL_NODE.with_name("nvidia0")):
            os.mknod(other / node.name, node.stat().st_mode, node.stat().st_rdev)
        return {
            "unaided": ask(unaided, abi.CONTROL_NODE.parent),
            "aided": ask(aided, abi.CONTROL_NODE.parent),
            "aided, other node": ask(aided, other),
        }


# ------------------------------------------------------------------------- NVIDIA's own client


#: What the driver tells in /proc/driver/nvidia, and where it is until it is bound there.
_PROC_DRIVER = Path("/run/proc-driver")
_PARAMS = "ModifyDeviceFiles: 1\nDeviceFileUID: 0\nDeviceFileGID: 0\nDeviceFileMode: 438\n"
_QUERY = ["--query-compute-apps=pid,process_name,used_memory", "--format=csv,noheader"]
_FIRST_WITH_NEW_ALLOC = 535


def _version(branch: str) -> str:
    (library,) = (BUILD / "clients" / branch).glob("libnvidia-ml.so.*.*")
    return library.name.removeprefix("libnvidia-ml.so.")


@contextmanager
def _workload(name: str, mib: int) -> Iterator[int]:
    """A program of that name that uses the GPU; its process id."""
    command = [name, "-m", "mpu_notify.standin.workload", name, str(mib), "--device", str(abi.CONTROL_NODE)]
    # By another name the interpreter does not find its virtual environment.
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(filter(None, sys.path))}
    with subprocess.Popen(command, executable=sys.executable, env=environment, stdout=subprocess.PIPE) as process:
        assert process.stdout is not None
        assert process.stdout.readline() == b"up\n"
        try:
            yield process.pid
        finally:
            process.terminate()


def _smi(branch: str, *options: str) -> list[str]:
    directory = BUILD / "clients" / branch
    environment = {**os.environ, "LD_LIBRARY_PATH": str(directory)}
    command = [directory / "nvidia-smi", *options]
    return subprocess.run(command, env=environment, stdout=subprocess.PIPE, check=True, text=True).stdout.splitlines()


@contextmanager
def _proc_driver() -> Iterator[None]:
    """What the driver tells is where programs look for it: in the /proc that is mounted here."""
    subprocess.run(["mount", "--bind", _PROC_DRIVER, "/proc/driver"], check=True)
    try:
        yield
    finally:
        subprocess.run(["umount", "/proc/driver"], check=True)


def client(branch: str) -> dict[str, object]:
    """Use the GPU, and have nvidia-smi list who does."""
    with _proc_driver(), _workload("trainer", 64) as trainer, _workload("renderer", 96) as renderer:
        used = [[trainer, "trainer", 64], [renderer, "renderer", 96]]
        return {"used": used, "listed": _smi(branch, *_QUERY), "table": _smi(branch)}


def clients(branch: str, era: str) -> dict[str, object]:
    """What nvidia-smi lists in a namespace by itself, and under `run`; somebody else uses the GPU as well."""
    this = [sys.executable, "-m", "tests.vm.scene", "client", branch]
    options = ["--era", era, "--driver-version", _version(branch)]
    if int(branch) < _FIRST_WITH_NEW_ALLOC:
        options += ["--old-alloc", "--chip", "ampere"]  # the last chip that it knows
    told = _PROC_DRIVER / "nvidia"
    told.mkdir(parents=True, exist_ok=True)
    what = "NVIDIA UNIX x86_64 Kernel Module" if era == "host" else "NVIDIA UNIX Open Kernel Module for x86_64"
    (told / "version").write_text(f"NVRM version: {what}  {_version(branch)}  Release Build\n")
    (told / "params").write_text(_PARAMS)
    with _proc_driver(), StandIn(*options, devices=True), _process(lambda: _use(0, 512, "C")):
        return {
            "unaided": _last_json("unshare", "--pid", "--fork", "--mount-proc", *this),
            "aided": _last_json("mpu-notify", "run", "--", *this),
        }


def main() -> int:
    """Run the command line."""
    scenes: dict[str, Callable[..., dict[str, object]]] = {
        each.__name__: each for each in (kernel, taken, rows, inside, calls, clients, client)
    }
    print(json.dumps(scenes[sys.argv[1]](*sys.argv[2:])))
    return 0


if __name__ == "__main__":
    sys.exit(main())
