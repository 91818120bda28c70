"""``mpu-notify ps``: the processes that use the GPUs, as the driver tells this caller."""

from __future__ import annotations

import argparse
import json
from dataclasses import dataclass

import psutil

from mpu_notify.cli import options
from mpu_notify.rm.client import RmClient

DESCRIPTION = """\
List the processes that use the GPUs: compute (C), graphics (G) and clients of
the multi-process service (M), each process once a GPU, with the GPU memory that
it holds. The driver is asked directly; nvidia-smi and NVML are not needed.

On the host these are all processes, by their PIDs there. In a container or PID
namespace they are what the driver, or mpu-notify for it, tells the processes in
there.
"""

EPILOG = """\
output:
  GPU     number of the GPU in PCI order, counting all of the machine
  PID     process id
  TYPE    C, G, C+G, M+C
  NAME    name of the process; - if no process of that id is visible from here
  MEMORY  GPU memory in MiB; N/A if the driver does not tell

  --json prints a list of objects with the keys gpu, pid, type, name and
  memory_bytes; name and memory_bytes are null where the table has - and N/A.

exit status:
  0 if the driver answered, with or without processes; 1 if there is no driver,
  no GPU may be opened or the driver refused; 2 for wrong usage.

examples:
  mpu-notify ps
  mpu-notify ps --json
  mpu-notify run mpu-notify ps
"""

_MIB = 1 << 20


@dataclass(frozen=True)
class Row:
    """One process on one GPU; the field names are the keys of the JSON."""

    gpu: int
    pid: int
    type: str
    name: str | None
    memory_bytes: int | None

    def cells(self) -> tuple[str, ...]:
        """The row of the table."""
        memory = "N/A" if self.memory_bytes is None else f"{self.memory_bytes // _MIB} MiB"
        return str(self.gpu), str(self.pid), self.type, self.name or "-", memory


_HEAD = ("GPU", "PID", "TYPE", "NAME", "MEMORY")
_TO_THE_RIGHT = frozenset({"GPU", "PID", "MEMORY"})


def register(subparsers: options.Subparsers) -> None:
    """Add the verb to the command line."""
    parser = options.add_verb(subparsers, "ps", "list the processes that use the GPUs", DESCRIPTION, EPILOG)
    options.add_device(parser)
    parser.add_argument("--json", action="store_true", help="print a JSON list instead of a table")
    parser.set_defaults(func=main)


def main(args: argparse.Namespace) -> int:
    """Run the verb; returns the exit status."""
    found = rows(RmClient(args.device))
    if args.json:
        print(json.dumps([vars(row) for row in found], indent=2))
    elif found:
        print(table(found))
    else:
        print("No process uses a GPU.")
    return 0


def rows(client: RmClient) -> list[Row]:
    """The processes on all GPUs that ``client`` can open; closes it. Raises RmError."""
    with client:
        return [
            Row(gpu.index, process.pid, process.type, _name(process.pid), process.memory_bytes)
            for gpu in client.gpus()
            for process in gpu.processes()
        ]


def table(found: list[Row]) -> str:
    """The rows under their headings, columns aligned."""
    lines = [_HEAD, *(row.cells() for row in found)]
    widths = [max(map(len, column)) for column in zip(*lines, strict=True)]
    return "\n".join(_line(cells, widths) for cells in lines)


def _line(cells: tuple[str, ...], widths: list[int]) -> str:
    aligned = (
        cell.rjust(width) if head in _TO_THE_RIGHT else cell.ljust(width)
        for head, cell, width in zip(_HEAD, cells, widths, strict=True)
    )
    return "  ".join(aligned)


def _name(pid: int) -> str | None:
    try:
        return psutil.Process(pid).name()
    except psutil.Error:  # gone, hidden by the mount options of /proc, or not in this namespace
        return None
