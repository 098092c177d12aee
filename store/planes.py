"""Planes on disk: one growing array (t, c, z, y, x) of a run.

One plane is one uncompressed chunk, so a plane is written once, whole, in any order, and needs no
read-modify-write; a plane never written is a chunk that is not there. Chunks go through zarr's
LocalStore, which writes a temporary file and renames it: a kill leaves a plane or none, never half
of one. The chunk's bytes are the plane's bytes, so they are handed to the store as they are, which
saves the array interface's event loop and copies (measured: docs/on-disk.md). An all-black plane is
stored like any other.

zarr.json is replaced, never rewritten in place, and only when the array must grow: t and z in
blocks, because a foreign reader sees only what lies within the shape. The shape may therefore run
ahead of the planes, and what is not there reads as 0 through any Zarr library: whether a plane
exists is a question for the journal. `trim` cuts the shape to the planes when the run is sealed.

Nothing here knows of frames or outcomes; the callers depend on the methods of `PlaneArray` alone.
"""

import errno
import json
import os
from pathlib import Path
from typing import Any

import numpy as np
from zarr.core.buffer import Buffer, default_buffer_prototype
from zarr.storage import LocalStore

from refocus.errors import RunError
from refocus.frame import Pixels
from store.layout import replace_file, replacing

AXES = ("t", "c", "z", "y", "x")
T_BLOCK = 64
Z_BLOCK = 16


class _PlaneStore(LocalStore):
    """zarr's LocalStore, which takes a file's blocks from the file system before it fills them.

    On ext4 the write itself is then up to twice as fast, and a full disk refuses before the first
    byte.
    """

    def set_sync(self, key: str, value: Buffer) -> None:
        with replacing(self.root / key) as temporary, temporary.open("wb") as file:
            _reserve(file.fileno(), len(value))
            file.write(value.as_buffer_like())


class PlaneArray:
    """One array on disk. Made by `create` (to write) or `open` (to read)."""

    def __init__(self, folder: Path, metadata: dict[str, Any], *, read_only: bool) -> None:
        self._folder = folder
        self._metadata = metadata
        self._store = _PlaneStore(folder, read_only=read_only)
        self._dtype = np.dtype(metadata["data_type"]).newbyteorder("<")

    @classmethod
    def create(cls, folder: Path, plane_shape: tuple[int, int], dtype: str) -> "PlaneArray":
        """A new array of shape (1, 1, 1, y, x) without a plane in it. Raises OSError."""
        array = cls(folder, _metadata((1, 1, 1, *plane_shape), dtype), read_only=False)
        folder.mkdir(parents=True, exist_ok=True)
        array._save_metadata()
        return array

    @classmethod
    def open(cls, folder: Path) -> "PlaneArray":
        """An array written by this module, for reading. Raises RunError where there is none."""
        path = folder / "zarr.json"
        try:
            metadata = json.loads(path.read_bytes())
            expected = _metadata(tuple(metadata["shape"]), metadata["data_type"])
        except (OSError, ValueError, KeyError, TypeError) as error:
            raise RunError(f"{path}: cannot be read as a run's array ({error})") from error
        if metadata != expected:
            raise RunError(
                f"{path}: not an array that Refocus wrote, or written by another version"
            )
        return cls(folder, metadata, read_only=True)

    @property
    def shape(self) -> tuple[int, int, int, int, int]:
        """(t, c, z, y, x); may run ahead of the planes."""
        t, c, z, y, x = self._metadata["shape"]
        return t, c, z, y, x

    def cover(self, t: int, c: int, z: int) -> None:
        """Grow the shape where it does not hold a plane at these indices. Raises OSError."""
        old = self.shape[:3]
        if t < old[0] and c < old[1] and z < old[2]:
            return
        new = (_grown(old[0], t, T_BLOCK), max(old[1], c + 1), _grown(old[2], z, Z_BLOCK))
        self._reshape(new)

    def trim(self, t: int, c: int, z: int) -> None:
        """Set the lengths of t, c and z to exactly these. Raises OSError."""
        if self.shape[:3] != (t, c, z):
            self._reshape((t, c, z))

    def write(self, t: int, c: int, z: int, pixels: Pixels) -> Pixels:
        """Store a plane (y, x) and return it as stored: C-contiguous, little endian.

        From the return on the plane survives a kill of this process. Raises OSError.
        """
        stored = np.ascontiguousarray(pixels, dtype=self._dtype)
        self.cover(t, c, z)
        chunk = default_buffer_prototype().buffer.from_array_like(stored.reshape(-1).view(np.uint8))
        self._store.set_sync(_key(t, c, z), chunk)
        return stored

    def read(self, t: int, c: int, z: int) -> Pixels | None:
        """The plane (y, x) at these indices, None where there is none.

        Raises RunError for one that is torn, or outside the shape, where no other program sees it.
        """
        if not (t < self.shape[0] and c < self.shape[1] and z < self.shape[2]):
            raise RunError(f"{self._folder}: shape {self.shape} does not hold t{t}/c{c}/z{z}")
        buffer = self._store.get_sync(_key(t, c, z), prototype=default_buffer_prototype())
        if buffer is None:
            return None
        content = buffer.as_numpy_array()
        shape = self.shape[3:]
        wanted = shape[0] * shape[1] * self._dtype.itemsize
        if content.nbytes != wanted:
            path = self._folder / _key(t, c, z)
            raise RunError(f"{path}: {content.nbytes} bytes, a plane has {wanted}; it is damaged")
        plane: Pixels = content.view(self._dtype).reshape(shape)
        return plane

    def _reshape(self, lengths: tuple[int, int, int]) -> None:
        grown = self._metadata | {"shape": [*lengths, *self._metadata["shape"][3:]]}
        before, self._metadata = self._metadata, grown
        try:
            self._save_metadata()
        except OSError:
            self._metadata = before
            raise

    def _save_metadata(self) -> None:
        replace_file(self._folder / "zarr.json", json.dumps(self._metadata, indent=1).encode())


def _reserve(descriptor: int, nbytes: int) -> None:
    """Take *nbytes* for an empty file, where system and file system can. Raises OSError if full."""
    if not hasattr(os, "posix_fallocate"):  # Windows, macOS
        return
    try:
        os.posix_fallocate(descriptor, 0, nbytes)
    except OSError as error:
        if error.errno not in (errno.EOPNOTSUPP, errno.EINVAL, errno.ENOSYS):
            raise


def _grown(length: int, index: int, block: int) -> int:
    """A length that holds *index*: 1 for the first plane alone, whole blocks after it."""
    return length if index < length else -(-(index + 1) // block) * block


def _key(t: int, c: int, z: int) -> str:
    return f"c.{t}.{c}.{z}.0.0"


def _metadata(shape: tuple[int, ...], dtype: str) -> dict[str, Any]:
    """zarr.json of an array (Zarr v3), complete, as every Zarr library writes and reads it.

    Keys are flat ("c.0.0.0.0.0"): nested ones cost four new folders a plane, which on ext4 takes as
    long as the plane itself.
    """
    return {
        "zarr_format": 3,
        "node_type": "array",
        "shape": list(shape),
        "data_type": dtype,
        "chunk_grid": {
            "name": "regular",
            "configuration": {"chunk_shape": [1, 1, 1, *shape[3:]]},
        },
        "chunk_key_encoding": {"name": "default", "configuration": {"separator": "."}},
        "codecs": [{"name": "bytes", "configuration": {"endian": "little"}}],
        "fill_value": 0,
        "dimension_names": list(AXES),
        "attributes": {},
    }
