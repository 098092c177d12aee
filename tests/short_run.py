"""A short run that needs every kind of file operation, and what must hold of all that is left.

Two segments, a channel that comes late, frames out of order, a shard's end crossed, twins, answers
without a twin, notes. Shards are of four planes (`small_shards`). Every acknowledgement is said as
soon as it is there, so whoever watches knows what must not be lost.
"""

import contextlib
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import yaozarrs
import zarr
from faulty_os import Say
from store_runs import SHAPE, frame, pixels, start

from refocus.errors import RunError
from refocus.frame import Pixels, RefocusOutcome
from store.reader import Run, State, open_run
from store.records import Kind, Record
from store.recover import recover
from store.writer import Provenance, RunWriter

SHARD_BYTES = 4 * 4096
TWIN = 1_000_000
"""A refocused plane has the pixels of this seq further on."""
FRAMES: list[dict[str, Any]] = [
    {"time": 0, "channel": "A"},
    {"time": 2, "channel": "A"},
    {"time": 1, "channel": "B"},
    {"time": 4, "channel": "A"},
    {"time": 0, "channel": "A"},  # again: a segment of its own
    {"time": 1, "channel": "A"},
]
"""Axes of the frames, in order."""


class Told(NamedTuple):
    """What a writer said."""

    acknowledged: set[tuple[Kind, int]]
    failed: set[tuple[Kind, int]]
    sealed: bool

    @classmethod
    def of(cls, lines: Iterable[str]) -> "Told":
        """*lines* as `write` says them."""
        told = cls(set(), set(), "sealed" in lines)
        for what, kind, seq in (line.split() for line in lines if " " in line):
            which = told.acknowledged if what == "saved" else told.failed
            which.add((Kind[kind.upper()], int(seq)))
        return told


def write(path: Path, say: Say) -> None:
    """The run from its first file to its seal, whatever fails; says what became of every plane."""
    try:
        run = start(path)
    except RunError:
        assert not path.exists()
        return
    generator = 0
    with contextlib.suppress(RunError):
        generator = run.note_generator("hash", "identity", "1", "numpy")
    for seq in range(len(FRAMES)):
        write_frame(run, seq, generator, say)
    with contextlib.suppress(RunError):
        run.note_event("the last frame is there")
    with contextlib.suppress(RunError):
        run.close(complete=True, expected_frames=len(FRAMES))
        say("sealed")


def write_frame(run: RunWriter, seq: int, generator: int, say: Say) -> None:
    """A frame and its twin; every third has none, for a reason."""
    with telling(say, Kind.RAW, seq):
        run.write_raw(frame(seq, FRAMES[seq]), {"Camera": "Demo"})
    if seq % 3 == 1:
        run.book_refocus(seq, RefocusOutcome.SKIPPED, "the engine was busy")
        return
    with telling(say, Kind.REFOCUS, seq):
        run.write_refocused(seq, pixels(TWIN + seq), Provenance(generator=generator, latency_ns=1))


@contextlib.contextmanager
def telling(say: Say, kind: Kind, seq: int) -> Iterator[None]:
    """Says whether the plane was acknowledged."""
    try:
        yield
    except RunError:
        say(f"failed {kind.name} {seq}")
    else:
        say(f"saved {kind.name} {seq}")


def wanted(record: Record, shape: tuple[int, int] = SHAPE, dtype: str = "uint16") -> Pixels:
    """The pixels of the plane that a record speaks of."""
    return pixels(record.seq + (TWIN if record.kind == Kind.REFOCUS else 0), shape, dtype)


def planes(run: Run) -> dict[tuple[Kind, int], Record]:
    """The planes that a run shows: records by kind and seq."""
    return {
        (kind, record.seq): record
        for kind in (Kind.RAW, Kind.REFOCUS)
        for record in run.records(kind)
        if record.has_plane
    }


def assert_readable(path: Path, acknowledged: Iterable[tuple[Kind, int]]) -> Run:
    """We find every acknowledged plane, and no plane that we show is wrong."""
    run = open_run(path)
    shown = planes(run)
    assert set(acknowledged) <= set(shown)
    for (kind, seq), record in shown.items():
        found = run.raw(seq) if kind == Kind.RAW else run.refocused(seq)
        np.testing.assert_array_equal(found, wanted(record), strict=True)
    return run


def assert_open_to_all(path: Path, *, exactly: bool = False) -> None:
    """Zarr finds every plane that we show, right; yaozarrs finds nothing wrong.

    *exactly*: zarr finds nothing else.
    """
    shown = planes(open_run(path))
    if not shown:
        return
    yaozarrs.validate_zarr_store(str(path))
    for image in {record.image for record in shown.values()}:
        array = np.asarray(zarr.open_array(path / str(image) / "0", mode="r")[:])
        expected = np.zeros_like(array)
        for record in (record for record in shown.values() if record.image == image):
            place = record.t, record.c, record.z
            expected[place] = wanted(record, array.shape[3:], array.dtype.name)
            np.testing.assert_array_equal(array[place], expected[place], strict=True)
        assert not exactly or np.array_equal(array, expected)


def assert_recovers(path: Path) -> Run:
    """The run is made whole, for us and for all; a second time there is nothing to do."""
    recovery = recover(path)
    before = snapshot(path)
    again = recover(path)
    assert not again.done
    assert snapshot(path) == before
    assert (again.state, again.counts) == (recovery.state, recovery.counts)
    run = assert_readable(path, ())
    assert_open_to_all(path, exactly=True)
    assert run.state == recovery.state != State.LIVE
    assert run.counts.unanswered == 0
    assert not run.damaged_records
    assert not run.torn_bytes
    return run


def snapshot(path: Path) -> dict[Path, bytes | None]:
    """Every file below *path* with its content, and every folder."""
    return {
        found.relative_to(path): found.read_bytes() if found.is_file() else None
        for found in path.rglob("*")
    }
