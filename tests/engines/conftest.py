"""Real engines, a real agent and the stand-in driver. A missing engine is a failure: install.sh gets them."""

from __future__ import annotations

import shutil
import subprocess
import tempfile
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from pathlib import Path

import pytest

from mpu_notify.standin.process import StandIn

from . import images
from .agent import Agent, running_agent
from .asking import Out
from .cri import Cri
from .engines import CRUN, RUNC, Containerd, Docker, Engine, Podman, Runtime, Setting
from .place import Account, Place

#: By name, how each engine is made.
ENGINES: dict[str, Callable[[Setting], Engine]] = {
    "docker-20": Docker,
    "docker-20-remapped": lambda setting: Docker(setting, remapped=True),
    "docker-26": lambda setting: Docker(setting, newer=True),
    "docker-26-remapped": lambda setting: Docker(setting, newer=True, remapped=True),
    "containerd-1.6": Containerd,
    "containerd-1.7": lambda setting: Containerd(setting, newer=True),
    "cri-1.6": Cri,
    "cri-1.7": lambda setting: Cri(setting, newer=True),
    "podman": Podman,
    "podman-rootless": lambda setting: Podman(setting, rootless=True),
    "runc": lambda setting: Runtime(setting, RUNC),
    "crun": lambda setting: Runtime(setting, CRUN),
}


class Stage:
    """Everything that the engines of a session share; it starts engines when they are first asked for."""

    def __init__(self, directory: Path, standin: StandIn, undo: ExitStack) -> None:
        self._directory = directory
        self._undo = undo
        self._engines: dict[str, Engine] = {}
        self._agents: dict[Account | None, Agent] = {}
        self.device = standin.control_node
        self.out = Out(directory / "out")
        self.account = Account.create()
        undo.callback(self.account.remove)
        self._rootfs = images.make_rootfs(directory / "rootfs")
        self._layer = images.make_tar(self._rootfs, directory / "rootfs.tar")
        self._archive = images.make_oci_archive(self._layer, directory / "image.tar")

    def agent(self, account: Account | None = None) -> Agent:
        """The agent of root, or of a user: that of a rootless engine."""
        if account not in self._agents:
            name = f"agent-{account.name if account else 'root'}"
            agent = running_agent(self._directory / name, self.device, account)
            self._agents[account] = self._undo.enter_context(agent)
        return self._agents[account]

    def agent_of(self, name: str) -> Agent:
        """The agent that an engine's containers go to."""
        return self.agent(self.account if name == "podman-rootless" else None)

    def engine(self, name: str) -> Engine:
        """A running engine."""
        if name not in self._engines:
            directory = Path(tempfile.mkdtemp(prefix=f"{name}-", dir=self._directory))
            directory.chmod(0o711)
            place = Place()
            self._undo.callback(place.close)
            engine = ENGINES[name](
                Setting(
                    place,
                    directory,
                    self.agent_of(name).socket,
                    self.device.parent,
                    self.out.directory,
                    self._layer,
                    self._archive,
                    self._rootfs,
                    self.account,
                )
            )
            engine.up()
            self._undo.callback(engine.down)
            self._engines[name] = engine
        return self._engines[name]

    def remove_containers(self) -> None:
        for engine in self._engines.values():
            engine.remove_all()


@pytest.fixture(scope="session")
def installed() -> None:
    """The engines, and the files that the tests read of them, are there."""
    subprocess.run([Path(__file__).with_name("install.sh")], check=True)


@pytest.fixture(scope="session")
def _stage(installed: None) -> Iterator[Stage]:  # noqa: ARG001 - what it makes is on the disk
    # Paths of sockets are short, and an ordinary user gets here.
    directory = Path(tempfile.mkdtemp(prefix="mpu-engines-"))
    directory.chmod(0o755)
    with StandIn() as standin, ExitStack() as undo:
        undo.callback(shutil.rmtree, directory)
        yield Stage(directory, standin, undo)


@pytest.fixture
def stage(_stage: Stage) -> Iterator[Stage]:
    """The session's engines and agents; containers end with the test."""
    yield _stage
    _stage.remove_containers()


@pytest.fixture
def engine(request: pytest.FixtureRequest, stage: Stage) -> Engine:
    """The engine that the test is run with."""
    return stage.engine(request.param)
