"""What anybody's objects become on their way into the journal: plain JSON, whatever they were.

Micro-Manager and user code put what they like into tags, axes and settings. None of it may break a
line, and none of it costs a plane.
"""

import math
from collections.abc import Mapping
from typing import Any

import msgspec

from refocus.frame import FrameHeader
from store.layout import RunInfo


def plain(value: object) -> Any:
    """*value* as JSON can hold it: non-finite numbers and unknown objects become text.

    Micro-Manager and user code put whatever they like into tags; none of it may break a line.
    """
    match value:
        case None | bool():
            return value
        case str():
            return value.encode(
                "utf-8", "backslashreplace"
            ).decode()  # a lone surrogate is not UTF-8
        case int():
            return int(value) if -(2**63) <= value < 2**64 else str(value)
        case float():
            return float(value) if math.isfinite(value) else str(value)
        case Mapping():
            return {str(plain(key)): plain(item) for key, item in value.items()}
        case list() | tuple():
            return [plain(item) for item in value]
    if hasattr(value, "tolist"):  # numpy scalars and arrays
        return plain(value.tolist())
    return plain(str(value))


def plain_tags(tags: Mapping[str, object]) -> dict[str, Any]:
    """`plain` of every tag; a note stands in place of one that cannot be converted.

    A tag may contain itself, or be an object whose own methods fail. No plane is lost for that.
    """
    return {
        # Nearly all of Micro-Manager's tags are such text; a hundred of them come with a frame.
        key if type(key) is str and key.isascii() else str(plain(key)): value
        if type(value) is str and value.isascii()
        else _plain_or_note(value)
        for key, value in tags.items()
    }


def _plain_or_note(value: object) -> Any:
    try:
        return plain(value)
    except Exception as error:  # noqa: BLE001  # a tag can be anybody's object
        return f"(left out: {type(value).__name__} cannot be written, {type(error).__name__})"


def plain_header(header: FrameHeader) -> FrameHeader:
    """The header with axis values that are whole numbers or text, and text that is UTF-8.

    True and False become text: as numbers they would share the slots of 1 and 0.
    """
    axes = {
        key: value if type(value) in (int, str) else str(value)
        for key, value in plain_tags(header.axes).items()
    }
    return msgspec.structs.replace(
        header, axes=axes, channel=plain(header.channel), camera=plain(header.camera)
    )


def plain_info(info: RunInfo) -> RunInfo:
    """What is known of a run, its settings and microscope as JSON can hold them."""
    return msgspec.structs.replace(
        info, settings=plain(info.settings), microscope=plain(info.microscope)
    )
