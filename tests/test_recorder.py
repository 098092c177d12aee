"""The trunk with everything behind it, driven through the hook."""

import time
from pathlib import Path

import numpy as np
import pytest

from refocus.errors import RunError, SettingsError
from refocus.frame import RefocusOutcome
from refocus.settings import EngineSettings, LinkSettings, Settings
from store.reader import State, open_run
from store.records import Kind
from tests import identity_package
from tests.recording import assert_raw, plane, recorder, settings, shoot


def test_raw_and_refocused_twins_land_side_by_side(tmp_path: Path) -> None:
    package = identity_package.make(tmp_path / "negated", name="negated", answer="negated")
    taken = [plane() for _ in range(6)]
    with recorder(tmp_path / "run", settings(package.folder), expected_shape=(32, 48)) as r:
        assert r.wait_for_engine(30)
        for number, pixels in enumerate(taken, start=1):
            shoot(r, pixels)
            deadline = time.monotonic() + 20
            while r.status().counts.refocused < number:
                assert time.monotonic() < deadline, r.status()
                time.sleep(0.005)
        assert r.status().state == "live"
    status = r.status()
    assert status.state == "complete"
    assert status.counts.saved == status.counts.refocused == status.expected == 6
    assert status.latency_ms is not None
    run = open_run(tmp_path / "run")
    assert run.state is State.COMPLETE
    assert_raw(run, taken)
    (scaling,) = run.notes.scalings.values()
    (generator,) = run.notes.generators.values()
    assert (generator.package_hash, generator.name) == (package.hash, "negated")
    assert generator.runtime.startswith("openvino")
    for entry in run.frames():
        refocused = run.refocused(entry.seq)
        assert refocused is not None
        mirrored = np.clip(2 * scaling.offset - taken[entry.seq].astype(float), 0, None)
        assert np.abs(refocused - mirrored).max() <= 2
        assert entry.refocus is not None
        assert entry.refocus.latency_ns > 0


def test_any_shape_dtype_and_repeat_is_kept(tmp_path: Path) -> None:
    package = identity_package.make(tmp_path / "identity")
    taken = [
        plane((32, 48)),
        plane((521, 697)),
        plane((2047, 1), "uint8"),
        plane((32, 48)).astype(np.float32),
        plane((32, 48)),
    ]
    with recorder(tmp_path / "run", settings(package.folder)) as r:
        assert r.wait_for_engine(30)
        for pixels in taken:
            shoot(r, pixels, Axes={"time": 0})  # one index, five times: nothing is overwritten
    run = open_run(tmp_path / "run")
    assert run.state is State.COMPLETE
    assert_raw(run, taken)
    outcomes = [entry.refocus.outcome for entry in run.frames() if entry.refocus is not None]
    assert outcomes[3] == RefocusOutcome.REJECTED
    rejected = run.record(3, Kind.REFOCUS)
    assert rejected is not None
    assert "float32" in run.reason(rejected)


def test_a_folder_that_exists_is_refused_and_untouched(tmp_path: Path) -> None:
    (tmp_path / "precious").write_text("data")
    with (
        pytest.raises(RunError, match="exists"),
        recorder(tmp_path, settings("identity", "none")),
    ):
        pass
    assert [path.name for path in tmp_path.iterdir()] == ["precious"]


def test_an_acquisition_that_succeeds_with_nothing_is_an_error(tmp_path: Path) -> None:
    """pycromanager ends normally with 0 frames when a hook or a device fails."""
    with (
        pytest.raises(RunError, match=r"3 events were submitted.*0 images came"),
        recorder(tmp_path / "run", settings("identity", "none")) as r,
    ):
        for index in range(3):
            r.hooks()["event_generation_hook_fn"]({"axes": {"time": index}})
    assert open_run(tmp_path / "run").state is State.EMPTY


def test_a_missing_frame_makes_the_run_incomplete(tmp_path: Path) -> None:
    with (
        pytest.raises(RunError, match=r"2 events were submitted.*1 images came"),
        recorder(tmp_path / "run", settings("identity", "none")) as r,
    ):
        r.hooks()["event_generation_hook_fn"]({"axes": {"time": 1}})
        shoot(r, plane(), Axes={"time": 0})
    assert open_run(tmp_path / "run").state is State.INCOMPLETE


def test_the_hook_alone_works_and_cannot_count(tmp_path: Path) -> None:
    with recorder(tmp_path / "run", settings("identity", "none")) as r:
        r.hook(plane(), {"Axes": {"time": 0}})
    assert r.status().expected is None
    assert open_run(tmp_path / "run").state is State.COMPLETE


def test_an_interrupted_run_that_nobody_counted_is_not_called_complete(tmp_path: Path) -> None:
    with recorder(tmp_path / "run", settings("identity", "none")) as r:
        r.hook(plane(), {"Axes": {"time": 0}})
        r.stopping.set()
    assert open_run(tmp_path / "run").state is State.INCOMPLETE


def test_a_recorder_records_one_run(tmp_path: Path) -> None:
    r = recorder(str(tmp_path / "run"), settings("x", "none"))
    with pytest.raises(RunError, match="not started"):
        r.status()
    with r:
        r.hook(plane(), {"Axes": {"time": 0}})
    with pytest.raises(RunError, match="one run"):
        r.__enter__()


def test_only_loopback_is_opened_without_keys(tmp_path: Path) -> None:
    package = identity_package.make(tmp_path / "identity")
    chosen = Settings(
        engine=EngineSettings(runtime="openvino", generator=str(package.folder)),
        link=LinkSettings(address="tcp://0.0.0.0:5555"),
    )
    with pytest.raises(SettingsError, match=r"0\.0\.0\.0"), recorder(tmp_path / "run", chosen):
        pass
    assert not (tmp_path / "run").exists()


def test_the_wire_works_over_tcp_too(tmp_path: Path) -> None:
    """Windows has no ipc: there it is loopback with a secret."""
    package = identity_package.make(tmp_path / "identity")
    chosen = Settings(
        engine=EngineSettings(runtime="openvino", generator=str(package.folder)),
        link=LinkSettings(address="tcp://127.0.0.1:*"),
    )
    with recorder(tmp_path / "run", chosen) as r:
        assert r.wait_for_engine(30)
        shoot(r, plane())
    assert r.status().counts.refocused == 1
