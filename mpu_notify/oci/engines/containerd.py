"""containerd: a runtime handler for its CRI plugin.

containerd 2 merges imported files key by key. containerd 1 does not: of all files that have a section for the CRI
plugin the last one counts, alone, and a section that lists runtimes has only those. So with configuration version 2,
which both read, the handler goes to the end of the file whose section counts, and into a drop-in only if there is none.
"""

from __future__ import annotations

import posixpath
import re
import sys
from collections.abc import Iterator
from copy import deepcopy
from importlib import import_module
from pathlib import PurePosixPath
from typing import Any

from mpu_notify.oci.engines.plan import (
    ANNOTATIONS,
    RUNTIME,
    ConfigurationError,
    Files,
    Plan,
    check_drop_in,
    copied_file,
    drop_in,
    is_as_written,
    original,
    quoted,
)

_toml = import_module("tomllib" if sys.version_info >= (3, 11) else "tomli")

_CRI_2 = "io.containerd.grpc.v1.cri"
_CRI_3 = "io.containerd.cri.v1.runtime"
_RUNC = "io.containerd.runc.v2"
_BEGIN = "# >>> mpu-notify configure; mpu-notify unconfigure removes all down to the next mark"
_END = "# <<< mpu-notify configure"
_BLOCK = re.compile(re.escape(_BEGIN) + r"\r?\n.*?" + re.escape(_END) + r"\r?\n", re.DOTALL)
_IMPORTS = re.compile(r"^[ \t]*imports[ \t]*=[ \t]*\[", re.MULTILINE)

Table = dict[str, Any]


def imported(path: str, contents: bytes) -> list[str]:
    """The globs that a configuration file imports, absolute. Raises ConfigurationError."""
    return _globs(path, parse(path, contents))


def configure(files: Files, config: str, drop_in_path: str, shim: str) -> Plan:
    """The CRI plugin has a handler `mpu-notify`. Raises ConfigurationError.

    `files` has the configuration, whatever it imports, in that order, and our notes beside them.
    """
    check_drop_in(files, drop_in_path)
    before = {path: _before(files, path, drop_in_path) for path in _read(files, config, drop_in_path)}
    parsed = {path: parse(path, contents) for path, contents in before.items()}
    main = parsed[config]
    version = main.get("version", 1) if main else 2
    _check(config, parsed, version)

    plan = Plan()
    holders = [path for path, table in parsed.items() if _sections(table)]
    target = holders[-1] if holders and version == 2 else drop_in_path  # noqa: PLR2004 - the version
    section: Table = {}
    for path in holders if target == drop_in_path else [target]:
        for found in _sections(parsed[path]):
            section = _merged(section, found)
    body = _handler(section.get("containerd", {}), _CRI_2 if version == 2 else _CRI_3, shim, plan)  # noqa: PLR2004

    after = {path: (contents or b"").decode() for path, contents in before.items()}
    if target != drop_in_path:
        after[target] = _with_block(target, after[target], body)
        if target != config:
            plan.notes.append(f"{target} holds the CRI settings: run this again when its owner has written it anew")
    elif not any(PurePosixPath(drop_in_path).match(glob) for path in parsed for glob in _globs(path, parsed[path])):
        after[config] = _with_import(config, after[config], main, drop_in_path)

    # What is imported comes first: containerd does not start on an import that is not there.
    if target == drop_in_path:
        plan.set(files, drop_in_path, drop_in(f"version = {version}\n\n{body}"))
    for path in reversed(after):
        contents = after[path].encode()
        plan.rewrite(files, path, before[path], before[path] if contents == (before[path] or b"") else contents)
    if target != drop_in_path:
        plan.set(files, drop_in_path, None)
    return plan


def unconfigure(files: Files, config: str, drop_in_path: str) -> Plan:
    """What was there before `configure`, or at least nothing of ours. Raises ConfigurationError."""
    check_drop_in(files, drop_in_path)
    plan = Plan()
    for path in _read(files, config, drop_in_path):
        now = files.get(path)
        after = _before(files, path, drop_in_path)
        if now != after and not is_as_written(files, path):
            plan.notes.append(f"{path} was changed since: only what mpu-notify added was removed")
        for section in _sections(parse(path, after)):
            if section.get("containerd", {}).get("default_runtime_name") == RUNTIME:
                raise ConfigurationError(
                    f"{path}: default_runtime_name is {RUNTIME}, and the CRI plugin would not start: change it first"
                )
        plan.rewrite(files, path, after, after)
    plan.set(files, drop_in_path, None)
    return plan


def _read(files: Files, config: str, drop_in_path: str) -> list[str]:
    """The files that are not ours, in containerd's order; the configuration is one even if it is not there."""
    others = (path for path in files if path not in (config, drop_in_path) and copied_file(path) is None)
    return [config, *others]


def _before(files: Files, path: str, drop_in_path: str) -> bytes | None:
    """The file as it would be without us."""
    if is_as_written(files, path):
        return original(files, path)
    if path not in files:
        return None
    text = _BLOCK.sub("", files[path].decode(errors="surrogateescape"))
    text = re.sub("(?m)^" + re.escape(_import_line(drop_in_path)) + r"\r?\n", "", text, count=1)
    ours = quoted(drop_in_path)
    head = _IMPORTS.search(text)
    if head:
        text = text[: head.end()] + re.sub("^" + re.escape(ours) + "(, )?", "", text[head.end() :])
    return text.encode(errors="surrogateescape")


def parse(path: str, contents: bytes | None) -> Table:
    """A TOML file, as far as its types matter here. Raises ConfigurationError."""
    try:
        found: Table = _toml.loads((contents or b"").decode())
    except UnicodeDecodeError as error:
        raise ConfigurationError(f"{path} is not UTF-8 at byte {error.start}") from error
    except _toml.TOMLDecodeError as error:
        raise ConfigurationError(f"{path}: {error}") from error
    for key, kind in (("version", int), ("imports", list), ("disabled_plugins", list), ("plugins", dict)):
        if not isinstance(found.get(key, kind()), kind):
            raise ConfigurationError(f"{path}: {key} is of the wrong type")
    return found


def _globs(path: str, table: Table) -> list[str]:
    return [posixpath.normpath(posixpath.join(posixpath.dirname(path), str(glob))) for glob in table.get("imports", [])]


def _sections(table: Table) -> list[Table]:
    """The CRI plugin's settings, under either name."""
    found = (table.get("plugins", {}).get(name) for name in (_CRI_2, _CRI_3))
    return [section for section in found if isinstance(section, dict)]


def _check(config: str, parsed: dict[str, Table], version: int) -> None:
    disabled = {name for table in parsed.values() for name in table.get("disabled_plugins", [])}
    if disabled & {"cri", _CRI_2, _CRI_3}:
        raise ConfigurationError(
            f"{config} disables the CRI plugin, so no runtime handler would be used: for Docker's own containerd run "
            "`mpu-notify configure docker`, for Kubernetes enable the plugin first"
        )
    if version < 2:  # noqa: PLR2004 - the version
        raise ConfigurationError(
            f"{config} has no `version`, which means 1: write what `containerd config migrate` prints there first"
        )
    for path, table in parsed.items():
        for section in _sections(table):
            if RUNTIME in section.get("containerd", {}).get("runtimes", {}):
                raise ConfigurationError(
                    f"{path} has a runtime {RUNTIME} that mpu-notify did not write: remove it first"
                )


def _handler(containerd: Table, plugin: str, shim: str, plan: Plan) -> str:
    """Our tables: like the default runtime (its cgroup driver above all), but for the program."""
    runtimes: Table = containerd.get("runtimes", {})
    name = containerd.get("default_runtime_name") or "runc"
    default: Table = runtimes.get(name, {})
    if default.get("runtime_type", _RUNC) != _RUNC:
        name, default = "runc", runtimes.get("runc", {})
    plan.behind = default.get("options", {}).get("BinaryName") or "runc"

    table = {key: value for key, value in default.items() if value and not isinstance(value, dict)}
    table["runtime_type"] = _RUNC
    for key in ("pod_annotations", "container_annotations"):
        table[key] = [*(value for value in table.get(key, []) if value != ANNOTATIONS), ANNOTATIONS]
    options = {key: value for key, value in default.get("options", {}).items() if value}
    options["BinaryName"] = shim

    lines: list[str] = []
    if not runtimes:
        # containerd 1 has runc by default only as long as no runtime is listed.
        lines += [*_table(plugin, "runc", {"runtime_type": _RUNC}), ""]
    lines += [*_table(plugin, RUNTIME, table), "", *_table(plugin, f"{RUNTIME}.options", options)]
    return "\n".join(lines) + "\n"


def _table(plugin: str, name: str, values: Table) -> Iterator[str]:
    yield f"[plugins.{quoted(plugin)}.containerd.runtimes.{name}]"
    yield from (f"{key} = {quoted(value)}" for key, value in values.items())


def _newline(text: str) -> str:
    return "\r\n" if "\r\n" in text else "\n"


def _with_block(path: str, text: str, body: str) -> str:
    newline = _newline(text)
    gap = newline if text and not text.endswith("\n") else ""
    after = text + gap + f"{_BEGIN}\n{body}{_END}\n".replace("\n", newline)
    return _checked(path, after, _merged(_toml.loads(text), _toml.loads(body)))


def _with_import(path: str, text: str, main: Table, drop_in_path: str) -> str:
    ours = quoted(drop_in_path)
    expected = deepcopy(main)
    expected["imports"] = [drop_in_path, *main.get("imports", [])]
    if "imports" in main:
        head = _IMPORTS.search(text)
        at = head.end() if head else 0
        after = text[:at] + ours + (", " if main["imports"] else "") + text[at:]
    else:
        added = _import_line(drop_in_path) + "\n"
        if not main:
            # An absent or empty file: containerd 2.2 reads conf.d only if it has no configuration, so say it here.
            expected |= {"version": 2, "imports": [posixpath.join(posixpath.dirname(drop_in_path), "*.toml")]}
            added = f"version = 2\nimports = {quoted(expected['imports'])}\n"
        after = added.replace("\n", _newline(text)) + text
    return _checked(path, after, expected)


def _import_line(drop_in_path: str) -> str:
    return f"imports = [{quoted(drop_in_path)}]  # mpu-notify configure"


def _checked(path: str, text: str, expected: Table) -> str:
    """The text, if it says what it should: the edit knows less of TOML than the parser."""
    try:
        if _toml.loads(text) == expected:
            return text
    except _toml.TOMLDecodeError:
        pass
    raise ConfigurationError(
        f"{path}: cannot add to this file safely, its CRI settings or imports are written in an unusual form: "
        "write them as plain tables first, as `containerd config dump` does"
    )


def _merged(one: Table, other: Table) -> Table:
    merged = dict(one)
    for key, value in other.items():
        old = merged.get(key)
        merged[key] = _merged(old, value) if isinstance(old, dict) and isinstance(value, dict) else value
    return merged
