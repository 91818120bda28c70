"""What rewriting a spec does to its seccomp profile, asked of libseccomp's program for it before and after."""

from __future__ import annotations

import contextlib
import copy
import json
from pathlib import Path
from typing import Any

import pytest
from hypothesis import assume, event, example, given, settings
from hypothesis import strategies as st

from mpu_notify.cli import profile
from mpu_notify.cli.main import main as command
from mpu_notify.notify import filter as plain_filter
from mpu_notify.oci import docker_profile, precreate, shim, spec

from .oci_profiles import (
    ABIS,
    FLAGS,
    NOTIFY,
    RM_CONTROL,
    SOCKET,
    TIOCSTI,
    XFER,
    Profile,
    abis,
    commands,
    compile_profile,
    differences,
    is_control,
    listened,
    resolve,
    verdict,
    words,
)

ALLOW, LOG = 0x7FFF0000, 0x7FFC0000  # SECCOMP_RET_*


def rule(action: str, *conditions: tuple[int, str, int, int], **more: Any) -> Profile:
    arguments = [
        {"index": index, "op": f"SCMP_CMP_{op}", "value": value, "valueTwo": two}
        for index, op, value, two in conditions
    ]
    return {"names": ["ioctl"], "action": f"SCMP_ACT_{action}", "args": arguments, **more}


def profile_of(default: str, *syscalls: Profile) -> Profile:
    return {
        "defaultAction": f"SCMP_ACT_{default}",
        "architectures": ["SCMP_ARCH_X86_64", "SCMP_ARCH_X86", "SCMP_ARCH_X32"],
        "syscalls": list(syscalls),
    }


def expected(before: int, cmd: int) -> int:
    return NOTIFY if before in (ALLOW, LOG) and is_control(cmd) else before


def test_the_patterns_are_the_filters() -> None:
    assert plain_filter.RM_IOCTL_MASK == spec.MASK
    assert (plain_filter.RM_CONTROL_WANT, plain_filter.RM_XFER_WANT) == spec.CONTROLS
    assert plain_filter.MACHINES == spec.MACHINES


_values = st.one_of(
    st.sampled_from([RM_CONTROL, XFER, spec.CONTROLS[0], TIOCSTI, 0, 3, 7, 0xFFFFFFFFC020462A]), st.integers(0, 2**32)
)
_masks = st.sampled_from([spec.MASK, 0xFF, 0xFFFF, 0xFFFFFFFF, 2**64 - 1, 0x3FFF0000, 1, 1 << 40 | 0xFF])


@st.composite
def conditions(draw: st.DrawFn, *orders: str) -> tuple[int, str, int, int]:
    index = draw(st.sampled_from([1, 1, 1, 0, 2]))
    op = draw(st.sampled_from(["EQ", "EQ", "MASKED_EQ", "MASKED_EQ", *orders]))
    if op == "MASKED_EQ":
        return index, op, draw(_masks), draw(_values)
    return index, op, draw(_values), 0


_actions = st.sampled_from(["ALLOW", "ALLOW", "ALLOW", "LOG", "ERRNO", "KILL_PROCESS", "TRACE"])
_rules = st.builds(
    lambda action, conditions, error, name: {**rule(action, *conditions), "names": [name], **error},
    _actions,
    # libseccomp may never come back from two rules that begin with the same order condition.
    st.one_of(st.lists(conditions(), max_size=2), st.lists(conditions("NE", "LT", "GE"), max_size=1)),
    st.sampled_from([{}, {"errnoRet": 1}, {"errnoRet": 25}]),
    st.sampled_from(["ioctl", "ioctl", "ioctl", "personality"]),
)
_profiles = st.builds(
    lambda default, rules, error: {**profile_of(default, *rules), **error},
    st.sampled_from(["ERRNO", "ERRNO", "ALLOW", "LOG", "KILL_PROCESS"]),
    # libseccomp may never come back from the same conditions a second time.
    st.lists(_rules, max_size=4, unique_by=lambda rule: str(sorted(map(str, rule["args"])))),
    st.sampled_from([{}, {"defaultErrnoRet": 38}]),
)


def denied_below_32_bits(profile: Profile, cmd: int) -> bool:
    """Whether the profile allows all commands but cmd, and this one as well if its upper half is not 0."""
    excepted = [
        each["value"]
        for entry in profile["syscalls"]
        for each in entry["args"]
        if each["index"] == 1 and each["op"] == "SCMP_CMP_NE"
    ]
    return cmd >= 2**32 and cmd % 2**32 in excepted


@settings(max_examples=1500, deadline=None)
@example(profile_of("ERRNO", rule("ALLOW", (1, "NE", TIOCSTI, 0))), "X86_64", 0xFFFFFFFF_C020462A, 3)
@example(
    profile_of(
        "ALLOW",
        rule("ERRNO", (1, "EQ", RM_CONTROL, 0)),
        rule("KILL_PROCESS", (1, "MASKED_EQ", spec.MASK, RM_CONTROL)),
    ),
    "X86_64",
    RM_CONTROL,
    0,
)
@given(profile=_profiles, abi=abis, cmd=commands(), fd=st.sampled_from([0, 3, 7]))
def test_any_profile_stops_the_controls_that_it_allows(profile: Profile, abi: str, cmd: int, fd: int) -> None:
    untouched = copy.deepcopy(profile)
    try:
        before = compile_profile(profile)
    except OSError:
        assume(False)  # noqa: FBT003 - libseccomp takes no such profile
    try:
        after = listened(profile)
    except spec.SpecError:
        event("refused")
        return
    assert profile == untouched
    event("with a listener" if "listenerPath" in after else "without")
    assume(not denied_below_32_bits(profile, cmd))
    former = verdict(before, abi, cmd, fd)
    now = verdict(compile_profile(after), abi, cmd, fd)
    # Of a command with something above its 32 bits, what the profile denies without it need not be stopped.
    assert now == expected(former, cmd) or (now == former and cmd >= 2**32)


def check(profile: Profile) -> None:
    before, after = compile_profile(profile), compile_profile(listened(profile))
    for abi in ABIS:
        for cmd in (RM_CONTROL, XFER, TIOCSTI, 0, 5, 0xFFFFFFFF_C020462A, 0xC0204629, 2**32 - 1):
            for fd in (0, 3):
                assert verdict(after, abi, cmd, fd) == expected(verdict(before, abi, cmd, fd), cmd), (abi, hex(cmd), fd)


@pytest.mark.parametrize(
    "profile",
    [
        pytest.param(profile_of("ALLOW"), id="all allowed"),
        pytest.param(profile_of("LOG"), id="all logged"),
        pytest.param(profile_of("LOG", rule("ALLOW")), id="allowed, others logged"),
        pytest.param(profile_of("ERRNO", rule("ALLOW"), rule("ERRNO", (1, "EQ", 5, 0), errnoRet=9)), id="a dead rule"),
        pytest.param(
            profile_of("ERRNO", rule("ERRNO", (1, "EQ", 5, 0), errnoRet=9), rule("ALLOW")), id="a dead one first"
        ),
        pytest.param(profile_of("ERRNO", rule("ERRNO"), rule("ALLOW")), id="a rule that is the default"),
        pytest.param(profile_of("ERRNO", rule("ERRNO", errnoRet=9), rule("ALLOW")), id="the first of two"),
        pytest.param(profile_of("ERRNO", rule("ALLOW", (1, "NE", TIOCSTI, 0))), id="all but one"),
        pytest.param(profile_of("ALLOW", rule("ERRNO", (1, "EQ", TIOCSTI, 0))), id="one denied"),
        pytest.param(
            profile_of("ALLOW", rule("ERRNO", (1, "MASKED_EQ", 0xFFFFFFFF, RM_CONTROL))), id="RM control denied"
        ),
        pytest.param(profile_of("ALLOW", rule("KILL", (1, "MASKED_EQ", 0xFF, 0x2A))), id="some killed"),
        pytest.param(profile_of("ERRNO", rule("ALLOW", (1, "EQ", RM_CONTROL, 0))), id="RM control only"),
        pytest.param(profile_of("ERRNO", rule("ALLOW", (0, "EQ", 3, 0))), id="on one fd"),
        pytest.param(
            profile_of("ERRNO", rule("ALLOW", (0, "EQ", 3, 0), (1, "EQ", RM_CONTROL, 0))), id="on one fd only"
        ),
        pytest.param(profile_of("ERRNO", rule("ALLOW", (1, "EQ", 5, 0), (1, "EQ", XFER, 0))), id="one of two"),
        pytest.param(profile_of("ERRNO", rule("ALLOW", (1, "MASKED_EQ", 0xFF00, 0x4600))), id="by type"),
    ],
)
def test_a_profile_that_someone_may_have(profile: Profile) -> None:
    check(profile)
    assert "SCMP_ACT_NOTIFY" in json.dumps(listened(profile)) or profile["syscalls"][0]["action"] == "SCMP_ACT_ERRNO"


@pytest.mark.parametrize(
    "profile",
    [
        profile_of("ERRNO"),
        profile_of("ERRNO", rule("ALLOW", (1, "EQ", 0x5401, 0))),
        profile_of("ALLOW", rule("ERRNO")),
        profile_of("KILL"),
    ],
)
def test_a_profile_that_allows_no_control_stays(profile: Profile) -> None:
    assert listened(profile) == profile


@pytest.mark.parametrize(
    ("profile", "why"),
    [
        (profile_of("ERRNO", rule("ALLOW", (1, "GT", 5, 0))), r"SCMP_CMP_GT with 0x5"),
        (profile_of("ERRNO", rule("ALLOW", (1, "NE", 5, 0)), rule("KILL", (1, "EQ", 7, 0))), "overlap.*SCMP_ACT_KILL"),
        (profile_of("ALLOW", rule("ERRNO", (0, "EQ", 7, 0))), "not the command"),
        (profile_of("ERRNO", rule("ALLOW", (0, "LT", 7, 0))), "not by SCMP_CMP_EQ"),
        (profile_of("ALLOW", {"names": ["mount"], "action": "SCMP_ACT_NOTIFY"}), "SCMP_ACT_NOTIFY for mount"),
        ({**profile_of("ALLOW"), "listenerPath": "/run/other.sock"}, "listenerPath /run/other.sock"),
        ({"defaultAction": "SCMP_ACT_ALLOW", "syscalls": [{"names": ["ioctl"]}]}, "cannot understand.*action"),
    ],
)
def test_what_cannot_be_done_is_refused(profile: Profile, why: str) -> None:
    with pytest.raises(spec.SpecError, match=why):
        listened(profile)


@pytest.mark.parametrize("seccomp", [{}, {"seccomp": None}, {"seccomp": {}}])
def test_a_container_without_a_profile_gets_one(seccomp: Profile) -> None:
    config = {"process": {"args": ["x"]}, "linux": {"namespaces": [], **seccomp}}
    after = spec.rewrite(config, SOCKET, "{}", FLAGS, "x86_64")
    made = after["linux"]["seccomp"]
    assert after == {"process": {"args": ["x"]}, "linux": {"namespaces": [], "seccomp": made}}
    assert made["architectures"] == ["SCMP_ARCH_X86_64", "SCMP_ARCH_X86", "SCMP_ARCH_X32"]
    program = compile_profile(made)
    for abi in ABIS:
        assert verdict(program, abi, RM_CONTROL) == verdict(program, abi, XFER) == NOTIFY
        assert verdict(program, abi, TIOCSTI) == ALLOW


def test_the_listener_is_as_asked_for() -> None:
    config = {"linux": {"seccomp": {"defaultAction": "SCMP_ACT_ALLOW", "flags": [FLAGS[0], "SECCOMP_FILTER_FLAG_LOG"]}}}
    made = spec.rewrite(config, SOCKET, '{"container": "c"}', FLAGS, "x86_64")["linux"]["seccomp"]
    assert made["listenerPath"] == SOCKET
    assert made["listenerMetadata"] == '{"container": "c"}'
    assert made["flags"] == [FLAGS[0], "SECCOMP_FILTER_FLAG_LOG", FLAGS[1]]
    assert "architectures" not in made
    assert "flags" not in spec.rewrite({}, SOCKET, "", [], "riscv64")["linux"]["seccomp"]


def test_rewriting_twice_is_rewriting_once() -> None:
    once = spec.rewrite({"linux": {}}, SOCKET, "{}", FLAGS, "x86_64")
    assert spec.rewrite(once, SOCKET, "{}", FLAGS, "x86_64") == once
    again = spec.rewrite(once, SOCKET, '{"container": "other"}', [], "x86_64")
    assert again["linux"]["seccomp"] == {**once["linux"]["seccomp"], "listenerMetadata": '{"container": "other"}'}


METADATA = '{"container": "c", "route": "shim"}'


def test_a_listener_of_ours_moves_with_the_agent() -> None:
    once = spec.rewrite({"linux": {}}, "/run/old.sock", METADATA, FLAGS, "x86_64")
    again = spec.rewrite(once, SOCKET, '{"container": "d", "route": "shim"}', [], "x86_64")["linux"]["seccomp"]
    assert again["listenerPath"] == SOCKET
    assert json.loads(again["listenerMetadata"])["container"] == "d"


@settings(max_examples=500, deadline=None)
@given(profile=_profiles, abi=abis, cmd=commands(), fd=st.sampled_from([0, 3, 7]))
def test_without_our_listener_a_profile_says_what_it_said(profile: Profile, abi: str, cmd: int, fd: int) -> None:
    try:
        before = compile_profile(profile)
        once = spec.listen(profile, SOCKET, METADATA, FLAGS)
    except (OSError, spec.SpecError):
        assume(False)  # noqa: FBT003 - libseccomp takes no such profile, or we do not
    assume("listenerPath" in once)
    after = spec.without_listener({"linux": {"seccomp": once}})["linux"]["seccomp"]
    assert not [key for key in after if key.startswith("listener")]
    assert FLAGS[1] not in after.get("flags", [])
    assume(not denied_below_32_bits(profile, cmd))
    now, former = (verdict(program, abi, cmd, fd) for program in (compile_profile(after), before))
    assert now == former or {now, former} == {ALLOW, LOG}


@pytest.mark.parametrize("listener", [{}, {"listenerPath": "/x"}, {"listenerPath": "/x", "listenerMetadata": "theirs"}])
def test_what_is_not_ours_is_not_taken_out(listener: Profile) -> None:
    config = {"linux": {"seccomp": {**profile_of("ALLOW"), **listener}}}
    assert spec.without_listener(config) is config


def test_in_dockers_form_its_conditions_stay() -> None:
    includes = {"caps": ["CAP_SYS_ADMIN"]}
    entry = {**rule("ALLOW"), "names": ["mount", "ioctl"], "includes": includes}
    made = listened({"defaultAction": "SCMP_ACT_ERRNO", "archMap": [], "syscalls": [entry]})
    assert made["archMap"] == []
    assert made["syscalls"][0] == {**entry, "names": ["mount"]}
    assert all(each["names"] == ["ioctl"] and each["includes"] == includes for each in made["syscalls"][1:])


def test_its_old_form_is_taken() -> None:
    made = listened({"defaultAction": "SCMP_ACT_ERRNO", "syscalls": [{"name": "ioctl", "action": "SCMP_ACT_ALLOW"}]})
    assert all(each["names"] == ["ioctl"] and "name" not in each for each in made["syscalls"])
    assert verdict(compile_profile(made), "X86_64", RM_CONTROL) == NOTIFY


@pytest.mark.parametrize(
    ("config", "asked"),
    [
        ({"annotations": {spec.ANNOTATION: "true"}}, True),
        ({"annotations": {spec.ANNOTATION: "false"}}, False),
        ({"annotations": None}, False),
        ({"annotations": [spec.ANNOTATION]}, False),
        ({"hostname": spec.ANNOTATION}, False),
    ],
)
def test_only_the_annotation_opts_in(config: Profile, asked: bool) -> None:  # noqa: FBT001
    assert spec.opted_in(config) is asked


def test_the_verb_profile_prints_it(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    base = tmp_path / "base.json"
    base.write_text(json.dumps(profile_of("ERRNO", rule("ALLOW"))))
    assert command(["profile", "docker", "--base", str(base), "--listen", SOCKET]) == 0
    made = json.loads(capsys.readouterr().out)
    assert made["listenerPath"] == SOCKET
    assert json.loads(made["listenerMetadata"]) == {"container": "", "route": "profile"}
    assert verdict(compile_profile(made), "X86_64", RM_CONTROL) == NOTIFY


@pytest.mark.parametrize("named", [None, "", "builtin"])
def test_the_verb_profile_starts_from_dockers_own_default(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], named: str | None
) -> None:
    daemon = tmp_path / "daemon.json"
    if named is not None:
        daemon.write_text(json.dumps({"seccomp-profile": named}))
    monkeypatch.setattr(profile, "DAEMON_JSON", daemon)
    assert command(["profile", "docker", "--listen", SOCKET]) == 0
    made = compile_profile(resolve(json.loads(capsys.readouterr().out)))
    assert not differences(compile_profile(resolve(docker_profile.default())), made)


def test_or_from_the_default_that_the_daemon_is_given(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    own = tmp_path / "own.json"
    own.write_text(json.dumps(profile_of("ERRNO", rule("ALLOW"))))
    (tmp_path / "daemon.json").write_text(json.dumps({"seccomp-profile": str(own)}))
    monkeypatch.setattr(profile, "DAEMON_JSON", tmp_path / "daemon.json")
    assert command(["profile", "docker", "--listen", SOCKET]) == 0
    assert {name for each in json.loads(capsys.readouterr().out)["syscalls"] for name in each["names"]} == {"ioctl"}


def test_the_verb_profile_names_a_base_that_it_cannot_read(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert command(["profile", "podman", "--base", str(tmp_path / "none")]) == 1
    assert str(tmp_path / "none") in capsys.readouterr().err


DEEP = b'{"annotations": ' + b"[" * 100_000


def test_text_that_no_runtime_takes_is_left_to_the_runtime(tmp_path: Path) -> None:
    config = tmp_path / "config.json"
    for text in (
        b"",
        b"\xff",
        b"{",
        DEEP,
        b"[]",
        b'"io.mpu-notify.enable"',
        b'{"annotations": "io.mpu-notify.enable"}',
    ):
        assert precreate._edit(text, str(tmp_path / "none")) == text
        config.write_bytes(text)
        shim._prepare(str(tmp_path / "none"), "/bin/false", str(config), "c1", shim.RuntimeLog("", ""))
        assert config.read_bytes() == text


@pytest.mark.parametrize(
    "strange",
    [
        *(
            [],
            "x",
            {"linux": [1]},
            {"linux": "x"},
            {"linux": {"seccomp": 5}},
            {"linux": {"seccomp": {"syscalls": [{}]}}},
        ),
        {"linux": {"seccomp": {**profile_of("ALLOW"), "flags": 5}}},
        {"linux": {"seccomp": {**profile_of("ALLOW"), "flags": [[]]}}},
        {"linux": {"seccomp": {**profile_of("ALLOW"), "syscalls": ["ioctl"]}}},
    ],
)
def test_a_spec_that_is_none_is_refused(strange: Any) -> None:
    with pytest.raises(spec.SpecError, match="cannot understand"):
        spec.rewrite(strange, SOCKET, "{}", FLAGS, "x86_64")


anything = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=3),
    lambda x: st.lists(x, max_size=2) | st.dictionaries(st.text(max_size=3), x, max_size=2),
    max_leaves=5,
)


def mostly(good: st.SearchStrategy[Any]) -> st.SearchStrategy[Any]:
    return st.one_of(good, good, good, anything)


_conditions = st.fixed_dictionaries(
    {},
    optional={
        "index": mostly(st.integers(0, 5)),
        "value": mostly(words),
        "valueTwo": mostly(words),
        "op": mostly(st.sampled_from(["SCMP_CMP_EQ", "SCMP_CMP_NE", "SCMP_CMP_MASKED_EQ", "SCMP_CMP_LT"])),
    },
)
_actions = st.sampled_from(["SCMP_ACT_ALLOW", "SCMP_ACT_ERRNO", "SCMP_ACT_LOG", "SCMP_ACT_KILL", "SCMP_ACT_NOTIFY"])
_entries = st.fixed_dictionaries(
    {},
    optional={
        "names": mostly(st.lists(mostly(st.sampled_from(["ioctl", "read"])), max_size=2)),
        "name": mostly(st.just("ioctl")),
        "action": mostly(_actions),
        "args": mostly(st.lists(mostly(_conditions), max_size=2)),
        "errnoRet": mostly(st.integers(0, 99)),
        "includes": anything,
    },
)
_seccomp = st.fixed_dictionaries(
    {},
    optional={
        "defaultAction": mostly(_actions),
        "defaultErrnoRet": mostly(st.integers(0, 99)),
        "flags": mostly(st.lists(mostly(st.sampled_from(FLAGS)), max_size=2)),
        "listenerPath": mostly(st.sampled_from(["", SOCKET])),
        "syscalls": mostly(st.lists(mostly(_entries), max_size=3)),
    },
)
_specs = mostly(
    st.fixed_dictionaries(
        {},
        optional={
            "linux": mostly(st.fixed_dictionaries({}, optional={"seccomp": mostly(_seccomp)})),
            "annotations": mostly(st.dictionaries(st.just(spec.ANNOTATION), mostly(st.just("true")))),
        },
    )
)


@given(_specs)
def test_no_spec_does_more_than_raise_a_spec_error(strange: Any) -> None:
    before = copy.deepcopy(strange)
    assert isinstance(spec.opted_in(strange), bool)
    with contextlib.suppress(spec.SpecError):
        json.dumps(spec.rewrite(strange, SOCKET, "{}", FLAGS, "x86_64"))
    assert json.dumps(strange) == json.dumps(before), "what was given stays as it was"
