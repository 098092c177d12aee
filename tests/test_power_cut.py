"""What a power cut leaves: all that was synced, and of the rest any part, in any order.

The file operations of a run's life are recorded. A cut then falls after any of them
(disk_model.py). From whatever that leaves, `recover` must make a run in which every durable plane
is there and none is wrong.
"""

import os
import random
import threading
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import short_run
from disk_model import Disk
from faulty_os import Call, FaultyOs, quick_folder
from short_run import TWIN, assert_open_to_all, assert_readable, planes
from store_runs import pixels

from refocus.errors import RunError
from store import disk, durable
from store.durable import Durability
from store.reader import State, open_run
from store.records import Kind, Record, read_records
from store.recover import recover
from store.writer import Provenance, RunWriter


@dataclass
class Life:
    """What was done to the disk while a run was written, sealed, reopened and sealed again."""

    path: Path
    found: dict[Path, bytes | None]
    """What was there before."""
    calls: list[Call] = field(default_factory=list)
    durable: list[tuple[int, int]] = field(default_factory=list)
    """(calls before, durable records) at the end of every round of syncing."""
    sealed: list[int] = field(default_factory=list)
    """Calls before each seal was told."""

    def durable_planes(self, calls: int) -> dict[tuple[Kind, int], Record]:
        """Planes that must survive a cut after so many calls."""
        records = max((count for before, count in self.durable if before <= calls), default=0)
        numbered = read_records(self.path / "journal" / "outcomes.bin").numbered()
        return {
            (Kind(record.kind), record.seq): record
            for number, record in numbered
            if number < records and record.has_plane
        }

    def cut(self, folder: Path, calls: int, chance: random.Random) -> Path:
        """The run as a cut after so many calls may leave it, in *folder*."""
        left = Disk(self.path, self.found)
        for call in self.calls[:calls]:
            left.follow(call)
        found = folder / "run"
        found.mkdir()
        left.leave(self.path, found, chance)
        return found


class Recorder:
    """Answers the calls of a life, and lets rounds of syncing fall anywhere among them."""

    def __init__(self, life: Life, chance: random.Random) -> None:
        self._life = life
        self._chance = chance
        self._recorded = threading.Condition()
        self._wanted = 0
        self._syncing = False
        self.between: list[Durability] = []
        """Whose rounds come between two calls, while the writer waits; else they come beside it."""

    def __call__(self, call: Call) -> Any:
        """Do the call and write it down."""
        if threading.current_thread().name == "refocus-durable":
            self._wait_for_the_writer()
        elif self.between and not self._syncing and self._chance.random() < 0.03:
            self.between[-1].sync()
        with self._recorded:
            answer = call.do()
            if call.writes:
                written = bytes(call.args[1][:answer])
                call = Call(call.number, call.name, call.path, (0, written, call.args[2]))
            self._life.calls.append(call)
            self._recorded.notify_all()
        return answer

    def _wait_for_the_writer(self) -> None:
        """Some calls of its own come between two of a round, unless it is about to wait itself."""
        with self._recorded:
            self._recorded.wait_for(lambda: len(self._life.calls) >= self._wanted, timeout=0.02)
            self._wanted = len(self._life.calls) + self._chance.randrange(6)

    def round(self, whole_round: Callable[[Durability], None], durability: Durability) -> None:
        """A round of syncing."""
        self._syncing = True
        whole_round(durability)
        self._syncing = False
        with self._recorded:
            self._life.durable.append((len(self._life.calls), durability.durable))


@pytest.fixture(scope="module", params=["between 0", "between 1", "beside 2", "beside 3"])
def life(request: pytest.FixtureRequest) -> Iterator[Life]:
    """A run's life, with rounds of syncing between its file operations, or beside them."""
    how, seed = request.param.split()
    with quick_folder() as folder, pytest.MonkeyPatch.context() as patch:
        begun: dict[Path, bytes | None] = {Path("journal"): None, Path("journal/writer.lock"): b""}
        recorded = Life(folder / "run", begun)
        recorder = Recorder(recorded, random.Random(int(seed)))
        whole_round = Durability.sync
        patch.setattr(Durability, "sync", lambda self: recorder.round(whole_round, self))
        if how == "between":
            patch.setattr(Durability, "start", lambda self: recorder.between.append(self))
        patch.setattr(durable, "PAUSE_S", 0.001)
        patch.setattr("store.grid.SHARD_BYTES", short_run.SHARD_BYTES)
        patch.setattr(disk, "os", FaultyOs(recorder))
        short_run.write(recorded.path, partial(note_seal, recorded))
        write_missing_twins(recorded.path)
        recorded.sealed.append(len(recorded.calls))
        patch.setattr(disk, "os", os)
        yield recorded


def note_seal(life: Life, line: str) -> None:
    if line == "sealed":
        life.sealed.append(len(life.calls))


def write_missing_twins(path: Path) -> None:
    run = RunWriter.reopen(path)
    generator = run.note_generator("hash", "identity", "2", "numpy")
    for seq in range(1, len(short_run.FRAMES), 3):
        run.write_refocused(seq, pixels(TWIN + seq), Provenance(generator=generator, latency_ns=1))
    run.reseal()


def test_the_recorded_life_is_one(life: Life) -> None:
    """With all of it kept, the recorded calls give the run as it is."""
    first_round = life.calls[: life.durable[0][0]]
    synced = {call.path for call in first_round if call.name == "fsync"}
    assert {life.path.parent, life.path, life.path / "journal"} <= synced
    assert len(life.durable) > 4
    with quick_folder() as folder:
        found = life.cut(folder, len(life.calls), Keeps())
        assert short_run.snapshot(found) == short_run.snapshot(life.path)
    assert len(planes(open_run(life.path))) == 2 * len(short_run.FRAMES)


class Keeps(random.Random):
    """Luck under which nothing is lost."""

    def random(self) -> float:
        return 0.0

    def choice(self, seq: Any) -> Any:
        return seq[-1]


@pytest.mark.parametrize("cuts", [60, pytest.param(1500, marks=pytest.mark.long)])
@pytest.mark.timeout(900)
def test_after_a_cut_at_any_moment_what_was_durable_is_there_and_nothing_is_wrong(
    life: Life, cuts: int
) -> None:
    for number in range(cuts):
        chance = random.Random(number)
        calls = chance.randrange(len(life.calls))
        with quick_folder() as folder:
            found = life.cut(folder, calls, chance)
            safe = life.durable_planes(calls)
            try:
                recover(found, verify=chance.random() < 0.5)
            except RunError:
                assert not safe, f"cut {number} after {calls} calls"
                continue
            shown = planes(assert_readable(found, safe))
            assert shown.items() >= safe.items()
            assert_open_to_all(found, exactly=True)
            assert not recover(found).done


@pytest.mark.parametrize("cuts", [5, pytest.param(50, marks=pytest.mark.long)])
def test_a_sealed_run_needs_no_recovering_after_a_cut(life: Life, cuts: int) -> None:
    for calls, number in ((calls, number) for calls in life.sealed for number in range(cuts)):
        with quick_folder() as folder:
            found = life.cut(folder, calls, random.Random(number))
            assert open_run(found).state == State.COMPLETE
            assert len(planes(assert_readable(found, life.durable_planes(calls)))) >= 6
            assert_open_to_all(found, exactly=True)


@pytest.mark.parametrize("cuts", [20, pytest.param(500, marks=pytest.mark.long)])
@pytest.mark.timeout(900)
def test_recovering_may_be_cut_off_too(
    life: Life, cuts: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    for number in range(cuts):
        chance = random.Random(number)
        calls = chance.randrange(life.durable[0][0], len(life.calls))
        with quick_folder() as first, quick_folder() as second:
            found = life.cut(first, calls, chance)
            recovering = Life(found, short_run.snapshot(found))
            with monkeypatch.context() as patch:
                patch.setattr(disk, "os", FaultyOs(Recorder(recovering, chance)))
                recover(found)
            whole = len(recovering.calls)
            done = chance.choice((chance.randrange(whole + 1), whole))
            found_again = recovering.cut(second, done, chance)
            recover(found_again)
            shown = planes(assert_readable(found_again, life.durable_planes(calls)))
            assert planes(open_run(found)).items() >= shown.items()
            assert_open_to_all(found_again, exactly=True)
            if done == whole:
                assert shown == planes(open_run(found))
