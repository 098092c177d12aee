"""A run that was sealed takes the twins that it lacks, and stays what it is meanwhile."""

from pathlib import Path

import numpy as np
import pytest
import yaozarrs
from short_run import snapshot
from store_runs import frame, pixels, start

from refocus.errors import LockedError, RunError
from refocus.frame import RefocusOutcome
from store.check import check
from store.reader import State, open_run
from store.records import Kind
from store.recover import recover
from store.writer import Provenance, RunWriter

FRAMES = 5


@pytest.fixture
def sealed(tmp_path: Path) -> Path:
    """Five frames at two places, two skipped, one lost."""
    run = start(tmp_path / "run")
    made = Provenance(generator=run.note_generator("hash", "own", "1", "numpy"), latency_ns=1)
    for seq in range(FRAMES):
        run.write_raw(frame(seq, {"time": seq, "position": seq % 2, "z": 0}, z_um=1.0), {})
    for seq in (0, 1):
        run.write_refocused(seq, pixels(100 + seq), made)
    run.book_refocus(2, RefocusOutcome.SKIPPED, "busy")
    run.book_refocus(3, RefocusOutcome.SKIPPED, "busy")
    run.book_refocus(4, RefocusOutcome.LOST, "the worker died")
    run.close(complete=True, expected_frames=FRAMES, note="by hand")
    return tmp_path / "run"


def fill(run: RunWriter, seq: int) -> None:
    generator = run.note_generator("hash", "own", "1", "numpy")
    run.write_refocused(seq, pixels(100 + seq), Provenance(generator=generator, latency_ns=2))


def test_twins_can_be_added_to_a_sealed_run(sealed: Path) -> None:
    metadata = snapshot(sealed)
    run = RunWriter.reopen(sealed)
    assert run.counts().refocused == 2
    for seq in (2, 3, 4):
        fill(run, seq)
        assert open_run(sealed).state == State.COMPLETE, "while it is filled, too"
        yaozarrs.validate_zarr_store(str(sealed))
    counts = run.reseal()
    assert (counts.refocused, counts.skipped, counts.lost) == (5, 0, 0)
    found = open_run(sealed)
    assert found.state == State.COMPLETE
    for seq in range(FRAMES):
        np.testing.assert_array_equal(found.raw(seq), pixels(seq))
        np.testing.assert_array_equal(found.refocused(seq), pixels(100 + seq))
    seal = found.notes.seal
    assert seal is not None
    assert (seal.complete, seal.expected_frames, seal.note) == (True, FRAMES, "by hand")
    report = check(sealed)
    assert not report.findings
    assert not report.remarks
    changed = {path for path, now in snapshot(sealed).items() if metadata.get(path) != now}
    assert {path.name for path in changed if path.suffix in (".json", ".xml", ".jsonl")} == {
        "run.jsonl"
    }, "the images' metadata were right before"
    assert not recover(sealed).done


def test_no_raw_frame_comes_after_the_seal(sealed: Path) -> None:
    run = RunWriter.reopen(sealed)
    with pytest.raises(RunError, match="refocused planes only"):
        run.write_raw(frame(9, {"time": 9}), {})
    with pytest.raises(RunError, match="refocused planes only"):
        run.book_raw_failed(9, "late")
    with pytest.raises(RunError, match="refocused planes only"):
        run.close(complete=True, expected_frames=9)
    with pytest.raises(RunError, match="never written again"):
        fill(run, 0)
    assert run.reseal().received == FRAMES
    assert open_run(sealed).state == State.COMPLETE


def test_a_run_that_was_not_reopened_is_not_resealed(tmp_path: Path) -> None:
    run = start(tmp_path / "run")
    with pytest.raises(RunError, match="end it by close"):
        run.reseal()
    run.close(complete=True, expected_frames=0)


def test_one_writer_at_a_time(sealed: Path) -> None:
    run = RunWriter.reopen(sealed)
    with pytest.raises(LockedError):
        RunWriter.reopen(sealed)
    with pytest.raises(LockedError):
        recover(sealed)
    run.reseal()
    RunWriter.reopen(sealed).reseal()


def test_numbers_go_on_where_they_were(sealed: Path) -> None:
    run = RunWriter.reopen(sealed)
    assert run.note_generator("hash", "own", "1", "numpy") == 1
    assert run.note_generator("other", "new", "1", "numpy") == 2
    run.book_refocus(4, RefocusOutcome.REJECTED, "busy")
    run.book_refocus(3, RefocusOutcome.REJECTED, "too dark")
    run.reseal()
    found = open_run(sealed)
    assert found.notes.reasons == {1: "busy", 2: "the worker died", 3: "too dark"}
    said = [found.reason(r) for r in found.records(Kind.REFOCUS) if r.reason]
    assert sorted(said) == ["busy", "busy", "too dark"]


def test_numbers_of_lines_that_are_lost_are_not_given_again(sealed: Path) -> None:
    lines = (sealed / "journal/run.jsonl").read_bytes().splitlines(keepends=True)
    kept = [line for line in lines if b'"reason"' not in line and b'"generator"' not in line]
    (sealed / "journal/run.jsonl").write_bytes(b"".join(kept))
    run = RunWriter.reopen(sealed)
    assert run.note_generator("other", "new", "1", "numpy") == 2
    run.book_refocus(4, RefocusOutcome.REJECTED, "too dark")
    run.reseal()
    assert open_run(sealed).notes.reasons == {3: "too dark"}


def test_a_run_that_was_never_sealed_or_has_a_torn_end_is_to_be_recovered(
    tmp_path: Path, sealed: Path
) -> None:
    for path, content in ((sealed, b'{"torn'), (sealed, bytes(30))):
        with (path / "journal/run.jsonl").open("ab") as file:
            file.write(content)
        with pytest.raises(RunError, match="refocus recover"):
            RunWriter.reopen(path)
        assert recover(path).done
        RunWriter.reopen(path).reseal()
    with pytest.raises(RunError, match="not a run"):
        RunWriter.reopen(tmp_path / "nothing")


def test_a_fill_that_was_killed_leaves_a_run_that_can_be_filled(sealed: Path) -> None:
    run = RunWriter.reopen(sealed)
    fill(run, 2)
    run._leave()  # as the system does for a process that was killed
    assert open_run(sealed).state == State.COMPLETE
    assert recover(sealed).lost == 0
    run = RunWriter.reopen(sealed)
    fill(run, 3)
    assert run.reseal().refocused == 4


def test_a_plane_that_was_lost_can_be_made_again(sealed: Path) -> None:
    path = sealed / "1/0/c.0.0.0.0.0"
    content = bytearray(path.read_bytes())
    content[5] ^= 1
    path.write_bytes(content)
    assert recover(sealed).lost == 1
    assert open_run(sealed).refocused(0) is None
    run = RunWriter.reopen(sealed)
    fill(run, 0)
    run.reseal()
    np.testing.assert_array_equal(open_run(sealed).refocused(0), pixels(100))
    assert recover(sealed).lost == 0
