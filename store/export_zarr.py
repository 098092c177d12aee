"""OME-Zarr 0.4 (Zarr v2) of exported images, for programs that do not open 0.5.

The layout is bioformats2raw's: numbered image groups and OME/METADATA.ome.xml, which Bio-Formats
and napari-ome-zarr list. Chunks are one plane or a tile of it, uncompressed or zlib, because these
are what every reader has without a native library. A plane that is absent is a chunk that is not
there, which reads as 0; one that is black is stored.
"""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any, Literal

import zarr
from zarr.core.common import JSON

from refocus.frame import Pixels
from store.export_images import ExportImage
from store.export_xml import facts, ome_xml
from store.ome import omero_channel
from store.pyramid import datasets, halved, level_shapes

Compression = Literal["none", "zlib"]

_CHUNK_PX = 1024
_ZLIB: dict[str, JSON] = {"id": "zlib", "level": 1}


def write_zarr(
    images: list[ExportImage], path: Path, compression: Compression, tell: Callable[[], None]
) -> None:
    """Write *images* into the empty folder *path*; *tell* is called after every plane. OSError."""
    _group(path, {"bioformats2raw.layout": 3})
    for number, image in enumerate(images):
        _write_image(image, path / str(number), compression, tell)
        _group(path / str(number), _attributes(image))
    _group(path / "OME", {"series": [str(number) for number in range(len(images))]})
    (path / "OME" / "METADATA.ome.xml").write_bytes(ome_xml(images, in_tiff=False))


def _group(path: Path, attributes: dict[str, Any]) -> None:
    path.mkdir(exist_ok=True)
    (path / ".zgroup").write_text(json.dumps({"zarr_format": 2}))
    (path / ".zattrs").write_text(json.dumps(attributes, indent=1))


def _write_image(
    image: ExportImage, path: Path, compression: Compression, tell: Callable[[], None]
) -> None:
    arrays = [
        zarr.create_array(
            store=path / str(level),
            shape=(*image.shape[:3], *shape),
            chunks=(1, 1, 1, *(min(side, _CHUNK_PX) for side in shape)),
            dtype=image.dtype,
            compressors=_ZLIB if compression == "zlib" else None,
            chunk_key_encoding={"name": "v2", "separator": "/"},
            fill_value=0,
            zarr_format=2,
            config={"write_empty_chunks": True},
        )
        for level, shape in enumerate(level_shapes(*image.shape[3:]))
    ]
    for slot in image.slots:
        plane = image.read(slot)
        if plane is not None:
            _write_plane(arrays, slot, plane)
        tell()


def _write_plane(arrays: list[zarr.Array[Any]], slot: tuple[int, int, int], plane: Pixels) -> None:
    for level, array in enumerate(arrays):
        if level:
            plane = halved(plane)
        array[slot] = plane


def _attributes(image: ExportImage) -> dict[str, Any]:
    space = {"type": "space"}
    pixel = space | ({"unit": "micrometer"} if image.pair.pixel_um else {})
    axes = [
        {"name": "t", "type": "time"} | ({"unit": "second"} if image.time_step_s else {}),
        {"name": "c", "type": "channel"},
        {"name": "z"} | space | ({"unit": "micrometer"} if image.z_step_um else {}),
        {"name": "y"} | pixel,
        {"name": "x"} | pixel,
    ]
    multiscale = {
        "version": "0.4",
        "name": image.name,
        "axes": axes,
        "datasets": datasets(image.scale, len(level_shapes(*image.shape[3:]))),
        "type": "mean",
    }
    omero = {
        "version": "0.4",
        "name": image.name,
        "channels": [omero_channel(channel) for channel in image.channels],
    }
    return {"multiscales": [multiscale], "omero": omero, "refocus": facts(image)}
