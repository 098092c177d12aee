"""Arrays of planes whose pixels are known from their place alone, and what they should hold."""

from pathlib import Path

import numpy as np
import zarr
from store_runs import SHAPE

from refocus.frame import Pixels
from store.grid import read_index, slots_of
from store.planes import PlaneArray
from store.shards import Shards

Place = tuple[int, int, int]
"""t, c, z."""
MIB_SHAPE = (512, 1024)
"""A plane of uint16 that passes by the page cache."""


def plane(place: Place, shape: tuple[int, int] = SHAPE, dtype: str = "uint16") -> Pixels:
    """Noise that differs from place to place, of the whole range of values."""
    t, c, z = place
    noise = np.random.default_rng([t, c, z]).integers(0, 256, (*shape, np.dtype(dtype).itemsize))
    if dtype == "float32":
        return noise[..., 0].astype(dtype) / 7
    return noise.astype(np.uint8).view(dtype)[..., 0]


class Arrays:
    """Arrays open for writing in one folder, and what they should hold."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.shards = Shards(folder)
        self.arrays: dict[str, PlaneArray] = {}
        self.written: dict[str, dict[Place, Pixels]] = {}

    def add(
        self,
        name: str,
        shape: tuple[int, int] = SHAPE,
        dtype: str = "uint16",
        stack_planes: int = 1,
    ) -> PlaneArray:
        """A new array."""
        self.arrays[name] = PlaneArray.create(
            self.folder / name, shape, dtype, self.shards, stack_planes=stack_planes
        )
        self.written[name] = {}
        return self.arrays[name]

    def write(self, name: str, *places: Place) -> None:
        """Planes in this order."""
        array = self.arrays[name]
        for place in places:
            content = plane(place, array.shape[3:], array.dtype)
            array.write(*place, array.stage(content))
            self.written[name][place] = content

    def reopen(self) -> None:
        """As another process would go on."""
        self.shards.close()
        self.shards = Shards(self.folder)
        self.arrays = {
            name: PlaneArray.open(self.folder / name, self.shards) for name in self.arrays
        }

    def trim(self, name: str) -> None:
        """Cut the array to its planes."""
        places = self.written[name]
        self.arrays[name].trim(*(max(p[axis] for p in places) + 1 for axis in range(3)))

    def assert_right(self) -> None:
        """Every plane is there, for zarr and for us, and nothing else is; files say no more."""
        for name, planes in self.written.items():
            array = PlaneArray.open(self.folder / name)
            by_zarr = np.asarray(zarr.open_array(self.folder / name, mode="r")[:])
            wanted = np.zeros_like(by_zarr)
            for place, content in planes.items():
                wanted[place] = content
                np.testing.assert_array_equal(array.read(*place), content, strict=True)
            np.testing.assert_array_equal(by_zarr, wanted, strict=True)
            assert listed(array) == set(planes)


def listed(array: PlaneArray) -> set[Place]:
    """The planes that the indices on disk list."""
    grid = array.grid
    assert grid is not None
    found = set()
    for path in array.shard_files():
        _, t, c, z, *_ = path.name.split(".")
        index = read_index(path, grid)
        assert index is not None
        assert path.stat().st_size == grid.file_bytes
        for slot in slots_of(index):
            in_t, in_z = divmod(slot, grid.z)
            found.add((int(t) * grid.t + in_t, int(c), int(z) * grid.z + in_z))
    return found
