"""``mpu-notify unconfigure``: a container engine forgets our runtime."""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

from mpu_notify.cli import options
from mpu_notify.cli.configure import Target, add_target, carry_out, target
from mpu_notify.oci.engines import bound, docker, dropin
from mpu_notify.oci.engines.plan import RUNTIME, ConfigurationError, Plan

DESCRIPTION = """\
Undo `mpu-notify configure`: each file becomes what it was, byte for byte. A file
that was changed in between loses only what mpu-notify had put there.

Containers that were created with the runtime "mpu-notify" stay bound to it and
do not start again without it: they are named, or you are told how to find them,
and what still works for them. Those that run go on running; with Podman they must
be stopped first. The daemon is not restarted; the command to run is printed.
"""

EPILOG = """\
exit status:
  0 if nothing of ours is left, but for what such containers need; 1 if a file
  cannot be read, understood or written, if the engine's default runtime is ours,
  or if Podman would lose running containers: then nothing was changed; 2 for wrong
  usage.

examples:
  mpu-notify unconfigure docker --dry-run
  mpu-notify unconfigure docker && systemctl restart docker
  mpu-notify unconfigure podman \\
      --config ~/.config/containers/containers.conf.d/99-mpu-notify.conf
"""

_HOW_TO_LOOK = {
    "docker": "docker ps -aq | xargs -r docker inspect -f '{{.HostConfig.Runtime}} {{.Name}}' | grep ^mpu-notify",
    "containerd": "kubectl get pods -A -o custom-columns=:.spec.runtimeClassName,:.metadata.namespace,:.metadata.name"
    " | grep ^mpu-notify",
    "podman": "podman ps -aq | xargs -r podman inspect -f '{{.OCIRuntime}} {{.Name}}' | grep ^mpu-notify",
}
_HOW_TO_LOOK["crio"] = _HOW_TO_LOOK["containerd"]

#: What becomes of the containers bound to our runtime, and what to do: tests/engines/test_configure.py.
_BOUND = {
    "docker": "docker exec, stop and rm go on working; once dockerd has been restarted these containers do not start "
    "again: create them anew",
    "containerd": "pods of the runtime class can still be entered and deleted, but no container in them starts again: "
    "delete them",
    "podman": "podman can still remove them and nothing else: create them anew",
    "crio": "pods of the runtime class do not start again: delete them",
}
_RESTART = {
    # On a reload dockerd keeps the runtimes that it had if none are left in the file.
    "docker": "systemctl restart docker (when it suits: containers stop by it unless live-restore is set)",
    "containerd": "systemctl restart containerd",
    "podman": None,  # has no daemon
    "crio": "systemctl restart crio",
}


def register(subparsers: options.Subparsers) -> None:
    """Add the verb to the command line."""
    parser = options.add_verb(
        subparsers, "unconfigure", "undo configure, and name the containers it leaves", DESCRIPTION, EPILOG
    )
    add_target(parser)
    parser.set_defaults(func=main)


def main(args: argparse.Namespace) -> int:
    """Run the verb; returns the exit status."""
    where = target(args)
    plan = _plan(where)
    if where.engine == "podman" and where.tree.root == Path("/") and plan.files:
        _check_podman()
    names = _bound(where)
    _let_go_of_handler(where, plan, names)
    carry_out(where, plan, args, _RESTART[where.engine], f"{where.engine} is not configured: nothing to change.")
    if names:
        bound_ones = f"bound to the runtime {RUNTIME}: {' '.join(names)}"
        print(f"mpu-notify: note: {bound_ones}; {_BOUND[where.engine]}", file=sys.stderr)
    elif names is None and plan.files and where.tree.root == Path("/"):
        message = f"where containers are bound to the runtime {RUNTIME}, {_BOUND[where.engine]}; to find them"
        print(f"mpu-notify: note: {message}: {_HOW_TO_LOOK[where.engine]}", file=sys.stderr)
    return 0


def _let_go_of_handler(where: Target, plan: Plan, names: list[str] | None) -> None:
    """The handler goes, but not from under containers that still need it to be stopped and removed."""
    before = where.before
    if where.handler not in before:
        return
    if names == [] or (names is None and where.tree.root != Path("/")):
        plan.set(before, where.handler, None)
    else:
        plan.notes.append(f"{where.handler} stays for containers that run under it: remove it when there are none")


def _plan(where: Target) -> Plan:
    if where.engine == "docker":
        return docker.unconfigure(where.files, where.config)
    if where.engine == "containerd":
        from mpu_notify.oci.engines import containerd  # noqa: PLC0415 - the only one that needs a TOML parser

        return containerd.unconfigure(where.files, where.config, where.drop_in)
    return dropin.unconfigure(where.files, where.config)


def _check_podman() -> None:
    """Raises ConfigurationError if containers run that Podman could neither enter nor stop, and might then forget."""
    running = bound.podman(running=True)
    if running:
        raise ConfigurationError(
            f"containers of the runtime {RUNTIME} run, which Podman could not stop without it; stop them first: "
            f"podman stop {' '.join(running)}"
        )


def _bound(where: Target) -> list[str] | None:
    """The containers that our runtime's going strands; None if that cannot be seen from here."""
    if where.engine == "docker":
        found = docker.settings(where.config, where.files.get(where.config))
        data_root = found.get("data-root") or found.get("graph") or "/var/lib/docker"
        return bound.docker(where.tree.find(str(data_root)))
    if where.engine == "podman" and where.tree.root == Path("/"):
        return bound.podman()
    return None
