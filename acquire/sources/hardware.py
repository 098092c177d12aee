"""Reads from Micro-Manager's core what frame metadata do not carry: stage, bit depth, colour."""

import contextlib
from collections.abc import Callable
from typing import Any

from acquire.header import Hardware
from refocus.errors import SettingsError


def hardware_reader() -> Callable[[], Hardware]:
    """A function that asks the running core, of the Python or the Java backend."""
    try:
        from mmpycorex import Core
    except ImportError as error:
        raise SettingsError(
            f"pycromanager cannot be imported ({error}). Install it: "
            'pip install "refocus[micromanager]"'
        ) from error
    core: Any = None

    def read() -> Hardware:
        nonlocal core
        if core is None:
            core = Core()  # not before the first frame: the user's script may start it later
        x_um = y_um = z_um = None
        with contextlib.suppress(Exception):  # no XY stage: the core raises, position stays unknown
            if core.get_xy_stage_device():
                x_um, y_um = float(core.get_x_position()), float(core.get_y_position())
        with contextlib.suppress(Exception):
            if core.get_focus_device():
                z_um = float(core.get_position())
        return Hardware(
            x_um=x_um,
            y_um=y_um,
            z_um=z_um,
            bit_depth=int(core.get_image_bit_depth()),
            components=int(core.get_number_of_components()),
        )

    return read
