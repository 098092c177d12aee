"""The image pairs of a run as its writer had them, from what the writer left on disk.

The journal says nearly all of it: a pair's line what its planes are like, records which of its
slots are taken, frame headers the heights. After a power cut the end of the journal may be gone
while planes and records that came later are there. Then a pair is learnt from the header of one of
its frames, or from its arrays' own zarr.json. A pair of which nothing says what its planes are like
is not `known`: no plane of it can be read, and its number is kept by an image without a plane.
"""

from collections import defaultdict
from collections.abc import Iterator
from typing import NamedTuple

from refocus.errors import RunError
from refocus.frame import FrameHeader, RawOutcome
from store import metadata
from store.layout import (
    KNOWN_AXES,
    Form,
    Pair,
    Place,
    array_dir,
    channel_name,
)
from store.planes import PlaneArray
from store.reader import Run, place_of
from store.records import Kind

_NOTHING = Form((1, 1), "uint8", None)
"""What an image is like that nothing is known of."""


class Rebuilt(NamedTuple):
    """A pair, and its arrays as they should be; nothing of it need be on disk."""

    pair: Pair
    raw: PlaneArray
    refocused: PlaneArray
    known: bool
    """Whether anything says what its planes are like."""
    told: bool
    """Whether the journal's line of the pair says all of it."""

    @property
    def arrays(self) -> tuple[PlaneArray, PlaneArray]:
        """Raw and refocused."""
        return self.raw, self.refocused

    @property
    def shards(self) -> tuple[int, int] | None:
        """Planes of a shard along t and z; None: a plane is a file."""
        return (self.raw.grid.t, self.raw.grid.z) if self.raw.grid else None


_Found = tuple[PlaneArray | None, PlaneArray | None]
"""Raw and refocused array of a pair, as far as they can be read."""


class _Plane(NamedTuple):
    place: Place
    header: FrameHeader | None


def rebuild(run: Run) -> list[Rebuilt]:
    """All pairs, in order. Raises OSError."""
    planes: defaultdict[int, list[_Plane]] = defaultdict(list)
    for frame in run.frames():
        if frame.raw is not None and frame.raw.outcome == RawOutcome.SAVED and frame.place:
            planes[frame.place.pair].append(_Plane(frame.place, frame.header))
    for record in run.records(Kind.REFOCUS):  # twins whose raw plane is lost
        place = place_of(record)
        if place is not None:
            planes[place.pair].append(_Plane(place, None))
    numbers = {*planes, *run.notes.pairs, *_pairs_on_disk(run)}
    return [_rebuild(run, number, planes[number]) for number in range(max(numbers, default=-1) + 1)]


def _rebuild(run: Run, number: int, planes: list[_Plane]) -> Rebuilt:
    found = _open(run, 2 * number), _open(run, 2 * number + 1)
    line = run.notes.pairs.get(number)
    pair = _pair(run, number, found, planes)
    for plane in planes:
        pair.take(plane.place)
        if plane.header is not None:
            pair.note_height(plane.place.z, plane.header)
    pair.channel_names += _channel_names(run, pair, line.channels if line else [], planes)
    raw, refocused = (_array(run, pair, twin, found) for twin in (0, 1))
    known = raw is not None and refocused is not None
    if raw is None or refocused is None:
        raw = refocused = PlaneArray.unwritten(run.path, pair.form.shape, pair.form.dtype, None)
    extent = pair.extent
    return Rebuilt(
        pair=pair,
        raw=raw.resized(array_dir(run.path, 2 * number), *extent),
        refocused=refocused.resized(array_dir(run.path, 2 * number + 1), *extent),
        known=known,
        told=line is not None and line.channels == pair.channel_names,
    )


def _pair(run: Run, number: int, found: _Found, planes: list[_Plane]) -> Pair:
    """Which pair it is, and of what form: by its line, a frame of it, its arrays."""
    line = run.notes.pairs.get(number)
    if line is not None:
        form = Form(line.shape, line.dtype, line.pixel_um)
        return Pair(number, line.position, line.segment, line.further, form)
    header = next((plane.header for plane in planes if plane.header), None)
    if header is not None:
        pixel_um = header.pixel_um or (run.notes.info.pixel_um if run.notes.info else None)
        further = {key: value for key, value in header.axes.items() if key not in KNOWN_AXES}
        form = Form(header.shape, header.dtype, pixel_um)
        return Pair(number, header.axes.get("position"), header.segment, further, form)
    return Pair(number, None, 0, {}, _form_on_disk(run, number, found) or _NOTHING)


def _array(run: Run, pair: Pair, twin: int, found: _Found) -> PlaneArray | None:
    """What an array of the pair is: by the journal, its own zarr.json, its twin's; else None."""
    folder = array_dir(run.path, 2 * pair.number + twin)
    own, other = (
        array if array is not None and _fits(array, pair.form) else None
        for array in (found[twin], found[1 - twin])
    )
    is_foreign = own.is_foreign if own else (folder / "c").is_dir()
    line = run.notes.pairs.get(pair.number)
    if line is not None and line.shards is not None and not is_foreign:
        return PlaneArray.unwritten(folder, line.shape, line.dtype, line.shards)
    if own is not None:
        return own
    if other is not None and other.is_foreign == is_foreign:
        return other
    if is_foreign:
        raise RunError(
            f"{folder}/zarr.json cannot be read, and nothing else says how its planes are "
            "compressed; put it back from a copy"
        )
    return PlaneArray.unwritten(folder, line.shape, line.dtype, None) if line else None


def _channel_names(run: Run, pair: Pair, told: list[str], planes: list[_Plane]) -> list[str]:
    """Names of all channels: by the journal, the frames, the image itself, or their number."""
    described = metadata.describe(run.path, 2 * pair.number)
    on_disk = [channel.name for channel in described.channels] if described else []
    if on_disk[: len(told)] == told:
        told = on_disk  # it may have a channel of which every plane failed
    by_header = {plane.place.c: plane.header for plane in planes if plane.header}
    names = list(told)
    for c in range(len(names), max((slot[1] + 1 for slot in pair.taken), default=0)):
        header = by_header.get(c)
        names.append(channel_name(header) if header else f"channel {c}")
    return names


def _form_on_disk(run: Run, number: int, found: _Found) -> Form | None:
    array = next((array for array in found if array), None)
    if array is None:
        return None
    described = metadata.describe(run.path, 2 * number)
    return Form(array.shape[3:], array.dtype, described.pixel_um if described else None)


def _fits(array: PlaneArray, form: Form) -> bool:
    return (array.shape[3:], array.dtype) == (form.shape, form.dtype)


def _pairs_on_disk(run: Run) -> Iterator[int]:
    """Numbers of the pairs of which an array can be read."""
    for path in run.path.iterdir():
        if path.name.isdecimal() and _open(run, int(path.name)) is not None:
            yield int(path.name) // 2


def _open(run: Run, image: int) -> PlaneArray | None:
    try:
        return PlaneArray.open(array_dir(run.path, image))
    except RunError:
        return None
