"""The daemon's life under systemd, played in a guest: installed as deploy/README.md says, its processes killed,
restarted and upgraded, while a caller in a container asks all the time.

    python -m tests.vm.life CALLER HOSTILE

The last line of the output is JSON.
"""

from __future__ import annotations

import json
import os
import pwd
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import NamedTuple

from mpu_notify.rm import abi
from mpu_notify.standin.process import StandIn
from tests.kernel import harness
from tests.kernel.harness import Caller, caller_host_pid, eventually, kill_container, under_filter

from .guest import REPOSITORY

DEPLOY = REPOSITORY / "deploy"
AGENT = Path("/run/mpu-notify/agent.sock")
ERA = Path("/run/mpu-notify/era.json")
MONITOR, SUPERVISOR, PROBE = "mpu-notify-monitor.service", "mpu-notify.service", "mpu-notify-probe.service"
SOCKET = "mpu-notify-monitor.socket"
UNITS = [MONITOR, SOCKET, SUPERVISOR, "mpu-notify-probe.path"]
PROGRAM = "mpu_notify/_bin/mpu-notify-monitor"
_RIGHTS = ("Uid", "CapInh", "CapPrm", "CapEff", "CapBnd", "CapAmb", "NoNewPrivs", "Seccomp")
_STATE = {"ociVersion": "1.1.0", "fds": ["seccompFd"], "pid": 1, "state": {"id": "one", "status": "creating"}}


def commands() -> list[str]:
    """What deploy/README.md says to type, word for word."""
    block = (DEPLOY / "README.md").read_text().split("```console\n")[1].split("```")[0]
    return [line.removeprefix("# ") for line in block.splitlines()]


def said(*command: str | Path) -> str:
    """What a command prints, whatever its exit status."""
    return subprocess.run(command, stdout=subprocess.PIPE, check=False, text=True).stdout.strip()


def systemctl(*command: str) -> None:
    """Have systemd do something."""
    subprocess.run(["systemctl", *command], check=True)


class Pids(NamedTuple):
    """The main processes of both units."""

    monitor: int
    supervisor: int


def pids() -> Pids:
    """0 where there is none."""
    return Pids(
        *(int(said("systemctl", "show", "--property=MainPID", "--value", unit)) for unit in (MONITOR, SUPERVISOR))
    )


class Asking:
    """A caller that asks all the time, and what it is told."""

    def __init__(self, caller: Caller) -> None:
        self.answers: list[str] = []
        self._caller = caller
        self._ended = threading.Event()
        self._thread = threading.Thread(target=self._ask, daemon=True)
        self._thread.start()

    def _ask(self) -> None:
        while not self._ended.is_set():
            self._caller.poke()
            self.answers.append(self._caller.line())
            time.sleep(0.02)  # for the others: there is one processor

    def until_right(self) -> None:
        """Wait until its next answer but one, at the earliest, is its own process, by its own number."""
        now = len(self.answers)
        eventually(lambda: "pids= 1" in self.answers[now + 1 :], "the list is right")

    def end(self) -> None:
        self._ended.set()
        self._thread.join()


@contextmanager
def asking(caller: Caller) -> Iterator[Asking]:
    one = Asking(caller)
    try:
        yield one
    finally:
        one.end()


def attach(caller: Caller) -> None:
    """Be a runtime, which does not keep the listener: from here on only the daemon has it."""
    with socket.socket(socket.AF_UNIX) as runtime:
        runtime.connect(str(AGENT))
        socket.send_fds(runtime, [json.dumps(_STATE).encode()], [caller.listener])
    with Path(os.devnull).open() as nothing:
        os.dup2(nothing.fileno(), caller.listener)


def rights(pid: int) -> dict[str, list[str]]:
    """What the kernel lets a process do."""
    lines = (line.split() for line in Path(f"/proc/{pid}/status").read_text().splitlines())
    return {words[0][:-1]: words[1:] for words in lines if words[0][:-1] in _RIGHTS}


def kill(*processes: int) -> None:
    """SIGKILL, as near to at once as can be."""
    for pid in processes:
        os.kill(pid, signal.SIGKILL)


def upgrade() -> None:
    """Another file in the monitor's place, as a package manager puts it there, and what README.md says then."""
    (program,) = Path("/opt/mpu-notify").glob(f"lib/python*/site-packages/{PROGRAM}")
    new = program.with_suffix(".new")
    shutil.copy(program, new)
    new.rename(program)
    systemctl("restart", MONITOR)


@contextmanager
def never_ending(program: str) -> Iterator[None]:
    """A container for which a thread of the monitor waits where it cannot be killed."""
    place = Path(tempfile.mkdtemp())
    with under_filter(program, abi.CONTROL_NODE.parent, "silent_nvos54", place) as stuck:
        attach(stuck)
        stuck.go()
        assert stuck.line() == "up"
        stuck.poke()
        tasks = Path(f"/proc/{pids().monitor}/task")
        eventually(lambda: any("request_wait" in wait.read_text() for wait in tasks.glob("*/wchan")), "a thread waits")
        try:
            yield
        finally:
            kill_container(stuck)
    place.rmdir()


def changes() -> dict[str, tuple[list[str], Callable[[], object]]]:
    """What happens to the units, and the processes of which there must be others afterwards."""
    return {
        "supervisor killed": (["supervisor"], lambda: kill(pids().supervisor)),
        "monitor killed": (["monitor"], lambda: kill(pids().monitor)),
        "both killed": (["monitor", "supervisor"], lambda: kill(*pids())),
        "supervisor restarted": (["supervisor"], lambda: systemctl("restart", SUPERVISOR)),
        "monitor upgraded": (["monitor"], upgrade),
        "monitor stopped": (["monitor"], lambda: systemctl("stop", MONITOR)),
    }


def are_others(before: Pids, of: list[str]) -> bool:
    now = pids()
    return all(getattr(now, name) not in (0, getattr(before, name)) for name in of)


def change(under: Asking, of: list[str], do: Callable[[], object]) -> dict[str, object]:
    """What the processes were, and are, once the list is right again; and what the caller was told meanwhile."""
    before, from_here = pids(), len(under.answers)
    do()
    eventually(lambda: are_others(before, of), f"another {of}")
    under.until_right()
    return {"before": before._asdict(), "after": pids()._asdict(), "told": sorted(set(under.answers[from_here:]))}


def killed_but_there(under: Asking, program: str) -> dict[str, object]:
    """The monitor is killed and cannot end."""
    with never_ending(program):
        killed = pids().monitor
        told = change(under, ["monitor"], lambda: kill(killed))
        assert Path(f"/proc/{killed}").exists()
    return told


def life(program: str, hostile: str) -> dict[str, object]:
    """All of it."""
    for command in commands():
        subprocess.run(["bash", "-c", command], cwd=DEPLOY, stdout=sys.stderr, check=True)
    states = {unit: said("systemctl", "is-active", unit) for unit in UNITS}
    enabled = {unit: said("systemctl", "is-enabled", unit) for unit in UNITS}
    with StandIn("--era", "host", devices=True), under_filter(program, abi.CONTROL_NODE.parent, "on_demand") as caller:
        eventually(ERA.exists, "the driver is asked when it appears")
        attach(caller)
        caller.go()
        assert caller.line() == "up"
        with asking(caller) as under:
            under.until_right()
            told = {
                "states": states,
                "enabled": enabled,
                "era": json.loads(ERA.read_text()),
                "rights": {name: rights(pid) for name, pid in pids()._asdict().items()},
                "exposed": {unit: exposure(unit) for unit in (MONITOR, SUPERVISOR, PROBE)},
                "changes": {
                    **{name: change(under, *what) for name, what in changes().items()},
                    "monitor killed, and cannot end": killed_but_there(under, hostile),
                },
                "host": caller_host_pid(caller),
                "user": str(pwd.getpwnam("mpu-notify").pw_uid),
                "program": str(Path(f"/proc/{pids().monitor}/exe").readlink()),
            }
        systemctl("stop", SUPERVISOR, MONITOR, SOCKET)
        caller.poke()
        return {**told, "all stopped": caller.line()}


def exposure(unit: str) -> float:
    """What systemd-analyze says of a unit that is loaded: 0 is nothing, 10 everything."""
    last = said("systemd-analyze", "security", "--no-pager", unit).splitlines()[-1]
    return float(last.split(":")[1].split()[0])


if __name__ == "__main__":
    harness.SECONDS = 60.0  # it is emulated, maybe beside others
    try:
        print(json.dumps(life(*sys.argv[1:])))
    except BaseException:
        subprocess.run(["journalctl", "--no-pager", "--lines=60"], stdout=sys.stderr, check=False)
        raise
