"""What the tests are about: the agent, and mpu-notify as it is installed and configured."""

from __future__ import annotations

import os
import re
import shlex
import signal
import subprocess
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from threading import Lock

from tests import installation

from .place import SECONDS, Account, Place, as_account, eventually

ANNOTATION = "io.mpu-notify.enable"

_READY = re.compile(r"READY socket=(\S+) monitor=(\d+) supervisor=(\d+)")


def package() -> Path:
    """The installed package, where rootless engines can read it, too."""
    return installation.public_copy() / "mpu_notify"


class Agent:
    """A running `mpu-notify serve`."""

    def __init__(self, directory: Path, device: Path, account: Account | None = None) -> None:
        directory.mkdir()
        if account:
            os.chown(directory, account.uid, account.uid)
        self.socket = directory / "agent.sock"
        self._log = directory / "log"
        program = [*as_account(account), *installation.command(), "serve"]
        self._command = [*program, "--listen", str(self.socket), "--device", str(device)]
        self._serve()

    def _serve(self) -> None:
        with self._log.open("ab") as log:
            self._process = subprocess.Popen(
                self._command, stdin=subprocess.DEVNULL, stdout=subprocess.PIPE, stderr=log, text=True
            )
        assert self._process.stdout is not None
        match = _READY.match(self._process.stdout.readline())
        assert match, f"serve did not come up: {self._log.read_text()}"
        assert match[1] == str(self.socket)
        self.monitor, self._supervisor = int(match[2]), int(match[3])

    def kill_supervisor(self) -> None:
        """SIGKILL; the monitor stays."""
        os.kill(self._supervisor, signal.SIGKILL)
        self._process.wait(SECONDS)

    def restart_supervisor(self) -> None:
        """As a service manager does; it is another one with the same monitor."""
        monitor = self.monitor
        self._serve()
        assert self.monitor == monitor

    def stop(self) -> None:
        """As a service manager does; without containers nothing stays."""
        self._process.send_signal(signal.SIGTERM)
        self._process.wait(SECONDS)
        eventually(lambda: not Path(f"/proc/{self.monitor}").exists(), "the monitor has ended")


@dataclass(frozen=True)
class Policy:
    """What mpu-notify is told to do with a container that starts."""

    opt_in: str = "annotation"
    absent: str = ""  # what to do without an agent, where no agent is; "": there is one


class Installation:
    """mpu-notify as the operator of a machine has it, or a user who sets it up alone: its file and its commands."""

    def __init__(
        self, place: Place, directory: Path, socket: Path, env: Mapping[str, str], account: Account | None = None
    ) -> None:
        """`directory` is for the tests' own things; a user's HOME is in `env`."""
        self._place = place
        self._account = account
        self._socket = socket
        self._env = env
        self._policy: Policy | None = None
        self._lock = Lock()
        self.absent_socket = directory / "absent.sock"
        self.folder = Path(env["HOME"]) / ".config/mpu-notify" if account else Path("/etc/mpu-notify")
        self.config = self.folder / "config.toml"

    def follow(self, policy: Policy, *more: str) -> None:
        """Have containers that start from now on be treated so; `more` are lines of the section [runtime]."""
        with self._lock:
            if policy == self._policy:
                return
            socket = self.absent_socket if policy.absent else self._socket
            lines = ["[agent]", f'socket = "{socket}"', *([f'absent = "{policy.absent}"'] if policy.absent else [])]
            lines += ["[runtime]", f'opt_in = "{policy.opt_in}"', *more]
            file = self._place.path(self.config)
            file.parent.mkdir(parents=True, exist_ok=True)
            file.write_text("\n".join([*lines, ""]))
            self._policy = policy

    def run(self, *words: str) -> str:
        """`mpu-notify` with these words; all that it says. Raises CommandError."""
        said_too = ["sh", "-c", 'exec "$@" 2>&1', "sh"]
        return self._place.run(*said_too, *installation.command(), *words, account=self._account, env=self._env)


class Recorder:
    """Stands before our runtime, and keeps what config.json was before that saw it."""

    def __init__(self, directory: Path) -> None:
        self._kept = directory / "kept"
        self._kept.mkdir(parents=True)
        self._kept.chmod(0o777)
        self.program = directory / "record"
        runtime = package() / "_bin" / "mpu-notify-runtime"
        self.program.write_text(_RECORD.format(kept=shlex.quote(str(self._kept)), runtime=shlex.quote(str(runtime))))
        self.program.chmod(0o755)

    def spec(self, identifier: str) -> tuple[bytes, bytes]:
        """config.json of a container as the engine wrote it, and as our runtime left it."""
        kept = self._kept / identifier
        return (kept / "before.json").read_bytes(), (kept / "bundle" / "config.json").read_bytes()


# The last word of `create` and `run` is the container's id.
_RECORD = """\
#!/bin/sh
option= bundle=
for word; do
    case $option in --bundle | -b) bundle=$word ;; esac
    option=$word
done
if [ -n "$bundle" ]; then
    mkdir -p {kept}/"$option"
    cp "$bundle"/config.json {kept}/"$option"/before.json
    ln -sfn "$bundle" {kept}/"$option"/bundle
fi
exec {runtime} "$@"
"""


@contextmanager
def running_agent(directory: Path, device: Path, account: Account | None = None) -> Iterator[Agent]:
    agent = Agent(directory, device, account)
    try:
        yield agent
    finally:
        agent.stop()
