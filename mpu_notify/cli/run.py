"""``mpu-notify run``: a command in a PID namespace of its own that sees its own GPU processes."""

from __future__ import annotations

import argparse
import os
import select
from pathlib import Path

from mpu_notify.cli import options
from mpu_notify.notify import sandbox
from mpu_notify.notify.monitor import identify
from mpu_notify.pidns import require_initial_namespace
from mpu_notify.supervisor import private
from mpu_notify.supervisor.driver import Watch, find

_SUPERVISOR_SECONDS = 2

DESCRIPTION = """\
Run CMD in a fresh PID and mount namespace with its own /proc. What CMD and its
children are told by the NVIDIA driver about GPU processes then speaks of the
processes in that namespace, by their numbers there: nvidia-smi works inside.

A small init is PID 1 of the namespace; when CMD ends, the init and whatever CMD
left behind end with it. The terminal and the signals pass through to CMD.

Works as root and, where ordinary users may make user namespaces, as an ordinary
user. Needs no daemon, no container engine and nothing loaded into the kernel.
"""

EPILOG = """\
exit status:
  that of CMD (if a signal ended CMD, the same signal ends mpu-notify);
  127 if CMD was not found, 126 if it could not be executed,
  1 if the namespace or the supervisor could not be set up, 2 for wrong usage.

examples:
  mpu-notify run nvidia-smi
  mpu-notify run --log-level debug -- python3 train.py --epochs 3
  mpu-notify run bash
"""


def register(subparsers: options.Subparsers) -> None:
    """Add the verb to the command line."""
    parser = options.add_verb(subparsers, "run", "run a command that sees its own GPU processes", DESCRIPTION, EPILOG)
    parser.usage = "mpu-notify run [options] [--] CMD [ARG ...]"
    options.add_device(parser)
    options.add_translate(parser)
    options.add_answer_timeout(parser)
    options.add_log(parser)
    parser.add_argument("command", metavar="CMD", nargs=argparse.REMAINDER, help="the command and its arguments")
    parser.set_defaults(func=main)


def main(args: argparse.Namespace) -> int:
    """Run the verb; returns the exit status."""
    command: list[str] = args.command[1:] if args.command[:1] == ["--"] else args.command
    if not command:
        raise options.UsageError("run: name a command, for example: mpu-notify run nvidia-smi")
    options.configure_log(args)
    require_initial_namespace()
    node = Path(args.device)
    device = identify(node)
    watch = Watch(node, args.translate, find(node))
    forwarding = sandbox.Forwarding.begin()
    supervisor, handover = private.start(private.Service(watch, device, f"pid {os.getpid()}", args.answer_timeout_ms))
    try:
        status = sandbox.run(command, handover, forwarding)
    except sandbox.CommandError as error:
        return options.complain(str(error), error.status)
    finally:
        handover.close()
        _await_end(supervisor)
    return sandbox.end_like(status)


def _await_end(supervisor: int) -> None:
    """It has its last lines to log. One that is stopped is not waited for: it ends when it can, and needs nobody."""
    pidfd = os.pidfd_open(supervisor)
    try:
        if select.select([pidfd], [], [], _SUPERVISOR_SECONDS)[0]:
            os.waitpid(supervisor, 0)
    finally:
        os.close(pidfd)
