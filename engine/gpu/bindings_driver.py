"""NVIDIA's cuda-bindings: wheels for Linux and Windows, nothing to compile.

Its objects are plain handles and free nothing by themselves.
"""

import ctypes
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import numpy.typing as npt
from cuda.bindings import __version__
from cuda.bindings import driver as cuda

from engine.gpu.driver import (
    LIBRARY,
    Bytes,
    Device,
    GpuError,
    GpuMemoryError,
    Memory,
    NoGpuError,
    driver_words,
    uuid_words,
)

OK = cuda.CUresult.CUDA_SUCCESS
NOT_READY = cuda.CUresult.CUDA_ERROR_NOT_READY
OUT_OF_MEMORY = cuda.CUresult.CUDA_ERROR_OUT_OF_MEMORY


class Bindings:
    """`engine.gpu.driver.Driver` over cuda-bindings."""

    name = f"cuda-bindings {__version__}"

    def __init__(self) -> None:
        self._device: Any = None

    def start(self) -> None:
        try:
            (result,) = cuda.cuInit(0)
        except RuntimeError as error:
            raise NoGpuError(f"{self.name} finds no NVIDIA driver ({LIBRARY})") from error
        if result != OK:
            raise NoGpuError(f"NVIDIA's driver finds no GPU that it can use: {_words(result)}")

    def count(self) -> int:
        return int(_call(cuda.cuDeviceGetCount))

    def describe(self, index: int) -> Device:
        device = _call(cuda.cuDeviceGet, index)
        attributes = cuda.CUdevice_attribute
        return Device(
            index=index,
            name=_call(cuda.cuDeviceGetName, 256, device).split(b"\0")[0].decode(),
            capability=(
                _call(
                    cuda.cuDeviceGetAttribute,
                    attributes.CU_DEVICE_ATTRIBUTE_COMPUTE_CAPABILITY_MAJOR,
                    device,
                ),
                _call(
                    cuda.cuDeviceGetAttribute,
                    attributes.CU_DEVICE_ATTRIBUTE_COMPUTE_CAPABILITY_MINOR,
                    device,
                ),
            ),
            memory_bytes=_call(cuda.cuDeviceTotalMem, device),
            uuid=uuid_words(_call(cuda.cuDeviceGetUuid, device).bytes),
            driver=driver_words(_call(cuda.cuDriverGetVersion)),
        )

    def enter(self, index: int) -> None:
        device = _call(cuda.cuDeviceGet, index)
        context = _call(cuda.cuDevicePrimaryCtxRetain, device)
        try:
            _call(cuda.cuCtxPushCurrent, context)
        except GpuError:
            _call(cuda.cuDevicePrimaryCtxRelease, device)
            raise
        self._device = device

    def leave(self) -> None:
        try:
            _call(cuda.cuCtxPopCurrent)
        finally:
            _call(cuda.cuDevicePrimaryCtxRelease, self._device)

    def memory(self) -> Memory:
        return Memory(*_call(cuda.cuMemGetInfo))

    def alloc(self, nbytes: int) -> int:
        return int(_call(cuda.cuMemAlloc, nbytes))

    def free(self, address: int) -> None:
        _call(cuda.cuMemFree, address)

    def pin(self, nbytes: int, write_combined: bool) -> Bytes:
        flags = cuda.CU_MEMHOSTALLOC_WRITECOMBINED if write_combined else 0
        address = int(_call(cuda.cuMemHostAlloc, nbytes, flags))
        return np.ctypeslib.as_array((ctypes.c_uint8 * nbytes).from_address(address))

    def unpin(self, address: int) -> None:
        _call(cuda.cuMemFreeHost, address)

    def make_stream(self) -> int:
        return int(_call(cuda.cuStreamCreate, cuda.CUstream_flags.CU_STREAM_NON_BLOCKING.value))

    def drop_stream(self, stream: int) -> None:
        _call(cuda.cuStreamDestroy, stream)

    def synchronize(self, stream: int) -> None:
        _call(cuda.cuStreamSynchronize, stream)

    def make_event(self) -> int:
        return int(_call(cuda.cuEventCreate, cuda.CUevent_flags.CU_EVENT_BLOCKING_SYNC.value))

    def drop_event(self, event: int) -> None:
        _call(cuda.cuEventDestroy, event)

    def record(self, event: int, stream: int) -> None:
        _call(cuda.cuEventRecord, event, stream)

    def is_done(self, event: int) -> bool:
        (result,) = cuda.cuEventQuery(event)
        if result not in (OK, NOT_READY):
            raise _error("cuEventQuery", result)
        return bool(result == OK)

    def wait(self, event: int) -> None:
        _call(cuda.cuEventSynchronize, event)

    def elapsed_ms(self, start: int, end: int) -> float:
        return float(_call(cuda.cuEventElapsedTime, start, end))

    def copy_in(self, address: int, array: npt.NDArray[Any], stream: int) -> None:
        _call(cuda.cuMemcpyHtoDAsync, address, array.ctypes.data, array.nbytes, stream)

    def copy_out(self, array: npt.NDArray[Any], address: int, stream: int) -> None:
        _call(cuda.cuMemcpyDtoHAsync, array.ctypes.data, address, array.nbytes, stream)

    def load(self, ptx: bytes) -> int:
        return int(_call(cuda.cuModuleLoadData, ptx + b"\0"))

    def unload(self, module: int) -> None:
        _call(cuda.cuModuleUnload, module)

    def kernel(self, module: int, name: str) -> int:
        return int(_call(cuda.cuModuleGetFunction, module, name.encode()))

    def launch(
        self,
        kernel: int,
        blocks: tuple[int, int],
        threads: int,
        arguments: Sequence[np.generic],
        stream: int,
    ) -> None:
        values = tuple(one.item() for one in arguments)
        types = tuple(type(np.ctypeslib.as_ctypes(np.asarray(one))) for one in arguments)
        shape = (*blocks, 1, threads, 1, 1)
        _call(cuda.cuLaunchKernel, kernel, *shape, 0, stream, (values, types), 0)

    def begin_capture(self, stream: int) -> None:
        mode = cuda.CUstreamCaptureMode.CU_STREAM_CAPTURE_MODE_THREAD_LOCAL
        _call(cuda.cuStreamBeginCapture, stream, mode)

    def end_capture(self, stream: int) -> int:
        return int(_call(cuda.cuStreamEndCapture, stream))

    def drop_captured(self, captured: int) -> None:
        _call(cuda.cuGraphDestroy, captured)

    def instantiate(self, captured: int) -> int:
        return int(_call(cuda.cuGraphInstantiate, captured, 0))

    def replay(self, graph: int, stream: int) -> None:
        _call(cuda.cuGraphLaunch, graph, stream)

    def drop_graph(self, graph: int) -> None:
        _call(cuda.cuGraphExecDestroy, graph)


def _call(function: Callable[..., Any], *arguments: Any) -> Any:
    """The answer of a call: None, a value, or a tuple of values."""
    try:
        result, *values = function(*arguments)
    except RuntimeError as error:  # a function that an old driver does not have
        raise GpuError(f"NVIDIA's driver: {error}; update it") from error
    if result != OK:
        raise _error(function.__name__, result)
    return values[0] if len(values) == 1 else tuple(values) or None


def _error(call: str, result: Any) -> GpuError:
    kind = GpuMemoryError if result == OUT_OF_MEMORY else GpuError
    return kind(f"NVIDIA's driver: {call} failed: {_words(result)}")


def _words(result: Any) -> str:
    failed, text = cuda.cuGetErrorString(result)
    return str(result) if failed != OK else text.decode()
