"""What a driver does with process ids by itself: its era, by flavour and version, and what is left to do in each.

Read version by version from NVIDIA/open-gpu-kernel-modules (``gpu_rmapi.c``, ``os-interface.c``, ``kern_perf_ctrl.c``,
``client_resource.c``, ``gpu_acct.c``), 515.43.04 to 595.45.04. "Thread" is the one that made an RM client, "caller" the
task that performs the ioctl.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from enum import Enum
from pathlib import Path
from types import MappingProxyType
from typing import NamedTuple

from mpu_notify.rm import controls

#: Written by the driver when it is loaded.
VERSION_FILE = Path("/proc/driver/nvidia/version")


class Era(Enum):
    """What the driver does with process ids by itself."""

    HOST = "host"
    THREAD_LIST = "thread-list"
    THREAD_BOTH = "thread-both"
    THREAD_ALL = "thread-all"
    NATIVE = "native"


#: The eras in one sentence each.
DESCRIPTIONS: Mapping[Era, str] = MappingProxyType(
    {
        Era.HOST: "it answers with the PIDs of the host, to everybody",
        Era.THREAD_LIST: "it lists threads by their ids in the caller's namespace, and is asked about host PIDs",
        Era.THREAD_BOTH: "it lists threads, and is asked about them, by their ids in the caller's namespace",
        Era.THREAD_ALL: "as thread-both, in the utilisation samples, too",
        Era.NATIVE: "it knows PID namespaces, with gaps",
    }
)


class Flavour(Enum):
    """Which of the two kernel modules it is."""

    OPEN = "open"
    PROPRIETARY = "proprietary"


class Driver(NamedTuple):
    """A driver as its version file names it."""

    flavour: Flavour
    version: str

    def __str__(self) -> str:
        return f"{self.version} ({self.flavour.value} flavour)"


_VERSION_LINE = re.compile(r"^NVRM version:\s+NVIDIA UNIX (?P<what>.*?)\s(?P<version>\d+(?:\.\d+)+)\s", re.MULTILINE)


def parse_version(text: str) -> Driver | None:
    """The driver that /proc/driver/nvidia/version names; None where it says something else."""
    found = _VERSION_LINE.search(text)
    if found is None:
        return None
    is_open = "Open Kernel Module" in found["what"]
    return Driver(Flavour.OPEN if is_open else Flavour.PROPRIETARY, found["version"])


#: The first version of the open flavour that behaves so; in numeric order, side branches included.
_OPEN_FROM = (
    ((0,), Era.HOST),
    ((535, 43, 24), Era.THREAD_LIST),  # a side branch
    ((535, 43, 29), Era.HOST),
    ((535, 113, 1), Era.THREAD_LIST),
    ((565, 57, 1), Era.THREAD_BOTH),
    ((570, 86, 15), Era.THREAD_ALL),
    ((570, 148, 8), Era.NATIVE),
    ((575,), Era.THREAD_ALL),
    ((575, 57, 8), Era.NATIVE),
)
#: Nothing is known of what comes after the last version that was read.
_LAST_MAJOR_READ = 595


def by_version(driver: Driver) -> Era | None:
    """The era of a driver by what it says it is; None for one that is newer than what was read."""
    number = tuple(int(part) for part in driver.version.split("."))
    if number[0] > _LAST_MAJOR_READ:
        return None
    if driver.flavour is Flavour.PROPRIETARY:
        return Era.HOST
    return next(era for first, era in reversed(_OPEN_FROM) if number >= first)


# -------------------------------------------------------------------------------- what is left to do

_HOST_PIDS = "it names the host's PIDs"
_UNTRANSLATED = "it names the host's PIDs, as every version does"

#: What a driver of this era does wrong for a caller in a PID namespace, by control; a control that is not there is
#: right by itself.
_WRONG: Mapping[Era, Mapping[int, str]] = MappingProxyType(
    {
        Era.HOST: {
            controls.GPU_GET_PIDS: _HOST_PIDS,
            controls.GPU_GET_PID_INFO: "it wants the host's PIDs",
            controls.PERF_GET_GPUMON_PERFMON_UTIL_SAMPLES_V2: _HOST_PIDS,
            controls.GPUACCT_GET_ACCOUNTING_PIDS: _HOST_PIDS,
            controls.GPUACCT_GET_PROC_ACCOUNTING_INFO: "it wants the host's PIDs",
        },
        Era.THREAD_LIST: {
            controls.GPU_GET_PIDS: "it names threads, and some twice",
            controls.GPU_GET_PID_INFO: "it wants the host's PIDs, which it did not list: memory reads 0",
            controls.PERF_GET_GPUMON_PERFMON_UTIL_SAMPLES_V2: _HOST_PIDS,
            controls.GPUACCT_GET_ACCOUNTING_PIDS: _HOST_PIDS,
            controls.GPUACCT_GET_PROC_ACCOUNTING_INFO: "it wants the host's PIDs",
        },
        Era.THREAD_BOTH: {
            controls.GPU_GET_PIDS: "it names threads, and some twice",
            controls.GPU_GET_PID_INFO: "it counts by thread",
            controls.PERF_GET_GPUMON_PERFMON_UTIL_SAMPLES_V2: _HOST_PIDS,
            controls.GPUACCT_GET_ACCOUNTING_PIDS: _HOST_PIDS,
            controls.GPUACCT_GET_PROC_ACCOUNTING_INFO: "it wants the host's PIDs",
        },
        Era.THREAD_ALL: {
            controls.GPU_GET_PIDS: "it names threads, and some twice",
            controls.GPU_GET_PID_INFO: "it counts by thread",
            controls.PERF_GET_GPUMON_PERFMON_UTIL_SAMPLES_V2: (
                "it names threads, and other containers' processes by their PIDs on the host"
            ),
            controls.GPUACCT_GET_ACCOUNTING_PIDS: "it names threads, or the host's PIDs (from 570.133.20)",
            controls.GPUACCT_GET_PROC_ACCOUNTING_INFO: "it answers with the PID on the host",
        },
        Era.NATIVE: {
            controls.GPU_GET_PIDS: "it lists a process with several clients more than once, or another one never",
            controls.PERF_GET_GPUMON_PERFMON_UTIL_SAMPLES_V2: (
                "it names other containers' processes, by their PIDs on the host, and kernel addresses"
            ),
            controls.GPUACCT_GET_ACCOUNTING_PIDS: _HOST_PIDS,
            controls.GPUACCT_GET_PROC_ACCOUNTING_INFO: "it answers with the PID on the host",
        },
    }
)
#: In every era.
_ALWAYS_WRONG = {
    control.cmd: _UNTRANSLATED
    for control in (
        *(controls.NVENC_SESSIONS, controls.NVENC_SESSIONS_V2, controls.NVENC_SESSIONS_V2_525),
        *(controls.NVFBC_SESSIONS, controls.HWPM_RESERVATION),
    )
}


def wrong_by_itself(era: Era | None, cmd: int) -> str | None:
    """Why a driver's answer to a control must be translated; None where it is right. Era None: not known."""
    if era is None:
        return "it is not known what this driver does by itself"
    return _WRONG[era].get(cmd) or _ALWAYS_WRONG.get(cmd)


def table_for(era: Era | None, *, everything: bool = False) -> tuple[controls.Control, ...]:
    """The rows of the control table that are to be translated on a driver of this era."""
    return tuple(row for row in controls.CONTROLS if everything or wrong_by_itself(era, row.cmd))


def counts_by_thread(era: Era | None) -> bool:
    """Whether GPU_GET_PID_INFO may have to be summed up over threads; where nothing is known, it may."""
    return era in (None, Era.THREAD_BOTH, Era.THREAD_ALL)
