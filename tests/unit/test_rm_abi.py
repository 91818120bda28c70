"""The ABI's numbers and layouts, against headers and against what a real driver (580.159.04, one H200) answered."""

from __future__ import annotations

import errno
import struct
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from mpu_notify.rm import abi
from mpu_notify.rm.client import GpuProcess, RmClient, RmError

RECORDED_CARD_INFO = bytes.fromhex(
    "010000000000000000060000de10352306000000290000000000000240100000000000010000000000000000001000000000000040"
)
RECORDED_ID_INFO = bytes.fromhex("06000000010000000000000000000000" + "410000000600000000000000ffffffff")


@pytest.mark.parametrize(
    ("escape", "size", "number"),
    [
        (abi.Escape.RM_CONTROL, abi.Nvos54.LAYOUT.size, 0xC020462A),
        (abi.Escape.RM_ALLOC, abi.NVOS21_SIZE, 0xC020462B),
        (abi.Escape.RM_ALLOC, 40, 0xC028462B),
        (abi.Escape.RM_ALLOC, 48, 0xC030462B),
        (abi.Escape.RM_FREE, abi.Nvos00.LAYOUT.size, 0xC0104629),
        (abi.Escape.CARD_INFO, abi.CardInfo.LAYOUT.size * abi.CardInfo.MAX_ENTRIES, 0xC90046C8),
        (abi.Escape.REGISTER_FD, 4, 0xC00446C9),
        (abi.Escape.CHECK_VERSION_STR, abi.VersionCheck.LAYOUT.size, 0xC04846D2),
        (abi.Escape.IOCTL_XFER_CMD, abi.XferCmd.LAYOUT.size, 0xC01046D3),
        (abi.Escape.SYS_PARAMS, 8, 0xC00846D6),
        (abi.Escape.WAIT_OPEN_COMPLETE, 8, 0xC00846DA),
    ],
)
def test_ioctl_numbers(escape: abi.Escape, size: int, number: int) -> None:
    assert abi.ioctl_number(escape, size) == number
    assert abi.ioctl_parts(number) == (escape, size)


def test_the_driver_looks_only_at_number_and_size() -> None:
    assert abi.ioctl_parts(0x0020002A) == (abi.Escape.RM_CONTROL, 32)


@pytest.mark.parametrize(
    ("structure", "size"),
    [
        (abi.Nvos54, 32),
        (abi.Nvos00, 16),
        (abi.RmAlloc, 24),
        (abi.XferCmd, 16),
        (abi.VersionCheck, 72),
        (abi.CardInfo, 72),
        (abi.IdInfo, 32),
        (abi.ClassList, 16),
        (abi.DeviceParams, 56),
        (abi.SubdeviceParams, 4),
        (abi.MemoryParams, 128),
    ],
)
def test_sizes(structure: type[abi.Structure], size: int) -> None:
    assert structure.LAYOUT.size == size


def test_nvos54_offsets() -> None:
    raw = abi.Nvos54(1, 2, 3, 4, 5, 6, 7).pack()
    assert struct.unpack_from("<IIII", raw) == (1, 2, 3, 4)
    assert struct.unpack_from("<Q", raw, 16) == (5,)
    assert struct.unpack_from("<II", raw, 24) == (6, 7)
    assert abi.Nvos54.unpack(raw) == abi.Nvos54(1, 2, 3, 4, 5, 6, 7)


def test_memory_params_offset() -> None:
    assert struct.unpack_from("<Q", abi.MemoryParams(123 << 32).pack(), 64) == (123 << 32,)


def test_recorded_card_info() -> None:
    raw = RECORDED_CARD_INFO.ljust(32 * 72, b"\0")
    assert abi.CardInfo.unpack_all(raw) == [abi.CardInfo(0, 0, 6, 0, 0x10DE, 0x2335, 6, 0)]
    (card,) = abi.CardInfo.unpack_all(raw)
    assert card.address == "00000000:00:06.0"
    assert abi.CardInfo.unpack_all(card.pack()) == [card]


def test_recorded_id_info() -> None:
    assert abi.IdInfo.unpack(RECORDED_ID_INFO) == abi.IdInfo(6, 1, 0, 0, 0x41, 6, 0, -1)


def test_gpu_ids() -> None:
    raw = abi.pack_gpu_ids([6, 7], 384)
    assert len(raw) == 384
    assert abi.unpack_gpu_ids(raw) == [6, 7]
    assert abi.unpack_gpu_ids(abi.pack_gpu_ids(range(32), 128)) == list(range(32))


def test_class_list_v2() -> None:
    raw = abi.pack_class_list_v2([0x80, 0xCBC0], 700)
    assert len(raw) == 700
    assert struct.unpack_from("<III", raw) == (2, 0x80, 0xCBC0)


def test_kinds_of_class() -> None:
    real = [0x41, 0x80, 0x2080, 0x900E, 0x906F, 0xC2, 0xC86F, 0xCB97, 0xCBC0, 0xC8B5, 0xC46F]
    assert [number for number in real if abi.is_compute_class(number)] == [0xCBC0]
    assert [number for number in real if abi.is_graphics_class(number)] == [0xCB97]
    assert max(number for number in real if abi.is_channel_class(number)) == 0xC86F


@pytest.mark.parametrize("offset", [24, 28])
def test_status_of_either_nvos21(offset: int) -> None:
    raw = bytearray(32)
    struct.pack_into("<I", raw, offset, 0x1B)
    assert abi.nvos21_status(raw) == 0x1B


@pytest.mark.parametrize(("types", "text"), [("C", "C"), ("G", "G"), ("GC", "C+G"), ("CM", "M+C"), ("GMC", "M+C+G")])
def test_type_is_written_as_nvidia_smi_does(types: str, text: str) -> None:
    assert GpuProcess(1, frozenset(types), 0).type == text


def test_no_driver_names_the_node_and_what_to_do(tmp_path: Path) -> None:
    node = tmp_path / "nvidiactl"
    with pytest.raises(RmError, match=r"nvidiactl: No such file.*load the NVIDIA driver") as caught:
        RmClient(node)
    assert caught.value.errno == errno.ENOENT
    assert caught.value.status is None


def test_a_file_that_is_no_driver(tmp_path: Path) -> None:
    node = tmp_path / "nvidiactl"
    node.touch()
    with pytest.raises(RmError, match="Inappropriate ioctl") as caught:
        RmClient(node)
    assert caught.value.errno == errno.ENOTTY


STRUCTURES = abi.Structure.__subclasses__()
GAPS = (abi.CardInfo, abi.ClassList, abi.DeviceParams, abi.MemoryParams)  # bytes that have no field


@given(st.data(), st.sampled_from(STRUCTURES))
def test_any_bytes_of_its_size_are_a_structure(data: st.DataObject, structure: type[abi.Structure]) -> None:
    raw = data.draw(st.binary(min_size=structure.LAYOUT.size, max_size=structure.LAYOUT.size))
    if structure is abi.CardInfo:  # which begins with whether it is valid
        assert [each.pack() for each in abi.CardInfo.unpack_all(raw)] == ([card_without_gaps(raw)] if raw[0] else [])
        return
    found = structure.unpack(raw)
    assert len(found.pack()) == len(raw)
    assert structure.unpack(found.pack()) == found
    if structure not in GAPS:
        assert found.pack() == raw


def card_without_gaps(raw: bytes) -> bytes:
    return b"\1\0\0\0" + raw[4:11] + b"\0" + raw[12:20] + bytes(36) + raw[56:60] + bytes(12)


@given(st.sampled_from([each for each in STRUCTURES if each is not abi.CardInfo]), st.binary(max_size=200))
def test_no_other_number_of_bytes_is(structure: type[abi.Structure], raw: bytes) -> None:
    if len(raw) != structure.LAYOUT.size:
        with pytest.raises(struct.error):
            structure.unpack(raw)


@given(
    st.lists(st.integers(0, 2**32 - 1), max_size=32), st.sampled_from([abi.ATTACHED_IDS_SIZE, *abi.PROBED_IDS_SIZES])
)
def test_a_list_of_gpus_ends_at_its_mark(ids: list[int], size: int) -> None:
    end = ids.index(abi.INVALID_GPU_ID) if abi.INVALID_GPU_ID in ids else len(ids)
    assert abi.unpack_gpu_ids(abi.pack_gpu_ids(ids, size)) == ids[:end]


@given(st.integers(0, 2**32 - 1))
def test_any_ioctl_and_any_status_has_a_name(number: int) -> None:
    escape, size = abi.ioctl_parts(number)
    assert abi.ioctl_parts(abi.ioctl_number(escape, size)) == (escape, size)
    assert abi.status_text(number).startswith(f"0x{number:02x}")
