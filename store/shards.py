"""Shards: files of many planes, each plane at a place of its own from the first write on.

A shard holds the planes of a stretch of t and z, and of one channel:

    slot 0 | slot 1 | ... | slot n-1 | index

A slot is a plane's bytes, uncompressed, rounded up to whole pages; slots are numbered with z the
faster. The file is sparse: a slot never written takes no room. The index at the end is the one of
Zarr's sharding codec: (offset, length) a slot, all ones where there is no plane, then its crc32c.
It is rewritten after every plane, so any Zarr library reads the shard at any moment, planes may
come in any order, and neither a plane nor a kill ever touches another plane.

An index fits into one page, hence MAX_SLOTS (store/grid.py): a kill finds it whole, old or new. A
reader of another process may still see it half-written; its checksum says so, and it reads again.

A shard that exists is never begun anew: its index is read back first. One without a whole index has
no plane (the index is written before the first one), or is damaged, and then `refocus recover`
rebuilds it from the journal.
"""

import contextlib
import errno
from collections import OrderedDict
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

import numpy as np
import numpy.typing as npt

from refocus.frame import Pixels
from store import disk
from store.grid import ABSENT, Grid, decode, encode

DIRECT_FROM_BYTES = 1 << 20
"""Smaller planes gain nothing from passing by the page cache."""
MAX_OPEN = 128
"""Shards held open for writing, the latest ones: two descriptors each, of the usual 1024."""


class Staged(NamedTuple):
    """A plane ready to be written."""

    pixels: Pixels
    """(y, x), as it will lie on disk."""
    pages: npt.NDArray[np.uint8]
    """Its bytes; for a direct write in whole pages, zeros behind the plane."""
    memory: npt.NDArray[np.uint8] | None = None
    """What it was copied into, to be given back once it is written."""


class _Shard:
    """One shard open for writing."""

    def __init__(self, path: Path, grid: Grid, *, direct: bool) -> None:
        self._grid = grid
        if not path.exists():  # seen without its index, it would be refused by every reader
            disk.replace_file(path, encode(grid.empty_index()), offset=grid.index_offset)
        self._file = disk.open_existing(path)
        self._direct: int | None = None
        try:
            index = decode(disk.read_at(self._file, grid.file_bytes, grid.index_offset), grid, path)
            if index is None:
                index = grid.empty_index()
                disk.write_at(self._file, encode(index), grid.index_offset)
            self._index = index
            if direct:
                self._direct = disk.open_existing(path, direct=True)
        except OSError:
            self.close()
            raise

    def put(self, slot: int, staged: "Staged") -> None:
        """Write a plane, then list it."""
        if self._direct is None:
            disk.write_at(
                self._file, staged.pages[: self._grid.plane_bytes].data, self._offset(slot)
            )
        else:
            disk.write_at(self._direct, staged.pages.data, self._offset(slot))
        self._list(slot, self._offset(slot), self._grid.plane_bytes)

    def unlist(self, slot: int) -> None:
        """Take a plane out of the index. Raises OSError."""
        self._list(slot, ABSENT, ABSENT)

    def _list(self, slot: int, offset: int, nbytes: int) -> None:
        index = self._index.copy()
        index[slot] = offset, nbytes
        try:
            disk.write_at(self._file, encode(index), self._grid.index_offset)
        except OSError:
            with contextlib.suppress(OSError):  # half an index would hide the other planes
                disk.write_at(self._file, encode(self._index), self._grid.index_offset)
            raise
        self._index = index

    def _offset(self, slot: int) -> int:
        return slot * self._grid.stride

    def close(self) -> None:
        try:
            disk.close(self._file)
        finally:
            if self._direct is not None:
                disk.close(self._direct)


class Shards:
    """All shards of a run open for writing. One thread stages, one at a time does the rest.

    *on_change(path)* hears of every file and folder that is not durable as it is now. *on_error*
    hears that a file could not be closed: a network share may say only then that it has lost what
    was written, of planes acknowledged long ago.
    """

    def __init__(
        self,
        folder: Path,
        on_change: Callable[[Path], None] = lambda path: None,
        on_error: Callable[[OSError], None] = lambda error: None,
    ) -> None:
        """*folder*, on the same file system, is where it is tried out what that can do."""
        self.changed = on_change
        self._on_error = on_error
        self.sparse = disk.has_sparse_files(folder)
        """Without sparse files a shard takes all its room at once: better none."""
        self._direct = disk.takes_direct_writes(folder)
        self._open: OrderedDict[Path, _Shard] = OrderedDict()
        self._free: list[npt.NDArray[np.uint8]] = []  # memory for copies

    def stage(self, pixels: Pixels, grid: Grid) -> Staged:
        """Make a plane (y, x) ready to be written; a copy only where it must be one.

        A copy is good until `give_back`.
        """
        plane = pixels.reshape(-1).view(np.uint8)
        if disk.is_aligned(plane) or not self._goes_direct(grid):
            return Staged(pixels, plane)
        memory = self._free.pop() if self._free else plane[:0]
        if memory.size < grid.stride:
            memory = disk.aligned_memory(grid.stride)
        memory[: plane.size] = plane
        memory[plane.size : grid.stride] = 0
        copy = memory[: plane.size].view(pixels.dtype).reshape(grid.shape)
        return Staged(copy, memory[: grid.stride], memory)

    def give_back(self, staged: Staged) -> None:
        """Any thread. The plane is written, or never will be: its memory is for the next one."""
        if staged.memory is not None:
            self._free.append(staged.memory)

    def put(self, path: Path, grid: Grid, slot: int, staged: Staged) -> None:
        """Write a plane into its slot. Raises OSError."""
        try:
            self._shard(path, grid).put(slot, staged)
        except OSError as error:
            if error.errno != errno.EINVAL or not self._direct:
                raise
            self._direct = False  # direct writes work in one place and not in another
            self.close()
            self._shard(path, grid).put(slot, staged)
        self.changed(path)

    def unlist(self, path: Path, grid: Grid, slot: int) -> None:
        """Take a plane out of its shard's index: nobody sees it any more. Raises OSError."""
        self._shard(path, grid).unlist(slot)
        self.changed(path)

    def prepare(self, path: Path, grid: Grid) -> None:
        """Make a shard before its first plane comes. Raises OSError."""
        self._shard(path, grid)

    def remove(self, path: Path) -> None:
        """Remove a shard. Raises OSError."""
        if path in self._open:
            self._put_away(self._open.pop(path))
        disk.remove(path)
        self.changed(path.parent)

    def close(self) -> None:
        """Close all files. A later `put` opens its own again."""
        while self._open:
            self._put_away(self._open.popitem()[1])

    def _shard(self, path: Path, grid: Grid) -> _Shard:
        shard = self._open.get(path)
        if shard is None:
            shard = self._open[path] = _Shard(path, grid, direct=self._goes_direct(grid))
            self.changed(path.parent)
            if len(self._open) > MAX_OPEN:
                self._put_away(self._open.popitem(last=False)[1])
        self._open.move_to_end(path)
        return shard

    def _put_away(self, shard: _Shard) -> None:
        try:
            shard.close()
        except OSError as error:
            self._on_error(error)

    def _goes_direct(self, grid: Grid) -> bool:
        return self._direct and grid.plane_bytes >= DIRECT_FROM_BYTES
