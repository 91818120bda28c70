"""Questions to the driver that no tool asks as we want them asked, and the loads that are timed. Prints JSON."""

from __future__ import annotations

import argparse
import ctypes
import importlib
import json
import os
import statistics
import struct
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

from mpu_notify.rm import abi
from mpu_notify.rm.client import Gpu, GpuUser, RmClient, RmError
from mpu_notify.rm.cuda import CudaUser

_BETWEEN_S = 0.3  # between two questions of a series

UTILISATION = (0x20802096, 55888)
#: Cmd and params size of each control, by what it tells about; ctrl2080perf.h, ctrl0000gpuacct.h, ctrl2080gpu.h.
RAW = {
    "utilisation": (UTILISATION,),
    "accounting-pids": ((0xB04, 16012),),
    "accounting-info": ((0xB03, 48),),
    "sessions": ((0x2080016E, 16), (0x208001AF, 16388), (0x2080017C, 13316)),
}
_ENCODER_SESSIONS_V1, _ENCODER_SESSIONS_V2 = 0x2080016E, 0x208001AF
_SESSIONS, _SESSION_SIZE = 512, 32  # the most that the driver tells, and bytes of one
_UTILISATION_TYPE = 2  # what NVML asks for


def _row(gpu: int, pid: int, memory_bytes: int | None) -> dict[str, int | None]:
    return {"gpu": gpu, "pid": pid, "memory_bytes": memory_bytes}


def _handles() -> tuple[Any, list[Any]]:
    nvml = importlib.import_module("pynvml")
    nvml.nvmlInit()
    return nvml, [nvml.nvmlDeviceGetHandleByIndex(index) for index in range(nvml.nvmlDeviceGetCount())]


def _running(nvml: Any) -> Any:
    return getattr(nvml, "nvmlDeviceGetComputeRunningProcesses_v3", None) or nvml.nvmlDeviceGetComputeRunningProcesses


def nvml_rows() -> Iterator[dict[str, int | None]]:
    """What nvidia-ml-py says of running processes."""
    nvml, handles = _handles()
    for gpu, handle in enumerate(handles):
        for process in _running(nvml)(handle):
            yield _row(gpu, process.pid, process.usedGpuMemory)


def _node(device: Path | None) -> tuple[Path, ...]:
    return (device,) if device else ()


def subdevice_rows(device: Path | None) -> Iterator[dict[str, int | None]]:
    """Every process with a subdevice object, as the driver lists them."""
    with RmClient(*_node(device)) as client:
        for gpu in client.gpus():
            for pid in gpu.pids(abi.SUBDEVICE):
                yield _row(gpu.index, pid, None)


def nvml_use(times: int) -> Iterator[dict[str, Any]]:
    """Who uses the GPUs how much, of all that nvidia-ml-py says in so many questions; or why it says nothing."""
    nvml, handles = _handles()
    most: dict[tuple[int, int], tuple[int, ...]] = {}
    errors = {}
    for number in range(times):
        time.sleep(_BETWEEN_S if number else 0)
        for gpu, handle in enumerate(handles):
            try:
                for one in nvml.nvmlDeviceGetProcessUtilization(handle, 0):
                    use = (one.smUtil, one.memUtil, one.encUtil, one.decUtil)
                    most[gpu, one.pid] = tuple(map(max, use, most.get((gpu, one.pid), use)))
            except nvml.NVMLError as error:  # noqa: PERF203 - one GPU's refusal is not another's
                errors[gpu] = str(error)
    for (gpu, pid), (sm, memory, encoder, decoder) in sorted(most.items()):
        use = f"at most: sm {sm} mem {memory} enc {encoder} dec {decoder}"
        yield {**_row(gpu, pid, None), "use": use}
    told = {gpu for gpu, _ in most}
    yield from ({"gpu": gpu, "error": error} for gpu, error in errors.items() if gpu not in told)


def nvml_words() -> Iterator[str]:
    """What nvidia-ml-py says of accounting being on and of sessions, in words."""
    nvml, handles = _handles()
    for gpu, handle in enumerate(handles):
        for name in ("AccountingMode", "EncoderSessions", "FBCSessions"):
            yield f"GPU {gpu}: {name}: {_told(nvml, name, handle)}"


def nvml_accounted() -> Iterator[dict[str, Any]]:
    """The processes that nvidia-ml-py has accounts of."""
    nvml, handles = _handles()
    for gpu, handle in enumerate(handles):
        told = _told(nvml, "AccountingPids", handle)
        yield {"gpu": gpu, "pids": told} if isinstance(told, list) else {"gpu": gpu, "pids": [], "error": told}


def _told(nvml: Any, name: str, handle: Any) -> object:
    try:
        told = getattr(nvml, f"nvmlDeviceGet{name}")(handle)
    except nvml.NVMLError as error:
        return str(error)
    if isinstance(told, list):
        return [one if isinstance(one, int) else str(one) for one in told]
    return {0: "disabled", 1: "enabled"}.get(told, told)


def raw(device: Path | None, what: str, pids: Sequence[int]) -> Iterator[dict[str, Any]]:
    """Ask the controls that tell about something, on every GPU, and where it is so about each of these processes."""
    with RmClient(*_node(device)) as client:
        for gpu in client.gpus():
            for cmd, size in RAW[what]:
                for about in pids if what == "accounting-info" else (None,):
                    yield _control(gpu, cmd, size, about)


def _control(gpu: Gpu, cmd: int, size: int, about: int | None) -> dict[str, Any]:
    params = bytearray(size)
    table = bytearray()
    target = gpu.subdevice
    if cmd == UTILISATION[0]:
        struct.pack_into("<B3xI", params, 0, _UTILISATION_TYPE, size - 16)
    elif cmd == _ENCODER_SESSIONS_V1:
        table = bytearray(_SESSIONS * _SESSION_SIZE)
        pointed = ctypes.addressof((ctypes.c_char * len(table)).from_buffer(table))
        struct.pack_into("<I4xQ", params, 0, _SESSIONS, pointed)
    elif cmd == _ENCODER_SESSIONS_V2:
        struct.pack_into("<I", params, 0, _SESSIONS)
    elif cmd < 1 << 16:  # of the root client: accounting
        target = gpu.client.handle
        struct.pack_into("<II", params, 0, gpu.gpu_id, about or 0)
    told = {"gpu": gpu.index, "control": cmd, "about": about, "status": 0, "size": size + len(table)}
    try:
        gpu.client.control(target, cmd, params)
    except RmError as error:
        told |= {"status": error.status, "error": str(error)}
    if table:
        struct.pack_into("<Q", params, 8, 0)
    return {**told, "params": bytes(params + table).rstrip(b"\0").hex()}


def _seconds(call: Callable[[], object], times: int) -> float:
    taken = []
    for _ in range(times):
        start = time.perf_counter()
        call()
        taken.append(time.perf_counter() - start)
    return statistics.median(taken)


def time_running(device: Path | None, times: int) -> float:
    """Median seconds of one question for the running processes."""
    if device is None:
        nvml, handles = _handles()
        running = _running(nvml)
        running(handles[0])
        return _seconds(lambda: running(handles[0]), times)
    with RmClient(device) as client:
        gpu = client.gpus()[0]
        return _seconds(gpu.processes, times)


def time_context(device: Path | None) -> float:
    """Seconds from cuInit to the first memory, in this fresh process."""
    return _seconds(lambda: CudaUser(1 << 20) if device is None else GpuUser(device, memory_bytes=1 << 20), 1)


def train(device: Path | None, steps: int) -> float:
    """Seconds of so many training steps of a small network."""
    if device is not None:
        with GpuUser(device, memory_bytes=1 << 20):
            return _seconds(lambda: sum(range(1000)), steps)
    torch: Any = importlib.import_module("torch")
    network = torch.nn.Sequential(torch.nn.Linear(256, 512), torch.nn.ReLU(), torch.nn.Linear(512, 10)).cuda()
    optimiser = torch.optim.Adam(network.parameters())
    data, labels = torch.randn(128, 256), torch.randint(10, (128,))

    def step() -> None:
        optimiser.zero_grad()
        torch.nn.functional.cross_entropy(network(data.cuda()), labels.cuda()).backward()
        optimiser.step()
        torch.cuda.synchronize()

    return _seconds(step, steps)


def main() -> None:
    timed = {
        "time-running": lambda: time_running(args.device, args.times),
        "time-context": lambda: time_context(args.device),
        "train": lambda: train(args.device, args.times),
    }
    parser = argparse.ArgumentParser(prog="ask.py", allow_abbrev=False)
    parser.add_argument(
        "what", choices=("nvml", "nvml-use", "nvml-words", "nvml-accounted", "subdevices", *RAW, *timed)
    )
    parser.add_argument("--device", type=Path, help="the control node of a stand-in")
    parser.add_argument("--times", type=int, default=1, help="questions or steps")
    parser.add_argument("--pids", type=lambda text: [int(word) for word in text.split(",")], default=[])
    args = parser.parse_args()
    if args.what in RAW:
        told: dict[str, Any] = {"asker": os.getpid(), "answers": list(raw(args.device, args.what, args.pids))}
    elif args.what in timed:
        told = {"seconds": timed[args.what]()}
    elif args.what == "nvml-words":
        told = {"words": list(nvml_words())}
    elif args.what == "nvml-accounted":
        told = {"lists": list(nvml_accounted())}
    elif args.what == "nvml-use":
        found = list(nvml_use(args.times))
        rows = [one for one in found if "pid" in one]
        told = {"asker": os.getpid(), "rows": rows, "errors": [one for one in found if "pid" not in one]}
    else:
        listed = nvml_rows() if args.what == "nvml" else subdevice_rows(args.device)
        told = {"asker": os.getpid(), "rows": list(listed)}
    print(json.dumps(told), flush=True)


if __name__ == "__main__":
    main()
