"""Arrays that `refocus finish` makes of a sealed run's planes, by the zarr library.

They are cut into tiles, compressed, and packed into shards, which the library can write only whole.
So work goes block by block, a block being the planes of one shard, and a block is either on disk or
not: the library renames each shard into place. That makes the work resumable. What an array was
made of stands in its attributes as a digest; one that does not fit the journal any more is made
anew, never patched.

Blosc with zstd and byte shuffle: camera noise (Poisson, mean 300, uint16) shrinks to 1/2.5, with
bit shuffle to 1/2.25, with lz4 to 1/1.95, and the rest of the work is no faster.
"""

import hashlib
import json
import math
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import zarr
from zarr.codecs import BloscCodec
from zarr.core.array_spec import ArrayConfigParams

from refocus.errors import RunError
from refocus.frame import Pixels
from store import disk
from store.planes import AXES, PlaneArray
from store.records import crc32c

Slot = tuple[int, int, int]
"""Indices (t, c, z)."""

SHARD_BYTES = 64 << 20
"""Pixels of a shard before compression. Finishing takes up to 0.5 GiB of memory with it."""
TILE_PX = 1024
_MADE_FROM = "refocus_made_from"
_ABSENT_STAYS_ABSENT: ArrayConfigParams = {"write_empty_chunks": False}

Planes = npt.NDArray[Any]
"""Planes of a block: (t, c, z, y, x)."""


@dataclass(frozen=True)
class Source:
    """The planes of one image, by the journal."""

    folder: Path
    """The image's group; its array lies in "0"."""
    array: PlaneArray
    dtype: np.dtype[np.generic]
    planes: dict[Slot, int]
    """Checksum of each."""

    @cached_property
    def digest(self) -> str:
        """Of all planes, by place and checksum."""
        return hashlib.sha256(repr(sorted(self.planes.items())).encode()).hexdigest()

    @property
    def nbytes(self) -> int:
        """Of all planes, uncompressed."""
        return len(self.planes) * self.plane_bytes(self.array.shape[3:])

    def plane_bytes(self, shape: tuple[int, ...]) -> int:
        """Of a plane of *shape* (y, x), uncompressed."""
        return math.prod(shape) * self.dtype.itemsize

    def read(self, slot: Slot) -> Pixels:
        """A plane (y, x). Raises RunError where it is not what was acknowledged."""
        try:
            plane = self.array.read(*slot)
        except OSError:
            plane = None
        if plane is None or crc32c(plane) != self.planes[slot]:
            raise RunError(
                f"{self.name(slot)} is damaged; run `refocus recover`, then finish again"
            )
        return plane

    def name(self, slot: Slot) -> str:
        """A plane, for a message."""
        return f"{self.folder}: plane t{slot[0]}/c{slot[1]}/z{slot[2]}"


@dataclass(frozen=True)
class Block:
    """The planes that share a shard: those with indices from *first* up to *end*."""

    number: Slot
    """Of the shard."""
    first: Slot
    end: Slot
    slots: tuple[Slot, ...]
    """Those that have a plane, at least one."""


def blocks(source: Source, shape: tuple[int, int]) -> list[Block]:
    """All blocks of *source* in an array whose planes are of *shape* (y, x), in order."""
    lengths, (of_t, of_z) = source.array.shape[:3], _per_shard(source, shape)
    members: dict[Slot, list[Slot]] = {}
    for t, c, z in sorted(source.planes):
        members.setdefault((t // of_t, c, z // of_z), []).append((t, c, z))
    found = []
    for (t, c, z), slots in sorted(members.items()):
        end = (min((t + 1) * of_t, lengths[0]), c + 1, min((z + 1) * of_z, lengths[2]))
        found.append(Block((t, c, z), (t * of_t, c, z * of_z), end, tuple(slots)))
    return found


def _per_shard(source: Source, shape: tuple[int, int]) -> tuple[int, int]:
    """Planes of a shard along t and z: whole stacks where they fit."""
    t, _, z = source.array.shape[:3]
    planes = max(1, SHARD_BYTES // source.plane_bytes(shape))
    return min(t, max(1, planes // z)), min(z, planes)


class Packed:
    """An array in the making. Made by `begin`."""

    def __init__(self, path: Path, array: Any) -> None:
        self.path = path
        self._array = array

    @classmethod
    def begin(
        cls,
        path: Path,
        source: Source,
        shape: tuple[int, int],
        like: tuple[int, int],
        separator: str,
    ) -> "Packed":
        """The array at *path*, planes of *shape* (y, x): as far as it was made before, or new.

        *like*: the shape of planes whose blocks it shares. *separator*: of chunk keys. OSError.
        """
        tile = tuple(min(side, TILE_PX) for side in shape)
        of_t, of_z = _per_shard(source, like)
        shard = tuple(-(-side // step) * step for side, step in zip(shape, tile, strict=True))
        shards = (of_t, 1, of_z, *shard)
        if made_from(path) == source.digest:
            array = zarr.open_array(path, mode="r+", config=_ABSENT_STAYS_ABSENT)
            if array.shards == shards:
                return cls(path, array)
        disk.remove_tree(path)
        array = zarr.create_array(
            store=path,
            shape=(*source.array.shape[:3], *shape),
            chunks=(1, 1, 1, *tile),
            shards=shards,
            dtype=source.dtype,
            compressors=BloscCodec(cname="zstd", clevel=1, shuffle="shuffle"),
            fill_value=0,
            dimension_names=AXES,
            chunk_key_encoding={"name": "default", "separator": separator},
            attributes={_MADE_FROM: source.digest},
            config=_ABSENT_STAYS_ABSENT,
        )
        return cls(path, array)

    def has(self, block: Block) -> bool:
        """Whether the block is on disk."""
        key = self._array.metadata.encode_chunk_key((*block.number, 0, 0))
        path: Path = self.path / key
        return path.exists()

    def empty(self, block: Block) -> Planes:
        """Zeros for the planes of a block."""
        lengths = (end - first for first, end in zip(block.first, block.end, strict=True))
        return np.zeros((*lengths, *self._array.shape[3:]), self._array.dtype)

    def put(self, block: Block, planes: Planes) -> None:
        """Write a block, whole or not at all. Raises OSError."""
        where = (slice(f, e) for f, e in zip(block.first, block.end, strict=True))
        self._array[(*where, slice(None), slice(None))] = planes

    def read(self, block: Block) -> Planes:
        """A block, decoded again."""
        where = (slice(f, e) for f, e in zip(block.first, block.end, strict=True))
        return np.asarray(self._array[(*where, slice(None), slice(None))])


def made_from(path: Path) -> str | None:
    """Digest of what the array at *path* was made of; None where there is none, or not by us."""
    try:
        attributes = json.loads((path / "zarr.json").read_bytes())["attributes"]
        digest = attributes.get(_MADE_FROM)
    except (OSError, ValueError, KeyError, AttributeError):
        return None
    return digest if isinstance(digest, str) else None


def within(block: Block, slot: Slot) -> Slot:
    """Indices of a plane within its block."""
    t, c, z = (index - first for index, first in zip(slot, block.first, strict=True))
    return t, c, z
