"""Recovering what a power cut left of the journal, and recovering that is itself cut short."""

import errno
import itertools
import os
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import short_run
from faulty_os import Call, FaultyOs, dies_at, in_a_child, needs_fork, quick_folder
from short_run import TWIN, assert_recovers, snapshot
from store_runs import pixels, start

from refocus.errors import DiskError, RunError
from store import disk, durable
from store.check import check
from store.reader import Run, open_run
from store.records import RECORD_BYTES, Kind
from store.recover import recover

JOURNAL = ("outcomes.bin", "frames.jsonl", "run.jsonl")
RECORDS = [(Kind.RAW, 0), (Kind.REFOCUS, 0), (Kind.RAW, 1), (Kind.REFOCUS, 1)]
"""Of the killed run; the last one acknowledges no plane."""


@pytest.fixture(autouse=True)
def unsynced(monkeypatch: pytest.MonkeyPatch) -> None:
    """Waiting for the disk is most of what recovering takes, and only a power cut shows it."""
    monkeypatch.setattr(disk, "sync", lambda path: None)


@pytest.fixture
def memory() -> Iterator[Path]:
    with quick_folder() as folder:
        yield folder


@pytest.fixture(scope="module")
def killed(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Two frames, one with a twin, one with a reason instead, as a killed writer leaves them."""
    folder = tmp_path_factory.mktemp("made")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("store.grid.SHARD_BYTES", short_run.SHARD_BYTES)
        patch.setattr(durable, "PAUSE_S", 3600.0)  # no mark among the records
        run = start(folder / "run")
        generator = run.note_generator("hash", "identity", "1", "numpy")
        for seq in range(2):
            short_run.write_frame(run, seq, generator, lambda _: None)
        shutil.copytree(folder / "run", folder / "killed")
        run.close(complete=True, expected_frames=2)
    return folder / "killed"


class Copy:
    """A copy of a run that can be put back to what it was."""

    def __init__(self, made: Path, path: Path) -> None:
        self.path = Path(shutil.copytree(made, path))
        self._before = snapshot(path)

    def restore(self) -> None:
        for name, content in snapshot(self.path).items():
            if content is not None and name not in self._before:
                (self.path / name).unlink()
        for name, content in self._before.items():
            path = self.path / name
            if content is None:
                path.mkdir(exist_ok=True)
            elif not path.exists() or path.read_bytes() != content:
                path.write_bytes(content)


SOME_OR_ALL = pytest.mark.parametrize(
    "step", [pytest.param(7, id="some"), pytest.param(1, id="all", marks=pytest.mark.long)]
)


@pytest.mark.parametrize("name", JOURNAL)
@SOME_OR_ALL
def test_a_journal_cut_at_any_byte(killed: Path, memory: Path, name: str, step: int) -> None:
    step = 1 if name == "outcomes.bin" else step
    cut_at_every(step, killed, memory, name, lambda whole, _: whole)


@pytest.mark.parametrize("name", JOURNAL)
@SOME_OR_ALL
def test_a_journal_that_ends_in_zeros_from_any_byte_on(
    killed: Path, memory: Path, name: str, step: int
) -> None:
    """A power cut may leave a file as long as it was to be, without its last pages."""
    cut_at_every(step, killed, memory, name, lambda whole, rest: whole + bytes(len(rest)))


def cut_at_every(
    step: int, made: Path, folder: Path, name: str, torn: Callable[[bytes, bytes], bytes]
) -> None:
    """Recover the run with *torn(what is left, the rest)* as its file *name*, byte by byte."""
    copy = Copy(made, folder / "copy")
    path = copy.path / "journal" / name
    content = path.read_bytes()
    for length in range(0, len(content), step):
        path.write_bytes(torn(content[:length], content[length:]))
        left = len(RECORDS) if name != "outcomes.bin" else max(0, length // RECORD_BYTES - 1)
        run = recovers(copy.path, left, thoroughly=length % 50 == 0)
        assert (run.counts.received, run.counts.unanswered) == (2, 0)
        assert len(run.notes.pairs) == 1
        copy.restore()


def recovers(path: Path, records: int, *, thoroughly: bool) -> Run:
    """Recover a run of whose records so many are left: what they acknowledged is there."""
    recovery = recover(path)
    assert recovery.lost <= 4 - records
    before = snapshot(path)
    assert not recover(path).done
    assert snapshot(path) == before
    run = open_run(path)
    assert short_run.planes(run).keys() == set(RECORDS[:records]) - {(Kind.REFOCUS, 1)}
    for seq in range(2):
        raw, twin = run.raw(seq), run.refocused(seq)
        assert raw is None or np.array_equal(raw, pixels(seq))
        assert twin is None or np.array_equal(twin, pixels(TWIN + seq))
    if thoroughly:
        assert_recovers(path)
    return run


@needs_fork
@pytest.mark.parametrize("damaged", [False, True], ids=["sound", "damaged"])
def test_recovering_may_be_killed_at_any_file_operation(
    killed: Path, memory: Path, *, damaged: bool
) -> None:
    """Begun again it comes to the same end."""
    copy = Copy(killed, memory / "copy")
    path = copy.path
    for number in itertools.count():
        if damaged:
            damage_all(path)
        code, said = in_a_child(lambda say: say(str(recover(path))), dies_at(number))
        run = assert_recovers(path)
        saved = RECORDS[1:3] if damaged else RECORDS[:3]
        assert short_run.planes(run).keys() == set(saved)
        if code == 0:
            break
        assert code == -9, said
        copy.restore()
    assert number > (20 if damaged else 10)


def damage_all(path: Path) -> None:
    """A plane, an index, metadata and the end of every file of the journal."""
    shard = path / "0/0/c.0.0.0.0.0"
    content = bytearray(shard.read_bytes())
    content[0] ^= 1
    shard.write_bytes(content[:-9])
    (path / "1/0/zarr.json").write_bytes(b"{")
    (path / "0/zarr.json").unlink()
    (path / "OME/.zarr.json.partial").write_bytes(b"")
    outcomes = path / "journal/outcomes.bin"
    outcomes.write_bytes(outcomes.read_bytes()[: 4 * RECORD_BYTES] + bytes(70))
    for name in JOURNAL[1:]:
        with (path / "journal" / name).open("ab") as file:
            file.write(b'{"to')


@pytest.mark.parametrize("number", range(0, 20, 3))
def test_recovering_on_a_full_disk_says_so_and_goes_on_when_there_is_room(
    killed: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, number: int
) -> None:
    def fill_up(call: Call) -> Any:
        if call.number >= number and call.name != "unlink":
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        return call.do()

    path = Path(shutil.copytree(killed, tmp_path / "run"))
    damage_all(path)
    with monkeypatch.context() as full:
        full.setattr(disk, "os", FaultyOs(fill_up))
        with pytest.raises(DiskError, match=r"not recovered.*No space left"):
            recover(path)
    run = assert_recovers(path)
    assert short_run.planes(run).keys() == set(RECORDS[1:3])


def rewrite(path: Path, keep: Callable[[bytes], bool]) -> None:
    """Leave out the lines that are not to be kept."""
    lines = path.read_bytes().splitlines(keepends=True)
    path.write_bytes(b"".join(line for line in lines if keep(line)))


@pytest.mark.parametrize("lost", ["pair", "pair and frames", "pair and metadata", "frames"])
def test_what_the_journal_lost_is_learnt_from_the_rest(
    killed: Path, tmp_path: Path, lost: str
) -> None:
    path = Path(shutil.copytree(killed, tmp_path / "run"))
    (before,) = open_run(path).notes.pairs.values()
    if "pair" in lost:
        rewrite(path / "journal/run.jsonl", lambda line: b'"pair"' not in line)
    if "frames" in lost:
        (path / "journal/frames.jsonl").write_bytes(b"")
    if "metadata" in lost:
        for name in ("0/zarr.json", "1/zarr.json", "1/0/zarr.json", "zarr.json"):
            (path / name).unlink()
    assert recover(path).lost == 0
    run = assert_recovers(path)
    assert short_run.planes(run).keys() == set(RECORDS[:3])
    assert run.notes.pairs == {0: before}


def test_planes_of_which_nothing_says_what_they_are_like_are_lost(
    killed: Path, tmp_path: Path
) -> None:
    path = Path(shutil.copytree(killed, tmp_path / "run"))
    for name in ("journal/frames.jsonl", "0/0/zarr.json", "1/0/zarr.json"):
        (path / name).write_bytes(b"")
    rewrite(path / "journal/run.jsonl", lambda line: b'"pair"' not in line)
    assert recover(path).lost == 3
    run = assert_recovers(path)
    assert (run.counts.saved, run.counts.failed) == (0, 2)


def test_a_damaged_record_in_the_middle_stays_and_its_plane_becomes_absent(
    killed: Path, tmp_path: Path
) -> None:
    path = Path(shutil.copytree(killed, tmp_path / "run"))
    outcomes = path / "journal/outcomes.bin"
    content = bytearray(outcomes.read_bytes())
    content[RECORD_BYTES + 3] ^= 1
    outcomes.write_bytes(content)
    assert recover(path).lost == 1
    before = snapshot(path)
    again = recover(path)
    assert (again.lost, again.done) == (1, ())
    assert snapshot(path) == before
    run = open_run(path)
    assert run.damaged_records == [0]
    assert short_run.planes(run).keys() == set(RECORDS[1:3])
    assert "1 journal record damaged" in str(check(path).findings)
    short_run.assert_open_to_all(path, exactly=True)


def test_a_damaged_head_of_the_records_is_written_again(killed: Path, tmp_path: Path) -> None:
    path = Path(shutil.copytree(killed, tmp_path / "run"))
    outcomes = path / "journal/outcomes.bin"
    before = outcomes.read_bytes()
    outcomes.write_bytes(bytes(RECORD_BYTES) + before[RECORD_BYTES:])
    run = assert_recovers(path)
    assert outcomes.read_bytes().startswith(before)
    assert short_run.planes(run).keys() == set(RECORDS[:3])


@pytest.mark.parametrize("content", [None, b"\1" * 300], ids=["gone", "another file"])
def test_nothing_is_touched_where_no_record_is_left(
    killed: Path, tmp_path: Path, content: bytes | None
) -> None:
    """The planes may all be right; nobody could tell."""
    path = Path(shutil.copytree(killed, tmp_path / "run"))
    outcomes = path / "journal/outcomes.bin"
    outcomes.unlink() if content is None else outcomes.write_bytes(content)
    before = snapshot(path)
    with pytest.raises(RunError, match=r"outcomes\.bin"):
        recover(path)
    assert snapshot(path) == before
