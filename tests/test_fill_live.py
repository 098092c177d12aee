"""What a recorder skips live it refocuses before it leaves, and never at a raw frame's cost."""

import subprocess
import sys
import threading
import time
from pathlib import Path

import msgspec
import pytest

from acquire.fill import Filled, fill
from acquire.header import UNKNOWN
from acquire.intake import Intake
from engine.package import Package
from engine.scaling import Scaling
from refocus.settings import AcquireSettings, EngineSettings, Settings
from store.reader import State, open_run
from store.records import Kind
from tests import hanging_package
from tests.recording import assert_raw, plane, recorder, shoot
from tests.recording import settings as recording_settings
from tests.store_runs import frame
from tests.unfilled import SHAPE, assert_made_with, outcomes, settings

LIMIT_S = 60


def test_planes_read_back_wait_for_live_frames_and_never_push_one_out() -> None:
    intake = Intake("r", raw_queue_bytes=2**20, raw_stall_ms=0, slot_frames=2, on_trouble=print)
    intake.start()
    try:
        offered = [intake.offer_again(frame(seq, {"time": seq})) for seq in (100, 101, 102)]
        assert offered == [True, True, False], "room for two"
        for seq in range(2):
            assert not intake.put(plane(), {"Axes": {"time": seq}}, UNKNOWN, 0, 1, may_wait=False)
        while intake.slot_waiting < 2:
            time.sleep(0.001)
        taken = [one.header.seq for _ in range(3) if (one := intake.take_newest())]
        assert taken == [1, 0, 100], "live ones first, then the oldest read back"
        assert not intake.offer_again(frame(102, {"time": 102})), "raw waits for the disk"
        assert intake.withdraw() == [101]
        assert intake.take_newest() is None
    finally:
        intake.end()


def test_a_recorder_refocuses_what_it_skipped_before_it_leaves(
    tmp_path: Path, negated: Package
) -> None:
    taken = [plane(SHAPE) for _ in range(60)]
    with recorder(tmp_path / "run", recording_settings(negated.folder)) as r:
        assert r.wait_for_engine(30)
        for pixels in taken:
            shoot(r, pixels)
        deadline = time.monotonic() + LIMIT_S
        while r._writing.unanswered or r.status().counts.received < 60:
            assert time.monotonic() < deadline
            time.sleep(0.005)
        assert r.status().counts.skipped > 0
    assert r.status().counts.refocused == 60
    assert r.trouble == []
    run = open_run(tmp_path / "run")
    assert run.state is State.COMPLETE
    assert outcomes(run) == {"REFOCUSED": 60}
    assert_raw(run, taken)
    (noted,) = run.notes.scalings.values()
    assert_made_with(run, negated, {"Default": Scaling(noted.offset, noted.scale)})
    latencies = [r.latency_ns for r in run.records(Kind.REFOCUS)]
    assert 0 in latencies
    assert max(latencies) > 0


def test_a_recorder_told_to_stop_while_it_waits_for_the_engine_leaves(tmp_path: Path) -> None:
    """As Ctrl-C does it in `refocus demo`; nobody may have to wait 1000 s here."""
    package = hanging_package.make(tmp_path / "hanging")
    patient = EngineSettings(
        runtime="openvino", generator=str(package.folder), frame_timeout_ms=1_000_000
    )
    chosen = Settings(acquire=AcquireSettings(drain_s=1000, fill_at_end_s=1000), engine=patient)
    with recorder(tmp_path / "run", chosen) as r:
        assert r.wait_for_engine(30)
        shoot(r, plane(SHAPE))

        def press() -> None:
            while not r._hook.closed:
                time.sleep(0.005)
            r.stopping.set()

        presser = threading.Thread(target=press)
        presser.start()
    presser.join()
    assert not r.interrupted, "every frame had come by then"
    assert r.status().state == "complete"
    assert outcomes(open_run(tmp_path / "run")) == {"LOST": 1}


@pytest.mark.parametrize("why_not", ["switched off", "interrupted"])
def test_a_recorder_that_shall_not_fill_leaves_it_to_later(
    tmp_path: Path, negated: Package, why_not: str
) -> None:
    limit_s = 0.0 if why_not == "switched off" else 10.0
    chosen = msgspec.structs.replace(
        recording_settings(negated.folder), acquire=AcquireSettings(fill_at_end_s=limit_s)
    )
    with recorder(tmp_path / "run", chosen) as r:
        assert r.wait_for_engine(30)
        for _ in range(60):
            shoot(r, plane(SHAPE))
        if why_not == "interrupted":
            r.stopping.set()
    skipped_live = open_run(tmp_path / "run").counts.skipped
    assert skipped_live > 0
    done = subprocess.run(
        [sys.executable, "-m", "refocus.cli.main", "fill", str(tmp_path / "run")],
        capture_output=True,
        text=True,
        timeout=LIMIT_S,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    assert f"{skipped_live} of {skipped_live} planes refocused with negated 0" in done.stdout
    assert fill(tmp_path / "run", settings()) == Filled(0, 0, 0, 0, 0, {}, "", "", [])
