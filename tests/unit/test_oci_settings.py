"""The configuration of the routes into a container, and what a runtime says it takes."""

from __future__ import annotations

import os
import re
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path

import pytest
from hypothesis import example, given
from hypothesis import strategies as st

from mpu_notify.oci import flags, settings
from mpu_notify.oci.agent import AgentAbsentError, is_there
from mpu_notify.supervisor import configuration

from .readers import compile_readers, runtime_section

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
        ('[agent]\nsockets = "/x"', "unknown key agent.sockets in config.toml, line 2"),
        ('[agent]\nopt_in = "name"', "unknown key agent.opt_in in config.toml"),
        ('socket = "/x"', "unknown key socket in config.toml, line 1"),
        ('[agent]\nabsent = "maybe"', "absent = 'maybe' in config.toml, line 2: must be one of start, refuse"),
        ('[agent]\nsocket = "agent.sock"', "must be an absolute path"),
        ("[agent]\nabsent = start", "cannot read 'absent = start' in config.toml, line 2"),
        ('[runtime]\npath = "a\\tb"', "cannot read"),
    ],
)
def test_what_is_wrong_is_named(text: str, problem: str) -> None:
    with pytest.raises(settings.SettingsError, match=problem):
        parse(text)


TOKENS = """[runtime] [ runtime [agent] [supervisor] [log.x] [log.runtime] [runtime.x] [ ] , x = == # #[runtime]
path opt_in socket pathology path="x" opt_in='name' ' " "/usr/bin/crun" 'runc' "" "name" 'name' "annotation" '/a"b'
"a\\b" é [log.é] [log.a-section-with-a-name-as-long-as-this-one-is]"""
SPACES = [" ", "\t", "\n", "\n", "\r", "\r\n", "\v", "\f", "\x1c", "\x85", "\u00a0", "\u2028", "\0"]
pieces = st.sampled_from([*TOKENS.split(), *SPACES])


@pytest.fixture(scope="module")
def file(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    """The configuration file of the test's own process."""
    compile_readers()
    file = tmp_path_factory.mktemp("settings") / "config.toml"
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv(settings.VARIABLE, str(file))
        yield file


@given(st.lists(pieces | st.text(max_size=2), max_size=20).map("".join))
@example("[log]\n[runtime\npath = 'x'")
@example("[runtime]\n[log.a-section-with-a-name-as-long-as-this-one-is]\npath = 'x'")
@example("[runtime]\n[log.é]\npath = 'x'")
@example("[log]\nx = [\n[runtime,\n]\npath = 'x'")
@example("[agent]\n\f[runtime]\npath = 'x'")
@example("# \0\n[runtime]\nopt_in = 'name'")
@example("[log]\nx\v[runtime]\vpath = 'x'")
def test_the_runtime_in_c_reads_what_python_reads(file: Path, text: str) -> None:
    file.write_bytes(text.encode())
    try:
        found = settings.load()
    except settings.SettingsError:
        return  # which the runtime leaves to Python to say
    assert runtime_section() == (found.runtime, found.opt_in == "name")


@given(st.binary(max_size=60))
def test_no_bytes_in_the_file_do_more_than_raise_a_settings_error(file: Path, text: bytes) -> None:
    file.write_bytes(text)
    with suppress(settings.SettingsError):
        settings.load()
    path, _ = runtime_section()
    assert path.encode(errors="surrogateescape") in text


@pytest.mark.parametrize(
    "text",
    [
        '[agent]\nabsent = "maybe"\n',
        "[runtime]\npath = 3\n",
        "[runtime]\noptin = 'name'\n",
        'agent.socket = "/run/x.sock"\n',
        '[agent]\nsocket = "a.sock"\n',
    ],
)
def test_serve_refuses_what_the_routes_refuse(tmp_path: Path, text: str) -> None:
    file = tmp_path / "config.toml"
    file.write_text(text)
    with pytest.raises(settings.SettingsError) as refused:
        settings.load(str(file))
    with pytest.raises(configuration.ConfigurationError, match=re.escape(str(refused.value))):
        configuration.load(file)


def test_serve_listens_where_the_routes_go(tmp_path: Path) -> None:
    file = tmp_path / "config.toml"
    file.write_text("[agent]\nsocket = '/run/x.sock'\n[supervisor]\nanswer_timeout = 2.5\n[log]\nlevel = 'debug'\n")
    found = configuration.load(file)
    assert (found.socket, found.answer_timeout, found.log.level) == (settings.load(str(file)).socket, 2.5, "debug")


def test_an_ordinary_user_may_have_a_file_of_their_own(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.delenv(settings.VARIABLE, raising=False)
    own = tmp_path / ".config/mpu-notify/config.toml"
    own.parent.mkdir(parents=True)
    for user, expected in ((1000, settings.FILE), (0, settings.FILE)):
        monkeypatch.setattr(os, "geteuid", lambda user=user: user)
        assert settings.file() == expected
    own.touch()
    assert settings.file() == settings.FILE
    monkeypatch.setattr(os, "geteuid", lambda: 1000)
    assert settings.file() == str(own)
    monkeypatch.setenv(settings.VARIABLE, "/named")
    assert settings.file() == "/named"


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
