"""kill -9 costs nothing that was acknowledged, at whatever moment it comes."""

import contextlib
import itertools
import random
import signal
import time
from collections import deque
from collections.abc import Iterator
from functools import partial
from pathlib import Path

import pytest
import short_run
from faulty_os import Child, Say, die, dies_at, dies_within, in_a_child, needs_fork, quick_folder
from short_run import TWIN, Told, assert_open_to_all, assert_readable, assert_recovers
from store_runs import frame, pixels, start

from store import disk, shards
from store.check import check
from store.reader import State, open_run
from store.records import Kind
from store.underway import Pending
from store.writer import Provenance, RunWriter


@pytest.fixture
def small_shards(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("store.grid.SHARD_BYTES", short_run.SHARD_BYTES)


@pytest.fixture
def folder() -> Iterator[Path]:
    with quick_folder() as made:
        yield made


def write_for_ever(path: Path, say: Say) -> None:
    """Frames, and twins three frames later, as fast as they go; each told once it is settled."""
    run = start(path)
    generator = run.note_generator("hash", "identity", "1", "numpy")
    underway: deque[Pending] = deque()
    for seq in itertools.count():
        axes = {"time": seq // 12, "z": seq % 3, "position": seq // 3 % 2, "channel": seq // 6 % 2}
        taken = frame(seq, {**axes, "channel": f"c{axes['channel']}"}, z_um=float(seq % 3))
        underway.append(run.put_raw(taken, {}))
        if seq >= 3:
            made = Provenance(generator=generator, latency_ns=1)
            underway.append(run.put_refocused(seq - 3, pixels(TWIN + seq - 3), made))
        while underway and underway[0].settled:
            settled = underway.popleft()
            assert settled.error is None
            say(f"saved {Kind(settled.record.kind).name} {settled.record.seq}")


@contextlib.contextmanager
def writing(path: Path) -> Iterator[Child]:
    """A process that writes a run for as long as the block lasts, then gets kill -9."""
    child = Child(partial(write_for_ever, path))
    try:
        yield child
    finally:
        child.kill()
        assert child.end() == -signal.SIGKILL


def kill_at_random(path: Path, times: int) -> None:
    """Kill -9 writers some time after so many acknowledgements: it falls anywhere in a write."""
    for number in range(times):
        chance = random.Random(number)
        run = path / str(number)
        with writing(run) as child:
            said = [next(child.lines) for _ in range(chance.randint(1, 60))]
            time.sleep(chance.uniform(0.0, 0.004))
            child.kill()
            said += child.lines
        assert_nothing_lost(run, Told.of(said))


def assert_nothing_lost(path: Path, told: Told) -> None:
    """All that was acknowledged is there, for us and for all, at once and after recovering."""
    assert not told.failed
    run = assert_readable(path, told.acknowledged)
    assert run.state == State.INCOMPLETE
    assert_open_to_all(path)
    finding, *others = check(path).findings
    assert finding == "the run is incomplete: its writer ended without closing it"
    # Without shards the plane that was on its way has a file already.
    assert all(other.endswith("a plane that nobody vouches for") for other in others)
    assert_recovers(path)
    assert_readable(path, told.acknowledged)


@pytest.fixture(params=["through the cache", "by the cache"])
def random_kills(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    """Every plane passes by the page cache, where the file system takes that, or none does."""
    by_the_cache = request.param == "by the cache"
    monkeypatch.setattr(shards, "DIRECT_FROM_BYTES", 1 if by_the_cache else 1 << 30)


third_or_all = pytest.mark.parametrize(
    "step", [3, pytest.param(1, marks=pytest.mark.long)], ids=["every third", "every one"]
)


@needs_fork
@pytest.mark.usefixtures("random_kills")
def test_kill_9_at_10_random_moments_each_costs_nothing_acknowledged(tmp_path: Path) -> None:
    kill_at_random(tmp_path, times=10)


@needs_fork
@pytest.mark.long
@pytest.mark.timeout(1200)
@pytest.mark.usefixtures("random_kills")
def test_kill_9_costs_nothing_acknowledged_often(tmp_path: Path) -> None:
    kill_at_random(tmp_path, times=150)


@needs_fork
def test_kill_9_costs_nothing_acknowledged_without_sparse_files(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The zarr library writes the planes there, a file each."""
    monkeypatch.setattr(disk, "has_sparse_files", lambda folder: False)
    kill_at_random(tmp_path, times=3)
    path = tmp_path / "run"

    def write_and_die(say: Say) -> None:
        run = start(path)
        for seq in range(3):
            short_run.write_frame(run, seq, 1, say)
        die()

    code, said = in_a_child(write_and_die)
    assert code == -signal.SIGKILL
    assert assert_recovers(path).array(0).grid is None
    run = RunWriter.reopen(path)
    run.write_refocused(1, pixels(TWIN + 1), Provenance(generator=1, latency_ns=1))
    run.reseal()
    assert_readable(path, {*Told.of(said).acknowledged, (Kind.REFOCUS, 1)})
    assert_open_to_all(path, exactly=True)


@needs_fork
@third_or_all
@pytest.mark.usefixtures("small_shards")
def test_a_kill_at_any_file_operation_costs_nothing_acknowledged(folder: Path, step: int) -> None:
    for number in itertools.count(step=step):
        path = folder / str(number)
        code, said = in_a_child(partial(short_run.write, path), dies_at(number))
        if code == 0:
            break
        assert code == -signal.SIGKILL, said
        assert_acknowledged_is_there(path, Told.of(said), open_to_all=True)
    assert number > 100
    assert Told.of(said).sealed
    assert open_run(path).state == State.COMPLETE


@needs_fork
@third_or_all
@pytest.mark.usefixtures("small_shards")
def test_a_kill_within_any_write_costs_nothing_acknowledged(folder: Path, step: int) -> None:
    """No system cuts a write of a page in two; should one do so, recovering makes good for it."""
    for number in itertools.count(step=step):
        path = folder / str(number)
        code, said = in_a_child(partial(short_run.write, path), dies_within(number))
        if code == 0:
            break
        assert_acknowledged_is_there(path, Told.of(said), open_to_all=False)
    assert number > 50


def assert_acknowledged_is_there(path: Path, told: Told, *, open_to_all: bool) -> None:
    """Whatever of the run there is, it can be made whole, and all that was said is in it."""
    if not (path / "journal").is_dir():
        assert not told.acknowledged
        return
    before = assert_readable(path, told.acknowledged)
    assert before.counts.saved <= sum(kind == Kind.RAW for kind, _ in told.acknowledged) + 1
    if open_to_all:
        assert_open_to_all(path)
    after = assert_recovers(path)
    assert short_run.planes(after) == short_run.planes(before)


@needs_fork
def test_a_reader_beside_a_living_writer_sees_only_what_is_right(tmp_path: Path) -> None:
    with writing(tmp_path / "run") as child:
        for _ in range(20):
            _, kind, seq = next(child.lines).split()
            run = assert_readable(tmp_path / "run", {(Kind[kind], int(seq))})
            assert run.state == State.LIVE
            assert not run.damaged_records
