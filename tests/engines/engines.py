"""The container engines, one class each: started by hand on sockets and directories of their own, and used alike."""

from __future__ import annotations

import json
import os
import secrets
import signal
from abc import ABC, abstractmethod
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from . import images
from .agent import ANNOTATION, Installation, Policy, Recorder, package
from .place import PATH, Account, CommandError, Daemon, Place, eventually, find_process

#: Of the newer Debian, where install.sh puts it.
NEWER = Path(__file__).parents[2] / "build" / "engines" / "newer-trixie" / "usr"
CRI_PROTO = NEWER / "share/gocode/src/k8s.io/cri-api/pkg/apis/runtime/v1/api.proto"
RUNC = "/usr/sbin/runc"
CRUN = "/usr/bin/crun"

RUNTIME = "mpu-notify"
CRI_TABLE = "plugins.'io.containerd.grpc.v1.cri'"
_FEW = 4
_HANDLER = "/etc/mpu-notify/runtimes/containerd"
_DROP_IN = "containers.conf.d/99-mpu-notify.conf"
_RELOADED = "Reloaded configuration"
_PROFILE = Path("/usr/share/containers/seccomp.json")


@dataclass(frozen=True)
class Wish:
    """How a container shall be; as it is by default, it opted in and is confined as the engine does by itself."""

    opted_in: bool = True
    absent: str = ""  # what is configured for want of an agent, where none is; "": one is there
    stock: bool = False  # not our runtime
    user: bool = False  # not root
    no_new_privileges: bool = False
    unconfined: bool = False
    privileged: bool = False
    read_only: bool = False
    init: bool = False
    user_namespace: bool = False
    pid_namespace_of: Container | None = None
    more: tuple[str, ...] = ()  # the engine's own options


@dataclass(frozen=True)
class Container:
    """A container that an engine started."""

    engine: Engine = field(repr=False)
    identifier: str
    command: tuple[str, ...]

    def exec(self, *command: str) -> str:
        return self.engine.exec(self, command)

    def restart(self) -> Container:
        restarted = self.engine.restart(self)
        self.engine.containers.remove(self)
        self.engine.containers.append(restarted)
        return restarted

    @property
    def host_pid(self) -> int:
        """The process that asks again and again, as the host numbers it."""
        eventually(lambda: find_process(*self.command) is not None, f"{self.command} runs")
        return find_process(*self.command) or 0


@dataclass
class Setting:
    """What an engine needs of the tests."""

    place: Place
    directory: Path  # the engine's own
    socket: Path  # the agent's
    gpu: Path
    out: Path
    layer: Path
    archive: Path
    rootfs: Path
    account: Account

    def below(self, name: str) -> Path:
        directory = self.directory / name
        directory.mkdir(exist_ok=True, parents=True)
        return directory


class Engine(ABC):
    """What all engines do, set up by `mpu-notify configure`. Containers that a test started are removed after it."""

    #: What follows `configure`.
    configured_as: tuple[str, ...] = ()
    #: Whether annotations come to the runtime. Where not, the runtime's name opts in.
    annotates = True

    def __init__(self, setting: Setting, account: Account | None = None) -> None:
        self.setting = setting
        self.place = setting.place
        self.account = account
        self.env = {"PATH": PATH, **self._environment()}
        self.ours = Installation(setting.place, setting.directory, setting.socket, self.env, account)
        self.containers: list[Container] = []

    def _environment(self) -> dict[str, str]:
        return {}

    def configure(self, *more: str) -> None:
        """As its operator does it."""
        self.ours.run("configure", *self.configured_as, *more)

    def unconfigure(self) -> str:
        """The same; what they are told."""
        return self.ours.run("unconfigure", *self.configured_as)

    @contextmanager
    def recording(self) -> Iterator[Recorder]:
        """Within, it is kept what our runtime does to config.json."""
        recorder = Recorder(self.setting.below(f"recorder-{secrets.token_hex(4)}"))
        self.configure("--runtime-path", str(recorder.program))
        try:
            yield recorder
        finally:
            self.configure()

    def reload(self) -> None:  # noqa: B027 - nothing to do where there is no daemon
        """What `configure` says to run then."""

    def serve_anew(self) -> None:  # noqa: B027 - as above
        """What `unconfigure` says to run then."""

    def start(self, *command: str, wish: Wish | None = None) -> Container:
        """Start a container in the background. Raises CommandError."""
        name = f"mpu-{secrets.token_hex(6)}"
        wish = wish or Wish()
        self._follow(Policy("name" if wish.opted_in and not self.annotates else "annotation", wish.absent))
        try:
            identifier = self._start(name, command, wish)
        except BaseException:
            self._remove(name)
            raise
        container = Container(self, identifier, command)
        self.containers.append(container)
        return container

    def remove_all(self) -> None:
        """End the containers of a test, the last one first: it may be in the first one's namespace."""
        containers, self.containers = self.containers, []
        if len(containers) < _FEW:
            for container in reversed(containers):
                self._remove(container.identifier)
        else:
            with ThreadPoolExecutor(_FEW) as pool:
                list(pool.map(lambda container: self._remove(container.identifier), containers))

    def _follow(self, policy: Policy) -> None:
        self.ours.follow(policy)

    @abstractmethod
    def up(self) -> None:
        """Start the engine and give it its image."""

    def down(self) -> None:
        """Stop it, where it is a process."""
        assert not self.containers

    @abstractmethod
    def _start(self, name: str, command: Sequence[str], wish: Wish) -> str:
        """Start a container; its id."""

    @abstractmethod
    def exec(self, container: Container, command: Sequence[str]) -> str:
        """A further command in a container; its output."""

    @abstractmethod
    def restart(self, container: Container) -> Container:
        """Stop and start a container; what it is then."""

    @abstractmethod
    def _remove(self, name: str) -> None:
        """End and remove a container, which may never have been made."""


def _newer_first() -> dict[str, str]:
    # Where a Debian's own Docker and containerd look for programs, they find their own version first.
    return {"PATH": f"{NEWER / 'sbin'}:{NEWER / 'bin'}:{PATH}"}


class _DockerLike(Engine):
    """What Docker and Podman have in common: their command line."""

    init_option: tuple[str, ...] = ("--init",)
    remove_options: tuple[str, ...] = ()

    @abstractmethod
    def client(self, *words: str) -> str:
        """The engine's own command; its output."""

    def _start(self, name: str, command: Sequence[str], wish: Wish) -> str:
        options = [f"--name={name}", "--network=none", *self._cgroup(), *wish.more]
        options += [f"--volume={self.setting.gpu}:{images.GPU}", f"--volume={self.setting.out}:{images.OUT}"]
        options += [] if wish.stock else [f"--runtime={RUNTIME}"]
        if wish.opted_in and self.annotates:
            options.append(f"--annotation={ANNOTATION}=true")
        options += [f"--user={images.USER}:{images.USER}"] if wish.user else []
        options += ["--security-opt=no-new-privileges"] if wish.no_new_privileges else []
        options += ["--security-opt=seccomp=unconfined"] if wish.unconfined else []
        options += ["--privileged"] if wish.privileged else []
        options += ["--read-only"] if wish.read_only else []
        options += self.init_option if wish.init else []
        options += self._user_namespace() if wish.user_namespace else []
        options += [f"--pid=container:{wish.pid_namespace_of.identifier}"] if wish.pid_namespace_of else []
        return self.client("run", "--detach", *options, images.NAME, *command).strip()

    def name_of(self, container: Container) -> str:
        return self.client("inspect", "--format", "{{.Name}}", container.identifier).strip().lstrip("/")

    def _cgroup(self) -> list[str]:
        return [f"--cgroup-parent=/{self.place.cgroup}"]

    def _user_namespace(self) -> list[str]:
        return []

    def exec(self, container: Container, command: Sequence[str]) -> str:
        return self.client("exec", container.identifier, *command)

    def restart(self, container: Container) -> Container:
        self.client("restart", "--time=0", container.identifier)
        return container

    def _remove(self, name: str) -> None:
        self.client("rm", "--force", *self.remove_options, name)


class Docker(_DockerLike):
    """A dockerd with a containerd of its own."""

    configured_as = ("docker",)

    def __init__(self, setting: Setting, *, newer: bool = False, remapped: bool = False) -> None:
        self.newer = newer
        self.remapped = remapped
        self.annotates = newer
        self._socket = setting.directory / "docker.sock"
        super().__init__(setting)

    def _environment(self) -> dict[str, str]:
        return _newer_first() if self.newer else {}

    def up(self) -> None:
        config: dict[str, Any] = {
            "data-root": str(self.setting.below("data")),
            "exec-root": str(self.setting.below("exec")),
            "pidfile": str(self.setting.directory / "dockerd.pid"),
            "hosts": [f"unix://{self._socket}"],
            "bridge": "none",
            "iptables": False,
            "ip6tables": False,
            "storage-driver": "overlay2",
            "exec-opts": ["native.cgroupdriver=cgroupfs"],
            "live-restore": True,
        }
        if self.newer:
            config |= {"features": {"cdi": True}, "cdi-spec-dirs": [str(self.cdi_directory)]}
        if self.remapped:
            config["userns-remap"] = self.setting.account.name
        file = self.place.path("/etc/docker/daemon.json")
        file.parent.mkdir(exist_ok=True)
        file.write_text(json.dumps(config))
        self.configure()
        self._serve()
        self.client("import", str(self.setting.layer), images.NAME)

    def _serve(self) -> None:
        self._daemon = Daemon(self.place, self.setting.directory / "log", self.program("sbin/dockerd"), env=self.env)
        self._daemon.wait_for(self._socket.exists)

    def serve_anew(self) -> None:
        self._daemon.stop()
        self._serve()

    def reload(self) -> None:
        reloads = self._daemon.log.read_text().count(_RELOADED)
        self._daemon.signal(signal.SIGHUP)
        eventually(lambda: self._daemon.log.read_text().count(_RELOADED) > reloads, "dockerd reads its configuration")

    def down(self) -> None:
        self._daemon.stop()

    @property
    def cdi_directory(self) -> Path:
        return self.setting.below("cdi")

    def program(self, name: str) -> str:
        return str((NEWER if self.newer else Path("/usr")) / name)

    def client(self, *words: str) -> str:
        return self.place.run(self.program("bin/docker"), "--host", f"unix://{self._socket}", *words)


class Podman(_DockerLike):
    """Podman, as root or as an ordinary user."""

    # The init of Debian's tini; Podman's own is not among what it depends on.
    init_option = ("--init", "--init-path=/usr/bin/tini-static")
    remove_options = ("--time=0",)

    def __init__(self, setting: Setting, *, rootless: bool = False) -> None:
        self._home = setting.below("home")
        # Where its own configuration is, as its user writes it.
        self._etc = self._home / ".config/containers" if rootless else setting.place.path("/etc/containers")
        self.configured_as = ("podman", *(("--config", str(self._etc / _DROP_IN)) if rootless else ()))
        super().__init__(setting, setting.account if rootless else None)

    def _environment(self) -> dict[str, str]:
        return {"HOME": str(self._home), "XDG_RUNTIME_DIR": str(self.setting.below("runtime"))}

    def up(self) -> None:
        self._etc.mkdir(parents=True, exist_ok=True)
        (self._etc / "storage.conf").write_text(
            f'[storage]\ndriver = "overlay"\ngraphroot = "{self.setting.below("graph")}"\n'
            f'runroot = "{self.setting.below("run")}"\n'
        )
        # A ulimit above our own may not be had; without systemd there is neither its cgroup manager nor its journal.
        (self._etc / "containers.conf").write_text(
            '[containers]\ndefault_ulimits = ["nofile=1024:1024", "nproc=4096:4096"]\nnetns = "none"\n'
            'log_driver = "k8s-file"\n'
            '[engine]\ncgroup_manager = "cgroupfs"\nevents_logger = "file"\nruntime = "crun"\n'
            f'tmp_dir = "{self.setting.below("tmp")}"\nhooks_dir = ["{self.hooks_directory}"]\n'
        )
        self._follow(Policy())
        if self.account:
            for each in (self.setting.directory, *self.setting.directory.rglob("*")):
                os.chown(each, self.account.uid, self.account.uid)
        self.configure()
        self.client("import", str(self.setting.layer), images.NAME)

    def down(self) -> None:
        self.client("system", "migrate")  # ends the process that keeps a user's namespace open

    @property
    def hooks_directory(self) -> Path:
        return self.setting.below("hooks.d")

    def client(self, *words: str) -> str:
        return self.place.run("/usr/bin/podman", *words, account=self.account, env=self.env)

    def _remove(self, name: str) -> None:
        eventually(lambda: self._is_removed(name), f"the end of container {name}")

    def _is_removed(self, name: str) -> bool:
        try:
            super()._remove(name)
        except CommandError as error:
            # Now and then Podman finds a container's /dev/shm still mounted, by its own doing.
            if "device or resource busy" not in str(error):
                raise
            return False
        return True

    def _cgroup(self) -> list[str]:
        return [] if self.account else super()._cgroup()

    def _user_namespace(self) -> list[str]:
        if self.account:
            return ["--userns=auto"]
        mapping = f"0:{self.setting.account.first_subordinate}:65536"
        return [f"--uidmap={mapping}", f"--gidmap={mapping}"]


class Containerd(Engine):
    """A containerd of its own, used by ctr; see cri.py for how Kubernetes uses it."""

    configured_as = ("containerd",)

    def __init__(self, setting: Setting, *, newer: bool = False) -> None:
        self.newer = newer
        self.socket = setting.directory / "containerd.sock"
        super().__init__(setting)

    def _environment(self) -> dict[str, str]:
        return _newer_first() if self.newer else {}

    def up(self) -> None:
        self.place.path("/etc/containerd/config.toml").write_text(self._settings())
        self.configure()
        self._serve()
        for namespace in ("default", "k8s.io"):
            self._ctr("--namespace", namespace, "images", "import", str(self.setting.archive))

    def _settings(self) -> str:
        """What its operator has in config.toml."""
        return (
            f"version = 2\nroot = '{self.setting.below('root')}'\nstate = '{self.setting.below('state')}'\n"
            f"[grpc]\naddress = '{self.socket}'\n"
            f"[{CRI_TABLE}]\nsandbox_image = '{images.NAME}'\nrestrict_oom_score_adj = true\n"
        )

    def _serve(self) -> None:
        # With user namespaces ctr forgets --runc-binary, and runc is what comes first in PATH.
        runc = self.setting.below("bin") / "runc"
        if not runc.is_symlink():
            runc.symlink_to(_HANDLER)
        env = {**self.env, "PATH": f"{runc.parent}:{self.env['PATH']}"}
        self._daemon = Daemon(self.place, self.setting.directory / "log", self.program("bin/containerd"), env=env)
        self._daemon.wait_for(self.socket.exists)

    def serve_anew(self) -> None:
        self._daemon.stop()
        self.socket.unlink(missing_ok=True)
        self._serve()

    def reload(self) -> None:
        self.serve_anew()

    def program(self, name: str) -> str:
        return str((NEWER if self.newer else Path("/usr")) / name)

    def down(self) -> None:
        self._daemon.stop()

    def read(self, config: str) -> str:
        """What containerd makes of a configuration."""
        return self.place.run(self.program("bin/containerd"), "--config", config, "config", "dump", env=self.env)

    def _ctr(self, *words: str) -> str:
        return self.place.run(self.program("bin/ctr"), "--address", self.socket, *words)

    def _start(self, name: str, command: Sequence[str], wish: Wish) -> str:
        options = ["--detach", "--null-io", f"--cgroup=/{self.place.cgroup}/{name}", *wish.more]
        for source, target in (self.setting.gpu, images.GPU), (self.setting.out, images.OUT):
            options += ["--mount", f"type=bind,src={source},dst={target},options=rbind:rw"]
        options += ["--runc-binary", RUNC if wish.stock else _HANDLER]
        options += ["--annotation", f"{ANNOTATION}=true"] if wish.opted_in else []
        options += [] if wish.no_new_privileges else ["--allow-new-privs"]
        options += [] if wish.unconfined or wish.privileged else ["--seccomp"]
        options += ["--privileged"] if wish.privileged else []
        options += ["--read-only"] if wish.read_only else []
        if wish.user_namespace:
            mapping = f"0:{self.setting.account.first_subordinate}:65536"
            options += ["--uidmap", mapping, "--gidmap", mapping]
        if wish.pid_namespace_of:
            options += ["--with-ns", f"pid:/proc/{wish.pid_namespace_of.host_pid}/ns/pid"]
        image = images.NAME_AS_USER if wish.user else images.NAME
        self._ctr("run", *options, image, name, *command)
        return name

    def exec(self, container: Container, command: Sequence[str]) -> str:
        identifier = f"e{secrets.token_hex(6)}"
        return self._ctr("tasks", "exec", "--exec-id", identifier, container.identifier, *command)

    def restart(self, container: Container) -> Container:
        self._ctr("tasks", "delete", "--force", container.identifier)
        self._ctr("tasks", "start", "--detach", "--null-io", container.identifier)
        return container

    def _remove(self, name: str) -> None:
        for words in (("tasks", "delete", "--force", name), ("containers", "delete", name)):
            try:
                self._ctr(*words)
            except CommandError as error:  # noqa: PERF203 - two rounds
                if "not found" not in str(error):
                    raise


class Runtime(Engine):
    """runc or crun with no engine above it, so that there is nothing to configure: whoever calls it calls ours."""

    def __init__(self, setting: Setting, program: str) -> None:
        super().__init__(setting)
        self.program = program
        self._ours = package() / "_bin" / "mpu-notify-runtime"

    def _follow(self, policy: Policy) -> None:
        self.ours.follow(policy, f'path = "{self.program}"')

    @contextmanager
    def recording(self) -> Iterator[Recorder]:
        recorder = Recorder(self.setting.below(f"recorder-{secrets.token_hex(4)}"))
        ours, self._ours = self._ours, recorder.program
        try:
            yield recorder
        finally:
            self._ours = ours

    def up(self) -> None:
        self.place.run(self.program, "--version")

    def _start(self, name: str, command: Sequence[str], wish: Wish) -> str:
        bundle = self.setting.below(f"bundles/{name}")
        (bundle / "config.json").write_text(json.dumps(self._spec(name, command, wish)))
        self._run(name)
        return name

    def _spec(self, name: str, command: Sequence[str], wish: Wish) -> dict[str, Any]:
        """What `runc spec` makes, so changed."""
        directory = self.setting.below(f"specs/{name}")
        self.place.run(RUNC, "spec", "--bundle", directory)
        spec: dict[str, Any] = json.loads((directory / "config.json").read_text())
        process, linux = spec["process"], spec["linux"]
        process |= {"terminal": False, "args": list(command), "noNewPrivileges": wish.no_new_privileges}
        process.pop("rlimits")
        process["user"] = {"uid": images.USER, "gid": images.USER} if wish.user else {"uid": 0, "gid": 0}
        spec["root"] = {"path": str(self.setting.rootfs), "readonly": wish.read_only}
        spec["mounts"] = [mount for mount in spec["mounts"] if mount["type"] != "cgroup"]
        for source, target in (self.setting.gpu, images.GPU), (self.setting.out, images.OUT):
            mount = {"destination": str(target), "type": "bind", "source": str(source), "options": ["rbind", "rw"]}
            spec["mounts"].append(mount)
        spec["annotations"] = {ANNOTATION: "true"} if wish.opted_in else {}
        linux["cgroupsPath"] = f"/{self.place.cgroup}/{name}"
        if not wish.unconfined:
            linux["seccomp"] = default_profile()
        if wish.user_namespace:
            mapping = {"containerID": 0, "hostID": self.setting.account.first_subordinate, "size": 65536}
            linux |= {"uidMappings": [mapping], "gidMappings": [mapping]}
            linux["namespaces"].append({"type": "user"})
        if wish.pid_namespace_of:
            shared = {"type": "pid", "path": f"/proc/{wish.pid_namespace_of.host_pid}/ns/pid"}
            linux["namespaces"] = [shared if each["type"] == "pid" else each for each in linux["namespaces"]]
        return spec

    def _run(self, name: str) -> None:
        # In the background a container's standard output is that of the command, which nobody reads to its end.
        bundle = self.setting.below(f"bundles/{name}")
        log = bundle / "log"
        script = '"$0" "$@" >"$LOG" 2>&1 || { cat "$LOG" >&2; exit 1; }'
        words = [str(self._ours), "--root", self._root(), "run", "--detach", "--bundle", str(bundle), name]
        self.place.run("/usr/bin/env", f"LOG={log}", "sh", "-c", script, *words)

    def _root(self) -> str:
        return str(self.setting.below("state"))

    def _command(self, *words: str) -> str:
        return self.place.run(self._ours, "--root", self._root(), *words)

    def exec(self, container: Container, command: Sequence[str]) -> str:
        return self._command("exec", container.identifier, *command)

    def restart(self, container: Container) -> Container:
        self._remove(container.identifier)
        self._run(container.identifier)
        return container

    def _remove(self, name: str) -> None:
        if (self.setting.below("state") / name).exists():
            self._command("delete", "--force", name)


def default_profile() -> dict[str, Any]:
    """The default profile of Podman as a runtime takes it: only the rules that hold everywhere."""
    shipped = json.loads(_PROFILE.read_text())
    everywhere: tuple[dict[str, object], ...] = ({}, {"arches": ["amd64", "x32"]})
    rules = [
        {key: rule[key] for key in ("names", "action", "args", "errnoRet") if rule.get(key) is not None}
        for rule in shipped["syscalls"]
        if rule["includes"] in everywhere and not rule["excludes"]
    ]
    return {"defaultAction": shipped["defaultAction"], "architectures": ["SCMP_ARCH_X86_64"], "syscalls": rules}
