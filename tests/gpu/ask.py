"""Questions to the driver that no tool asks as we want them asked, and the loads that are timed. Prints JSON."""

from __future__ import annotations

import argparse
import importlib
import json
import os
import statistics
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from mpu_notify.rm import abi
from mpu_notify.rm.abi import CONTROL_NODE
from mpu_notify.rm.client import GpuUser, RmClient
from mpu_notify.rm.cuda import CudaUser


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
    parser = argparse.ArgumentParser(prog="ask.py", allow_abbrev=False)
    parser.add_argument("what", choices=("nvml", "subdevices", "time-running", "time-context", "train"))
    parser.add_argument("--device", type=Path, help="the control node of a stand-in")
    parser.add_argument("--times", type=int, default=1, help="questions or steps")
    args = parser.parse_args()
    if args.what in ("nvml", "subdevices"):
        found = nvml_rows() if args.what == "nvml" else subdevice_rows(args.device or CONTROL_NODE)
        print(json.dumps({"asker": os.getpid(), "rows": list(found)}))
    else:
        seconds = {
            "time-running": lambda: time_running(args.device, args.times),
            "time-context": lambda: time_context(args.device),
            "train": lambda: train(args.device, args.times),
        }[args.what]()
        print(json.dumps({"seconds": seconds}))
    sys.stdout.flush()


if __name__ == "__main__":
    main()
