"""The demo microscope: Micro-Manager's own core, headless, in front of a simulated specimen.

Stages, channels, exposures, positions, events, hooks, threads and metadata are Micro-Manager's own
(pycromanager's Python backend with the devices of mm-test-adapters, set up by demo.cfg). Only the
pixels are ours: the picture of Micro-Manager's DemoCamera does not depend on focus, so `wrap` puts
a specimen in front of it that does (`acquire.sources.specimen`). A frame's pixels follow from what
its metadata say about channel and stage; nothing is counted here, so a frame with wrong metadata
shows a wrong picture.

One microscope at a time in a process; it leaves no thread behind, and the next one works.
"""

import contextlib
import json
import math
import threading
import zlib
from collections.abc import Callable
from pathlib import Path
from types import TracebackType
from typing import Any, Self

import numpy as np
import numpy.typing as npt

from acquire.sources.acquisition import Event, Hook, Metadata, acquisition_class
from acquire.sources.specimen import PIXEL_UM, STAINS, Specimen
from calibration.optics import Image
from refocus.errors import SettingsError, StuckError
from refocus.frame import FrameHeader
from refocus.words import install

CONFIG = Path(__file__).with_name("demo.cfg")
CHANNELS = tuple(STAINS)
Z_UM = (-2.5, -1.25, 0.0, 1.25, 2.5)
"""One plane in focus, four out of it by 1.2 to 3 depths of field, as in a stack through a cell."""
POSITIONS = ("A", "B")
FRAMES_PER_S = 10.0
EXPOSURE_SHARE = 0.4
"""Of the time between two frames: the rest is for the stage, as on a real microscope."""
MAX_SIZE_PX = 4096
BUFFER_MIB = 128
STOP_S = 5.0


class DemoMicroscope:
    """A context manager: inside it, Micro-Manager's core runs in this process.

    *size_px* is the side of a frame; *specimen* False keeps the camera's own pixels; *progress* is
    called with the share of the rendering that is done, 0 to 1. Leaving raises `StuckError` where
    the core does not stop.
    """

    def __init__(
        self,
        size_px: int = 512,
        *,
        specimen: bool = True,
        seed: int = 0,
        progress: Callable[[float], None] | None = None,
    ) -> None:
        if not 32 <= size_px <= MAX_SIZE_PX:
            raise SettingsError(f"demo: size must be 32 to {MAX_SIZE_PX} pixels, got {size_px}")
        acquisition_class()  # fails here, before the rendering, where pycromanager is missing
        self.size_px = size_px
        self._specimen = (
            Specimen(size_px, seed=seed, z_range_um=max(Z_UM), progress=progress)
            if specimen
            else None
        )
        self._core: Any = None

    def __enter__(self) -> Self:
        self._core = start_core(CONFIG)
        try:
            self._core.set_property("Camera", "OnCameraCCDXSize", self.size_px)
            self._core.set_property("Camera", "OnCameraCCDYSize", self.size_px)
            # The camera's own waves cost 3 ms at 512²; nobody sees them behind a specimen.
            self._core.set_property("Camera", "FastImage", int(self._specimen is not None))
        except BaseException:
            stop_core()
            raise
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self._core = None
        try:
            stop_core()
        except StuckError:
            if not isinstance(error, StuckError):  # the first one says more
                raise

    def events(self, frames: int, frames_per_s: float = FRAMES_PER_S) -> list[Event]:
        """*frames* events of a time-lapse of z-stacks: time, position, channel, z (the innermost).

        Paced evenly at *frames_per_s*, at which one CPU core about keeps up with 512² frames.
        """
        if frames < 1:
            raise SettingsError(f"demo: frames must be at least 1, got {frames}")
        from pycromanager import multi_d_acquisition_events

        step_um = self.size_px * PIXEL_UM * 0.75
        per_time_point = len(POSITIONS) * len(CHANNELS) * len(Z_UM)
        events: list[Event] = multi_d_acquisition_events(
            num_time_points=math.ceil(frames / per_time_point),
            channel_group="Channel",
            channels=list(CHANNELS),
            channel_exposures_ms=[1000 / frames_per_s * EXPOSURE_SHARE] * len(CHANNELS),
            xy_positions=[(index * step_um, index * step_um) for index in range(len(POSITIONS))],
            position_labels=list(POSITIONS),
            z_start=Z_UM[0],
            z_end=Z_UM[-1],
            z_step=Z_UM[1] - Z_UM[0],
            order="tpcz",
        )
        for index, event in enumerate(events):
            event["min_start_time"] = index / frames_per_s
        return events[:frames]

    def wrap(self, image_process_fn: Hook) -> Hook:
        """The hook to give to the acquisition: *image_process_fn* gets the specimen's pixels.

        z is the frame's own (`ZPosition_um_Intended`); where the acquisition moves no z, so that a
        frame has none, the stage stands still and is read. The same holds for x and y.
        """
        if self._specimen is None:
            return image_process_fn

        def imaged(image: npt.NDArray[Any], metadata: Metadata) -> Any:
            return image_process_fn(self._photograph(metadata), metadata)

        return imaged

    def truth_for(self, header: FrameHeader) -> Image | None:
        """Noise-free counts (y, x), in focus, of what *header* shows; None with camera pixels."""
        if self._specimen is None:
            return None
        return self._specimen.truth(header.channel, header.x_um or 0.0, header.y_um or 0.0)

    def _photograph(self, metadata: Metadata) -> npt.NDArray[np.uint16]:
        assert self._specimen is not None
        axes = metadata["Axes"]
        # The noise of a frame depends on its axes, not on when it came: a run can be repeated.
        noise = zlib.crc32(json.dumps(axes, sort_keys=True).encode())
        places = (
            ("ZPosition_um_Intended", "get_position"),
            ("XPosition_um_Intended", "get_x_position"),
            ("YPosition_um_Intended", "get_y_position"),
        )
        z_um, x_um, y_um = (
            metadata[key] if key in metadata else getattr(self._core, ask)() for key, ask in places
        )
        return self._specimen.image(axes.get("channel", CHANNELS[0]), z_um, x_um, y_um, noise)


def start_core(config: Path, buffer_mib: int = BUFFER_MIB) -> Any:
    """Start Micro-Manager's core and acquisition engine in this process with *config*.

    Devices come from mm-test-adapters. Raises `SettingsError` where that is not installed, or where
    a core runs in this process already (the engine is a singleton).
    """
    acquisition_class()
    try:
        from mm_test_adapters import device_adapter_path
    except ImportError as error:
        raise SettingsError(
            "Micro-Manager's test devices are not installed: "
            f"{install('demo')} (they are the package mm-test-adapters)"
        ) from error
    from mmpycorex import Core, is_pymmcore_active
    from pycromanager import start_headless

    if is_pymmcore_active():
        raise SettingsError("a Micro-Manager core runs in this process already: stop it first")
    start_headless(
        device_adapter_path(), str(config.resolve()), python_backend=True, buffer_size_mb=buffer_mib
    )
    return Core()


def stop_core() -> None:
    """Unload the devices and end the engine's threads, so that another core can start.

    Raises `StuckError` where that takes longer than STOP_S: a thread of Micro-Manager's hangs.
    """
    stopper = threading.Thread(target=_stop_core, name="stop-core", daemon=True)
    stopper.start()
    stopper.join(STOP_S)
    if stopper.is_alive():
        raise StuckError(
            f"Micro-Manager's core did not stop within {STOP_S:.0f} s: one of its threads is "
            "stuck. Restart this process"
        )


def _stop_core() -> None:
    from pycromanager import stop_headless
    from pycromanager.acquisition.acq_eng_py.internal.engine import Engine

    stop_headless()
    # stop_headless forgets this one: the next core would talk to the engine of the last.
    with contextlib.suppress(AttributeError):
        del Engine.singleton
