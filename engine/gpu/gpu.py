"""One opened GPU: what it gives out, what it checks, and how all of it is given back.

The rules, and why they are so, are in __init__.py.
"""

import contextlib
import threading
from collections.abc import Callable, Iterator, Sequence
from importlib.resources import files
from types import TracebackType
from typing import Any, Self

import numpy as np
import numpy.typing as npt

from engine.gpu.driver import Bytes, Device, Driver, GpuError, GpuMemoryError, Memory


class Gpu:
    """A GPU in the hands of the thread that opened it. Addresses and handles are ints.

    Every method raises GpuError where the driver fails or another thread calls.
    """

    def __init__(self, driver: Driver, device: Device) -> None:
        self.seam = driver.name
        self.device = device
        self._driver = driver
        self._thread = threading.get_ident()
        self._closed = False
        self._broken = False
        self._drops: dict[str, Callable[[int], None]] = {
            "graphs": driver.drop_graph,
            "device memory": driver.free,
            "pinned memory": driver.unpin,
            "events": driver.drop_event,
            "streams": driver.drop_stream,
        }
        """How each kind is released, in the order in which `close` does it."""
        self._owned: dict[str, dict[int, int]] = {kind: {} for kind in self._drops}
        """Handle or address, and bytes where it is memory."""
        self._kernels: dict[str, int] = {}
        with contextlib.ExitStack() as taken:
            driver.enter(device.index)
            taken.callback(driver.leave)
            self._module = driver.load(files("engine.gpu").joinpath("convert.ptx").read_bytes())
            taken.callback(driver.unload, self._module)
            self._taken = taken.pop_all()

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self.close()

    def memory(self) -> Memory:
        """Of the whole GPU, now."""
        with self._calls() as driver:
            return driver.memory()

    def alloc(self, nbytes: int) -> int:
        """Address of *nbytes* on the GPU, holding whatever was there.

        Raises GpuMemoryError where there is no room.
        """
        with self._calls() as driver:
            try:
                address = driver.alloc(nbytes)
            except GpuMemoryError as error:
                free, total = (size >> 20 for size in driver.memory())
                raise GpuMemoryError(
                    f"{nbytes / 2**20:.0f} MiB were asked of {self.device.name}, which has {free} "
                    f"of {total} MiB free; close what else uses it, or refocus smaller planes"
                ) from error
        return self._own("device memory", address, nbytes)

    def free(self, address: int) -> None:
        """Give back what `alloc` gave."""
        self._release("device memory", address)

    def pinned(self, nbytes: int, write_combined: bool = False) -> Bytes:
        """Memory of the host that the GPU copies from and to by itself: (nbytes,), uint8.

        *write_combined* memory is faster to copy from and very slow for the CPU to read.
        """
        with self._calls() as driver:
            try:
                array = driver.pin(nbytes, write_combined)
            except GpuMemoryError as error:
                raise GpuMemoryError(
                    f"{nbytes / 2**20:.0f} MiB of the host's memory cannot be pinned; "
                    "close what else uses memory, or refocus smaller planes"
                ) from error
        self._own("pinned memory", array.ctypes.data, nbytes)
        return array

    def unpin(self, array: npt.NDArray[Any]) -> None:
        """Give back what `pinned` gave; no view of it may be touched afterwards."""
        self._release("pinned memory", array.ctypes.data)

    def stream(self) -> int:
        """A queue of work, independent of the default one; TensorRT takes this handle."""
        with self._calls() as driver:
            return self._own("streams", driver.make_stream())

    def synchronize(self, stream: int) -> None:
        """Wait for all work in a stream."""
        with self._calls() as driver:
            driver.synchronize(stream)

    def drop_stream(self, stream: int) -> None:
        """Wait for the work in a stream and release it."""
        self.synchronize(stream)
        self._release("streams", stream)

    def event(self) -> int:
        """A mark to put into streams. Waiting for it leaves the CPU core to others."""
        with self._calls() as driver:
            return self._own("events", driver.make_event())

    def drop_event(self, event: int) -> None:
        self._release("events", event)

    def record(self, event: int, stream: int) -> None:
        """Put the mark behind all work that is in the stream now."""
        with self._calls() as driver:
            driver.record(event, stream)

    def is_done(self, event: int) -> bool:
        """Whether the work before the latest mark is done; True for one never recorded."""
        with self._calls() as driver:
            return driver.is_done(event)

    def wait(self, event: int) -> None:
        """Wait for the work before the latest mark; other Python threads run meanwhile."""
        with self._calls() as driver:
            driver.wait(event)

    def elapsed_ms(self, start: int, end: int) -> float:
        """GPU time between two marks that are done."""
        with self._calls() as driver:
            return driver.elapsed_ms(start, end)

    def copy_in(self, address: int, array: npt.NDArray[Any], stream: int) -> None:
        """Enqueue host to GPU; *array* is C-contiguous, pinned, and left alone until done."""
        self._check_copy(array, address)
        with self._calls() as driver:
            driver.copy_in(address, array, stream)

    def copy_out(self, array: npt.NDArray[Any], address: int, stream: int) -> None:
        """Enqueue GPU to host; *array* is C-contiguous and pinned."""
        self._check_copy(array, address)
        with self._calls() as driver:
            driver.copy_out(array, address, stream)

    def kernel(self, name: str) -> int:
        """A kernel of convert.cu; valid until `close`."""
        with self._calls() as driver:
            if name not in self._kernels:
                self._kernels[name] = driver.kernel(self._module, name)
            return self._kernels[name]

    def launch(
        self,
        kernel: int,
        blocks: tuple[int, int],
        threads: int,
        arguments: Sequence[np.generic],
        stream: int,
    ) -> None:
        """Enqueue a kernel over *blocks* (x, y) of *threads* each.

        *arguments* are numpy scalars of exactly the kernel's types, addresses as uint64.
        """
        with self._calls() as driver:
            driver.launch(kernel, blocks, threads, arguments, stream)

    def capture(self, stream: int, enqueue: Callable[[], None]) -> int:
        """A graph of what *enqueue* puts into the stream, with its arguments; nothing runs."""
        with self._calls() as driver:
            driver.begin_capture(stream)
            try:
                enqueue()
            except BaseException:
                # A stream left in capture would refuse all work; the cause is what must be seen.
                with contextlib.suppress(GpuError):
                    driver.drop_captured(driver.end_capture(stream))
                raise
            captured = driver.end_capture(stream)
            try:
                return self._own("graphs", driver.instantiate(captured))
            finally:
                driver.drop_captured(captured)

    def replay(self, graph: int, stream: int) -> None:
        """Enqueue a captured graph."""
        with self._calls() as driver:
            driver.replay(graph, stream)

    def drop_graph(self, graph: int) -> None:
        self._release("graphs", graph)

    def leaks(self) -> dict[str, int]:
        """How many of each kind are still allocated; empty where all was given back."""
        return {kind: len(owned) for kind, owned in self._owned.items() if owned}

    def close(self) -> None:
        """Release all that is left and leave the context; may be called twice.

        Raises GpuError where something could not be released that should have been.
        """
        if self._closed:
            return
        with self._calls():
            self._closed = True
        try:
            self._release_all()
        except GpuError:
            if not self._broken:
                raise

    def _release_all(self) -> None:
        with contextlib.ExitStack() as left:  # the last first, each whatever the others did
            left.push(self._taken)
            for kind, owned in reversed(self._owned.items()):
                for handle in owned:
                    left.callback(self._drop, kind, handle)
            for stream in self._owned["streams"]:
                left.callback(self._driver.synchronize, stream)

    @contextlib.contextmanager
    def _calls(self) -> Iterator[Driver]:
        """The driver, for our thread, while we are open; notes what breaks the context."""
        if threading.get_ident() != self._thread:
            raise GpuError(
                f"{self.device.name} belongs to the thread that opened it, and thread "
                f"{threading.current_thread().name!r} calls; open, use and close it in one thread"
            )
        if self._closed:
            raise GpuError(f"{self.device.name} is closed; open it again")
        try:
            yield self._driver
        except GpuMemoryError:
            raise
        except GpuError:
            self._broken = True
            raise

    def _own(self, kind: str, handle: int, nbytes: int = 0) -> int:
        self._owned[kind][handle] = nbytes
        return handle

    def _release(self, kind: str, handle: int) -> None:
        if handle not in self._owned[kind]:
            raise GpuError(f"{handle:#x} is not among the {kind} of this GPU, or not any more")
        with self._calls():
            self._drop(kind, handle)

    def _drop(self, kind: str, handle: int) -> None:
        del self._owned[kind][handle]  # whatever the driver says, there is no second try
        self._drops[kind](handle)

    def _check_copy(self, array: npt.NDArray[Any], address: int) -> None:
        """Refuse what the design note says a copy must not do."""
        if not array.flags.c_contiguous:
            raise GpuError(f"an array of {array.shape} to copy is not C-contiguous")
        for kind, start in (("pinned memory", array.ctypes.data), ("device memory", address)):
            owned = self._owned[kind].items()
            if not any(at <= start and start + array.nbytes <= at + size for at, size in owned):
                raise GpuError(
                    f"a copy of {array.nbytes} bytes at {start:#x} is outside the {kind} "
                    "that this GPU gave out; copy from and to pinned() and alloc()"
                )
