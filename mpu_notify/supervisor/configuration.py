"""The configuration file of the daemon: /etc/mpu-notify/config.toml. Every key has a default."""

from __future__ import annotations

import os
import sys
from dataclasses import dataclass, fields, replace
from pathlib import Path
from typing import Any

from mpu_notify.errors import MpuNotifyError
from mpu_notify.oci import settings
from mpu_notify.rm.abi import CONTROL_NODE

if sys.version_info >= (3, 11):
    import tomllib
else:
    import tomli as tomllib

FILE = Path(settings.FILE)

#: Ours, and those that the routes into a container read.
_SECTIONS = {"supervisor", "log", *settings.KEYS}


class ConfigurationError(MpuNotifyError):
    """The configuration file is wrong; the text names file and key."""


@dataclass(frozen=True)
class Log:
    """Section [log]. file = "" is standard error."""

    level: str = "info"
    format: str = "text"
    file: str = ""


@dataclass(frozen=True)
class Configuration:
    """What the file says: `socket` is agent.socket, the others are section [supervisor] and [log]."""

    socket: str = settings.DEFAULT_SOCKET
    device: str = str(CONTROL_NODE)
    translate: str = "auto"
    answer_timeout: float = 1.0  # seconds
    log: Log = Log()


_CHOICES = {
    "translate": ("auto", "always"),
    "level": ("debug", "info", "warning", "error"),
    "format": ("text", "json"),
}


def load(file: Path | None) -> Configuration:
    """Read the file; None: what settings.VARIABLE names, else FILE, which need not exist. Raises ConfigurationError."""
    named = file or os.environ.get(settings.VARIABLE)
    path = file or Path(settings.file())
    try:
        text = path.read_text(encoding="utf-8")
    except FileNotFoundError as error:
        if not named:
            return Configuration()
        raise ConfigurationError(f"no configuration file {path}") from error
    except (OSError, UnicodeDecodeError) as error:
        raise ConfigurationError(f"cannot read the configuration {path}: {error}") from error
    try:
        document = tomllib.loads(text)
        routes = settings.parse(text, str(path))  # what serve takes, the routes into a container take
    except tomllib.TOMLDecodeError as error:
        raise ConfigurationError(f"{path} is no TOML: {error}") from error
    except settings.SettingsError as error:
        raise ConfigurationError(str(error)) from error
    return replace(parse(document, path), socket=routes.socket)


def parse(document: dict[str, Any], path: Path) -> Configuration:
    """What a decoded document says, without the sections that settings.parse reads; `path` is for messages.

    Raises ConfigurationError.
    """
    unknown = sorted(set(document) - _SECTIONS)
    if unknown:
        raise ConfigurationError(f"unknown section [{unknown[0]}] in {path}")
    wanted = _section(document, "supervisor", path)
    ours = _values(Configuration(), wanted, "supervisor", path, leave_out=("socket", "log"))
    log = _values(Log(), _section(document, "log", path), "log", path)
    return replace(Configuration(), **ours, log=Log(**log))


def _section(document: dict[str, Any], name: str, path: Path) -> dict[str, Any]:
    section = document.get(name, {})
    if not isinstance(section, dict):
        raise ConfigurationError(f"{name} in {path} must be a section: [{name}]")
    return section


def _values(
    defaults: Configuration | Log, section: dict[str, Any], name: str, path: Path, leave_out: tuple[str, ...] = ()
) -> dict[str, Any]:
    known = {field.name: getattr(defaults, field.name) for field in fields(defaults) if field.name not in leave_out}
    for key, value in section.items():
        if key not in known:
            raise ConfigurationError(f"unknown key {name}.{key} in {path}: there are {', '.join(known)}")
        default = known[key]
        is_number = isinstance(default, float) and isinstance(value, int | float) and not isinstance(value, bool)
        if not is_number and not isinstance(value, type(default)):
            raise ConfigurationError(f"{name}.{key} in {path} must be a {type(default).__name__}, not {value!r}")
        if is_number and value <= 0:
            raise ConfigurationError(f"{name}.{key} in {path} must be more than 0")
        if key in _CHOICES and value not in _CHOICES[key]:
            raise ConfigurationError(f"{name}.{key} in {path} must be one of {', '.join(_CHOICES[key])}, not {value!r}")
    return dict(section)
