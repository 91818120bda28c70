"""``mpu-notify unconfigure``: a container engine forgets our runtime."""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

from mpu_notify.cli import options
from mpu_notify.cli.configure import Target, add_target, carry_out, target
from mpu_notify.oci.engines import bound, docker, dropin
from mpu_notify.oci.engines.plan import RUNTIME, Plan

DESCRIPTION = """\
Undo `mpu-notify configure`: each file becomes what it was, byte for byte. A file
that was changed in between loses only what mpu-notify had put there.

Containers that were created with the runtime "mpu-notify" stay bound to it and
do not start again without it: they are named, or you are told how to find them.
Those that run go on running. The daemon is not restarted; the command to run is
printed.
"""

EPILOG = """\
exit status:
  0 if nothing of ours is left; 1 if a file cannot be read, understood or written,
  or if the engine's default runtime is ours; 2 for wrong usage.

examples:
  mpu-notify unconfigure docker --dry-run
  mpu-notify unconfigure docker && systemctl reload docker
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
    names = _bound(where)
    _let_go_of_handler(where, plan, names)
    carry_out(where, plan, args, f"{where.engine} is not configured: nothing to change.")
    if names:
        message = f"these containers do not start again before they are created anew: {' '.join(names)}"
        print(f"mpu-notify: note: bound to the runtime {RUNTIME}, {message}", file=sys.stderr)
    elif names is None and plan.files and where.tree.root == Path("/"):
        message = f"containers bound to the runtime {RUNTIME} do not start again; to find them"
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


def _bound(where: Target) -> list[str] | None:
    """The containers that our runtime's going strands; None if that cannot be seen from here."""
    if where.engine == "docker":
        found = docker.settings(where.config, where.files.get(where.config))
        data_root = found.get("data-root") or found.get("graph") or "/var/lib/docker"
        return bound.docker(where.tree.find(str(data_root)))
    if where.engine == "podman" and where.tree.root == Path("/"):
        return bound.podman()
    return None
