"""The guest itself: what becomes of commands, and of a guest that hangs or panics."""

from __future__ import annotations

import pytest

from .guest import Done, Guest, GuestError


def test_a_command_has_its_status_and_output_and_its_errors_go_to_the_console(guest: Guest) -> None:
    assert guest.run("sh", "-c", "echo one; echo two >&2; printf three; exit 3") == Done(3, "one\nthree")
    assert "two" in guest.console()


def test_what_is_written_is_gone_with_the_guest_and_the_rest_cannot_be_written(guest: Guest) -> None:
    for path in ("/etc/written", "tests/written"):
        assert guest.run("sh", "-c", f"echo >{path}").status != 0
    assert guest.run("sh", "-c", "echo >/tmp/written && rm /tmp/written").status == 0


@pytest.mark.usefixtures("guest")
def test_a_command_that_hangs_is_the_end_of_the_guest_when_its_time_is_up() -> None:
    with Guest() as hung:
        with pytest.raises(GuestError, match="did not answer in time"):
            hung.run("sleep", "1000", seconds=1)
        with pytest.raises(GuestError, match="is off"):
            hung.run("true")


@pytest.mark.usefixtures("guest")
def test_a_guest_that_panics_is_told_with_what_it_said() -> None:
    with Guest() as panicking, pytest.raises(GuestError, match=r"went off[^$]*sysrq triggered crash"):
        panicking.run("sh", "-c", "echo c >/proc/sysrq-trigger")
