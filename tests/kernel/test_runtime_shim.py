"""mpu-notify-runtime in front of the real runc and crun, with an agent that is the test itself."""

from __future__ import annotations

import fcntl
import json
import os
import shutil
import socket
import struct
import subprocess
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest

from mpu_notify.oci import flags, precreate
from mpu_notify.oci.spec import ANNOTATION

from .harness import SECONDS, eventually

SHIM = Path(precreate.__file__).parents[1] / "_bin/mpu-notify-runtime"
PRECREATE = Path(precreate.__file__)
TRAPPED = 77  # the errno that our agent answers with
BAD_FD = 9  # and what the kernel says of an ioctl on none

ASK = """
#include <errno.h>
#include <stdio.h>
#include <sys/ioctl.h>
int main(void) {
    errno = 0; ioctl(-1, 0xC020462A, 0);
    int control = errno; errno = 0; ioctl(-1, 0x5401, 0);
    printf("%d %d\\n", control, errno);
}
"""

MASKED = {"index": 1, "op": "SCMP_CMP_MASKED_EQ", "value": 0x3FFF00FF, "valueTwo": 0x0020002A}

# What nvidia-container-runtime does: adds a prestart hook and an environment variable, then becomes its own runtime.
CHAINED = """#!/usr/bin/python3
import json, os, sys
words = sys.argv[1:]
if "create" in words or "run" in words:
    path = os.path.join(words[words.index("--bundle") + 1], "config.json")
    spec = json.load(open(path))
    spec.setdefault("hooks", {}).setdefault("prestart", []).append({"path": "/bin/true"})
    spec["process"]["env"].append("CHAINED=1")
    json.dump(spec, open(path, "w"))
os.execv(%r, [%r, *words])
"""


@dataclass
class Agent:
    """Takes listeners and answers all that is trapped with TRAPPED."""

    path: Path
    states: list[dict[str, Any]] = field(default_factory=list)
    listeners: list[int] = field(default_factory=list)

    def serve(self, server: socket.socket) -> None:
        while True:
            try:
                connection, _ = server.accept()
            except OSError:
                return
            with connection:
                message, fds, _, _ = socket.recv_fds(connection, 65536, 4)
            if message:  # else somebody only looked whether we are here
                self.listeners += fds
                self.states.append(json.loads(message))
                threading.Thread(target=self.answer, args=(fds[0],), daemon=True).start()

    @staticmethod
    def answer(listener: int) -> None:
        notification = bytearray(80)
        while True:
            notification[:] = bytes(80)
            try:
                fcntl.ioctl(listener, 0xC0502100, notification)  # SECCOMP_IOCTL_NOTIF_RECV
                response = struct.pack("=QqiI", *struct.unpack_from("=Q", notification), 0, -TRAPPED, 0)
                fcntl.ioctl(listener, 0xC0182101, response)  # SECCOMP_IOCTL_NOTIF_SEND
            except OSError:
                return

    def metadata(self) -> list[dict[str, str]]:
        return [json.loads(state["metadata"]) for state in self.states]


@pytest.fixture
def agent(tmp_path: Path) -> Iterator[Agent]:
    server = socket.socket(socket.AF_UNIX)
    found = Agent(tmp_path / "agent.sock")
    server.bind(str(found.path))
    server.listen()
    thread = threading.Thread(target=found.serve, args=(server,))
    thread.start()
    yield found
    server.shutdown(socket.SHUT_RDWR)
    server.close()
    thread.join(SECONDS)
    for listener in found.listeners:
        os.close(listener)


@pytest.fixture(scope="session")
def rootfs(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("rootfs")
    source = root.parent / "ask.c"
    source.write_text(ASK)
    for folder in ("bin", "proc", "sys", "dev", "tmp"):
        (root / folder).mkdir()
    subprocess.run(["gcc", "-static", "-O1", "-o", root / "bin/ask", source], check=True)
    shutil.copy("/bin/busybox", root / "bin/busybox")
    return root


class Bundle:
    """A container to be, with its own configuration of ours."""

    def __init__(self, directory: Path, rootfs: Path, runtime: str) -> None:
        self.directory = directory / "bundle"
        self.directory.mkdir()
        self.config = self.directory / "config.json"
        self.settings = directory / "config.toml"
        self.log = directory / "log"
        self.root = directory / "state"
        self.id = f"mpu-test-{os.getpid()}-{runtime}"
        self.runtime = runtime
        subprocess.run([runtime, "spec"], cwd=self.directory, check=True)
        spec = json.loads(self.config.read_text())
        spec["root"] = {"path": str(rootfs), "readonly": True}
        spec["process"].update(terminal=False, args=["/bin/ask"], rlimits=[])
        spec["annotations"] = {ANNOTATION: "true"}
        self.write(spec)
        self.configure()

    def spec(self) -> dict[str, Any]:
        spec: dict[str, Any] = json.loads(self.config.read_text())
        return spec

    def write(self, spec: dict[str, Any]) -> None:
        self.config.write_text(json.dumps(spec))

    def change(self, **what: Any) -> None:
        self.write({**self.spec(), **what})

    def configure(self, absent: str = "start", path: str | Path | None = None, opt_in: str = "annotation") -> None:
        self.settings.write_text(
            f'[agent]\nsocket = "{self.directory.parent}/agent.sock"\nabsent = "{absent}"\n'
            f'[runtime]\npath = "{path or shutil.which(self.runtime)}"\nopt_in = "{opt_in}"\n'
        )

    def call(
        self, *words: str | Path, program: Path = SHIM, plain: bool = False, **more: Any
    ) -> subprocess.CompletedProcess[str]:
        """Call the runtime in front of it all, in a mount namespace without a second cgroup hierarchy: crun's wish."""
        script = 'umount /sys/fs/cgroup/unified 2>/dev/null; exec "$@"'
        return subprocess.run(
            [
                "unshare",
                "-m",
                "--propagation",
                "private",
                "sh",
                "-c",
                script,
                "sh",
                program,
                *([] if plain else ["--root", self.root]),
                *words,
            ],
            env={**os.environ, "MPU_NOTIFY_CONFIG": str(self.settings)},
            text=True,
            check=False,
            timeout=SECONDS,
            **{"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, **more},
        )

    def run(self, *flags: str | Path, program: Path = SHIM) -> subprocess.CompletedProcess[str]:
        return self.call("--log", self.log, *flags, "run", "--bundle", self.directory, self.id, program=program)

    def end(self) -> None:
        self.call("delete", "--force", self.id)


@pytest.fixture(params=flags.RUNTIMES)
def bundle(request: pytest.FixtureRequest, tmp_path: Path, rootfs: Path) -> Iterator[Bundle]:
    made = Bundle(tmp_path, rootfs, request.param)
    yield made
    made.end()
    assert not list(made.directory.glob("config.json.*"))


@contextmanager
def untouched(bundle: Bundle) -> Iterator[None]:
    before, status = bundle.config.read_bytes(), bundle.config.stat()
    yield
    after = bundle.config.stat()
    assert bundle.config.read_bytes() == before
    assert (after.st_ino, after.st_mtime_ns) == (status.st_ino, status.st_mtime_ns)


def check_trapped(result: subprocess.CompletedProcess[str]) -> None:
    assert (result.stdout, result.returncode) == (f"{TRAPPED} {BAD_FD}\n", 0), result.stderr


def check_not_trapped(result: subprocess.CompletedProcess[str]) -> None:
    assert (result.stdout, result.returncode) == (f"{BAD_FD} {BAD_FD}\n", 0), result.stderr


def test_a_container_that_opted_in_is_listened_to(bundle: Bundle, agent: Agent) -> None:
    bundle.config.chmod(0o640)
    os.chown(bundle.config, 12, 34)
    check_trapped(bundle.run())
    assert agent.metadata() == [{"container": bundle.id, "route": "shim"}]
    assert agent.states[0]["state"]["id"] == bundle.id
    status = bundle.config.stat()
    assert (status.st_mode & 0o777, status.st_uid, status.st_gid) == (0o640, 12, 34)
    runtime = shutil.which(bundle.runtime)
    assert runtime
    assert bundle.spec()["linux"]["seccomp"].get("flags", []) == flags.taken_by(runtime)


def test_with_a_profile_of_its_own(bundle: Bundle, agent: Agent) -> None:
    spec = bundle.spec()
    spec["linux"]["seccomp"] = {
        "defaultAction": "SCMP_ACT_LOG",
        "syscalls": [
            {"names": ["ioctl", "read"], "action": "SCMP_ACT_ALLOW"},
            {"names": ["mount"], "action": "SCMP_ACT_ERRNO"},
        ],
    }
    bundle.write(spec)
    check_trapped(bundle.run())
    assert len(agent.states) == 1


def test_each_exec_has_a_listener_too(bundle: Bundle, agent: Agent) -> None:
    spec = bundle.spec()
    spec["process"]["args"] = ["/bin/busybox", "sleep", "1000"]
    bundle.write(spec)
    quiet = {"stdin": subprocess.DEVNULL, "stdout": subprocess.DEVNULL, "stderr": subprocess.DEVNULL}
    assert bundle.call("create", "--bundle", bundle.directory, bundle.id, **quiet).returncode == 0
    assert bundle.call("start", bundle.id).returncode == 0
    check_trapped(bundle.call("exec", bundle.id, "/bin/ask"))
    check_trapped(bundle.call("exec", bundle.id, "/bin/ask"))
    assert agent.metadata() == [{"container": bundle.id, "route": "shim"}] * 3
    assert json.loads(bundle.call("state", bundle.id).stdout)["status"] == "running"


@pytest.mark.parametrize("annotations", [{}, {ANNOTATION: "false"}, {"other": ANNOTATION}])
def test_a_container_that_did_not_is_not_touched(bundle: Bundle, agent: Agent, annotations: dict[str, str]) -> None:
    bundle.change(annotations=annotations)
    with untouched(bundle):
        check_not_trapped(bundle.run())
    assert not agent.states


def test_all_of_a_runtime_may_opt_in(bundle: Bundle, agent: Agent) -> None:
    bundle.change(annotations={})
    bundle.configure(opt_in="name")
    check_trapped(bundle.run())
    assert len(agent.states) == 1


def test_without_an_agent_it_starts(bundle: Bundle) -> None:
    with untouched(bundle):
        check_not_trapped(bundle.run("--log-format", "json"))
    warning = json.loads(bundle.log.read_text().splitlines()[0])
    assert warning["level"] == "warning"
    assert "agent.sock" in warning["msg"]
    assert "without mpu-notify" in warning["msg"]


@pytest.mark.parametrize("form", ["json", "text"])
def test_without_an_agent_it_is_refused_if_set_so(bundle: Bundle, form: str) -> None:
    bundle.configure(absent="refuse")
    with untouched(bundle):
        result = bundle.run(f"--log-format={form}")
    assert (result.stdout, result.returncode) == ("", 1)
    (line,) = bundle.log.read_text().splitlines()
    if form == "json":
        entry = json.loads(line)
        assert set(entry) == {"level", "msg", "time"}
        assert entry["level"] == "error"
        line = entry["msg"]
    else:
        assert " level=error msg=" in line
    for text in (line, result.stderr):
        assert "agent.sock" in text
        assert "mpu-notify serve" in text


def test_a_foreign_listener_is_refused_by_name(bundle: Bundle, agent: Agent) -> None:
    spec = bundle.spec()
    spec["linux"]["seccomp"] = {"defaultAction": "SCMP_ACT_ALLOW", "listenerPath": "/run/other.sock"}
    bundle.write(spec)
    with untouched(bundle):
        result = bundle.run("--log-format", "json")
    assert result.returncode == 1
    assert "/run/other.sock" in json.loads(bundle.log.read_text())["msg"]
    assert not agent.states


def test_a_wrong_configuration_hurts_only_who_opted_in(bundle: Bundle) -> None:
    bundle.settings.write_text(bundle.settings.read_text() + 'colour = "red"\n')
    result = bundle.run()
    assert result.returncode == 1
    assert f"unknown key runtime.colour in {bundle.settings}" in result.stderr
    bundle.change(annotations={})
    check_not_trapped(bundle.run())


def test_both_orders_of_chaining(bundle: Bundle, agent: Agent, tmp_path: Path) -> None:
    real = shutil.which(bundle.runtime)
    for name, inner in (("nvidia-first", SHIM), ("nvidia-behind", real)):
        before = bundle.config.read_text()
        other = tmp_path / name
        other.write_text(CHAINED % (str(inner), str(inner)))
        other.chmod(0o755)
        bundle.configure(path=other if inner == real else real)
        check_trapped(bundle.run(program=other if inner == SHIM else SHIM))
        spec = bundle.spec()
        assert "CHAINED=1" in spec["process"]["env"]
        assert spec["hooks"]["prestart"] == [{"path": "/bin/true"}]
        bundle.config.write_text(before)
    assert len(agent.states) == 2


ECHO = """#!/bin/sh
printf '%s\\n' "$0" "$@" >$ECHO_TO
"""


@pytest.fixture
def echoed(bundle: Bundle, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Has a program in the place of the real runtime that writes its words into this file."""
    program, words = tmp_path / "runc", tmp_path / "words"
    program.write_text(ECHO)
    program.chmod(0o755)
    bundle.configure(path=program)
    monkeypatch.setenv("ECHO_TO", str(words))
    return words


@pytest.mark.parametrize(
    "words",
    [
        ["state", "x"],
        ["--debug", "--new-flag", "value", "kill", "x", "KILL"],
        ["--new-flag=create", "list"],
        [],
        ["--log"],
        ["-"],
        ["--log-format", "create", "delete", "x"],
        ["exec", "x", "run", "--bundle", "{bundle}"],
    ],
)
def test_other_verbs_go_through_as_they_are(bundle: Bundle, echoed: Path, words: list[str]) -> None:
    bundle.change(hostname="changed")
    words = [word.format(bundle=bundle.directory) for word in words]
    with untouched(bundle):
        assert bundle.call(*words).returncode == 0
    assert echoed.read_text().splitlines()[1:] == ["--root", str(bundle.root), *words]


@pytest.mark.parametrize(
    "words",
    [
        ["create", "--bundle", "{bundle}", "x"],
        ["run", "-b", "{bundle}", "--new-flag", "x"],
        ["--new-flag", "value", "--rootless", "true", "run", "--bundle={bundle}", "--pid-file", "p", "x"],
        ["--debug", "--log-level", "run", "-criu=c", "create", "-bundle", "{bundle}", "--no-pivot", "x"],
        ["create", "x", "--bundle", "{bundle}"],
        ["run", "--bundle", "{bundle}", "--", "x"],
    ],
)
def test_flags_in_all_forms(bundle: Bundle, echoed: Path, agent: Agent, words: list[str]) -> None:
    words = [word.format(bundle=bundle.directory) for word in words]
    assert bundle.call(*words).returncode == 0
    assert echoed.read_text().splitlines()[1:] == ["--root", str(bundle.root), *words]
    seccomp = bundle.spec()["linux"]["seccomp"]
    assert seccomp["listenerPath"] == str(agent.path)
    assert json.loads(seccomp["listenerMetadata"])["container"] == "x"


def test_the_bundle_is_the_working_directory_by_default(bundle: Bundle, echoed: Path, agent: Agent) -> None:
    assert bundle.call("create", "x", cwd=bundle.directory).returncode == 0
    assert echoed.exists()
    assert bundle.spec()["linux"]["seccomp"]["listenerPath"] == str(agent.path)


def test_a_runtime_that_is_not_there_is_named(bundle: Bundle, tmp_path: Path) -> None:
    bundle.settings.write_text(f"[runtime]\npath = '{tmp_path}/no \"such\" runtime'\n")
    assert bundle.run("--log-format", "json").returncode == 1
    message = json.loads(bundle.log.read_text())["msg"]
    assert f'{tmp_path}/no "such" runtime: install it, or name it by [runtime] path in {bundle.settings}' in message


def test_it_is_never_its_own_runtime(bundle: Bundle, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "runc").symlink_to(SHIM)
    monkeypatch.setenv("PATH", f"{tmp_path}:{os.environ['PATH']}")
    bundle.configure(path="runc")
    assert bundle.call("--version").stdout.startswith("runc version")


def test_a_path_to_itself_is_refused(bundle: Bundle, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "ours").symlink_to(SHIM)
    monkeypatch.setenv("PATH", f"{tmp_path}:{os.environ['PATH']}")
    for path in SHIM, tmp_path / "ours", "ours":
        bundle.configure(path=path)
        assert bundle.run("--log-format", "json").returncode == 1
        message = json.loads(bundle.log.read_text().splitlines()[-1])["msg"]
        assert f"cannot be {path}, which is mpu-notify-runtime itself" in message
        assert f"name runc or crun by [runtime] path in {bundle.settings}" in message


@pytest.mark.parametrize("annotations", [{}, {ANNOTATION: "true"}])
def test_a_runtime_that_starts_it_again_is_refused(
    bundle: Bundle, agent: Agent, tmp_path: Path, annotations: dict[str, str]
) -> None:
    nvidia = tmp_path / "nvidia-container-runtime"
    nvidia.write_text(CHAINED % (str(SHIM), str(SHIM)))
    nvidia.chmod(0o755)
    bundle.configure(path=nvidia)
    bundle.change(annotations=annotations)
    result = bundle.run()
    assert result.returncode == 1
    assert f"cannot be {nvidia}, which starts mpu-notify-runtime again: have it start runc or crun" in result.stderr
    assert not agent.states


# A handler is what an engine calls: for `kill` and `delete` Podman gives it no environment at all.


@pytest.fixture
def handler(bundle: Bundle, tmp_path: Path) -> Path:
    """What `configure` writes for an engine with the runtime of the bundle."""
    file = tmp_path / "handler"
    real = shutil.which(bundle.runtime)
    file.write_text(f'#!{SHIM} --handler\n# ours\nruntime = "{real}"\nconfig = "{bundle.settings}"\n')
    file.chmod(0o755)
    bundle.settings.write_text(f'[agent]\nsocket = "{tmp_path}/agent.sock"\n')
    return file


def without_environment(bundle: Bundle, handler: Path, *words: str | Path) -> subprocess.CompletedProcess[str]:
    return bundle.call("-i", handler, "--root", bundle.root, *words, program=Path("/usr/bin/env"), plain=True)


def test_a_handler_names_the_runtime_and_the_configuration(bundle: Bundle, handler: Path, agent: Agent) -> None:
    check_trapped(without_environment(bundle, handler, "run", "--bundle", bundle.directory, bundle.id))
    assert agent.metadata() == [{"container": bundle.id, "route": "shim"}]
    version = without_environment(bundle, handler, "--version").stdout
    assert version.startswith(f"{bundle.runtime} version")


def test_a_runtime_that_comes_later_is_not_taken(
    bundle: Bundle, handler: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    later = tmp_path / "later"
    later.mkdir()
    for name in flags.RUNTIMES:
        (later / name).write_text("#!/bin/sh\necho later\n")
        (later / name).chmod(0o755)
    monkeypatch.setenv("PATH", f"{later}:{os.environ['PATH']}")
    assert bundle.call("--version", program=handler).stdout.startswith(f"{bundle.runtime} version")


def test_the_configured_path_is_before_a_handlers(bundle: Bundle, handler: Path, tmp_path: Path) -> None:
    other = tmp_path / "other"
    other.write_text("#!/bin/sh\necho other $2 $3\n")
    other.chmod(0o755)
    bundle.configure(path=other)
    assert bundle.call("list", program=handler).stdout == f"other {bundle.root} list\n"


def test_a_handler_that_cannot_be_read_is_named(bundle: Bundle, tmp_path: Path) -> None:
    result = bundle.call("--handler", tmp_path / "none", "list", plain=True)
    assert (result.returncode, result.stdout) == (1, "")
    assert f"cannot read the handler {tmp_path}/none: No such file" in result.stderr


def test_a_bundle_that_is_started_again_without_an_agent_starts(bundle: Bundle, agent: Agent) -> None:
    check_trapped(bundle.run())
    bundle.end()
    bundle.settings.write_text(bundle.settings.read_text().replace("agent.sock", "gone.sock"))
    check_not_trapped(bundle.run())
    seccomp = bundle.spec()["linux"]["seccomp"]
    assert not [key for key in seccomp if key.startswith("listener")]
    assert len(agent.states) == 1


def test_a_bundle_that_is_started_again_goes_where_the_agent_is_now(bundle: Bundle, agent: Agent) -> None:
    spec = bundle.spec()
    listener = {"listenerPath": "/run/moved.sock", "listenerMetadata": json.dumps({"container": "x", "route": "shim"})}
    spec["linux"]["seccomp"] = {
        "defaultAction": "SCMP_ACT_ALLOW",
        "syscalls": [{"names": ["ioctl"], "action": "SCMP_ACT_NOTIFY", "args": [MASKED]}],
        **listener,
    }
    bundle.write(spec)
    check_trapped(bundle.run())
    assert agent.metadata() == [{"container": bundle.id, "route": "shim"}]


def test_a_runtime_is_asked_what_it_takes_once(bundle: Bundle, agent: Agent, tmp_path: Path) -> None:
    program, asked = tmp_path / "runc", tmp_path / "asked"
    script = f"#!/bin/sh\ncase $1 in features | --version) echo >>{asked} ;; esac\n"

    def create() -> int:
        assert bundle.call("create", "--bundle", bundle.directory, "x").returncode == 0
        return len(asked.read_text().splitlines())

    program.write_text(script)
    program.chmod(0o755)
    bundle.configure(path=program)
    once = create()
    assert once > 0
    assert create() == once
    program.write_text(f"{script}# a newer one\n")
    assert create() == 2 * once
    assert not agent.states


def test_an_error_is_in_a_log_that_is_named_as_a_file(bundle: Bundle, tmp_path: Path) -> None:
    bundle.settings.write_text("[runtime]\npath = '/none'\n")
    assert bundle.call("--log", f"file:{bundle.log}", "list").returncode == 1
    assert "cannot find the real OCI runtime /none" in bundle.log.read_text()
    assert bundle.call("--log", "syslog:x", "list", cwd=tmp_path).returncode == 1
    assert not (tmp_path / "syslog:x").exists()


@pytest.mark.parametrize("text", [f'["{ANNOTATION}"]', f'{{"annotations": ["{ANNOTATION}"]}}', f'"{ANNOTATION}"'])
def test_what_is_no_spec_is_for_the_runtime_to_refuse(bundle: Bundle, echoed: Path, text: str) -> None:
    bundle.config.write_text(text)
    result = bundle.call("create", "--bundle", bundle.directory, "x")
    assert (result.returncode, result.stderr, bundle.config.read_text()) == (0, "", text)
    assert echoed.exists()


def test_a_handler_is_never_its_own_runtime(
    bundle: Bundle, handler: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    handler.write_text(f"#!{SHIM} --handler\n")
    (tmp_path / "runc").symlink_to(handler)
    monkeypatch.setenv("PATH", f"{tmp_path}:{os.environ['PATH']}")
    assert bundle.call("--version", program=handler).stdout.startswith("runc version")


def test_precreate_edits_the_spec(bundle: Bundle, agent: Agent) -> None:
    edited = hook(bundle, bundle.config.read_bytes())
    bundle.config.write_bytes(edited.stdout)
    check_trapped(bundle.call("run", "--bundle", bundle.directory, bundle.id, program=Path(bundle.runtime)))
    assert agent.metadata() == [{"container": "", "route": "precreate"}]


def test_precreate_takes_a_configuration(bundle: Bundle, agent: Agent) -> None:
    text, words = bundle.config.read_bytes(), ["/usr/bin/env", "-i", "/usr/bin/python3", "-I", "-S", str(PRECREATE)]
    named = subprocess.run([*words, "--config", str(bundle.settings)], input=text, capture_output=True, check=True)
    assert json.loads(named.stdout)["linux"]["seccomp"]["listenerPath"] == str(agent.path)
    wrong = subprocess.run([*words, "--confug"], input=text, capture_output=True, check=False)
    assert (wrong.returncode, wrong.stdout) == (1, b"")
    assert b"--config FILE" in wrong.stderr


def test_precreate_leaves_others_as_they_are(bundle: Bundle) -> None:
    absent = hook(bundle, bundle.config.read_bytes())
    assert absent.stdout == bundle.config.read_bytes()
    assert b"without mpu-notify" in absent.stderr
    bundle.change(annotations={})
    assert hook(bundle, bundle.config.read_bytes()).stdout == bundle.config.read_bytes()
    assert hook(bundle, b"no JSON").stdout == b"no JSON"


def test_precreate_refuses(bundle: Bundle) -> None:
    bundle.configure(absent="refuse")
    result = hook(bundle, bundle.config.read_bytes())
    assert (result.returncode, result.stdout) == (1, b"")
    assert b"agent.sock" in result.stderr


def hook(bundle: Bundle, text: bytes) -> subprocess.CompletedProcess[bytes]:
    return subprocess.run(
        ["/usr/bin/python3", "-I", "-S", PRECREATE],
        input=text,
        env={**os.environ, "MPU_NOTIFY_CONFIG": str(bundle.settings)},
        capture_output=True,
        check=False,
        timeout=SECONDS,
    )


def test_nothing_of_the_containers_is_left(bundle: Bundle, agent: Agent) -> None:
    check_trapped(bundle.run())
    bundle.end()
    eventually(lambda: bundle.id not in Path("/proc/self/mounts").read_text(), "no mount is left")
    assert not list(bundle.root.glob("*"))
    assert len(agent.states) == 1
