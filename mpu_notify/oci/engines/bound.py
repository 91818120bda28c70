"""Which containers need our runtime to start again."""

from __future__ import annotations

import json
import shutil
import subprocess
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from mpu_notify.oci.engines.plan import RUNTIME

_SECONDS = 30


def docker(data_root: Path) -> list[str] | None:
    """The names of Docker's containers that are bound to our runtime; None if they cannot be read.

    Read from what dockerd keeps, because it may not be running.
    """
    try:
        return sorted(_docker(data_root))
    except OSError:
        return None


def _docker(data_root: Path) -> Iterator[str]:
    data_root.stat()
    # With userns-remap everything is one level down, in a directory named UID.GID.
    for root in (data_root, *data_root.glob("[0-9]*.[0-9]*")):
        containers = root / "containers"
        for container in containers.iterdir() if containers.exists() else ():
            if _load(container / "hostconfig.json").get("Runtime") == RUNTIME:
                name = _load(container / "config.v2.json").get("Name")
                yield str(name or container.name).lstrip("/")


def _load(path: Path) -> dict[str, Any]:
    try:
        found = json.loads(path.read_bytes())
    except (FileNotFoundError, NotADirectoryError, ValueError):  # being created or removed just now, or no container
        return {}
    return found if isinstance(found, dict) else {}


def podman(*, running: bool = False) -> list[str] | None:
    """The names of this user's Podman containers that are bound to our runtime; None if Podman cannot be asked."""
    if shutil.which("podman") is None:
        return None
    try:
        ids = _podman("ps", "--quiet", *([] if running else ["--all"])).split()
        lines = _podman("inspect", "--type", "container", "--format", "{{.OCIRuntime}} {{.Name}}", *ids) if ids else ""
    except (OSError, subprocess.SubprocessError):
        return None
    return sorted(line.removeprefix(f"{RUNTIME} ") for line in lines.splitlines() if line.startswith(f"{RUNTIME} "))


def _podman(*arguments: str) -> str:
    command = ["podman", *arguments]
    return subprocess.run(command, check=True, capture_output=True, text=True, timeout=_SECONDS).stdout
