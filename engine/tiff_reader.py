"""TIFF in, as the engine needs it: a file is a list of layers, each read by rows or by samples.

A layer is one image file directory (IFD): (y, x), with several samples a pixel for RGB. Pixels are
decoded by tifffile, one tile or strip at a time, so a whole slide never has to fit into memory.
Bigger than memory and yet in a single compressed strip cannot be helped: such a file is rejected.

What belongs to which channel comes from the file's own metadata (OME-XML, ImageJ, or tifffile's).
All layers of a channel share one scaling, and so do the three samples of an RGB layer.
"""

import contextlib
import logging
import math
import re
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import numpy.typing as npt
from tifffile import PHOTOMETRIC, TiffFile, TiffFrame, TiffPage, TiffPageSeries

from refocus.errors import RejectedError
from refocus.frame import Pixels

MAX_SEGMENT_MIB = 256
"""Largest tile or strip that is decoded; larger ones would break the promise on memory."""

_BLOCK_PX = 1 << 20
_JPEG = (6, 7, 34892, 33007)
_ALPHA = (1, 2)
_PRINT_UM = 10.0
"""A resolution in inches that says more per pixel (2540 dpi) speaks of paper, not of a sample."""
_COARSEST_UM = 50.0
"""The same for a resolution in centimetres, which programs of microscopes write."""
_UM_PER_UNIT = {
    "nm": 1e-3, "um": 1.0, "µm": 1.0, "μm": 1.0, "micron": 1.0, "microns": 1.0, "\\u00b5m": 1.0,
    "mm": 1e3, "cm": 1e4, "m": 1e6,
}  # fmt: skip

Key = tuple[int, int]
"""What shares one scaling: channel of the file, sample of the pixel (0 for all of RGB)."""


@dataclass(frozen=True, slots=True)
class Layer:
    """One IFD of an open file, or one plane of a stack that a single IFD describes."""

    page: TiffPage | TiffFrame
    keyframe: TiffPage
    """The IFD that holds the layout: the page itself, or an earlier one of its series."""
    channel: int
    offset: int | None
    """Of the first byte in the file where the pixels lie there plainly, row by row."""

    @property
    def height(self) -> int:
        return int(self.keyframe.imagelength)

    @property
    def width(self) -> int:
        return int(self.keyframe.imagewidth)

    @property
    def dtype(self) -> np.dtype[np.generic]:
        """In the byte order of this machine."""
        return np.dtype(self.keyframe.dtype or "V1").newbyteorder("=")

    @property
    def separate(self) -> int:
        """Samples stored one after the other (SYX); 1 where they lie side by side (YXS)."""
        page = self.keyframe
        return int(page.samplesperpixel) if page.planarconfig == 2 else 1

    @property
    def interleaved(self) -> int:
        """Samples stored side by side (YXS); 1 where they lie one after the other (SYX)."""
        return int(self.keyframe.samplesperpixel) // self.separate

    @property
    def is_rgb(self) -> bool:
        return self.keyframe.photometric in (PHOTOMETRIC.RGB, PHOTOMETRIC.YCBCR)

    def key(self, sample: int) -> Key | None:
        """What scaling *sample* has; None for an alpha channel, which is no picture."""
        page = self.keyframe
        extra = sample - (page.samplesperpixel - len(page.extrasamples))
        if extra >= 0 and page.extrasamples[extra] in _ALPHA:
            return None
        return self.channel, 0 if self.is_rgb and sample < 3 else sample


@contextlib.contextmanager
def open_tiff(path: Path) -> Iterator[TiffFile]:
    """*path*, open for reading.

    Where tifffile finds an error it logs it and goes on with what is left, so a stack that was cut
    off would come back as a single plane. Here such a file is rejected, as soon as it is read.
    """
    errors = _Errors(logging.ERROR)
    logger = logging.getLogger("tifffile")
    propagate, logger.propagate = logger.propagate, False
    logger.addHandler(errors)
    try:
        with TiffFile(path) as tif:
            if len(tif.series) and len(tif.pages) and errors.found:  # both are read when asked for
                raise RejectedError(f"the file is damaged: {'; '.join(errors.found)}")
            yield tif
    finally:
        logger.removeHandler(errors)
        logger.propagate = propagate


def layers(tif: TiffFile) -> tuple[list[Layer], list[str]]:
    """Layers to refocus, in the order of the file's IFDs, and what is left out, in words.

    Left out are the smaller levels of pyramids, and the labels and overviews beside a slide.
    Raises RejectedError where a layer is not one that can be refocused.
    """
    series, notes = list(tif.series), []
    if len(series) > 1 and series[0].name == "Baseline":
        notes.append(f"left out: {', '.join(other.name or 'unnamed' for other in series[1:])}")
        series = series[:1]
    if any(len(one.levels) > 1 for one in series):
        notes.append("left out: the smaller levels of the pyramid")
    found = [layer for one in series for layer in _of_series(tif, one)]
    if not found:
        raise RejectedError("no picture found: not a TIFF file, or a damaged one")
    for layer in found:
        _check(layer)
    # OME-XML refers to IFDs by number, so they must keep their order.
    found.sort(key=lambda layer: layer.page.index)
    return found, notes


def read_rows(layer: Layer, start: int, stop: int, sample: int = 0) -> Pixels:
    """Rows *start* to *stop*, (rows, x, interleaved); *sample* chooses among separate ones."""
    if layer.offset is not None:
        return _read_plain(layer, layer.offset, start, stop, sample)
    across, down, length = _grid(layer)
    first = (sample * down + start // length) * across
    last = (sample * down + -(-stop // length)) * across
    rows = np.zeros((stop - start, layer.width, layer.interleaved), layer.dtype)
    for segment, y, x in _segments(layer, range(first, last)):
        top, bottom = max(y, start), min(y + segment.shape[0], stop)
        rows[top - start : bottom - start, x : x + segment.shape[1]] = segment[top - y : bottom - y]
    return rows


def read_blocks(layer: Layer, count: int, sample: int = 0) -> Iterator[Pixels]:
    """At most *count* blocks (rows, columns, interleaved) from all over the layer, one at a time.

    Each may be as large as MAX_SEGMENT_MIB: who keeps them all keeps the layer in memory. Which
    ones is drawn by chance, but always the same: nothing in the picture can be in step.
    """
    if layer.offset is not None:
        length = max(1, _BLOCK_PX // (layer.width * layer.interleaved))
        for index in _draw(-(-layer.height // length), count):
            start = index * length
            yield read_rows(layer, start, min(start + length, layer.height), sample)
        return
    across, down, _ = _grid(layer)
    indices = [sample * down * across + index for index in _draw(down * across, count)]
    for segment, _, _ in _segments(layer, indices):
        yield segment
        del segment  # or it would live on while the next is decoded


def pixel_um(tif: TiffFile) -> float | None:
    """Side of a pixel in the sample as the file's metadata give it, or None where they do not."""
    page = tif.pages.first
    if tif.ome_metadata:
        size, unit = re.search(r'PhysicalSizeX="([^"]+)"', tif.ome_metadata), "µm"
        if named := re.search(r'PhysicalSizeXUnit="([^"]+)"', tif.ome_metadata):
            unit = named[1]
        return _in_um(size[1], unit) if size else None
    if page.is_svs and (mpp := re.search(r"MPP\s*=\s*([\d.]+)", page.description)):
        return _in_um(mpp[1], "um")
    per_unit = page.resolution[0]  # pixels
    if not per_unit:
        return None
    if tif.imagej_metadata:
        return _in_um(1 / per_unit, str(tif.imagej_metadata.get("unit", "")))
    unit_um, limit_um = {2: (25_400.0, _PRINT_UM), 3: (10_000.0, _COARSEST_UM)}.get(
        int(page.resolutionunit), (math.inf, 0.0)
    )
    size_um = unit_um / per_unit
    return size_um if size_um < limit_um else None


def _in_um(size: float | str, unit: str) -> float | None:
    try:
        size_um = float(size) * _UM_PER_UNIT.get(unit.lower(), math.nan)
    except ValueError:  # a program wrote "0,2": unknown, and said to be so
        return None
    return size_um if math.isfinite(size_um) and size_um > 0 else None


class _Errors(logging.Handler):
    """Keeps what is logged."""

    def __init__(self, level: int) -> None:
        super().__init__(level)
        self.found: list[str] = []

    def emit(self, record: logging.LogRecord) -> None:
        self.found.append(record.getMessage())


def _of_series(tif: TiffFile, series: TiffPageSeries) -> list[Layer]:
    pages, keyframe = list(series.pages), series.keyframe
    px = keyframe.imagedepth * keyframe.imagelength * keyframe.imagewidth
    count = series.size // (px * keyframe.samplesperpixel)
    channels = _channels(series.get_axes(squeeze=False), series.get_shape(squeeze=False), count)
    if len(pages) == 1 < count == len(tif.pages):
        pages = list(tif.pages)  # ImageJ: one IFD would do, but each plane has its own
    if len(pages) == count:
        return [
            Layer(page, keyframe, channel, page.dataoffsets[0] if page.is_final else None)
            for page, channel in zip(pages, channels, strict=True)
            if page is not None and page.parent is tif
        ]
    if len(pages) != 1 or series.dataoffset is None:
        raise RejectedError(f"{count} planes in {len(pages)} IFDs, which cannot be told apart")
    return [
        Layer(keyframe, keyframe, channel, series.dataoffset + plane * keyframe.nbytes)
        for plane, channel in enumerate(channels)
    ]


def _channels(axes: str, shape: tuple[int, ...], count: int) -> list[int]:
    """Channel of each of the *count* planes of a series; the axes of the planes come last."""
    leading = 0
    while math.prod(shape[:leading]) < count:
        leading += 1
    place = axes[:leading].find("C")
    if place < 0:
        return [0] * count
    return [plane // math.prod(shape[place + 1 : leading]) % shape[place] for plane in range(count)]


def _check(layer: Layer) -> None:
    page = layer.keyframe
    jpeg_colour = page.photometric == PHOTOMETRIC.YCBCR and page.compression in _JPEG
    if layer.dtype not in (np.uint8, np.uint16):
        raise RejectedError(
            f"pixels are {page.dtype or 'unreadable'}; only uint8 and uint16 are refocused"
        )
    if page.photometric not in (0, 1, 2) and not jpeg_colour:
        raise RejectedError(
            f"colours are {PHOTOMETRIC(page.photometric).name}; "
            "only grey and RGB are refocused: convert the file"
        )
    if page.imagedepth > 1:
        raise RejectedError("a volume in one IFD; save it as a stack of planes")
    segment_mib = math.prod(page.chunks) * layer.dtype.itemsize >> 20
    if layer.offset is None and segment_mib > MAX_SEGMENT_MIB:
        raise RejectedError(
            f"a single tile or strip holds {segment_mib} MiB, at most {MAX_SEGMENT_MIB} are "
            "decoded at once: save the file in tiles"
        )


def _grid(layer: Layer) -> tuple[int, int, int]:
    """Tiles or strips across, down, and rows in each."""
    page = layer.keyframe
    length = int(page.tilelength if page.is_tiled else page.rowsperstrip)
    across = -(-layer.width // int(page.tilewidth)) if page.is_tiled else 1
    return across, -(-layer.height // length), length


def _read_plain(layer: Layer, offset: int, start: int, stop: int, sample: int) -> Pixels:
    file = layer.page.parent.filehandle
    shape = (stop - start, layer.width, layer.interleaved)
    row_bytes = math.prod(shape[1:]) * layer.dtype.itemsize
    file.seek(offset + (sample * layer.height + start) * row_bytes)
    data = file.read(row_bytes * shape[0])
    if len(data) != row_bytes * shape[0]:
        raise RejectedError(f"the file ends in row {start + len(data) // row_bytes}: it is cut off")
    stored = layer.dtype.newbyteorder(layer.page.parent.byteorder)
    return np.frombuffer(data, stored).reshape(shape).astype(layer.dtype, copy=False)


def _segments(
    layer: Layer, indices: range | list[int]
) -> Iterator[tuple[npt.NDArray[np.generic], int, int]]:
    """Decoded tiles or strips (rows, columns, interleaved) with their y and x; empty ones not."""
    page, keyframe = layer.page, layer.keyframe
    tables = {}
    if keyframe.compression in _JPEG:
        tables = {"jpegtables": page.jpegtables, "jpegheader": keyframe.jpegheader}
    file = page.parent.filehandle
    for index in indices:
        offset, size = page.dataoffsets[index], page.databytecounts[index]
        file.seek(offset)
        data = file.read(size) if offset and size else None  # neither: left empty on purpose
        if data is not None and len(data) != size:
            raise RejectedError(f"the file ends within tile or strip {index}: it is cut off")
        segment, (_, _, y, x, _), _ = keyframe.decode(data, index, **tables)
        if segment is not None:
            yield segment[0, : layer.height - y, : layer.width - x], y, x
        del segment, data  # or they would live on while the next is decoded


def _draw(available: int, count: int) -> list[int]:
    if available <= count:
        return list(range(available))
    chosen = np.random.default_rng(0).choice(available, count, replace=False)
    return [int(index) for index in np.sort(chosen)]
