"""What the routes into a container read of the configuration file: its sections [agent] and [runtime].

The file is TOML. This reads the part of it that these sections need, a string or nothing on a line, because the shim
has no time for a whole parser; csrc/settings.h reads it in the same way. `serve` reads the whole file as TOML and has
these two sections read here as well: what it takes, all take. Other known sections are other readers'.
"""

# Pathlib would be a large part of the shim's time.
# ruff: noqa: PTH110, PTH111, PTH120, PTH123

from __future__ import annotations

import os
import re

from mpu_notify.errors import MpuNotifyError

FILE = "/etc/mpu-notify/config.toml"
OWN_FILE = "~/.config/mpu-notify/config.toml"  # an ordinary user's
DEFAULT_SOCKET = "/run/mpu-notify/agent.sock"
VARIABLE = "MPU_NOTIFY_CONFIG"  # names another file

_FOREIGN = ("supervisor", "log")
#: What each key of the two sections may be set to; any string where nothing is said.
KEYS: dict[str, dict[str, tuple[str, ...]]] = {
    "agent": {"socket": (), "absent": ("start", "refuse")},
    "runtime": {"path": (), "opt_in": ("annotation", "name")},
}
_LINE_END = re.compile(r"\r\n?|\n")
_BLANK = re.compile(r"[ \t]*(#.*)?")
_SECTION = re.compile(r"[ \t]*\[[ \t]*([\w.-]+)[ \t]*\][ \t]*(#.*)?", re.ASCII)
_SETTING = re.compile(r"""[ \t]*([\w-]+)[ \t]*=[ \t]*(?:"([^"\\]*)"|'([^']*)')[ \t]*(#.*)?""", re.ASCII)


class SettingsError(MpuNotifyError):
    """The configuration file is wrong; the text names the file and the line or key."""


class Settings:
    """The two sections."""

    def __init__(self, file: str = FILE) -> None:
        """All defaults; `file` is for messages."""
        self.file = file
        self.socket = DEFAULT_SOCKET
        self.absent = "start"
        self.runtime = ""
        self.opt_in = "annotation"


def file() -> str:
    """The file to read: what VARIABLE names, else an ordinary user's own one if there is one, else FILE."""
    named = os.environ.get(VARIABLE)
    if named or os.geteuid() == 0:
        return named or FILE
    own = os.path.expanduser(OWN_FILE)
    return own if os.path.exists(own) else FILE


def folder() -> str:
    """Where this user's own file is, which is FILE for root; what `mpu-notify configure` keeps is there, too."""
    return os.path.dirname(FILE if os.geteuid() == 0 else os.path.expanduser(OWN_FILE))


def load(named: str = "") -> Settings:
    """The settings in this file, or in that of this machine; all defaults where there is none. Raises SettingsError."""
    path = named or file()
    try:
        with open(path, encoding="utf-8") as stream:
            return parse(stream.read(), path)
    except FileNotFoundError:
        return Settings(path)
    except (OSError, UnicodeDecodeError) as error:
        raise SettingsError(f"cannot read the configuration {path}: {error}") from error


def parse(text: str, file: str) -> Settings:
    """The settings in this text; `file` is for messages. Raises SettingsError."""
    if "\0" in text:
        raise SettingsError(f"cannot read the configuration {file}: it has a null character")
    settings = Settings(file)
    section = ""
    for number, line in enumerate(_LINE_END.split(text), 1):
        header = _SECTION.fullmatch(line)
        if header:
            section = header[1]
            if section.split(".")[0] not in _FOREIGN and section not in KEYS:
                known = ", ".join([*KEYS, *_FOREIGN])
                raise SettingsError(f"unknown section [{section}] in {file}, line {number}: there are {known}")
        elif section.split(".")[0] not in _FOREIGN and not _BLANK.fullmatch(line):
            _set(settings, section, line, f"{file}, line {number}")
    return settings


def _set(settings: Settings, section: str, line: str, where: str) -> None:
    setting = _SETTING.fullmatch(line)
    if not setting:
        raise SettingsError(f"cannot read {line.strip()!r} in {where}: write a key, = and a string in quotes")
    key, value = setting[1], setting[2] if setting[2] is not None else setting[3]
    choices = KEYS.get(section, {}).get(key)
    if choices is None:
        name, known = f"{section}.{key}".lstrip("."), ", ".join(KEYS.get(section, {})) or "none"
        raise SettingsError(f"unknown key {name} in {where}: section [{section}] has {known}")
    if choices and value not in choices:
        raise SettingsError(f"{key} = {value!r} in {where}: must be one of {', '.join(choices)}")
    if key == "socket" and not value.startswith("/"):
        raise SettingsError(f"socket = {value!r} in {where}: must be an absolute path")
    setattr(settings, "runtime" if key == "path" else key, value)
