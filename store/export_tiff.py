"""OME-TIFF of exported images: one image a file, one plane a page.

Fiji, QuPath and everything else on Bio-Formats then open a file without asking which image of it is
meant. Planes wider or higher than `WHOLE_PX` are tiled and carry their pyramid as SubIFDs, without
which QuPath would make one of its own. More than 4 GB becomes BigTIFF. One plane is in memory.

The OME-XML replaces a placeholder at the end, when every plane has been read: only then is it known
which ones are damaged.
"""

from collections.abc import Callable
from importlib.metadata import version
from pathlib import Path
from typing import Any, Literal

import numpy as np
from tifffile import TiffWriter, tiffcomment

from refocus.frame import Pixels
from store.export_images import ExportImage
from store.export_xml import ome_xml
from store.pyramid import halved, level_shapes

Compression = Literal["none", "zlib"]

WHOLE_PX = 4096
_TILE_PX = 512
_BIGTIFF_BYTES = (4 << 30) - (64 << 20)
_PLACEHOLDER = b"OME-XML follows when all planes are written"


def write_tiff(
    image: ExportImage, path: Path, compression: Compression, tell: Callable[[], None]
) -> None:
    """Write *image* to the new file *path*; *tell* is called after every plane. Raises OSError."""
    slots = image.slots
    expected = len(slots) * image.plane_bytes * (4 / 3 if _levels(image) else 1)
    with TiffWriter(path, bigtiff=expected > _BIGTIFF_BYTES, byteorder="<") as writer:
        for number, slot in enumerate(slots):
            plane = image.read(slot)
            if plane is None:
                plane = np.zeros(image.shape[3:], image.dtype)
            _write_plane(writer, plane, image, compression, first=number == 0)
            tell()
    tiffcomment(path, ome_xml([image], in_tiff=True))


def _write_plane(
    writer: TiffWriter, plane: Pixels, image: ExportImage, compression: Compression, *, first: bool
) -> None:
    levels = _levels(image)
    options: dict[str, Any] = {"metadata": None, "photometric": "minisblack"}
    if levels:
        options["tile"] = (_TILE_PX, _TILE_PX)
    if compression == "zlib":
        options |= {"compression": "zlib", "predictor": True, "maxworkers": 1}
    if pixel_um := image.pair.pixel_um:
        options |= {"resolution": (1e4 / pixel_um, 1e4 / pixel_um), "resolutionunit": "CENTIMETER"}
    writer.write(
        plane,
        subifds=levels,
        description=_PLACEHOLDER if first else None,
        software=f"Refocus {version('refocus')}",
        **options,
    )
    options.pop("resolution", None)  # a SubIFD is the same picture: Bio-Formats takes level 0's
    options.pop("resolutionunit", None)
    for _ in range(levels):
        plane = halved(plane)
        writer.write(plane, subfiletype=1, **options)


def _levels(image: ExportImage) -> int:
    """Levels beside the full one."""
    y, x = image.shape[3:]
    return len(level_shapes(y, x)) - 1 if max(y, x) > WHOLE_PX else 0
