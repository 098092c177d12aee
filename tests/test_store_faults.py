"""What a kill and a full disk may cost: nothing that was acknowledged, and it is said at once."""

import errno
import os
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import yaozarrs
from faulty_os import Call, FaultyOs
from store_runs import SHAPE, file_size_limit, frame, pixels, start

from refocus.errors import RunError
from refocus.frame import RefocusOutcome
from store import disk
from store.disk import replace_file
from store.lock import WriterLock, is_held
from store.reader import State, open_run
from store.records import Kind
from store.writer import Provenance


@pytest.fixture
def small_shards(monkeypatch: pytest.MonkeyPatch) -> None:
    """Shards of four planes."""
    monkeypatch.setattr("store.grid.SHARD_BYTES", 4 * disk.PAGE)


@pytest.fixture
def small_disk(tmp_path: Path) -> Iterator[Path]:
    """A file system of 1 MiB."""
    folder = tmp_path / "disk"
    folder.mkdir()
    mount = ["mount", "-t", "tmpfs", "-o", "size=1m", "tmpfs", str(folder)]
    try:
        subprocess.run(mount, check=True, capture_output=True)
    except (OSError, subprocess.CalledProcessError) as error:
        pytest.skip(f"a small file system cannot be mounted here: {error}")
    yield folder
    subprocess.run(["umount", str(folder)], check=True)


def test_a_full_disk_is_said_at_once_and_costs_nothing_acknowledged(small_disk: Path) -> None:
    shape = (150, 200)  # 60 kB: 1 MiB holds some 15
    ballast = small_disk / "ballast"
    ballast.write_bytes(bytes(100_000))
    run = start(small_disk / "run")
    saved = 0
    with pytest.raises(RunError, match="No space left"):
        for saved in range(25):
            run.write_raw(frame(saved, {"time": saved}, shape), {})
    for seq in range(saved + 1, 25):
        with pytest.raises(RunError, match=f"frame {seq}: not saved"):
            run.write_raw(frame(seq, {"time": seq}, shape), {})
    assert saved > 8
    assert_run_opens(small_disk / "run", saved=saved, shape=shape)

    ballast.unlink()  # room for the seal and one plane
    run.write_raw(frame(25, {"time": 30}, shape), {})
    counts = run.close(complete=True, expected_frames=26)
    assert (counts.saved, counts.failed) == (saved + 1, 25 - saved)
    found = open_run(small_disk / "run")
    assert found.state == State.INCOMPLETE
    assert found.counts == counts


def assert_run_opens(path: Path, saved: int, shape: tuple[int, int] = SHAPE) -> None:
    """Whatever is acknowledged is there, in a valid run."""
    run = open_run(path)
    assert run.counts.saved == saved
    for seq in range(saved):
        np.testing.assert_array_equal(run.raw(seq), pixels(seq, shape))
    yaozarrs.validate_zarr_store(str(path))


def test_an_outcome_that_cannot_be_booked_is_booked_later(tmp_path: Path) -> None:
    path = tmp_path / "run"
    run = start(path)
    run.write_raw(frame(0, {"time": 0}), {})
    with file_size_limit((path / "journal" / "outcomes.bin").stat().st_size + 10):
        with pytest.raises(RunError, match="frame 1: not saved"):
            run.write_raw(frame(1, {"time": 1}), {})
        run.book_refocus(1, RefocusOutcome.SKIPPED, "no room for the reason either")
        assert_run_opens(path, saved=1)
        assert open_run(path).torn_bytes == 0
    run.write_raw(frame(2, {"time": 2}), {})
    found = open_run(path)
    assert [record.seq for record in found.records(Kind.RAW)] == [0, 1, 2]
    assert (found.counts.saved, found.counts.failed, found.counts.skipped) == (2, 1, 1)
    run.close(complete=True, expected_frames=3)


def test_a_run_that_cannot_be_sealed_says_so_and_is_incomplete(tmp_path: Path) -> None:
    run = start(tmp_path / "run")
    run.write_raw(frame(0, {"time": 0}), {})
    with file_size_limit(100), pytest.raises(RunError, match="not sealed"):
        run.close(complete=True, expected_frames=1)
    assert open_run(tmp_path / "run").state == State.INCOMPLETE
    assert_run_opens(tmp_path / "run", saved=1)


def test_an_image_that_cannot_be_made_costs_its_own_frames_only(tmp_path: Path) -> None:
    path = tmp_path / "run"
    run = start(path)
    run.write_raw(frame(0, {"time": 0, "position": "A"}), {})
    (path / "2").write_text("a file where a folder must be")
    for seq in (1, 2):
        with pytest.raises(RunError, match=f"frame {seq}: not saved"):
            run.write_raw(frame(seq, {"time": seq, "position": "B"}), {})
        yaozarrs.validate_zarr_store(str(path))
    run.write_raw(frame(3, {"time": 1, "position": "A"}), {})
    (path / "2").unlink()
    run.write_raw(frame(4, {"time": 4, "position": "C"}), {})
    run.write_raw(frame(5, {"time": 5, "position": "B"}), {})
    counts = run.close(complete=True, expected_frames=6)
    yaozarrs.validate_zarr_store(str(path))
    assert (counts.saved, counts.failed) == (4, 2)
    found = open_run(path)
    records = [found.record(seq, Kind.RAW) for seq in (0, 3, 4, 5)]
    assert [record.image for record in records if record] == [0, 0, 4, 2]
    np.testing.assert_array_equal(found.raw(5), pixels(5))


def test_metadata_that_could_not_be_written_are_written_with_the_next_plane(tmp_path: Path) -> None:
    path = tmp_path / "run"
    run = start(path)
    run.write_raw(frame(0, {"channel": "DAPI"}), {})
    (path / "0" / ".zarr.json.partial").mkdir()
    with pytest.raises(RunError, match="frame 1: not saved"):
        run.write_raw(frame(1, {"channel": "GFP"}), {})
    (path / "0" / ".zarr.json.partial").rmdir()
    run.write_raw(frame(2, {"channel": "GFP"}), {})
    assert b"GFP" in (path / "0" / "zarr.json").read_bytes()
    assert b"GFP" in (path / "OME" / "METADATA.ome.xml").read_bytes()
    run.close(complete=False, expected_frames=None)


def test_a_refocused_plane_that_fails_leaves_raw_alone(tmp_path: Path) -> None:
    path = tmp_path / "run"
    run = start(path)
    run.write_raw(frame(0, {"time": 0}), {})
    made = Provenance(generator=run.note_generator("h", "n", "1", "r"), latency_ns=1)
    (path / "1" / "0" / "c.0.0.0.0.0").mkdir()
    with pytest.raises(RunError, match="refocused plane not saved"):
        run.write_refocused(0, pixels(1), made)
    run.write_raw(frame(1, {"time": 1}), {})
    counts = run.close(complete=True, expected_frames=2)
    assert (counts.saved, counts.refocus_failed) == (2, 1)
    assert_run_opens(path, saved=2)


def test_a_file_that_another_program_has_open_on_windows_is_replaced_in_the_end(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, faulty: FaultyOs
) -> None:
    """A virus scanner reads each new file; the rename is refused until it has done."""
    run = start(tmp_path / "run")
    run.write_raw(frame(0, {"time": 0}), {})
    refusals = iter([True, True, True])

    def refuse(call: Call) -> Any:
        if call.name == "replace" and next(refusals, False):
            raise PermissionError(errno.EACCES, "another program has it open", str(call.path))
        return call.do()

    with monkeypatch.context() as windows:
        windows.setattr(sys, "platform", "win32")
        faulty.rule = refuse
        run.write_raw(frame(1, {"time": 1}), {})  # the shape grows
    assert not next(refusals, False)
    run.close(complete=True, expected_frames=2)
    assert_run_opens(tmp_path / "run", saved=2)


def test_a_file_that_stays_open_elsewhere_on_windows_fails_with_the_first_error(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, faulty: FaultyOs
) -> None:
    tries = []

    def refuse(call: Call) -> Any:
        if call.name in ("replace", "unlink"):
            tries.append(call.name)
            raise PermissionError(errno.EACCES, f"cannot {call.name}")
        return call.do()

    with monkeypatch.context() as windows:
        windows.setattr(sys, "platform", "win32")
        windows.setattr(time, "sleep", lambda _: None)
        faulty.rule = refuse
        with pytest.raises(PermissionError, match="cannot replace"):
            replace_file(tmp_path / "zarr.json", b"{}")
    assert tries.count("replace") > 50


@pytest.mark.usefixtures("small_shards")
def test_planes_that_fail_alike_share_one_reason(tmp_path: Path) -> None:
    path = tmp_path / "run"
    run = start(path)
    run.write_raw(frame(0, {"time": 0}), {})
    for seq in range(1, 4):
        (path / "0" / "0" / f"c.{seq}.0.0.0.0").mkdir()
        with pytest.raises(RunError, match=rf"frame {seq}: not saved: .*c\.{seq}\.0"):
            run.write_raw(frame(seq, {"time": 4 * seq}), {})
        (path / "0" / "0" / f"c.{seq}.0.0.0.0").rmdir()
    run.close(complete=False, expected_frames=None)
    assert list(open_run(path).notes.reasons.values()) == [
        f"{os.strerror(errno.EISDIR)} (errno {errno.EISDIR})"
    ]


def test_one_writer_a_run_and_readers_know_of_it(tmp_path: Path) -> None:
    run = start(tmp_path / "run")
    lock = tmp_path / "run" / "journal" / "writer.lock"
    assert is_held(lock)
    assert is_held(lock)  # looking takes nothing
    with pytest.raises(RunError, match="another writer"):
        WriterLock(lock)
    run.close(complete=True, expected_frames=None)
    assert not is_held(lock)
    WriterLock(lock).release()


def test_a_reader_that_looks_keeps_no_writer_out(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    fcntl = pytest.importorskip("fcntl", reason="Windows has no shared locks")
    path = tmp_path / "writer.lock"
    path.touch()
    with path.open("rb") as reader:
        fcntl.flock(reader, fcntl.LOCK_SH)
        monkeypatch.setattr(time, "sleep", lambda _: fcntl.flock(reader, fcntl.LOCK_UN))
        lock = WriterLock(path)
    assert is_held(path)
    lock.release()


@pytest.mark.parametrize("reason", [errno.ENOLCK, errno.EOPNOTSUPP, errno.ENOSYS])
def test_a_run_is_written_where_there_are_no_locks(
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
    reason: int,
) -> None:
    refuse_locks(monkeypatch, reason)
    run = start(tmp_path / "run")
    assert "no locks on this file system" in caplog.text
    run.write_raw(frame(0, {"time": 0}), {})
    assert open_run(tmp_path / "run").state == State.INCOMPLETE, "looks dead, and is readable"
    run.close(complete=True, expected_frames=1)
    assert open_run(tmp_path / "run").state == State.COMPLETE


def refuse_locks(patch: pytest.MonkeyPatch, reason: int) -> None:
    fcntl = pytest.importorskip("fcntl", reason="Windows locks in another way")

    def flock(file: object, operation: int) -> None:
        raise OSError(reason, os.strerror(reason))

    patch.setattr(fcntl, "flock", flock)


def test_a_run_that_cannot_be_made_leaves_no_folder(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "other").mkdir()
    with monkeypatch.context() as broken:
        refuse_locks(broken, errno.EIO)
        with pytest.raises(RunError, match="cannot be made here"):
            start(tmp_path / "run")
    with file_size_limit(10), pytest.raises(RunError, match="cannot be made here"):
        start(tmp_path / "run")
    with pytest.raises(RunError, match="exists already"):
        start(tmp_path / "other")
    assert [path.name for path in tmp_path.iterdir()] == ["other"]
    start(tmp_path / "run").close(complete=False, expected_frames=None)
