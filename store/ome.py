"""OME metadata of a run: what makes the folder an OME-Zarr 0.5 that other programs open.

Two descriptions of the same images: group attributes in JSON (NGFF 0.5: multiscales, omero) and
OME/METADATA.ome.xml (OME model 2016-06), which napari-ome-zarr needs to list the images of a root.
A scale that is not known is 1 without a unit, as NGFF wants it: nothing is invented.
"""

import json
from typing import Any
from xml.sax.saxutils import quoteattr

import msgspec
import numpy as np

from refocus.frame import Pixels

VERSION = "0.5"
_OME = "http://www.openmicroscopy.org/Schemas/OME/2016-06"
_CONTRAST_PX = 65_536
# Emission colours of names as they are used; the first that occurs in a channel's name.
_COLOURS = {
    "dapi": "0000FF", "hoechst": "0000FF", "cfp": "00FFFF", "gfp": "00FF00", "fitc": "00FF00",
    "488": "00FF00", "yfp": "FFFF00", "cy5": "FF00FF", "647": "FF00FF", "640": "FF00FF",
    "tritc": "FF0000", "rfp": "FF0000", "cy3": "FF0000", "cherry": "FF0000", "texas": "FF0000",
    "561": "FF0000", "rhodamine": "FF0000", "405": "0000FF",
}  # fmt: skip
_RGB = {"R": "FF0000", "G": "00FF00", "B": "0000FF"}


class Channel(msgspec.Struct, frozen=True):
    """How a channel is shown."""

    name: str
    colour: str
    """RRGGBB"""
    start: float
    end: float
    """Display window in camera counts."""
    top: float
    """Largest count that a pixel can hold."""


class Image(msgspec.Struct, frozen=True, kw_only=True):
    """One image of the run, raw or refocused."""

    number: int
    name: str
    shape: tuple[int, int, int, int, int]
    """(t, c, z, y, x)"""
    dtype: str
    channels: tuple[Channel, ...]
    pixel_um: float | None
    z_step_um: float | None


def channel(name: str, first_plane: Pixels, bit_depth: int | None) -> Channel:
    """A channel's colour from its name, its display window from its first plane (y, x)."""
    sample = first_plane.ravel()[:: max(1, first_plane.size // _CONTRAST_PX) | 1]
    sample = sample[np.isfinite(sample)]
    start, end = (
        (float(v) for v in np.percentile(sample, (0.1, 99.9))) if sample.size else (0.0, 0.0)
    )
    if first_plane.dtype.kind == "f":
        top = max(end, 1.0)
    else:
        top = float(2 ** (bit_depth or 8 * first_plane.dtype.itemsize) - 1)
    return Channel(name, _colour(name), start, max(end, start + 1.0), top)


def _colour(name: str) -> str:
    stem, _, primary = name.rpartition("-")
    if stem and primary in _RGB:  # one colour of a colour camera
        return _RGB[primary]
    return next((colour for key, colour in _COLOURS.items() if key in name.lower()), "FFFFFF")


def root_group() -> bytes:
    """zarr.json of the run's root."""
    return _group({"version": VERSION, "bioformats2raw.layout": 3})


def series_group(images: int) -> bytes:
    """zarr.json of the group OME: the images in the order of the XML."""
    return _group({"version": VERSION, "series": [str(number) for number in range(images)]})


def image_group(image: Image) -> bytes:
    """zarr.json of an image group."""
    pixel = image.pixel_um
    axes = [
        {"name": "t", "type": "time"},
        {"name": "c", "type": "channel"},
        _space("z", image.z_step_um),
        _space("y", pixel),
        _space("x", pixel),
    ]
    scale = [1.0, 1.0, image.z_step_um or 1.0, pixel or 1.0, pixel or 1.0]
    dataset = {"path": "0", "coordinateTransformations": [{"type": "scale", "scale": scale}]}
    multiscale = {"name": image.name, "axes": axes, "datasets": [dataset]}
    omero = {"name": image.name, "channels": [omero_channel(c) for c in image.channels]}
    return _group({"version": VERSION, "multiscales": [multiscale], "omero": omero})


def _space(name: str, step_um: float | None) -> dict[str, str]:
    axis = {"name": name, "type": "space"}
    return axis if step_um is None else axis | {"unit": "micrometer"}


def omero_channel(channel: Channel) -> dict[str, Any]:
    """As NGFF's omero lists it, the same in 0.4 and 0.5."""
    return {
        "label": channel.name,
        "color": channel.colour,
        "active": True,
        "window": {"min": 0.0, "max": channel.top, "start": channel.start, "end": channel.end},
    }


def _group(ome: dict[str, Any]) -> bytes:
    document = {"zarr_format": 3, "node_type": "group", "attributes": {"ome": ome}}
    return json.dumps(document, indent=1).encode()


def xml(images: list[str]) -> bytes:
    """METADATA.ome.xml of the images, each as `xml_image` wrote it, in order."""
    head = '<?xml version="1.0" encoding="UTF-8"?>\n'
    return f'{head}<OME xmlns="{_OME}">\n{"".join(images)}</OME>\n'.encode()


def xml_image(image: Image) -> str:
    """The Image element: sizes as the array has them now, physical sizes where known."""
    number = image.number
    sizes = zip("TCZYX", image.shape, strict=True)
    attributes = {
        "ID": f"Pixels:{number}",
        "DimensionOrder": "XYZCT",
        "Type": "float" if image.dtype == "float32" else image.dtype,
        **{f"Size{axis}": str(size) for axis, size in sizes},
    }
    steps = {"X": image.pixel_um, "Y": image.pixel_um, "Z": image.z_step_um}
    for axis, step_um in steps.items():
        if step_um is not None:
            attributes |= {f"PhysicalSize{axis}": repr(step_um), f"PhysicalSize{axis}Unit": "µm"}
    channels = "".join(
        f'   <Channel ID="Channel:{number}:{index}" Name={_quoted(channel.name)}'
        ' SamplesPerPixel="1"/>\n'
        for index, channel in enumerate(image.channels)
    )
    pixels = " ".join(f'{key}="{value}"' for key, value in attributes.items())
    return (
        f' <Image ID="Image:{number}" Name={_quoted(image.name)}>\n'
        f"  <Pixels {pixels}>\n{channels}   <MetadataOnly/>\n  </Pixels>\n </Image>\n"
    )


def _quoted(text: str) -> str:
    """An XML attribute value."""
    return quoteattr(legal(text))


def legal(text: str) -> str:
    """*text* with U+FFFD for characters that XML 1.0 cannot hold."""
    kept = "".join(c if c >= " " and c not in "\ufffe\uffff" else "\ufffd" for c in text)
    return kept.encode("utf-8", "replace").decode()
