"""The slot, which the supervisor has, too: what it says of a call is copied when that is received."""

from __future__ import annotations

import os
import struct
from pathlib import Path

import pytest

from .conftest import MakeScene
from .gate import STEPS, Step, gate
from .scene import TRANSLATED, Scene


def overwrite(scene: Scene, received: bytes, other: bytes) -> None:
    """Put something else in the place of what the slot says of the call, as who took over the supervisor can."""
    (slot,) = [
        fd
        for fd in Path(f"/proc/{scene.daemon.process.pid}/fd").iterdir()
        if os.readlink(fd).startswith("/memfd:mpu-notify slot")  # noqa: PTH115 - no path
    ]
    with slot.open("r+b", buffering=0) as memory:
        whole = memory.read()
        assert whole.count(received) == 1
        memory.seek(whole.index(received))
        memory.write(other)


@pytest.mark.parametrize("step", [step for step in STEPS if step.name in ("glanced at", "params read")])
def test_a_call_stays_its_callers_whatever_becomes_of_the_slot(
    make_scene: MakeScene, gate_program: Path, step: Step
) -> None:
    scene = make_scene()
    with scene.container(), gate(gate_program, scene.daemon.find_monitor(), step) as held:
        scene.caller.poke("i")
        held.reached()
        # struct seccomp_notif: pid, flags, then seccomp_data with the number of ioctl, which is 16.
        pid = struct.pack("=IIi", scene.host_pid, 0, 16)
        overwrite(scene, pid, struct.pack("=IIi", os.getpid(), 0, 16))
        held.open()
        assert scene.caller.line() == TRANSLATED
