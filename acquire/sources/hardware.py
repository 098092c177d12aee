"""Reads from Micro-Manager's core what frame metadata do not carry: stage, bit depth, colour.

It is read between the hardware's move and the exposure, so every call delays the exposure, and a
stage on a serial line takes tens of milliseconds to answer. So a stage is asked only for what the
event itself does not say, and once for x and y together; bit depth and components are the camera
adapter's own variables.
"""

import contextlib
from collections.abc import Callable, Mapping
from typing import Any

from acquire.header import Hardware
from refocus.errors import SettingsError
from refocus.words import install


def hardware_reader() -> Callable[[Mapping[str, Any]], Hardware]:
    """A function that asks the running core, of the Python or the Java backend.

    It takes the event as the post-hardware hook gets it, of a hardware sequence the first, and
    leaves None what the event says itself: that stands in the frame's metadata.
    """
    try:
        from mmpycorex import Core
    except ImportError as error:
        raise SettingsError(
            f"pycromanager cannot be imported ({error}). Install it: {install('micromanager')}"
        ) from error
    core: Any = None

    def read(event: Mapping[str, Any]) -> Hardware:
        nonlocal core
        if core is None:
            core = Core()  # not before the first frame: the user's script may start it later
        x_um = y_um = z_um = None
        with contextlib.suppress(Exception):  # whatever a stage raises: its position stays unknown
            x_um, y_um = _xy_um(core, event)
        with contextlib.suppress(Exception):
            z_um = _z_um(core, event)
        return Hardware(
            x_um=x_um,
            y_um=y_um,
            z_um=z_um,
            bit_depth=int(core.get_image_bit_depth()),
            components=int(core.get_number_of_components()),
        )

    return read


def _xy_um(core: Any, event: Mapping[str, Any]) -> tuple[float | None, float | None]:
    said = event.get("x") is not None and event.get("y") is not None  # one alone moves nothing
    if said or not core.get_xy_stage_device():
        return None, None
    if hasattr(core, "get_xy_stage_position"):  # Java: a Point2D
        point = core.get_xy_stage_position()
        x_um, y_um = point.x, point.y
    else:
        x_um, y_um = core.get_xy_position()
    return float(x_um) + 0.0, float(y_um) + 0.0  # + 0.0: a stage at rest may say -0.0


def _z_um(core: Any, event: Mapping[str, Any]) -> float | None:
    if event.get("z") is not None:
        return None
    focus = core.get_focus_device()
    if not focus or focus in {device for device, _ in event.get("stage_positions") or ()}:
        return None
    return float(core.get_position()) + 0.0
