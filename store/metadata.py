"""What the metadata files of a run should say once it is sealed, and what they say.

Two jobs: reading an image's group back (channels and their display windows, the z step), because
not all of it can be told from the journal again; and listing every metadata file with the content
it should have, in an order in which a run stays valid while they are written one by one.

A group that says more than it must (the levels of a pyramid) is right as it is.
"""

import json
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from store import ome
from store.layout import Pair, array_dir, image_dir
from store.planes import PlaneArray

RAW, REFOCUSED = "raw", "refocused"


class Described(NamedTuple):
    """What an image's group on disk says."""

    channels: tuple[ome.Channel, ...]
    pixel_um: float | None
    z_step_um: float | None


class PairImages(NamedTuple):
    """A pair, its two arrays (with the metadata they should have), and how it is shown."""

    pair: Pair
    raw: PlaneArray
    refocused: PlaneArray
    channels: tuple[ome.Channel, ...]
    z_step_um: float | None

    def images(self) -> tuple[ome.Image, ome.Image]:
        """Raw and refocused."""
        return self._image(0, RAW, self.raw), self._image(1, REFOCUSED, self.refocused)

    def _image(self, twin: int, what: str, array: PlaneArray) -> ome.Image:
        return ome.Image(
            number=2 * self.pair.number + twin,
            name=f"{self.pair.name} {what}".strip(),
            shape=array.shape,
            dtype=self.pair.form.dtype,
            channels=self.channels,
            pixel_um=self.pair.form.pixel_um,
            z_step_um=self.z_step_um,
        )


def describe(run: Path, image: int) -> Described | None:
    """What an image's group says; None where there is none, or it cannot be read."""
    try:
        group = json.loads((image_dir(run, image) / "zarr.json").read_bytes())["attributes"]["ome"]
        (multiscale,) = group["multiscales"]
        steps = multiscale["datasets"][0]["coordinateTransformations"][0]["scale"]
        units = [axis.get("unit") for axis in multiscale["axes"]]
        _, _, z, _, x = (step if unit else None for step, unit in zip(steps, units, strict=True))
        return Described(tuple(_channel(one) for one in group["omero"]["channels"]), x, z)
    except (OSError, ValueError, KeyError, TypeError, IndexError, AttributeError):
        return None


def _channel(omero: dict[str, Any]) -> ome.Channel:
    window = omero["window"]
    return ome.Channel(
        omero["label"], omero["color"], window["start"], window["end"], window["max"]
    )


def differing(run: Path, pairs: Sequence[PairImages]) -> Iterator[tuple[Path, bytes]]:
    """Every metadata file that is missing or says something else, and what it should hold.

    In the order in which to write them: whatever is listed is there. Raises OSError.
    """
    images = [image for pair in pairs for image in pair.images()]
    arrays = [array for pair in pairs for array in (pair.raw, pair.refocused)]
    for image, array in zip(images, arrays, strict=True):
        path = array_dir(run, image.number) / "zarr.json"
        if not _same(_read(path), array.zarr_json()):
            yield path, array.zarr_json()
    for image in images:
        path, content = image_dir(run, image.number) / "zarr.json", ome.image_group(image)
        if not _says(_read(path), content):
            yield path, content
    if images:
        lists = {
            run / "OME" / "zarr.json": ome.series_group(len(images)),
            run / "OME" / "METADATA.ome.xml": ome.xml([ome.xml_image(one) for one in images]),
            run / "zarr.json": ome.root_group(),
        }
        yield from ((path, content) for path, content in lists.items() if _read(path) != content)


def _read(path: Path) -> bytes | None:
    try:
        return path.read_bytes()
    except (FileNotFoundError, NotADirectoryError):
        return None


def _same(found: bytes | None, wanted: bytes) -> bool:
    """Whether two texts are the same JSON, whoever wrote it."""
    try:
        return bool(json.loads(found or b"") == json.loads(wanted))
    except ValueError:
        return False


def _says(found: bytes | None, wanted: bytes) -> bool:
    """Whether a group is the one wanted; it may have more levels and more keys."""
    try:
        document, group = json.loads(found or b""), json.loads(wanted)
        (has,), (must,) = (d["attributes"]["ome"].pop("multiscales") for d in (document, group))
        levels = has.pop("datasets")[:1], must.pop("datasets")
        extra = document["attributes"].pop("ome"), group["attributes"].pop("ome")
    except (ValueError, KeyError, TypeError, IndexError, AttributeError):
        return False
    return (
        levels[0] == levels[1]
        and all(has.get(key) == value for key, value in must.items())
        and all(extra[0].get(key) == value for key, value in extra[1].items())
        and all(document.get(key) == group[key] for key in ("zarr_format", "node_type"))
    )
