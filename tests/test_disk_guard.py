"""A disk that gets full stops the run in order, before a plane is lost, and says so."""

import contextlib
import json
import shutil
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import msgspec
import numpy as np
import pytest

from acquire.forecast import Forecast, forecast
from acquire.recorder import Recorder
from refocus.errors import DiskError, RunError
from refocus.settings import Settings, StoreSettings
from store.check import check
from store.guard import ASK_S, DiskGuard
from store.reader import State, open_run
from tests import identity_package
from tests.recording import assert_raw, plane, recorder, settings, shoot
from tests.small_disk import small_disk

SHAPE = (128, 256)
"""64 KiB a plane."""
PLANE_BYTES = 2**16
SIZE_MIB = 8
RESERVE_MIB = 2
LIMIT_S = 30


@pytest.fixture
def disk(tmp_path: Path) -> Iterator[Path]:
    with small_disk(tmp_path / "disk", SIZE_MIB) as folder:
        yield folder


def guarded(chosen: Settings, reserve_mib: int = RESERVE_MIB) -> Settings:
    return msgspec.structs.replace(chosen, store=StoreSettings(reserve_mib=reserve_mib))


def events_of(frames: int) -> list[dict[str, Any]]:
    return [{"axes": {"time": index}} for index in range(frames)]


def shoot_until_stopped(r: Recorder, taken: list[np.ndarray]) -> None:
    deadline = time.monotonic() + LIMIT_S
    while not r.stopping.is_set():
        assert time.monotonic() < deadline, r.status()
        taken.append(plane(SHAPE))
        shoot(r, taken[-1])
        while r._intake.waiting_bytes:  # the disk is as fast as the camera
            time.sleep(0.001)


@pytest.mark.parametrize("runtime", ["none", "openvino"])
def test_at_the_reserve_the_run_is_stopped_in_order(
    disk: Path, tmp_path: Path, runtime: str
) -> None:
    package = identity_package.make(tmp_path / "identity")
    taken: list[np.ndarray] = []
    with (
        pytest.raises(DiskError, match=r"reserve_mib keeps 2\.0 MiB free") as caught,
        recorder(disk / "run", guarded(settings(package.folder, runtime))) as r,
    ):
        assert runtime == "none" or r.wait_for_engine(30)
        shoot_until_stopped(r, taken)
        for _ in range(4):  # they were under way when it was stopped
            taken.append(plane(SHAPE))
            r.hook(taken[-1].copy(), {"Axes": {"time": len(taken) - 1}})
    assert caught.value.exit_code == 3
    counts = r.status().counts
    assert (counts.saved, counts.failed, counts.refocus_failed) == (len(taken), 0, 0)
    assert (counts.refocused > 0) is (runtime != "none")
    run = open_run(disk / "run")
    assert run.state is State.INCOMPLETE
    assert run.notes.seal is not None
    assert "reserve_mib" in run.notes.seal.note
    assert_raw(run, taken)
    assert [words.split(":")[0] for words in check(disk / "run").findings] == [
        "the run is incomplete"
    ]
    assert shutil.disk_usage(disk).free > RESERVE_MIB * 2**20 / 2, "most of the reserve is left"


def test_a_disk_that_something_else_fills_stops_the_run(disk: Path) -> None:
    taken: list[np.ndarray] = []
    with (
        pytest.raises(DiskError),
        recorder(disk / "run", guarded(settings("x", "none")), events=events_of(8)) as r,
    ):
        taken.append(plane(SHAPE))
        shoot(r, taken[-1])
        (disk / "download").write_bytes(bytes((SIZE_MIB - RESERVE_MIB) * 2**20))
        shoot_until_stopped(r, taken)
    run = open_run(disk / "run")
    assert run.counts.saved == len(taken)
    assert_raw(run, taken)


def test_a_run_that_does_not_fit_is_refused_before_anything_moves(disk: Path) -> None:
    fits = (SIZE_MIB - RESERVE_MIB) * 2**20 // (PLANE_BYTES + 2**13)
    for runtime, frames in (("none", 2 * fits), ("openvino", fits)):
        chosen = guarded(settings("x", runtime))
        refused = recorder(disk / "run", chosen, expected_shape=SHAPE, events=events_of(frames))
        with pytest.raises(DiskError, match=rf"{frames} frames.*MiB free"), refused:
            pass
        assert not refused.started
    assert list(disk.iterdir()) == []
    with recorder(
        disk / "run", guarded(settings("x", "none")), expected_shape=SHAPE, events=events_of(fits)
    ) as r:
        for event in events_of(fits):
            shoot(r, plane(SHAPE), Axes=event["axes"])
    assert r.status().state == "complete"


def test_what_nobody_knew_before_is_checked_with_the_first_frame(disk: Path) -> None:
    frames = 2 * SIZE_MIB * 2**20 // PLANE_BYTES
    with (
        pytest.raises(DiskError, match=rf"a run of {frames} frames needs"),
        recorder(disk / "run", guarded(settings("x", "none")), events=events_of(frames)) as r,
    ):
        for _ in range(3):
            shoot(r, plane(SHAPE))
        assert r.stopping.wait(LIMIT_S)
    run = open_run(disk / "run")
    assert run.state is State.INCOMPLETE
    assert run.counts.saved == 3


def test_without_a_reserve_nothing_stops_the_run(disk: Path) -> None:
    with recorder(disk / "run", guarded(settings("x", "none"), reserve_mib=0)) as r:
        (disk / "download").write_bytes(bytes((SIZE_MIB - 1) * 2**20))
        for _ in range(4):
            shoot(r, plane(SHAPE))
    assert r.status().counts.saved == 4


def test_a_fast_disk_cannot_run_through_the_reserve_unseen(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    asked: list[int] = []
    usage = shutil.disk_usage
    now_s = [100.0]
    monkeypatch.setattr(shutil, "disk_usage", lambda path: asked.append(1) or usage(path))
    monkeypatch.setattr(time, "monotonic", lambda: now_s[0])
    guard = DiskGuard(tmp_path, reserve_bytes=8000)
    guard.wrote(1)
    assert len(asked) == 1
    for _ in range(99):  # 9.9 eighths of the reserve, at once
        assert not guard.wrote(100)
    assert len(asked) == 1 + 9
    now_s[0] += ASK_S
    guard.wrote(1)
    assert len(asked) == 1 + 9 + 1


def saved(path: Path) -> int:
    """Raw planes of a run that perhaps does not exist yet."""
    try:
        return open_run(path).counts.saved
    except RunError:
        return 0


def refocused(path: Path) -> int:
    """Twins of a run that perhaps does not exist yet."""
    try:
        return open_run(path).counts.refocused
    except RunError:
        return 0


def fill_up(path: Path) -> None:
    """Write until the disk takes no byte more."""
    with path.open("wb", buffering=0) as file, contextlib.suppress(OSError):
        while True:
            file.write(bytes(4096))


@pytest.mark.parametrize("when", ["at the start", "meanwhile"])
def test_the_demo_leaves_with_exit_code_3(disk: Path, tmp_path: Path, when: str) -> None:
    (tmp_path / "config.toml").write_text(f"[store]\nreserve_mib = {RESERVE_MIB}\n")
    frames = 1000 if when == "at the start" else 150
    out = disk / "run"
    command = [
        *(sys.executable, "-m", "refocus.cli.main", "demo", "--frames", str(frames)),
        *("--size", "96", "--engine", "none", "--out", str(out), "--json"),
        *("--config", str(tmp_path / "config.toml")),
    ]
    demo = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    try:
        deadline = time.monotonic() + LIMIT_S
        while when == "meanwhile" and not saved(out):
            assert time.monotonic() < deadline
            time.sleep(0.01)
        if when == "meanwhile":
            (disk / "download").write_bytes(bytes((SIZE_MIB - RESERVE_MIB) * 2**20))
        said, errors = demo.communicate(timeout=60)
    finally:
        demo.kill()
        demo.communicate()
    assert demo.returncode == 3, errors
    assert "reserve_mib" in errors
    assert "Traceback" not in errors
    if when == "at the start":
        assert not out.exists()
        return
    run = open_run(out)
    assert run.state is State.INCOMPLETE
    assert 0 < run.counts.saved == json.loads(said)["received"] < frames
    assert run.counts.failed == 0


def test_the_demo_tells_what_became_of_a_run_that_filled_the_disk(
    disk: Path, tmp_path: Path
) -> None:
    """To the last byte: no room for a picture either."""
    package = identity_package.make(tmp_path / "negated", answer="negated")
    (tmp_path / "config.toml").write_text("[store]\nreserve_mib = 0\n")
    out = disk / "run"
    command = [
        *(sys.executable, "-m", "refocus.cli.main", "demo", "--frames", "150", "--size", "96"),
        *("--generator", str(package.folder), "--out", str(out), "--json"),
        *("--config", str(tmp_path / "config.toml")),
    ]
    demo = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    try:
        deadline = time.monotonic() + LIMIT_S
        while refocused(out) < 4:
            assert time.monotonic() < deadline
            time.sleep(0.01)
        fill_up(disk / "download")
        said, errors = demo.communicate(timeout=60)
    finally:
        demo.kill()
        demo.communicate()
    assert demo.returncode == 1, errors
    assert "no picture" in errors
    assert "Traceback" not in errors
    assert 0 < json.loads(said)["saved"] < 150
    assert not (out / "preview.png").exists()


@pytest.mark.parametrize(
    ("order", "stack_planes"),
    [("tpcz", 5), ("tpzc", 5), ("pctz", 5), ("pczt", 1), ("ptcz", 5), ("pzct", 1)],
)
def test_the_order_of_events_says_how_planes_follow_each_other(
    order: str, stack_planes: int
) -> None:
    from pycromanager import multi_d_acquisition_events

    events = multi_d_acquisition_events(
        num_time_points=3,
        channel_group="Channel",
        channels=["DAPI", "FITC"],
        xy_positions=[(0, 0), (1, 1)],
        z_start=0,
        z_end=4,
        z_step=1,
        order=order,
    )
    assert forecast(events) == Forecast(frames=60, stack_planes=stack_planes)


def test_events_without_images_and_runs_without_axes_are_forecast() -> None:
    assert forecast([]) == Forecast(0, 1)
    assert forecast([{"axes": {"time": 0}}, {"properties": []}, {"axes": {"time": 1}}]).frames == 2
    assert forecast(events_of(7)) == Forecast(7, 1)
    assert forecast([{"axes": {"z": z}} for z in range(7)]) == Forecast(7, 7)


def test_the_recorder_lays_planes_out_in_the_order_of_its_events(tmp_path: Path) -> None:
    events = [{"axes": {"time": t, "z": z}} for t in range(2) for z in range(7)]
    chosen = settings("x", "none")
    with recorder(tmp_path / "run", chosen, events=events) as r:
        for event in events:
            shoot(r, plane(), Axes=event["axes"])
    metadata = json.loads((tmp_path / "run" / "0" / "0" / "zarr.json").read_bytes())
    t, c, z, *_ = metadata["chunk_grid"]["configuration"]["chunk_shape"]
    assert z == 7
    assert c == 1
    assert t > 1
