"""What the stand-in tells NVML of its GPUs."""

from __future__ import annotations

import struct

import pytest

from mpu_notify.rm import abi
from mpu_notify.rm.abi import Status
from mpu_notify.standin import nvml
from mpu_notify.standin.model import CHIPS, GPU_MEMORY, Client, Key, Object, Options, RefusedError, State, Thread

from .test_standin_driver import HOST, FakeTask

GPUS = 2


@pytest.fixture
def state() -> State:
    return State(Options(gpus=GPUS, version="535.261.03"))


def ask(state: State, cmd: int, params: bytes, task: FakeTask | None = None, minor: int = 1) -> bytes:
    (key,) = [key for key in nvml.controls_for(state) if key[1] == cmd]
    row = nvml.controls_for(state)[key]
    assert len(params) in row.sizes
    each = Object(1, key[0], gpu=None if key[0] == abi.ROOT_CLIENT else state.gpus[minor])
    answer = bytearray(params)
    row.fill(task or FakeTask(), each, answer)
    assert len(answer) == len(params)
    return bytes(answer)


def test_every_control_is_one_that_no_translation_is_for(state: State) -> None:
    """What carries process ids is the model's own."""
    from mpu_notify.rm.controls import CONTROL_TABLE  # noqa: PLC0415 - beside what it is compared with

    keys: set[Key] = set(nvml.controls_for(state))
    assert not {cmd for _number, cmd in keys} & {cmd for cmd, _size in CONTROL_TABLE}


def test_a_gpu_is_found_by_its_id(state: State) -> None:
    card = state.gpus[1].card
    info = ask(state, nvml.GPU_GET_ID_INFO, struct.pack("<I36x", card.gpu_id))
    assert struct.unpack("<IIIIQIIIi", info) == (card.gpu_id, 1, 1, 0, 0, 0, card.gpu_id, 1, -1)
    pci = ask(state, nvml.GPU_GET_PCI_INFO, struct.pack("<I8x", card.gpu_id))
    assert struct.unpack("<IIHH", pci) == (card.gpu_id, 0, 0, card.slot)


@pytest.mark.parametrize(("cmd", "size"), [(nvml.GPU_GET_ID_INFO, 40), (nvml.GPU_GET_PCI_INFO, 12)])
def test_an_unknown_gpu_is_refused(state: State, cmd: int, size: int) -> None:
    with pytest.raises(RefusedError) as refused:
        ask(state, cmd, struct.pack("<I", 999).ljust(size, b"\0"))
    assert refused.value.status == Status.INVALID_ARGUMENT


def test_versions_are_written_where_the_caller_wants_them(state: State) -> None:
    task = FakeTask(pages={0x1000: bytearray(b"x" * 64)})
    ask(state, nvml.SYSTEM_GET_BUILD_VERSION, struct.pack("<I4xQQQ8x", 16, 0x1000, 0x1010, 0x1020), task)
    assert task.pages[0x1000].startswith(b"535.261.03\0xxxxx535.261.03\0xxxxx535.261.03\0")


def test_a_buffer_too_short_for_the_version_is_refused(state: State) -> None:
    with pytest.raises(RefusedError):
        ask(state, nvml.SYSTEM_GET_BUILD_VERSION, struct.pack("<I4xQQQ8x", 10, 0x1000, 0x1000, 0x1000))


@pytest.mark.parametrize("pairs", [0, 1, 3])
def test_information_is_filled_in_by_index_in_both_kinds_of_list(state: State, pairs: int) -> None:
    asked = b"".join(struct.pack("<II", index, 7) for index in (0x2A, 0x99, 0x11)[:pairs])
    expected = b"".join(struct.pack("<II", *pair) for pair in ((0x2A, 2), (0x99, 0), (0x11, 1))[:pairs])
    assert ask(state, nvml.GPU_GET_INFO_V2, struct.pack("<I", pairs) + asked) == struct.pack("<I", pairs) + expected
    task = FakeTask(pages={0x1000: bytearray(asked)})
    ask(state, nvml.GPU_GET_INFO, struct.pack("<I4xQ", pairs, 0x1000), task)
    assert task.pages[0x1000] == expected


def test_a_count_beyond_the_list_fills_in_what_there_is(state: State) -> None:
    answer = ask(state, nvml.GPU_GET_INFO_V2, struct.pack("<III", 0xFFFFFFFF, 0x2A, 0))
    assert answer == struct.pack("<III", 0xFFFFFFFF, 0x2A, 2)
    with pytest.raises(RefusedError):
        ask(state, nvml.GPU_GET_INFO, struct.pack("<I4xQ", 0xFFFFFFFF, 0x1000))


def test_free_memory_is_what_nobody_uses(state: State) -> None:
    process = FakeTask().process()
    client = Client(Object(1, abi.ROOT_CLIENT), process, Thread(500, ((HOST, 500),)), {})
    state.gpus[1].memory[client] = 64 << 20
    indexes = (nvml.TOTAL_RAM_SIZE, nvml.HEAP_SIZE, nvml.HEAP_FREE)
    asked = struct.pack("<I", 3) + b"".join(struct.pack("<II", index, 0) for index in indexes)
    answers = struct.unpack("<7I", ask(state, nvml.FB_GET_INFO_V2, asked))[2::2]
    assert answers == (GPU_MEMORY >> 10, GPU_MEMORY >> 10, (GPU_MEMORY >> 10) - (64 << 10))


def test_gpus_have_ids_of_their_own(state: State) -> None:
    answers = {ask(state, nvml.GPU_GET_GID_INFO, bytes(268), minor=minor) for minor in range(GPUS)}
    assert len(answers) == GPUS
    assert {struct.unpack_from("<I", answer, 8)[0] for answer in answers} == {16}


@pytest.mark.parametrize("chip", CHIPS)
def test_every_chip_has_an_architecture(chip: str) -> None:
    architecture, implementation, _ = struct.unpack(
        "<III", ask(State(Options(chip=CHIPS[chip])), nvml.MC_GET_ARCH_INFO, bytes(12), minor=0)
    )
    assert 0x130 <= architecture < 0x200
    assert implementation == 0


def test_times_move_on(state: State) -> None:
    params = bytes([1, 16]).ljust(264, b"\0")
    times = struct.unpack_from("<32Q", ask(state, nvml.TIMER_GET_GPU_CPU_TIME_CORRELATION_INFO, params), 8)
    assert list(times[::2]) == sorted(set(times[::2]))
    assert list(times[1::2]) == sorted(set(times[1::2]))
