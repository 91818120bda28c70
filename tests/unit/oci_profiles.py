"""Seccomp profiles as the runtimes take them: the engines' defaults, and what libseccomp makes of a profile.

The defaults are read out of the distribution's packages, of those that are installed or as apt-get downloads them.
"""

from __future__ import annotations

import json
import os
import re
import subprocess
from collections import Counter
from collections.abc import Mapping
from functools import cache
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import pyseccomp

Profile = dict[str, Any]

#: AUDIT_ARCH_* by the name of the ABI, and the number of ioctl there.
ABIS = {"X86_64": (0xC000003E, 16), "X32": (0xC000003E, 0x40000000 + 514), "X86": (0x40000003, 54)}

#: Docker's and Podman's conditions on capabilities are taken as those of a container with these.
CAPABILITIES = ("CAP_CHOWN", "CAP_NET_BIND_SERVICE", "CAP_SYS_CHROOT")

_DOCKER = "usr/share/gocode/src/github.com/docker/docker/profiles/seccomp/default.json"
_CONTAINERD = "usr/share/gocode/src/github.com/containerd/containerd/contrib/seccomp/seccomp_default.go"
_GO_BLOCK = re.compile(
    r"Names:\s*\[\]string\{(?P<names>.*?)\},\s*Action:\s*specs\.(?P<action>\w+),(?P<rest>.*?)\n\t+\}", re.S
)
_GO_ARGUMENT = re.compile(r"Index:\s*(\d+),\s*Value:\s*(\w+),\s*(?:ValueTwo:\s*(\w+),\s*)?Op:\s*specs\.Op(\w+)")
_GO_OPERATORS = {"EqualTo": "EQ", "NotEqual": "NE", "MaskedEqual": "MASKED_EQ"}
_GO_CONSTANTS = {"unix.AF_ALG": 38}


def default_profiles() -> dict[str, Profile]:
    """The default profiles of Docker, Podman and containerd as a runtime gets them on x86-64."""
    docker = json.loads(_from_package("golang-github-docker-docker-dev", _DOCKER))
    podman = json.loads(_from_package("golang-github-containers-common", "usr/share/containers/seccomp.json"))
    containerd = _from_package("golang-github-containerd-containerd-dev", _CONTAINERD)
    return {"docker": _resolve(docker), "podman": _resolve(podman), "containerd": _read_go(containerd)}


@cache
def _from_package(package: str, path: str) -> str:
    installed = Path("/", path)
    if installed.exists():
        return installed.read_text()
    with TemporaryDirectory() as directory:
        subprocess.run(["apt-get", "-qq", "download", package], cwd=directory, check=True, capture_output=True)
        (archive,) = Path(directory).glob("*.deb")
        subprocess.run(["dpkg-deb", "-x", archive, directory], check=True)
        return Path(directory, path).read_text()


def _resolve(profile: Profile) -> Profile:
    """Docker's form as the engine resolves it: archMap, includes and excludes."""
    (architectures,) = (each for each in profile["archMap"] if each["architecture"] == "SCMP_ARCH_X86_64")
    kept = {key: profile[key] for key in ("defaultAction", "defaultErrnoRet") if key in profile}
    syscalls = [
        {key: entry[key] for key in ("names", "action", "args", "errnoRet") if entry.get(key) is not None}
        for entry in profile["syscalls"]
        if _applies(entry.get("includes") or {}, every=True) and not _applies(entry.get("excludes") or {}, every=False)
    ]
    return {
        **kept,
        "architectures": ["SCMP_ARCH_X86_64", *architectures["subArchitectures"]],
        "syscalls": syscalls,
    }


def _applies(conditions: Mapping[str, Any], *, every: bool) -> bool:
    holds = [capability in CAPABILITIES for capability in conditions.get("caps", [])]
    if "arches" in conditions:
        holds.append("amd64" in conditions["arches"])
    if "minKernel" in conditions:
        holds.append(True)
    return all(holds) if every else any(holds)


def _read_go(source: str) -> Profile:
    """containerd's profile, with what it allows for any capability and machine."""
    syscalls = []
    for block in _GO_BLOCK.finditer(source):
        entry: Profile = {"names": re.findall(r'"(\w+)"', block["names"])}
        entry["action"] = "SCMP_ACT_" + block["action"].removeprefix("Act").upper()
        entry["args"] = [
            {
                "index": int(index),
                "value": _go_value(value),
                "valueTwo": _go_value(two or "0"),
                "op": f"SCMP_CMP_{_GO_OPERATORS[op]}",
            }
            for index, value, two, op in _GO_ARGUMENT.findall(block["rest"])
        ]
        syscalls.append(entry)
    names = {name for entry in syscalls for name in entry["names"]}
    assert "ioctl" in names, "containerd's source is not written as it was"
    assert len(names) > 300, "containerd's source is not written as it was"
    return {
        "defaultAction": "SCMP_ACT_ERRNO",
        "architectures": ["SCMP_ARCH_X86_64", "SCMP_ARCH_X86", "SCMP_ARCH_X32"],
        "syscalls": syscalls,
    }


def _go_value(word: str) -> int:
    return _GO_CONSTANTS[word] if word in _GO_CONSTANTS else int(word, 0)


def compile_profile(profile: Profile) -> bytes:
    """The BPF program that runc and crun have libseccomp make of a profile. Raises OSError where that refuses it."""
    default = _action(profile["defaultAction"], profile.get("defaultErrnoRet"))
    rules = pyseccomp.SyscallFilter(default)
    for architecture in profile.get("architectures") or []:
        abi = getattr(pyseccomp.Arch, architecture.removeprefix("SCMP_ARCH_"))
        if not rules.exist_arch(abi):
            rules.add_arch(abi)
    for entry in profile.get("syscalls") or []:
        action = _action(entry["action"], entry.get("errnoRet"))
        if action != default:
            for name in entry["names"]:
                _add(rules, action, name, entry.get("args") or [])
    with os.fdopen(os.memfd_create("profile"), "w+b") as file:
        rules.export_bpf(file)
        file.seek(0)
        return file.read()


def _add(rules: Any, action: int, name: str, conditions: list[Profile]) -> None:
    try:
        number = pyseccomp.resolve_syscall(pyseccomp.Arch.NATIVE, name)
    except OSError:
        return  # a call that this libseccomp does not know
    arguments = [_argument(condition) for condition in conditions]
    # Two conditions on one argument are a rule each.
    if max(Counter(condition["index"] for condition in conditions).values(), default=0) > 1:
        for argument in arguments:
            rules.add_rule(action, number, argument)
    else:
        rules.add_rule(action, number, *arguments)


def _argument(condition: Profile) -> Any:
    operator = getattr(pyseccomp, condition["op"].removeprefix("SCMP_CMP_"))
    return pyseccomp.Arg(condition["index"], operator, condition["value"], condition.get("valueTwo", 0))


def _action(name: str, error: int | None) -> int:
    name = name.removeprefix("SCMP_ACT_")
    if name in ("ERRNO", "TRACE"):
        return int(getattr(pyseccomp, name)(1 if error is None else error))
    return int(getattr(pyseccomp, name))
