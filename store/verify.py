"""Reads acknowledged planes back and holds each against the checksum in its record.

Shard after shard, slot after slot, into one piece of memory: the disk reads in order, and the next
plane is asked for while the checksum of this one is computed.
"""

import contextlib
import errno
import os
from collections import defaultdict
from collections.abc import Callable, Iterable, Iterator
from io import FileIO
from typing import NamedTuple

import numpy as np
import numpy.typing as npt

from refocus.errors import RunError
from refocus.frame import RawOutcome, RefocusOutcome
from refocus.words import TOLD, counted, frames
from store.grid import Grid
from store.planes import PlaneArray
from store.reader import Run
from store.records import Kind, Record, crc32c

Progress = Callable[[int, int], None]
"""Called with (planes read, planes to read)."""

GONE = "is not there any more"
DAMAGED = "does not fit its checksum; its pixels are damaged"
OUTSIDE = "lies outside its array's shape, where no other program sees it"
UNREADABLE = "cannot be read"


class LostPlane(NamedTuple):
    """A plane that was acknowledged and cannot be had any more."""

    record: Record
    reason: str
    """One of the above."""
    detail: str = ""

    def __str__(self) -> str:
        r, detail = self.record, f" ({self.detail})" if self.detail else ""
        return f"frame {r.seq}: plane {r.image}/t{r.t}/c{r.c}/z{r.z} {self.reason}{detail}"


def told(lost: Iterable[LostPlane]) -> Iterator[str]:
    """What became of these planes: one by one where they are few, alike ones in one line.

    What one damaged file costs is alike, be it ten thousand planes.
    """
    alike: defaultdict[tuple[int, str, str], list[LostPlane]] = defaultdict(list)
    for plane in lost:
        alike[plane.record.image, plane.reason, plane.detail].append(plane)
    for (image, reason, detail), planes in alike.items():
        if len(planes) <= (1 if detail else TOLD):
            yield from map(str, planes)
            continue
        seqs = frames([plane.record.seq for plane in planes])
        why = f" ({detail})" if detail else ""
        yield f"image {image}: each of {counted(len(planes), 'plane')} {reason}{why}: {seqs}"


def acknowledged(run: Run) -> list[Record]:
    """The records of all planes that should be there, raw and refocused."""
    wanted = ((Kind.RAW, RawOutcome.SAVED), (Kind.REFOCUS, RefocusOutcome.REFOCUSED))
    return [
        record
        for kind, outcome in wanted
        for record in run.records(kind)
        if record.outcome == outcome
    ]


def lost_planes(
    run: Run,
    *,
    trust_durable: bool = False,
    progress: Progress = lambda _done, _total: None,
) -> Iterator[LostPlane]:
    """Read every acknowledged plane; yields those that are not what was acknowledged.

    *trust_durable*: of planes that survive a power cut only see whether their file is long enough.
    Raises OSError where it is not the disk that fails (no right to read, no descriptor left).
    """
    records = sorted(acknowledged(run), key=lambda r: (r.image, r.c, r.t, r.z))
    reader = _SlotReader()
    try:
        for done, record in enumerate(records, start=1):
            trusted = trust_durable and run.is_durable(record)
            try:
                reason, detail = _fault(run, record, reader, trusted=trusted), ""
            except (RunError, OSError) as error:
                if isinstance(error, OSError) and error.errno != errno.EIO:
                    raise
                reason, detail = UNREADABLE, str(error)
            if reason:
                yield LostPlane(record, reason, detail)
            progress(done, len(records))
    finally:
        reader.close()


def _fault(run: Run, record: Record, reader: "_SlotReader", *, trusted: bool) -> str:
    """What is wrong with a plane; empty where nothing is."""
    array = run.array(record.image)
    if not array.holds(record.t, record.c, record.z):
        return OUTSIDE
    if array.grid is None:
        return "" if trusted else _fault_by_zarr(array, record)
    reader.open(array, record)
    slot = array.grid.slot(record.t, record.z)
    if trusted:
        return "" if reader.reaches(array.grid, slot) else GONE
    found = reader.crc32c(array.grid, slot)
    if found is None:
        return GONE
    return "" if found == record.plane_crc32c else DAMAGED


def _fault_by_zarr(array: PlaneArray, record: Record) -> str:
    plane = array.read(record.t, record.c, record.z)
    if plane is None:
        return GONE
    return "" if crc32c(np.ascontiguousarray(plane)) == record.plane_crc32c else DAMAGED


class _SlotReader:
    """Reads slots of one shard after the other."""

    def __init__(self) -> None:
        self._shard: tuple[int, ...] = ()
        self._file: FileIO | None = None
        self._nbytes = 0
        self._memory: npt.NDArray[np.uint8] = np.empty(0, np.uint8)

    def open(self, array: PlaneArray, record: Record) -> None:
        """Go to the shard in which a plane should be. Raises OSError."""
        assert array.grid is not None
        shard = record.image, *array.grid.shard(record.t, record.c, record.z)
        if shard == self._shard:
            return
        self.close()
        with contextlib.suppress(FileNotFoundError):
            path = array.shard_file(record.t, record.c, record.z)
            self._file = path.open("rb", buffering=0)
            self._nbytes = os.fstat(self._file.fileno()).st_size
        self._shard = shard

    def reaches(self, grid: Grid, slot: int) -> bool:
        """Whether the shard's file holds the whole slot."""
        return slot * grid.stride + grid.plane_bytes <= self._nbytes

    def crc32c(self, grid: Grid, slot: int) -> int | None:
        """Checksum of the plane in a slot; None where the file ends before. Raises OSError."""
        if not self.reaches(grid, slot):
            return None
        assert self._file is not None
        if self._memory.size != grid.plane_bytes:
            self._memory = np.empty(grid.plane_bytes, np.uint8)
        if hasattr(os, "posix_fadvise"):
            behind = (slot + 1) * grid.stride
            os.posix_fadvise(self._file.fileno(), behind, grid.stride, os.POSIX_FADV_WILLNEED)
        self._file.seek(slot * grid.stride)
        done = 0
        while done < grid.plane_bytes:
            count = self._file.readinto(self._memory.data[done:])
            if not count:
                return None
            done += count
        return crc32c(self._memory)

    def close(self) -> None:
        """Close the file that is open."""
        if self._file is not None:
            self._file.close()
        self._shard, self._file, self._nbytes = (), None, 0
