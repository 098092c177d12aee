"""Who takes part in benchmarks/storage.py: plain pwrite, Refocus, and the libraries of
benchmarks/writers/peers.py, each with a way to read back what it wrote.

A contender takes planes one by one, in order, as a camera delivers them. What it calls written is
for it to say: where it can wait for its writes, when they are done, else when `append` returns.
Refocus also writes its journal, with a frame header and a hundred of Micro-Manager's tags a frame;
the others get pixels alone.

Planes of a contender with two arrays are counted through both: 2k is raw plane k, 2k + 1 its twin.
"""

import importlib.metadata
import os
import time
from collections import deque
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import numpy as np

from benchmarks.writers import peers
from benchmarks.writers.peers import DTYPE, GROW_PLANES, Reader, Shape, Writer
from refocus.frame import Frame, FrameHeader, Pixels
from store.layout import RunInfo
from store.reader import open_run
from store.underway import Pending
from store.writer import Provenance, RunWriter

TAGS = 100
TWIN_LAG = 4
"""Frames between a raw plane and its twin: the engine takes its time."""


@dataclass(frozen=True)
class Contender:
    """One line of the table."""

    name: str
    package: str
    """What has to be installed for it; empty: nothing."""
    open: Callable[[Path, Shape], Writer]
    """Starts to write planes of a shape (y, x) into a new folder."""
    read: Callable[[Path, Shape], Reader]
    """Opens the folder anew, with the library's own reader where it has one."""
    arrays: int = 1

    @property
    def version(self) -> str | None:
        """Of the package; None where it is not installed."""
        if not self.package:
            return ""
        try:
            return importlib.metadata.version(self.package)
        except importlib.metadata.PackageNotFoundError:
            return None


class Pwrite(Writer):
    """The least that anyone can do: one growing file an array, a plane a call.

    *direct*: past the page cache, into space taken in blocks beforehand; planes fill whole pages.
    """

    def __init__(self, folder: Path, shape: Shape, *, files: int = 1, direct: bool = False) -> None:
        flags = os.O_RDWR | os.O_CREAT | (os.O_DIRECT if direct else 0)
        self._files = [os.open(folder / f"{name}.bin", flags, 0o644) for name in range(files)]
        self._direct = direct

    def append(self, index: int, plane: Pixels) -> None:
        place, number = divmod(index, len(self._files))
        file, offset = self._files[number], place * plane.nbytes
        if self._direct and place % GROW_PLANES == 0:
            os.posix_fallocate(file, offset, GROW_PLANES * plane.nbytes)
        written = os.pwrite(file, plane.data, offset)
        if written != plane.nbytes:
            raise OSError(f"wrote {written} of {plane.nbytes} bytes")

    def close(self) -> None:
        for file in self._files:
            os.close(file)


def read_files(folder: Path, shape: Shape, files: int = 1) -> Reader:
    """Planes of `Pwrite`."""

    def read(index: int) -> Pixels:
        place, number = divmod(index, files)
        count = shape[0] * shape[1]
        offset = place * count * np.dtype(DTYPE).itemsize
        pixels = np.fromfile(folder / f"{number}.bin", DTYPE, count, offset=offset)
        return pixels.reshape(shape)

    return read


class Refocus(Writer):
    """`store.writer.RunWriter`, used as the recorder uses it: planes are put, then settled."""

    def __init__(self, folder: Path, shape: Shape, arrays: int = 1) -> None:
        info = RunInfo(run_id="benchmark", created_wall_ns=time.time_ns(), version="benchmark")
        self._writer = RunWriter.create(folder / "run", info)
        generator = self._writer.note_generator("0" * 64, "none", "0", "benchmark")
        self._made = Provenance(generator=generator, latency_ns=0)
        self._shape = shape
        self._arrays = arrays
        self._put: deque[Pending] = deque()
        self._twins: deque[tuple[int, Pixels]] = deque()
        self._tags = {f"Device-Property{number}": f"value {number}" for number in range(TAGS)}

    def append(self, index: int, plane: Pixels) -> None:
        seq, array = divmod(index, self._arrays)
        if array:
            self._twins.append((seq, plane))
            self._put_twins(but=TWIN_LAG)
            return
        header = FrameHeader(
            run="benchmark",
            seq=seq,
            axes={"time": seq},
            camera="Camera",
            channel="Default",
            shape=self._shape,
            dtype=DTYPE,
            bit_depth=16,
            pixel_um=0.325,
            exposure_ms=10.0,
            x_um=0.0,
            y_um=0.0,
            wall_time_ns=time.time_ns(),
            hook_time_ns=time.monotonic_ns(),
        )
        tags = self._tags | {"ElapsedTime-ms": seq * 10.0, "ImageNumber": str(seq)}
        self._follow(self._writer.put_raw(Frame(header, plane), tags))

    def settle(self) -> None:
        self._put_twins(but=0)
        self._writer.settle()
        self._raise_what_failed()

    def close(self) -> None:
        try:
            self.settle()
        finally:
            self._writer.close(complete=True, expected_frames=None)

    def _put_twins(self, but: int) -> None:
        while len(self._twins) > but:
            seq, plane = self._twins.popleft()
            self._follow(self._writer.put_refocused(seq, plane, self._made))

    def _follow(self, put: Pending) -> None:
        self._put.append(put)
        self._raise_what_failed()

    def _raise_what_failed(self) -> None:
        while self._put and self._put[0].settled:
            error = self._put.popleft().error
            if error:
                raise error


def read_run(folder: Path, shape: Shape, arrays: int = 1) -> Reader:
    """Planes of a run, each held against its checksum by the reader."""
    run = open_run(folder / "run")

    def read(index: int) -> Pixels | None:
        seq, array = divmod(index, arrays)
        return run.refocused(seq) if array else run.raw(seq)

    return read


PWRITE, DIRECT, REFOCUS = "pwrite", "pwrite O_DIRECT", "refocus"
PWRITE_TWO, DIRECT_TWO = "pwrite, two files", "pwrite O_DIRECT, two files"
REFOCUS_TWO = "refocus, raw and refocused"
REFERENCES = {1: (PWRITE, DIRECT), 2: (PWRITE_TWO, DIRECT_TWO)}
"""Buffered and direct, by the number of arrays."""

CONTENDERS = (
    Contender(PWRITE, "", Pwrite, read_files),
    Contender(DIRECT, "", partial(Pwrite, direct=True), read_files),
    Contender(REFOCUS, "", Refocus, read_run),
    Contender(PWRITE_TWO, "", partial(Pwrite, files=2), partial(read_files, files=2), 2),
    Contender(
        DIRECT_TWO, "", partial(Pwrite, files=2, direct=True), partial(read_files, files=2), 2
    ),
    Contender(REFOCUS_TWO, "", partial(Refocus, arrays=2), partial(read_run, arrays=2), 2),
    Contender("zarr-python", "zarr", peers.Zarr, peers.read_zarr),
    Contender("zarr-python, zarrs pipeline", "zarrs", peers.zarr_with_zarrs, peers.read_zarr),
    Contender("zarr-python, shards", "zarr", peers.zarr_shards, peers.read_zarr),
    Contender("tensorstore", "tensorstore", peers.TensorStore, peers.read_tensorstore),
    Contender(
        "tensorstore, 3 in flight",
        "tensorstore",
        partial(peers.TensorStore, in_flight=3),
        peers.read_tensorstore,
    ),
    Contender(
        "tensorstore, shards", "tensorstore", peers.tensorstore_shards, peers.read_tensorstore
    ),
    Contender("acquire-zarr", "acquire-zarr", peers.AcquireZarr, peers.read_zarr),
    Contender(
        "acquire-zarr, shards",
        "acquire-zarr",
        partial(peers.AcquireZarr, shards=True),
        peers.read_zarr,
    ),
    Contender("ome-writers", "ome-writers", peers.OmeWriters, peers.read_ome_writers),
    Contender("ndtiff", "ndtiff", peers.NDTiff, peers.read_ndtiff),
    Contender("tifffile", "tifffile", peers.Tifffile, peers.read_tifffile),
)


def named(name: str) -> Contender:
    """A contender by its name."""
    return next(one for one in CONTENDERS if one.name == name)
