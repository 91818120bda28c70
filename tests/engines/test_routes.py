"""What reaches a container of a stock runtime: a seccomp profile, a CDI device, and hooks."""

from __future__ import annotations

import json
import subprocess
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest

from tests import installation

from .agent import package
from .asking import Asking
from .conftest import Stage
from .engines import Docker, Engine, Podman, Wish

_SHIPPED = Path(__file__).parents[2] / "oci-hook"
_CDI_DEVICE = "mpu-notify.io/pids=enable"

podmans = pytest.mark.parametrize("name", ["podman", "podman-rootless"])


def _shipped(file: str) -> dict[str, Any]:
    """A file for engines, as it is once installed."""
    described: dict[str, Any] = json.loads((_SHIPPED / file).read_text().replace("@PACKAGE@", str(package())))
    return described


def _sees_its_own(asking: Asking) -> None:
    assert asking.next().pids == {1}


def _exec_sees_its_own_too(asking: Asking) -> None:
    further = asking.exec()
    assert further.pids == {1, further.pid}


def _exec_is_left_alone(asking: Asking) -> None:
    assert asking.container.host_pid in asking.exec().pids


@pytest.mark.parametrize("name", ["docker-26", "podman", "podman-rootless"])
def test_a_profile_covers_init_and_exec(stage: Stage, name: str) -> None:
    engine = stage.engine(name)
    profile = engine.setting.directory / "profile.json"
    command = [*installation.command(), "profile", name.partition("-")[0], "--listen", str(stage.agent_of(name).socket)]
    profile.write_bytes(subprocess.check_output(command))
    options = (f"--security-opt=seccomp={profile}",)
    asking = stage.out.start(engine, Wish(stock=True, opted_in=False, more=options))
    _sees_its_own(asking)
    _exec_sees_its_own_too(asking)


def test_a_cdi_device_covers_init_only(stage: Stage) -> None:
    engine = stage.engine("docker-26")
    assert isinstance(engine, Docker)
    device = _shipped("cdi/mpu-notify.json")
    for hook in device["devices"][0]["containerEdits"]["hooks"]:
        hook["args"] += ["--listen", str(stage.agent_of("docker-26").socket)]
    (engine.cdi_directory / "mpu-notify.json").write_text(json.dumps(device))
    asking = stage.out.start(engine, Wish(stock=True, opted_in=False, more=(f"--device={_CDI_DEVICE}",)))
    _sees_its_own(asking)
    _exec_is_left_alone(asking)


@contextmanager
def _hook(engine: Engine, described: dict[str, Any]) -> Iterator[None]:
    """An installed hook of a Podman."""
    assert isinstance(engine, Podman)
    file = engine.hooks_directory / "99-mpu-notify.json"
    file.write_text(json.dumps(described))
    try:
        yield
    finally:
        file.unlink()


@podmans
def test_an_injecting_hook_covers_init_only(stage: Stage, name: str) -> None:
    engine = stage.engine(name)
    described = _shipped("hooks.d/99-mpu-notify.json")
    described["hook"]["args"] += ["--config", str(engine.ours.config)]
    with _hook(engine, described):
        asking = stage.out.start(engine, Wish(stock=True))
        _sees_its_own(asking)
        _exec_is_left_alone(asking)


@podmans
def test_a_precreate_hook_covers_init_and_exec(stage: Stage, name: str) -> None:
    engine = stage.engine(name)
    described = _shipped("podman/99-mpu-notify-precreate.json")
    described["hook"]["args"] += ["--config", str(engine.ours.config)]
    with _hook(engine, described):
        asking = stage.out.start(engine, Wish(stock=True))
        _sees_its_own(asking)
        _exec_sees_its_own_too(asking)


@podmans
def test_a_container_with_two_routes_is_covered_once(stage: Stage, name: str) -> None:
    engine = stage.engine(name)
    described = _shipped("hooks.d/99-mpu-notify.json")
    described["hook"]["args"] += ["--config", str(engine.ours.config), "--absent", "refuse"]
    with _hook(engine, described):
        asking = stage.out.start(engine)
        _sees_its_own(asking)
        _exec_sees_its_own_too(asking)


@podmans
def test_hooks_leave_alone_who_did_not_opt_in(stage: Stage, name: str) -> None:
    engine = stage.engine(name)
    for file in "hooks.d/99-mpu-notify.json", "podman/99-mpu-notify-precreate.json":
        with _hook(engine, _shipped(file)):
            asking = stage.out.start(engine, Wish(stock=True, opted_in=False))
            assert asking.container.host_pid in asking.next().pids
