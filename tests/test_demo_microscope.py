"""The demo microscope: a real core, a specimen that defocuses, and an acquisition without traps."""

import json
import os
import signal
import subprocess
import sys
import threading
import time
import zlib
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from microscope import run_in_core

from acquire.sources import acquisition, demo
from acquire.sources.acquisition import run
from acquire.sources.demo import CHANNELS, Z_UM, DemoMicroscope
from acquire.sources.specimen import PIXEL_UM
from refocus.cli import runs
from refocus.cli.main import main
from refocus.errors import RefocusError, SettingsError, StuckError
from refocus.frame import FrameHeader
from store.reader import open_run

SIZE_PX = 128


@pytest.mark.parametrize("size_px", [31, 0, -4, 5000])
def test_a_size_the_demo_cannot_have_is_refused(size_px: int) -> None:
    with pytest.raises(SettingsError, match=str(size_px)):
        DemoMicroscope(size_px)


def test_importing_the_sources_does_not_import_pycromanager() -> None:
    code = (
        "import sys, acquire.sources.demo, acquire.sources.acquisition;"
        "assert not {'pycromanager', 'pymmcore', 'mmpycorex'} & set(sys.modules)"
    )
    subprocess.run([sys.executable, "-c", code], check=True, timeout=60)


def test_without_pycromanager_the_error_says_what_to_install(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setitem(sys.modules, "pycromanager", None)
    with pytest.raises(SettingsError, match=r'pip install -e "\.\[micromanager\]"'):
        DemoMicroscope(64)


def test_metadata_that_says_where_a_frame_is_spares_asking_the_core() -> None:
    microscope = DemoMicroscope(32)  # not entered: there is no core to ask
    metadata = {"Axes": {"channel": CHANNELS[0]}}
    metadata |= {f"{axis}Position_um_Intended": 0.0 for axis in "XYZ"}
    image = microscope.wrap(lambda image, _: image)(None, metadata)
    assert image.shape == (32, 32)


# --- the microscope -------------------------------------------------------------------------------


def one_after_the_other() -> dict[str, Any]:
    """Two microscopes in one process; the frames of the second."""
    got: list[tuple[Any, dict[str, Any]]] = []
    for frames in (2, 36):
        got.clear()
        with DemoMicroscope(SIZE_PX) as microscope:
            hook = microscope.wrap(lambda image, metadata: got.append((image, metadata)))
            events = microscope.events(frames, frames_per_s=100)
            run(events, {"image_process_fn": hook}, stop=threading.Event())
            errors = [_error_counts(microscope, image, metadata) for image, metadata in got]
    return {
        "axes": [metadata["Axes"] for _, metadata in got],
        "events": [event["axes"] for event in events],
        "z_um": [metadata["ZPosition_um_Intended"] for _, metadata in got],
        "exposure_ms": [metadata["Exposure"] for _, metadata in got],
        "pixel_um": [metadata["PixelSize_um"] for _, metadata in got],
        "pixels": sorted({(str(image.dtype), *image.shape) for image, _ in got}),
        "errors": errors,
        "pictures": [zlib.crc32(image) for image, _ in got],
    }


def _error_counts(microscope: DemoMicroscope, image: Any, metadata: dict[str, Any]) -> float:
    """RMS distance of a frame from the truth at its own position and channel."""
    header = FrameHeader(
        run="r",
        seq=0,
        axes=metadata["Axes"],
        channel=metadata["Axes"]["channel"],
        shape=image.shape,
        dtype=str(image.dtype),
        x_um=metadata["XPosition_um_Intended"],
        y_um=metadata["YPosition_um_Intended"],
    )
    truth = microscope.truth_for(header)
    assert truth is not None
    return float(np.sqrt(np.mean((image - truth) ** 2)))


def test_the_demo_run_delivers_its_events_and_pictures_that_follow_z() -> None:
    first, second = run_in_core(one_after_the_other), run_in_core(one_after_the_other)
    assert first["axes"] == first["events"]
    assert len(first["axes"]) == 36
    assert {axes["position"] for axes in first["axes"]} == {"A", "B"}
    assert {axes["channel"] for axes in first["axes"]} == set(CHANNELS)
    assert {axes["time"] for axes in first["axes"]} == {0, 1}
    assert first["pixels"] == [["uint16", SIZE_PX, SIZE_PX]]
    assert set(first["pixel_um"]) == {PIXEL_UM}
    assert set(first["exposure_ms"]) == {4.0}
    assert set(first["z_um"]) == set(Z_UM)
    by_channel_and_z = {
        (axes["channel"], axes["position"], z_um): error
        for axes, z_um, error in zip(first["axes"], first["z_um"], first["errors"], strict=True)
    }
    for channel in CHANNELS:
        for position in "AB":
            in_focus = by_channel_and_z[channel, position, 0.0]
            assert all(
                by_channel_and_z[channel, position, z_um] > 1.15 * in_focus for z_um in Z_UM if z_um
            )
    assert first["pictures"] == second["pictures"], "the same run shows the same pictures"


def camera_pixels() -> dict[str, Any]:
    got: list[Any] = []
    with DemoMicroscope(64, specimen=False) as microscope:
        hook = microscope.wrap(lambda image, metadata: got.append(image))
        run(microscope.events(4, 100), {"image_process_fn": hook}, stop=threading.Event())
        header = FrameHeader(
            run="r", seq=0, axes={}, channel="DAPI", shape=(64, 64), dtype="uint16"
        )
        truth = microscope.truth_for(header)
    return {"pixels": [zlib.crc32(image) for image in got], "truth": truth}


def test_camera_pixels_are_the_cameras_own_and_have_no_truth() -> None:
    found = run_in_core(camera_pixels)
    assert len(set(found["pixels"])) == 4, "the camera's waves move from frame to frame"
    assert found["truth"] is None


# --- an acquisition without traps -----------------------------------------------------------------


def outcome(case: str) -> dict[str, Any]:
    """What `run` makes of a hook or event that goes wrong, and how many frames came."""
    from pycromanager import Core

    def boom(*_: Any) -> Any:
        raise ValueError("boom")

    frames: list[int] = []
    hooks: dict[str, Any] = {"image_process_fn": lambda image, metadata: frames.append(1)}
    stop = threading.Event()
    minutes_apart = [{"axes": {"time": i}, "min_start_time": 60.0 * i} for i in range(3)]
    with DemoMicroscope(32, specimen=False) as microscope:
        events = microscope.events(20, 100)
        match case:
            case "image hook raises":
                hooks["image_process_fn"] = boom
            case "hardware hook raises":
                hooks["post_hardware_hook_fn"] = boom
            case "event hook raises":
                hooks["event_generation_hook_fn"] = boom
            case "hook cancels":
                hooks["post_hardware_hook_fn"] = lambda event: None
            case "no such stage":
                events = [{"axes": {"z": 0}, "stage_positions": [["NoSuchStage", 1.0]]}]
            case "no such preset":
                events = [{"axes": {"c": 0}, "config_group": ["Channel", "Cy7"]}]
            case "no axes":
                events = [{"x": 1.0}]
            case "no events":
                events = []
            case "rgb":
                Core().set_property("Camera", "PixelType", "32bitRGB")
            case "stop":
                events = minutes_apart
                hooks["image_process_fn"] = lambda image, metadata: (frames.append(1), stop.set())
            case "ctrl-c":
                events = minutes_apart
                hooks["image_process_fn"] = lambda image, metadata: (
                    frames.append(1),
                    os.kill(os.getpid(), signal.SIGINT),
                )
        try:
            run(events, hooks, stop=stop, stall_s=20.0)
            said = ""
        except RefocusError as error:
            said = f"{type(error).__name__}: {error}"
        _wait_for_threads(before=("Acquisition Engine", "Acq Eng"))
    return {"said": said, "frames": len(frames), "stopped": stop.is_set()}


def stuck_thread(where: str) -> str:
    """A thread of Micro-Manager's hangs until we have given up; what is said of it."""
    from pycromanager import Core
    from pycromanager.acquisition.acq_eng_py.internal.engine import Engine

    acquisition.ABORT_GRACE_S = demo.STOP_S = 0.5
    stuck, stop, said = threading.Event(), threading.Event(), "not a word"
    hooks: dict[str, Any] = {"image_process_fn": lambda image, metadata: None}
    try:
        with DemoMicroscope(32, specimen=False) as microscope:
            match where:
                case "device":
                    Core().snap_image = stuck.wait
                case "hook":
                    hooks["post_hardware_hook_fn"] = lambda _: (stop.set(), stuck.wait())
            run(microscope.events(4, 100), hooks, stop=stop, stall_s=0.5)
            Engine.get_instance().acq_executor.submit(stuck.wait)
    except StuckError as error:
        said = str(error)
    assert not stuck.is_set(), "both run and the microscope gave up while it still hung"
    stuck.set()
    _wait_for_threads(before=())
    return said


@pytest.mark.parametrize(
    ("where", "says"),
    [
        ("device", ["the acquisition hangs", "Micro-Manager's threads are stuck"]),
        ("hook", ["the acquisition was stopped", "post_hardware_hook_fn did not return"]),
        ("end", ["Micro-Manager's core did not stop"]),
    ],
)
def test_a_thread_that_never_ends_does_not_hold_us(where: str, says: list[str]) -> None:
    said = run_in_core(stuck_thread, where, timeout_s=30)
    assert [part for part in says if part not in said] == []


STUCK_DEMO = """
import sys, threading
from acquire.sources import acquisition, demo
from refocus.cli.main import main

acquisition.ABORT_GRACE_S = demo.STOP_S = 0.5
acquisition.run.__kwdefaults__["stall_s"] = 0.5
start_core = demo.start_core

def start_stuck_core(*arguments):
    core = start_core(*arguments)
    core.snap_image = threading.Event().wait
    return core

demo.start_core = start_stuck_core
command = "demo --frames 4 --size 64 --pixels camera --engine none --json --out"
sys.exit(main([*command.split(), sys.argv[1]]))
"""


def test_a_command_ends_although_a_thread_of_micro_manager_s_does_not(tmp_path: Path) -> None:
    done = subprocess.run(
        [sys.executable, "-c", STUCK_DEMO, str(tmp_path / "run")],
        env=os.environ | {"PYTHONPATH": os.pathsep.join(sys.path)},
        capture_output=True,
        text=True,
        timeout=60,
        check=False,
    )
    assert done.returncode == 1
    assert "Micro-Manager's threads are stuck" in done.stderr
    assert json.loads(done.stdout)["received"] == 0, "the summary comes all the same"
    assert open_run(tmp_path / "run").notes.seal is not None, "the run was closed first"


def test_a_command_whose_stuck_thread_has_ended_returns(monkeypatch: pytest.MonkeyPatch) -> None:
    def stuck(_: object) -> int:
        raise StuckError("it was stuck")

    monkeypatch.setattr(runs, "_check", stuck)
    assert main(["check", "run"]) == 1


def quiet_acquisitions() -> list[str]:
    """What goes wrong in acquisitions that are silent for longer than the 1 s they are given.

    In turn: a first start time that is not 0, a slow hook, a long exposure that the camera had
    before; the last two with keys that say nothing.
    """
    from pycromanager import Core

    failed = []
    one = {"axes": {"time": 0}, "exposure": None, "z": None}
    late = [{"axes": {"time": i}, "min_start_time": s} for i, s in enumerate((2.0, 3.5))]
    hooks: dict[str, Any] = {"image_process_fn": lambda image, metadata: None}
    slow = {"pre_hardware_hook_fn": lambda event: (time.sleep(1.5), event)[1]}
    with DemoMicroscope(32, specimen=False):
        for events, hook, exposure_ms in (late, {}, 1.0), ([one], slow, 1.0), ([one], {}, 1500.0):
            Core().set_exposure(exposure_ms)
            try:
                run(events, hooks | hook, stop=threading.Event(), stall_s=1.0)
            except RefocusError as error:
                failed.append(str(error))
            _wait_for_threads(before=("Acquisition Engine", "Acq Eng"))
    return failed


def test_an_acquisition_that_is_only_slow_is_left_alone() -> None:
    assert run_in_core(quiet_acquisitions) == []


def _wait_for_threads(before: tuple[str, ...]) -> None:
    """Until all threads but the main one and *before* (name prefixes) have ended."""
    for thread in threading.enumerate():
        if thread is not threading.main_thread() and not thread.name.startswith(before):
            thread.join(10)


@pytest.mark.parametrize(
    ("case", "says"),
    [
        ("image hook raises", "RunError: image_process_fn failed: ValueError('boom')"),
        ("hardware hook raises", "RunError: post_hardware_hook_fn failed: ValueError('boom')"),
        ("event hook raises", "RunError: event_generation_hook_fn failed: ValueError('boom')"),
        ("hook cancels", "RunError: Micro-Manager ended the acquisition after 0 of 20 frames"),
        ("no such stage", "RunError: Micro-Manager ended the acquisition after 0 of 1 frames"),
        ("no such preset", "has no preset 'Cy7'; it has DAPI, FITC, TRITC"),
        ("no axes", "RunError: Micro-Manager does not take these events"),
        ("no events", "SettingsError: acquisition: there are no events"),
        ("rgb", "SettingsError: acquisition: camera 'Camera' delivers 4 bytes per pixel"),
    ],
)
def test_what_pycromanager_keeps_silent_about_is_said(case: str, says: str) -> None:
    found = run_in_core(outcome, case)
    assert says in found["said"]
    assert not found["stopped"]


@pytest.mark.parametrize("case", ["stop", "ctrl-c"])
def test_a_stop_ends_an_acquisition_that_waits_for_its_next_time_point(case: str) -> None:
    """The next time point is a minute away; the child's deadline is below that."""
    found = run_in_core(outcome, case, timeout_s=30)
    assert found == {"said": "", "frames": 1, "stopped": True}
