"""The shipped kernels as Python calls them, and the bytes that they share with the host.

convert.cu holds the arithmetic; this file its shapes, its argument types and its two structs.
"""

from typing import Final

import numpy as np
import numpy.typing as npt

from engine.gpu.gpu import Gpu
from engine.scaling import Scaling

STATS: Final = np.dtype(
    [("clipped", "<u4"), ("nonfinite", "<u4"), ("lowest", "<i4"), ("highest", "<i4")]
)
"""What the way back to counts finds out. *lowest* and *highest* are of the finite values of the
network's answer, as `level` reads them."""

PARAMS_BYTES: Final = 12

THREADS: Final = 256
"""A multiple of every GPU's warp, small enough for every GPU."""
ROWS: Final = 128
"""Rows of blocks: each thread goes on with every 128th row, so that the extremes are compared once
for many pixels; 128 by 8 blocks fill any GPU."""


def params(scaling: Scaling) -> npt.NDArray[np.float32]:
    """The kernels' Params: (offset, scale, 1 / scale), float32, the same numbers as numpy uses."""
    return np.array([scaling.offset, scaling.scale, 1.0 / scaling.scale], np.float32)


def level(ordered: int) -> float:
    """The float of an extreme in STATS; NaN where no value was finite."""
    bits = np.int32(ordered if ordered >= 0 else ordered ^ 0x7FFFFFFF)
    return float(bits.view(np.float32))


class Converter:
    """Enqueues the kernels. Addresses are of device memory."""

    def __init__(self, gpu: Gpu, dtype: npt.DTypeLike) -> None:
        """*dtype* of the counts: uint8 or uint16."""
        bits = np.dtype(dtype).itemsize * 8
        self._gpu = gpu
        self._to_network = gpu.kernel(f"to_network_u{bits}")
        self._to_counts = gpu.kernel(f"to_counts_u{bits}")
        self._reset_stats = gpu.kernel("reset_stats")

    def to_network(
        self,
        raw: int,
        network: int,
        shape: tuple[int, int],
        padded: tuple[int, int],
        params: int,
        stream: int,
    ) -> None:
        """Counts of *shape* (y, x) to float32 of *padded* (y, x), padded at the end as np.pad does.

        Equals `engine.scaling.to_network` of the plane after np.pad(mode="reflect"), bit for bit.
        """
        addresses = (np.uint64(raw), np.uint64(network))
        sides = tuple(np.int32(side) for side in (*shape, *padded))
        self._launch(self._to_network, padded, (*addresses, *sides, np.uint64(params)), stream)

    def to_counts(
        self,
        network: int,
        counts: int,
        shape: tuple[int, int],
        padded: tuple[int, int],
        params: int,
        stats: int,
        stream: int,
    ) -> None:
        """The upper left *shape* of the float32 of *padded* to counts; adds to *stats*.

        Equals `engine.scaling.to_counts`, bit for bit; a NaN, which has no counts, becomes 0.
        """
        addresses = (np.uint64(network), np.uint64(counts))
        sides = (np.int32(shape[0]), np.int32(shape[1]), np.int32(padded[1]))
        tail = (np.uint64(params), np.uint64(stats))
        self._launch(self._to_counts, shape, (*addresses, *sides, *tail), stream)

    def reset_stats(self, stats: int, stream: int) -> None:
        """STATS of no pixels."""
        self._gpu.launch(self._reset_stats, (1, 1), 1, (np.uint64(stats),), stream)

    def _launch(
        self, kernel: int, over: tuple[int, int], arguments: tuple[np.generic, ...], stream: int
    ) -> None:
        blocks = (-(-over[1] // THREADS), min(over[0], ROWS))
        self._gpu.launch(kernel, blocks, THREADS, arguments, stream)
