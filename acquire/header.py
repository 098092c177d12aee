"""From what Micro-Manager says about a frame to a complete `FrameHeader`, whatever path it took.

Micro-Manager's metadata differ by path: a snap carries ints and no pixel type, a hardware sequence
carries strings and the camera's image number; neither carries the true stage position or the bit
depth. Those are read in the post-hardware hook (`Hardware`), where they cost no frame anything.

z_um is the event's own z where the frame has one; else the stage as read after the hardware moved,
which holds for every frame of a sequence that does not move z; else unknown.

A colour camera delivers one exposure as B, G, R, A samples. It becomes three planes, a frame each,
in the channels NAME-R, NAME-G and NAME-B.
"""

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt

from refocus.errors import RejectedError
from refocus.frame import FrameHeader, Pixels, ZSource

DEFAULT_CHANNEL = "Default"
"""Name of the channel of frames that have none; Micro-Manager's own word for it."""

_RGB_TYPES = {"RGB32", "RGB64"}
_BGRA_SAMPLES = {"uint32": "<u1", "uint64": "<u2"}


@dataclass(frozen=True, slots=True)
class Hardware:
    """What the core said after the hardware moved and before the camera started."""

    x_um: float | None = None
    y_um: float | None = None
    z_um: float | None = None
    bit_depth: int | None = None
    components: int | None = None
    """Samples a pixel: 1 grey, 4 colour (B, G, R, A)."""


UNKNOWN = Hardware()


def split(
    image: npt.NDArray[Any], metadata: Mapping[str, Any], hardware: Hardware
) -> dict[str, Pixels]:
    """The planes of an exposure by channel suffix: {"": grey} or {"-R": …, "-G": …, "-B": …}.

    *image* is as Micro-Manager's hook delivers it: (y, x) uint8, uint16 or float32; uint32 or
    uint64 holding B, G, R, A; or (y, x, 3) uint8. Raises RejectedError for anything else.
    """
    kind = str(image.dtype)
    if image.ndim == 3 and image.shape[2] == 3 and kind == "uint8":
        return _planes(image, "RGB")
    if image.ndim != 2 or 0 in image.shape:
        raise RejectedError(
            f"an image must be (y, x), or (y, x, 3) uint8, got {image.shape} {kind}"
        )
    if kind in ("uint8", "uint16", "float32"):
        return {"": np.ascontiguousarray(image)}
    coloured = metadata.get("PixelType") in _RGB_TYPES or hardware.components == 4
    if kind in _BGRA_SAMPLES and (coloured or kind == "uint64"):
        samples = np.ascontiguousarray(image).view(_BGRA_SAMPLES[kind])
        return _planes(samples.reshape(*image.shape, 4), "BGR")
    if kind == "uint32" and hardware.components == 1:
        return {"": np.ascontiguousarray(image).view(np.float32)}  # GRAY32: bits of a float
    raise RejectedError(
        f"pixels are {kind}; wanted 8 or 16 bit grey, 32 bit float or colour. "
        "Set the camera's PixelType to one of these"
    )


def _planes(samples: npt.NDArray[Any], order: str) -> dict[str, Pixels]:
    return {f"-{c}": np.ascontiguousarray(samples[..., order.index(c)]) for c in "RGB"}


def build(
    metadata: Mapping[str, Any],
    pixels: Pixels,
    suffix: str,
    hardware: Hardware,
    *,
    run: str,
    seq: int,
    wall_time_ns: int,
    hook_time_ns: int,
) -> FrameHeader:
    """Header of one plane; *suffix* is the colour ("-R") or empty, times are the hook's."""
    given = metadata.get("Axes")
    axes = {_text(k): _axis(v) for k, v in given.items()} if isinstance(given, Mapping) else {}
    channel = str(axes.get("channel", DEFAULT_CHANNEL)) + suffix
    if suffix:
        axes["channel"] = channel
    z_um, z_source = _z(metadata, hardware)
    x_um, y_um = (_number(metadata.get(f"{a}Position_um_Intended")) for a in "XY")
    pixel_um = _number(metadata.get("PixelSize_um"))
    image_number = _number(metadata.get("ImageNumber"))
    return FrameHeader(
        run=run,
        seq=seq,
        axes=axes,
        camera=_text(metadata.get("Camera") or ""),
        channel=channel,
        shape=(pixels.shape[0], pixels.shape[1]),
        dtype=str(pixels.dtype),
        bit_depth=hardware.bit_depth,
        pixel_um=pixel_um if pixel_um and pixel_um > 0 else None,  # Micro-Manager: 0 = not known
        exposure_ms=_number(metadata.get("Exposure")),
        x_um=hardware.x_um if x_um is None else x_um,
        y_um=hardware.y_um if y_um is None else y_um,
        z_um=z_um,
        z_source=z_source,
        image_number=None if image_number is None else int(image_number),
        wall_time_ns=wall_time_ns,
        hook_time_ns=hook_time_ns,
    )


def _z(metadata: Mapping[str, Any], hardware: Hardware) -> tuple[float | None, ZSource]:
    intended = _number(metadata.get("ZPosition_um_Intended"))
    if intended is not None:
        return intended, "intended"
    if hardware.z_um is not None:
        return hardware.z_um, "stage"
    return None, "none"


def _axis(value: Any) -> int | str:
    """A whole number, numpy's among them, or the text of anything else: no axis is refused."""
    number = None if isinstance(value, str) else _number(value)
    return int(number) if number is not None and number.is_integer() else _text(value)


def _text(value: Any) -> str:
    # A configuration file in Latin-1 gives names with lone surrogates, which no JSON can hold.
    return str(value).encode("utf-8", "replace").decode()


def _number(value: Any) -> float | None:
    """*value* as a finite float, from a number or its text; None for everything else."""
    if value is None or isinstance(value, bool):
        return None
    try:
        number = float(value)
    except (TypeError, ValueError):
        return None
    return number if math.isfinite(number) else None
