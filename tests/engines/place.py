"""Where an engine runs: a mount namespace and cgroups of its own, so that nothing is left on the host."""

from __future__ import annotations

import secrets
import subprocess
import time
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path

SECONDS = 30.0
PATH = "/usr/sbin:/usr/bin:/sbin:/bin"
_CGROUPS = Path("/sys/fs/cgroup")

# Whatever engines mount, what they keep in /run and what is changed in /etc goes with the namespace. crun 1.8 does not
# start where cgroup v2 is mounted beside v1.
_SET_UP = """\
umount /sys/fs/cgroup/unified 2>/dev/null
mount -t tmpfs -o mode=755 tmpfs /run && mkdir /run/etc && cp -a /etc/. /run/etc && mount --bind /run/etc /etc &&
    echo up && exec cat
"""


class CommandError(Exception):
    """A command failed; the text has what it said."""


@dataclass(frozen=True)
class Account:
    """A throwaway user with subordinate ids."""

    name: str
    uid: int
    first_subordinate: int

    @classmethod
    def create(cls) -> Account:
        name = f"mpu-test-{secrets.token_hex(4)}"
        subprocess.run(["useradd", "--create-home", name], check=True, capture_output=True)
        uid = int(subprocess.check_output(["id", "-u", name]))
        ranges = (line.split(":") for line in Path("/etc/subuid").read_text().splitlines())
        return cls(name, uid, next(int(first) for owner, first, _ in ranges if owner == name))

    def remove(self) -> None:
        subprocess.run(["userdel", "--remove", self.name], check=True, capture_output=True)


def as_account(account: Account | None) -> list[str]:
    """What a command begins with to be executed by a user; None is root."""
    if account is None:
        return []
    return ["setpriv", f"--reuid={account.uid}", f"--regid={account.uid}", "--init-groups", "--"]


class Place:
    """A private mount namespace with an /etc of its own, held by a process; and a cgroup for all containers."""

    def __init__(self) -> None:
        self.cgroup = f"mpu-notify-test-{secrets.token_hex(4)}"
        command = ["unshare", "--mount", "--propagation", "private", "sh", "-c", _SET_UP]
        self._holder = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE)
        assert self._holder.stdout is not None
        assert self._holder.stdout.readline() == b"up\n", "no private mount namespace"

    def path(self, path: str | Path) -> Path:
        """A file of this place as the tests find it."""
        return Path(f"/proc/{self._holder.pid}/root{path}")

    def command(self, command: Sequence[str | Path], account: Account | None = None) -> list[str]:
        """A command so that it runs here, as root or as another user."""
        enter = ["nsenter", f"--mount=/proc/{self._holder.pid}/ns/mnt", "--wdns=/", "--"]
        return [*enter, *as_account(account), *map(str, command)]

    def run(
        self,
        *command: str | Path,
        account: Account | None = None,
        env: Mapping[str, str] | None = None,
    ) -> str:
        """Run a command to its end; its standard output. Raises CommandError."""
        done = subprocess.run(
            self.command(command, account),
            stdin=subprocess.DEVNULL,
            capture_output=True,
            text=True,
            env=env,
            timeout=2 * SECONDS,
            check=False,
        )
        if done.returncode:
            raise CommandError(f"{' '.join(map(str, command))}: exit {done.returncode}\n{done.stdout}{done.stderr}")
        return done.stdout

    def close(self) -> None:
        """Give back the namespace and the cgroups; whoever still runs there is a failure."""
        users = [pid for pid in _processes() if pid != self._holder.pid and self._is_here(pid)]
        self._holder.communicate()
        for top in _CGROUPS.glob(f"*/{self.cgroup}"):
            for each in sorted((each for each in top.rglob("*") if each.is_dir()), reverse=True):
                each.rmdir()
            top.rmdir()
        assert not users, f"still running: {[Path(f'/proc/{pid}/cmdline').read_bytes() for pid in users]}"

    def _is_here(self, pid: int) -> bool:
        try:
            return Path(f"/proc/{pid}/ns/mnt").samefile(f"/proc/{self._holder.pid}/ns/mnt")
        except OSError:
            return False


class Daemon:
    """A process that runs in a place until it is stopped, and ends with the tests."""

    def __init__(self, place: Place, log: Path, *command: str | Path, env: Mapping[str, str] | None = None) -> None:
        self.log = log
        with log.open("wb") as output:
            self._process = subprocess.Popen(
                place.command(["setpriv", "--pdeathsig=TERM", "--", *command]),
                stdin=subprocess.DEVNULL,
                stdout=output,
                stderr=output,
                env=env,
                start_new_session=True,
            )

    def wait_for(self, ready: Callable[[], bool]) -> None:
        """Until it does what it is for."""
        eventually(lambda: self._process.poll() is not None or ready(), f"ready:\n{self.log.read_text()[-2000:]}")
        assert self._process.poll() is None, f"it ended:\n{self.log.read_text()[-2000:]}"

    def signal(self, number: int) -> None:
        self._process.send_signal(number)

    def stop(self) -> None:
        self._process.terminate()
        self._process.wait(SECONDS)


def eventually(condition: Callable[[], bool], what: str) -> None:
    """Wait until a condition holds."""
    deadline = time.monotonic() + SECONDS
    while not condition():
        assert time.monotonic() < deadline, f"never came true: {what}"
        time.sleep(0.02)


def find_process(*command: str) -> int | None:
    """The process on the host with this command line."""
    wanted = "\0".join((*command, "")).encode()
    for pid in _processes():
        with suppress(OSError):
            if Path(f"/proc/{pid}/cmdline").read_bytes() == wanted:
                return pid
    return None


def _processes() -> list[int]:
    return [int(each.name) for each in Path("/proc").iterdir() if each.name.isdigit()]
