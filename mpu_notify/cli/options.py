"""What the verbs' command lines share."""

from __future__ import annotations

import argparse
import sys
from pathlib import Path
from typing import TYPE_CHECKING

from mpu_notify.notify.monitor import DEFAULT_SILENCE_MS
from mpu_notify.observe import log
from mpu_notify.rm.abi import CONTROL_NODE

if TYPE_CHECKING:
    Subparsers = argparse._SubParsersAction[argparse.ArgumentParser]  # noqa: SLF001 - argparse has no public name


class UsageError(Exception):
    """The command line makes no sense; exit status 2."""


def complain(message: str, status: int) -> int:
    """Say what is wrong in one line on standard error; returns the status."""
    print(f"mpu-notify: {message}", file=sys.stderr)
    return status


def add_verb(subparsers: Subparsers, name: str, summary: str, description: str, epilog: str) -> argparse.ArgumentParser:
    """Add a verb whose help is laid out as written."""
    return subparsers.add_parser(
        name,
        help=summary,
        description=description,
        epilog=epilog,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
    )


def _or_configured(default: str, section: str | None, key: str) -> tuple[str | None, str]:
    """An option's default and what the help says of it; None where the configuration has the say, in that section."""
    if section is None:
        return default, f"default: {default}"
    return None, f"default: {section}.{key} of the configuration"


def add_device(parser: argparse.ArgumentParser, section: str | None = None) -> None:
    """--device; its default is the control node, or what that section of the configuration says."""
    default, told = _or_configured(str(CONTROL_NODE), section, "device")
    parser.add_argument(
        "--device",
        metavar="PATH",
        type=Path,
        default=default,
        help=f"the driver's control node ({told})",
    )


def add_translate(parser: argparse.ArgumentParser, section: str | None = None) -> None:
    """--translate; its default is auto, or what that section of the configuration says."""
    default, told = _or_configured("auto", section, "translate")
    parser.add_argument(
        "--translate",
        choices=("auto", "always"),
        default=default,
        help="which controls to translate: 'always' all that carry PIDs, 'auto' those that the loaded driver does not "
        f"get right by itself, which 'mpu-notify doctor' lists ({told})",
    )


def _milliseconds(text: str) -> int:
    seconds = float(text)
    longest = 3600
    if not 0 < seconds <= longest:
        raise argparse.ArgumentTypeError(f"{text}: give seconds, more than 0 and at most {longest}")
    return max(1, round(seconds * 1000))


def add_answer_timeout(parser: argparse.ArgumentParser, section: str | None = None) -> None:
    """--answer-timeout; its default is 1 s, or what that section of the configuration says."""
    default, told = _or_configured(f"{DEFAULT_SILENCE_MS / 1000:g}", section, "answer_timeout")
    parser.add_argument(
        "--answer-timeout",
        metavar="SECONDS",
        dest="answer_timeout_ms",
        type=_milliseconds,
        default=default,  # argparse converts a string as it would what the user says
        help=f"how long a call waits for the supervisor before it goes to the driver untranslated ({told})",
    )


def add_log(parser: argparse.ArgumentParser, section: str | None = None) -> None:
    """--log-level, --log-format and --log-file; or what that section of the configuration says."""
    group = parser.add_argument_group("log")
    level, level_told = _or_configured("warning", section, "level")
    form, form_told = _or_configured("text", section, "format")
    _, file_told = _or_configured("standard error", section, "file")
    group.add_argument(
        "--log-level",
        choices=("debug", "info", "warning", "error"),
        default=level,
        help=f"debug shows every supervised call with the PIDs before and after ({level_told})",
    )
    group.add_argument("--log-format", choices=("text", "json"), default=form, help=form_told)
    group.add_argument("--log-file", metavar="FILE", type=Path, help=f"append to FILE ({file_told})")


def configure_log(args: argparse.Namespace) -> None:
    """Set the log up as the options say. Raises log.LogFileError."""
    log.configure(args.log_level, args.log_format, args.log_file)
