"""Planes on disk: one growing array (t, c, z, y, x) of a run.

One plane is one uncompressed chunk at a fixed place in a shard (store/shards.py), so a plane is
written once, whole, in any order, and needs no read-modify-write. An all-black plane is stored like
any other. On a file system without sparse files (exFAT), where a shard would take all its room at
once, the zarr library writes a file a plane instead; slower, and the same to every reader.

zarr.json is replaced, never rewritten in place, and only when the array must grow: t and z by whole
shards, before the first plane there, because a foreign reader sees only what lies within the shape.
The shape may therefore run ahead of the planes, and what is not there reads as 0 through any Zarr
library: whether a plane exists is a question for the journal. `trim` cuts the shape to the planes
when the run is sealed.

Nothing here knows of frames or outcomes; the callers depend on the methods of `PlaneArray` alone.
One thread at a time writes.
"""

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import zarr

from refocus.errors import RunError
from refocus.frame import Pixels
from store import disk
from store.grid import Grid, read_plane
from store.shards import Shards, Staged

AXES = ("t", "c", "z", "y", "x")
T_BLOCK = 64
Z_BLOCK = 16
"""Growth of an array without shards."""
_BYTES = {"name": "bytes", "configuration": {"endian": "little"}}


class PlaneArray:
    """One array on disk. Made by `create` (to write) or `open`."""

    def __init__(self, folder: Path, metadata: dict[str, Any], shards: Shards | None) -> None:
        self._folder = folder
        self._metadata = metadata
        self._shards = shards
        self._dtype = np.dtype(metadata["data_type"]).newbyteorder("<")
        self.grid = _grid(metadata)
        """How it is cut into shards; None where it is not, or compressed: zarr reads it then."""

    @classmethod
    def create(
        cls,
        folder: Path,
        plane_shape: tuple[int, int],
        dtype: str,
        shards: Shards,
        *,
        stack_planes: int = 1,
    ) -> "PlaneArray":
        """A new array of shape (1, 1, 1, y, x) without a plane in it. Raises OSError.

        *stack_planes*: planes of a stack that come one after the other, 1 for a time-lapse.
        """
        grid = None
        if shards.sparse:
            grid = Grid.for_planes(plane_shape, dtype, stack_planes)
        array = cls(folder, _new_metadata(plane_shape, dtype, grid), shards)
        disk.make_folders(folder)
        array._save_metadata()
        return array

    @classmethod
    def open(cls, folder: Path, shards: Shards | None = None) -> "PlaneArray":
        """An array on disk; for writing too with *shards*. Raises RunError where there is none."""
        path = folder / "zarr.json"
        try:
            metadata = json.loads(path.read_bytes())
            array = cls(folder, metadata, shards)
            if len(array.shape) != len(AXES):
                raise ValueError(f"its shape is {array.shape}")
        except (OSError, ValueError, KeyError, TypeError) as error:
            raise RunError(f"{path}: cannot be read as a run's array ({error})") from error
        return array

    @classmethod
    def unwritten(
        cls, folder: Path, plane_shape: tuple[int, int], dtype: str, shards: tuple[int, int] | None
    ) -> "PlaneArray":
        """What an array is, of which nothing need be on disk; *shards*: their planes (t, z)."""
        grid = Grid(plane_shape, dtype, *shards) if shards else None
        return cls(folder, _new_metadata(plane_shape, dtype, grid), None)

    def resized(self, folder: Path, t: int, c: int, z: int) -> "PlaneArray":
        """An array like this one in *folder*, with these lengths; nothing is written."""
        shape = [t, c, z, *self.shape[3:]]
        return PlaneArray(folder, self._metadata | {"shape": shape}, None)

    def zarr_json(self) -> bytes:
        """What its zarr.json should hold."""
        return json.dumps(self._metadata, indent=1).encode()

    @property
    def shape(self) -> tuple[int, int, int, int, int]:
        """(t, c, z, y, x); may run ahead of the planes."""
        t, c, z, y, x = self._metadata["shape"]
        return t, c, z, y, x

    @property
    def dtype(self) -> str:
        """uint8, uint16 or float32."""
        return str(self._metadata["data_type"])

    @property
    def is_foreign(self) -> bool:
        """Whether the zarr library made it, as `refocus finish` does: its planes are compressed."""
        ours = _new_metadata(self.shape[3:], self.dtype, None) | {"shape": list(self.shape)}
        return self.grid is None and self._metadata != ours

    def holds(self, t: int, c: int, z: int) -> bool:
        """Whether these indices lie within the shape."""
        return t < self.shape[0] and c < self.shape[1] and z < self.shape[2]

    def cover(self, t: int, c: int, z: int) -> None:
        """Grow the shape where it does not hold a plane at these indices. Raises OSError."""
        old = self.shape[:3]
        if self.holds(t, c, z):
            return
        t_block, z_block = (self.grid.t, self.grid.z) if self.grid else (T_BLOCK, Z_BLOCK)
        self._reshape((_grown(old[0], t, t_block), max(old[1], c + 1), _grown(old[2], z, z_block)))

    def trim(self, t: int, c: int, z: int) -> None:
        """Set the lengths of t, c and z to exactly these; drop shards beyond. Raises OSError."""
        if self.shape[:3] != (t, c, z):
            self._reshape((t, c, z))
        for path in list(self.shard_files()) if self.grid else []:
            if self._shards is not None and self._begins_beyond(path, t, z):
                self._shards.remove(path)

    def stage(self, pixels: Pixels) -> Staged:
        """Make a plane (y, x) ready for `write`; a copy only where it must be one."""
        stored: Pixels = np.ascontiguousarray(pixels, dtype=self._dtype)
        if self.grid is None or self._shards is None:
            return Staged(stored, stored.reshape(-1).view(np.uint8))
        return self._shards.stage(stored, self.grid)

    def write(self, t: int, c: int, z: int, staged: Staged) -> None:
        """Store a plane. From the return on it survives a kill of this process. Raises OSError.

        *staged* is used up, whatever becomes of it.
        """
        assert self._shards is not None, f"{self._folder} is open for reading"
        try:
            self._write(self._shards, t, c, z, staged)
        finally:
            self._shards.give_back(staged)

    def _write(self, shards: Shards, t: int, c: int, z: int, staged: Staged) -> None:
        self.cover(t, c, z)
        if self.grid is None:
            array = self._by_zarr("r+")
            array[t, c, z] = staged.pixels
            lengths = array.shards or array.chunks
            chunk = (t // lengths[0], c // lengths[1], z // lengths[2], 0, 0)
            path = self._folder / array.metadata.encode_chunk_key(chunk)
            for changed in (path, *path.parents[: 1 + path.parents.index(self._folder)]):
                shards.changed(changed)
        else:
            path = self.shard_file(t, c, z)
            shards.put(path, self.grid, self.grid.slot(t, z), staged)

    def unlist(self, t: int, c: int, z: int) -> None:
        """Hide a plane that was written, where it lies in a shard. Raises OSError."""
        if self.grid is not None and self._shards is not None:
            self._shards.unlist(self.shard_file(t, c, z), self.grid, self.grid.slot(t, z))

    def prepare_next(self, t: int, c: int, z: int) -> None:
        """Make the shard that follows the one of this plane along t. Raises OSError."""
        if self.grid is not None and self._shards is not None:
            self._shards.prepare(self.shard_file(t + self.grid.t, c, z), self.grid)

    def read(self, t: int, c: int, z: int) -> Pixels | None:
        """The plane (y, x) at these indices, read-only; None where there can be none.

        Whether what lies there is a plane is for the journal to say. Raises RunError for indices
        outside the shape, where no other program sees it, and for what cannot be read.
        """
        if not self.holds(t, c, z):
            raise RunError(f"{self._folder}: shape {self.shape} does not hold t{t}/c{c}/z{z}")
        if self.grid is not None:
            return read_plane(self.shard_file(t, c, z), self.grid, self.grid.slot(t, z))
        try:
            plane: Pixels = np.asarray(self._by_zarr("r")[t, c, z])
            plane.flags.writeable = False
        except (ValueError, RuntimeError, KeyError) as error:  # zarr and its codecs
            raise RunError(f"{self._folder}: t{t}/c{c}/z{z} cannot be read ({error})") from error
        return plane

    def shard_file(self, t: int, c: int, z: int) -> Path:
        """File of the shard that holds a plane."""
        assert self.grid is not None, f"{self._folder} has no shards"
        return self.shard_path(*self.grid.shard(t, c, z))

    def shard_path(self, t: int, c: int, z: int) -> Path:
        """File of a shard, by its own number along t, c and z."""
        return self._folder / f"c.{t}.{c}.{z}.0.0"

    def shard_files(self) -> Iterator[Path]:
        """All shards on disk, in no order."""
        return self._folder.glob("c.*.0.0")

    def _begins_beyond(self, path: Path, t: int, z: int) -> bool:
        _, shard_t, _, shard_z, *_ = path.name.split(".")
        assert self.grid is not None
        return int(shard_t) * self.grid.t >= t or int(shard_z) * self.grid.z >= z

    def _by_zarr(self, mode: str) -> Any:
        return zarr.open_array(self._folder, mode=mode).with_config({"write_empty_chunks": True})

    def _reshape(self, lengths: tuple[int, int, int]) -> None:
        grown = self._metadata | {"shape": [*lengths, *self._metadata["shape"][3:]]}
        before, self._metadata = self._metadata, grown
        try:
            self._save_metadata()
        except OSError:
            self._metadata = before
            raise

    def _save_metadata(self) -> None:
        path = self._folder / "zarr.json"
        disk.replace_file(path, self.zarr_json())
        if self._shards is not None:
            self._shards.changed(path)
            self._shards.changed(self._folder)


def _grown(length: int, index: int, block: int) -> int:
    """A length that holds *index*: 1 for the first plane alone, whole blocks after it."""
    return length if index < length else -(-(index + 1) // block) * block


def _new_metadata(shape: tuple[int, int], dtype: str, grid: Grid | None) -> dict[str, Any]:
    """zarr.json of a new array (Zarr v3), complete, as every Zarr library writes and reads it."""
    plane = [1, 1, 1, *shape]
    codecs: list[dict[str, Any]] = [_BYTES]
    if grid is not None:
        sharding = {
            "chunk_shape": plane,
            "codecs": [_BYTES],
            "index_codecs": [_BYTES, {"name": "crc32c"}],
            "index_location": "end",
        }
        codecs = [{"name": "sharding_indexed", "configuration": sharding}]
    chunk = plane if grid is None else [grid.t, 1, grid.z, *shape]
    return {
        "zarr_format": 3,
        "node_type": "array",
        "shape": plane,
        "data_type": dtype,
        "chunk_grid": {"name": "regular", "configuration": {"chunk_shape": chunk}},
        # Flat keys: a new shard is one new file, not five new folders.
        "chunk_key_encoding": {"name": "default", "configuration": {"separator": "."}},
        "codecs": codecs,
        "fill_value": 0,
        "dimension_names": list(AXES),
        "attributes": {},
    }


def _grid(metadata: dict[str, Any]) -> Grid | None:
    """The shards of an array that `_new_metadata` described, None for any other."""
    t, c, z, y, x = metadata["chunk_grid"]["configuration"]["chunk_shape"]
    grid = Grid((y, x), metadata["data_type"], t=t, z=z)
    wanted = _new_metadata(grid.shape, grid.dtype, grid) | {"shape": metadata["shape"]}
    return grid if c == 1 and metadata == wanted else None
