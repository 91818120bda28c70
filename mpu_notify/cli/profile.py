"""``mpu-notify profile``: a seccomp profile with our listener, for an engine with a stock runtime."""

from __future__ import annotations

import argparse
import json
from pathlib import Path
from typing import Any

from mpu_notify.cli import options
from mpu_notify.errors import MpuNotifyError
from mpu_notify.oci import agent, docker_profile, flags, settings, spec
from mpu_notify.oci.engines import docker

DESCRIPTION = """\
Print a seccomp profile that does what a container's profile does and has its RM
controls stop at the mpu-notify agent, for an engine that keeps its own runtime.
It covers init and every exec. The agent must be there when the container starts.

The base is the engine's own default profile, or FILE, and never another engine's:
for docker what seccomp-profile in /etc/docker/daemon.json names, else the default
of Docker 26 (versions before 25 allow io_uring as well); for podman seccomp.json
in /etc/containers or /usr/share/containers.
Its form stays: Docker's, with archMap, includes and excludes, or the OCI's.
"""

EPILOG = """\
needs:
  docker 23 or later (20.10 drops the listener), podman 4.3 or later.

exit status:
  0 if a profile was printed, 1 if there is no base or it cannot have our
  listener, 2 for wrong usage.

examples:
  mpu-notify profile podman >gpu.json
  podman run --security-opt seccomp=gpu.json ...

  mpu-notify profile docker >gpu.json
  docker run --security-opt seccomp=gpu.json ...
  mpu-notify profile docker --base mine.json >gpu.json
"""

DAEMON_JSON = Path("/etc/docker/daemon.json")
_PODMAN = ("/etc/containers/seccomp.json", "/usr/share/containers/seccomp.json")
_BUILT_IN = ("", "builtin", "unconfined")  # what daemon.json may say instead of a file


class BaseError(MpuNotifyError):
    """There is no base to build a profile on."""


def register(subparsers: options.Subparsers) -> None:
    """Add the verb to the command line."""
    parser = options.add_verb(subparsers, "profile", "print a seccomp profile for a stock runtime", DESCRIPTION, EPILOG)
    parser.add_argument("engine", choices=("docker", "podman"), help="whose default to start from")
    parser.add_argument("--base", metavar="FILE", type=Path, help="the profile to start from")
    parser.add_argument("--listen", metavar="SOCKET", help="the agent's socket (default: the one in the configuration)")
    parser.set_defaults(func=main)


def main(args: argparse.Namespace) -> int:
    """Run the verb; returns the exit status."""
    base = _read(args.base) if args.base else _DEFAULTS[args.engine]()
    socket = args.listen or settings.load().socket
    if not socket.startswith("/"):
        raise options.UsageError(f"profile: --listen {socket}: give an absolute path")
    profile = spec.listen(base, socket, agent.metadata("", "profile"), flags.taken_by_all())
    print(json.dumps(profile, indent=2))
    return 0


def _docker() -> dict[str, Any]:
    contents = DAEMON_JSON.read_bytes() if DAEMON_JSON.exists() else None
    named = docker.settings(str(DAEMON_JSON), contents).get("seccomp-profile", "")
    return docker_profile.default() if named in _BUILT_IN else _read(Path(named))


def _podman() -> dict[str, Any]:
    for candidate in map(Path, _PODMAN):
        if candidate.exists():
            return _read(candidate)
    raise BaseError(
        f"cannot find the default seccomp profile of podman: none of {', '.join(_PODMAN)} is there. "
        "Name one with --base FILE."
    )


_DEFAULTS = {"docker": _docker, "podman": _podman}


def _read(file: Path) -> dict[str, Any]:
    try:
        profile = json.loads(file.read_bytes())
    except (OSError, ValueError, RecursionError) as error:
        raise BaseError(f"cannot read the seccomp profile {file}: {error}") from error
    if not isinstance(profile, dict) or "defaultAction" not in profile:
        raise BaseError(f"cannot use {file} as a seccomp profile: it has no defaultAction")
    return profile
