"""Translation of params by rules 5 and 6, over PID views that are plain tables."""

from __future__ import annotations

import struct
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

import pytest
from hypothesis import given
from hypothesis import strategies as st

from mpu_notify.rm.controls import (
    ACCOUNTING_INFO,
    ACCOUNTING_PIDS,
    CONTROL_TABLE,
    CONTROLS,
    GPU_PID_INFO,
    GPU_PID_INFO_R440,
    GPU_PID_INFO_R460,
    GPU_PIDS,
    HWPM_RESERVATION,
    LEFT_ALONE,
    NVENC_SESSIONS,
    NVENC_SESSIONS_V2,
    NVENC_SESSIONS_V2_525,
    NVFBC_SESSIONS,
    UTIL_SAMPLES_515,
    UTIL_SAMPLES_525,
    UTIL_SAMPLES_550,
    UTIL_SAMPLES_570,
    Control,
    Direction,
)
from mpu_notify.supervisor.translation import UNKNOWN_PID, translate_in, translate_out

NOW = 1_000_000
INFO_LAYOUTS = [GPU_PID_INFO, GPU_PID_INFO_R460, GPU_PID_INFO_R440]

pid_numbers = st.integers(1, 2**22)
any_number = st.integers(0, 2**32 - 1)


@dataclass
class Table:
    """A PID view that a test wrote down: host id to process id, and which hosts started after the ioctl."""

    hosts: Mapping[int, int]
    late: frozenset[int] = frozenset()
    asked: list[int] = field(default_factory=list)

    def to_views(self, host_ids: Sequence[int]) -> list[int | None]:
        return [self.hosts.get(host) for host in host_ids]

    def to_hosts(self, pids: Sequence[int]) -> list[int | None]:
        backwards = {pid: host for host, pid in self.hosts.items()}
        return [backwards.get(pid) for pid in pids]

    def started_by(self, host_id: int, when_ns: int) -> bool:
        assert when_ns == NOW
        return host_id not in self.late


def gpu_pids(pids: Sequence[int], count: int | None = None, stale: int = 0xEE) -> bytes:
    """GPU_GET_PIDS as a driver leaves it: beyond the count, what the caller had there."""
    head = struct.pack("<III", 0, 0xCBC0, len(pids) if count is None else count)
    table = b"".join(struct.pack("<I", pid) for pid in pids)
    return (head + table).ljust(GPU_PIDS.size, bytes([stale]))


def pid_info(control: Control, pids: Sequence[int], count: int | None = None) -> bytes:
    """GPU_GET_PID_INFO with a result and data in each entry that tell which entry it is."""
    stride = control.table.stride
    entries = [struct.pack("<III", pid, 0, 0).ljust(stride, bytes([index + 1])) for index, pid in enumerate(pids)]
    return struct.pack("<II", len(pids) if count is None else count, 0).ljust(8) + b"".join(entries).ljust(200 * stride)


def listed(hosts: Sequence[int], view: Table) -> list[int]:
    answer = translate_out(GPU_PIDS, None, gpu_pids(hosts), view, NOW)
    assert answer is not None
    assert len(answer.params) == GPU_PIDS.size
    pids = GPU_PIDS.table.pids(answer.params)
    assert pids is not None
    tail = answer.params[12 + 4 * len(pids) :]
    assert tail == bytes(len(tail)), "nothing stale behind the list"
    assert answer.params[:8] == gpu_pids([])[:8], "what was asked stays"
    return pids


def test_the_control_table_has_the_layouts_that_the_drivers_have() -> None:
    assert set(CONTROL_TABLE) == {
        (0x2080018D, 3812),
        *((0x2080018E, 14408), (0x2080018E, 9608), (0x2080018E, 8008)),
        *((0x20802096, 47216), (0x20802096, 34000), (0x20802096, 50704), (0x20802096, 55888)),
        *((0xB03, 48), (0xB04, 16012)),
        *((0x2080016E, 16), (0x208001A9, 16388), (0x208001AF, 16388), (0x2080017C, 13316)),
        (0x90CC0103, 12),
    }


def test_foreign_pids_are_removed_and_the_list_closed_up() -> None:
    assert listed([100, 7, 200, 8, 300], Table({100: 1, 200: 2, 300: 3})) == [1, 2, 3]


def test_an_empty_list_and_a_wholly_foreign_one_are_empty() -> None:
    assert listed([], Table({})) == []
    assert listed([5, 6, 7], Table({})) == []


def test_repeats_are_removed() -> None:
    assert listed([100, 200, 100, 101], Table({100: 1, 101: 1, 200: 2})) == [1, 2]


def test_a_process_that_started_after_the_ioctl_is_not_the_one_the_driver_meant() -> None:
    assert listed([100, 200], Table({100: 1, 200: 2}, late=frozenset({100}))) == [2]


def test_a_full_list_of_950_is_translated() -> None:
    assert listed(range(1000, 1950), Table({host: host - 999 for host in range(1000, 1950)})) == list(range(1, 951))


@given(hosts=st.lists(pid_numbers, max_size=950), view=st.dictionaries(pid_numbers, pid_numbers, max_size=50))
def test_a_list_never_has_zero_nor_a_pid_that_is_not_in_the_view(hosts: list[int], view: dict[int, int]) -> None:
    pids = listed(hosts, Table(view))
    assert pids == list(dict.fromkeys(view[host] for host in hosts if host in view))


@pytest.mark.parametrize("count", [951, 2**31, 2**32 - 1])
def test_a_count_that_no_driver_gives_is_declined(count: int) -> None:
    assert translate_out(GPU_PIDS, None, gpu_pids([1], count=count), Table({1: 1}), NOW) is None


def test_what_was_never_asked_is_not_given_back() -> None:
    assert translate_out(GPU_PID_INFO, None, pid_info(GPU_PID_INFO, [1]), Table({1: 1}), NOW) is None


@pytest.mark.parametrize("control", INFO_LAYOUTS, ids=lambda control: str(control.size))
@given(pids=st.lists(any_number, min_size=1, max_size=200), view=st.dictionaries(pid_numbers, pid_numbers, max_size=9))
def test_the_driver_is_asked_about_host_pids_and_never_about_a_number_outside(
    control: Control, pids: list[int], view: dict[int, int]
) -> None:
    table = Table({host: pid for pid, host in view.items()})
    backwards = {pid: host for host, pid in table.hosts.items()}
    params = pid_info(control, pids)
    asked = translate_in(control, params, table)
    assert asked is not None
    numbers = control.table.pids(asked.params)
    assert numbers == [0 if pid == 0 else backwards.get(pid, UNKNOWN_PID) for pid in pids]
    blanked = bytearray(asked.params)
    for index, pid in enumerate(pids):
        control.table.put(blanked, index, pid)
    assert blanked == params, "only the numbers were touched"


@pytest.mark.parametrize("control", INFO_LAYOUTS, ids=lambda control: str(control.size))
@given(pids=st.lists(st.sampled_from([0, 1, 2, 3, 77]), min_size=1, max_size=200))
def test_the_caller_gets_its_own_numbers_back_with_the_drivers_data(control: Control, pids: list[int]) -> None:
    view = Table({1001: 1, 1002: 2, 1003: 3})
    params = pid_info(control, pids)
    asked = translate_in(control, params, view)
    assert asked is not None
    answer = translate_out(control, asked, asked.params, view, NOW)
    assert answer is not None
    assert answer.params == params


@pytest.mark.parametrize("control", INFO_LAYOUTS, ids=lambda control: str(control.size))
def test_data_of_a_pid_that_may_have_been_anothers_when_the_driver_was_asked_is_blanked(control: Control) -> None:
    before = Table({1001: 1, 1002: 2, 1003: 3})
    after = Table({1001: 1, 1003: 3}, late=frozenset({1003}))
    params = pid_info(control, [1, 2, 3])
    asked = translate_in(control, params, before)
    assert asked is not None
    answer = translate_out(control, asked, asked.params, after, NOW)
    assert answer is not None
    stride = control.table.stride
    kept, gone, reused = (answer.params[8 + stride * index : 8 + stride * (index + 1)] for index in range(3))
    assert kept == params[8 : 8 + stride]
    assert gone == struct.pack("<I", 2).ljust(stride, b"\0")
    assert reused == struct.pack("<I", 3).ljust(stride, b"\0")


@pytest.mark.parametrize("control", INFO_LAYOUTS, ids=lambda control: str(control.size))
@pytest.mark.parametrize("count", [0, 201, 2**32 - 1])
def test_a_count_that_the_driver_refuses_is_left_to_it(control: Control, count: int) -> None:
    assert translate_in(control, pid_info(control, [1], count=count), Table({1: 1})) is None


@pytest.mark.parametrize("control", INFO_LAYOUTS, ids=lambda control: str(control.size))
def test_an_answer_with_another_count_than_asked_is_declined(control: Control) -> None:
    view = Table({1: 1})
    asked = translate_in(control, pid_info(control, [1, 1]), view)
    assert asked is not None
    assert translate_out(control, asked, pid_info(control, [1]), view, NOW) is None


def out(control: Control, params: bytes, view: Table) -> bytes:
    answer = translate_out(control, None, params, view, NOW)
    assert answer is not None
    assert len(answer.params) == control.whole_size
    return answer.params


def test_no_control_that_is_left_alone_is_in_the_table() -> None:
    assert not LEFT_ALONE.keys() & {control.cmd for control in CONTROLS}


@pytest.mark.parametrize("control", CONTROLS, ids=lambda control: f"{control.name}-{control.size}")
def test_every_table_lies_within_its_params(control: Control) -> None:
    for table in control.tables:
        last = table.entries + table.stride * (table.capacity - 1)
        assert last + (table.size or table.stride) <= control.whole_size
        assert table.count is None or table.count + 4 <= control.size


ANSWERED = [control for control in CONTROLS if control.direction is Direction.ANSWERED]


@pytest.mark.parametrize("control", ANSWERED, ids=lambda control: f"{control.name}-{control.size}")
@given(data=st.data())
def test_whatever_a_driver_answers_no_pid_gets_through_but_the_views(control: Control, data: st.DataObject) -> None:
    seed = data.draw(st.binary(min_size=1, max_size=64))
    params = bytearray((seed * (control.whole_size // len(seed) + 1))[: control.whole_size])
    if control.table.count is not None:
        struct.pack_into("<I", params, control.table.count, data.draw(st.integers(0, control.table.capacity)))
    hosts = {host for table in control.tables for host in table.pids(params) or ()}
    known = data.draw(st.sets(st.sampled_from(sorted(hosts)), max_size=5)) if hosts else set()
    view = {host: 5_000_000 + index for index, host in enumerate(sorted(known))}
    answer = out(control, bytes(params), Table(view))
    for table in control.tables:
        pids = table.pids(answer)
        assert pids is not None
        nobody = {0, table.invalid} if table.count is None else set()
        assert set(pids) <= set(view.values()) | nobody
        if table.kernel_address is not None:
            addresses = (table.entries + table.stride * index + table.kernel_address for index in range(table.capacity))
            assert not any(answer[at : at + 8].strip(b"\0") for at in addresses)


SESSIONS = [(NVENC_SESSIONS, 32), (NVENC_SESSIONS_V2, 32), (NVENC_SESSIONS_V2_525, 32), (NVFBC_SESSIONS, 52)]


@pytest.mark.parametrize(("control", "stride"), SESSIONS)
@given(hosts=st.lists(st.integers(1, 9), max_size=256))
def test_sessions_keep_what_is_theirs_and_close_up(control: Control, stride: int, hosts: list[int]) -> None:
    rows = [struct.pack("<II", host, 0).ljust(stride, bytes([index % 256])) for index, host in enumerate(hosts)]
    start = 16 if control is NVENC_SESSIONS else 4
    params = struct.pack("<I", len(hosts)).ljust(start, b"\xdd") + b"".join(rows)
    answer = out(control, params.ljust(control.whole_size, b"\xee"), Table({1: 41, 2: 42, 3: 43}))
    kept = [struct.pack("<I", host + 40) + row[4:] for host, row in zip(hosts, rows, strict=True) if host <= 3]
    expected = struct.pack("<I", len(kept)).ljust(start, b"\xdd") + b"".join(kept)
    assert answer == expected.ljust(control.whole_size, b"\0"), "a process may have several"


def test_a_process_with_two_sessions_has_two() -> None:
    params = struct.pack("<I", 2) + struct.pack("<II24x", 7, 0) * 2
    answer = out(NVENC_SESSIONS_V2, params.ljust(16388, b"\0"), Table({7: 1}))
    assert answer == (struct.pack("<I", 2) + struct.pack("<II24x", 1, 0) * 2).ljust(16388, b"\0")


@given(hosts=st.lists(pid_numbers, max_size=100), view=st.dictionaries(pid_numbers, pid_numbers, max_size=50))
def test_accounted_processes_are_listed_once(hosts: list[int], view: dict[int, int]) -> None:
    table = b"".join(struct.pack("<I", host) for host in hosts)
    params = struct.pack("<II", 6, 0) + table.ljust(16000, b"\xee") + struct.pack("<I", len(hosts))
    answer = out(ACCOUNTING_PIDS, params, Table(view))
    pids = list(dict.fromkeys(view[host] for host in hosts if host in view))
    expected = b"".join(struct.pack("<I", pid) for pid in pids).ljust(16000, b"\0")
    assert answer == struct.pack("<II", 6, 0) + expected + struct.pack("<I", len(pids))


def test_an_account_is_asked_for_by_host_pid_and_given_back_by_the_callers() -> None:
    view = Table({1001: 1})
    asked = translate_in(ACCOUNTING_INFO, struct.pack("<III", 6, 1, 0).ljust(48, b"\xaa"), view)
    assert asked is not None
    assert asked.params == struct.pack("<III", 6, 1001, 0).ljust(48, b"\xaa")
    answer = translate_out(ACCOUNTING_INFO, asked, asked.params, view, NOW)
    assert answer is not None
    assert answer.params == struct.pack("<III", 6, 1, 0).ljust(48, b"\xaa")


@pytest.mark.parametrize("after", [Table({}), Table({1001: 1}, late=frozenset({1001}))])
def test_an_account_of_what_may_be_another_process_is_empty(after: Table) -> None:
    asked = translate_in(ACCOUNTING_INFO, struct.pack("<III", 6, 1, 0).ljust(48, b"\xaa"), Table({1001: 1}))
    assert asked is not None
    answer = translate_out(ACCOUNTING_INFO, asked, asked.params, after, NOW)
    assert answer is not None
    assert answer.params == struct.pack("<III", 6, 1, 0).ljust(48, b"\0")


@pytest.mark.parametrize(("host", "pid"), [(1001, 1), (7, 0), (0, 0)])
def test_a_reservation_of_nobody_who_is_visible_has_no_pid(host: int, pid: int) -> None:
    answer = out(HWPM_RESERVATION, struct.pack("<III", 1, host, 1), Table({1001: 1}))
    assert answer == struct.pack("<III", 1, pid, 1)


UTILISATION = [
    (UTIL_SAMPLES_515, 4, 116),
    (UTIL_SAMPLES_525, 4, 116),
    (UTIL_SAMPLES_550, 6, 116),
    (UTIL_SAMPLES_570, 6, 128),
]


@pytest.mark.parametrize(
    ("control", "engines", "size"), UTILISATION, ids=lambda value: str(getattr(value, "size", value))
)
@given(st.data())
def test_each_engine_of_a_sample_is_on_its_own(control: Control, engines: int, size: int, data: st.DataObject) -> None:
    count = control.table.capacity * engines
    users = data.draw(st.lists(st.sampled_from([1001, 1002, 7, 0xFFFFFFFF, 0]), min_size=8, max_size=8))
    hosts = [users[index % 8] for index in range(count)]

    def engine(pid: int, *, known: bool = True) -> bytes:
        used = struct.pack("<4I", 9, 1, pid, 3).ljust(116, b"n") if known else struct.pack("<4I100x", 0, 0, pid, 0)
        return used.ljust(120, b"\0")[: min(size, 120)]

    address = b"\xff" * (size - 120) if size > 120 else b""
    given_pids = {1001: 1, 1002: 2}
    before, after = b"", b""
    for index in range(control.table.capacity):
        row = hosts[index * engines : (index + 1) * engines]
        before += struct.pack("<Q", index) + b"".join(engine(host) + address for host in row)
        pids = [(given_pids.get(host, host if host in (0, 0xFFFFFFFF) else 0xFFFFFFFF), host != 7) for host in row]
        after += struct.pack("<Q", index) + b"".join(
            engine(pid, known=known) + bytes(len(address)) for pid, known in pids
        )
    head = struct.pack("<4I", 2, 55872, 0, 55096)
    assert out(control, head + before, Table({1001: 1, 1002: 2})) == head + after


controls = st.sampled_from([GPU_PIDS, *INFO_LAYOUTS])
views = st.dictionaries(pid_numbers, pid_numbers, max_size=8)


@st.composite
def any_params(draw: st.DrawFn, control: Control, numbers: st.SearchStrategy[int] = any_number) -> bytes:
    """Params of a control with anything in them; mostly with a count that a driver may give, of likely numbers."""
    table = control.table
    filler = draw(st.binary(min_size=16, max_size=16))
    params = bytearray((filler * (control.size // 16 + 1))[: control.size])
    pids = draw(st.lists(numbers, max_size=12))
    for index, pid in enumerate(pids):
        table.put(params, index, pid)
    if draw(st.booleans()):
        struct.pack_into("<I", params, table.count, len(pids))
    return bytes(params)


def without_pids(control: Control, params: bytes) -> bytes:
    """What of the params is no process id."""
    rest = bytearray(params)
    for index in range(control.table.capacity):
        control.table.put(rest, index, 0)
    return bytes(rest)


@given(data=st.data(), view=views, late=st.frozensets(pid_numbers, max_size=4))
def test_whatever_the_driver_answers_no_pid_but_those_of_the_view_comes_through(
    data: st.DataObject, view: dict[int, int], late: frozenset[int]
) -> None:
    near = st.one_of(any_number, st.sampled_from([0, *view, *view.values()]))
    params = data.draw(any_params(GPU_PIDS, near))
    answer = translate_out(GPU_PIDS, None, params, Table(view, late), NOW)
    before = GPU_PIDS.table.pids(params)
    assert (answer is None) == (before is None)
    if answer is None or before is None:
        return
    pids = GPU_PIDS.table.pids(answer.params)
    assert pids is not None
    assert len(answer.params) == len(params)
    assert set(pids) <= {view[host] for host in before if host in view and host not in late}
    assert len(set(pids)) == len(pids) <= len(before)
    end = GPU_PIDS.table.entries + GPU_PIDS.table.stride * len(pids)
    assert not any(answer.params[end:])
    assert answer.params[: GPU_PIDS.table.count] == params[: GPU_PIDS.table.count]


@given(data=st.data(), own=st.frozensets(pid_numbers, min_size=1, max_size=8))
def test_numbers_that_are_native_already_stay_as_they_are(data: st.DataObject, own: frozenset[int]) -> None:
    view = Table({pid: pid for pid in own})
    params = data.draw(any_params(GPU_PIDS, st.sampled_from(sorted(own)) | any_number))
    once = translate_out(GPU_PIDS, None, params, view, NOW)
    if once is None:
        return
    assert translate_out(GPU_PIDS, None, once.params, view, NOW) == once._replace(before=once.after)
    assert list(once.after) == [pid for pid in dict.fromkeys(once.before) if pid in own]


@given(data=st.data(), control=st.sampled_from(INFO_LAYOUTS), view=views, late=st.frozensets(pid_numbers, max_size=4))
def test_whatever_is_asked_and_answered_the_caller_has_its_own_numbers(
    data: st.DataObject, control: Control, view: dict[int, int], late: frozenset[int]
) -> None:
    table = Table(view, late)
    params = data.draw(any_params(control, st.one_of(any_number, st.sampled_from([0, *view, *view.values()]))))
    asked = translate_in(control, params, table)
    if asked is None:
        assert not control.table.pids(params)
        return
    numbers = control.table.pids(asked.params)
    assert numbers is not None
    assert set(numbers) <= {0, UNKNOWN_PID, *view}
    answered = data.draw(any_params(control) | st.just(asked.params))
    answer = translate_out(control, asked, answered, table, NOW)
    if answer is None:
        assert control.table.pids(answered) is None or answered != asked.params
        return
    assert control.table.pids(answer.params) == control.table.pids(params) == list(asked.before)
    for index, host in enumerate(numbers):
        start = control.table.entries + control.table.stride * index
        data_of = slice(start + 8, start + control.table.stride)
        may_be_seen = host not in late
        assert answer.params[data_of] == (answered[data_of] if may_be_seen else bytes(control.table.stride - 8))


@given(data=st.data(), control=controls, view=views)
def test_what_a_view_does_not_know_is_not_in_what_the_log_shows_either(
    data: st.DataObject, control: Control, view: dict[int, int]
) -> None:
    params = data.draw(any_params(control))
    asked = translate_in(control, params, Table(view))
    answer = translate_out(control, asked, asked.params if asked else params, Table(view), NOW)
    if answer is not None:
        assert list(answer.after) == control.table.pids(answer.params)
        assert without_pids(control, answer.params)[: control.table.count] == params[: control.table.count]


@given(data=st.data(), control=controls, pids=st.lists(any_number, max_size=200))
def test_a_table_holds_what_is_put_in_it_and_nothing_else_changes(
    data: st.DataObject, control: Control, pids: list[int]
) -> None:
    table = control.table
    params = bytearray(data.draw(any_params(control)))
    before = bytes(params)
    table.replace(params, pids)
    assert table.pids(params) == pids
    assert len(params) == control.size
    outside = [*range(table.count), *range(table.count + 4, table.entries)]
    assert all(params[at] == before[at] for at in outside)
