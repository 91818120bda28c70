"""What tests/gpu reads out of the tools' answers, and how it judges two of them."""

from __future__ import annotations

import json
import struct

import pytest

from tests.gpu import raw, rows, tools
from tests.gpu.raw import Told
from tests.gpu.rows import MIB, Judgement, Row, Truth, Verdict, judge
from tests.gpu.scene import Answer

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
gpu_bus_id, pid, process_name, used_gpu_memory [MiB]
00000000:06:00.0, 406, /usr/bin/python3, 1634 MiB
00000000:06:00.0, 7, /srv/odd, name, [N/A]
00000000:07:00.0, 8, [Not Found], 520 MiB
"""
    assert list(rows.compute_apps(answer)) == [
        Row(406, "00000000:06:00.0", name="python3", memory_bytes=1634 * MIB),
        Row(7, "00000000:06:00.0", name="odd, name"),
        Row(8, "00000000:07:00.0", name="[Not Found]", memory_bytes=520 * MIB),
    ]


def test_accounted_apps() -> None:
    head = "gpu_bus_id, pid, gpu_utilization [%], max_memory_usage [MiB]\n"
    assert list(rows.accounted_apps(head + "00000000:06:00.0, 406, 7 %, 1634 MiB\n")) == [406]
    assert list(rows.accounted_apps(head)) == []


def test_accounted_processes_of_nvml() -> None:
    lists = [{"gpu": 0, "pids": [406, 7], "error": "[406, 7]"}, {"gpu": 1, "pids": [], "error": "Not Supported"}]
    assert list(rows.ask_accounted(json.dumps({"lists": lists}))) == [406, 7]


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


def padded(text: str) -> str:
    """With the spaces that nvidia-smi has at the end of every line."""
    return text.replace("\n", "        \n")


def test_pmon_with_utilisation() -> None:
    answer = """\
# gpu         pid   type     sm    mem    enc    dec    jpg    ofa    command
# Idx           #    C/G      %      %      %      %      %      %    name
    0        406     C     98      7      -      -      0      -    python3
    1          7   C+G      -      -      -      -      -      -    odd name
    1          -     -      -      -      -      -      -      -    -
"""
    assert list(rows.pmon(padded(answer))) == [
        Row(406, "0", "C", "python3", use="sm 98 mem 7 jpg 0"),
        Row(7, "1", "C+G", "odd name"),
    ]


def test_pmon_with_utilisation_and_memory() -> None:
    answer = """\
# gpu         pid   type     sm    mem    enc    dec    jpg    ofa     fb   ccpm    command
# Idx           #    C/G      %      %      %      %      %      %     MB     MB    name
    0        406     C     24      3      -      -      -      -   1634      0    python3
"""
    assert list(rows.pmon(padded(answer))) == [Row(406, "0", "C", "python3", 1634 * MIB, "sm 24 mem 3")]


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
TRUTH = {("0", 2): 100 * MIB, ("0", 3): 200 * MIB}


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
        ([A, B._replace(gpu="1")], [A, B]),
        ([A, B._replace(gpu="1")], [A, B._replace(gpu="1")]),
    ],
)
def test_everything_else_is_different(ours: list[Row], drivers: list[Row]) -> None:
    assert judge(ours, drivers, TRUTH).verdict is Verdict.DIFFERENT


def test_a_process_may_be_on_more_gpus_than_it_computes_on_if_the_driver_says_so() -> None:
    also = B._replace(gpu="1", memory_bytes=None)
    assert judge([A, B, also], [A, B, also], TRUTH).verdict is Verdict.EQUAL
    assert judge([A, B, also], [A, B], TRUTH).verdict is Verdict.DIFFERENT


def test_pids_alone_are_judged_where_a_tool_tells_no_memory() -> None:
    assert judge([Row(2, "0"), Row(3, "0")], [Row(3, "0"), Row(2, "0")], TRUTH.keys()).verdict is Verdict.EQUAL
    assert judge([Row(2, "0")], [Row(2, "0")], TRUTH.keys()).verdict is Verdict.DIFFERENT


# -------------------------------------------------------------------------------- utilisation

#: Two processes of the place, 402 and 403 on the host; 440 and 441 are elsewhere, and 440 uses the GPU.
PLACE = Truth(TRUTH, {402: 2, 403: 3}, frozenset({440, 441}), frozenset({440}))


def used(pid: int, use: str = "sm 5") -> Row:
    return Row(pid, "0", use=use)


def test_utilisation_is_not_compared_but_who_has_some_is() -> None:
    judgement = rows.judge_use([used(2), used(3, "sm 90")], [used(3, "sm 7"), used(2)], PLACE, all_of=None)
    assert judgement == Judgement(Verdict.EQUAL)
    judgement = rows.judge_use([used(2)], [used(2), used(3)], PLACE, all_of=None)
    assert judgement == Judgement(Verdict.DIFFERENT, "not the same rows")


def test_processes_elsewhere_in_the_drivers_own_are_explained() -> None:
    assert rows.judge_use([used(2)], [used(2), used(440), used(441)], PLACE, all_of=None) == (
        Verdict.EXPLAINED,
        rows.FOREIGN,
    )


def test_processes_elsewhere_in_ours_are_not() -> None:
    for drivers in ([used(2), used(440)], [used(2)]):
        judgement = rows.judge_use([used(2), used(440)], drivers, PLACE, all_of=None)
        assert judgement.verdict is Verdict.DIFFERENT
        assert "not of this namespace [440]" in judgement.why


def test_an_unknown_process_in_the_drivers_own_is_not_explained() -> None:
    assert rows.judge_use([used(2)], [used(2), used(999)], PLACE, all_of=None).verdict is Verdict.DIFFERENT


def test_a_tool_that_lists_all_must_have_all() -> None:
    assert rows.judge_use([used(2)], [used(2)], PLACE, all_of=TRUTH.keys()).verdict is Verdict.DIFFERENT
    assert rows.judge_use([A, B], [A, B], PLACE, all_of=TRUTH).verdict is Verdict.EQUAL


# -------------------------------------------------------------------------------- raw controls

ADDRESS = 0xFFFF8881148CD740
NOBODY = raw.NO_PROCESS


def utilisation(*samples: tuple[int, int, int], gpu: str = "0", use: int = 37) -> Told:
    """An answer with (time, process, address) in the second engine of each sample; no other names any."""
    params = bytearray(55888)
    struct.pack_into("<B3xIII", params, 0, 2, 55872, 0, 776)
    for index in range(72):
        time, pid, address = samples[index] if index < len(samples) else (1000 + index, NOBODY, 0)
        start = 16 + 776 * index
        struct.pack_into("<Q", params, start, time)
        for engine in range(6):
            block = (use, 1, pid, 0, b"", address) if engine == 1 else (0, 1, NOBODY, 0xFFFFFFFF, b"", 0)
            struct.pack_into("<IIII100s4xQ", params, start + 8 + 128 * engine, *block)
    return Told(gpu, raw.UTILISATION, None, 0, bytes(params))


def refused(told: Told, status: int) -> Told:
    return told._replace(status=status, params=bytes(len(told.params)))


def judged(ours: Told, drivers: Told) -> Judgement:
    return raw.judge([ours], [drivers], PLACE).judgement


def test_samples_are_decoded() -> None:
    found = raw.samples(utilisation((1, 402, ADDRESS), (1, NOBODY, 0), (2, 403, 0)).params)
    assert found.head == (2, 55872)
    assert len(found.by_time) == 72
    assert found.by_time[1, 0][1] == raw.Block(37, 1, 402, 0, bytes(100), ADDRESS)
    assert found.by_time[1, 1][1].pid == NOBODY
    assert found.processes() == {402: 1, 403: 1}
    assert found.addresses == 1


def test_an_address_is_found_wherever_it_is() -> None:
    assert raw.kernel_addresses(struct.pack("<IIQI", 1, 0xFFFFFFFF, ADDRESS, 0xFFFFFFFF)) == [8]
    assert raw.kernel_addresses(struct.pack("<IQI", 1, ADDRESS, 0xFFFFFFFF)) == [4]
    assert raw.kernel_addresses(utilisation((1, 2, 0)).params) == []


def test_samples_of_ones_own_are_equal_though_the_ring_moved_on() -> None:
    ours = utilisation((7, NOBODY, 0), (5, 2, 0), (6, 3, 0))
    drivers = utilisation((5, 2, 0), (6, 3, 0), (8, NOBODY, 0))
    assert judged(ours, drivers) == Judgement(Verdict.EQUAL)


def test_foreign_samples_in_the_drivers_own_are_explained() -> None:
    ours, drivers = utilisation((5, 2, 0), (6, NOBODY, 0)), utilisation((5, 2, 0), (6, 440, ADDRESS))
    outcome = raw.judge([ours], [drivers], PLACE)
    assert outcome.judgement == (Verdict.EXPLAINED, raw.FOREIGN_SAMPLES)
    assert outcome.translated
    assert "1 of others, hidden (1 keep their utilisation)" in outcome.note
    assert "kernel addresses: ours 0, the driver's own 1" in outcome.note


def test_a_number_that_is_also_one_of_the_place_is_foreign_where_the_driver_left_the_address() -> None:
    place = Truth({}, {402: 2, 403: 440}, frozenset({440}), frozenset({440}))
    ours, drivers = utilisation((5, NOBODY, 0)), utilisation((5, 440, ADDRESS))
    assert raw.judge([ours], [drivers], place).judgement.verdict is Verdict.EXPLAINED
    assert raw.judge([utilisation((5, 440, 0))], [drivers], place).judgement.verdict is Verdict.DIFFERENT


@pytest.mark.parametrize(
    ("ours", "drivers", "why"),
    [
        (utilisation((5, 440, 0)), utilisation((5, 440, ADDRESS)), "not of this namespace [440]"),
        (utilisation((5, 402, 0)), utilisation((5, 2, 0)), "not of this namespace [402]"),
        (utilisation((5, NOBODY, ADDRESS)), utilisation((5, 440, ADDRESS)), "1 kernel addresses"),
        (utilisation((5, 2, ADDRESS)), utilisation((5, 2, 0)), "1 kernel addresses"),
        (utilisation((5, NOBODY, 0)), utilisation((5, 2, 0)), "the driver's own (37, 1, 2, 0)"),
        (utilisation((5, 3, 0)), utilisation((5, 2, 0)), "gr has (37, 1, 3, 0), the driver's own (37, 1, 2, 0)"),
        (utilisation((5, 2, 0), use=1), utilisation((5, 2, 0), use=2), "gr has (1, 1, 2, 0)"),
        (utilisation(*((n, 2, 0) for n in range(72))), utilisation(*((n + 100, 3, 0) for n in range(72))), "no sample"),
    ],
)
def test_every_other_difference_of_samples_is_one(ours: Told, drivers: Told, why: str) -> None:
    judgement = judged(ours, drivers)
    assert judgement.verdict is Verdict.DIFFERENT
    assert why in judgement.why


def test_who_is_sampled_is_compared_where_no_sample_is_in_common() -> None:
    ours, drivers = (utilisation(*((n + start, 2, 0) for n in range(72))) for start in (0, 100))
    assert judged(ours, drivers) == Judgement(Verdict.EQUAL)


def test_what_is_refused_alike_is_said_to_be() -> None:
    ours = refused(utilisation(), 0x56)
    outcome = raw.judge([ours], [ours], PLACE)
    assert outcome.judgement.verdict is Verdict.REFUSED
    assert outcome.note == "0x20802096: 0x56 (not supported)"
    assert not outcome.translated
    assert judged(ours, utilisation()).verdict is Verdict.DIFFERENT
    assert judged(utilisation(), ours).verdict is Verdict.DIFFERENT
    assert judged(ours, refused(utilisation(), 0x1F)).verdict is Verdict.DIFFERENT


def test_the_worst_of_several_answers_counts() -> None:
    good, bad = utilisation((5, 2, 0)), utilisation((5, 440, 0), gpu="1")
    right = utilisation((5, 440, ADDRESS), gpu="1")
    assert raw.judge([good, bad], [good, right], PLACE).judgement.verdict is Verdict.DIFFERENT
    assert raw.judge([good], [good, right], PLACE).judgement.verdict is Verdict.FAILED
    assert raw.judge([], [], PLACE).judgement.verdict is Verdict.FAILED


def table(control: int, *pids: int) -> Told:
    """An answer that lists processes, by the headers' offsets of count and first entry, and stride."""
    size, count, first, stride = {
        raw.ACCOUNTING_PIDS: (16012, 16008, 8, 4),
        raw.ENCODER_SESSIONS_V1: (16 + 512 * 32, 0, 16, 32),
        raw.ENCODER_SESSIONS: (16388, 0, 4, 32),
        raw.CAPTURE_SESSIONS: (13316, 0, 4, 52),
    }[control]
    params = bytearray(size)
    struct.pack_into("<I", params, count, len(pids))
    for index, pid in enumerate(pids):
        struct.pack_into("<I", params, first + stride * index, pid)
    return Told("0", control, None, 0, bytes(params))


LISTS = (raw.ACCOUNTING_PIDS, raw.ENCODER_SESSIONS_V1, raw.ENCODER_SESSIONS, raw.CAPTURE_SESSIONS)


@pytest.mark.parametrize("control", LISTS)
def test_lists_of_processes(control: int) -> None:
    assert judged(table(control), table(control)) == Judgement(Verdict.EQUAL)
    assert judged(table(control, 2, 3), table(control, 2, 3)) == Judgement(Verdict.EQUAL)
    assert judged(table(control, 2), table(control, 440, 402)) == (Verdict.EXPLAINED, raw.UNTRANSLATED)
    assert judged(table(control), table(control, 440)) == (Verdict.EXPLAINED, raw.UNTRANSLATED)
    assert judged(table(control, 440), table(control, 440)).verdict is Verdict.DIFFERENT
    assert judged(table(control, 2), table(control, 2, 403)).verdict is Verdict.DIFFERENT
    assert judged(table(control, 2), table(control)).verdict is Verdict.DIFFERENT


def test_the_asker_is_not_in_a_list_either() -> None:
    ours = table(raw.ACCOUNTING_PIDS, 2, 9)._replace(asker=9)
    assert judged(ours, table(raw.ACCOUNTING_PIDS, 2)) == Judgement(Verdict.EQUAL)
    assert judged(ours._replace(asker=8), table(raw.ACCOUNTING_PIDS, 2)).verdict is Verdict.DIFFERENT


def test_a_list_that_cannot_be_is_an_error() -> None:
    told = table(raw.CAPTURE_SESSIONS)
    with pytest.raises(ValueError, match="counts 257 entries"):
        raw.listed(told._replace(params=struct.pack("<I", 257) + told.params[4:]))


def account(about: int, answered: int) -> Told:
    params = bytearray(48)
    struct.pack_into("<II", params, 0, 6, answered)
    return Told("0", raw.ACCOUNTING_INFO, about, 0, bytes(params))


def test_accounts_of_processes() -> None:
    assert judged(account(2, 2), account(2, 2)) == Judgement(Verdict.EQUAL)
    assert judged(account(2, 2), account(2, 402)) == (Verdict.EXPLAINED, raw.HOST_PID_BACK)
    assert judged(account(2, 402), account(2, 402)).verdict is Verdict.DIFFERENT
    assert judged(account(2, 2), account(2, 403)).verdict is Verdict.DIFFERENT
    unknown = refused(account(2, 2), 0x57)
    assert judged(unknown, unknown).verdict is Verdict.REFUSED
    assert judged(unknown, account(2, 402)).verdict is Verdict.DIFFERENT


def test_accounts_of_processes_elsewhere_are_refused_or_the_drivers_own() -> None:
    told = account(440, 440)
    assert judged(refused(told, 0x57), told) == (Verdict.EXPLAINED, rows.FOREIGN)
    assert judged(refused(told, 0x57), refused(told, 0x57)).verdict is Verdict.REFUSED
    assert judged(told, told) == (Verdict.EXPLAINED, raw.LEFT_TO_THE_DRIVER)
    assert judged(told, refused(told, 0x57)).verdict is Verdict.DIFFERENT
    assert judged(account(440, 441), told).verdict is Verdict.DIFFERENT


def test_answers_to_raw_controls_are_read() -> None:
    one = {"gpu": 1, "control": 0xB03, "about": 2, "status": 0, "size": 48, "params": "0600000002"}
    other = {**one, "about": None, "status": None, "error": "no such device", "params": ""}
    assert raw.answers(json.dumps({"asker": 9, "answers": [one, other]})) == [
        Told("1", 0xB03, 2, 0, b"\6\0\0\0\2".ljust(48, b"\0"), asker=9),
        Told("1", 0xB03, None, None, bytes(48), "no such device", asker=9),
    ]


# -------------------------------------------------------------------------------- text


def said(out: str, status: int = 0, err: str = "") -> Answer:
    return Answer(status, out, err, 0.1)


def test_words_are_compared() -> None:
    def verdict(ours: Answer, drivers: Answer) -> Verdict:
        return tools.judge_words(ours, drivers, PLACE).judgement.verdict

    assert verdict(said("none \n\n"), said("none\n")) is Verdict.EQUAL
    assert verdict(said("none"), said("some")) is Verdict.DIFFERENT
    assert verdict(said("none"), said("none", 3)) is Verdict.DIFFERENT
    assert verdict(said("", 3, "no"), said("", 3, "no")) is Verdict.REFUSED
    assert verdict(said("", 3, "no"), said("", 3, "never")) is Verdict.DIFFERENT


def test_accounted_processes_are_compared_where_the_words_differ() -> None:
    judged_by = tools.Accounts(rows.accounted_apps).judge
    assert judged_by(said("bus, 2, x\n"), said("bus, 402, x\nbus, 440, x\n"), PLACE).judgement == (
        Verdict.EXPLAINED,
        raw.UNTRANSLATED,
    )
    assert judged_by(said("bus, 440\n"), said("bus, 402\n"), PLACE).judgement.verdict is Verdict.DIFFERENT
    assert judged_by(said("pid\n"), said("pid\n"), PLACE).judgement == Judgement(Verdict.EQUAL)


def test_accounted_processes_are_of_the_namespace_though_the_words_be_the_same() -> None:
    judged_by = tools.Accounts(rows.accounted_apps).judge
    same = said("bus, 402, x\nbus, 440, x\n")
    assert judged_by(same, same, PLACE).judgement.verdict is Verdict.DIFFERENT
    other = said("bus, 2, another figure\n")
    assert judged_by(said("bus, 2, x\n"), other, PLACE).judgement == Judgement(Verdict.EQUAL)
    assert judged_by(said("bus, 2, x\n"), said("", 3), PLACE).judgement.verdict is Verdict.DIFFERENT


def test_words_have_no_host_pids() -> None:
    same = said("a session of 440\n")
    outcome = tools.judge_words(same, same, PLACE)
    assert outcome.judgement == Judgement(Verdict.DIFFERENT, "ours: host PIDs [440]")


def test_no_utilisation_at_all_is_compared_by_what_is_said() -> None:
    nothing = json.dumps({"asker": 9, "rows": [], "errors": [{"gpu": 0, "error": "Not Found"}]})
    other = nothing.replace("Not Found", "Not Supported")
    judged_by = tools.Use(rows.ask).judge
    another_asker = nothing.replace('"asker": 9', '"asker": 10')
    assert judged_by(said(nothing), said(another_asker), PLACE).judgement == Judgement(Verdict.EQUAL)
    assert judged_by(said(nothing), said(other), PLACE).judgement.verdict is Verdict.DIFFERENT
