"""One place for one plane on the GPU, from the host's memory and back.

Everything a plane needs lies ready: pinned buffers (only those copy while the GPU computes),
buffers on the GPU, a TensorRT context, a stream, and the whole way as one captured graph:

    upload counts and scaling -> to_network -> the network -> to_counts -> download counts and stats

A graph freezes its arguments, so offset and scale travel as data beside the plane. Counts become
network values on the GPU: converting on the host takes longer than the network, and half as many
bytes travel. With two slots on two streams the copies of one plane hide behind the computing of the
other.
"""

from contextlib import ExitStack
from functools import partial
from typing import Protocol

import numpy as np
import numpy.typing as npt

from engine.checks import check_answer
from engine.gpu import Gpu
from engine.gpu.convert import PARAMS_BYTES, STATS, Converter, level, params
from engine.runtimes import Refocused
from engine.scaling import Scaling
from refocus.errors import EngineError
from refocus.frame import Pixels

DTYPES = (np.dtype(np.uint8), np.dtype(np.uint16))


class Network(Protocol):
    """What `engine.runtimes.executable.Context` offers a slot."""

    memory_bytes: int

    def bind(self, network: int, answer: int, memory: int) -> None: ...
    def enqueue(self, stream: int) -> None: ...
    def is_capturable(self, stream: int) -> bool: ...
    def close(self) -> None: ...


class Networks(Protocol):
    """Makes a `Network` for a padded shape (y, x) px."""

    def context(self, padded: tuple[int, int], stream: int) -> Network: ...


class Slot:
    """Buffers, context and graphs for planes of *shape*, padded to *padded*, (y, x) px both."""

    def __init__(
        self, gpu: Gpu, networks: Networks, shape: tuple[int, int], padded: tuple[int, int]
    ) -> None:
        self._gpu = gpu
        self._shape = shape
        self._padded = padded
        self._graphs: dict[np.dtype[np.generic], int] = {}
        """Empty where the work cannot be captured: then it is enqueued step by step."""
        self._raw: Pixels | None = None
        with ExitStack() as closing:
            self._stream = gpu.stream()
            closing.callback(gpu.drop_stream, self._stream)
            self._done = gpu.event()
            closing.callback(gpu.drop_event, self._done)
            self._network = networks.context(padded, self._stream)
            self.device_bytes = _device_bytes(shape, padded) + self._network.memory_bytes
            """On the GPU, taken by `allocate`."""
            self._closing = closing.pop_all()

    def allocate(self) -> None:
        """Take the memory, run once, and capture the graphs.

        Raises GpuMemoryError where the GPU has too little memory left.
        """
        gpu, counts_bytes = self._gpu, 2 * self._shape[0] * self._shape[1]
        values_bytes = 4 * self._padded[0] * self._padded[1]
        # Written by the host and read by the GPU alone: write-combined is faster for both.
        self._host_raw = self._pin(counts_bytes, write_combined=True)
        self._host_params = self._pin(PARAMS_BYTES)
        self._host_counts = self._pin(counts_bytes)
        self._host_stats = self._pin(STATS.itemsize)
        self._counts = self._alloc(counts_bytes)  # raw on the way in, refocused on the way out
        self._params = self._alloc(PARAMS_BYTES)
        self._stats = self._alloc(STATS.itemsize)
        self._values = self._alloc(values_bytes)
        self._answer = self._alloc(values_bytes)
        self._network.bind(
            self._values, self._answer, self._alloc(max(1, self._network.memory_bytes))
        )
        self._host_raw[:] = 0
        self._host_params.view(np.float32)[:] = 0, 1, 1
        self._enqueue(DTYPES[0])
        gpu.synchronize(self._stream)
        if self._network.is_capturable(self._stream):
            self._capture()

    def start(self, pixels: Pixels, scaling: Scaling) -> None:
        """Begin with a plane of this slot's shape, uint8 or uint16."""
        if self._raw is not None:  # nobody wanted its answer; the GPU may still be reading
            self._gpu.wait(self._done)
        self._view(self._host_raw, pixels.dtype)[:] = pixels
        self._host_params.view(np.float32)[:] = params(scaling)
        if self.is_captured:
            self._gpu.replay(self._graphs[pixels.dtype], self._stream)
        else:
            self._enqueue(pixels.dtype)
        self._gpu.record(self._done, self._stream)
        self._raw = pixels

    def finish(self) -> Refocused:
        """Wait for the plane that was started; its pixels are ours until the next start.

        Raises EngineError for rubbish.
        """
        raw, self._raw = self._raw, None
        if raw is None:
            raise EngineError("no plane was started in this slot")
        self._gpu.wait(self._done)
        stats = self._host_stats.view(STATS)[0]
        extremes = [level(int(stats[which])) for which in ("lowest", "highest")]
        check_answer(raw, *([np.nan, np.nan] if stats["nonfinite"] else extremes))
        return Refocused(self._view(self._host_counts, raw.dtype), int(stats["clipped"]))

    def run_network(self) -> None:
        """The network alone on what lies there, waited for."""
        self._network.enqueue(self._stream)
        self._gpu.synchronize(self._stream)

    def settle(self) -> None:
        """Wait for all that is under way here."""
        self._gpu.synchronize(self._stream)

    def close(self) -> None:
        """Waits for what is under way, then releases all, whatever fails on the way."""
        with ExitStack() as last:  # runs from the last to the first
            last.push(self._closing)
            last.callback(self._network.close)  # before the memory that it computes in
            for graph in self._graphs.values():
                last.callback(self._gpu.drop_graph, graph)
            last.callback(self.settle)
            self._graphs.clear()

    @property
    def is_captured(self) -> bool:
        """Whether a plane goes as one graph; it is slower step by step, and no less right."""
        return len(self._graphs) == len(DTYPES)

    def _capture(self) -> None:
        """The plain run went well, so whatever fails in a capture is about capturing alone."""
        try:
            for dtype in DTYPES:
                enqueue = partial(self._enqueue, dtype)
                self._graphs[dtype] = self._gpu.capture(self._stream, enqueue)
        except EngineError:
            for graph in self._graphs.values():
                self._gpu.drop_graph(graph)
            self._graphs.clear()
            self._enqueue(DTYPES[0])  # if the GPU itself is broken, it shows here
            self._gpu.synchronize(self._stream)

    def _enqueue(self, dtype: np.dtype[np.generic]) -> None:
        gpu, stream, convert = self._gpu, self._stream, Converter(self._gpu, dtype)
        sides = self._shape, self._padded
        gpu.copy_in(self._params, self._host_params, stream)
        gpu.copy_in(self._counts, self._view(self._host_raw, dtype), stream)
        convert.reset_stats(self._stats, stream)
        convert.to_network(self._counts, self._values, *sides, self._params, stream)
        self._network.enqueue(stream)
        convert.to_counts(self._answer, self._counts, *sides, self._params, self._stats, stream)
        gpu.copy_out(self._host_stats, self._stats, stream)
        gpu.copy_out(self._view(self._host_counts, dtype), self._counts, stream)

    def _view(self, pinned: npt.NDArray[np.uint8], dtype: np.dtype[np.generic]) -> Pixels:
        """The part of *pinned* that a plane of *dtype* takes, as (y, x)."""
        used = pinned[: self._shape[0] * self._shape[1] * dtype.itemsize]
        return used.view(dtype).reshape(self._shape)

    def _alloc(self, size_bytes: int) -> int:
        address = self._gpu.alloc(size_bytes)
        self._closing.callback(self._gpu.free, address)
        return address

    def _pin(self, size_bytes: int, *, write_combined: bool = False) -> npt.NDArray[np.uint8]:
        array = self._gpu.pinned(size_bytes, write_combined=write_combined)
        self._closing.callback(self._gpu.unpin, array)
        return array


def _device_bytes(shape: tuple[int, int], padded: tuple[int, int]) -> int:
    values_bytes = 4 * padded[0] * padded[1]
    return 2 * values_bytes + 2 * shape[0] * shape[1] + PARAMS_BYTES + STATS.itemsize
