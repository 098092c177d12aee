"""The right frame gets the right axes, on every path through Micro-Manager.

SequenceTester's camera writes the state of all devices at the moment of exposure into its pixels.
So each frame itself says which z, channel, exposure and stage position it was taken at, and its
header has to say the same, whether it was snapped or came out of a hardware sequence.
"""

import functools
import itertools
import threading
from types import SimpleNamespace
from typing import Any

import msgpack
import msgspec
import numpy.typing as npt
import pytest
from microscope import run_in_core, sequence_tester

from acquire.header import Hardware
from acquire.hook import Hook
from acquire.intake import Intake
from acquire.items import Arrival
from acquire.sources.acquisition import run
from acquire.sources.hardware import hardware_reader

SWITCHER = {"DAPI": 3, "FITC": 5}
"""Switcher position of each channel preset in sequence_tester.cfg."""
EXPOSURE_MS = {"DAPI": 10.0, "FITC": 20.0}
POSITIONS_UM = {"A": [1.0, 2.0], "B": [-3.0, 5.5]}
STEPS_PER_UM = 10
STAGE_Z_UM = 7.25
SEQUENCE_LENGTH = 100
AUTOFOCUS_FRAMES = 12


class Exposure(msgspec.Struct):
    """What the devices really did while a frame was exposed, decoded from its pixels."""

    z_um: float
    x_um: float
    y_um: float
    switcher: int
    exposure_ms: float
    in_sequence: bool
    number: int
    """Counts all exposures of this camera."""


def decode(pixels: npt.NDArray[Any]) -> Exposure:
    """The packet: [packet number, camera, start count, count, state before, state now, history]."""
    unpacker = msgpack.Unpacker()
    unpacker.feed(pixels.tobytes())
    _, camera, _, _, _, now, _ = next(unpacker)
    _, number, in_sequence, _, _ = camera
    state = {(device, key): value for (device, key), (_, value) in now}
    return Exposure(
        z_um=state["TZStage-0", "ZPositionUm"],
        x_um=state["TXYStage-0", "XPositionSteps"] / STEPS_PER_UM,
        y_um=state["TXYStage-0", "YPositionSteps"] / STEPS_PER_UM,
        switcher=state["TSwitcher-0", "Position"],
        exposure_ms=state["TCamera-0", "Exposure"],
        in_sequence=in_sequence,
        number=number,
    )


@functools.cache
def frames_of(path: str) -> list[dict[str, Any]]:
    """Header and decoded pixels of every frame of *path*, acquired in a process of its own."""
    found: list[dict[str, Any]] = run_in_core(acquire, path)
    return found


def acquire(path: str) -> list[dict[str, Any]]:
    """Header and decoded pixels of every frame, in the order in which the hook got them."""
    trouble: list[str] = []
    intake = Intake(
        "run",
        raw_queue_bytes=2**26,
        raw_stall_ms=1000,
        slot_frames=1,
        on_trouble=trouble.append,
    )
    intake.no_engine = "not here"
    with sequence_tester() as core:
        intake.start()
        hook = Hook(intake, read_hardware=hardware_reader(), on_trouble=trouble.append)
        hooks = {
            "image_process_fn": hook.image,
            "event_generation_hook_fn": hook.event,
            "post_hardware_hook_fn": hook.hardware,
        }
        if path == "autofocus":
            hooks |= _autofocus(hook, core)
        run(_events(path, core), hooks, stop=threading.Event())
        events = hook.expected.submitted
        intake.end()
    intake.close()
    assert trouble == []
    arrivals = [
        item for item in iter(lambda: intake.take(lambda: None), None) if isinstance(item, Arrival)
    ]
    assert len(arrivals) == intake.received == events
    return [
        {
            "header": msgspec.to_builtins(arrival.frame.header),
            "exposed": msgspec.to_builtins(decode(arrival.frame.pixels)),
        }
        for arrival in arrivals
    ]


def _autofocus(hook: Hook, core: Any) -> dict[str, Any]:
    """Hooks of a user who moves the stage himself, while our image hook is far behind."""
    moved, done = itertools.count(1), threading.Event()

    def focus(event: dict[str, Any]) -> Any:
        core.set_position(0.5 * event["axes"]["time"])
        if next(moved) == AUTOFOCUS_FRAMES:
            done.set()
        return hook.hardware(event)

    def late(image: Any, metadata: dict[str, Any]) -> Any:
        done.wait()
        return hook.image(image, metadata)

    return {"post_hardware_hook_fn": focus, "image_process_fn": late}


def _events(path: str, core: Any) -> list[dict[str, Any]]:
    from pycromanager import multi_d_acquisition_events

    stacks = {
        "num_time_points": 2,
        "channel_group": "Channel",
        "channels": list(EXPOSURE_MS),
        "channel_exposures_ms": list(EXPOSURE_MS.values()),
        "xy_positions": list(POSITIONS_UM.values()),
        "position_labels": list(POSITIONS_UM),
        "z_start": -1.5,
        "z_end": 1.5,
        "z_step": 1.5,
    }
    core.set_position(STAGE_Z_UM)
    core.wait_for_device("Z")
    if path != "snap":
        core.set_property("Z", "TriggerSequenceMaxLength", SEQUENCE_LENGTH)
    if path == "no focus device":
        core.set_focus_device("")
    if path == "autofocus":  # the channel changes each time, so nothing is merged into a sequence
        return [
            {"axes": {"time": i}, "config_group": ["Channel", ("DAPI", "FITC")[i % 2]]}
            for i in range(AUTOFOCUS_FRAMES)
        ]
    events: list[dict[str, Any]] = (
        multi_d_acquisition_events(**stacks, order="tpcz")
        if path in ("snap", "sequenced z")
        else multi_d_acquisition_events(num_time_points=12)
    )
    return events


@pytest.mark.parametrize("path", ["snap", "sequenced z"])
def test_stacks_are_labelled_with_what_the_camera_saw(path: str) -> None:
    frames = frames_of(path)
    assert len(frames) == 2 * 2 * 2 * 3
    for frame in frames:
        header, exposed = frame["header"], frame["exposed"]
        axes = header["axes"]
        assert set(axes) == {"time", "position", "channel", "z"}
        assert exposed["in_sequence"] == (path == "sequenced z")
        assert exposed["z_um"] == header["z_um"] == -1.5 + 1.5 * axes["z"]
        assert header["z_source"] == "intended"
        assert exposed["switcher"] == SWITCHER[header["channel"]]
        assert exposed["exposure_ms"] == header["exposure_ms"] == EXPOSURE_MS[axes["channel"]]
        at_um = POSITIONS_UM[axes["position"]]
        assert [exposed["x_um"], exposed["y_um"]] == [header["x_um"], header["y_um"]] == at_um
    # Time has no device; the camera's own count says when a frame was exposed.
    in_time = sorted(frames, key=lambda frame: frame["exposed"]["number"])
    times = [frame["header"]["axes"]["time"] for frame in in_time]
    assert times == sorted(times)
    assert len({str(sorted(frame["header"]["axes"].items())) for frame in frames}) == len(frames)


@pytest.mark.parametrize("path", ["sequenced time", "no focus device"])
def test_a_time_sequence_is_labelled_with_the_stage_it_stood_at(path: str) -> None:
    frames = frames_of(path)
    assert len(frames) == 12
    for index, frame in enumerate(frames):
        header, exposed = frame["header"], frame["exposed"]
        assert exposed["in_sequence"]
        assert header["axes"] == {"time": index}
        assert header["image_number"] == exposed["number"] == index
        assert exposed["z_um"] == STAGE_Z_UM
        known = path == "sequenced time"
        assert (header["z_um"], header["z_source"]) == (
            (STAGE_Z_UM, "stage") if known else (None, "none")
        )
        assert exposed["exposure_ms"] == header["exposure_ms"]


def test_a_stage_moved_by_a_users_hook_is_read_for_the_frame_it_was_moved_for() -> None:
    frames = frames_of("autofocus")
    assert len(frames) == AUTOFOCUS_FRAMES
    for index, frame in enumerate(frames):
        assert frame["header"]["axes"] == {"time": index}
        assert frame["exposed"]["z_um"] == frame["header"]["z_um"] == 0.5 * index
        assert frame["header"]["z_source"] == "stage"


@pytest.mark.parametrize("path", ["snap", "sequenced z", "sequenced time"])
def test_every_path_yields_a_complete_header(path: str) -> None:
    for seq, frame in enumerate(frames_of(path)):
        header = frame["header"]
        assert header["seq"] == seq
        assert header["camera"] == "Camera"
        assert header["channel"] == header["axes"].get("channel", "Default")
        assert header["shape"] == [96, 128]
        assert header["dtype"] == "uint8"
        assert header["bit_depth"] == 8
        assert header["pixel_um"] is None, "sequence_tester.cfg sets none, and 0 is not a size"
        assert all(header[key] is not None for key in ("exposure_ms", "x_um", "y_um", "z_um"))
        assert (header["image_number"] is None) == (path == "snap")
        assert header["wall_time_ns"] > 0
        assert header["hook_time_ns"] > 0


CAMERA_CALLS = ["get_image_bit_depth", "get_number_of_components"]
XY_CALLS = ["get_xy_stage_device", "get_xy_position"]
FOCUS_CALLS = ["get_focus_device", "get_position"]
READINGS: list[tuple[dict[str, Any], list[str]]] = [
    ({"x": 1.0, "y": 2.0, "z": 3.0}, CAMERA_CALLS),
    ({"z": 3.0}, XY_CALLS + CAMERA_CALLS),
    ({"x": 1.0, "y": 2.0}, FOCUS_CALLS + CAMERA_CALLS),
    ({"x": 1.0, "y": 2.0, "stage_positions": [["Z", 3.0]]}, FOCUS_CALLS[:1] + CAMERA_CALLS),
    ({"x": 1.0, "y": 2.0, "stage_positions": [["Switcher", 3.0]]}, FOCUS_CALLS + CAMERA_CALLS),
    ({"x": 1.0}, XY_CALLS + FOCUS_CALLS + CAMERA_CALLS),
    ({}, XY_CALLS + FOCUS_CALLS + CAMERA_CALLS),
]
"""An event, and what the core is asked before its exposure."""


class CountingCore:
    """A core that notes the calls which go through it."""

    def __init__(self, core: Any) -> None:
        self._core = core
        self.calls: list[str] = []

    def __getattr__(self, name: str) -> Any:
        function = getattr(self._core, name)
        return lambda *arguments: (self.calls.append(name), function(*arguments))[1]


def readings() -> list[Any]:
    """For each of READINGS: the calls, and the position; the stage stands at 0, 0, STAGE_Z_UM."""
    import mmpycorex

    found = []
    with sequence_tester() as core:
        core.set_xy_position(0.0, 0.0)
        core.set_position(STAGE_Z_UM)
        counting = CountingCore(core)
        mmpycorex.Core = lambda: counting
        read = hardware_reader()
        for event, _ in READINGS:
            counting.calls.clear()
            hardware = read(event)
            position = [str(um) for um in (hardware.x_um, hardware.y_um, hardware.z_um)]
            found.append([counting.calls.copy(), position, hardware.bit_depth, hardware.components])
    return found


def test_a_stage_is_asked_only_for_what_the_event_does_not_say() -> None:
    """On a serial line every question delays the exposure by tens of milliseconds."""
    for (event, wanted), found in zip(READINGS, run_in_core(readings), strict=True):
        calls, position, bit_depth, components = found
        assert calls == wanted, event
        xy = "0.0" if "get_xy_position" in wanted else "None"  # "-0.0" is what the core says
        z = str(STAGE_Z_UM) if "get_position" in wanted else "None"
        assert position == [xy, xy, z]
        assert (bit_depth, components) == (8, 1)


def test_the_java_core_is_asked_by_its_own_names(monkeypatch: pytest.MonkeyPatch) -> None:
    """Its getXYPosition fills two arrays of Java's; getXYStagePosition returns a point."""
    java = SimpleNamespace(
        get_xy_stage_device=lambda: "XY",
        get_xy_stage_position=lambda: SimpleNamespace(x=-0.0, y=2.5),
        get_image_bit_depth=lambda: 12,
        get_number_of_components=lambda: 1,
    )
    monkeypatch.setattr("mmpycorex.Core", lambda: java)
    assert hardware_reader()({"z": 1.0}) == Hardware(x_um=0.0, y_um=2.5, bit_depth=12, components=1)
