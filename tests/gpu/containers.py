"""The scene in containers: an OCI runtime starts them by our runtime, and `mpu-notify serve` is their agent."""

from __future__ import annotations

import json
import os
import re
import select
import signal
import subprocess
import sys
from collections.abc import Sequence
from contextlib import ExitStack, suppress
from pathlib import Path
from typing import Any

import mpu_notify
from tests.gpu.scene import HERE, SceneError, mpu_notify_command

_SHIM = Path(mpu_notify.__file__).resolve().parent / "_bin" / "mpu-notify-runtime"
_READY = re.compile(r"READY socket=\S+ monitor=(\d+) supervisor=(\d+)")
_SECONDS = 20
_SHARED = ("bin", "etc", "lib", "lib32", "lib64", "opt", "sbin", "usr", "sys", "dev")
# As an engine's --cap-add: the nested namespace is made in a container.
_CAPABILITIES = ("CAP_SYS_ADMIN", "CAP_DAC_OVERRIDE", "CAP_KILL", "CAP_SETPCAP", "CAP_CHOWN", "CAP_FOWNER")


class Containers:
    """Containers that opted in, and their agent. All that was started ends with `stack`."""

    def __init__(self, runtime: Path, work: Path, log: Path, options: Sequence[str], stack: ExitStack) -> None:
        """Start the agent, with more options of `serve`. SceneError where it does not come up."""
        self._work = work
        self._stack = stack
        self._root = work / "runtime"
        self._agent = work / "agent.sock"
        self._handler = work / "mpu-notify"
        config = work / "config.toml"
        config.write_text(f'[agent]\nsocket = "{self._agent}"\nabsent = "refuse"\n')
        self._handler.write_text(f'#!{_SHIM} --handler\nruntime = "{runtime}"\nconfig = "{config}"\n')
        self._handler.chmod(0o755)
        logged = ("--log-level", "debug", "--log-format", "json", "--log-file", str(log))
        self._serve = mpu_notify_command("serve", "--listen", str(self._agent), *logged, *options)
        self._serving: subprocess.Popen[str] | None = None
        self._supervisor = self.monitor = 0
        stack.callback(self._stop)
        self.start_supervisor()

    def start_supervisor(self) -> None:
        """Start `serve`: the first one starts the monitor, too. SceneError where it does not come up."""
        errors = self._work / "serve.err"
        with errors.open("ab") as said:
            serving = subprocess.Popen(
                self._serve, stdin=subprocess.DEVNULL, stdout=subprocess.PIPE, stderr=said, text=True
            )
        self._serving = serving
        assert serving.stdout is not None
        ready = select.select([serving.stdout], [], [], _SECONDS)[0]
        match = _READY.match(serving.stdout.readline()) if ready else None
        if match is None:
            raise SceneError(f"serve did not come up: {errors.read_text(errors='replace')[-500:]}")
        self.monitor, self._supervisor = int(match[1]), int(match[2])

    def kill_supervisor(self) -> None:
        """SIGKILL; the monitor stays."""
        assert self._serving is not None
        os.kill(self._supervisor, signal.SIGKILL)
        self._serving.wait(_SECONDS)

    def command(self, name: str, *shared: Path) -> list[str]:
        """The command that opens a shell as the init of a new container, which has these directories of the host."""
        bundle = self._work / f"bundle-{name}"
        rootfs = bundle / "rootfs"
        rootfs.mkdir(parents=True)
        (bundle / "config.json").write_text(json.dumps(_spec(rootfs, self._identifier(name), {self._work, *shared})))
        self._stack.callback(self._delete, name)
        return [*self._runtime(), "run", "--bundle", str(bundle), self._identifier(name)]

    def exec_command(self, name: str) -> list[str]:
        """The command that opens a further shell in a container."""
        return [*self._runtime(), "exec", self._identifier(name), "sh"]

    def _runtime(self) -> list[str]:
        return [str(self._handler), "--root", str(self._root)]

    def _identifier(self, name: str) -> str:
        return f"{self._work.name}-{name}"

    def _delete(self, name: str) -> None:
        """What is left of a container that did not end with its shell."""
        command = [*self._runtime(), "delete", "--force", self._identifier(name)]
        subprocess.run(command, capture_output=True, timeout=_SECONDS, check=False)

    def _stop(self) -> None:
        if self._serving is not None and self._serving.poll() is None:
            self._serving.terminate()
            self._serving.wait(_SECONDS)
        with suppress(ProcessLookupError):  # it ends by itself, unless its supervisor was killed
            pidfd = os.pidfd_open(self.monitor)
            if not select.select([pidfd], [], [], _SECONDS)[0]:
                signal.pidfd_send_signal(pidfd, signal.SIGTERM)
            os.close(pidfd)


def _spec(rootfs: Path, identifier: str, wanted: set[Path]) -> dict[str, Any]:
    """A container that has the host's programs, devices and this package, and a /tmp of its own."""
    mounts = [
        {"destination": "/proc", "type": "proc", "source": "proc"},
        {"destination": "/tmp", "type": "tmpfs", "source": "tmpfs", "options": ["mode=1777"]},  # noqa: S108 - its own
    ]
    for name in _SHARED:
        source = Path("/", name)
        if source.is_symlink():
            (rootfs / name).symlink_to(source.readlink())
        elif source.is_dir():
            mounts.append(_bind(source))
    # Python and the packages, wherever they are.
    wanted = {*wanted, HERE.parents[1], Path(sys.prefix), Path(sys.base_prefix), *map(Path, filter(None, sys.path))}
    wanted |= {Path(entry) for entry in os.environ.get("PYTHONPATH", "").split(":") if entry}
    shared = [Path("/", name) for name in _SHARED]
    mounts += [
        _bind(each) for each in sorted(wanted) if each.is_dir() and not any(each.is_relative_to(one) for one in shared)
    ]
    process = {
        "terminal": False,
        "user": {"uid": 0, "gid": 0},
        "args": ["sh"],
        "env": [f"{key}={value}" for key, value in os.environ.items()],
        "cwd": "/",
        "capabilities": {kind: list(_CAPABILITIES) for kind in ("bounding", "effective", "permitted")},
    }
    return {
        "ociVersion": "1.0.2",
        "process": process,
        "root": {"path": str(rootfs)},
        "mounts": mounts,
        "annotations": {"io.mpu-notify.enable": "true"},
        "linux": {
            "namespaces": [{"type": "pid"}, {"type": "mount"}],
            "cgroupsPath": f"/{identifier}",
            "resources": {"devices": [{"allow": True, "access": "rwm"}]},
        },
    }


def _bind(source: Path) -> dict[str, Any]:
    return {"destination": str(source), "type": "bind", "source": str(source), "options": ["rbind", "rslave"]}
