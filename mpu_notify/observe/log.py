"""The log of all verbs: one line a record, as text or JSON, to stderr or a file.

Values may come from a container, so nothing in them can begin a line or move a terminal's cursor.
"""

from __future__ import annotations

import json
import logging
import os
import re
import sys
import threading
from collections import OrderedDict
from collections.abc import Hashable
from datetime import datetime, timezone
from pathlib import Path
from typing import Any, Literal

from mpu_notify.errors import MpuNotifyError

ROOT = "mpu_notify"
LEVELS = ("debug", "info", "warning", "error")

_FIELDS = "mpu_notify_fields"
_RESERVED = frozenset({"time", "level", "message"})
_BARE = re.compile(r"[A-Za-z0-9_./:@%+,-]+")
_PRINTABLE = re.compile(r"[ -~]*")


class LogFileError(MpuNotifyError):
    """The log file cannot be opened; the text names file, reason and remedy."""


def event(logger: logging.Logger, level: int, message: str, /, **fields: object) -> None:
    """Log a fixed message with fields. Costs next to nothing where the level is off.

    A field named time, level or message gets a trailing underscore.
    """
    if logger.isEnabledFor(level):
        logger.log(level, message, extra={_FIELDS: fields})


def configure(level: str, fmt: Literal["text", "json"], file: Path | None) -> None:
    """Send what the package logs from this level on to file (appending), or to stderr.

    May be called again, for instance after the file was rotated. Raises ValueError for an unknown level
    or form and LogFileError; the former logging then stays.
    """
    if level not in LEVELS:
        problem = f"log level {level!r}: must be one of {', '.join(LEVELS)}"
        raise ValueError(problem)
    if fmt not in _FORMATTERS:
        problem = f"log format {fmt!r}: must be one of {', '.join(_FORMATTERS)}"
        raise ValueError(problem)
    handler = LineHandler(_open(file))
    handler.setFormatter(_FORMATTERS[fmt]())
    logger = logging.getLogger(ROOT)
    former = list(logger.handlers)
    logger.addHandler(handler)
    for other in former:
        logger.removeHandler(other)
        other.close()
    logger.setLevel(level.upper())
    logger.propagate = False


class LineHandler(logging.Handler):
    """Writes each record at once to a file descriptor that it owns. Never raises into the caller.

    Attribute lost: how many records could not be written (disk full, reader gone) since configure(). The next line that
    can be written says so.
    """

    def __init__(self, fd: int) -> None:
        """Take over fd."""
        super().__init__()
        self.lost = 0
        self._lost_told = 0
        self._torn = False  # the last line has no end
        self._fd = fd

    def emit(self, record: logging.LogRecord) -> None:
        """Write one line, or count it as lost."""
        try:
            line = self.format(record)
            if self.lost > self._lost_told:
                self._write(self.format(_loss(self.lost - self._lost_told)))
                self._lost_told = self.lost
            self._write(line)
        except (OSError, TypeError, ValueError):  # the latter two: a record that cannot be formatted
            self.lost += 1

    def _write(self, line: str) -> None:
        rest = memoryview((("\n" if self._torn else "") + line + "\n").encode("ascii"))
        while rest:
            written = os.write(self._fd, rest)
            self._torn = rest[written - 1] != ord("\n")
            rest = rest[written:]

    def close(self) -> None:
        """Close the file descriptor. May be repeated."""
        self.acquire()
        fd, self._fd = self._fd, -1
        self.release()
        if fd >= 0:
            os.close(fd)
        super().close()


def _loss(lines: int) -> logging.LogRecord:
    head: dict[str, object] = {"name": ROOT, "levelno": logging.WARNING, "levelname": "WARNING"}
    return logging.makeLogRecord({**head, "msg": "lines before this one were lost", _FIELDS: {"lines": lines}})


class _JsonFormatter(logging.Formatter):
    """{"time": ..., "level": ..., "message": ..., fields}."""

    def format(self, record: logging.LogRecord) -> str:
        head = {"time": _time(record), "level": record.levelname.lower(), "message": record.getMessage()}
        return json.dumps(head | self._fields(record), default=str)

    def _fields(self, record: logging.LogRecord) -> dict[str, Any]:
        given: dict[str, object] = getattr(record, _FIELDS, {})
        fields = {f"{key}_" if key in _RESERVED else key: value for key, value in given.items()}
        if record.exc_info:
            fields["exception"] = self.formatException(record.exc_info)
        return fields


class _TextFormatter(_JsonFormatter):
    """Time level message key=value, with anything unusual in a value as in JSON."""

    def format(self, record: logging.LogRecord) -> str:
        message = record.getMessage()
        if not _PRINTABLE.fullmatch(message):
            message = json.dumps(message)
        fields = (f" {_text(key)}={_text(value)}" for key, value in self._fields(record).items())
        return f"{_time(record)} {record.levelname.lower()} {message}{''.join(fields)}"


_FORMATTERS = {"text": _TextFormatter, "json": _JsonFormatter}


class OncePer:
    """Tells the first time of each key, for causes that are logged once per container.

    Remembers the `limit` keys seen last, so a key can be first again after that many others. May be used by
    several threads.
    """

    def __init__(self, limit: int = 4096) -> None:
        """Remember up to limit keys."""
        self._limit = limit
        self._seen: OrderedDict[Hashable, None] = OrderedDict()
        self._lock = threading.Lock()

    def first(self, key: Hashable) -> bool:
        """Tell whether key was not seen yet, and remember it."""
        with self._lock:
            new = key not in self._seen
            self._seen[key] = None
            self._seen.move_to_end(key)
            if len(self._seen) > self._limit:
                self._seen.popitem(last=False)
            return new


def _open(file: Path | None) -> int:
    if file is None:
        # A copy: whoever closes or replaces stderr later cannot turn our lines into another file.
        return os.dup(sys.__stderr__.fileno()) if sys.__stderr__ else os.open(os.devnull, os.O_WRONLY)
    try:
        return os.open(file, os.O_WRONLY | os.O_APPEND | os.O_CREAT | os.O_CLOEXEC, 0o640)
    except OSError as error:
        problem = (
            f"cannot open the log file {file}: {error.strerror}. "
            f"Name a file in a directory that uid {os.geteuid()} may write to, or none to log to stderr."
        )
        raise LogFileError(problem) from error


def _time(record: logging.LogRecord) -> str:
    moment = datetime.fromtimestamp(record.created, timezone.utc)
    return moment.isoformat(timespec="milliseconds").removesuffix("+00:00") + "Z"


def _text(value: object) -> str:
    if value is not None and not isinstance(value, bool | int | float | list | tuple | dict):
        value = str(value)
        if _BARE.fullmatch(value):
            return value
    return json.dumps(value, default=str, separators=(",", ":"))
