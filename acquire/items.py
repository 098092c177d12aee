"""What travels between the hook's thread, the intake, the link and the writer's thread."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import numpy.typing as npt

from acquire.header import Hardware
from refocus.frame import Frame, Pixels, RefocusOutcome
from store.writer import RunWriter


@dataclass(frozen=True, slots=True)
class Exposure:
    """What the hook got, as it got it. *refused*: why it was not taken, empty where it was."""

    image: npt.NDArray[Any]
    metadata: Mapping[str, Any]
    hardware: Hardware
    wall_time_ns: int
    hook_time_ns: int
    weight_bytes: int
    refused: str = ""


@dataclass(frozen=True, slots=True)
class Arrival:
    """A raw frame on its way to the disk, with Micro-Manager's tags as they came."""

    frame: Frame
    tags: Mapping[str, Any]
    weight_bytes: int
    """Its share of the raw queue."""


@dataclass(frozen=True, slots=True)
class Refused:
    """A frame that came through the hook but cannot be written, and why."""

    seq: int
    reason: str
    weight_bytes: int


@dataclass(frozen=True, slots=True)
class Maker:
    """Which generator made, rejected or failed on a plane, in which runtime."""

    package_hash: str
    name: str
    version: str
    runtime: str


@dataclass(frozen=True, slots=True)
class Plane:
    """A refocused plane (y, x) and how it came about.

    *done* is to be called, from any thread, when nobody looks at the pixels any more: other pixels
    may lie there then.
    """

    pixels: Pixels
    clipped: int
    done: Callable[[], None]


@dataclass(frozen=True, slots=True)
class Answer:
    """What became of the refocusing of one frame; the *plane* only with REFOCUSED.

    *maker* is None where no generator has looked at the frame.
    """

    seq: int
    outcome: RefocusOutcome
    reason: str = ""
    plane: Plane | None = None
    maker: Maker | None = None


Note = Callable[[RunWriter], object]
"""Something else for the writer's thread to put into the run: a scaling, an event."""

Item = Arrival | Refused | Answer | Note
