"""The libraries that benchmarks/storage.py measures Refocus against.

Each is used as its own documentation says for planes that arrive one by one and whose number is
not known: one plane a chunk, no compression, an array that grows. Where a library offers shards, a
second line measures them, 16 planes each. All imports are inside: none of these packages is needed
but by this benchmark (`pip install -e ".[benchmark]"`).
"""

from collections.abc import Callable
from pathlib import Path
from typing import Any, Protocol

import numpy as np

from refocus.frame import Pixels

DTYPE = "uint16"
SHARD_PLANES = 16
GROW_PLANES = 64

Shape = tuple[int, int]
"""(y, x) of a plane."""
Reader = Callable[[int], Pixels | None]
"""Plane (y, x) by its number; None or an exception where it cannot be read."""


class Writer(Protocol):
    """What all contenders have in common."""

    def append(self, index: int, plane: Pixels) -> None:
        """Store plane *index*, or begin to."""

    def settle(self) -> None:
        """Wait until the appended planes are written; a library that cannot says they are."""
        return

    def close(self) -> None:
        """Finish whatever is open."""
        return


class Zarr(Writer):
    """zarr-python. Planes (y, x) go in one by one, or whole shards of them (n, y, x)."""

    def __init__(self, folder: Path, shape: Shape, *, shard: int | None = None) -> None:
        import zarr

        self._array: Any = zarr.create_array(
            folder / "planes.zarr",
            shape=(GROW_PLANES, *shape),
            chunks=(1, *shape),
            shards=(shard, *shape) if shard else None,
            dtype=DTYPE,
            filters=None,
            compressors=None,
            fill_value=0,
            config={"write_empty_chunks": True},
        )

    def append(self, index: int, plane: Pixels) -> None:
        length = self._array.shape[0]
        if index >= length:
            self._array.resize((length + GROW_PLANES, *self._array.shape[1:]))
        self._array[_span(index, plane)] = plane


class TensorStore(Writer):
    """tensorstore. An append waits until fewer than *in_flight* writes are under way."""

    def __init__(
        self, folder: Path, shape: Shape, *, shard: int | None = None, in_flight: int = 1
    ) -> None:
        import tensorstore

        spec = {
            "driver": "zarr3",
            "kvstore": _file(folder),
            "context": {"file_io_sync": False},  # one sync at the end, as for all
            "metadata": _zarr_metadata(shape, shard),
            "store_data_equal_to_fill_value": True,
            "create": True,
        }
        self._array: Any = tensorstore.open(spec).result()
        self._in_flight = in_flight
        self._writes: list[Any] = []

    def append(self, index: int, plane: Pixels) -> None:
        length = self._array.shape[0]
        if index >= length:
            grown = [length + GROW_PLANES, *self._array.shape[1:]]
            self._array = self._array.resize(exclusive_max=grown).result()
        self._writes.append(self._array[_span(index, plane)].write(plane))
        while len(self._writes) >= self._in_flight:
            self._writes.pop(0).result()

    def settle(self) -> None:
        while self._writes:
            self._writes.pop(0).result()

    def close(self) -> None:
        self.settle()


class WholeShards(Writer):
    """Collects planes until a shard is full: these libraries rewrite a shard that they add to."""

    def __init__(self, inner: Writer, shape: Shape) -> None:
        self._inner = inner
        self._block = np.empty((SHARD_PLANES, *shape), DTYPE)
        self._held = 0

    def append(self, index: int, plane: Pixels) -> None:
        self._block[self._held] = plane
        self._held += 1
        self._end = index + 1
        if self._held == SHARD_PLANES:
            self._flush()

    def close(self) -> None:
        if self._held:
            self._flush()
        self._inner.close()

    def _flush(self) -> None:
        self._inner.append(self._end - self._held, self._block[: self._held])
        self._held = 0


class AcquireZarr(Writer):
    """acquire-zarr. It takes planes in their order only."""

    def __init__(self, folder: Path, shape: Shape, *, shards: bool = False) -> None:
        import acquire_zarr as aqz

        def dimension(name: str, kind: Any, size: int, chunk: int, shard: int) -> Any:
            return aqz.Dimension(
                name=name,
                kind=kind,
                array_size_px=size,
                chunk_size_px=chunk,
                shard_size_chunks=shard,
            )

        y, x = shape
        dimensions = [
            dimension("t", aqz.DimensionType.TIME, 0, 1, SHARD_PLANES if shards else 1),
            dimension("y", aqz.DimensionType.SPACE, y, y, 1),
            dimension("x", aqz.DimensionType.SPACE, x, x, 1),
        ]
        array = aqz.ArraySettings(dimensions=dimensions, data_type=np.uint16)
        path = str(folder / "planes.zarr")
        self._stream: Any = aqz.ZarrStream(aqz.StreamSettings(store_path=path, arrays=[array]))

    def append(self, index: int, plane: Pixels) -> None:
        self._stream.append(plane)

    def close(self) -> None:
        self._stream.close()


class OmeWriters(Writer):
    """ome-writers with the backend it chooses itself: tensorstore, where that is installed."""

    def __init__(self, folder: Path, shape: Shape) -> None:
        from ome_writers import AcquisitionSettings, Dimension, create_stream

        y, x = shape
        settings = AcquisitionSettings(
            root_path=str(folder / "planes.ome.zarr"),
            dimensions=(
                Dimension(name="t", count=None, chunk_size=1, type="time"),
                Dimension(name="y", count=y, chunk_size=y, type="space"),
                Dimension(name="x", count=x, chunk_size=x, type="space"),
            ),
            dtype=DTYPE,
            compression="none",
        )
        self._stream: Any = create_stream(settings)

    def append(self, index: int, plane: Pixels) -> None:
        self._stream.append(plane)

    def close(self) -> None:
        self._stream.close()


class NDTiff(Writer):
    """ndtiff, the format of Micro-Manager."""

    def __init__(self, folder: Path, shape: Shape) -> None:
        from ndtiff import NDTiffDataset

        self._data: Any = NDTiffDataset(
            str(folder), name="planes", summary_metadata={}, writable=True
        )

    def append(self, index: int, plane: Pixels) -> None:
        self._data.put_image({"time": index}, plane, {})

    def close(self) -> None:
        self._data.finish()


class Tifffile(Writer):
    """tifffile, a page a plane: a page has a directory of its own, so a kill costs none."""

    def __init__(self, folder: Path, shape: Shape) -> None:
        from tifffile import TiffWriter

        self._file: Any = TiffWriter(folder / "planes.tif", bigtiff=True)

    def append(self, index: int, plane: Pixels) -> None:
        self._file.write(plane, photometric="minisblack", metadata=None)

    def close(self) -> None:
        self._file.close()


def zarr_with_zarrs(folder: Path, shape: Shape) -> Writer:
    """zarr-python with the codec pipeline of zarrs."""
    import zarr

    zarr.config.set({"codec_pipeline.path": "zarrs.ZarrsCodecPipeline"})
    return Zarr(folder, shape)


def zarr_shards(folder: Path, shape: Shape) -> Writer:
    """zarr-python, whole shards."""
    return WholeShards(Zarr(folder, shape, shard=SHARD_PLANES), shape)


def tensorstore_shards(folder: Path, shape: Shape) -> Writer:
    """tensorstore, whole shards."""
    return WholeShards(TensorStore(folder, shape, shard=SHARD_PLANES), shape)


def read_zarr(folder: Path, shape: Shape) -> Reader:
    """Planes by zarr-python, which is also the reader of acquire-zarr's."""
    return _zarr_reader(folder / "planes.zarr")


def read_ome_writers(folder: Path, shape: Shape) -> Reader:
    """Planes by zarr-python: ome-writers has no reader."""
    return _zarr_reader(folder / "planes.ome.zarr" / "0")


def read_tensorstore(folder: Path, shape: Shape) -> Reader:
    """Planes by tensorstore."""
    import tensorstore

    array: Any = tensorstore.open({"driver": "zarr3", "kvstore": _file(folder)}).result()
    return lambda index: np.asarray(array[index].read().result())


def read_ndtiff(folder: Path, shape: Shape) -> Reader:
    """Planes by ndtiff."""
    from ndtiff import Dataset

    data: Any = Dataset(str(next(folder.glob("planes*"))))
    return lambda index: np.asarray(data.read_image(time=index))


def read_tifffile(folder: Path, shape: Shape) -> Reader:
    """Pages by tifffile."""
    from tifffile import TiffFile

    pages: Any = TiffFile(folder / "planes.tif").pages
    return lambda index: np.asarray(pages[index].asarray())


def _zarr_reader(path: Path) -> Reader:
    import zarr

    array: Any = zarr.open_array(path, mode="r")
    return lambda index: np.asarray(array[index])


def _span(index: int, planes: Pixels) -> int | slice:
    return index if planes.ndim == 2 else slice(index, index + len(planes))


def _file(folder: Path) -> dict[str, str]:
    return {"driver": "file", "path": str(folder / "planes.zarr")}


def _zarr_metadata(shape: Shape, shard: int | None) -> dict[str, Any]:
    plain = {"name": "bytes", "configuration": {"endian": "little"}}
    index = [plain, {"name": "crc32c"}]
    inside = {"chunk_shape": [1, *shape], "codecs": [plain], "index_codecs": index}
    return {
        "shape": [GROW_PLANES, *shape],
        "data_type": DTYPE,
        "chunk_grid": {
            "name": "regular",
            "configuration": {"chunk_shape": [shard or 1, *shape]},
        },
        "codecs": [{"name": "sharding_indexed", "configuration": inside}] if shard else [plain],
    }
