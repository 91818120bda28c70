"""Docker: an entry in `runtimes` of daemon.json, put in and taken out without touching another byte."""

from __future__ import annotations

import json
import re
from dataclasses import dataclass
from typing import Any

from mpu_notify.oci.engines.plan import (
    RUNTIME,
    ConfigurationError,
    Files,
    Plan,
    is_as_written,
    original,
    quoted,
    undo_copy,
)

_INDENT = "    "
_SPACE = re.compile(r"[ \t\r\n]*")
_decode = json.JSONDecoder().raw_decode


@dataclass(frozen=True)
class _Member:
    key: str
    start: int  # of the key
    value: int
    end: int


def settings(path: str, contents: bytes | None) -> dict[str, Any]:
    """What daemon.json says; an empty file says nothing, as for dockerd. Raises ConfigurationError."""
    try:
        text = (contents or b"").decode()
        found = json.loads(text) if text.strip() else {}
    except UnicodeDecodeError as error:
        raise ConfigurationError(f"{path} is not UTF-8 at byte {error.start}") from error
    except json.JSONDecodeError as error:
        raise ConfigurationError(f"{path}:{error.lineno}:{error.colno}: {error.msg}") from error
    if not isinstance(found, dict) or not isinstance(found.get("runtimes", {}), dict):
        raise ConfigurationError(f"{path}: {'runtimes' if isinstance(found, dict) else 'the file'} is no JSON object")
    return found


def configure(files: Files, path: str, shim: str) -> Plan:
    """`runtimes` has our entry. Raises ConfigurationError."""
    plan = Plan()
    now = files.get(path)
    found = settings(path, now)
    _set_behind(found, plan)
    entry = found.get("runtimes", {}).get(RUNTIME)
    if isinstance(entry, dict) and entry.get("path") == shim:
        return plan
    if is_as_written(files, path):
        before = text = original(files, path)
    else:
        text = now if now is None or entry is None else _without(path, now)
        # Without a note of ours the entry is the user's own, and comes back with the rest.
        before = text if undo_copy(path) in files else now
    after = _with(path, (text or b"").decode(), shim)
    plan.rewrite(files, path, before, after.encode())
    return plan


def _set_behind(found: dict[str, Any], plan: Plan) -> None:
    name = found.get("default-runtime", "runc")
    default = found.get("runtimes", {}).get(name)
    if name == RUNTIME or not isinstance(default, dict):
        return
    plan.behind = str(default.get("path") or (default.get("options") or {}).get("BinaryName") or "runc")
    if default.get("runtimeArgs"):
        plan.notes.append(f"the arguments of the default runtime {name} are not passed on to it by {RUNTIME}")


def unconfigure(files: Files, path: str) -> Plan:
    """What was there before `configure`, or at least no entry of ours. Raises ConfigurationError."""
    plan = Plan()
    now = files.get(path)
    if is_as_written(files, path):
        after = original(files, path)
    elif RUNTIME in settings(path, now).get("runtimes", {}) and now is not None:
        after = _without(path, now)
        plan.notes.append(f"{path} was changed since, or configured by hand: only the entry {RUNTIME} was removed")
    else:
        after = now
    if settings(path, after).get("default-runtime") == RUNTIME:
        raise ConfigurationError(f"{path}: default-runtime is {RUNTIME}, and dockerd would not start: remove it first")
    plan.rewrite(files, path, after, after)
    return plan


def _members(text: str, brace: int) -> tuple[list[_Member], int]:
    """The members of the object that starts at `brace` in valid JSON, and where its closing brace is."""
    found: list[_Member] = []
    at = _skip(text, brace + 1)
    while text[at] != "}":
        key, end = _decode(text, at)
        value = _skip(text, _skip(text, end) + 1)
        _, end = _decode(text, value)
        found.append(_Member(key, at, value, end))
        at = _skip(text, end)
        if text[at] == ",":
            at = _skip(text, at + 1)
    return found, at


def _skip(text: str, at: int) -> int:
    match = _SPACE.match(text, at)
    return match.end() if match else at


def _find(members: list[_Member], key: str) -> int | None:
    """Which member has the key; the last one counts, as for any reader."""
    return next((index for index in reversed(range(len(members))) if members[index].key == key), None)


def _with(path: str, text: str, shim: str) -> str:
    """The text with our entry, in the style of what is there."""
    if not text.strip():
        return json.dumps({"runtimes": {RUNTIME: {"path": shim}}}, indent=4) + "\n"
    top = _skip(text, 0)
    members, _ = _members(text, top)
    at = _find(members, "runtimes")
    if at is None:
        after = _append(text, top, "\r\n" if "\r\n" in text else "\n", "runtimes", {RUNTIME: {"path": shim}})
    else:
        after = _append(text, members[at].value, _margin(text, members, top), RUNTIME, {"path": shim})
    expected = settings(path, text.encode())
    expected.setdefault("runtimes", {})[RUNTIME] = {"path": shim}
    if settings(path, after.encode()) != expected:
        raise ConfigurationError(f"{path}: cannot add to this file safely: add runtimes.{RUNTIME} to it by hand")
    return after


def _margin(text: str, members: list[_Member], brace: int) -> str:
    """The white space between an object's brace and its first member."""
    return text[brace + 1 : members[0].start] if members else ""


def _append(text: str, brace: int, outer: str, key: str, value: object) -> str:
    members, close = _members(text, brace)
    if members:
        margin = _margin(text, members, brace)
    else:
        # An empty object: one step deeper than the object itself, if that is on lines of its own.
        step = outer.rpartition("\n")[2] or _INDENT
        margin = outer + step if "\n" in outer else ""
    if "\n" in margin:
        line = margin[margin.rindex("\n") - (margin[: margin.rindex("\n")].endswith("\r")) :]
        step = _step(text, line)
        lines = json.dumps(value, indent=step, ensure_ascii=False).replace("\n", line)
        member = f"{quoted(key)}: {lines}"
        if members:
            return f"{text[: members[-1].end]},{line}{member}{text[members[-1].end :]}"
        closing = line[: len(line) - len(step)] if line.endswith(step) else "\n"
        return f"{text[: brace + 1]}{line}{member}{closing}{text[close:]}"
    member = f"{quoted(key)}: {quoted(value)}"
    if members:
        return f"{text[: members[-1].end]}, {member}{text[members[-1].end :]}"
    return f"{text[: brace + 1]}{member}{text[close:]}"


def _step(text: str, line: str) -> str:
    """One step of indentation, as the first indented line has it."""
    match = re.search(r"\n([ \t]+)", text)
    return match.group(1) if match else line.lstrip("\r\n") or _INDENT


def _without(path: str, contents: bytes) -> bytes:
    """The file less our entry, and less `runtimes` if nothing else is in it."""
    text = contents.decode()
    top = _skip(text, 0)
    members, _ = _members(text, top)
    at = _find(members, "runtimes")
    assert at is not None, "settings() has seen the entry"  # noqa: S101
    entries, _ = _members(text, members[at].value)
    text = _cut(text, members[at].value, RUNTIME) if len(entries) > 1 else _cut(text, top, "runtimes")
    expected = settings(path, contents)
    del expected["runtimes"][RUNTIME]
    if not expected["runtimes"]:
        del expected["runtimes"]
    if settings(path, text.encode()) != expected:
        raise ConfigurationError(f"{path}: cannot change this file safely: remove runtimes.{RUNTIME} by hand")
    return text.encode()


def _cut(text: str, brace: int, key: str) -> str:
    members, close = _members(text, brace)
    at = _find(members, key)
    assert at is not None, "the caller has seen it"  # noqa: S101
    if at > 0:
        return text[: members[at - 1].end] + text[members[at].end :]
    if len(members) > 1:
        return text[: members[0].start] + text[members[1].start :]
    return text[: brace + 1] + text[close:]
