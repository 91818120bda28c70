"""Which seccomp flags of ours an OCI runtime takes: one that it does not know makes it refuse the whole profile."""

# Pathlib would be a large part of the shim's time.
# ruff: noqa: PTH105, PTH116, PTH118, PTH119, PTH123

from __future__ import annotations

import json
import os
import re

SPEC_ALLOW = "SECCOMP_FILTER_FLAG_SPEC_ALLOW"
WAIT_KILLABLE_RECV = "SECCOMP_FILTER_FLAG_WAIT_KILLABLE_RECV"
RUNTIMES = ("runc", "crun")  # in the order in which the shim takes the first, too

_WAIT_KILLABLE_KERNEL = (5, 19)
_CRUN_WITH_FLAGS = (1, 6)


def taken_by(runtime: str, cache: str = "") -> list[str]:
    """The flags that the runtime at this path takes on this kernel.

    Asking it takes as long as Python's start, so what runc and crun themselves said is kept in the directory `cache`,
    if not anybody may write there, for as long as the program stays the same. What another runtime says may depend on
    more than that.
    """
    if not cache or os.path.basename(runtime) not in RUNTIMES:
        return _asked(runtime)
    try:
        if os.stat(cache).st_mode & 0o002:
            return _asked(runtime)
        status = os.stat(runtime)
        key = f"{status.st_dev} {status.st_ino} {status.st_size} {status.st_mtime_ns} {os.uname().release}"
        file = os.path.join(cache, f"flags-{os.path.basename(runtime)}.json")
        known = _remembered(file, key)
        return _remember(file, key, _asked(runtime)) if known is None else known
    except OSError:
        return _asked(runtime)


def _remembered(file: str, key: str) -> list[str] | None:
    try:
        with open(file, encoding="utf-8") as stream:
            known = json.load(stream)
        return [flag for flag in (SPEC_ALLOW, WAIT_KILLABLE_RECV) if flag in known[key]]
    except (FileNotFoundError, ValueError, KeyError, TypeError):
        return None


def _remember(file: str, key: str, taken: list[str]) -> list[str]:
    new = f"{file}.{os.getpid()}"
    fd = os.open(new, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, 0o644)
    with open(fd, "w", encoding="utf-8") as stream:
        json.dump({key: taken}, stream)
    os.replace(new, file)
    return taken


def _asked(runtime: str) -> list[str]:
    features = _output(runtime, "features")
    flags = parse_features(features) if features else parse_version(_output(runtime, "--version"))
    release = tuple(int(number) for number in re.findall(r"\d+", os.uname().release)[:2])
    return [flag for flag in flags if flag != WAIT_KILLABLE_RECV or release >= _WAIT_KILLABLE_KERNEL]


def taken_by_all() -> list[str]:
    """The flags that every runtime in PATH takes, for a profile of which it is not known who gets it."""
    paths = [os.path.join(folder, name) for folder in os.get_exec_path() for name in RUNTIMES]
    answers = [taken_by(path) for path in paths if os.access(path, os.X_OK)]
    return [flag for flag in (SPEC_ALLOW, WAIT_KILLABLE_RECV) if answers and all(flag in each for each in answers)]


def parse_features(features: str) -> list[str]:
    """Our flags in the output of a runtime's `features`."""
    try:
        supported = json.loads(features)["linux"]["seccomp"]["supportedFlags"]
        return [flag for flag in (SPEC_ALLOW, WAIT_KILLABLE_RECV) if flag in supported]
    except (ValueError, KeyError, TypeError):
        return []


def parse_version(version: str) -> list[str]:
    """Our flags by the output of `--version` of a runtime that has no `features`."""
    crun = re.match(r"crun version (\d+)\.(\d+)", version)
    return [SPEC_ALLOW, WAIT_KILLABLE_RECV] if crun and (int(crun[1]), int(crun[2])) >= _CRUN_WITH_FLAGS else []


def _output(*command: str) -> str:
    """What a command prints on its standard output, nothing where it fails."""
    ours, theirs = os.pipe()
    null = os.open(os.devnull, os.O_RDWR)
    redirections = [(os.POSIX_SPAWN_DUP2, fd, to) for fd, to in ((null, 0), (theirs, 1), (null, 2))]
    try:
        child = os.posix_spawn(command[0], command, os.environ, file_actions=redirections)
    except OSError:
        os.close(ours)
        return ""
    finally:
        os.close(null)
        os.close(theirs)
    with open(ours, encoding="utf-8", errors="replace") as stream:
        text = stream.read()
    return text if os.waitpid(child, 0)[1] == 0 else ""
