"""Asking the driver its era, keeping the answer, and saying what becomes of it."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from mpu_notify.rm.client import GpuUser
from mpu_notify.rm.eras import Era
from mpu_notify.supervisor import probe
from mpu_notify.supervisor.driver import How, Places, find
from mpu_notify.supervisor.probe import ProbeError

from .conftest import StartStandIn

AS_NOBODY = ["setpriv", "--reuid=65534", "--regid=65534", "--clear-groups"]


def mpu_notify(*words: str | Path, wrap: list[str] | None = None) -> subprocess.CompletedProcess[str]:
    command = [*(wrap or []), "mpu-notify", *map(str, words)]
    return subprocess.run(command, capture_output=True, text=True, check=False, timeout=60)


def doctor(node: Path, *options: str) -> dict[str, Any]:
    done = mpu_notify("doctor", "--json", "--device", node, *options)
    assert (done.returncode, done.stderr) == (0, "")
    found: dict[str, Any] = json.loads(done.stdout)
    return found


@pytest.mark.parametrize("era", [Era.HOST, Era.THREAD_LIST, Era.THREAD_BOTH, Era.NATIVE])
def test_a_driver_that_is_asked_tells_its_era(standin: StartStandIn, era: Era) -> None:
    found = probe.finding(standin("--era", era.value).control_node)
    assert (found.era, found.how) == (era, How.ASKED)


@pytest.mark.parametrize("era", Era)
def test_other_users_of_the_gpu_mislead_nobody(standin: StartStandIn, era: Era) -> None:
    node = standin("--era", era.value).control_node
    with GpuUser(node, memory_bytes=1 << 20):
        assert probe.finding(node).era is era, "and their utilisation tells the last two thread eras apart"


def test_asking_leaves_no_process_behind(standin: StartStandIn) -> None:
    node = standin().control_node
    probe.finding(node)
    children = Path(f"/proc/self/task/{os.getpid()}/children").read_text().split()
    assert not [pid for pid in children if b"standin" not in Path(f"/proc/{pid}/cmdline").read_bytes()]


def test_a_driver_that_does_not_answer_is_not_waited_for(standin: StartStandIn) -> None:
    driver = standin()
    os.kill(driver.pid, signal.SIGSTOP)
    begun = time.monotonic()
    try:
        with pytest.raises(ProbeError, match="did not answer within"):
            probe.ask(driver.control_node, 0.3)
        assert time.monotonic() - begun < 10
    finally:
        os.kill(driver.pid, signal.SIGCONT)


def test_without_a_driver_the_probe_says_what_is_missing(tmp_path: Path) -> None:
    done = mpu_notify("probe", "--device", tmp_path / "nvidiactl", "--write", tmp_path / "era.json")
    assert done.returncode == 1
    assert "nvidiactl: No such file or directory; load the NVIDIA driver" in done.stderr
    assert not (tmp_path / "era.json").exists()


def test_the_probe_keeps_what_it_was_told(standin: StartStandIn, tmp_path: Path) -> None:
    node, file = standin("--era", "thread-list").control_node, tmp_path / "run" / "era.json"
    done = mpu_notify("probe", "--device", node, "--write", file)
    assert (done.returncode, done.stderr) == (0, "")
    assert done.stdout.startswith("thread-list: ")
    found = find(node, Places(tmp_path / "version", file))
    assert (found.era, found.how) == (Era.THREAD_LIST, How.ASKED)


@pytest.mark.skipif(os.geteuid() != 0, reason="becoming nobody takes root")
def test_an_ordinary_user_may_ask_too_where_user_namespaces_are_theirs(standin: StartStandIn) -> None:
    node = standin("--era", "native").control_node
    with tempfile.TemporaryDirectory() as directory:
        Path(directory).chmod(0o777)
        file = Path(directory) / "era.json"
        done = mpu_notify("probe", "--device", node, "--write", file, wrap=AS_NOBODY)
        assert (done.returncode, done.stderr) == (0, "")
        assert done.stdout.startswith("native: ")
        assert find(node, Places(file, file)).how is How.NOT, "but nobody else believes a file of that user's"


def test_the_doctor_says_what_is_translated_and_what_is_left_to_the_driver(standin: StartStandIn) -> None:
    said = doctor(standin("--era", "native").control_node)
    assert (said["era"], said["how"]) == ("native", "the driver was asked")
    left = {row["control"] for row in said["controls"] if not row["translated"]}
    assert left == {"GPU_GET_PID_INFO"}
    assert {row["control"] for row in said["left_alone"]} >= {"NVD_GET_RCERR_RPT"}
    assert all(check["ok"] for check in said["checks"] if check["needed"])


def test_on_a_host_driver_and_with_always_everything_is_translated(standin: StartStandIn) -> None:
    for era, options in (("host", ()), ("native", ("--translate", "always"))):
        said = doctor(standin("--era", era).control_node, *options)
        assert all(row["translated"] for row in said["controls"])


def test_the_doctor_in_words(standin: StartStandIn) -> None:
    done = mpu_notify("doctor", "--device", standin("--era", "host").control_node)
    assert (done.returncode, done.stderr) == (0, "")
    assert "Era: host: it answers with the PIDs of the host, to everybody\n" in done.stdout
    assert "  GPU_GET_PIDS (0x2080018d): it names the host's PIDs\n" in done.stdout
    assert "Left to the driver" not in done.stdout


def test_what_is_in_the_way_is_a_failure(tmp_path: Path) -> None:
    done = mpu_notify("doctor", "--device", tmp_path / "nvidiactl")
    assert done.returncode == 1
    assert f"PROBLEM: cannot open the control node {tmp_path}/nvidiactl: No such file or directory; load" in done.stdout
    assert "Era: unknown: everything is translated\n" in done.stdout


def test_in_a_container_the_doctor_says_where_to_ask(standin: StartStandIn) -> None:
    namespace = ["unshare", "--pid", "--fork", "--mount-proc"]
    done = mpu_notify("doctor", "--device", standin().control_node, wrap=namespace)
    assert done.returncode == 1
    assert "PROBLEM: not in the initial PID namespace" in done.stdout


@pytest.mark.parametrize("words", [["doctor", "more"], ["probe", "--translate", "auto"]])
def test_wrong_usage_is_two(words: list[str]) -> None:
    assert mpu_notify(*words).returncode == 2


LoggedRun = Callable[[Path, str], list[str]]


@pytest.fixture
def logged_run(caller_program: Path) -> LoggedRun:
    """What the supervisor of a `run` was asked, by a caller that lists and then asks about itself."""

    def run(node: Path, translate: str) -> list[str]:
        options = ["--device", node, "--translate", translate, "--log-level", "debug", "--log-format", "json"]
        done = subprocess.run(
            [*["mpu-notify", "run"], *options, "--", caller_program, node.parent, "on_demand"],
            input="xi", capture_output=True, text=True, check=False, timeout=60,
        )  # fmt: skip
        assert done.returncode == 0, done.stderr
        lines = [json.loads(line) for line in done.stderr.splitlines()]
        return [line["control"] for line in lines if line.get("message") == "call" or line.get("event") == "call"]

    return run


def test_run_translates_everything_where_it_does_not_know_the_driver(
    standin: StartStandIn, logged_run: LoggedRun
) -> None:
    node = standin("--era", "native").control_node
    assert logged_run(node, "auto") == ["GPU_GET_PIDS", "GPU_GET_PID_INFO"]
    assert logged_run(node, "always") == ["GPU_GET_PIDS", "GPU_GET_PID_INFO"]
