"""A run against a model of it in memory, through any sequence of writes, kills, recoveries.

Hypothesis chooses the steps. A kill is a disk that takes nothing from some write on: what is on it
then is what kill -9 leaves, and the writer is dropped.
"""

import contextlib
import errno
import os
from collections import Counter
from collections.abc import Iterator
from typing import Any

import numpy as np
import pytest
import short_run
from faulty_os import Call, FaultyOs, quick_folder
from hypothesis import HealthCheck, Phase, settings
from hypothesis import strategies as st
from hypothesis.stateful import (
    RuleBasedStateMachine,
    initialize,
    invariant,
    precondition,
    rule,
    run_state_machine_as_test,
)
from short_run import assert_open_to_all, planes
from store_runs import SHAPE, frame, pixels, start

from refocus.errors import RunError
from refocus.frame import Pixels, RawOutcome, RefocusOutcome
from refocus.status import Counts
from store import disk, shards
from store.check import check
from store.durable import Durability
from store.reader import State, open_run
from store.records import Kind, count
from store.recover import recover
from store.writer import Provenance, RunWriter

AXES = st.fixed_dictionaries(
    {"time": st.integers(0, 6), "channel": st.sampled_from("AB")},
    optional={"z": st.integers(0, 2), "position": st.integers(0, 1)},
)
FORMS = st.sampled_from([(SHAPE, "uint16"), (SHAPE, "uint16"), ((5, 3), "uint8")])
WITHOUT_TWIN = st.sampled_from([one for one in RefocusOutcome if one != RefocusOutcome.REFOCUSED])
STRIKES = st.tuples(
    st.sampled_from(["frames.jsonl", "c.", "outcomes.bin", ".zarr.json.partial", "run.jsonl"]),
    st.booleans(),
)
"""The file at whose next write the disk dies, and whether it takes half of it."""


class Store(RuleBasedStateMachine):
    """What a run should be, and the run."""

    def __init__(self) -> None:
        super().__init__()
        self.opened = contextlib.ExitStack()
        patch = self.opened.enter_context(pytest.MonkeyPatch.context())
        self.faulty = FaultyOs()
        self.rounds: list[Durability] = []
        patch.setattr("store.grid.SHARD_BYTES", short_run.SHARD_BYTES)
        patch.setattr(shards, "MAX_OPEN", 1)
        patch.setattr(disk, "os", self.faulty)
        patch.setattr(Durability, "start", lambda durability: self.rounds.append(durability))
        self.path = self.opened.enter_context(quick_folder()) / "run"
        self.run: RunWriter | None = start(self.path)
        self.is_new = True
        """Not sealed, recovered or killed yet: raw frames are taken."""
        self.is_sealed = False
        self.is_torn = False
        """A kill may have cut an entry of the journal in two."""
        self.expects_complete = False
        self.next_seq = 0
        self.seen: set[int] = set()
        """Frames that a kill may have left a line of."""
        self.raw: dict[int, bool] = {}
        self.answers: dict[int, RefocusOutcome] = {}
        self.planes: dict[tuple[Kind, int], Pixels] = {}

    def teardown(self) -> None:
        if self.run is not None:
            self.drop()
        self.opened.close()

    def open_frames(self) -> list[int]:
        """Saved frames without a twin."""
        return [
            seq
            for seq, saved in self.raw.items()
            if saved and self.answers.get(seq) != RefocusOutcome.REFOCUSED
        ]

    def counts(self) -> Counts:
        """By the model."""
        tally: Counter[tuple[int, int]] = Counter(
            (Kind.RAW, RawOutcome.SAVED if saved else RawOutcome.FAILED)
            for saved in self.raw.values()
        )
        tally.update((Kind.REFOCUS, outcome) for outcome in self.answers.values())
        return count(tally)

    @initialize(times=st.permutations(range(6)))
    def begin(self, times: list[int]) -> None:
        """Some frames, of which every second has a twin."""
        for time in times:
            self.write({"time": time, "channel": "A"}, (SHAPE, "uint16"))
            if time % 2:
                self.refocus(self.next_seq)

    # While it is written

    @precondition(lambda self: self.run is not None and self.is_new)
    @rule(axes=AXES, form=FORMS)
    def write(self, axes: dict[str, Any], form: tuple[tuple[int, int], str]) -> None:
        assert self.run is not None
        seq = self.take_seq()
        self.run.write_raw(frame(seq, axes, *form), {"Camera": "Demo"})
        self.saved(seq, form)

    @precondition(lambda self: self.run is not None and self.is_new)
    @rule(several=st.lists(st.tuples(AXES, FORMS), min_size=2, max_size=6))
    def put(self, several: list[tuple[dict[str, Any], tuple[tuple[int, int], str]]]) -> None:
        assert self.run is not None
        pending = []
        for axes, form in several:
            seq = self.take_seq()
            pending.append(self.run.put_raw(frame(seq, axes, *form), {}))
            self.saved(seq, form)
        self.run.settle()
        assert all(one.settled and one.error is None for one in pending)

    @precondition(lambda self: self.run is not None and self.is_new)
    @rule(axes=AXES, strike=STRIKES)
    def fail(self, axes: dict[str, Any], strike: tuple[str, bool]) -> None:
        """The disk takes nothing for the rest of a frame."""
        assert self.run is not None
        seq = self.take_seq()
        with self.striking(strike):
            try:
                self.run.write_raw(frame(seq, axes), {})
            except RunError:
                self.raw[seq] = False
            else:
                self.saved(seq, (SHAPE, "uint16"))
        self.write(axes, (SHAPE, "uint16"))  # with it the journal takes what it is owed

    @precondition(lambda self: self.run is not None and not self.is_new)
    @rule()
    def raw_is_refused(self) -> None:
        assert self.run is not None
        with pytest.raises(RunError):
            self.run.write_raw(frame(self.next_seq, {"time": 0}), {})

    @precondition(lambda self: self.run is not None and self.open_frames())
    @rule(pick=st.integers(0, 99))
    def refocus(self, pick: int) -> None:
        assert self.run is not None
        seq = self.pick(pick)
        self.run.write_refocused(seq, self.twin(seq), self.made())
        self.refocused(seq)

    @precondition(lambda self: self.run is not None and self.open_frames())
    @rule(pick=st.integers(0, 99), outcome=WITHOUT_TWIN)
    def book(self, pick: int, outcome: RefocusOutcome) -> None:
        assert self.run is not None
        seq = self.pick(pick)
        self.run.book_refocus(seq, outcome, f"because of {outcome.name}")
        self.answers[seq] = outcome

    @precondition(lambda self: self.run is not None)
    @rule(channel=st.sampled_from("AB"))
    def note(self, channel: str) -> None:
        assert self.run is not None
        self.run.note_scaling(channel, 100.0, 2.5)

    @precondition(lambda self: self.run is not None)
    @rule()
    def sync(self) -> None:
        self.rounds[-1].sync()

    # How it ends, and begins again

    @precondition(lambda self: self.run is not None)
    @rule(complete=st.booleans())
    def close(self, complete: bool) -> None:
        assert self.run is not None
        if self.is_new:
            self.run.close(complete=complete, expected_frames=None)
            self.expects_complete = complete and all(self.raw.values()) and bool(self.raw)
        else:
            self.run.reseal()
        self.run, self.is_new, self.is_sealed = None, False, True
        found = open_run(self.path)
        assert found.state == self.final_state()
        assert found.counts == self.counts()
        assert_open_to_all(self.path)

    @precondition(lambda self: self.run is not None)
    @rule(strike=STRIKES, axes=AXES, pick=st.integers(0, 99))
    def kill_within_a_write(
        self, strike: tuple[str, bool], axes: dict[str, Any], pick: int
    ) -> None:
        assert self.run is not None
        with self.striking(strike):
            with contextlib.suppress(RunError):
                if self.is_new:
                    seq = self.take_seq()
                    self.run.write_raw(frame(seq, axes), {})
                    self.saved(seq, (SHAPE, "uint16"))
                elif self.open_frames():
                    seq = self.pick(pick)
                    self.run.write_refocused(seq, self.twin(seq), self.made())
                    self.refocused(seq)
            self.drop()
        self.is_torn = True

    @precondition(lambda self: self.run is not None)
    @rule()
    def kill(self) -> None:
        self.drop()

    @precondition(lambda self: self.run is None)
    @rule(verify=st.booleans())
    def recover(self, verify: bool) -> None:
        recovery = recover(self.path, verify=verify)
        found = open_run(self.path)
        for seq in self.seen - self.raw.keys():  # killed: booked where it left a line
            if found.record(seq, Kind.RAW) is not None:
                self.raw[seq] = False
        for seq, saved in self.raw.items():
            otherwise = RefocusOutcome.LOST if saved else RefocusOutcome.FAILED
            self.answers.setdefault(seq, otherwise)
        assert not recovery.lost
        assert recovery.counts == found.counts == self.counts()
        assert recovery.state == found.state == self.final_state()
        assert not recover(self.path).done
        assert_open_to_all(self.path, exactly=True)
        report = check(self.path)
        assert not report.raw.damaged
        assert report.findings == () or not self.expects_complete
        self.is_sealed, self.is_torn = True, False

    @precondition(lambda self: self.run is None and self.is_sealed)
    @rule()
    def reopen(self) -> None:
        with contextlib.suppress(RunError) if self.is_torn else contextlib.nullcontext():
            self.run = RunWriter.reopen(self.path)
            assert self.run.counts() == self.counts()

    # What holds at any moment

    @invariant()
    def what_is_shown_is_what_was_acknowledged(self) -> None:
        found = open_run(self.path)
        assert not self.is_new or found.state == State.LIVE
        assert planes(found).keys() == self.planes.keys()
        for (kind, seq), wanted in self.planes.items():
            plane = found.raw(seq) if kind == Kind.RAW else found.refocused(seq)
            np.testing.assert_array_equal(plane, wanted, strict=True)

    # Helpers

    def take_seq(self) -> int:
        self.next_seq += 1
        self.seen.add(self.next_seq - 1)
        return self.next_seq - 1

    def pick(self, number: int) -> int:
        frames = self.open_frames()
        return frames[number % len(frames)]

    def twin(self, seq: int) -> Pixels:
        raw = self.planes[Kind.RAW, seq]
        return pixels(seq + short_run.TWIN, raw.shape, raw.dtype.name)

    def made(self) -> Provenance:
        return Provenance(generator=1, latency_ns=5)

    def saved(self, seq: int, form: tuple[tuple[int, int], str]) -> None:
        self.raw[seq] = True
        self.planes[Kind.RAW, seq] = pixels(seq, *form)

    def refocused(self, seq: int) -> None:
        self.answers[seq] = RefocusOutcome.REFOCUSED
        self.planes[Kind.REFOCUS, seq] = self.twin(seq)

    def final_state(self) -> State:
        if not self.raw:
            return State.EMPTY
        return State.COMPLETE if self.expects_complete else State.INCOMPLETE

    @contextlib.contextmanager
    def striking(self, strike: tuple[str, bool]) -> Iterator[None]:
        """From the next write to this file on the disk takes nothing; in the end it does again."""
        name, by_half = strike
        dead = False

        def die(call: Call) -> Any:
            nonlocal dead
            first = not dead and call.writes and call.path.name.startswith(name)
            dead = dead or first
            if first and by_half:
                call.do_half()
            if dead:
                raise OSError(errno.EIO, os.strerror(errno.EIO), str(call.path))
            return call.do()

        self.faulty.rule = die
        yield
        self.faulty.rule = Call.do

    def drop(self) -> None:
        """End the writer's threads and give its lock back, without a byte more on the disk."""

        def dead(call: Call) -> Any:
            raise OSError(errno.EIO, os.strerror(errno.EIO), str(call.path))

        assert self.run is not None
        self.faulty.rule = dead
        with pytest.raises(RunError, match="not sealed"):
            self.run.close(complete=True, expected_frames=None) if self.is_new else (
                self.run.reseal()
            )
        self.run, self.is_new = None, False
        self.faulty.rule = Call.do


@pytest.mark.parametrize("examples", [24, pytest.param(1500, marks=pytest.mark.long)])
@pytest.mark.timeout(1800)
def test_a_run_is_what_its_model_says_after_any_sequence_of_steps(examples: int) -> None:
    run_state_machine_as_test(
        Store,
        settings=settings(
            max_examples=examples,
            stateful_step_count=30,
            deadline=None,
            phases=(Phase.reuse, Phase.generate),  # a failure is told at once: shrinking takes long
            suppress_health_check=list(HealthCheck),
        ),
    )
