"""``mpu-notify configure``: a container engine learns of our runtime."""

from __future__ import annotations

import argparse
import os
import posixpath
import sys
from dataclasses import dataclass
from pathlib import Path

import mpu_notify
from mpu_notify.cli import options
from mpu_notify.oci.engines import docker, dropin, handler
from mpu_notify.oci.engines.files import Tree, diff
from mpu_notify.oci.engines.plan import ConfigurationError, Files, Plan, undo_copy

DESCRIPTION = """\
Tell a container engine of the runtime "mpu-notify", so that containers can be
started under it. No container changes by that, and the engine's default runtime
stays what it is: each container opts in by itself.

What the engine calls is a handler, a file that names the runtime behind ours:
what is the engine's default now, nvidia-container-runtime included, or PATH of
--real-runtime. It stays that until you run this again.

The daemon is not restarted; the command to run is printed.
"""

EPILOG = """\
what is written:
  all         the handler: /etc/mpu-notify/runtimes/ENGINE, or for an ordinary
              user ~/.config/mpu-notify/runtimes/ENGINE, which then also names
              ~/.config/mpu-notify/config.toml as the configuration; with
              another --config there is a number behind ENGINE
  docker      runtimes.mpu-notify in /etc/docker/daemon.json; the rest of the
              file stays as it is
  containerd  a runtime handler for Kubernetes, like the default one (cgroup
              driver included), that lets our annotations through. With
              configuration version 3 in /etc/containerd/conf.d and an import of
              it in /etc/containerd/config.toml. With version 2 at the end of
              the file that has the CRI plugin's settings, because containerd 1
              reads these from one file only; in conf.d if no file has any.
  podman      /etc/containers/containers.conf.d/99-mpu-notify.conf
  crio        /etc/crio/crio.conf.d/99-mpu-notify.conf

  Where a file of yours is changed, the original is kept for `mpu-notify
  unconfigure`, below /etc/mpu-notify/undo or ~/.config/mpu-notify/undo.

exit status:
  0 if the engine is configured, now or already; 1 if a file cannot be read,
  understood or written: then nothing was changed; 2 for wrong usage.

examples:
  mpu-notify configure docker --dry-run
  mpu-notify configure docker && systemctl reload docker
  docker run --runtime mpu-notify --annotation io.mpu-notify.enable=true \\
      --gpus all IMAGE nvidia-smi

  mpu-notify configure containerd && systemctl restart containerd
  kubectl apply -f oci-hook/runtimeclass.yaml

  mpu-notify configure podman \\
      --config ~/.config/containers/containers.conf.d/99-mpu-notify.conf
  podman --runtime mpu-notify run --annotation io.mpu-notify.enable=true IMAGE

  mpu-notify configure docker --root /mnt/image \\
      --runtime-path /opt/mpu-notify/bin/mpu-notify-runtime
"""

_CONFIG = {
    "docker": "/etc/docker/daemon.json",
    "containerd": "/etc/containerd/config.toml",
    "podman": "/etc/containers/containers.conf.d/99-mpu-notify.conf",
    "crio": "/etc/crio/crio.conf.d/99-mpu-notify.conf",
}
_RELOAD = {
    "docker": "systemctl reload docker",
    "containerd": "systemctl restart containerd",
    "podman": None,  # has no daemon
    "crio": "systemctl restart crio",
}


@dataclass(frozen=True)
class Target:
    """An engine's configuration, and what its files contain now."""

    engine: str
    tree: Tree
    config: str
    files: Files

    @property
    def handler(self) -> str:
        """What the engine calls."""
        return handler.path(self.engine, self.config, _CONFIG[self.engine])

    @property
    def before(self) -> Files:
        """All files that a plan may be about."""
        return {**self.files, **self.tree.read([self.handler])}

    @property
    def drop_in(self) -> str:
        """Where containerd's drop-in goes."""
        return posixpath.join(posixpath.dirname(self.config), "conf.d", "99-mpu-notify.toml")


def register(subparsers: options.Subparsers) -> None:
    """Add the verb to the command line."""
    parser = options.add_verb(subparsers, "configure", "tell a container engine of our runtime", DESCRIPTION, EPILOG)
    add_target(parser)
    parser.add_argument(
        "--runtime-path",
        metavar="PATH",
        default=str(Path(mpu_notify.__file__).resolve().parent / "_bin" / "mpu-notify-runtime"),
        help="the runtime's program, as the engine sees it (default: %(default)s)",
    )
    parser.add_argument(
        "--real-runtime", metavar="PATH", help="the runtime behind ours (default: what the engine uses by default)"
    )
    parser.set_defaults(func=main)


def add_target(parser: argparse.ArgumentParser) -> None:
    """ENGINE, --config, --root and --dry-run."""
    parser.add_argument("engine", choices=tuple(_CONFIG), metavar="ENGINE", help="docker, containerd, podman or crio")
    parser.add_argument(
        "--config",
        metavar="FILE",
        help="instead of the engine's default: daemon.json, config.toml (our drop-in then goes to conf.d beside it), "
        "or for podman and crio the drop-in itself",
    )
    parser.add_argument(
        "--root",
        metavar="DIR",
        type=Path,
        default=Path("/"),
        help="take every path as inside DIR, to prepare an image (default: %(default)s)",
    )
    parser.add_argument("--dry-run", action="store_true", help="print what would change, as a diff, and change nothing")


def target(args: argparse.Namespace) -> Target:
    """What the command line means. Raises ConfigurationError, UsageError."""
    if not args.root.is_dir():
        raise options.UsageError(f"--root {args.root}: no such directory")
    tree = Tree(args.root)
    path = args.config or _CONFIG[args.engine]
    # As text: links are followed only where a file is touched, and then inside --root.
    config = os.path.abspath(path) if tree.root == Path("/") else posixpath.normpath("/" + path.lstrip("/"))  # noqa: PTH100
    found = Target(args.engine, tree, config, {})
    if args.engine != "containerd":
        return Target(args.engine, tree, config, tree.read([config, undo_copy(config)]))

    from mpu_notify.oci.engines import containerd  # noqa: PLC0415 - the only one that needs a TOML parser

    files = tree.follow(config, containerd.imported)
    return Target(
        args.engine,
        tree,
        config,
        files | tree.read([found.drop_in, *map(undo_copy, (config, *files))]),
    )


def main(args: argparse.Namespace) -> int:
    """Run the verb; returns the exit status."""
    where = target(args)
    shim = args.runtime_path
    if not os.path.isabs(shim) or any(not character.isprintable() for character in shim):  # noqa: PTH117 - text
        raise options.UsageError(f"--runtime-path {shim!r}: give an absolute path")
    program = where.tree.find(shim)
    if not (program.is_file() and os.access(program, os.X_OK)):
        # Some engines do not start with a runtime that is not there.
        raise ConfigurationError(f"there is no program {shim}: give the runtime's place with --runtime-path")
    plan = _plan(where)
    finder = handler.Finder(where.tree, (shim, where.handler))
    wished = args.real_runtime or plan.behind
    if finder.is_ours(wished):
        raise ConfigurationError(
            f"{wished} is mpu-notify-runtime itself, which cannot be behind itself: name the runtime that is to be by "
            "--real-runtime PATH"
        )
    real = finder.program(args.real_runtime) if args.real_runtime else _real(where, finder, plan)
    if real is None:
        raise ConfigurationError(
            f"cannot find {args.real_runtime or f'the runtime that {where.engine} uses by default'}: install it, or "
            "name another by --real-runtime PATH"
        )
    complete = Plan(notes=plan.notes)
    complete.set(where.before, where.handler, handler.contents(shim, real))
    complete.files |= plan.files
    carry_out(where, complete, args, _RELOAD[where.engine], f"{where.engine} is configured already: nothing to change.")
    return 0


def _plan(where: Target) -> Plan:
    if where.engine == "docker":
        return docker.configure(where.files, where.config, where.handler)
    if where.engine == "containerd":
        from mpu_notify.oci.engines import containerd  # noqa: PLC0415 - as above

        return containerd.configure(where.files, where.config, where.drop_in, where.handler)
    body = dropin.podman(where.handler) if where.engine == "podman" else dropin.crio(where.handler)
    return dropin.configure(where.files, where.config, body)


def _real(where: Target, finder: handler.Finder, plan: Plan) -> str | None:
    if where.engine == "podman":
        return finder.podman()
    if where.engine == "crio":
        return finder.crio()
    return finder.program(plan.behind, "runc")


def carry_out(where: Target, plan: Plan, args: argparse.Namespace, command: str | None, nothing: str) -> None:
    """Show the plan, or do it and say what was done and what command to run now. Raises ConfigurationError."""
    for note in plan.notes:
        print(f"mpu-notify: note: {note}", file=sys.stderr)
    if not plan.files:
        print(nothing)
        return
    if args.dry_run:
        sys.stdout.flush()
        sys.stdout.buffer.write(diff(where.before, plan))
        return
    where.tree.apply(plan)
    for path, contents in plan.files.items():
        print(f"{'Removed' if contents is None else 'Wrote'} {where.tree.find(path)}")
    if command and where.tree.root == Path("/"):
        print(f"Now run: {command}")
