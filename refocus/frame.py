"""What a frame is, and what can become of it.

A `Frame` is one exposure: pixels and a `FrameHeader` that says where and when they were taken.
The header is complete whatever path the frame took through Micro-Manager (their metadata
differ from path to path); what is not known is None, never a guess.

Every frame gets exactly one `RawOutcome`, and one live `RefocusOutcome` that a later record may
supersede. The counts of the last records add up to the frames received: that sum is how a run
knows that nothing was lost.
"""

import enum
import math
from dataclasses import dataclass
from typing import Any, Literal

import msgspec
import numpy.typing as npt

from refocus.errors import WireError

Pixels = npt.NDArray[Any]
"""Two-dimensional array (y, x), uint8, uint16 or float32."""

DTYPES = ("uint8", "uint16", "float32")
MAX_SIDE_PX = 65_536
MAX_SEQ = 2**53

ZSource = Literal["intended", "stage", "none"]


class RawOutcome(enum.IntEnum):
    """What became of a frame's own pixels."""

    SAVED = 1
    """Acknowledged: on disk, and it survives kill -9 of this process."""
    FAILED = 2
    """Not on disk; the journal says why."""


class RefocusOutcome(enum.IntEnum):
    """What became of a frame's refocused twin."""

    REFOCUSED = 1
    """On disk beside the raw plane."""
    SKIPPED = 2
    """The engine was busy or absent when this frame came; it can be filled later."""
    LATE = 3
    """An answer came after the worker had been given up; it was discarded."""
    LOST = 4
    """Sent to a worker that died or hung, and never answered."""
    REJECTED = 5
    """Not a frame that the generator may touch (dtype, pixel size, ...)."""
    FAILED = 6
    """The engine tried and could not, or its answer did not pass the checks."""


class FrameHeader(msgspec.Struct, frozen=True, kw_only=True):
    """One exposure's place, time and optics. Lengths in um, times in ms or ns."""

    run: str
    seq: int
    """Counts frames of the run from 0 in the order the hook got them."""
    segment: int = 0
    """Counts stretches of one shape, dtype and pixel size; the store assigns the final one."""
    axes: dict[str, int | str]
    """Micro-Manager's own index, for example {"time": 0, "channel": "DAPI", "z": 3}."""
    camera: str = ""
    channel: str = ""
    shape: tuple[int, int]
    """(y, x) in pixels."""
    dtype: str
    bit_depth: int | None = None
    pixel_um: float | None = None
    """Side of a camera pixel in the sample; None where Micro-Manager does not know (it says 0)."""
    exposure_ms: float | None = None
    x_um: float | None = None
    y_um: float | None = None
    z_um: float | None = None
    z_source: ZSource = "none"
    """intended: the event's own z; stage: read after the hardware moved; none: unknown."""
    image_number: int | None = None
    """The camera's own count, where it sends one (hardware sequences do, snaps do not)."""
    wall_time_ns: int = 0
    hook_time_ns: int = 0
    """Monotonic clock when the hook got the frame; latency is measured from here."""

    def __post_init__(self) -> None:
        if not 0 <= self.seq < MAX_SEQ:
            raise WireError(f"frame header: seq must be in 0..2^53, got {self.seq}")
        if len(self.shape) != 2 or not all(1 <= side <= MAX_SIDE_PX for side in self.shape):
            raise WireError(
                f"frame header: shape must be (y, x) of 1..{MAX_SIDE_PX}, got {self.shape}"
            )
        if self.dtype not in DTYPES:
            raise WireError(f"frame header: dtype must be one of {DTYPES}, got {self.dtype!r}")
        if self.pixel_um is not None and not (math.isfinite(self.pixel_um) and self.pixel_um > 0):
            raise WireError(f"frame header: pixel_um must be positive or null, got {self.pixel_um}")


@dataclass(frozen=True, slots=True)
class Frame:
    """A header and its pixels: (y, x), C-contiguous, never written to again."""

    header: FrameHeader
    pixels: Pixels
