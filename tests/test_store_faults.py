"""What a kill and a full disk may cost: nothing that was acknowledged, and it is said at once."""

import contextlib
import errno
import os
import random
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
import yaozarrs
import zarr
from store_runs import SHAPE, file_size_limit, frame, pixels, start

from refocus.errors import RunError
from refocus.frame import RefocusOutcome
from store.check import check
from store.disk import replace_file
from store.lock import WriterLock, is_held
from store.planes import PlaneArray
from store.reader import State, open_run
from store.records import Kind
from store.writer import Provenance

TWIN = 1_000_000
"""A refocused plane has the pixels of this seq further on."""


def write_for_ever(path: Path) -> None:
    """The child's work: frames and twins, each announced once it is acknowledged."""
    run = start(path)
    generator = run.note_generator("hash", "identity", "1", "numpy")
    seq = 0
    while True:
        axes = {"time": seq // 12, "z": seq % 3, "position": seq // 3 % 2, "channel": seq // 6 % 2}
        run.write_raw(
            frame(seq, {**axes, "channel": f"c{axes['channel']}"}, z_um=float(seq % 3)), {}
        )
        os.write(1, f"raw {seq}\n".encode())
        run.write_refocused(seq, pixels(TWIN + seq), Provenance(generator=generator, latency_ns=1))
        os.write(1, f"refocus {seq}\n".encode())
        seq += 1


@contextlib.contextmanager
def writing(path: Path) -> Iterator["subprocess.Popen[str]"]:
    """A process that writes a run for as long as the block lasts, then gets kill -9."""
    command = [sys.executable, __file__, str(path)]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as child:
        try:
            yield child
        finally:
            child.kill()


def killed_run(path: Path, acknowledged: int, delay_s: float) -> list[tuple[Kind, int]]:
    """Kill -9 a writer some time after so many acknowledgements; returns all that it made."""
    with writing(path) as child:
        assert child.stdout is not None
        said = [next(child.stdout) for _ in range(acknowledged)]
        time.sleep(delay_s)  # the kill falls anywhere in a write
        child.kill()
        said += child.stdout
    whole = (line.split() for line in said if line.endswith("\n"))
    return [(Kind[kind.upper()], int(seq)) for kind, seq in whole]


def assert_nothing_lost(path: Path, acknowledged: list[tuple[Kind, int]]) -> None:
    """Every acknowledged plane reads back, by us and by zarr, in a run that is still valid."""
    run = open_run(path)
    assert run.state == State.INCOMPLETE
    for kind, seq in acknowledged:
        found, wanted = run.raw(seq), pixels(seq)
        if kind == Kind.REFOCUS:
            found, wanted = run.refocused(seq), pixels(TWIN + seq)
        np.testing.assert_array_equal(found, wanted, strict=True)
        record = run.record(seq, kind)
        assert record is not None
        array = zarr.open_array(path / str(record.image) / "0", mode="r")
        np.testing.assert_array_equal(array[record.t, record.c, record.z], wanted)
    report = check(path)
    assert report.raw.damaged == 0
    assert report.raw.acknowledged >= sum(kind == Kind.RAW for kind, _ in acknowledged)
    assert report.valid_ome_zarr
    assert report.findings == ("the run is incomplete: its writer ended without closing it",)


def kill_at_random(path: Path, times: int) -> None:
    for number in range(times):
        chance = random.Random(number)
        run = path / str(number)
        acknowledged = killed_run(run, chance.randint(1, 60), chance.uniform(0.0, 0.004))
        assert_nothing_lost(run, acknowledged)


def test_kill_9_costs_nothing_acknowledged(tmp_path: Path) -> None:
    kill_at_random(tmp_path, times=5)


@pytest.mark.long
@pytest.mark.timeout(1200)
def test_kill_9_costs_nothing_acknowledged_often(tmp_path: Path) -> None:
    kill_at_random(tmp_path, times=200)


def test_a_reader_beside_a_living_writer_sees_only_what_is_right(tmp_path: Path) -> None:
    with writing(tmp_path / "run") as child:
        assert child.stdout is not None
        for _ in range(20):
            kind, said = next(child.stdout).split()
            run = open_run(tmp_path / "run")
            assert run.state == State.LIVE
            assert run.record(int(said), Kind[kind.upper()]) is not None
            assert not run.damaged_records
            last = run.counts.saved - 1
            np.testing.assert_array_equal(run.raw(last), pixels(last))
            twin = run.refocused(last)  # it may be on its way
            if twin is not None:
                np.testing.assert_array_equal(twin, pixels(TWIN + last))


@pytest.fixture
def small_disk(tmp_path: Path) -> Iterator[Path]:
    """A file system of 1 MiB."""
    disk = tmp_path / "disk"
    disk.mkdir()
    mount = ["mount", "-t", "tmpfs", "-o", "size=1m", "tmpfs", str(disk)]
    try:
        subprocess.run(mount, check=True, capture_output=True)
    except (OSError, subprocess.CalledProcessError) as error:
        pytest.skip(f"a small file system cannot be mounted here: {error}")
    yield disk
    subprocess.run(["umount", str(disk)], check=True)


def test_a_full_disk_is_said_at_once_and_costs_nothing_acknowledged(small_disk: Path) -> None:
    shape = (150, 200)  # 60 kB: 1 MiB holds some 15
    run = start(small_disk / "run")
    saved = 0
    with pytest.raises(RunError, match="No space left"):
        for saved in range(25):
            run.write_raw(frame(saved, {"time": saved}, shape), {})
    for seq in range(saved + 1, 25):
        with pytest.raises(RunError, match=f"frame {seq}: not saved"):
            run.write_raw(frame(seq, {"time": seq}, shape), {})
    assert saved > 10
    assert_run_opens(small_disk / "run", saved=saved, shape=shape)

    (small_disk / "run" / "0" / "0" / "c.0.0.0.0.0").unlink()  # room for the seal and one plane
    run.write_raw(frame(25, {"time": 30}, shape), {})
    counts = run.close(complete=True, expected_frames=26)
    assert (counts.saved, counts.failed) == (saved + 1, 25 - saved)
    found = open_run(small_disk / "run")
    assert found.state == State.INCOMPLETE
    assert found.counts == counts


@pytest.mark.parametrize("answer", [errno.EOPNOTSUPP, errno.EINVAL, None])
def test_planes_are_written_where_blocks_cannot_be_taken_ahead(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, answer: int | None
) -> None:
    """File systems without fallocate refuse it in two ways; Windows and macOS have no such call."""

    def refuse(*_: object) -> None:
        raise OSError(answer, "this file system takes no blocks ahead")

    if answer is None:
        monkeypatch.delattr(os, "posix_fallocate", raising=False)
    else:
        monkeypatch.setattr(os, "posix_fallocate", refuse, raising=False)
    run = start(tmp_path / "run")
    run.write_raw(frame(0, {"time": 0}), {})
    run.close(complete=True, expected_frames=1)
    assert_run_opens(tmp_path / "run", saved=1)


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
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A virus scanner reads each new file; the rename is refused until it has done."""
    run = start(tmp_path / "run")
    run.write_raw(frame(0, {"time": 0}), {})
    refusals = {"c.1.0.0.0.0": 3, "zarr.json": 2}
    replace = Path.replace

    def refuse(self: Path, target: Path) -> Path:
        if refusals.get(target.name):
            refusals[target.name] -= 1
            raise PermissionError(errno.EACCES, "another program has it open", str(target))
        return replace(self, target)

    with monkeypatch.context() as windows:
        windows.setattr(sys, "platform", "win32")
        windows.setattr(Path, "replace", refuse)
        run.write_raw(frame(1, {"time": 1}), {})
    assert refusals == {"c.1.0.0.0.0": 0, "zarr.json": 0}
    run.close(complete=True, expected_frames=2)
    assert_run_opens(tmp_path / "run", saved=2)


@pytest.mark.parametrize("writes", ["metadata", "plane"])
def test_a_file_that_stays_open_elsewhere_on_windows_fails_with_the_first_error(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, writes: str
) -> None:
    tries = []

    def refuse(self: Path, target: Path) -> Path:
        tries.append(target)
        raise PermissionError(errno.EACCES, "cannot be renamed")

    def hold(self: Path, missing_ok: bool = False) -> None:
        raise PermissionError(errno.EACCES, "cannot be removed")

    array = PlaneArray.create(tmp_path / "array", SHAPE, "uint16")
    with monkeypatch.context() as windows:
        windows.setattr(sys, "platform", "win32")
        windows.setattr(Path, "replace", refuse)
        windows.setattr(Path, "unlink", hold)
        windows.setattr(time, "sleep", lambda _: None)
        with pytest.raises(PermissionError, match="cannot be renamed"):
            if writes == "plane":
                array.write(0, 0, 0, pixels(0))
            else:
                replace_file(tmp_path / "zarr.json", b"{}")
    assert len(tries) > 50


def test_planes_that_fail_alike_share_one_reason(tmp_path: Path) -> None:
    path = tmp_path / "run"
    run = start(path)
    run.write_raw(frame(0, {"time": 0}), {})
    for seq in range(1, 4):
        (path / "0" / "0" / f"c.{seq}.0.0.0.0").mkdir()
        with pytest.raises(RunError, match=rf"frame {seq}: not saved: .*c\.{seq}\.0"):
            run.write_raw(frame(seq, {"time": seq}), {})
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


if __name__ == "__main__":
    write_for_ever(Path(sys.argv[1]))
