"""pycuda, where it can be compiled.

It has no CUDA graphs: those calls, and the few others that it lacks, go to the same library through
ctypes. Its objects free themselves when the last reference to them dies; they are kept here until
the seam frees them, so that this happens in the thread that made them (on any other thread pycuda
frees nothing). What fails while it frees, pycuda prints instead of raising.

Its `Context.detach` of a primary context leaves that context on the driver's stack, already
released. We hold the context once more ourselves, take it off the stack, and release it last.
"""

import contextlib
import ctypes
import sys
import traceback
from collections.abc import Iterator, Sequence
from typing import Any

import numpy as np
import numpy.typing as npt
import pycuda
import pycuda.driver as cuda

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

OUT_OF_MEMORY = 2
NON_BLOCKING = 1
THREAD_LOCAL = 1


@contextlib.contextmanager
def _translated() -> Iterator[None]:
    try:
        yield
    except cuda.Error as error:
        # The frames of a traceback would hold streams and modules alive until after `leave`.
        traceback.clear_frames(error.__traceback__)
        kind = GpuMemoryError if isinstance(error, cuda.MemoryError) else GpuError
        raise kind(f"NVIDIA's driver: {error}") from error


class Pycuda:
    """`engine.gpu.driver.Driver` over pycuda."""

    name = f"pycuda {pycuda.VERSION_TEXT}"

    def __init__(self) -> None:
        if sys.platform == "win32":
            self._library: ctypes.CDLL = ctypes.WinDLL(LIBRARY)
        else:
            self._library = ctypes.CDLL(LIBRARY)
        self._context: Any = None
        self._device = ctypes.c_int()
        self._held: dict[int, Any] = {}
        """pycuda's objects, by what the seam calls them."""
        self._kernels: dict[int, Any] = {}

    def start(self) -> None:
        try:
            cuda.init()
        except cuda.Error as error:
            raise NoGpuError(f"NVIDIA's driver finds no GPU that it can use: {error}") from error

    @_translated()
    def count(self) -> int:
        return int(cuda.Device.count())

    @_translated()
    def describe(self, index: int) -> Device:
        device = cuda.Device(index)
        uuid = ctypes.create_string_buffer(16)
        self._call("cuDeviceGetUuid_v2", uuid, self._handle(index))
        return Device(
            index=index,
            name=device.name(),
            capability=device.compute_capability(),
            memory_bytes=device.total_memory(),
            uuid=uuid_words(uuid.raw),
            driver=driver_words(cuda.get_driver_version()),
        )

    @_translated()
    def enter(self, index: int) -> None:
        device = self._handle(index)
        self._call("cuDevicePrimaryCtxRetain", ctypes.byref(ctypes.c_void_p()), device)
        try:
            context = cuda.Device(index).retain_primary_context()
            try:
                context.push()
            except cuda.Error:
                with contextlib.suppress(GpuError):
                    self._detach(context)
                raise
        except cuda.Error:
            self._call("cuDevicePrimaryCtxRelease_v2", device)
            raise
        self._context, self._device = context, device

    @_translated()
    def leave(self) -> None:
        self._kernels.clear()
        self._held.clear()
        with contextlib.ExitStack() as rest:  # the last first, each whatever the others did
            rest.callback(self._call, "cuDevicePrimaryCtxRelease_v2", self._device)
            rest.callback(self._detach, self._context)
            self._context.pop()

    @_translated()
    def memory(self) -> Memory:
        return Memory(*cuda.mem_get_info())

    @_translated()
    def alloc(self, nbytes: int) -> int:
        allocation = cuda.mem_alloc(nbytes)
        self._held[int(allocation)] = allocation
        return int(allocation)

    @_translated()
    def free(self, address: int) -> None:
        self._held.pop(address).free()

    @_translated()
    def pin(self, nbytes: int, write_combined: bool) -> Bytes:
        flags = cuda.host_alloc_flags.WRITECOMBINED if write_combined else 0
        array: Bytes = cuda.pagelocked_empty(nbytes, np.uint8, mem_flags=flags)
        self._held[array.ctypes.data] = array.base
        return array

    @_translated()
    def unpin(self, address: int) -> None:
        self._held.pop(address).free()

    @_translated()
    def make_stream(self) -> int:
        return self._hold(cuda.Stream(NON_BLOCKING), "handle")

    @_translated()
    def drop_stream(self, stream: int) -> None:
        del self._held[stream]

    @_translated()
    def synchronize(self, stream: int) -> None:
        self._held[stream].synchronize()

    @_translated()
    def make_event(self) -> int:
        return self._hold(cuda.Event(cuda.event_flags.BLOCKING_SYNC))

    @_translated()
    def drop_event(self, event: int) -> None:
        del self._held[event]

    @_translated()
    def record(self, event: int, stream: int) -> None:
        self._held[event].record(self._held[stream])

    @_translated()
    def is_done(self, event: int) -> bool:
        return bool(self._held[event].query())

    @_translated()
    def wait(self, event: int) -> None:
        self._held[event].synchronize()

    @_translated()
    def elapsed_ms(self, start: int, end: int) -> float:
        return float(self._held[end].time_since(self._held[start]))

    @_translated()
    def copy_in(self, address: int, array: npt.NDArray[Any], stream: int) -> None:
        cuda.memcpy_htod_async(address, array, self._held[stream])

    @_translated()
    def copy_out(self, array: npt.NDArray[Any], address: int, stream: int) -> None:
        cuda.memcpy_dtoh_async(array, address, self._held[stream])

    @_translated()
    def load(self, ptx: bytes) -> int:
        try:
            return self._hold(cuda.module_from_buffer(ptx + b"\0"))
        except UnicodeDecodeError as error:  # pycuda quotes a log even where none was written
            raise GpuError(
                "NVIDIA's driver: cuModuleLoadDataEx failed, and gave no reason"
            ) from error

    @_translated()
    def unload(self, module: int) -> None:
        self._kernels.clear()
        del self._held[module]

    @_translated()
    def kernel(self, module: int, name: str) -> int:
        kernel = self._held[module].get_function(name)
        self._kernels[id(kernel)] = kernel
        return id(kernel)

    @_translated()
    def launch(
        self,
        kernel: int,
        blocks: tuple[int, int],
        threads: int,
        arguments: Sequence[np.generic],
        stream: int,
    ) -> None:
        self._kernels[kernel](
            *arguments, grid=blocks, block=(threads, 1, 1), stream=self._held[stream]
        )

    def begin_capture(self, stream: int) -> None:
        self._call("cuStreamBeginCapture_v2", ctypes.c_void_p(stream), THREAD_LOCAL)

    def end_capture(self, stream: int) -> int:
        captured = ctypes.c_void_p()
        self._call("cuStreamEndCapture", ctypes.c_void_p(stream), ctypes.byref(captured))
        return captured.value or 0

    def drop_captured(self, captured: int) -> None:
        self._call("cuGraphDestroy", ctypes.c_void_p(captured))

    def instantiate(self, captured: int) -> int:
        graph, flags = ctypes.c_void_p(), ctypes.c_ulonglong(0)
        self._call(
            "cuGraphInstantiateWithFlags", ctypes.byref(graph), ctypes.c_void_p(captured), flags
        )
        return graph.value or 0

    def replay(self, graph: int, stream: int) -> None:
        self._call("cuGraphLaunch", ctypes.c_void_p(graph), ctypes.c_void_p(stream))

    def drop_graph(self, graph: int) -> None:
        self._call("cuGraphExecDestroy", ctypes.c_void_p(graph))

    def _hold(self, made: Any, handle: str = "") -> int:
        name = int(getattr(made, handle)) if handle else id(made)
        self._held[name] = made
        return name

    def _handle(self, index: int) -> ctypes.c_int:
        device = ctypes.c_int()
        self._call("cuDeviceGet", ctypes.byref(device), index)
        return device

    def _detach(self, context: Any) -> None:
        context.detach()
        self._call("cuCtxPopCurrent_v2", ctypes.byref(ctypes.c_void_p()))

    def _call(self, function: str, *arguments: Any) -> None:
        result = getattr(self._library, function)(*arguments)
        if result:
            text = ctypes.c_char_p()
            self._library.cuGetErrorString(result, ctypes.byref(text))
            words = (text.value or str(result).encode()).decode()
            kind = GpuMemoryError if result == OUT_OF_MEMORY else GpuError
            raise kind(f"NVIDIA's driver: {function} failed: {words}")
