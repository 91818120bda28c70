"""What tests/gpu reads out of the tools' answers, and how it judges two of them."""

from __future__ import annotations

import json

import pytest

from tests.gpu import rows
from tests.gpu.rows import MIB, Row, Verdict, judge

NVIDIA_SMI = """\
Sun Nov 22 10:00:00 2026
+-----------------------------------------------------------------------------------------+
| NVIDIA-SMI 580.159.04             Driver Version: 580.159.04     CUDA Version: 13.0     |
+-----------------------------------------+------------------------+----------------------+
| GPU  Name                 Persistence-M | Bus-Id          Disp.A | Volatile Uncorr. ECC |
|   0  NVIDIA H200                    On  |   00000000:00:06.0 Off |                    0 |
| N/A   30C    P0             77W /  700W |    1643MiB / 143771MiB |      0%      Default |
+-----------------------------------------+------------------------+----------------------+

+-----------------------------------------------------------------------------------------+
| Processes:                                                                              |
|  GPU   GI   CI              PID   Type   Process name                        GPU Memory |
|        ID   ID                                                               Usage      |
|=========================================================================================|
"""
SMI_END = "+-----------------------------------------------------------------------------------------+\n"


def test_nvidia_smi() -> None:
    table = """\
|    0   N/A  N/A            1234      C   python3                                 1234MiB |
|    0   N/A  N/A               7    C+G   /usr/bin/a name with spaces              520MiB |
|    0     1    0             406    M+C   ...orch/.venv/bin/python3                   N/A |
"""
    assert list(rows.nvidia_smi(NVIDIA_SMI + table + SMI_END)) == [
        Row(1234, "0", "C", "python3", 1234 * MIB),
        Row(7, "0", "C+G", "a name with spaces", 520 * MIB),
        Row(406, "0", "M+C", "python3", None),
    ]


def test_nvidia_smi_without_processes() -> None:
    table = "|  No running processes found                                                             |\n"
    assert list(rows.nvidia_smi(NVIDIA_SMI + table + SMI_END)) == []


def test_compute_apps() -> None:
    answer = """\
pid, process_name, used_gpu_memory [MiB]
406, /usr/bin/python3, 1634 MiB
7, /srv/odd, name, [N/A]
8, [Not Found], 520 MiB
"""
    assert list(rows.compute_apps(answer)) == [
        Row(406, name="python3", memory_bytes=1634 * MIB),
        Row(7, name="odd, name"),
        Row(8, name="[Not Found]", memory_bytes=520 * MIB),
    ]


def test_pmon() -> None:
    answer = """\
# gpu         pid   type     fb   ccpm    command
# Idx           #    C/G     MB     MB    name
    0        406     C   1634      0    python3
    0          7   C+G      -      -    odd name
"""
    assert list(rows.pmon(answer)) == [Row(406, "0", "C", "python3", 1634 * MIB), Row(7, "0", "C+G", "odd name")]


def test_pmon_without_processes() -> None:
    answer = "# gpu         pid   type     fb   ccpm    command\n    0          -     -      -      -    -\n"
    assert list(rows.pmon(answer)) == []


def test_nvitop() -> None:
    answer = """\
│   0  H200           On  │ 00000000:00:06.0 Off │      0%      Default │
╒═══════════════════════════════════════════════════════════════════════════════╕
│ Processes:                                                          root@host │
│ GPU     PID      USER  GPU-MEM %SM %GMBW  %CPU  %MEM   TIME  COMMAND          │
╞═══════════════════════════════════════════════════════════════════════════════╡
│   0     406 C    root  520.0MiB   0     0   0.3   0.2    7.1s  python3 work.py │
│\x1b[32m   1\x1b[0m       7 X nobody+   1634MiB N/A   N/A   0.0   0.0    8:01  odd | name     │
├───────────────────────────────────────────────────────────────────────────────┤
│   1       8 G       ?   19.53GiB   0     0   N/A   N/A     N/A  No Such Process │
╘═══════════════════════════════════════════════════════════════════════════════╛
"""
    assert list(rows.nvitop(answer)) == [
        Row(406, "0", "C", memory_bytes=520 * MIB),
        Row(7, "1", "X", memory_bytes=1634 * MIB),
        Row(8, "1", "G", memory_bytes=round(19.53 * 1024 * MIB)),
    ]
    assert list(rows.nvitop("│ Processes: │\n│  No running processes found │\n")) == []


def test_gpustat() -> None:
    process = {"username": "root", "command": "python3", "gpu_memory_usage": 1634, "pid": 406}
    unknown = {"username": "?", "command": "?", "gpu_memory_usage": None, "pid": 7}
    answer = {"hostname": "h", "gpus": [{"index": 0, "processes": [process, unknown]}, {"index": 1, "processes": None}]}
    assert list(rows.gpustat(json.dumps(answer))) == [
        Row(406, "0", name="python3", memory_bytes=1634 * MIB),
        Row(7, "0", name="?"),
    ]


def test_the_asker_is_not_in_its_own_answer() -> None:
    found = [{"gpu": 0, "pid": pid, "memory_bytes": None} for pid in (5, 9, 5)]
    assert list(rows.ask(json.dumps({"asker": 9, "rows": found}))) == [Row(5, "0"), Row(5, "0")]


@pytest.mark.parametrize(
    ("text", "expected"),
    [("1634 MiB", 1634 * MIB), ("1.5GiB", 1536 * MIB), ("12KiB", 12 << 10), ("0B", 0), ("[N/A]", None), ("N/A", None)],
)
def test_memory(text: str, expected: int | None) -> None:
    assert rows.memory(text) == expected


A = Row(2, "0", "C", "python3", 600 * MIB)
B = Row(3, "0", "C", "python3", 700 * MIB)
TRUTH = {2: 100 * MIB, 3: 200 * MIB}


def test_equal_in_any_order() -> None:
    assert judge([A, B], [B, A], TRUTH).verdict is Verdict.EQUAL


def test_the_drivers_repeat_is_explained() -> None:
    assert judge([A, B], [A, B, B, B], TRUTH) == (Verdict.EXPLAINED, rows.DUPLICATES)


@pytest.mark.parametrize(
    ("ours", "drivers"),
    [
        ([A, B, B], [A, B]),
        ([A, B, B], [A, B, B]),
        ([A], [A, B, B]),
        ([A], [A]),
        ([], []),
        ([A, B, Row(4)], [A, B, Row(4)]),
        ([A, B], [A, B._replace(memory_bytes=None)]),
        ([A, B._replace(memory_bytes=None)], [A, B]),
        ([A, B._replace(memory_bytes=150 * MIB)], [A, B._replace(memory_bytes=150 * MIB)]),
        ([A, B._replace(pid=4002)], [A, B, B]),
    ],
)
def test_everything_else_is_different(ours: list[Row], drivers: list[Row]) -> None:
    assert judge(ours, drivers, TRUTH).verdict is Verdict.DIFFERENT


def test_pids_alone_are_judged_where_a_tool_tells_no_memory() -> None:
    assert judge([Row(2), Row(3)], [Row(3), Row(2)], TRUTH.keys()).verdict is Verdict.EQUAL
    assert judge([Row(2)], [Row(2)], TRUTH.keys()).verdict is Verdict.DIFFERENT
