"""What lies where in a run, and which frame belongs in which slot.

    RUN/           OME-Zarr 0.5 root (bioformats2raw.layout 3), once a frame is there
        zarr.json
        OME/       zarr.json (series), METADATA.ome.xml
        0/  1/     image pair 0: raw and refocused; "0" in each is the array (t, c, z, y, x)
        2/  3/     image pair 1 ...
        journal/   outcomes.bin, frames.jsonl, run.jsonl, writer.lock  (store/journal.py)

Pair k is the k-th (position, segment, further axes) in order of appearance. *Further axes* are all
keys beside time, channel, z and position: an axis nobody here has heard of opens a pair, never a
refusal. Within one (position, further axes) a pair is one *segment*: frames of another shape, dtype
or pixel size go to a segment of their own, and so does a frame whose slot is already taken, so that
an acknowledged plane is never written again. Alternating shapes (two cameras) do not open a segment
each time: a frame goes to the latest segment of its own form.

Axis values become indices so that Micro-Manager's own numbers survive where they can:

- a whole number is its own index (where the first value is negative or above MAX_GAP, it is the
  origin), unless it lies before the origin, or more than MAX_GAP beyond the end, or its index is
  taken;
- those, and names, take the next free index in order of appearance.

So z = -3..3 becomes 0..6, time = 0, 1, 2, 4 leaves 3 absent, and a stack taken centre-out is stored
in the order taken. Channels are names, in order of appearance. The frame's own axes stand in
frames.jsonl and its indices in outcomes.bin: nobody has to invert these rules.
"""

import math
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import msgspec

from refocus.frame import FrameHeader

MAX_GAP = 256
"""A jump of an axis beyond this is a label (a timestamp, a well number), not a distance."""
KNOWN_AXES = ("time", "channel", "z", "position")

AxisValue = int | str


def journal_dir(run: Path) -> Path:
    """Folder of the journal."""
    return run / "journal"


def is_run(path: Path) -> bool:
    """Whether *path* is a run's folder, whatever state the run is in."""
    return journal_dir(path).is_dir()


def image_dir(run: Path, image: int) -> Path:
    """OME-Zarr image group number *image*."""
    return run / str(image)


def array_dir(run: Path, image: int) -> Path:
    """The one array (full resolution) of image number *image*."""
    return image_dir(run, image) / "0"


class RunInfo(msgspec.Struct, frozen=True, kw_only=True):
    """What is known of a run before its first frame; the first line of run.jsonl."""

    run_id: str
    created_wall_ns: int
    version: str
    """Of Refocus."""
    settings: dict[str, Any] = {}
    pixel_um: float | None = None
    """Side of a camera pixel in the sample, for frames that do not bring their own."""
    microscope: dict[str, Any] = {}


class Place(msgspec.Struct, frozen=True):
    """Slot of a plane: image pair and indices along t, c, z."""

    pair: int
    t: int
    c: int
    z: int

    @property
    def raw_image(self) -> int:
        """Number of the raw image group."""
        return 2 * self.pair

    @property
    def refocused_image(self) -> int:
        """Number of the refocused image group."""
        return 2 * self.pair + 1


class Form(msgspec.Struct, frozen=True):
    """What all planes of a segment have in common."""

    shape: tuple[int, int]
    dtype: str
    pixel_um: float | None


class AxisIndex:
    """Values of one axis (time or z) to indices; the rules are in the module's docstring."""

    def __init__(self) -> None:
        self._index: dict[AxisValue, int] = {}
        self._taken: set[int] = set()
        self._origin = 0
        self.length = 0

    def of(self, value: AxisValue) -> int:
        """Index of *value*; the same value always has the same index."""
        if value not in self._index:
            index = self._natural(value)
            self._index[value] = index
            self._taken.add(index)
            self.length = max(self.length, index + 1)
        return self._index[value]

    def _natural(self, value: AxisValue) -> int:
        if not isinstance(value, int):
            return self.length
        if not self._index:
            self._origin = 0 if 0 <= value <= MAX_GAP else value
        index = value - self._origin
        if 0 <= index <= self.length + MAX_GAP and index not in self._taken:
            return index
        return self.length


@dataclass
class Pair:
    """A raw image and its refocused twin while they are written."""

    number: int
    position: AxisValue | None
    segment: int
    further: dict[str, AxisValue]
    form: Form
    channels: dict[tuple[AxisValue, str], int] = field(default_factory=dict)
    channel_names: list[str] = field(default_factory=list)
    times: AxisIndex = field(default_factory=AxisIndex)
    heights: AxisIndex = field(default_factory=AxisIndex)
    z_um: dict[int, float] = field(default_factory=dict)
    taken: set[tuple[int, int, int]] = field(default_factory=set)

    @property
    def name(self) -> str:
        """Position, further axes and segment, for people; empty where there is nothing to say."""
        parts = [] if self.position is None else [str(self.position)]
        parts += [f"{key}={value}" for key, value in self.further.items()]
        if self.segment:
            parts.append(f"segment {self.segment}")
        return ", ".join(parts)

    def slot(self, header: FrameHeader) -> Place:
        """Indices of the frame in this pair; a value or channel seen first gets its index here."""
        axes = header.axes
        key = (axes.get("channel", ""), header.channel)
        if key not in self.channels:
            self.channels[key] = len(self.channels)
            self.channel_names.append(channel_name(header))
        z = self.heights.of(axes.get("z", 0))
        self.note_height(z, header)
        return Place(
            pair=self.number,
            t=self.times.of(axes.get("time", 0)),
            c=self.channels[key],
            z=z,
        )

    def note_height(self, z: int, header: FrameHeader) -> None:
        """Take over where index *z* lies, where that is not known yet."""
        if header.z_um is not None and math.isfinite(header.z_um):
            self.z_um.setdefault(z, header.z_um)

    def take(self, place: Place) -> None:
        """Mark the slot as that of a plane on its way, or acknowledged."""
        self.taken.add((place.t, place.c, place.z))

    def leave(self, place: Place) -> None:
        """Free the slot again: its plane could not be written."""
        self.taken.discard((place.t, place.c, place.z))

    @property
    def extent(self) -> tuple[int, int, int]:
        """(t, c, z) that holds every plane; at least (1, 1, 1)."""
        t = max((slot[0] for slot in self.taken), default=0)
        z = max((slot[2] for slot in self.taken), default=0)
        return t + 1, max(1, len(self.channel_names)), z + 1

    @property
    def z_step_um(self) -> float | None:
        """Distance of neighbouring planes; None while unknown, or where the planes are not even."""
        known = sorted(self.z_um.items())
        if len(known) < 2:
            return None
        (first, bottom), (last, top) = known[0], known[-1]
        step = (top - bottom) / (last - first)
        uneven = max(abs(z - bottom - step * (index - first)) for index, z in known)
        if step == 0 or uneven > 0.25 * abs(
            step
        ):  # a stage reads back a few percent beside its goal
            return None
        return round(abs(step), 6)


def channel_name(header: FrameHeader) -> str:
    """What a frame's channel is called."""
    return header.channel or str(header.axes.get("channel", ""))


class Placer:
    """Gives every frame its pair and slot."""

    def __init__(self, pixel_um: float | None) -> None:
        self._pixel_um = pixel_um
        self._segments: dict[tuple[Any, ...], list[Pair]] = {}
        self.pairs: list[Pair] = []

    def place(self, header: FrameHeader) -> tuple[Pair, Place]:
        """Pair and free slot for a frame; `Pair.take` takes the slot, after the write."""
        further = {key: value for key, value in header.axes.items() if key not in KNOWN_AXES}
        position = header.axes.get("position")
        form = Form(header.shape, header.dtype, header.pixel_um or self._pixel_um)
        segments = self._segments.setdefault(_location(position, further), [])
        for pair in reversed(segments):
            if pair.form == form:
                place = pair.slot(header)
                if (place.t, place.c, place.z) not in pair.taken:
                    return pair, place
                break
        pair = Pair(len(self.pairs), position, len(segments), further, form)
        segments.append(pair)
        self.pairs.append(pair)
        return pair, pair.slot(header)


def _location(position: AxisValue | None, further: Mapping[str, AxisValue]) -> tuple[Any, ...]:
    return (position, *sorted(further.items()))
