"""Camera counts <-> the network's range: one rule for all that runs a generator (numpy only).

The rule: counts map to ``(counts - offset) / scale`` where *offset* is the median and *scale* the
distance from the median to the 99.9th percentile, or to the 0.1th where that is farther (stained
tissue on a bright field hangs below its background). The median of a sparse field is its
background, so background sits near 0, and structures that cover more than a thousandth of the
picture near ±1, in every modality. What covers less lies beyond ±1, which the network can take. A
picture without noise may hold nothing but such structures (a few beads on zeros): where the
percentiles span less than one count, the extremes of all pixels take their place.

One map is derived per run and channel from its first non-empty planes, frozen, written into the
run and used again bit for bit by everything that refocuses that run later. Never per frame (a
time-lapse would flicker), never per tile (tiles would show).

The generators are bias-free, hence nearly homogeneous: the network's answer scales with its input.
The exact scale therefore only keeps FP16 in range; it is the offset that the network can see.
Training draws offset and scale around what this rule gives for whole planes
(`calibration.dataset`).
"""

from collections.abc import Sequence
from typing import NamedTuple

import msgspec
import numpy as np
import numpy.typing as npt

from refocus.errors import RejectedError
from refocus.frame import Pixels

RULE = "median-to-p99.9"
"""Name of the rule above. A model package names the rule it was trained for."""

SAMPLE_PX = 200_000
"""Percentiles are taken over about this many pixels of a plane: 5 ms instead of 150 at 2048²."""


class Scaling(msgspec.Struct, frozen=True):
    """Affine map of one channel: network = (counts - offset) / scale. Both in camera counts."""

    offset: float
    scale: float


class Sample(NamedTuple):
    """What `derive` has to know of a plane, in a fraction of its memory; all in camera counts."""

    counts: Pixels
    """About SAMPLE_PX pixels from all over the plane, a copy (n,)."""
    lowest: float
    """Of all pixels of the plane."""
    highest: float


def take_sample(plane: Pixels) -> Sample:
    """Sample of a plane (y, x), uint8 or uint16; the plane itself can be let go."""
    step = max(1, plane.size // SAMPLE_PX)
    # An odd step visits every column: an even one sees only half of a striped or mosaic camera.
    counts = plane.flat[:: step | 1]  # a copy, where a slice of ravel() would keep the plane alive
    return Sample(counts, float(plane.min()), float(plane.max()))


def derive(planes: Sequence[Pixels]) -> Scaling | None:
    """Scaling of a channel from its first planes (each (y, x), uint8 or uint16).

    Returns None while all of them are one level: that tells nothing of a channel.
    """
    return derive_from([take_sample(plane) for plane in planes])


def derive_from(samples: Sequence[Sample]) -> Scaling | None:
    """`derive` for planes that do not fit into memory together."""
    if not samples:
        return None
    counts = np.concatenate([one.counts for one in samples])
    low, middle, high = (float(v) for v in np.percentile(counts, (0.1, 50.0, 99.9)))
    scale = max(high - middle, middle - low)
    if scale < 1.0:
        low, high = min(one.lowest for one in samples), max(one.highest for one in samples)
        scale = max(high - middle, middle - low)
    return Scaling(offset=middle, scale=scale) if low < high else None


def to_network(pixels: Pixels, scaling: Scaling) -> npt.NDArray[np.float32]:
    """Counts (y, x) to the network's range, float32."""
    if pixels.dtype not in (np.uint8, np.uint16):
        raise RejectedError(
            f"pixels are {pixels.dtype}; only uint8 and uint16 are refocused "
            "(float frames are kept raw)"
        )
    values = pixels.astype(np.float32)
    values -= np.float32(scaling.offset)
    values *= np.float32(1.0 / scaling.scale)
    return values


def to_counts(
    values: npt.NDArray[np.float32], scaling: Scaling, dtype: npt.DTypeLike
) -> tuple[Pixels, int]:
    """Network range (y, x) back to rounded counts of *dtype*, and how many pixels were clipped."""
    limits = np.iinfo(np.dtype(dtype))
    counts = values * np.float32(scaling.scale)
    counts += np.float32(scaling.offset)
    np.rint(counts, out=counts)
    clipped = int(np.count_nonzero(counts < limits.min) + np.count_nonzero(counts > limits.max))
    np.clip(counts, limits.min, limits.max, out=counts)
    return counts.astype(dtype), clipped
