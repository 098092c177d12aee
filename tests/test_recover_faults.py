"""Recovering what a power cut left of the journal, and recovering that is itself cut short."""

import errno
import itertools
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np
import pytest
import short_run
from faulty_os import dies_at, fails_at, FaultyOs, in_a_child, needs_fork
from short_run import FRAMES, TWIN, assert_open_to_all, assert_recovers, snapshot
from store_runs import frame, pixels, start

from refocus.errors import RunError
from refocus.frame import RawOutcome, RefocusOutcome
from store import disk, shards
from store.check import check
from store.journal import PairLine
from store.reader import Run, State, open_run
from store.records import RECORD_BYTES, Kind, encode, file_header, read_records
from store.recover import recover
from store.writer import Provenance

JOURNAL = ("outcomes.bin", "frames.jsonl", "run.jsonl")
RECORDS = [(Kind.RAW, 0), (Kind.REFOCUS, 0), (Kind.RAW, 1), (Kind.REFOCUS, 1)]
"""Of the killed run; the last one acknowledges no plane."""


@pytest.fixture(autouse=True)
def unsynced(monkeypatch: pytest.MonkeyPatch) -> None:
    """Waiting for the disk is most of what recovering takes, and only a power cut shows it."""
    monkeypatch.setattr(disk, "sync", lambda path: None)
    monkeypatch.setattr(shards, "SHARD_BYTES", short_run.SHARD_BYTES)


@pytest.fixture(scope="module")
def killed(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Two frames, one with a twin, one with a reason instead, as a killed writer leaves them."""
    folder = tmp_path_factory.mktemp("made")
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


@pytest.mark.parametrize("name", JOURNAL)
def test_a_journal_cut_at_any_byte(killed: Path, tmp_path: Path, name: str) -> None:
    cut_at_every(1, killed, tmp_path, name, lambda whole, _: whole)


@pytest.mark.parametrize(
    "step", [pytest.param(17, id="some"), pytest.param(1, id="all", marks=pytest.mark.long)]
)
@pytest.mark.parametrize("name", JOURNAL)
def test_a_journal_that_ends_in_zeros_from_any_byte_on(
    killed: Path, tmp_path: Path, name: str, step: int
) -> None:
    """A power cut may leave a file as long as it was to be, without its last pages."""
    cut_at_every(step, killed, tmp_path, name, lambda whole, rest: whole + bytes(len(rest)))


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
