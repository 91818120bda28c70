"""The stand-in driver as a process of its own, for whoever needs one: the demo, the tests, the benchmark."""

from __future__ import annotations

import subprocess
import sys
import tempfile
from pathlib import Path
from types import TracebackType

from mpu_notify.errors import MpuNotifyError
from mpu_notify.rm.abi import CONTROL_NODE

_STOP_SECONDS = 10


class StandInError(MpuNotifyError):
    """The stand-in did not come up; the text has what it said."""


class StandIn:
    """A running stand-in driver, on a mount of its own or as devices. Use it as a context manager, or stop it."""

    def __init__(self, *options: str, devices: bool = False) -> None:
        """Start one with command-line options such as "--era", "native". Raises StandInError.

        ``devices``: as the character devices in /dev; there can be only one such at a time.
        """
        self._mountpoint: Path | None = None
        if not devices:
            # Open to all: an unprivileged caller must reach the nodes.
            self._mountpoint = Path(tempfile.mkdtemp(prefix="mpu-notify-standin-"))
            self._mountpoint.chmod(0o755)
        place = "--cuse" if self._mountpoint is None else str(self._mountpoint)
        command = [sys.executable, "-m", "mpu_notify.standin", "--exit-with-parent", *options, place]
        self._process = subprocess.Popen(
            command, stdin=subprocess.DEVNULL, stdout=subprocess.PIPE, stderr=subprocess.PIPE, start_new_session=True
        )
        assert self._process.stdout is not None  # noqa: S101 - asked for above
        if not self._process.stdout.readline().startswith(b"READY"):
            _, said = self._process.communicate()
            self._remove_mountpoint()
            raise StandInError(f"the stand-in driver did not start: {said.decode().strip()}")

    @property
    def pid(self) -> int:
        """The process that serves."""
        return self._process.pid

    @property
    def control_node(self) -> Path:
        """Its nvidiactl."""
        return CONTROL_NODE if self._mountpoint is None else self._mountpoint / CONTROL_NODE.name

    def stop(self) -> int:
        """End and unmount it; returns its exit status. May be repeated."""
        if self._process.returncode is None:
            self._process.terminate()
            self._process.communicate(timeout=_STOP_SECONDS)
            self._remove_mountpoint()
        return self._process.returncode

    def _remove_mountpoint(self) -> None:
        if self._mountpoint is not None:
            self._mountpoint.rmdir()

    def __enter__(self) -> StandIn:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.stop()
