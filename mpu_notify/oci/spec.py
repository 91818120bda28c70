"""Rewriting the spec of a container (OCI config.json) so that its RM controls stop at our listener.

Pure functions over the decoded JSON. Whatever the container's seccomp profile says of any other call stays so:

* The runtimes hand a profile's rules to libseccomp, which lets the first rule without conditions beat all other rules
  of that syscall, and ignores a rule whose action is the default one. So only what is left then counts here.
* Of conditional rules that overlap, libseccomp may take either, and the other one as soon as there is one rule more. So
  no rule that we make overlaps one with another action: what a profile allows is cut into what is in one of the
  patterns of CONTROLS, which becomes a notification, and what is not. Where that cannot be done, or where rules of the
  profile overlap and differ, rewriting is refused.
* A profile that allows no RM control, or denies it for good, stays as it is.

Imports next to nothing: the runtime shim runs this under the eyes of whoever waits for a container to start.
"""

from __future__ import annotations

import json

from mpu_notify.errors import MpuNotifyError

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Iterable, Iterator, Mapping
    from typing import Any

    Json = Mapping[str, Any]
    Cube = tuple[int, int]

ANNOTATION = "io.mpu-notify.enable"

# These three say the same as mpu_notify.notify.filter, which is too much to import here.
MASK = 0x3FFF00FF
CONTROLS = (0x0020002A, 0x001000D3)
MACHINES = {"x86_64": ("X86_64", "X86", "X32"), "aarch64": ("AARCH64", "ARM")}

_NOTIFY = "SCMP_ACT_NOTIFY"
_PERMISSIVE = ("SCMP_ACT_ALLOW", "SCMP_ACT_LOG")
_ONLY_WITH_LISTENER = "SECCOMP_FILTER_FLAG_WAIT_KILLABLE_RECV"  # the kernel takes it with one only
_COMMAND = 1  # which argument of ioctl is the command
_LOW = 2**32 - 1  # what the kernel takes of it, on any ABI
_EPERM = 1
_ALL: Cube = (0, 0)


class SpecError(MpuNotifyError):
    """This spec cannot have our listener; the text names what is in the way."""


def opted_in(spec: Json) -> bool:
    """Whether the container's annotations ask for us; any JSON that is no spec does not."""
    annotations = spec.get("annotations") if isinstance(spec, dict) else None
    return isinstance(annotations, dict) and annotations.get(ANNOTATION) == "true"


def rewrite(spec: Json, socket: str, metadata: str, flags: Iterable[str], machine: str) -> Json:
    """The spec with our listener in it, or the same spec where it allows no RM control.

    A container without a profile gets one that allows everything else. Rewriting twice is rewriting once.
    `flags` are seccomp flags that the runtime takes, `machine` is as in `uname -m`. Raises SpecError.
    """
    spec = _object(spec, "it")
    linux = _object(spec.get("linux"), "linux")
    profile = _object(linux.get("seccomp"), "linux.seccomp")
    if not profile.get("defaultAction") and not profile.get("syscalls"):  # which is none to the runtimes
        profile = unconfined(machine)
    return {**spec, "linux": {**linux, "seccomp": listen(profile, socket, metadata, flags)}}


def _object(value: object, what: str) -> Json:
    if value is not None and not isinstance(value, dict):
        raise SpecError(f"cannot understand the spec: {what} is no object")
    return value or {}


def without_listener(spec: Json) -> Json:
    """The spec as it was before it was rewritten, but that what it had logged may just be allowed, or the same spec.

    A bundle that is started a second time has our listener in it already.
    """
    linux = spec.get("linux") or {}
    profile = linux.get("seccomp") or {}
    if not _is_ours(profile):
        return spec
    kept = {key: value for key, value in profile.items() if key not in ("listenerPath", "listenerMetadata", "flags")}
    remaining = [flag for flag in profile.get("flags") or [] if flag != _ONLY_WITH_LISTENER]
    syscalls = [
        {**entry, "action": _PERMISSIVE[0]} if entry.get("action") == _NOTIFY else entry
        for entry in profile.get("syscalls") or []
    ]
    seccomp = {**kept, **({"flags": remaining} if remaining else {}), "syscalls": syscalls}
    return {**spec, "linux": {**linux, "seccomp": seccomp}}


def _is_ours(profile: Json) -> bool:
    """Whether the listener in a profile was put there by us, for whichever socket."""
    try:
        metadata = json.loads(profile.get("listenerMetadata") or "")
    except (TypeError, ValueError):
        return False
    return bool(profile.get("listenerPath")) and isinstance(metadata, dict) and set(metadata) == {"container", "route"}


def unconfined(machine: str) -> Json:
    """The profile that allows everything, for all syscall ABIs of a machine."""
    architectures = [f"SCMP_ARCH_{abi}" for abi in MACHINES.get(machine, ())]
    return {"defaultAction": "SCMP_ACT_ALLOW", **({"architectures": architectures} if architectures else {})}


def listen(profile: Json, socket: str, metadata: str, flags: Iterable[str]) -> Json:
    """A seccomp profile with our listener in it; also one in Docker's form, with includes and excludes.

    The same profile where it allows no RM control. Raises SpecError.
    """
    present = profile.get("listenerPath")
    if present == socket or _is_ours(profile):
        return {**profile, "listenerPath": socket, "listenerMetadata": metadata}
    if present:
        raise SpecError(
            f"cannot have the seccomp profile listen at {socket}: it already has the listenerPath {present}, and the "
            f"kernel allows one listener. Start this container with another profile, or without {ANNOTATION}."
        )
    try:
        syscalls = list(_syscalls(profile))
        all_flags = list(dict.fromkeys([*(profile.get("flags") or []), *flags]))
    except (AttributeError, KeyError, TypeError, ValueError) as error:
        raise SpecError(f"cannot understand the seccomp profile: {type(error).__name__} {error}") from error
    if not any(rule["action"] == _NOTIFY for rule in syscalls):
        return profile
    return {
        **profile,
        **({"flags": all_flags} if all_flags else {}),
        "listenerPath": socket,
        "listenerMetadata": metadata,
        "syscalls": syscalls,
    }


def _syscalls(profile: Json) -> Iterator[Json]:
    ioctls: list[Json] = []
    for entry in profile.get("syscalls") or []:
        names = _names(entry)
        if _NOTIFY in (entry["action"], profile["defaultAction"]):
            raise SpecError(
                f"cannot have the seccomp profile stop RM controls: it already has {_NOTIFY} for {', '.join(names)}, "
                f"which would come to our listener. Take that out, or start this container without {ANNOTATION}."
            )
        if "ioctl" not in names:
            yield entry
            continue
        ioctls.extend(_rules(entry))
        others = [name for name in names if name != "ioctl"]
        if others:
            yield {**entry, "names": others}
    made: list[Json] = []
    for rule in _with_notifications(ioctls, _verdict(profile["defaultAction"], profile.get("defaultErrnoRet"))):
        if rule not in made:  # libseccomp may never come back from the second of two
            made.append(rule)
    yield from made


def _names(entry: Json) -> list[str]:
    return entry.get("names") or [entry["name"]]  # "name" is a form that Docker still takes


def _rules(entry: Json) -> Iterator[Json]:
    """The rules that the runtimes make of an entry for ioctl: one for each condition where two are on one argument."""
    rule = {**{key: value for key, value in entry.items() if key != "name"}, "names": ["ioctl"]}
    conditions = entry.get("args") or []
    if len({each["index"] for each in conditions}) == len(conditions):
        yield {**rule, "args": conditions}
    else:
        yield from ({**rule, "args": [each]} for each in conditions)


def _verdict(action: str, error: int | None) -> tuple[str, int]:
    """What makes two actions the same to the runtimes."""
    if action in ("SCMP_ACT_ERRNO", "SCMP_ACT_TRACE"):
        return action, _EPERM if error is None else error
    return "SCMP_ACT_KILL_THREAD" if action == "SCMP_ACT_KILL" else action, 0


def _with_notifications(rules: list[Json], default: tuple[str, int]) -> list[Json]:
    """Rules for ioctl with the same verdicts but a notification where an RM control would be allowed."""
    live = [(rule, _verdict(rule["action"], rule.get("errnoRet"))) for rule in rules]
    live = [each for each in live if each[1] != default]
    winner = next((each for each in live if _unconditional(each[0])), None)
    live = [winner] if winner else live
    made = list(_cut(live, default))
    if any(rule["action"] == _NOTIFY for rule in made):
        _refuse_contradictions([each for each in live if each[0]["action"] not in _PERMISSIVE])
    return made


def _cut(live: list[tuple[Json, tuple[str, int]]], default: tuple[str, int]) -> Iterator[Json]:
    permissive = default[0] in _PERMISSIVE
    if permissive:
        yield from _notify({}, _remaining_controls([rule for rule, _ in live if rule["action"] not in _PERMISSIVE]))
    for rule, verdict in live:
        if rule["action"] not in _PERMISSIVE:
            yield rule
            continue
        allowed = _commands(rule)
        stopped = [both for each in allowed for want in CONTROLS for both in _intersection(each, (MASK, want))]
        if not stopped:
            yield rule
            continue
        _refuse_orders(rule)
        _refuse_conflict(allowed, [other for other, its_verdict in live if its_verdict != verdict])
        if not permissive:
            yield from _notify(rule, stopped)
        yield from (_with_command(rule, cube) for cube in _without_controls(allowed))


def _unconditional(rule: Json) -> bool:
    return not (rule["args"] or rule.get("includes") or rule.get("excludes"))


def _refuse_orders(rule: Json) -> None:
    """libseccomp may never come back from rules that begin with the same order condition and go on in another way."""
    if any(each["op"] not in ("SCMP_CMP_EQ", "SCMP_CMP_MASKED_EQ") for each in _others(rule)):
        raise SpecError(
            "cannot have the seccomp profile stop RM controls: a rule that allows some compares an argument of ioctl "
            "that is not the command, and not by SCMP_CMP_EQ or MASKED_EQ. Change it, or start this container without "
            f"{ANNOTATION}."
        )


def _refuse_contradictions(denials: list[tuple[Json, tuple[str, int]]]) -> None:
    for number, (rule, verdict) in enumerate(denials):
        _refuse_conflict(_commands(rule), [other for other, its in denials[:number] if its != verdict])


def _refuse_conflict(commands: list[Cube], others: list[Json]) -> None:
    for other in others:
        if any(_intersection(one, two) for one in commands for two in _commands(other)):
            raise SpecError(
                "cannot have the seccomp profile stop RM controls: its rules for ioctl overlap, one with "
                f"{other['action']} for some of what another one speaks of. Make them exclude each other, or start "
                f"this container without {ANNOTATION}."
            )


def _remaining_controls(denials: list[Json]) -> list[Cube]:
    """The patterns of CONTROLS less what these rules deny."""
    cubes = [(MASK, want) for want in CONTROLS]
    for rule in denials:
        for denied in _commands(rule):
            if _others(rule) and any(_intersection(denied, cube) for cube in cubes):
                raise SpecError(
                    f"cannot have the seccomp profile stop RM controls: {rule['action']} for some of them depends on "
                    "an argument that is not the command. Take that condition out of the profile, or start this "
                    f"container without {ANNOTATION}."
                )
            # By the lower half alone: a difference in the upper one is none where 32 bits are compared.
            low = (denied[0] & _LOW, denied[1] & _LOW)
            cubes = [rest for cube in cubes for rest in _difference(cube, low)]
    return cubes


def _without_controls(cubes: list[Cube]) -> list[Cube]:
    for want in CONTROLS:
        cubes = [rest for cube in cubes for rest in _difference(cube, (MASK, want))]
    return cubes


def _notify(rule: Json, cubes: list[Cube]) -> Iterator[Json]:
    """Notifications under the other conditions of a rule."""
    kept = {key: rule[key] for key in ("includes", "excludes", "args") if key in rule}
    for cube in cubes:
        yield _with_command({"names": ["ioctl"], "action": _NOTIFY, **kept}, cube)


def _others(rule: Json) -> list[Json]:
    return [each for each in rule.get("args", []) if each["index"] != _COMMAND]


def _with_command(rule: Json, cube: Cube) -> Json:
    mask, value = cube
    condition = {"index": _COMMAND, "value": mask, "valueTwo": value, "op": "SCMP_CMP_MASKED_EQ"}
    return {**rule, "args": [*_others(rule), condition]}


# A set of commands is a list of cubes. A cube (mask, value) is all commands c with c & mask == value.


def _commands(rule: Json) -> list[Cube]:
    """The commands that a rule speaks of, as disjoint cubes."""
    condition = next((each for each in rule["args"] if each["index"] == _COMMAND), None)
    if condition is None:
        return [_ALL]
    value, operator = condition["value"], condition["op"]
    if operator == "SCMP_CMP_MASKED_EQ":
        return [(value, condition.get("valueTwo", 0) & value)]
    if operator == "SCMP_CMP_EQ":
        return [(2**64 - 1, value)]
    if operator == "SCMP_CMP_NE" and value <= _LOW:
        # Whatever is in the upper half: it does not make another command of this one.
        return list(_difference(_ALL, (_LOW, value)))
    raise SpecError(
        f"cannot have the seccomp profile stop RM controls: a rule for ioctl compares the command by {operator} with "
        f"{value:#x}. Name commands by SCMP_CMP_EQ, NE or MASKED_EQ, or start this container without {ANNOTATION}."
    )


def _intersection(one: Cube, two: Cube) -> list[Cube]:
    if (one[1] ^ two[1]) & one[0] & two[0]:
        return []
    return [(one[0] | two[0], one[1] | two[1])]


def _difference(one: Cube, two: Cube) -> Iterator[Cube]:
    """One less two, as disjoint cubes: each differs from two in one more bit, and agrees in those before it."""
    if not _intersection(one, two):
        yield one
        return
    mask, value = one
    missing = two[0] & ~mask
    while missing:
        bit = missing & -missing
        missing -= bit
        mask |= bit
        yield mask, value | (~two[1] & bit)
        value |= two[1] & bit
