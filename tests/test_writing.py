"""The writer's thread goes on whatever those say that it tells, and whatever the disk says."""

import threading
from pathlib import Path

import pytest
from store_runs import pixels, start

from acquire.header import UNKNOWN
from acquire.intake import Intake
from acquire.items import Answer
from acquire.writing import Writing
from refocus.frame import RefocusOutcome
from store.guard import DiskGuard

FRAMES = 3


def test_a_listener_that_fails_costs_neither_a_plane_nor_its_room(tmp_path: Path) -> None:
    def fail(nbytes: int) -> None:
        raise ValueError("a listener fails")

    told: list[str] = []
    run = start(tmp_path / "run")
    intake = Intake(
        "r", raw_queue_bytes=2**20, raw_stall_ms=0, slot_frames=2, on_trouble=told.append
    )
    intake.no_engine = "none here"
    writing = Writing(
        run,
        intake,
        DiskGuard(tmp_path, 0),
        on_raw_saved=fail,
        on_raw_failure=told.append,
        on_full=told.append,
        on_trouble=told.append,
    )
    intake.start()
    for seq in range(FRAMES):
        image = pixels(seq)
        assert not intake.put(image, {"Axes": {"time": seq}}, UNKNOWN, 1, 1, may_wait=False)
    intake.end()
    intake.close()
    writing.join()
    counts = run.close(complete=True, expected_frames=FRAMES)
    assert (counts.saved, counts.skipped) == (FRAMES, FRAMES)
    assert intake.waiting_bytes == 0
    assert told == ["the run on disk: ValueError('a listener fails')"] * FRAMES


def test_a_late_answer_settles_no_frame_that_is_expected_again(tmp_path: Path) -> None:
    told: list[str] = []
    saved = threading.Event()
    run = start(tmp_path / "run")
    intake = Intake(
        "r", raw_queue_bytes=2**20, raw_stall_ms=0, slot_frames=2, on_trouble=told.append
    )
    writing = Writing(
        run,
        intake,
        DiskGuard(tmp_path, 0),
        on_raw_saved=lambda _: saved.set(),
        on_raw_failure=told.append,
        on_full=told.append,
        on_trouble=told.append,
    )

    def answer(outcome: RefocusOutcome) -> int:
        intake.answer(Answer(0, outcome, "as told"))
        booked = threading.Event()
        intake.note(lambda _: booked.set())
        assert booked.wait(10)
        return writing.unanswered

    intake.start()
    assert not intake.put(pixels(0), {"Axes": {"time": 0}}, UNKNOWN, 1, 1, may_wait=False)
    assert saved.wait(10)
    assert answer(RefocusOutcome.LOST) == 0
    writing.expect_again(0)
    assert answer(RefocusOutcome.LATE) == 1
    assert answer(RefocusOutcome.FAILED) == 0
    intake.end()
    intake.close()
    writing.join()
    counts = run.close(complete=True, expected_frames=1)
    assert (counts.saved, counts.refocus_failed) == (1, 1)
    assert told == []


def test_a_drive_that_is_gone_is_for_the_writes_to_say(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """On Windows not even a drive's root need exist."""
    guard = DiskGuard(tmp_path, 2**20)
    monkeypatch.setattr(Path, "exists", lambda _: False)
    assert not guard.wrote(2**20)
    guard.require(2**60, "the run")
