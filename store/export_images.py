"""What a run has to export: its images with all that other programs can be told about them.

Everything comes from the journal and the planes. Formats that know only whole stacks get every
plane of a stack; where the run has none, or one that is damaged, zeros stand in, and the plane is
listed as absent or damaged in the export's own metadata and in the command's answer.
"""

from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Literal, NamedTuple

import numpy as np

from refocus.errors import RunError
from refocus.frame import Pixels, RawOutcome, RefocusOutcome
from store import ome
from store.journal import GeneratorLine, PairLine
from store.layout import Form, Pair
from store.reader import FrameEntry, Run, place_of
from store.records import Kind

What = Literal["raw", "refocused"]
Slot = tuple[int, int, int]
"""Indices (t, c, z)."""

_EVEN = 0.1
"""Largest deviation from an even time lapse, in steps."""


class PlaneFacts(NamedTuple):
    """One frame, as far as an export tells of it."""

    seq: int
    wall_ns: int = 0
    exposure_ms: float | None = None
    x_um: float | None = None
    y_um: float | None = None
    z_um: float | None = None
    bit_depth: int | None = None


@dataclass
class ExportImage:
    """One image: raw or refocused planes of a pair."""

    run: Run
    what: What
    pair: PairLine
    shape: tuple[int, int, int, int, int]
    """(t, c, z, y, x), the same for raw and refocused."""
    channels: tuple[ome.Channel, ...]
    z_step_um: float | None
    time_step_s: float | None
    """None where times are not even, or unknown."""
    begun_ns: int
    """Wall time of the first frame, since 1970; 0 where unknown."""
    frames: dict[Slot, PlaneFacts]
    """Every frame of the pair of which a plane was saved, raw or refocused."""
    present: set[Slot]
    """Slots with a plane of this image, by the journal."""
    damaged: dict[Slot, str] = field(default_factory=dict)
    """Slots whose plane could not be read, with the reason; grows while planes are read."""

    @property
    def number(self) -> int:
        """Of the run's image."""
        return 2 * self.pair.pair + (self.what == "refocused")

    @property
    def name(self) -> str:
        """For people: run, pair, and what it is."""
        parts = [self.run.path.resolve().name, self.pair.name, self.what]
        computed = " (computed)" if self.what == "refocused" else ""
        return " ".join(part for part in parts if part) + computed

    @property
    def slots(self) -> list[Slot]:
        """Every slot in the order of the export: z first, then c, then t."""
        t, c, z = self.shape[:3]
        return [(i, j, k) for i in range(t) for j in range(c) for k in range(z)]

    @property
    def absent(self) -> list[Slot]:
        """Slots without a plane, in order."""
        return [slot for slot in self.slots if slot not in self.present]

    @property
    def dtype(self) -> np.dtype[np.generic]:
        """Of the planes, little endian."""
        return np.dtype(self.pair.dtype).newbyteorder("<")

    @property
    def plane_bytes(self) -> int:
        """Of one plane, uncompressed."""
        return self.shape[3] * self.shape[4] * self.dtype.itemsize

    @property
    def scale(self) -> list[float]:
        """Steps along (t, c, z, y, x) in s and um, 1 where unknown."""
        pixel = self.pair.pixel_um or 1.0
        return [self.time_step_s or 1.0, 1.0, self.z_step_um or 1.0, pixel, pixel]

    @property
    def generators(self) -> list[GeneratorLine]:
        """Those that made a plane of a refocused image, in the order of their numbers."""
        known = self.run.notes.generators
        used = {
            record.generator
            for record in self.run.records(Kind.REFOCUS)
            if record.outcome == RefocusOutcome.REFOCUSED and record.image // 2 == self.pair.pair
        }
        return [known[number] for number in sorted(used & known.keys())]

    def read(self, slot: Slot) -> Pixels | None:
        """The plane (y, x); None where it is absent, or damaged, which is noted."""
        if slot not in self.present:
            return None
        read = self.run.raw if self.what == "raw" else self.run.refocused
        try:
            return read(self.frames[slot].seq)
        except (RunError, OSError) as error:
            self.damaged[slot] = str(error)
            return None


def images(run: Run, what: tuple[What, ...]) -> list[ExportImage]:
    """The images of *run* that have a plane, pair by pair, raw before refocused.

    Raises RunError where the journal does not say what the planes of a pair are like.
    """
    pairs: dict[int, _Planes] = {}
    for frame in run.frames():
        raw = frame.raw if frame.raw and frame.raw.outcome == RawOutcome.SAVED else None
        twin = frame.refocus
        if twin is not None and twin.outcome != RefocusOutcome.REFOCUSED:
            twin = None
        record = raw or twin
        place = place_of(record) if record else None
        if place is None:
            continue
        planes = pairs.setdefault(place.pair, _Planes())
        slot = place.t, place.c, place.z
        planes.frames[slot] = _facts(frame)
        if raw:
            planes.raw.add(slot)
        if twin:
            planes.refocused.add(slot)
    return [
        image
        for number, planes in sorted(pairs.items())
        for image in _images(run, number, planes)
        if image.what in what and image.present
    ]


@dataclass
class _Planes:
    """What is there of a pair."""

    frames: dict[Slot, PlaneFacts] = field(default_factory=dict)
    raw: set[Slot] = field(default_factory=set)
    refocused: set[Slot] = field(default_factory=set)


def _facts(frame: FrameEntry) -> PlaneFacts:
    header = frame.header
    if header is None:
        return PlaneFacts(frame.seq)
    return PlaneFacts(
        seq=frame.seq,
        wall_ns=header.wall_time_ns,
        exposure_ms=header.exposure_ms,
        x_um=header.x_um,
        y_um=header.y_um,
        z_um=header.z_um,
        bit_depth=header.bit_depth,
    )


def _images(run: Run, number: int, planes: _Planes) -> Iterator[ExportImage]:
    """Raw and refocused image of a pair."""
    frames = planes.frames
    t, c, z = (max(slot[axis] for slot in frames) + 1 for axis in range(3))
    pair = run.notes.pairs.get(number)
    if pair is None or len(pair.channels) < c:
        raise RunError(
            f"{run.path}: the journal lacks the line of image pair {number}; "
            "run `refocus recover`, then export again"
        )
    channels = tuple(_channels(run, pair, planes))
    whats: tuple[tuple[What, set[Slot]], ...] = (
        ("raw", planes.raw),
        ("refocused", planes.refocused),
    )
    for what, present in whats:
        yield ExportImage(
            run=run,
            what=what,
            pair=pair,
            shape=(t, len(channels), z, *pair.shape),
            channels=channels,
            z_step_um=_z_step_um(pair, frames),
            time_step_s=_time_step_s(frames),
            begun_ns=min((one.wall_ns for one in frames.values() if one.wall_ns), default=0),
            frames=frames,
            present=present,
        )


def _channels(run: Run, pair: PairLine, planes: _Planes) -> Iterator[ome.Channel]:
    """As the run's own metadata have them: colour by name, window of the first readable plane."""
    for index, name in enumerate(pair.channels):
        sample: Pixels = np.zeros((1, 1), pair.dtype)
        bit_depth = None
        for slot in sorted(slot for slot in planes.raw if slot[1] == index):
            try:
                plane = run.raw(planes.frames[slot].seq)
            except (RunError, OSError):  # it is said when its turn to be exported comes
                continue
            if plane is not None:
                sample, bit_depth = plane, planes.frames[slot].bit_depth
                break
        yield ome.channel(name, sample, bit_depth)


def _z_step_um(pair: PairLine, frames: dict[Slot, PlaneFacts]) -> float | None:
    form = Form(pair.shape, pair.dtype, pair.pixel_um)
    stack = Pair(pair.pair, pair.position, pair.segment, pair.further, form)
    for (_, _, z), facts in frames.items():
        if facts.z_um is not None:
            stack.z_um.setdefault(z, facts.z_um)
    return stack.z_step_um


def _time_step_s(frames: dict[Slot, PlaneFacts]) -> float | None:
    """Mean step of the first frames of the time points, where every one is near its time."""
    first: dict[int, int] = {}
    for (t, _, _), facts in frames.items():
        if facts.wall_ns:
            first[t] = min(facts.wall_ns, first.get(t, facts.wall_ns))
    if len(first) < 2:
        return None
    (begin, begin_ns), (end, end_ns) = min(first.items()), max(first.items())
    step_ns = (end_ns - begin_ns) / (end - begin)
    off = max(abs(ns - begin_ns - step_ns * (t - begin)) for t, ns in first.items())
    return step_ns / 1e9 if step_ns > 0 and off <= _EVEN * step_ns else None
