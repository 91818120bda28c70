"""configure and unconfigure: the plans, over whatever a user may have written, and the commands on real files."""

import json
import os
import shutil
import stat
import subprocess
import sys
import tempfile
from collections.abc import Iterator, Mapping
from contextlib import suppress
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from mpu_notify.oci.engines import containerd, docker, dropin
from mpu_notify.oci.engines.containerd import _toml as tomllib
from mpu_notify.oci.engines.plan import ConfigurationError, Plan, copied_file, undo_copy
from tests import installation

USER = 65534  # nobody
SHIM = "/opt/mpu notify/shim"
DAEMON = "/etc/docker/daemon.json"
CONFIG = "/etc/containerd/config.toml"
DROP_IN = "/etc/containerd/conf.d/99-mpu-notify.toml"
OLD, NEW = "io.containerd.grpc.v1.cri", "io.containerd.cri.v1.runtime"


def applied(files: Mapping[str, bytes], plan: Plan) -> dict[str, bytes]:
    return {path: text for path, text in {**files, **plan.files}.items() if text is not None}


# --- Docker


LEAVES = st.none() | st.booleans() | st.integers(-(10**9), 10**9) | st.text(max_size=6)
VALUES = st.recursive(LEAVES, lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=4), inner))
RUNTIMES = st.dictionaries(st.sampled_from(["nvidia", "crun", 'odd"}{,']), st.fixed_dictionaries({"path": st.text()}))


@st.composite
def daemon_json(draw: st.DrawFn) -> bytes:
    settings = draw(
        st.dictionaries(st.text(max_size=8).filter(lambda key: key != "default-runtime"), VALUES, max_size=4)
    )
    settings.pop("runtimes", None)
    members = list(settings.items())
    if draw(st.booleans()):
        members.insert(draw(st.integers(0, len(members))), ("runtimes", draw(RUNTIMES)))
    indent = draw(st.sampled_from([None, 0, 2, "\t", 4]))
    text = json.dumps(dict(members), indent=indent, ensure_ascii=draw(st.booleans()))
    text = draw(st.sampled_from(["", "\n", " \t"])) + text + draw(st.sampled_from(["", "\n", "\n\n  "]))
    return text.replace("\n", draw(st.sampled_from(["\n", "\r\n"]))).encode()


ANY_DAEMON_JSON = st.none() | st.sampled_from([b"", b" \n", b"{}", b"{\n}\n", b'{"runtimes":{}}']) | daemon_json()


@given(ANY_DAEMON_JSON)
def test_docker_has_the_runtime_and_all_else_as_it_was(before: bytes | None) -> None:
    files = {} if before is None else {DAEMON: before}
    after = applied(files, docker.configure(files, DAEMON, SHIM))
    expected = json.loads(before) if before and before.strip() else {}
    expected.setdefault("runtimes", {})["mpu-notify"] = {"path": SHIM}
    assert json.loads(after[DAEMON]) == expected
    assert b"\n" not in after[DAEMON].replace(b"\r\n", b"") or b"\r\n" not in after[DAEMON]


@given(ANY_DAEMON_JSON)
def test_docker_twice_is_once_and_undone_to_the_byte(before: bytes | None) -> None:
    files = {} if before is None else {DAEMON: before}
    after = applied(files, docker.configure(files, DAEMON, SHIM))
    assert not docker.configure(after, DAEMON, SHIM).files
    moved = applied(after, docker.configure(after, DAEMON, "/elsewhere"))
    assert json.loads(moved[DAEMON])["runtimes"]["mpu-notify"] == {"path": "/elsewhere"}
    for configured in (after, moved):
        undone = docker.unconfigure(configured, DAEMON)
        assert applied(configured, undone) == files
        assert not undone.notes


def interrupted(files: Mapping[str, bytes], plan: Plan) -> list[dict[str, bytes]]:
    """What there may be if the machine stops on the way."""
    steps = list(plan.files.items())
    return [applied(files, Plan(dict(steps[:done]))) for done in range(len(steps) + 1)]


@given(ANY_DAEMON_JSON)
def test_docker_interrupted_anywhere(before: bytes | None) -> None:
    files = {} if before is None else {DAEMON: before}
    for partly in interrupted(files, docker.configure(files, DAEMON, SHIM)):
        for undone in interrupted(partly, docker.unconfigure(partly, DAEMON)):
            assert applied(undone, docker.unconfigure(undone, DAEMON)) == files


@given(daemon_json())
def test_docker_without_a_note_loses_only_our_entry(before: bytes) -> None:
    configured = applied({DAEMON: before}, docker.configure({DAEMON: before}, DAEMON, SHIM))
    plan = docker.unconfigure({DAEMON: configured[DAEMON]}, DAEMON)
    expected = json.loads(before)
    if not expected.get("runtimes", True):
        del expected["runtimes"]
    else:
        assert applied({}, plan)[DAEMON] == before
    assert json.loads(applied({}, plan)[DAEMON]) == expected
    assert "only the entry" in plan.notes[0]


def test_docker_keeps_the_users_own_lines_and_style() -> None:
    before = b'{\n\t"debug" : true,\n\t"runtimes": {\n\t\t"nvidia": {"path": "n"}\n\t}\n}'
    after = applied({}, docker.configure({DAEMON: before}, DAEMON, "/s"))[DAEMON]
    assert after.decode() == (
        '{\n\t"debug" : true,\n\t"runtimes": {\n\t\t"nvidia": {"path": "n"},\n'
        '\t\t"mpu-notify": {\n\t\t\t"path": "/s"\n\t\t}\n\t}\n}'
    )


def test_docker_changed_since_keeps_the_change() -> None:
    files = {DAEMON: b'{"debug": true}\n'}
    files = applied(files, docker.configure(files, DAEMON, SHIM))
    files[DAEMON] = files[DAEMON].replace(b"true", b"false")
    again = docker.configure(files, DAEMON, "/elsewhere")
    assert applied(files, docker.unconfigure(files, DAEMON)) == {DAEMON: b'{"debug": false}\n'}
    files = applied(files, again)
    assert applied(files, docker.unconfigure(files, DAEMON)) == {DAEMON: b'{"debug": false}\n'}


def test_docker_gives_an_entry_of_the_users_own_back() -> None:
    files = {DAEMON: b'{"runtimes": {"mpu-notify": {"path": "/old"}}}'}
    configured = applied(files, docker.configure(files, DAEMON, SHIM))
    assert json.loads(configured[DAEMON])["runtimes"]["mpu-notify"] == {"path": SHIM}
    assert applied(configured, docker.unconfigure(configured, DAEMON)) == files


@pytest.mark.parametrize(
    ("contents", "message"),
    [
        (b'{\n  "debug": true,\n}', f"{DAEMON}:3:1: "),
        (b'{\n  "debug": yes\n}', f"{DAEMON}:2:12: "),
        (b'{"a": "\xff"}', f"{DAEMON} is not UTF-8 at byte 7"),
        (b"[]", f"{DAEMON}: the file is no JSON object"),
        (b'{"runtimes": []}', f"{DAEMON}: runtimes is no JSON object"),
    ],
)
def test_docker_malformed(contents: bytes, message: str) -> None:
    for attempt in (
        lambda: docker.configure({DAEMON: contents}, DAEMON, SHIM),
        lambda: docker.unconfigure({DAEMON: contents}, DAEMON),
    ):
        with pytest.raises(ConfigurationError) as error:
            attempt()
        assert str(error.value).startswith(message)


def test_docker_default_runtime_is_in_the_way_of_undoing() -> None:
    contents = b'{"default-runtime": "mpu-notify", "runtimes": {"mpu-notify": {"path": "/s"}}}'
    with pytest.raises(ConfigurationError, match="default-runtime is mpu-notify"):
        docker.unconfigure({DAEMON: contents}, DAEMON)


@pytest.mark.parametrize(
    ("contents", "behind"),
    [
        (b"{}", "runc"),
        (b'{"default-runtime": "runc"}', "runc"),
        (b'{"default-runtime": "io.containerd.runc.v2"}', "runc"),
        (
            b'{"default-runtime": "n", "runtimes": {"n": {"path": "nvidia-container-runtime"}}}',
            "nvidia-container-runtime",
        ),
        (b'{"default-runtime": "c", "runtimes": {"c": {"options": {"BinaryName": "/c"}}}}', "/c"),
        (b'{"default-runtime": "mpu-notify", "runtimes": {"mpu-notify": {"path": "/s"}}}', "runc"),
    ],
)
def test_docker_goes_on_with_its_default_runtime(contents: bytes, behind: str) -> None:
    plan = docker.configure({DAEMON: contents}, DAEMON, SHIM)
    assert (plan.behind, plan.notes) == (behind, [])


def test_docker_tells_of_arguments_that_are_left_out() -> None:
    contents = b'{"default-runtime": "k", "runtimes": {"k": {"path": "/k", "runtimeArgs": ["--x"]}}}'
    (note,) = docker.configure({DAEMON: contents}, DAEMON, SHIM).notes
    assert "the arguments of the default runtime k are not passed on" in note


# --- containerd


def runtimes(files: Mapping[str, bytes], path: str, plugin: str) -> dict[str, Any]:
    found: dict[str, Any] = tomllib.loads(files[path].decode())["plugins"][plugin]["containerd"]["runtimes"]
    return found


@st.composite
def config_toml(draw: st.DrawFn) -> bytes:
    version = draw(st.sampled_from([2, 3]))
    plugin = OLD if version == 2 else NEW
    head = [
        "# imports = ['/not/this']",
        f"version = {version}\t# yes",
        'root = "/var/lib/containerd"',
        "",
        draw(
            st.sampled_from(
                [
                    "",
                    "imports = []",
                    "imports=['/a.toml']",
                    'imports = [\n  "/a/*.toml", # one\n  "b.toml"\n]',
                    'imports = ["conf.d/*.toml"]',
                ]
            )
        ),
    ]
    tables = [
        "[grpc]\n\taddress = '/run/x.sock' # [not a table]",
        f"[plugins.'{plugin}']\nsandbox_image = 'pause'",
        "".join(
            [
                f'[plugins."{plugin}".containerd.runtimes.runc]\n  runtime_type = "io.containerd.runc.v2"\n',
                f'  [plugins."{plugin}".containerd.runtimes.runc.options]\n    SystemdCgroup = true',
            ]
        ),
        '[debug]\nlevel = """\nimports = [\n"""',
    ]
    chosen = draw(st.lists(st.sampled_from(tables), unique=True))
    text = "\n".join([*draw(st.permutations(head)), *chosen]) + draw(st.sampled_from(["", "\n", "\n# end", "\n\n\n"]))
    return text.replace("\n", draw(st.sampled_from(["\n", "\r\n"]))).encode()


@given(st.none() | st.sampled_from([b"", b"# nothing\r\n"]) | config_toml())
def test_containerd_has_the_handler_and_is_undone_to_the_byte(before: bytes | None) -> None:
    files = {} if before is None else {CONFIG: before}
    plan = containerd.configure(files, CONFIG, DROP_IN, SHIM)
    after = applied(files, plan)
    assert not containerd.configure(after, CONFIG, DROP_IN, SHIM).files

    table = tomllib.loads(after[CONFIG].decode())
    plugin = OLD if table["version"] == 2 else NEW
    where = DROP_IN if DROP_IN in after else CONFIG
    found = runtimes(after, where, plugin)
    assert found["mpu-notify"]["options"]["BinaryName"] == SHIM
    assert found["mpu-notify"]["pod_annotations"] == found["mpu-notify"]["container_annotations"] == ["io.mpu-notify.*"]
    # As the default runtime, and that one still there.
    systemd = before is not None and b"SystemdCgroup" in before
    assert found["mpu-notify"]["options"].get("SystemdCgroup", False) is systemd
    if plugin == OLD:
        assert "runc" in found
    if where == DROP_IN:
        assert any(glob in (DROP_IN, "conf.d/*.toml", "/etc/containerd/conf.d/*.toml") for glob in table["imports"])
    else:
        assert before is not None
        assert after[CONFIG].startswith(before)

    moved = applied(after, containerd.configure(after, CONFIG, DROP_IN, "/elsewhere"))
    for configured in (after, moved):
        undone = containerd.unconfigure(configured, CONFIG, DROP_IN)
        assert applied(configured, undone) == files
        assert not undone.notes


@given(st.none() | config_toml())
def test_containerd_interrupted_anywhere(before: bytes | None) -> None:
    files = {} if before is None else {CONFIG: before}
    for partly in interrupted(files, containerd.configure(files, CONFIG, DROP_IN, SHIM)):
        imports = tomllib.loads(partly.get(CONFIG, b"").decode()).get("imports", [])
        assert DROP_IN in partly or DROP_IN not in imports  # or containerd would not start
        for undone in interrupted(partly, containerd.unconfigure(partly, CONFIG, DROP_IN)):
            assert applied(undone, containerd.unconfigure(undone, CONFIG, DROP_IN)) == files


@given(config_toml())
def test_containerd_changed_since_loses_what_we_added(before: bytes) -> None:
    configured = applied({CONFIG: before}, containerd.configure({CONFIG: before}, CONFIG, DROP_IN, SHIM))
    if undo_copy(CONFIG) not in configured:
        return  # the import was there: only the drop-in is ours
    newline = b"\r\n" if b"\r\n" in before else b"\n"
    configured[CONFIG] += newline + b"[ttrpc]" + newline
    plan = containerd.unconfigure(configured, CONFIG, DROP_IN)
    left = applied(configured, plan)
    assert list(left) == [CONFIG]
    assert tomllib.loads(left[CONFIG].decode()) == {**tomllib.loads(before.decode()), "ttrpc": {}}
    assert "changed since" in plan.notes[0]


def test_containerd_1_counts_only_the_last_file_with_cri_settings() -> None:
    files = {
        CONFIG: f'version = 2\nimports = ["conf.d/*.toml"]\n[plugins."{OLD}"]\nsandbox_image = "a"\n'.encode(),
        "/etc/containerd/conf.d/99-nvidia.toml": (
            f'version = 2\n[plugins."{OLD}".containerd]\ndefault_runtime_name = "nvidia"\n'
            f'[plugins."{OLD}".containerd.runtimes.nvidia]\nruntime_type = "io.containerd.runc.v2"\n'
            f'[plugins."{OLD}".containerd.runtimes.nvidia.options]\nBinaryName = "/usr/bin/nvidia-container-runtime"\n'
        ).encode(),
    }
    plan = containerd.configure(files, CONFIG, DROP_IN, SHIM)
    after = applied(files, plan)
    assert after[CONFIG] == files[CONFIG]
    assert set(runtimes(after, "/etc/containerd/conf.d/99-nvidia.toml", OLD)) == {"nvidia", "mpu-notify"}
    assert plan.behind == "/usr/bin/nvidia-container-runtime"
    assert "99-nvidia.toml" in plan.notes[0]
    assert applied(after, containerd.unconfigure(after, CONFIG, DROP_IN)) == files


@pytest.mark.parametrize("glob", ["conf.d/*", "/etc/containerd/*/*"])
def test_containerd_imports_whatever_lies_beside_its_files(glob: str, root: Path) -> None:
    put(root, CONFIG, f'version = 2\nimports = ["{glob}"]\n'.encode())
    put(root, "/etc/containerd/conf.d/cri.toml", f'version = 2\n[plugins."{OLD}"]\nsandbox_image = "a"\n'.encode())
    before = snapshot(root)
    assert run("configure", "containerd", root).returncode == 0
    tables = [tomllib.loads(file.read_text()) for file in (root / "etc/containerd/conf.d").iterdir()]
    assert any("mpu-notify" in table["plugins"][OLD]["containerd"]["runtimes"] for table in tables)
    assert "nothing to change" in run("configure", "containerd", root).stdout
    assert run("unconfigure", "containerd", root).returncode == 0
    assert snapshot(root) == before


def test_containerd_moves_from_the_drop_in_when_cri_settings_appear() -> None:
    files = applied({}, containerd.configure({}, CONFIG, DROP_IN, SHIM))
    assert set(files) == {CONFIG, undo_copy(CONFIG), DROP_IN}
    files[CONFIG] += f'[plugins."{OLD}"]\nsandbox_image = "a"\n'.encode()
    after = applied(files, containerd.configure(files, CONFIG, DROP_IN, SHIM))
    assert DROP_IN not in after
    assert "mpu-notify" in runtimes(after, CONFIG, OLD)


@pytest.mark.parametrize(
    ("contents", "message"),
    [
        ("version = 2\n[plugins\nx = 1", f"{CONFIG}: .*line 2"),
        ('disabled_plugins = ["cri"]', "disables the CRI plugin"),
        ('root = "/x"', "containerd config migrate"),
        ("version = '2'", "version is of the wrong type"),
        (f'version = 2\n[plugins."{OLD}".containerd.runtimes.mpu-notify]\n', "did not write"),
        (f'version = 2\n[plugins]\n"{OLD}" = {{ sandbox_image = "a" }}\n', "cannot add to this file safely"),
        ('version = 3\n"imports" = ["/a"]\n', "cannot add to this file safely"),
    ],
)
def test_containerd_refuses(contents: str, message: str) -> None:
    with pytest.raises(ConfigurationError, match=message):
        containerd.configure({CONFIG: contents.encode()}, CONFIG, DROP_IN, SHIM)


def test_containerd_default_runtime_is_in_the_way_of_undoing() -> None:
    contents = f'version = 2\n[plugins."{OLD}".containerd]\ndefault_runtime_name = "mpu-notify"\n'
    with pytest.raises(ConfigurationError, match="default_runtime_name is mpu-notify"):
        containerd.unconfigure({CONFIG: contents.encode()}, CONFIG, DROP_IN)


# --- Podman and CRI-O


@pytest.mark.parametrize("body", [dropin.podman, dropin.crio])
def test_drop_in(body: Any) -> None:
    path = "/etc/x/99.conf"
    files = applied({}, dropin.configure({}, path, body(SHIM)))
    assert SHIM in str(tomllib.loads(files[path].decode()))
    assert not dropin.configure(files, path, body(SHIM)).files
    assert not applied(files, dropin.unconfigure(files, path))
    assert applied(files, dropin.configure(files, path, body("/elsewhere"))) != files
    for strange, message in ((b"[mine]\n", "was not written by mpu-notify"), (files[path] + b"\n", "was edited")):
        for attempt in (
            lambda s=strange: dropin.configure({path: s}, path, ""),
            lambda s=strange: dropin.unconfigure({path: s}, path),
        ):
            with pytest.raises(ConfigurationError, match=message):
                attempt()


# --- The commands


@pytest.fixture
def root(tmp_path: Path) -> Path:
    """A file system with our runtime and runc in it."""
    for path in ("opt/shim", "usr/sbin/runc"):
        make_program(tmp_path, path)
    return tmp_path


def make_program(root: Path, path: str) -> None:
    program = root / path
    program.parent.mkdir(parents=True, exist_ok=True)
    program.write_text("#!/bin/sh\n")
    program.chmod(0o755)


def run(verb: str, engine: str, root: Path, *more: str) -> subprocess.CompletedProcess[str]:
    words = [sys.executable, "-m", "mpu_notify.cli.main", verb, engine, "--root", str(root)]
    words += ["--runtime-path", "/opt/shim"] if verb == "configure" and "--runtime-path" not in more else []
    return subprocess.run([*words, *more], check=False, capture_output=True, text=True)


def snapshot(root: Path) -> dict[str, bytes]:
    return {str(path.relative_to(root)): path.read_bytes() for path in root.rglob("*") if path.is_file()}


def put(root: Path, path: str, contents: bytes) -> Path:
    file = root / path.lstrip("/")
    file.parent.mkdir(parents=True, exist_ok=True)
    file.write_bytes(contents)
    return file


@pytest.mark.parametrize("engine", ["docker", "containerd", "podman", "crio"])
@pytest.mark.parametrize("present", [False, True])
def test_there_and_back(engine: str, present: bool, root: Path) -> None:  # noqa: FBT001 - a parameter of the test
    if present:
        put(root, DAEMON, b'{\r\n\t"debug": true\r\n}')
        put(root, CONFIG, b'# mine\r\nversion = 3\r\nimports = ["/a"]')
    before = snapshot(root)

    dry = run("configure", engine, root, "--dry-run")
    assert (dry.returncode, dry.stderr, snapshot(root)) == (0, "", before)
    done = run("configure", engine, root)
    assert (done.returncode, done.stderr) == (0, "")
    after = snapshot(root)
    assert after != before
    assert "nothing to change" in run("configure", engine, root).stdout
    assert "nothing to change" in run("configure", engine, root, "--dry-run").stdout
    assert snapshot(root) == after

    undo = run("unconfigure", engine, root, "--dry-run")
    assert (undo.returncode, snapshot(root)) == (0, after)
    assert undo.stdout.startswith("--- ")
    assert run("unconfigure", engine, root).returncode == 0
    assert snapshot(root) == before
    assert not (root / "etc/mpu-notify").exists()
    assert "nothing to change" in run("unconfigure", engine, root).stdout


@pytest.mark.parametrize("engine", ["docker", "containerd"])
def test_the_diff_is_what_will_be(engine: str, root: Path) -> None:
    put(root, DAEMON, b'{\r\n "debug": true\r\n}')
    put(root, CONFIG, f'version = 2\n\n[plugins."{OLD}"]\n  sandbox_image = "a"'.encode())
    words = [sys.executable, "-m", "mpu_notify.cli.main", "configure", engine, "--root", str(root), "--dry-run"]
    diff = subprocess.run([*words, "--runtime-path", "/opt/shim"], check=True, capture_output=True).stdout
    run("configure", engine, root)
    wanted = {path: text for path, text in snapshot(root).items() if not copied_file(f"/{path}")}
    run("unconfigure", engine, root)
    applied_lines = [line[1:] for line in diff.split(b"\n") if line.startswith(b"+") and not line.startswith(b"+++")]
    path = (DAEMON if engine == "docker" else CONFIG).lstrip("/")
    assert f"+++ b/{path}\n".encode() in diff
    texts = wanted[path] + wanted[f"etc/mpu-notify/runtimes/{engine}"]
    assert all(line in texts for line in applied_lines)
    assert b"\\ No newline at end of file\n" in diff


def test_mode_owner_and_links_stay(root: Path) -> None:
    target = put(root, "/srv/daemon.json", b"{}")
    target.chmod(0o640)
    os.chown(target, 12345, 54321)
    link = root / "etc/docker/daemon.json"
    link.parent.mkdir(parents=True)
    link.symlink_to("../../srv/daemon.json")
    assert run("configure", "docker", root).returncode == 0
    assert link.is_symlink()
    for file in (target, root / undo_copy(DAEMON).lstrip("/")):
        status = file.stat()
        assert (status.st_uid, status.st_gid, stat.S_IMODE(status.st_mode)) == (12345, 54321, 0o640)
    assert run("unconfigure", "docker", root).returncode == 0
    assert snapshot(root / "srv") == {"daemon.json": b"{}"}
    assert list(link.parent.iterdir()) == [link]
    assert (target.stat().st_uid, stat.S_IMODE(target.stat().st_mode)) == (12345, 0o640)


def test_new_files_are_for_all_to_read(root: Path) -> None:
    assert run("configure", "podman", root).returncode == 0
    (file,) = (root / "etc/containers/containers.conf.d").iterdir()
    assert stat.S_IMODE(file.stat().st_mode) == 0o644


def handler(root: Path, engine: str) -> dict[str, str]:
    """What an engine's handler says."""
    found: dict[str, str] = tomllib.loads((root / "etc/mpu-notify/runtimes" / engine).read_text())
    return found


@pytest.mark.parametrize("engine", ["docker", "containerd", "podman", "crio"])
def test_the_engine_calls_a_handler_that_names_what_it_used(engine: str, root: Path) -> None:
    assert run("configure", engine, root).returncode == 0
    file = root / "etc/mpu-notify/runtimes" / engine
    assert stat.S_IMODE(file.stat().st_mode) == 0o755
    assert file.read_text().startswith("#!/opt/shim --handler\n")
    assert handler(root, engine) == {"runtime": "/usr/sbin/runc"}
    configured = b"".join(text for path, text in snapshot(root).items() if not path.startswith("etc/mpu-notify"))
    assert f"/etc/mpu-notify/runtimes/{engine}".encode() in configured
    assert b"/opt/shim" not in configured


def test_a_runtime_that_comes_later_changes_nothing_before_configure(root: Path) -> None:
    (root / "usr/sbin/runc").rename(root / "usr/sbin/crun")
    run("configure", "podman", root)
    assert handler(root, "podman") == {"runtime": "/usr/sbin/crun"}
    make_program(root, "usr/bin/runc")
    assert "nothing to change" in run("configure", "podman", root).stdout
    assert run("configure", "podman", root, "--real-runtime", "/usr/bin/runc").returncode == 0
    assert handler(root, "podman") == {"runtime": "/usr/bin/runc"}


def test_nvidias_runtime_goes_behind_ours(root: Path) -> None:
    make_program(root, "usr/bin/nvidia-container-runtime")
    nvidia = {"default-runtime": "nvidia", "runtimes": {"nvidia": {"path": "nvidia-container-runtime"}}}
    put(root, DAEMON, json.dumps(nvidia).encode())
    run("configure", "docker", root)
    assert handler(root, "docker") == {"runtime": "/usr/bin/nvidia-container-runtime"}
    put(
        root,
        CONFIG,
        f"""version = 2
[plugins."{OLD}".containerd]
default_runtime_name = "nvidia"
[plugins."{OLD}".containerd.runtimes.nvidia]
runtime_type = "io.containerd.runc.v2"
[plugins."{OLD}".containerd.runtimes.nvidia.options]
BinaryName = "/usr/bin/nvidia-container-runtime"
""".encode(),
    )
    run("configure", "containerd", root)
    assert handler(root, "containerd") == {"runtime": "/usr/bin/nvidia-container-runtime"}


def test_crio_goes_on_with_its_default_runtime(root: Path) -> None:
    make_program(root, "usr/libexec/crio/crun")
    put(root, "/etc/crio/crio.conf", b'[crio.runtime]\ndefault_runtime = "runc"\n')
    put(
        root,
        "/etc/crio/crio.conf.d/10-crio.conf",
        b"""[crio.runtime]
default_runtime = "crun"
[crio.runtime.runtimes.crun]
runtime_path = "/usr/libexec/crio/crun"
""",
    )
    run("configure", "crio", root)
    assert handler(root, "crio") == {"runtime": "/usr/libexec/crio/crun"}


def test_without_a_runtime_nothing_is_configured(root: Path) -> None:
    (root / "usr/sbin/runc").unlink()
    before = snapshot(root)
    fails(run("configure", "docker", root), "cannot find the runtime that docker uses by default")
    fails(run("configure", "docker", root, "--real-runtime", "/opt/none"), "cannot find /opt/none")
    fails(run("configure", "docker", root, "--real-runtime", "/opt/shim"), "/opt/shim is mpu-notify-runtime itself")
    make_program(root, "opt/sp ace")
    fails(run("configure", "docker", root, "--real-runtime", "/opt/sp ace", "--runtime-path", "/opt/sp ace"), "cannot")
    assert {**before, "opt/sp ace": b"#!/bin/sh\n"} == snapshot(root)


@pytest.mark.parametrize("path", ["/opt/shim", "/etc/mpu-notify/runtimes/docker", "/opt/link"])
def test_a_default_runtime_that_is_ours_is_not_put_behind_itself(path: str, root: Path) -> None:
    (root / "opt/link").symlink_to("shim")
    assert run("configure", "docker", root).returncode == 0
    put(root, DAEMON, json.dumps({"default-runtime": "gpu", "runtimes": {"gpu": {"path": path}}}).encode())
    before = snapshot(root)
    fails(run("configure", "docker", root), f"{path} is mpu-notify-runtime itself")
    assert snapshot(root) == before
    assert run("configure", "docker", root, "--real-runtime", "/usr/sbin/runc").returncode == 0


def fails(result: subprocess.CompletedProcess[str], message: str, status: int = 1) -> None:
    assert (result.returncode, result.stdout) == (status, "")
    assert message in result.stderr
    assert result.stderr.count("\n") == 1 or status == 2


def test_what_is_wrong_is_said_and_nothing_changes(root: Path) -> None:
    put(root, DAEMON, b'{"debug": tru}')
    put(root, CONFIG, b"version = 2\nx = = 1\n")
    (root / "etc/crio").symlink_to("/tmp")  # noqa: S108 - a link that leads out
    before = snapshot(root)
    fails(run("configure", "docker", root), f"{DAEMON}:1:11: ")
    fails(run("configure", "containerd", root), f"{CONFIG}: Invalid value (at line 2, column 5)")
    fails(run("configure", "crio", root), "leads out of")
    fails(run("configure", "podman", root, "--runtime-path", "/opt/none"), "there is no program /opt/none")
    fails(run("configure", "podman", root, "--runtime-path", "shim"), "give an absolute path", 2)
    fails(run("configure", "podman", root / "none"), "no such directory", 2)
    fails(run("configure", "lxc", root), "invalid choice", 2)
    assert snapshot(root) == before


@pytest.fixture
def users_root() -> Iterator[Path]:
    """As `root`, where an ordinary user has a home; the rest is root's."""
    with tempfile.TemporaryDirectory(prefix="mpu-notify-test-", dir="/tmp") as name:
        directory = Path(name)
        directory.chmod(0o755)
        for program in "opt/shim", "usr/sbin/runc", "usr/bin/crun":
            make_program(directory, program)
        home = directory / "home/user"
        home.mkdir(parents=True)
        os.chown(home, USER, USER)
        yield directory


def run_as_user(root: Path, *words: str) -> subprocess.CompletedProcess[str]:
    command = [*installation.command(), *words, "--root", str(root)]
    env = {**os.environ, "HOME": "/home/user"}
    return subprocess.run(command, check=False, capture_output=True, text=True, user=USER, group=USER, env=env)


@pytest.mark.parametrize("engine", ["docker", "containerd", "podman", "crio"])
def test_what_cannot_be_written_wholly_is_not_written_at_all(engine: str, users_root: Path) -> None:
    put(users_root, DAEMON, b"{}")
    put(users_root, CONFIG, b"version = 2\n")
    before = sorted(users_root.rglob("*")), snapshot(users_root)
    failed = run_as_user(users_root, "configure", engine, "--runtime-path", "/opt/shim")
    fails(failed, "; run this as root")
    assert (sorted(users_root.rglob("*")), snapshot(users_root)) == before


def test_what_cannot_be_undone_wholly_stays(users_root: Path) -> None:
    file = put(users_root, "/home/user/etc/daemon.json", b'{"a": 1}')
    for each in file, file.parent:
        os.chown(each, USER, USER)
    words = "docker", "--config", "/home/user/etc/daemon.json"
    assert run_as_user(users_root, "configure", *words, "--runtime-path", "/opt/shim").returncode == 0
    before = snapshot(users_root)
    file.parent.chmod(0o555)
    fails(run_as_user(users_root, "unconfigure", *words), "Permission denied")
    assert snapshot(users_root) == before


def test_config_is_another_file(root: Path) -> None:
    put(root, "/k/config.toml", b"version = 3\n")
    assert run("configure", "containerd", root, "--config", "/k/config.toml").returncode == 0
    assert (root / "k/conf.d/99-mpu-notify.toml").exists()
    assert b'imports = ["/k/conf.d/99-mpu-notify.toml"]' in (root / "k/config.toml").read_bytes()


def test_without_root_the_paths_are_this_machines(root: Path) -> None:
    words = [sys.executable, "-m", "mpu_notify.cli.main", "configure", "docker", "--config", "daemon.json"]
    command = [*words, "--runtime-path", str(root / "opt/shim")]
    done = subprocess.run(command, check=True, capture_output=True, text=True, cwd=root)
    assert "Now run: systemctl reload docker" in done.stdout
    handler = Path(json.loads((root / "daemon.json").read_bytes())["runtimes"]["mpu-notify"]["path"])
    assert handler.parent == Path("/etc/mpu-notify/runtimes")
    version = subprocess.run([handler, "--version"], check=False, capture_output=True, text=True)
    words[3] = "unconfigure"
    subprocess.run([*words], check=True, capture_output=True, cwd=root)
    handler.unlink(missing_ok=True)
    for folder in handler.parent, handler.parent.parent:
        with suppress(OSError):  # there may be more
            folder.rmdir()
    assert version.returncode == 0  # of the tree's own shim: the file is a program


def test_containers_that_are_left_are_named(root: Path) -> None:
    put(root, DAEMON, b'{"data-root": "/data"}')
    for where, name, runtime in (
        ("containers", "one", "mpu-notify"),
        ("containers", "two", "runc"),
        ("100000.100000/containers", "mapped", "mpu-notify"),
    ):
        put(root, f"/data/{where}/{name}0123/hostconfig.json", json.dumps({"Runtime": runtime}).encode())
        put(root, f"/data/{where}/{name}0123/config.v2.json", json.dumps({"Name": f"/{name}"}).encode())
    put(root, "/data/containers/half/hostconfig.json", b"{")
    run("configure", "docker", root)
    done = run("unconfigure", "docker", root)
    assert "bound to the runtime mpu-notify: mapped one; docker exec, stop and rm go on working" in done.stderr
    assert "/etc/mpu-notify/runtimes/docker stays for containers that run under it" in done.stderr
    assert handler(root, "docker")
    assert done.returncode == 0
    shutil.rmtree(root / "data/containers")
    shutil.rmtree(root / "data/100000.100000")
    assert run("unconfigure", "docker", root).returncode == 0
    assert not (root / "etc/mpu-notify/runtimes/docker").exists()


@pytest.mark.parametrize("verb", ["configure", "unconfigure"])
def test_help(verb: str) -> None:
    command = [sys.executable, "-m", "mpu_notify.cli.main", verb, "--help"]
    shown = subprocess.run(command, check=True, capture_output=True, text=True).stdout
    assert "examples:" in shown
    assert all(option in shown for option in ("--dry-run", "--config", "--root"))
