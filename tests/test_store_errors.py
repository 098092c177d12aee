"""Errors of the disk, injected: each is said at once, and costs nothing that was acknowledged."""

import errno
import itertools
import os
import threading
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import short_run
from faulty_os import WINDOWS, Call, FaultyOs, Rule, quick_folder
from short_run import Told, assert_open_to_all, assert_readable, assert_recovers
from store_runs import frame, pixels, start

from refocus.errors import RunError
from store import disk, durable
from store.reader import State, open_run
from store.records import Kind
from tests.recording import plane, recorder, settings, shoot


@pytest.fixture
def small_shards(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("store.grid.SHARD_BYTES", short_run.SHARD_BYTES)


def assert_run_opens(path: Path, saved: int) -> None:
    """So many frames are there, for us and for all."""
    assert assert_readable(path, {(Kind.RAW, seq) for seq in range(saved)}).counts.saved == saved
    assert_open_to_all(path)


WRITTEN = ["frames.jsonl", "c.0.0.0.0.0 plane", "c.0.0.0.0.0 index", "outcomes.bin", "zarr.json"]


@pytest.mark.parametrize("how", ["refused", "half"])
@pytest.mark.parametrize("target", WRITTEN)
@pytest.mark.usefixtures("small_shards")
def test_a_write_that_fails_costs_its_own_plane_only(
    tmp_path: Path, faulty: FaultyOs, target: str, how: str
) -> None:
    """EIO for as long as a frame is written, or once after half of the bytes."""
    path = tmp_path / "run"
    run = start(path)
    run.write_raw(frame(0, {"time": 0}), {})
    name, *part = target.split()
    halves: list[int] = []

    def fail(call: Call) -> Any:
        index = call.writes and call.args[-1] >= 4 * 4096
        is_part = not part or index == (part == ["index"])
        if not (call.writes and name in call.path.name and is_part):
            return call.do()
        if how == "half" and not halves:
            halves.append(call.do_half())
            return halves[0]
        if how == "half":
            faulty.rule = Call.do
        raise OSError(errno.EIO, os.strerror(errno.EIO), str(call.path))

    faulty.rule = fail
    with pytest.raises(RunError, match=r"frame 1: not saved: .*Input/output error"):
        run.write_raw(frame(1, {"time": 1}), {})
    faulty.rule = Call.do
    assert_run_opens(path, saved=1)
    run.write_raw(frame(2, {"time": 2}), {})
    counts = run.close(complete=True, expected_frames=3)
    assert (counts.saved, counts.failed) == (2, 1)
    found = open_run(path)
    assert found.state == State.INCOMPLETE
    assert found.counts == counts
    assert not found.torn_bytes
    np.testing.assert_array_equal(found.raw(2), pixels(2))
    assert_open_to_all(path)


def test_a_write_that_takes_some_bytes_at_a_time_is_gone_on_with(
    tmp_path: Path, faulty: FaultyOs
) -> None:
    def slowly(call: Call) -> Any:
        return call.do_half() if call.writes and len(call.args[1]) > 1 else call.do()

    faulty.rule = slowly
    run = start(tmp_path / "run")
    for seq in range(3):
        run.write_raw(frame(seq, {"time": seq}), {})
    run.close(complete=True, expected_frames=3)
    assert_run_opens(tmp_path / "run", saved=3)
    assert open_run(tmp_path / "run").state == State.COMPLETE
    assert_open_to_all(tmp_path / "run", exactly=True)


@pytest.mark.usefixtures("small_shards")
def test_a_run_is_written_where_there_are_no_positioned_writes(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Windows has none."""
    monkeypatch.setattr(disk, "os", FaultyOs(without=WINDOWS))
    said: list[str] = []
    short_run.write(tmp_path / "run", said.append)
    told = Told.of(said)
    assert told.sealed
    assert not told.failed
    assert_readable(tmp_path / "run", told.acknowledged)
    assert_open_to_all(tmp_path / "run", exactly=True)
    assert open_run(tmp_path / "run").state == State.COMPLETE
    assert_recovers(tmp_path / "run")


def cannot_sync(failed: threading.Event) -> Rule:
    """A disk that says it has lost something, whenever it is asked to keep a shard."""

    def rule(call: Call) -> Any:
        if call.name == "fdatasync" and call.path.name.startswith("c."):
            failed.set()
            raise OSError(errno.EIO, os.strerror(errno.EIO), str(call.path))
        return call.do()

    return rule


def test_a_disk_that_cannot_sync_makes_nothing_durable_and_seals_no_run(
    tmp_path: Path, faulty: FaultyOs, monkeypatch: pytest.MonkeyPatch
) -> None:
    """It may have dropped what it was given, and would not say so a second time."""
    monkeypatch.setattr(durable, "PAUSE_S", 0.01)
    path = tmp_path / "run"
    run = start(path)
    faulty.rule = cannot_sync(failed := threading.Event())
    run.write_raw(frame(0, {"time": 0}), {})
    assert failed.wait(30)
    faulty.rule = Call.do  # the disk says that all is well again
    run.write_raw(frame(1, {"time": 1}), {})
    with pytest.raises(RunError, match=r"not sealed .*may not be on the disk.*Input/output error"):
        run.close(complete=True, expected_frames=2)
    assert "Input/output error" in run.sync_trouble
    assert_run_opens(path, saved=2)
    found = open_run(path)
    assert found.state == State.INCOMPLETE
    assert not any(found.is_durable(record) for record in found.records(Kind.RAW))
    assert_recovers(path)


def test_a_recorder_stops_the_acquisition_where_the_disk_cannot_sync(
    tmp_path: Path, faulty: FaultyOs, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(durable, "PAUSE_S", 0.01)
    faulty.rule = cannot_sync(failed := threading.Event())
    with (
        pytest.raises(RunError, match="not sealed"),
        recorder(tmp_path / "run", settings("nowhere", "none")) as r,
    ):
        shoot(r, plane())
        assert failed.wait(30)
        while not r.stopping.wait(0.05):  # told with one of the next planes
            shoot(r, plane())
    assert any("Input/output error" in line for line in r.trouble)
    assert open_run(tmp_path / "run").counts.saved >= 2


TAKES_ROOM = frozenset(("open", "pwrite", "write", "mkdir"))
STEPS = [4, pytest.param(1, marks=(pytest.mark.long, pytest.mark.timeout(600)))]
"""Errors at every so many file operations."""


class Failing:
    """A rule under which calls fail from a number on; remembers how much was said before."""

    def __init__(self, number: int, said: list[str], error: int) -> None:
        self.number = number
        self.said = said
        self.error = error
        self.said_before: int | None = None

    def fail(self, call: Call) -> None:
        """The call is answered with the error."""
        if self.said_before is None:
            self.said_before = len(self.said)
        raise OSError(self.error, os.strerror(self.error), str(call.path))


def full_from(failing: Failing, call: Call) -> Any:
    """A disk that is full and stays so."""
    if call.number >= failing.number and call.name in TAKES_ROOM:
        failing.fail(call)
    return call.do()


def full_at(failing: Failing, call: Call) -> Any:
    """A disk that takes half of a write, refuses the rest, and has room again."""
    if call.number == failing.number and call.writes and len(call.args[1]) > 1:
        return call.do_half()
    if call.number in (failing.number, failing.number + 1) and call.name in TAKES_ROOM:
        failing.fail(call)
    return call.do()


def broken_at(failing: Failing, call: Call) -> Any:
    """A disk that fails once."""
    if call.number == failing.number:
        failing.fail(call)
    return call.do()


Broken = Callable[[Failing, Call], Any]


def short_runs(
    faulty: FaultyOs, broken: Broken, error: int, step: int
) -> Iterator[tuple[Path, Failing]]:
    """Short runs, each with the error one operation later, until none meets it any more."""
    for number in itertools.count(step=step):
        with quick_folder() as folder:
            failing = Failing(number, [], error)
            faulty.rule, faulty.numbers = partial(broken, failing), itertools.count()
            short_run.write(folder / "run", failing.said.append)
            faulty.rule = Call.do
            if failing.said_before is None and next(faulty.numbers) < number:
                assert number > 100
                return
            yield folder / "run", failing


@pytest.mark.parametrize("step", STEPS)
@pytest.mark.usefixtures("small_shards")
def test_from_the_moment_the_disk_is_full_every_plane_fails_and_none_is_lost(
    faulty: FaultyOs, step: int
) -> None:
    for path, failing in short_runs(faulty, full_from, errno.ENOSPC, step):
        if failing.said_before is not None:
            before, after = failing.said[: failing.said_before], failing.said[failing.said_before :]
            assert all(line.startswith("saved") for line in before)
            assert not any(line.startswith("saved") for line in after[1:])
        assert_survived(path, failing)


@pytest.mark.parametrize("step", STEPS)
@pytest.mark.parametrize(("broken", "error"), [(full_at, errno.ENOSPC), (broken_at, errno.EIO)])
@pytest.mark.usefixtures("small_shards")
def test_an_error_at_any_operation_costs_one_frame_at_most(
    faulty: FaultyOs, broken: Broken, error: int, step: int
) -> None:
    for path, failing in short_runs(faulty, broken, error, step):
        failed = Told.of(failing.said).failed
        assert len({seq for _, seq in failed}) <= 1
        assert_survived(path, failing)
        if path.exists():
            found = open_run(path)
            saved, answered = found.counts.saved, found.counts.refocused
            assert saved == len(short_run.FRAMES) - sum(kind == Kind.RAW for kind, _ in failed)
            assert found.counts.failed == len(short_run.FRAMES) - saved
            assert answered == len(short_run.planes(found)) - saved


def assert_survived(path: Path, failing: Failing) -> None:
    """The run opens for everybody with exactly the planes that were acknowledged."""
    told = Told.of(failing.said)
    if not path.exists():
        assert not told.acknowledged
        return
    run = assert_readable(path, told.acknowledged)
    assert set(short_run.planes(run)) == told.acknowledged
    none_failed = not any(kind == Kind.RAW for kind, _ in told.failed)
    assert run.state != State.COMPLETE or none_failed
    assert run.state == State.COMPLETE or not (told.sealed and none_failed)
    assert_open_to_all(path)
    assert set(short_run.planes(assert_recovers(path))) == told.acknowledged
