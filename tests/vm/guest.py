"""A virtual machine with an old kernel and this machine's own root, read-only, in which tests run what needs either.

``python -m tests.vm.guest COMMAND…`` runs a command in one; without a command, one for each line of standard input.
"""

from __future__ import annotations

import fcntl
import os
import select
import shlex
import subprocess
import sys
import tempfile
import time
import uuid
from pathlib import Path
from sysconfig import get_path
from types import TracebackType
from typing import NamedTuple

REPOSITORY = Path(__file__).resolve().parents[2]
BUILD = REPOSITORY / "build" / "vm"
_IMAGE = BUILD / "guest"
_PATH = "/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin"
_BOOT_SECONDS = 60
_SYSTEMD_SECONDS = 240
_OFF_SECONDS = 10
_MEMORY_MIB = 1536
_CONSOLE_TAIL = 100  # a panic has some 40


class GuestError(Exception):
    """The guest did not come up, or did not answer in time; the text ends with what its console showed last."""


class Done(NamedTuple):
    """What became of a command: its exit status, and what it printed."""

    status: int
    output: str


class Guest:
    """A running guest. Use it as a context manager: it is off afterwards, whatever happens.

    Its emulator reads commands from one pipe and answers on another; the console goes to a file.
    """

    def __init__(self, layer: Path | None = None) -> None:
        """Boot; GuestError where that fails. Needs what install.sh prepares.

        With a layer, a folder that lies over the machine's root, systemd is PID 1 and everything can be written.
        """
        self._console = tempfile.TemporaryFile(prefix="mpu-notify-console-")  # noqa: SIM115 - closed in close
        fcntl.fcntl(self._console, fcntl.F_SETFL, os.O_APPEND)  # the emulator's own words go there too
        self._pending = b""
        self._process = subprocess.Popen(
            _qemu(self._console.fileno(), layer),
            bufsize=0,
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=self._console,
            pass_fds=[self._console.fileno()],
            start_new_session=True,
        )
        try:
            self._line(time.monotonic() + (_SYSTEMD_SECONDS if layer else _BOOT_SECONDS))
        except GuestError:
            self.close()
            raise

    def run(self, *command: str | Path, seconds: float = 100) -> Done:
        """Run a command as root, its output shown as it comes; GuestError, and no more guest, after so long."""
        mark = uuid.uuid4().hex
        here = ["env", f"PATH={get_path('scripts')}:{_PATH}", *map(str, command)]
        line = shlex.join(here)
        assert "\n" not in line, "a line is a command"
        assert self._process.stdin is not None
        try:
            self._process.stdin.write(f"{mark} {line}\n".encode())
        except BrokenPipeError as error:
            raise GuestError("the guest is off: something before this has ended it") from error
        deadline = time.monotonic() + seconds
        lines: list[str] = []
        while True:
            line = self._line(deadline)
            if line.startswith(mark):
                return Done(int(line.split()[1]), "".join(lines).removesuffix("\n"))
            lines.append(line)
            print(line, end="", flush=True)

    def console(self) -> str:
        """What the console has shown: the kernel's messages, and what commands said on standard error."""
        self._console.seek(0)
        return self._console.read().decode(errors="replace").replace("\r\n", "\n")

    def close(self) -> None:
        """Have it power off, or end it."""
        assert self._process.stdin is not None
        self._process.stdin.close()
        try:
            self._process.wait(_OFF_SECONDS)
        except subprocess.TimeoutExpired:
            self._process.kill()
            self._process.wait()
        self._console.close()

    def __enter__(self) -> Guest:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def _line(self, deadline: float) -> str:
        assert self._process.stdout is not None
        port = self._process.stdout.fileno()
        while b"\n" not in self._pending:
            left = max(0.0, deadline - time.monotonic())
            came = os.read(port, 1 << 16) if select.select([port], [], [], left)[0] else None
            if not came:
                self._process.kill()
                self._process.wait()
                what = "went off" if came == b"" else "did not answer in time"
                tail = "\n".join(self.console().splitlines()[-_CONSOLE_TAIL:])
                raise GuestError(f"the guest {what}; its console showed last:\n{tail}")
            self._pending += came
        line, _, self._pending = self._pending.partition(b"\n")
        return line.decode(errors="replace") + "\n"


def _qemu(console: int, layer: Path | None) -> list[str]:
    # Emulation, not KVM: it works wherever the tests run, and the same everywhere. One processor: more of them emulated
    # take twice the time.
    init = "systemd" if layer else "agent"
    folders = {"host": Path("/"), **({"layer": layer} if layer else {})}
    shared = "security_model=none,readonly=on,multidevs=remap"
    return [
        *("qemu-system-x86_64", "-machine", "q35", "-cpu", "qemu64", "-accel", "tcg"),
        *("-smp", "1", "-m", str(_MEMORY_MIB), "-nodefaults", "-display", "none", "-no-reboot"),
        *("-kernel", str(_IMAGE / "vmlinux"), "-initrd", str(_IMAGE / "initramfs")),
        *("-append", f"console=ttyS0 quiet panic=-1 oops=panic repository={REPOSITORY} guest={init}"),
        *(word for tag, path in folders.items() for word in ("-virtfs", f"local,path={path},mount_tag={tag},{shared}")),
        *("-chardev", f"file,id=console,path=/dev/fd/{console},append=on", "-serial", "chardev:console"),
        *("-chardev", "stdio,id=port,signal=off", "-device", "virtio-serial-pci"),
        *("-device", "virtserialport,chardev=port"),
    ]


def main() -> int:
    """Run the command line; the exit status of the last command."""
    status = 0
    with Guest() as guest:
        lines = [shlex.join(sys.argv[1:])] if sys.argv[1:] else sys.stdin
        for line in lines:
            status = guest.run("sh", "-c", line.rstrip("\n")).status
            print(f"[{status}]", file=sys.stderr)
        if status:
            print(guest.console(), file=sys.stderr)
    return status


if __name__ == "__main__":
    sys.exit(main())
