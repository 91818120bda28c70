"""The stand-in driver as a process of its own, for whoever needs one: the demo, the tests, the benchmark."""

from __future__ import annotations

import subprocess
import sys
import tempfile
from pathlib import Path
from types import TracebackType

from mpu_notify.errors import MpuNotifyError

_STOP_SECONDS = 10


class StandInError(MpuNotifyError):
    """The stand-in did not come up; the text has what it said."""


class StandIn:
    """A running stand-in driver on a mount of its own. Use it as a context manager, or stop it."""

    def __init__(self, *options: str) -> None:
        """Start one with command-line options such as "--era", "native". Raises StandInError."""
        # Open to all: an unprivileged caller must reach the nodes.
        self._directory = Path(tempfile.mkdtemp(prefix="mpu-notify-standin-"))
        self._directory.chmod(0o755)
        command = [sys.executable, "-m", "mpu_notify.standin", "--exit-with-parent", *options, str(self._directory)]
        self._process = subprocess.Popen(
            command, stdin=subprocess.DEVNULL, stdout=subprocess.PIPE, stderr=subprocess.PIPE, start_new_session=True
        )
        assert self._process.stdout is not None  # noqa: S101 - asked for above
        if not self._process.stdout.readline().startswith(b"READY"):
            _, said = self._process.communicate()
            self._directory.rmdir()
            raise StandInError(f"the stand-in driver did not start: {said.decode().strip()}")

    @property
    def pid(self) -> int:
        """The process that serves."""
        return self._process.pid

    @property
    def control_node(self) -> Path:
        """Its nvidiactl."""
        return self._directory / "nvidiactl"

    def stop(self) -> int:
        """End and unmount it; returns its exit status. May be repeated."""
        if self._process.returncode is None:
            self._process.terminate()
            self._process.communicate(timeout=_STOP_SECONDS)
            self._directory.rmdir()
        return self._process.returncode

    def __enter__(self) -> StandIn:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.stop()
