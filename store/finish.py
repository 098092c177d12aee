"""Finishes a sealed run: builds the pyramids that viewers want, and compresses, if asked.

A run is written for the disk's speed: whole planes, uncompressed, one resolution. Afterwards there
is time. Nothing is ever done to a run that has a writer: its lock is held meanwhile. Every plane is
held against the journal's checksum when it is read, and the run is valid and complete at every
moment, so a kill costs nothing but time; finishing again goes on where it was, and changes nothing
where all is done.

Refocus what can be refocused first (`refocus fill`): a plane that comes later makes the pyramid of
its image stale, and finishing again builds that anew.
"""

import contextlib
import shutil
from collections.abc import Callable
from pathlib import Path

import msgspec
import zarr

from refocus.errors import DiskError, RunError
from refocus.frame import RawOutcome, RefocusOutcome
from store import compress as compressing
from store import disk, levels
from store.journal import LOCK
from store.layout import array_dir, image_dir, is_run, journal_dir
from store.lock import WriterLock
from store.packing import Slot, Source
from store.planes import PlaneArray
from store.reader import Run, open_run
from store.records import Kind
from store.refused import refused

Progress = Callable[[int, int], None]
"""Called with (planes done, planes in all)."""

_FILLABLE = (RefocusOutcome.SKIPPED, RefocusOutcome.LATE, RefocusOutcome.LOST)


class FinishedImage(msgspec.Struct, frozen=True, kw_only=True):
    """What became of one image."""

    image: int
    planes: int
    levels: tuple[tuple[int, int], ...]
    """(y, x) of the pyramid's levels, without the full one; none for small planes."""
    built: bool
    """The pyramid was made now."""
    compressed: bool
    """The planes are compressed, now or since an earlier time."""
    packed: bool
    """They were compressed now."""
    plane_bytes: int
    """Of all planes, uncompressed."""
    stored_bytes: int
    """Of all planes, as they are on disk."""


class Finish(msgspec.Struct, frozen=True, kw_only=True):
    """What `finish` did."""

    images: tuple[FinishedImage, ...]
    fillable: int
    """Planes without a twin that `refocus fill` could still make."""


def finish(
    path: Path, *, compress: bool = False, progress: Progress = lambda _done, _total: None
) -> Finish:
    """Build the pyramids of the sealed run at *path*, and compress its planes where asked.

    Raises LockedError where the run has a writer, RunError where it was never sealed or a plane is
    damaged, DiskError where there is too little room.
    """
    if not is_run(path):
        raise RunError(f"{path}: not a run (it has no folder journal); give a run's folder")
    try:
        lock = WriterLock(journal_dir(path) / LOCK)
    except OSError as error:
        raise refused(path, "not finished", error) from error
    try:
        run = open_run(path)
        if run.notes.seal is None:
            raise RunError(f"{path}: never sealed; run `refocus recover` first")
        sources = _sources(run)
        tell = _teller(sources, compress, progress)
        images = tuple(
            _finish(number, source, compress, tell) for number, source in sources.items()
        )
    finally:
        lock.release()
    fillable = sum(record.outcome in _FILLABLE for record in run.records(Kind.REFOCUS))
    return Finish(images=images, fillable=fillable)


def _sources(run: Run) -> dict[int, Source]:
    """Every image that has a plane, by its number."""
    planes: dict[int, dict[Slot, int]] = {}
    for kind, outcome in (
        (Kind.RAW, RawOutcome.SAVED),
        (Kind.REFOCUS, RefocusOutcome.REFOCUSED),
    ):
        for record in run.records(kind):
            if record.outcome == outcome:
                slots = planes.setdefault(record.image, {})
                slots[record.t, record.c, record.z] = record.plane_crc32c
    return {image: _source(run, image, slots) for image, slots in sorted(planes.items())}


def _source(run: Run, image: int, slots: dict[Slot, int]) -> Source:
    folder = array_dir(run.path, image)
    try:
        array = PlaneArray.open(folder)
    except RunError as error:
        raise RunError(f"{error}; run `refocus recover`, then finish again") from error
    dtype = zarr.open_array(folder, mode="r").dtype
    return Source(folder=image_dir(run.path, image), array=array, dtype=dtype, planes=slots)


def _teller(sources: dict[int, Source], compress: bool, progress: Progress) -> Callable[[], None]:
    """Counts planes against all that there is to do."""
    total = sum(
        len(source.planes)
        * ((not levels.are_built(source)) + (compress and not compressing.is_compressed(source)))
        for source in sources.values()
    )
    done = 0

    def tell() -> None:
        nonlocal done
        done += 1
        progress(min(done, total), total)

    return tell


def _finish(number: int, source: Source, compress: bool, tell: Callable[[], None]) -> FinishedImage:
    build = not levels.are_built(source)
    pack = compress and not compressing.is_compressed(source)
    try:
        _require_room(source, build=build, pack=pack)
        if build:
            levels.build(source, tell)
        if pack:
            compressing.compress(source, tell)
    except OSError as error:
        for partial in source.folder.glob(".*.partial"):
            with contextlib.suppress(OSError):
                disk.remove_tree(partial)
        raise refused(source.folder, "not finished, the run is whole", error) from error
    compressed = bool(source.planes) and compressing.is_compressed(source)
    stored = compressing.compressed_bytes(source) if compressed else source.nbytes
    return FinishedImage(
        image=number,
        planes=len(source.planes),
        levels=tuple(levels.shapes(source)),
        built=build,
        compressed=compressed,
        packed=pack,
        plane_bytes=source.nbytes,
        stored_bytes=stored,
    )


def _require_room(source: Source, *, build: bool, pack: bool) -> None:
    """Raises DiskError where the worst case would not fit: nothing that can be compressed."""
    needed = source.nbytes if pack else source.nbytes // 3 if build else 0
    free = shutil.disk_usage(source.folder).free
    if free < needed:
        raise DiskError(
            f"{source.folder}: finishing may need {needed >> 20} MiB, {free >> 20} MiB are free; "
            "make room and finish again"
        )
