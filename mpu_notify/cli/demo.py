"""``mpu-notify demo``: what mpu-notify does, shown on this machine in a screenful."""

from __future__ import annotations

import argparse
import shutil
import subprocess
import sys
from contextlib import ExitStack
from pathlib import Path
from typing import NamedTuple

from mpu_notify.cli import options
from mpu_notify.errors import MpuNotifyError
from mpu_notify.pidns import require_initial_namespace
from mpu_notify.rm import cuda
from mpu_notify.rm.abi import CONTROL_NODE
from mpu_notify.standin.process import StandIn

DESCRIPTION = """\
Start a few GPU processes on the host and in two containers (PID namespaces made
by `mpu-notify run`), and show what a container is told about them without and
with mpu-notify. Where there is a GPU, the processes do CUDA work and nvidia-smi
is asked; else a stand-in driver serves, and `mpu-notify ps` is asked.
Everything is cleaned up at the end.
"""

EPILOG = """\
exit status:
  0 if all was shown, 1 if something could not be started. It needs root.
"""

_DONE = "-- done --"


class DemoError(MpuNotifyError):
    """Something of the demo could not be started."""


class Driver(NamedTuple):
    """What the demo runs on."""

    control_node: Path
    workload: tuple[str, ...]  # options of the workload program
    question: str  # the shell command that lists GPU processes
    title: str
    real: bool


def register(subparsers: options.Subparsers) -> None:
    """Add the verb to the command line."""
    parser = options.add_verb(subparsers, "demo", "show what mpu-notify does, on this machine", DESCRIPTION, EPILOG)
    parser.add_argument("--stand-in", action="store_true", help="use the stand-in driver even where there is a GPU")
    parser.set_defaults(func=main)


def main(args: argparse.Namespace) -> int:
    """Run the verb; returns the exit status."""
    require_initial_namespace()
    with ExitStack() as stack:
        show(_real_driver() if not args.stand_in and _gpu_is_here() else _stand_in(stack), stack)
    return 0


def _gpu_is_here() -> bool:
    if not CONTROL_NODE.exists() or shutil.which("nvidia-smi") is None:
        return False
    try:
        cuda.load()
    except cuda.CudaError:
        return False
    return True


def _real_driver() -> Driver:
    version = Path("/proc/driver/nvidia/version").read_text(encoding="ascii").splitlines()[0]
    question = "nvidia-smi --query-compute-apps=pid,process_name,used_memory --format=csv"
    title = f"driver: {version.partition(':')[2].strip()}"
    return Driver(CONTROL_NODE, ("--cuda",), question, title, real=True)


def _stand_in(stack: ExitStack) -> Driver:
    node = stack.enter_context(StandIn("--era", "host")).control_node
    question = f"{sys.executable} -m mpu_notify.cli.main ps --device {node}"
    title = "no GPU here: a stand-in driver serves, which answers with host PIDs as most drivers do"
    return Driver(node, ("--device", str(node)), question, title, real=False)


class Shell:
    """A shell whose commands are fed one by one, so that they share its namespace."""

    def __init__(self, command: list[str], stack: ExitStack) -> None:
        self.process = stack.enter_context(
            subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, bufsize=1)
        )

    def __call__(self, command: str) -> list[str]:
        """Run a command and return its lines."""
        stdin, stdout = self.process.stdin, self.process.stdout
        if stdin is None or stdout is None:
            raise DemoError("a shell without pipes")
        stdin.write(f"{command}\necho; echo '{_DONE}'\n")
        lines: list[str] = []
        for line in stdout:
            if line.rstrip("\n") == _DONE:
                return [one for one in lines if one]
            lines.append(line.rstrip("\n"))
        raise DemoError(f"a shell ended in the middle of: {command}")

    def work(self, driver: Driver, name: str, mib: int) -> None:
        """Start a GPU process in the background, and wait until it is one."""
        options_text = " ".join(driver.workload)
        program = f"{sys.executable} -m mpu_notify.standin.workload {name} {mib} {options_text}"
        fifo = "$(mktemp -u)"
        said = self(f"p={fifo}; mkfifo $p; {program} >$p </dev/null & read up <$p; rm $p; echo $up")
        if said != ["up"]:
            raise DemoError(f"the GPU process {name} did not come up")


def show(driver: Driver, stack: ExitStack) -> None:
    """Set the scene and print it."""
    host = Shell(["sh"], stack)
    run = [sys.executable, "-m", "mpu_notify.cli.main", "run", "--device", str(driver.control_node), "--", "sh"]
    blue, green = Shell(run, stack), Shell(run, stack)
    host.work(driver, "host-render", 300)
    blue.work(driver, "blue-train", 1024)
    blue.work(driver, "blue-eval", 256)
    green.work(driver, "green-infer", 2048)
    without = _look_unaided(blue, driver)
    print(f"mpu-notify demo\n{driver.title}\n")
    _say("On the host, the driver tells of every GPU process:", host(driver.question))
    _say("Container blue has these processes:", blue("ps -e -o pid,comm | grep -v -e ps -e grep"))
    _say("Asked in container blue WITHOUT mpu-notify:", without)
    _say("Asked in container blue WITH mpu-notify:", blue(driver.question))
    _say("Asked in container green WITH mpu-notify:", green(driver.question))
    print(_explanation(driver))


def _look_unaided(container: Shell, driver: Driver) -> list[str]:
    """Ask in the container's namespaces but outside its filter."""
    front = container.process.pid
    inits = Path(f"/proc/{front}/task/{front}/children").read_text(encoding="ascii").split()
    init = next((pid for pid in inits if _is_pid_1(pid)), None)
    if init is None:
        raise DemoError(f"the container of process {front} has no init")
    asked = ["nsenter", "--target", init, "--pid", "--mount", "sh", "-c", driver.question]
    done = subprocess.run(asked, capture_output=True, text=True, check=False)
    return (done.stdout + done.stderr).splitlines()


def _is_pid_1(pid: str) -> bool:
    status = Path(f"/proc/{pid}/status").read_text(encoding="ascii")
    return any(line.startswith("NSpid:") and line.split()[-1] == "1" for line in status.splitlines())


def _say(heading: str, lines: list[str]) -> None:
    print(heading)
    for line in lines:
        print(f"    {line}")
    print()


def _explanation(driver: Driver) -> str:
    if driver.real:
        return (
            "If the two answers of container blue are alike, this driver translates PIDs by itself (open flavour,\n"
            "570.148.08, 575.57.08 or later); if the first has no rows, it is one of those that need mpu-notify."
        )
    ours = "mpu-notify" if shutil.which("mpu-notify") else sys.argv[0]
    return (
        "Without, the container is told host PIDs, its neighbours' too; none of them exists inside (NAME is -).\n"
        "With mpu-notify it sees its own GPU processes by its own PIDs, and only these.\n"
        f"Try it: {ours} run nvidia-smi"
    )
