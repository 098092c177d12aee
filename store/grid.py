"""Where a plane lies in a shard, and the index that says which ones are there: the arithmetic.

Why shards are as they are stands in store/shards.py.
"""

import errno
import math
from collections.abc import Iterable
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

import numpy as np
import numpy.typing as npt

from refocus.frame import Pixels
from store import disk
from store.records import crc32c

SHARD_BYTES = 512 << 20
MAX_SLOTS = 255
ABSENT = 2**64 - 1
"""Offset and length, in an index, of a plane that is not there."""
_CRC_BYTES = 4

Index = npt.NDArray[np.uint64]
"""(slots, 2): offset and length of each plane, all ones where there is none."""


@dataclass(frozen=True)
class Grid:
    """How an array is cut into shards: planes of *shape* (y, x), *t* x *z* of them in a shard."""

    shape: tuple[int, int]
    dtype: str
    t: int
    z: int

    @classmethod
    def for_planes(cls, shape: tuple[int, int], dtype: str, stack_planes: int) -> "Grid":
        """Shards of up to SHARD_BYTES for stacks of *stack_planes* planes that come in a row."""
        slots = max(1, min(MAX_SLOTS, SHARD_BYTES // _stride(shape, dtype)))
        parts = -(-stack_planes // slots)
        z = -(-stack_planes // parts)
        return cls(shape, dtype, t=slots // z, z=z)

    @cached_property
    def plane_bytes(self) -> int:
        """Bytes of a plane."""
        return math.prod(self.shape) * np.dtype(self.dtype).itemsize

    @property
    def slots(self) -> int:
        """Planes of a full shard."""
        return self.t * self.z

    @cached_property
    def stride(self) -> int:
        """Bytes from one slot to the next."""
        return _stride(self.shape, self.dtype)

    @property
    def index_offset(self) -> int:
        """Where the index begins."""
        return self.slots * self.stride

    @property
    def file_bytes(self) -> int:
        """Length of a shard's file."""
        return self.index_offset + 16 * self.slots + _CRC_BYTES

    def shard(self, t: int, c: int, z: int) -> tuple[int, int, int]:
        """Number of the shard of a plane, along t, c and z."""
        return t // self.t, c, z // self.z

    def slot(self, t: int, z: int) -> int:
        """Number of a plane's slot in its shard."""
        return t % self.t * self.z + z % self.z

    def empty_index(self) -> Index:
        """An index without a plane."""
        return np.full((self.slots, 2), ABSENT, np.uint64)

    def index_of(self, slots: Iterable[int]) -> Index:
        """The index of a shard with planes in these *slots*."""
        index = self.empty_index()
        for slot in slots:
            index[slot] = slot * self.stride, self.plane_bytes
        return index


def _stride(shape: tuple[int, int], dtype: str) -> int:
    nbytes = math.prod(shape) * np.dtype(dtype).itemsize
    return -(-nbytes // disk.PAGE) * disk.PAGE


def slots_of(index: Index) -> set[int]:
    """Numbers of the slots that have a plane."""
    return {int(slot) for slot in np.flatnonzero(index[:, 1] != ABSENT)}


def read_index(path: Path, grid: Grid) -> Index | None:
    """A shard's index, None where there is none yet. Raises OSError where it is damaged."""
    with path.open("rb") as file:
        file.seek(grid.index_offset)
        content = file.read(grid.file_bytes - grid.index_offset)
    return decode(content, grid, path)


def read_plane(path: Path, grid: Grid, slot: int) -> Pixels | None:
    """What lies in a slot, (y, x), read-only; None where the file ends before. Raises OSError.

    Whether it is a plane is for the index or the journal to say.
    """
    count = math.prod(grid.shape)
    dtype = np.dtype(grid.dtype).newbyteorder("<")
    try:
        plane: Pixels = np.fromfile(path, dtype, count, offset=slot * grid.stride)
    except FileNotFoundError:
        return None
    if plane.size < count:
        return None
    plane.flags.writeable = False
    return plane.reshape(grid.shape)


def repair_index(path: Path, grid: Grid, slots: Iterable[int]) -> bool:
    """Make a shard's index list exactly these *slots*; True where it did not. Raises OSError."""
    wanted = grid.index_of(slots)
    try:
        found = read_index(path, grid)
    except OSError:
        found = None
    if found is not None and np.array_equal(found, wanted):
        return False
    descriptor = disk.open_existing(path)
    try:
        disk.write_at(descriptor, encode(wanted), grid.index_offset)
    finally:
        disk.close(descriptor)
    return True


def encode(index: Index) -> bytes:
    """The bytes of an index, with their checksum."""
    content = index.astype("<u8").tobytes()
    return content + crc32c(content).to_bytes(_CRC_BYTES, "little")


def decode(content: bytes, grid: Grid, path: Path) -> Index | None:
    """An index from its bytes, None where there are none. Raises OSError where it is damaged."""
    if not content:
        return None
    body, crc = content[:-_CRC_BYTES], content[-_CRC_BYTES:]
    if len(body) != 16 * grid.slots or crc32c(body).to_bytes(_CRC_BYTES, "little") != crc:
        raise OSError(errno.EIO, "the shard's index is damaged; run refocus recover", str(path))
    return np.frombuffer(body, "<u8").astype(np.uint64).reshape(grid.slots, 2)
