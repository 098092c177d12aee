"""Readers that look while a run is written may refuse for a moment; they show no wrong pixel."""

import contextlib
import shutil
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from faulty_os import Call, FaultyOs
from foreign_readers import LIBRARIES, At, Reader, assert_shows, block, library
from foreign_run import TWIN, Slot, Writer, further
from store_runs import frame, pixels, start

from refocus.frame import Pixels
from store import disk
from store.layout import array_dir
from store.reader import Run, open_run
from store.records import NO_IMAGE, Kind
from store.writer import Provenance

POLLERS = [name for name in LIBRARIES if name != "dask"]
"""dask reads through zarr-python, with more around it."""


def poll(path: Path, read: Reader, times: int) -> None:
    """Read the newest planes and the next ones, over and over, while they are written."""
    writer = Writer(path)
    try:
        writer.tell("go on")
        for _ in range(20):
            writer.hear()
        refused = 0
        for _ in range(times):
            run = open_run(path)
            refused += look(run, Kind.RAW, read) + look(run, Kind.REFOCUS, read)
        assert refused <= times // 20
    finally:
        writer.kill()


def look(run: Run, kind: Kind, read: Reader) -> int:
    """Hold the newest plane of a kind, and the next one, against what is right.

    Returns how often the reader refused the acknowledged plane (a shard's index while it is
    replaced): it may say so and look again, as long as it shows nothing wrong.
    """
    *_, record = (found for found in run.records(kind) if found.image != NO_IMAGE)
    last, coming = further(record.seq), further(record.seq + 1)
    array, slot = array_dir(run.path, record.image), (record.t, record.c, record.z)
    twin = kind == Kind.REFOCUS
    wanted = last.picture(twin=twin)
    ours = run.refocused(last.seq) if twin else run.raw(last.seq)
    np.testing.assert_array_equal(ours, wanted, strict=True)
    refused = 0
    while (found := read_or_refuse(read, array, slot)) is None:
        refused += 1
        assert refused < 10, f"frame {last.seq} stays unreadable"
    np.testing.assert_array_equal(found, wanted, strict=True)
    found = read_or_refuse(read, array, (record.t + 1, record.c, record.z))
    if found is not None and found.any():
        assert coming.has_twin or not twin
        np.testing.assert_array_equal(found, coming.picture(twin=twin), strict=True)
    return refused


def read_or_refuse(read: Reader, array: Path, at: At) -> Pixels | None:
    """What another reader shows; None where it says that it cannot."""
    with contextlib.suppress(ValueError, IndexError):  # a torn index; outside the shape
        return read(array, at)
    return None


@pytest.mark.parametrize("name", POLLERS)
def test_a_reader_that_polls_a_live_run_shows_no_wrong_pixel(tmp_path: Path, name: str) -> None:
    with library(name) as read:
        poll(tmp_path / "run", read, times=40)


@pytest.mark.long
@pytest.mark.timeout(1200)
@pytest.mark.parametrize("name", POLLERS)
def test_a_reader_that_polls_live_runs_shows_no_wrong_pixel(tmp_path: Path, name: str) -> None:
    with library(name) as read:
        for number in range(20):
            poll(tmp_path / str(number), read, times=100)
            shutil.rmtree(tmp_path / str(number))


def torn(before: bytes, after: bytes) -> Iterator[bytes]:
    """What a reader may find while *after* is copied over *before*, from either end.

    An entry of an index (16 bytes, aligned) is old or new, never half of each: of 19,000 torn
    indices seen in 3.3 million reads beside a hammering writer none had a mixed entry.
    """
    for cut in (*range(0, 16 * 7, 16), len(after) - 4, len(after)):
        yield after[:cut] + before[cut:]
        yield before[:cut] + after[cut:]


@pytest.mark.parametrize("name", POLLERS)
def test_a_torn_index_is_refused_or_shows_no_wrong_pixel(tmp_path: Path, name: str) -> None:
    path = tmp_path / "run"
    with library(name) as read:
        run = start(path)
        for seq in range(3):
            run.write_raw(frame(seq, {"time": seq}), {})
        array = open_run(path).array(0)
        assert array.grid is not None
        shard, index = array.shard_file(0, 0, 0), array.grid.index_offset
        before = shard.read_bytes()[index:]
        for seq in range(3, 5):
            run.write_raw(frame(seq, {"time": seq}), {})
        after = shard.read_bytes()[index:]
        for content in torn(before, after):
            with shard.open("r+b") as file:
                file.seek(index)
                file.write(content)
            found = [read_or_refuse(read, array_dir(path, 0), (seq, 0, 0)) for seq in range(6)]
            for seq, plane in enumerate(found):
                if plane is not None and (seq < 3 or plane.any()):
                    np.testing.assert_array_equal(plane, pixels(seq))
            if content == after:
                assert all(plane is not None and plane.any() for plane in found[:5])
            ours = open_run(path)
            for seq in range(5):
                np.testing.assert_array_equal(ours.raw(seq), pixels(seq))
        run.close(complete=True, expected_frames=5)


class Onlooker:
    """Reads the raw and the refocused array after every change of a file, and within each write.

    A rule for FaultyOs. Changes are made one at a time, whichever thread of the writer makes them.
    """

    def __init__(self, run: Path, read: Reader) -> None:
        self.sure: tuple[dict[Slot, Pixels], ...] = {}, {}
        """Planes acknowledged: raw, refocused."""
        self.maybe: tuple[dict[Slot, Pixels], ...] = {}, {}
        """Planes given to the writer."""
        self.looks = 0
        self.wrong: list[str] = []
        self._arrays = array_dir(run, 0), array_dir(run, 1)
        self._read = read
        self._lock = threading.Lock()

    def __call__(self, call: Call) -> Any:
        with self._lock:
            if call.writes:
                call.do_half()
                self._look(refusable=True)
            answer = call.do()
            self._look(refusable=False)
            return answer

    def _look(self, *, refusable: bool) -> None:
        for array, sure, maybe in zip(self._arrays, self.sure, self.maybe, strict=True):
            if not sure or self.wrong:
                continue
            self.looks += 1
            found = read_or_refuse(self._read, array, block(array, sure, maybe))
            try:
                assert refusable or found is not None, "refused between two changes"
                if found is not None:
                    assert_shows(found, sure, maybe)
            except AssertionError as error:  # told at the end, not to the writer
                self.wrong.append(str(error))


@pytest.mark.parametrize("name", POLLERS)
def test_a_reader_may_look_between_any_two_changes_of_a_file(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name: str
) -> None:
    monkeypatch.setattr("store.grid.SHARD_BYTES", 4 * disk.PAGE)
    with library(name) as read:
        onlooker = Onlooker(tmp_path / "run", read)
        monkeypatch.setattr(disk, "os", FaultyOs(onlooker))
        run = start(tmp_path / "run")
        made = Provenance(generator=run.note_generator("hash", "name", "1", "numpy"), latency_ns=1)
        for seq, t in enumerate((0, 2, 1, 5, 3, 12, 4)):
            planes = pixels(seq), pixels(TWIN + seq)
            for maybe, plane in zip(onlooker.maybe, planes, strict=True):
                maybe[t, 0, 0] = plane
            run.write_raw(frame(seq, {"time": t}), {})
            onlooker.sure[0][t, 0, 0] = planes[0]
            if seq != 4:
                run.write_refocused(seq, planes[1], made)
                onlooker.sure[1][t, 0, 0] = planes[1]
        run.close(complete=True, expected_frames=7)
    assert not onlooker.wrong
    assert onlooker.looks > 100
