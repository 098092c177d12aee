"""The OME-XML (model 2016-06) of exported images: in the head of an OME-TIFF, beside an OME-Zarr.

Every plane has its element, in the order of the file, because Bio-Formats counts them; one that is
absent has a place there but no time and no exposure. What the model has no word for (who computed
the image, which planes are absent) stands in a map annotation of the image.
"""

from importlib.metadata import version
from typing import Any
from xml.etree import ElementTree

import msgspec
import numpy as np

from store.export_images import ExportImage, Slot
from store.ome import legal

_NAMESPACE = "http://www.openmicroscopy.org/Schemas/OME/2016-06"
_XSI = "http://www.w3.org/2001/XMLSchema-instance"
_ANNOTATION = "refocus/export"


def ome_xml(images: list[ExportImage], *, in_tiff: bool) -> bytes:
    """The document, UTF-8. *in_tiff*: plane i of the one image is page i of the file it is in."""
    root = ElementTree.Element(
        "OME",
        {
            "xmlns": _NAMESPACE,
            "xmlns:xsi": _XSI,
            "xsi:schemaLocation": f"{_NAMESPACE} {_NAMESPACE}/ome.xsd",
            "Creator": f"Refocus {version('refocus')}",
        },
    )
    for number, image in enumerate(images):
        _add_image(root, image, number, in_tiff)
    annotations = _add(root, "StructuredAnnotations")
    for number, image in enumerate(images):
        _add_annotation(annotations, image, number)
    document: bytes = ElementTree.tostring(root, encoding="utf-8", xml_declaration=True)
    return document


def facts(image: ExportImage) -> dict[str, Any]:
    """What the formats' own metadata cannot say, as JSON can hold it.

    The lists of planes are [t, c, z], from 0.
    """
    told: dict[str, Any] = {
        "run": image.run.path.resolve().name,
        "run_id": image.run.notes.info.run_id if image.run.notes.info else "",
        "run_state": str(image.run.state),
        "image": image.what,
        "computed": image.what == "refocused",
        "absent_planes": [list(slot) for slot in image.absent],
        "damaged_planes": [list(slot) for slot in sorted(image.damaged)],
    }
    if image.what == "refocused":
        told["generators"] = [
            {
                "name": line.name,
                "version": line.version,
                "package_sha256": line.package_hash,
                "runtime": line.runtime,
            }
            for line in image.generators
        ]
        told["scaling"] = {
            name: {"offset": line.offset, "scale": line.scale}
            for name, line in image.run.notes.scalings.items()
            if name in image.pair.channels
        }
    return told


def _add_image(root: ElementTree.Element, image: ExportImage, number: int, in_tiff: bool) -> None:
    element = _add(root, "Image", ID=f"Image:{number}", Name=image.name)
    if image.begun_ns:
        begun = np.datetime64(image.begun_ns, "ns")
        _add(element, "AcquisitionDate").text = str(begun.astype("datetime64[us]"))
    _add(element, "Description").text = legal(_description(image))
    pixels = _add(element, "Pixels", **_pixels(image, number))
    for index, channel in enumerate(image.channels):
        _add(
            pixels,
            "Channel",
            ID=f"Channel:{number}:{index}",
            Name=channel.name,
            SamplesPerPixel=1,
            Color=_signed_rgba(channel.colour),
            **_emission(image, channel.name),
        )
    slots = image.slots
    if in_tiff:
        _add(pixels, "TiffData", IFD=0, PlaneCount=len(slots))
    else:
        _add(pixels, "MetadataOnly")
    for slot in slots:
        _add(pixels, "Plane", **_plane(image, slot))
    _add(element, "AnnotationRef", ID=f"Annotation:{number}")


def _description(image: ExportImage) -> str:
    """In words, for whoever opens the image: what it is, and what is not in it."""
    if image.what == "raw":
        text = "Raw planes, as the camera delivered them."
    else:
        makers = ", ".join(
            f"{g.name} {g.version} ({g.package_hash[:12]})" for g in image.generators
        )
        text = (
            f"Computed from the raw planes by Refocus (generator {makers or 'unknown'}): "
            "an estimate, not a measurement. Measure intensities on the raw image."
        )
    if missing := len(image.absent) + len(image.damaged):
        text += f" {missing} of {len(image.slots)} planes are absent, and zeros stand in."
    return text


def _pixels(image: ExportImage, number: int) -> dict[str, Any]:
    t, c, z, y, x = image.shape
    attributes: dict[str, Any] = {
        "ID": f"Pixels:{number}",
        "DimensionOrder": "XYZCT",
        "Type": "float" if image.dtype.kind == "f" else image.dtype.name,
        "BigEndian": "false",
        "SizeX": x,
        "SizeY": y,
        "SizeZ": z,
        "SizeC": c,
        "SizeT": t,
    }
    bits = max(int(channel.top).bit_length() for channel in image.channels)
    if image.dtype.kind == "u" and bits < 8 * image.dtype.itemsize:
        attributes["SignificantBits"] = bits
    pixel_um = image.pair.pixel_um
    for axis, step_um in {"X": pixel_um, "Y": pixel_um, "Z": image.z_step_um}.items():
        if step_um is not None:
            attributes |= {f"PhysicalSize{axis}": step_um, f"PhysicalSize{axis}Unit": "µm"}
    if image.time_step_s is not None:
        attributes |= {"TimeIncrement": image.time_step_s, "TimeIncrementUnit": "s"}
    return attributes


def _plane(image: ExportImage, slot: Slot) -> dict[str, Any]:
    """Times in s since AcquisitionDate, positions in um."""
    t, c, z = slot
    attributes: dict[str, Any] = {"TheZ": z, "TheT": t, "TheC": c}
    if slot not in image.present or slot in image.damaged:
        return attributes
    known = image.frames[slot]
    if known.wall_ns:
        since_s = (known.wall_ns - image.begun_ns) / 1e9
        attributes |= {"DeltaT": since_s, "DeltaTUnit": "s"}
    if known.exposure_ms is not None:
        attributes |= {"ExposureTime": known.exposure_ms, "ExposureTimeUnit": "ms"}
    for axis, at_um in {"X": known.x_um, "Y": known.y_um, "Z": known.z_um}.items():
        if at_um is not None:
            attributes |= {f"Position{axis}": at_um, f"Position{axis}Unit": "µm"}
    return attributes


def _emission(image: ExportImage, channel: str) -> dict[str, Any]:
    info = image.run.notes.info
    known = info.settings.get("channels", {}).get(channel, {}) if info else {}
    emission_nm = known.get("emission_nm")
    if not emission_nm:
        return {}
    return {"EmissionWavelength": emission_nm, "EmissionWavelengthUnit": "nm"}


def _signed_rgba(colour: str) -> int:
    """OME's Color: red, green, blue, alpha as one signed 32-bit number."""
    return int.from_bytes(bytes.fromhex(colour + "FF"), "big", signed=True)


def _add_annotation(parent: ElementTree.Element, image: ExportImage, number: int) -> None:
    annotation = _add(parent, "MapAnnotation", ID=f"Annotation:{number}", Namespace=_ANNOTATION)
    value = _add(annotation, "Value")
    for key, told in facts(image).items():
        text = told if isinstance(told, str) else msgspec.json.encode(told).decode()
        _add(value, "M", K=key).text = legal(text)


def _add(parent: ElementTree.Element, tag: str, /, **attributes: Any) -> ElementTree.Element:
    texts = {key: legal(str(value)) for key, value in attributes.items()}
    return ElementTree.SubElement(parent, tag, texts)
