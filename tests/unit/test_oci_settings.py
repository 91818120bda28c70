"""The configuration of the routes into a container, and what a runtime says it takes."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from mpu_notify.oci import flags, settings
from mpu_notify.oci.agent import AgentAbsentError, is_there

FEATURES = '{"linux": {"seccomp": {"supportedFlags": ["SECCOMP_FILTER_FLAG_TSYNC", "SECCOMP_FILTER_FLAG_SPEC_ALLOW"]}}}'


def parse(text: str) -> settings.Settings:
    return settings.parse(text, "config.toml")


def test_every_key_has_a_default(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv(settings.VARIABLE, str(tmp_path / "none"))
    for each in (parse(""), settings.load()):
        assert each.socket == "/run/mpu-notify/agent.sock"
        assert (each.absent, each.runtime, each.opt_in) == ("start", "", "annotation")


def test_keys_are_read(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    file = tmp_path / "config.toml"
    file.write_text(
        "# ours\n[agent]\nsocket = '/run/a b.sock' # where\nabsent=\"refuse\"\n\n"
        '[ runtime ]\npath = "/usr/bin/nvidia-container-runtime"\n  opt_in = "name"\n'
        "[supervisor]\nanything = [ 1,\n 2 ]\n[log.more]\nlevel = 3\n"
    )
    monkeypatch.setenv(settings.VARIABLE, str(file))
    found = settings.load()
    assert found.file == str(file)
    assert (found.socket, found.absent) == ("/run/a b.sock", "refuse")
    assert (found.runtime, found.opt_in) == ("/usr/bin/nvidia-container-runtime", "name")


@pytest.mark.parametrize(
    ("text", "problem"),
    [
        ("[agents]", r"unknown section \[agents\] in config.toml, line 1"),
        ("[agent.more]", r"unknown section \[agent.more\] in config.toml"),
        ('[agent]\nsockets = "/x"', "unknown key 'sockets' in config.toml, line 2"),
        ('[agent]\nopt_in = "name"', "unknown key 'opt_in' in config.toml"),
        ('socket = "/x"', "unknown key 'socket' in config.toml, line 1"),
        ('[agent]\nabsent = "maybe"', "absent = 'maybe' in config.toml, line 2: must be one of start, refuse"),
        ('[agent]\nsocket = "agent.sock"', "must be an absolute path"),
        ("[agent]\nabsent = start", "cannot read 'absent = start' in config.toml, line 2"),
        ('[runtime]\npath = "a\\tb"', "cannot read"),
    ],
)
def test_what_is_wrong_is_named(text: str, problem: str) -> None:
    with pytest.raises(settings.SettingsError, match=problem):
        parse(text)


def test_a_file_that_cannot_be_read_is_named(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv(settings.VARIABLE, str(tmp_path))
    with pytest.raises(settings.SettingsError, match=f"cannot read the configuration {tmp_path}"):
        settings.load()


def test_who_is_absent_is_named(tmp_path: Path) -> None:
    found = parse(f'[agent]\nsocket = "{tmp_path}/none.sock"')
    assert not is_there(found)
    found.absent = "refuse"
    with pytest.raises(AgentAbsentError, match=rf"{tmp_path}/none.sock.*config.toml.*mpu-notify serve"):
        is_there(found)


@pytest.mark.parametrize(
    ("features", "taken"),
    [
        (FEATURES, [flags.SPEC_ALLOW]),
        (FEATURES.replace("TSYNC", "WAIT_KILLABLE_RECV"), [flags.SPEC_ALLOW, flags.WAIT_KILLABLE_RECV]),
        ('{"linux": {"seccomp": {"enabled": true}}}', []),
        ("{}", []),
        ("no JSON", []),
    ],
)
def test_flags_by_features(features: str, taken: list[str]) -> None:
    assert flags.parse_features(features) == taken


@pytest.mark.parametrize(("version", "count"), [("1.8.1", 2), ("1.6", 2), ("1.5.9", 0), ("0.17", 0), ("2.0", 2)])
def test_flags_by_crun_version(version: str, count: int) -> None:
    assert len(flags.parse_version(f"crun version {version}\ncommit: abc\n")) == count


@pytest.mark.parametrize(("release", "count"), [("5.18.0-generic", 1), ("5.19", 2), ("6.1.0-13-amd64", 2)])
def test_flags_by_kernel(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, release: str, count: int) -> None:
    runtime = tmp_path / "crun"
    runtime.write_text('#!/bin/sh\n[ "$1" = --version ] && echo crun version 1.8.1\n')
    runtime.chmod(0o755)
    system = os.uname()
    monkeypatch.setattr(os, "uname", lambda: os.uname_result([*system[:2], release, *system[3:]]))
    assert len(flags.taken_by(str(runtime))) == count


def test_no_runtime_takes_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PATH", str(tmp_path))
    assert flags.taken_by_all() == []
    assert flags.taken_by(str(tmp_path / "runc")) == []
