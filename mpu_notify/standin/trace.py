"""What programs ask of the stand-in, one JSON object a line: controls, allocations, and every other ioctl by number.

Each line has the thread that asks and the one that opened the file, by their ids on the host. Buffers are hex without
the zero bytes at their end.
"""

from __future__ import annotations

import json
from dataclasses import dataclass
from typing import TextIO

from mpu_notify.rm import abi
from mpu_notify.standin.callers import Caller
from mpu_notify.standin.connection import IoctlCall, OpenFile
from mpu_notify.standin.driver import MAX_PARAMS, MemoryFault


@dataclass(frozen=True)
class TracedFile:
    """An open file that does what another does, and tells."""

    name: str
    opened_by: int
    file: OpenFile
    to: TextIO

    def ioctl(self, call: IoctlCall) -> bytes:
        """Pass it on, and tell."""
        number, size = abi.ioctl_parts(call.cmd)
        told: dict[str, object] = {"nr": number, "size": size, "in": _hex(call.data)}
        caller = Caller(call.tid)
        if number == abi.Escape.RM_CONTROL and len(call.data) == abi.Nvos54.LAYOUT.size:
            control = abi.Nvos54.unpack(call.data)
            told = {"control": hex(control.cmd), "object": hex(control.handle), "size": control.params_size}
            told["params_in"] = _read(caller, control.params, control.params_size)
        elif number == abi.Escape.RM_ALLOC and len(call.data) >= abi.RmAlloc.LAYOUT.size:
            alloc = abi.RmAlloc.unpack(call.data[: abi.RmAlloc.LAYOUT.size])
            told = {"alloc": hex(alloc.class_number), "parent": hex(alloc.parent), "handle": hex(alloc.new)}
            told["arg_size"] = size
        told |= {"device": self.name, "by": call.tid, "opened_by": self.opened_by}
        try:
            answer = self.file.ioctl(call)
        except OSError as error:
            print(json.dumps({**told, "errno": error.errno}), file=self.to, flush=True)
            raise
        if "control" in told:
            told["status"] = hex(abi.Nvos54.unpack(answer).status)
            told["params_out"] = _read(caller, control.params, control.params_size)
        else:
            told["out"] = _hex(answer)
        print(json.dumps(told), file=self.to, flush=True)
        return answer

    def release(self) -> None:
        """Pass it on."""
        self.file.release()


def _read(caller: Caller, address: int, size: int) -> str:
    if size > MAX_PARAMS:
        return "too long"
    try:
        return _hex(caller.read(address, size)) if address and size else ""
    except MemoryFault:
        return "unreadable"


def _hex(buffer: bytes) -> str:
    return buffer.rstrip(b"\0").hex()
