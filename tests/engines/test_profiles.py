"""The engines' default seccomp profiles: what rewriting does to them, and that ours of Docker is Docker's."""

from __future__ import annotations

import json
import secrets
import subprocess
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from mpu_notify.oci import docker_profile
from tests import installation
from tests.unit import bpf, oci_profiles
from tests.unit.oci_profiles import (
    ABIS,
    NOTIFY,
    Profile,
    abis,
    commands,
    compile_profile,
    differences,
    is_control,
    listened,
    verdict,
    words,
)

from .conftest import Stage
from .engines import NEWER, Engine, Wish

ENGINES = ("docker", "podman", "containerd")
ALLOW = 0x7FFF0000  # SECCOMP_RET_ALLOW
_SOURCES = NEWER / "share/gocode/src/github.com"
_PODMAN = Path("/usr/share/containers/seccomp.json")
_DOCKER = _SOURCES / "docker/docker/profiles/seccomp/default.json"
_CONTAINERD = _SOURCES / "containerd/containerd/contrib/seccomp/seccomp_default.go"


@pytest.fixture(scope="session")
def profiles(installed: None) -> dict[str, Profile]:  # noqa: ARG001 - the engines' files are there
    """By engine, its default profile as a runtime gets it on x86-64."""
    return {
        "docker": oci_profiles.resolve(json.loads(_DOCKER.read_text())),
        "podman": oci_profiles.resolve(json.loads(_PODMAN.read_text())),
        "containerd": oci_profiles.read_go(_CONTAINERD.read_text()),
    }


@pytest.fixture(scope="session")
def programs(profiles: dict[str, Profile]) -> dict[str, tuple[bytes, bytes]]:
    """By engine, the programs of its default profile before and after."""
    return {engine: (compile_profile(each), compile_profile(listened(each))) for engine, each in profiles.items()}


@pytest.mark.parametrize("name", ENGINES)
@given(abi=abis, cmd=commands(), fd=words)
def test_a_default_profile_stops_just_the_controls(
    programs: dict[str, tuple[bytes, bytes]], name: str, abi: str, cmd: int, fd: int
) -> None:
    _, after = programs[name]
    assert verdict(after, abi, cmd, fd) == (NOTIFY if is_control(cmd) else ALLOW)


@pytest.mark.parametrize("name", ENGINES)
@pytest.mark.parametrize("abi", ABIS)
def test_a_default_profile_says_the_same_of_every_other_call(
    programs: dict[str, tuple[bytes, bytes]], name: str, abi: str
) -> None:
    before, after = programs[name]
    arch, ioctl = ABIS[abi]
    base = 0x40000000 if abi == "X32" else 0
    for number in range(base, base + 600):
        if number != ioctl:
            args = (1, 0x5401, 2)
            assert bpf.run(before, number, arch, args) == bpf.run(after, number, arch, args), number


@pytest.mark.parametrize("name", ENGINES)
@given(abi=abis, number=st.integers(0, 600), args=st.lists(st.one_of(words, st.integers(0, 64)), max_size=6))
def test_whatever_its_arguments(
    programs: dict[str, tuple[bytes, bytes]], name: str, abi: str, number: int, args: list[int]
) -> None:
    before, after = programs[name]
    arch, ioctl = ABIS[abi]
    number += 0x40000000 if abi == "X32" else 0
    if number != ioctl:
        assert bpf.run(before, number, arch, args) == bpf.run(after, number, arch, args)


@pytest.mark.parametrize("name", ENGINES)
@given(arch=st.integers(0, 2**32 - 1), number=st.integers(-(2**31), 2**31 - 1))
def test_and_of_another_architecture(
    programs: dict[str, tuple[bytes, bytes]], name: str, arch: int, number: int
) -> None:
    before, after = programs[name]
    assert bpf.run(before, number, arch, []) == bpf.run(after, number, arch, [])


@pytest.mark.parametrize("capabilities", [(), ("SYS_ADMIN",), ("SYS_PTRACE", "SYS_NICE"), ("ALL",)])
def test_our_profile_says_what_dockers_own_default_says(stage: Stage, capabilities: tuple[str, ...]) -> None:
    engine = stage.engine("docker-26")
    added = tuple(f"--cap-add={capability}" for capability in capabilities)
    stock = compile_profile(_profile_in_use(engine, *added))
    ours = _profile_in_use(engine, *added, f"--security-opt=seccomp={_printed(stage, engine)}")
    assert ours["listenerPath"] == str(stage.agent_of("docker-26").socket)
    program = compile_profile(ours)
    assert differences(stock, program) == set()
    for abi in ABIS:
        for cmd in (0x5401, 0xC020462B, 0xC020462A):
            assert verdict(stock, abi, cmd) == ALLOW
            assert verdict(program, abi, cmd) == (NOTIFY if is_control(cmd) else ALLOW)


def test_under_our_profile_docker_denies_new_namespaces_as_before(stage: Stage) -> None:
    engine = stage.engine("docker-26")
    for option in "--security-opt=no-new-privileges", f"--security-opt=seccomp={_printed(stage, engine)}":
        asking = stage.out.start(engine, Wish(stock=True, opted_in=False, user=True, more=(option,)))
        answer = asking.container.exec("/bin/busybox", "sh", "-c", "/bin/busybox unshare -U true 2>&1 || echo denied")
        assert answer.splitlines() == ["unshare: unshare(0x10000000): Operation not permitted", "denied"]


def test_our_docker_profile_is_the_one_in_its_source(profiles: dict[str, Profile]) -> None:
    assert compile_profile(oci_profiles.resolve(docker_profile.default())) == compile_profile(profiles["docker"])


def _printed(stage: Stage, engine: Engine) -> Path:
    """What `mpu-notify profile docker` prints, in a file."""
    profile = engine.setting.directory / f"profile-{secrets.token_hex(4)}.json"
    command = [*installation.command(), "profile", "docker", "--listen", str(stage.agent_of("docker-26").socket)]
    profile.write_bytes(subprocess.check_output(command))
    return profile


def _profile_in_use(engine: Engine, *options: str) -> Profile:
    """The profile that an engine gives to a container with these options."""
    with engine.recording() as recorder:
        container = engine.start("/ask", "every", "1000", "/out/unused", wish=Wish(opted_in=False, more=options))
        before, _ = recorder.spec(container.identifier)
    profile: dict[str, Any] = json.loads(before)["linux"]["seccomp"]
    return profile
