"""The command ``mpu-notify``."""

from __future__ import annotations

import argparse
import os
import signal
import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from importlib import import_module

from mpu_notify.cli import options
from mpu_notify.errors import MpuNotifyError

DESCRIPTION = """\
nvidia-smi in a container or PID namespace shows that container's own GPU
processes, by the container's own PIDs: from user space, with nothing loaded
into the kernel and without sharing the host's PID namespace.
"""

VERBS = (
    "run",
    "serve",
    "ps",
    "doctor",
    "probe",
    "configure",
    "unconfigure",
    "demo",
    "profile",
)  # each a module of this package

_STANDARD_ERROR = 2
_INTERRUPTED = 130  # 128 + SIGINT, as shells say it


class _Version(argparse.Action):
    """--version; what is installed is looked up only when asked for, because that is slow."""

    def __call__(self, parser: argparse.ArgumentParser, *_: object) -> None:
        from importlib.metadata import version  # noqa: PLC0415

        print(f"mpu-notify {version('mpu-notify')}")
        parser.exit()


def parser(verbs: Sequence[str] = VERBS) -> argparse.ArgumentParser:
    """The command line with these verbs."""
    top = argparse.ArgumentParser(prog="mpu-notify", description=DESCRIPTION, allow_abbrev=False)
    top.formatter_class = argparse.RawDescriptionHelpFormatter
    top.add_argument("--version", action=_Version, nargs=0, help="show the version and exit")
    subparsers = top.add_subparsers(title="verbs", metavar="VERB", required=True)
    for verb in verbs:
        import_module(f"mpu_notify.cli.{verb}").register(subparsers)
    return top


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command; returns its exit status: 0, 1 on failure, 2 on usage, or that of `run`'s command."""
    _occupy_standard_fds()
    words = sys.argv[1:] if arguments is None else arguments
    with _interrupts_end_us():
        # A verb's modules are loaded only for that verb: they would be most of its start-up time.
        args = parser(words[:1] if words and words[0] in VERBS else VERBS).parse_args(words)
    try:
        status: int = args.func(args)
        if sys.stdout is not None:
            sys.stdout.flush()
    except options.UsageError as error:
        return options.complain(str(error), 2)
    except MpuNotifyError as error:
        return options.complain(str(error), 1)
    except KeyboardInterrupt:
        return options.complain("interrupted", _INTERRUPTED)
    except BrokenPipeError:
        # Whoever read our output has gone: without this Python would complain of it at exit.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 1
    except OSError as error:
        on = f": {error.filename}" if error.filename else ""
        return options.complain(f"the system refused: {error.strerror}{on}", 1)
    return status


@contextmanager
def _interrupts_end_us() -> Iterator[None]:
    """While modules are loaded, without a word: Python's exception would be shown at length, or lost in one of them."""
    if signal.getsignal(signal.SIGINT) is not signal.default_int_handler:
        yield
        return
    signal.signal(signal.SIGINT, signal.SIG_DFL)
    try:
        yield
    finally:
        signal.signal(signal.SIGINT, signal.default_int_handler)


def _occupy_standard_fds() -> None:
    """Where 0, 1 or 2 was closed, a file of ours must not become somebody's standard output."""
    fd = 0
    while fd <= _STANDARD_ERROR:
        fd = os.open(os.devnull, os.O_RDWR)
    os.close(fd)


if __name__ == "__main__":
    sys.exit(main())
