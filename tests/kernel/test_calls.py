"""What a caller gets: for a call that cannot be translated, what the driver alone would have given it."""

from __future__ import annotations

import subprocess
from pathlib import Path

import pytest

from mpu_notify.rm.abi import NVENC_SW_SESSION
from mpu_notify.rm.client import RmClient

from .conftest import StartStandIn
from .harness import HAS_PIDFD_THREAD

REFUSED = [
    "null_nvos54",
    "unmapped_nvos54",
    "half_mapped_nvos54",
    "readonly_nvos54",
    "noaccess_nvos54",
    "null_params",
    "unmapped_params",
    "half_mapped_params",
    "kernel_params",
    "readonly_params",
    "noaccess_params",
    "size_zero",
    "size_wrong",
    "size_huge",
    "flags",
    "unknown_cmd",
    "bad_client",
    "id_type",
    "count_over",
    "count_huge",
    "count_zero",
    "other_file",
    "gpu_node",
    "closed_file",
    "path_file",
    "another_open_file",
    "xfer_bad_size",
    "xfer_bad_pointer",
    "xfer_null",
    "xfer_high_cmd",
    "x32",
    "encoders_short",
    "encoders_huge",
    "encoders_null_counted",
    "encoders_unmapped",
    "encoders_half_mapped",
    "encoders_readonly",
    "encoders_kernel",
]

TRANSLATED_ON_ANY_KERNEL = [
    "plain",
    "high_bits",
    "other_type",
    "xfer",
    "int80",
    "int80_garbage",
    "thread",
    "fork",
    "vfork",
    "setuid",
]

#: A thread with files of its own is left to the driver before Linux 6.9.
TRANSLATED = [*TRANSLATED_ON_ANY_KERNEL, *(["unshared_files"] if HAS_PIDFD_THREAD else [])]


def unaided(*command: str | Path) -> str:
    return _output("unshare", "--pid", "--fork", "--mount-proc", *command)


def aided(control_node: Path, *command: str | Path) -> str:
    return _output("mpu-notify", "run", "--device", control_node, "--log-level", "error", "--", *command)


def _output(*command: str | Path) -> str:
    done = subprocess.run(command, capture_output=True, text=True, timeout=60, check=False)
    assert (done.returncode, done.stderr) == (0, "")
    return done.stdout


@pytest.mark.parametrize("case", REFUSED)
def test_a_refused_call_is_refused_just_as_without_us(standin: StartStandIn, caller_program: Path, case: str) -> None:
    node = standin().control_node
    assert aided(node, caller_program, node.parent, case) == unaided(caller_program, node.parent, case)


@pytest.mark.parametrize("case", TRANSLATED)
def test_a_caller_finds_itself_by_its_own_pid(standin: StartStandIn, caller_program: Path, case: str) -> None:
    node = standin("--era", "host").control_node
    assert aided(node, caller_program, node.parent, case) == "pids= 2\n"


def test_on_a_host_era_driver_an_unaided_caller_does_not_find_its_own_pid(
    standin: StartStandIn, caller_program: Path
) -> None:
    node = standin("--era", "host").control_node
    assert unaided(caller_program, node.parent, "plain") != "pids= 1\n"


@pytest.mark.parametrize("case", TRANSLATED)
def test_on_a_native_driver_we_answer_what_the_driver_does(
    standin: StartStandIn, caller_program: Path, case: str
) -> None:
    node = standin("--era", "native").control_node
    # behind an init, as in `run`, so that the numbers are the same
    init = ["sh", "-c", '"$@"; exit $?', "sh"]
    assert aided(node, caller_program, node.parent, case) == unaided(*init, caller_program, node.parent, case)


def test_a_table_behind_a_pointer_is_translated(standin: StartStandIn, caller_program: Path) -> None:
    node = standin("--era", "host").control_node
    assert aided(node, caller_program, node.parent, "encoders") == "encoders=1 pid=2 codec=0 width=1920 stale=0\n"


def test_without_a_table_only_what_is_visible_is_counted(standin: StartStandIn, caller_program: Path) -> None:
    driver = standin("--era", "host")
    with RmClient(driver.control_node) as other:
        other.alloc(other.gpus()[0].device, NVENC_SW_SESSION)
        node = driver.control_node
        assert unaided(caller_program, node.parent, "encoders_count").startswith("encoders=2 ")
        assert aided(node, caller_program, node.parent, "encoders_count").startswith("encoders=1 ")


def test_pid_info_gives_the_caller_its_own_numbers_back(standin: StartStandIn, caller_program: Path) -> None:
    node = standin("--era", "host").control_node
    asked = ["2", "1", "0", "3999999", "4294967295", "2"]
    lines = aided(node, caller_program, node.parent, "info", *asked).splitlines()
    assert [line.split()[0] for line in lines] == [f"pid={number}" for number in asked]
    assert lines[2].split()[1] == "result=0x1f", "0 passes through: the driver refuses that entry"


def test_signals_during_calls_give_eintr_at_worst(standin: StartStandIn, caller_program: Path) -> None:
    node = standin().control_node
    assert aided(node, caller_program, node.parent, "signals") == "good_or_interrupted=500 good_some=1\n"


def test_a_program_may_exec_while_its_threads_are_in_calls(standin: StartStandIn, caller_program: Path) -> None:
    node = standin().control_node
    assert aided(node, caller_program, node.parent, "exec") == "executed\n"
