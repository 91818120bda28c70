"""Parsing of /proc/PID/status and /proc/PID/stat."""

import pytest

from mpu_notify.pidns.procfs import parse_nstgid, parse_start_ticks

STATUS = b"""Name:\t%s
Umask:\t0022
Tgid:\t4242
Groups:\t%s
NStgid:\t4242\t17\t1
NSpid:\t4243\t18\t2
NSpgid:\t4242\t17\t1
"""
REST = b"S 1 2 3 0 -1 4194304 79 0 0 0 1 2 3 4 20 0 1 0 987654 11 12 18446744073709551615"


@pytest.mark.parametrize("name", [b"python", b"NStgid:\\t1\\n", b"", b"\xff) S 1"])
def test_nstgid_is_the_process_id_in_each_namespace(name: bytes) -> None:
    assert parse_nstgid(STATUS % (name, b"0 " * 65536)) == (4242, 17, 1)


def test_nstgid_of_the_outermost_namespace_only() -> None:
    assert parse_nstgid(b"Name:\tx\nNStgid:\t7\nNSpid:\t7\n") == (7,)


def test_status_without_nstgid_is_an_error() -> None:
    with pytest.raises(ValueError, match="NStgid"):
        parse_nstgid(b"Name:\tNStgid:\nTgid:\t1\n")


@pytest.mark.parametrize("name", [b"python", b"a b", b") S 1 2 (", b"))))", b"((", b"\n", b""])
def test_start_is_found_behind_any_name(name: bytes) -> None:
    assert parse_start_ticks(b"4242 (" + name + b") " + REST) == 987654
