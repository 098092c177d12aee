"""A frame size that is ready on the GPU: whole, or cut into tiles that fit.

Tiles are exact (engine/tiles.py): each is read with its halo, all have the same size, and at the
plane's end they are padded as the whole plane would be. Two are under way at a time, as planes are.
"""

from collections import deque
from collections.abc import Iterator
from dataclasses import dataclass
from itertools import product

import numpy as np

from engine.package import Package
from engine.plan import LARGEST_SQUARE_PX
from engine.runtimes import Refocused
from engine.runtimes.slot import Slot
from engine.scaling import Scaling
from engine.tiles import Span, padded_shape, round_up, spans
from refocus.frame import Pixels

CORES_PX = (4096, 2048, 1024, 512)
"""Sides of tiles to try, without their halo."""
Window = tuple[int, int]
"""(y, x) px of what is computed at once: the whole plane, or a tile with its halo."""
Grid = list[tuple[Span, Span]]
"""Tiles, rows and columns of each; none where the plane goes through whole."""


@dataclass(frozen=True, slots=True)
class Loaded:
    """A shape that is ready."""

    shape: tuple[int, int]
    window: Window
    grid: Grid
    slots: deque[Slot]
    """The one at the left has rested longest."""

    @property
    def is_tiled(self) -> bool:
        return bool(self.grid)

    def start(self, pixels: Pixels, scaling: Scaling) -> Slot:
        """Begin with a window in the next slot."""
        slot = self.slots[0]
        self.slots.rotate(-1)
        slot.start(pixels, scaling)
        return slot


def windows(package: Package, shape: tuple[int, int]) -> Iterator[tuple[Window, Grid]]:
    """What could be computed at once, the largest first, with the tiles that the plane makes."""
    if max(shape) <= LARGEST_SQUARE_PX:
        yield shape, []
    stride, halo_px = package.manifest.stride, package.manifest.halo_px
    if halo_px is None:
        return
    whole = padded_shape(shape, stride)
    for core_px in (round_up(side, stride) for side in CORES_PX):
        window = tuple(min(core_px + 2 * halo_px, side) for side in whole)
        if window != whole and max(window) <= LARGEST_SQUARE_PX:
            rows, columns = (spans(side, core_px, halo_px, stride) for side in shape)
            yield (window[0], window[1]), list(product(rows, columns))


def refocus_in_tiles(loaded: Loaded, raw: Pixels, scaling: Scaling) -> Refocused:
    """The whole plane, tile by tile. Clipped pixels in the halo of a neighbour count twice."""
    answer = np.empty_like(raw)
    clipped = 0
    under_way: deque[tuple[Slot, Span, Span]] = deque()

    def keep_oldest() -> int:
        slot, rows, columns = under_way.popleft()
        made = slot.finish()
        kept = slice(rows.start, rows.stop), slice(columns.start, columns.stop)
        answer[kept] = made.pixels[_inner(rows), _inner(columns)]
        return made.clipped

    for rows, columns in loaded.grid:
        if len(under_way) == len(loaded.slots):
            clipped += keep_oldest()
        tile = raw[rows.read_start : rows.read_stop, columns.read_start : columns.read_stop]
        # Only where the plane ends off the stride grid: padded as a whole plane would be.
        missing = [(0, wanted - got) for wanted, got in zip(loaded.window, tile.shape, strict=True)]
        tile = np.pad(tile, missing, mode="reflect") if any(map(any, missing)) else tile
        under_way.append((loaded.start(tile, scaling), rows, columns))
    while under_way:
        clipped += keep_oldest()
    return Refocused(answer, clipped)


def _inner(span: Span) -> slice:
    """The part of a tile that is kept, counted from the tile's own beginning."""
    return slice(span.start - span.read_start, span.stop - span.read_start)
