"""Just enough of CUDA's driver API to be a GPU process, for the demo and the tests on real GPUs."""

from __future__ import annotations

import ctypes
from types import TracebackType

from mpu_notify.errors import MpuNotifyError

LIBRARY = "libcuda.so.1"


class CudaError(MpuNotifyError):
    """CUDA is not there or refused something; the text names the call and the CUresult (cuda.h)."""


def load() -> ctypes.CDLL:
    """The driver's library. Raises CudaError where there is none."""
    try:
        return ctypes.CDLL(LIBRARY)
    except OSError as error:
        raise CudaError(f"cannot load {LIBRARY}: {error}") from error


class CudaUser:
    """Holds the primary context of a GPU and some of its memory. Use it as a context manager, or close it."""

    def __init__(self, memory_bytes: int, gpu: int = 0) -> None:
        """Take `memory_bytes` on GPU number `gpu`, in CUDA's order. Raises CudaError."""
        self._cuda = load()
        self._device = ctypes.c_int()
        self._context, self._memory = ctypes.c_void_p(), ctypes.c_uint64()
        self._call("cuInit", 0)
        self._call("cuDeviceGet", ctypes.byref(self._device), gpu)
        self._call("cuDevicePrimaryCtxRetain", ctypes.byref(self._context), self._device)
        self._call("cuCtxSetCurrent", self._context)
        self._call("cuMemAlloc_v2", ctypes.byref(self._memory), ctypes.c_size_t(memory_bytes))

    def _call(self, name: str, *arguments: object) -> None:
        result = getattr(self._cuda, name)(*arguments)
        if result:
            raise CudaError(f"{name} failed with CUresult {result}")

    def close(self) -> None:
        """Give memory and context back."""
        self._call("cuMemFree_v2", self._memory)
        self._call("cuDevicePrimaryCtxRelease_v2", self._device)

    def __enter__(self) -> CudaUser:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()
