"""Seccomp profiles as the runtimes take them: the engines' defaults, and what libseccomp makes of a profile.

Where a default is written down in an engine's source, that is read here; which file that is, the caller knows.
"""

from __future__ import annotations

import os
import re
from collections import Counter
from collections.abc import Mapping
from typing import Any

import pyseccomp
from hypothesis import strategies as st

from mpu_notify.oci import spec

from . import bpf

Profile = dict[str, Any]

#: AUDIT_ARCH_* by the name of the ABI, and the number of ioctl there.
ABIS = {"X86_64": (0xC000003E, 16), "X32": (0xC000003E, 0x40000000 + 514), "X86": (0x40000003, 54)}

SOCKET = "/run/agent.sock"
NOTIFY = 0x7FC00000  # SECCOMP_RET_USER_NOTIF
TIOCSTI = 0x5412
RM_CONTROL, XFER = 0xC020462A, 0xC01046D3
FLAGS = ["SECCOMP_FILTER_FLAG_SPEC_ALLOW", "SECCOMP_FILTER_FLAG_WAIT_KILLABLE_RECV"]

#: Docker's and Podman's conditions on capabilities are taken as those of a container with these.
CAPABILITIES = ("CAP_CHOWN", "CAP_NET_BIND_SERVICE", "CAP_SYS_CHROOT")

_GO_BLOCK = re.compile(
    r"Names:\s*\[\]string\{(?P<names>.*?)\},\s*Action:\s*specs\.(?P<action>\w+),(?P<rest>.*?)\n\t+\}", re.S
)
_GO_ARGUMENT = re.compile(r"Index:\s*(\d+),\s*Value:\s*(\w+),\s*(?:ValueTwo:\s*(\w+),\s*)?Op:\s*specs\.Op(\w+)")
_GO_OPERATORS = {"EqualTo": "EQ", "NotEqual": "NE", "MaskedEqual": "MASKED_EQ"}
_GO_CONSTANTS = {"unix.AF_ALG": 38}


abis = st.sampled_from(sorted(ABIS))
words = st.integers(0, 2**64 - 1)


@st.composite
def commands(draw: st.DrawFn) -> int:
    """Commands, most of them like an RM control but for a few bits."""
    base = draw(st.sampled_from([RM_CONTROL, XFER, RM_CONTROL & spec.MASK, TIOCSTI, 0x5401, 0, 7]))
    flips = draw(st.lists(st.integers(0, 63), max_size=3))
    for bit in flips:
        base ^= 1 << bit
    return draw(st.sampled_from([base, draw(words)]))


def is_control(cmd: int) -> bool:
    return cmd & spec.MASK in spec.CONTROLS


def listened(profile: Profile) -> Profile:
    return dict(spec.listen(profile, SOCKET, "{}", FLAGS))


def verdict(program: bytes, abi: str, cmd: int, fd: int = 3) -> int:
    arch, number = ABIS[abi]
    return bpf.run(program, number, arch, [fd, cmd, 0])


def resolve(profile: Profile) -> Profile:
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


def read_go(source: str) -> Profile:
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


def differences(one: bytes, other: bytes) -> set[tuple[str, int]]:
    """The calls, by ABI and number, for which two programs say different things; ioctl is left out."""
    found = set()
    for abi, (arch, ioctl) in ABIS.items():
        base = 0x40000000 if abi == "X32" else 0
        for number in range(base, base + 600):
            for args in ((1, 0x5401, 2), (0x10000000, 0, 0), (40, 8, 0)):
                if number != ioctl and bpf.run(one, number, arch, args) != bpf.run(other, number, arch, args):
                    found.add((abi, number))
    return found


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
