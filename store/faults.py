"""What of a run's files is not as its journal says: shard indices, metadata, leftovers.

Read-only. The journal alone decides what a shard's index should list, how long an array is and
which images there are, so `refocus check` can tell and `refocus recover` can mend it, and mending
twice is mending once.

No pixel is ever a leftover: a shard of which no record speaks is one only where nothing was ever
written to it, which is what a writer makes ahead. What is damaged, or was never acknowledged, may
still tell somebody something; it is out of the index, and that is enough.
"""

import contextlib
import errno
import os
from collections import defaultdict
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import NamedTuple

import numpy as np

from refocus.errors import RunError
from refocus.frame import Pixels, RawOutcome
from refocus.words import counted
from store import levels, metadata, ome
from store.grid import Grid, read_index, slots_of
from store.layout import image_dir
from store.metadata import PairImages
from store.reader import Run, place_of
from store.rebuild import Rebuilt
from store.records import Record
from store.verify import acknowledged

_CHUNK_BYTES = 8 << 20


class IndexFault(NamedTuple):
    """A shard whose index does not list the planes that were acknowledged."""

    path: Path
    grid: Grid
    slots: frozenset[int]
    """What it should list."""
    hidden: int
    """Acknowledged planes that it does not list, so other programs see them black."""
    unknown: int
    """Planes that it lists and must not: nobody acknowledged them, or they are lost."""

    def __str__(self) -> str:
        parts = [
            f"{counted(self.hidden, 'acknowledged plane')} hidden" if self.hidden else "",
            f"{counted(self.unknown, 'plane')} listed that must not be" if self.unknown else "",
        ]
        return ", ".join(filter(None, parts)) or "its index is damaged"


class Faults(NamedTuple):
    """All that differs."""

    indices: list[IndexFault]
    metadata: list[tuple[Path, bytes]]
    """Files that are missing or say something else, and what they should hold, in the order in
    which to write them."""
    strays: list[Path]
    """Planes with a file of their own that nobody acknowledged, or that are lost."""
    leftovers: list[Path]
    """Files and folders that nothing needs."""
    levels: list[Path]
    """Folders of images whose group lists levels of a pyramid that are not there."""


def find_faults(run: Run, pairs: Sequence[Rebuilt]) -> Faults:
    """Everything of a run that no writer has that is not as its journal says. Raises OSError."""
    slots = slots_by_shard(acknowledged(run), pairs)
    files = _shard_files(pairs)
    blank = [path for path, grid in files if path not in slots and _is_blank(path, grid)]
    shown = [_shown(run, rebuilt) for rebuilt in pairs]
    # A hidden folder is what `refocus finish` goes on with.
    leftovers = [path for path in run.path.rglob(".*.partial") if path.is_file()]
    leftovers += [*blank, *_unused_images(run, len(pairs))]
    images = [image_dir(run.path, image) for image in range(2 * len(pairs))]
    return Faults(
        indices=[*_index_faults(files, slots, blank)],
        metadata=[*metadata.differing(run.path, shown)],
        strays=_strays(run, pairs),
        leftovers=sorted(leftovers, reverse=True),  # what is in a folder before the folder
        levels=[*filter(levels.are_missing, images)],
    )


def slots_by_shard(records: Iterable[Record], pairs: Sequence[Rebuilt]) -> dict[Path, set[int]]:
    """The slots of which *records* speak, by the file of their shard; planes in shards only."""
    slots: defaultdict[tuple[int, int, int, int], set[int]] = defaultdict(set)
    for record in records:
        if record.image < 2 * len(pairs):
            grid = pairs[record.image // 2].arrays[record.image % 2].grid
            if grid is not None:
                shard = record.image, *grid.shard(record.t, record.c, record.z)
                slots[shard].add(grid.slot(record.t, record.z))
    return {
        pairs[image // 2].arrays[image % 2].shard_path(t, c, z): members
        for (image, t, c, z), members in slots.items()
    }


def _shard_files(pairs: Sequence[Rebuilt]) -> list[tuple[Path, Grid]]:
    """Every shard on disk, in no order."""
    arrays = [array for rebuilt in pairs for array in rebuilt.arrays]
    return [(path, array.grid) for array in arrays if array.grid for path in array.shard_files()]


def _is_blank(path: Path, grid: Grid) -> bool:
    """Whether a shard has no byte but zeros where planes go."""
    with path.open("rb", buffering=0) as file:
        if hasattr(os, "SEEK_DATA"):  # it is a hole of half a gigabyte
            try:
                file.seek(0, os.SEEK_DATA)
            except OSError as error:
                return error.errno == errno.ENXIO
        while file.tell() < grid.index_offset:
            if file.read(min(_CHUNK_BYTES, grid.index_offset - file.tell())).strip(b"\0"):
                return False
            if file.tell() >= os.fstat(file.fileno()).st_size:
                break
    return True


def _index_faults(
    files: Sequence[tuple[Path, Grid]], slots: dict[Path, set[int]], blank: Sequence[Path]
) -> Iterator[IndexFault]:
    for path, grid in sorted(files, key=lambda one: one[0]):
        if path in blank:
            continue
        wanted = slots.get(path, set())
        index = None
        with contextlib.suppress(OSError):
            index = read_index(path, grid)
        if index is None:  # other programs take for an index what is none
            yield IndexFault(path, grid, frozenset(wanted), len(wanted), 0)
        elif not np.array_equal(index, grid.index_of(wanted)):
            found = slots_of(index)
            hidden, unknown = len(wanted - found), len(found - wanted)
            yield IndexFault(path, grid, frozenset(wanted), hidden, unknown)


def _strays(run: Run, pairs: Sequence[Rebuilt]) -> list[Path]:
    """In arrays without shards every file is a plane that other programs see."""
    arrays = [array for rebuilt in pairs for array in rebuilt.arrays]
    flat = [array.grid is None and not array.is_foreign for array in arrays]
    files = {
        path
        for array, is_flat in zip(arrays, flat, strict=True)
        if is_flat
        for path in array.shard_files()
    }
    if files:
        for record in acknowledged(run):
            files.discard(arrays[record.image].shard_path(record.t, record.c, record.z))
    return sorted(files)


def _unused_images(run: Run, pairs: int) -> Iterator[Path]:
    """The next pair, where it was begun and never listed; without a pair, the lists of images."""
    for image in (2 * pairs, 2 * pairs + 1):
        path = image_dir(run.path, image)
        if path.is_dir() and all(_is_ours(inner) for inner in path.rglob("*")):
            yield path
    if not pairs:
        yield from (run.path / name for name in ("OME", "zarr.json") if (run.path / name).exists())


def _is_ours(path: Path) -> bool:
    """Whether it is what a writer makes of an image before its first plane."""
    return path.name in ("0", "zarr.json") or path.name.endswith(".partial")


def _shown(run: Run, rebuilt: Rebuilt) -> PairImages:
    """A pair with its channels and z step as its images should say them."""
    pair = rebuilt.pair
    described = next(
        (d for twin in (0, 1) if (d := metadata.describe(run.path, 2 * pair.number + twin))), None
    )
    channels: list[ome.Channel] = []
    for c, name in enumerate(pair.channel_names):
        known = described.channels[c : c + 1] if described else ()
        channels += known if known and known[0].name == name else [_channel(run, rebuilt, c, name)]
    # While it is written an image's z step is that of its first planes; its seal comes after the
    # final one.
    sealed = run.notes.seal is not None and described is not None
    z_step_um = described.z_step_um if sealed and described else pair.z_step_um
    return PairImages(pair, rebuilt.raw, rebuilt.refocused, tuple(channels), z_step_um)


def _channel(run: Run, rebuilt: Rebuilt, c: int, name: str) -> ome.Channel:
    """How a channel is shown, from its first plane."""
    first: Pixels = np.zeros((1, 1), rebuilt.pair.form.dtype)
    bit_depth = None
    for frame in run.frames():
        record = frame.raw
        if record is None or record.outcome != RawOutcome.SAVED:
            continue
        place = place_of(record)
        if place is not None and (place.pair, place.c) == (rebuilt.pair.number, c):
            bit_depth = frame.header.bit_depth if frame.header else None
            first = _plane(run, record.seq, first)
            break
    return ome.channel(name, first, bit_depth)


def _plane(run: Run, seq: int, otherwise: Pixels) -> Pixels:
    try:
        plane = run.raw(seq)
    except (RunError, OSError):
        return otherwise
    return otherwise if plane is None else plane
