"""Around `configure`: what containerd reads after it, and what works for containers after `unconfigure`."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import pytest

from .asking import Asking
from .conftest import Stage
from .engines import CRI_TABLE, Containerd, Docker, Engine, Podman
from .place import CommandError

dockers = pytest.mark.parametrize("engine", ["docker-20", "docker-26"], indirect=True)
with_ctr = pytest.mark.parametrize("engine", ["containerd-1.6", "containerd-1.7"], indirect=True)
with_cri = pytest.mark.parametrize("engine", ["cri-1.6", "cri-1.7"], indirect=True)
podmans = pytest.mark.parametrize("engine", ["podman", "podman-rootless"], indirect=True)


@contextmanager
def _unconfigured(engine: Engine) -> Iterator[str]:
    """Within, it is; the text is what its operator was told."""
    try:
        yield engine.unconfigure()
    finally:
        engine.configure()
        engine.reload()


def _go_on(*containers: Asking) -> None:
    for asking in containers:
        assert asking.next().pids == {1}
        further = asking.exec()
        assert further.pids == {1, further.pid}


@with_ctr
def test_containerd_may_import_all_that_lies_beside_a_file_that_configure_changes(engine: Engine) -> None:
    assert isinstance(engine, Containerd)
    folder = engine.place.path("/etc/imported")
    (folder / "conf.d").mkdir(parents=True)
    (folder / "config.toml").write_text('version = 2\nimports = ["/etc/imported/conf.d/*"]\n')
    (folder / "conf.d" / "cri.toml").write_text(f"version = 2\n[{CRI_TABLE}]\nsandbox_image = 'a'\n")
    engine.ours.run("configure", "containerd", "--config", "/etc/imported/config.toml")
    assert "containerd.runtimes.mpu-notify]" in engine.read("/etc/imported/config.toml")


@dockers
def test_docker_enters_stops_and_removes_them_but_does_not_start_them(stage: Stage, engine: Engine) -> None:
    assert isinstance(engine, Docker)
    one, other = stage.out.start(engine), stage.out.start(engine)
    with _unconfigured(engine) as said:
        assert all(engine.name_of(each.container) in said for each in (one, other))
        engine.serve_anew()
        _go_on(one, other)
        engine.client("stop", "--time=0", one.container.identifier)
        with pytest.raises(CommandError, match=r"runtime .*mpu-notify"):
            engine.client("start", one.container.identifier)
        stage.remove_containers()
    _go_on(stage.out.start(engine))


@with_ctr
def test_for_ctr_nothing_changes_while_the_handler_is_there(stage: Stage, engine: Engine) -> None:
    asking = stage.out.start(engine)
    with _unconfigured(engine) as said:
        assert "/etc/mpu-notify/runtimes/containerd stays" in said
        engine.serve_anew()
        _go_on(asking, stage.out.start(engine), asking.restart())


@with_cri
def test_pods_are_entered_and_removed_but_no_container_starts_in_them(stage: Stage, engine: Engine) -> None:
    one, other = stage.out.start(engine), stage.out.start(engine)
    with _unconfigured(engine) as said:
        assert "to find them: kubectl" in said
        engine.serve_anew()
        _go_on(one, other)
        with pytest.raises(CommandError, match='no runtime for "mpu-notify"'):
            one.restart()
        with pytest.raises(CommandError, match='no runtime for "mpu-notify"'):
            stage.out.start(engine)
        stage.remove_containers()
    _go_on(stage.out.start(engine))


@podmans
def test_podman_must_have_stopped_them_and_then_only_removes_them(stage: Stage, engine: Engine) -> None:
    assert isinstance(engine, Podman)
    running, stopped = stage.out.start(engine), stage.out.start(engine)
    engine.client("stop", "--time=0", stopped.container.identifier)
    with pytest.raises(CommandError) as refused:
        engine.unconfigure()
    assert f"podman stop {engine.name_of(running.container)}\n" in str(refused.value)
    _go_on(running)
    engine.client("stop", "--time=0", running.container.identifier)
    with _unconfigured(engine) as said:
        assert all(engine.name_of(each.container) in said for each in (running, stopped))
        with pytest.raises(CommandError, match="mpu-notify is missing"):
            engine.client("start", running.container.identifier)
        engine.client("rm", stopped.container.identifier)
    _go_on(running.restart())
