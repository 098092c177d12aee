"""How a plane too large for memory is cut so that nobody can see where.

A generator sees `halo_px` around a pixel and nothing beyond, and its strided layers count from the
plane's first pixel. (One whose halo_px is None sees the whole plane: it cannot be cut.) So a tile's
answer equals the whole plane's, up to the order of summation, if the tile

- is read with at least `halo_px` around it, wherever the plane goes on,
- starts on the stride grid,
- ends at the plane's border only where the plane does, so that the network meets the same border.

All tiles of a plane are read with the same size, so that a runtime compiles once: at the borders
the halo is wider, not missing.
"""

from dataclasses import dataclass

SMALLEST_PX = 64
"""Side of the smallest plane that a network gets: what is smaller is padded to it. A plan is made
for a range of sizes, and a network that pads inside needs something to pad from."""


@dataclass(frozen=True, slots=True)
class Span:
    """A tile along one axis, in pixels: answers are kept from start to stop."""

    start: int
    stop: int
    read_start: int
    read_stop: int


def spans(length: int, core: int, halo: int, stride: int) -> list[Span]:
    """Tiles that cover 0 to *length* in steps of *core*, each read with *halo* on both sides.

    *core* and *halo* are multiples of *stride*.
    """
    window = core + 2 * halo
    if length <= window:
        return [Span(0, length, 0, length)]
    padded = round_up(length, stride)  # where the runtime's padding ends
    cut = []
    for start in range(0, length, core):
        read_start = min(max(start - halo, 0), padded - window)
        read_stop = min(read_start + window, length)
        cut.append(Span(start, min(start + core, length), read_start, read_stop))
    return cut


def padded_shape(shape: tuple[int, int], stride: int) -> tuple[int, int]:
    """What a network of *stride* gets for a plane of *shape*, (y, x) px: padded by reflection.

    The same in every runtime, or they would differ at the border.
    """
    height, width = (round_up(max(side, SMALLEST_PX), stride) for side in shape)
    return height, width


def round_up(length_px: int, stride: int) -> int:
    """The next multiple of *stride*."""
    return -(-length_px // stride) * stride
