"""TIFF out: a layer is written in the layout of its source, from bands of rows, one IFD each.

Tiled stays tiled, in the source's own tiles where these are small enough to be written in bands of
rows that memory can hold, and what is larger than `WHOLE_PX` becomes tiled. Compressed becomes
Deflate: it loses nothing and every reader knows it, while the source's own may be lossy. The tags
that describe the picture are carried over with their bytes untouched, so whatever a program has
written there it finds again; the Software tag of every IFD says that the picture was computed.
"""

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
from tifffile import PHOTOMETRIC, TiffFile, TiffWriter

from engine.tiff_reader import Layer
from refocus.frame import Pixels

WHOLE_PX = 4096**2
"""Layers up to this size are handled whole: about 0.5 GiB with OpenVINO."""

_BIGTIFF_BYTES = (4 << 30) - (64 << 20)
_BUFFER_BYTES = 16 << 20
_TILE_PX = 512
_LARGEST_TILE_PX = 1024
_DESCRIPTION = 270
_CARRIED = (271, 272, 306, 315, 316, 700, 33432, 34675, 50838, 50839, 51123)
"""Make, model, date, artist, host, XMP, copyright, ICC profile, ImageJ (2), Micro-Manager."""


def open_writer(path: Path, source: TiffFile, layers: list[Layer]) -> TiffWriter:
    """A writer for *layers* of *source*: same byte order, BigTIFF where it is or size needs it."""
    nbytes = sum(
        layer.height * layer.width * layer.separate * layer.interleaved * layer.dtype.itemsize
        for layer in layers
    )
    big = source.is_bigtiff or nbytes > _BIGTIFF_BYTES
    return TiffWriter(path, bigtiff=big, byteorder=source.byteorder)


def write_layer(writer: TiffWriter, layer: Layer, bands: Iterator[Pixels], label: str) -> None:
    """Write *bands* (rows, x, interleaved), top to bottom and sample after sample, as one IFD.

    But for the last of a sample, bands end where tiles do. *label* is ASCII, for the Software tag.
    """
    page = layer.keyframe
    shape: tuple[int, ...] = (layer.height, layer.width)
    options: dict[str, Any] = {}
    if layer.interleaved > 1:
        shape = (*shape, layer.interleaved)
    if layer.separate > 1:
        shape = (layer.separate, *shape)
    if page.samplesperpixel > 1:
        options |= {"planarconfig": page.planarconfig, "extrasamples": page.extrasamples}
    if page.compression != 1:
        options |= {"compression": "zlib", "predictor": True}
    tile = tile_shape(layer)
    stored = layer.dtype.newbyteorder(layer.page.parent.byteorder)
    writer.write(
        _tiles(bands, tile, stored) if tile else _whole(bands, shape, stored),
        shape=shape,
        dtype=stored,
        tile=tile,
        photometric=PHOTOMETRIC.RGB if layer.is_rgb else page.photometric,
        software=label,
        metadata=None,
        maxworkers=1,
        buffersize=_BUFFER_BYTES,
        **options,
        **_carried(layer),
    )


def tile_shape(layer: Layer) -> tuple[int, int] | None:
    """Rows and columns of the tiles that *layer* is written in; None: strips."""
    page = layer.keyframe
    if page.is_tiled:
        sides = page.tilelength, page.tilewidth
        usable = all(side % 16 == 0 and side <= _LARGEST_TILE_PX for side in sides)
        return sides if usable else (_TILE_PX, _TILE_PX)
    return (_TILE_PX, _TILE_PX) if layer.height * layer.width > WHOLE_PX else None


def _carried(layer: Layer) -> dict[str, Any]:
    """Tags of the layer's own IFD as arguments of TiffWriter.write."""
    page = layer.page.aspage()
    if layer.offset not in (None, page.dataoffsets[0]):
        return {}  # a later plane of a stack that a single IFD describes
    options: dict[str, Any] = {"extratags": []}
    if 282 in page.tags and 283 in page.tags:
        options["resolution"] = (page.tags[282].value, page.tags[283].value)
        options["resolutionunit"] = page.resolutionunit
    for tag in page.tags:
        if tag.code == _DESCRIPTION:
            options["description"] = _value(layer, tag).rstrip(b"\0")
        elif tag.code in _CARRIED:
            value = _value(layer, tag)
            options["extratags"].append((tag.code, int(tag.dtype), tag.count, value, True))
    return options


def _value(layer: Layer, tag: Any) -> bytes:
    file = layer.page.parent.filehandle
    file.seek(tag.valueoffset)
    return bytes(file.read(tag.valuebytecount))


def _whole(bands: Iterator[Pixels], shape: tuple[int, ...], dtype: np.dtype[Any]) -> Pixels:
    return np.concatenate(list(bands)).reshape(shape).astype(dtype, copy=False)


def _tiles(
    bands: Iterator[Pixels], tile: tuple[int, int], dtype: np.dtype[Any]
) -> Iterator[Pixels]:
    """Bands cut into full tiles, in the order of a TIFF; zeros beyond the picture."""
    for band in bands:
        for y in range(0, band.shape[0], tile[0]):
            for x in range(0, band.shape[1], tile[1]):
                part = band[y : y + tile[0], x : x + tile[1]]
                full = np.zeros((*tile, band.shape[2]), dtype)
                full[: part.shape[0], : part.shape[1]] = part
                yield full if band.shape[2] > 1 else full[..., 0]
        del band, part  # or this band would live on while the next is computed
