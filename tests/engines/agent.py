"""What the tests are about: the agent, and our runtime as an engine finds it."""

from __future__ import annotations

import os
import re
import shlex
import signal
import subprocess
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from enum import Enum
from pathlib import Path

from tests import installation

from .place import SECONDS, Account, as_account, eventually

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


class Policy(Enum):
    """How our runtime is configured, which an engine chooses by the name of the runtime."""

    ANNOTATED = "mpu-annotated"
    ALL = "mpu-all"
    ABSENT_START = "mpu-absent-start"
    ABSENT_REFUSE = "mpu-absent-refuse"


@dataclass(frozen=True)
class Runtimes:
    """Our runtime over a real one, once per policy, as programs in a directory.

    Each keeps what config.json was before our runtime saw it, and where it is: see `spec`.
    """

    directory: Path

    @classmethod
    def make(cls, directory: Path, socket: Path, real: str) -> Runtimes:
        made = cls(directory)
        made._kept.mkdir(parents=True)
        made._kept.chmod(0o777)
        for policy in Policy:
            absent = policy in (Policy.ABSENT_START, Policy.ABSENT_REFUSE)
            config = directory / f"{policy.value}.toml"
            config.write_text(
                "[agent]\n"
                f'socket = "{made.absent_socket if absent else socket}"\n'
                f'absent = "{"refuse" if policy is Policy.ABSENT_REFUSE else "start"}"\n'
                "[runtime]\n"
                f'opt_in = "{"annotation" if policy is Policy.ANNOTATED else "name"}"\n'
            )
            handler = directory / f"{policy.value}.handler"
            program = package() / "_bin" / "mpu-notify-runtime"
            handler.write_text(f'#!{program} --handler\nruntime = "{real}"\nconfig = "{config}"\n')
            made.path(policy).write_text(
                _WRAPPER.format(kept=shlex.quote(str(made._kept)), handler=shlex.quote(str(handler)))
            )
            for file in handler, made.path(policy):
                file.chmod(0o755)
        return made

    @property
    def absent_socket(self) -> Path:
        """Where no agent listens."""
        return self.directory / "absent.sock"

    @property
    def _kept(self) -> Path:
        return self.directory / "kept"

    @property
    def config(self) -> Path:
        """The configuration of a container that opts in by annotation."""
        return self.directory / f"{Policy.ANNOTATED.value}.toml"

    def path(self, policy: Policy) -> Path:
        return self.directory / policy.value

    def spec(self, identifier: str) -> tuple[bytes, bytes]:
        """config.json of a container as the engine wrote it, and as our runtime left it."""
        kept = self._kept / identifier
        return (kept / "before.json").read_bytes(), (kept / "bundle" / "config.json").read_bytes()


# The last word of `create` and `run` is the container's id.
_WRAPPER = """\
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
exec {handler} "$@"
"""


@contextmanager
def running_agent(directory: Path, device: Path, account: Account | None = None) -> Iterator[Agent]:
    agent = Agent(directory, device, account)
    try:
        yield agent
    finally:
        agent.stop()
