"""Runs of the current generator, during which another is chosen, and what must hold of them."""

import time
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np

from acquire.recorder import Recorder
from refocus.frame import RefocusOutcome
from refocus.settings import AcquireSettings, EngineSettings, LinkSettings, Settings
from store.reader import Run, State
from store.records import Kind, Record
from tests.recording import assert_raw, plane, recorder, shoot

SHAPE = (48, 64)
LIMIT_S = 60.0


class Recording:
    """A run of the current generator, and what was shot in it."""

    def __init__(self, folder: Path, fill_at_end_s: float = 10.0, **engine: Any) -> None:
        chosen = Settings(
            acquire=AcquireSettings(drain_s=20.0, fill_at_end_s=fill_at_end_s),
            engine=EngineSettings(runtime="openvino", **engine),
            link=LinkSettings(beat_ms=100),
        )
        self.path = folder / "run"
        self.recorder: Recorder = recorder(self.path, chosen, expected_shape=SHAPE)
        self.taken: list[np.ndarray] = []

    def shoot(self) -> None:
        """The next frame, once there is room for it: none is skipped for want of room."""
        self.until(lambda: self.recorder.slot_waiting < 2)
        self.taken.append(plane(SHAPE))
        shoot(self.recorder, self.taken[-1])
        self.until(lambda: self.recorder.status().received == len(self.taken))

    def shoot_until(self, done: Callable[[], bool]) -> None:
        deadline = time.monotonic() + LIMIT_S
        while not done():
            assert time.monotonic() < deadline, self.recorder.status()
            self.shoot()

    def until(self, done: Callable[[], bool]) -> None:
        deadline = time.monotonic() + LIMIT_S
        while not done():
            assert time.monotonic() < deadline, self.recorder.status()
            time.sleep(0.005)

    def works_with(self, name: str, frames: int = 3) -> None:
        """Goes on until generator *name* has this many frames behind it."""
        self.shoot_until(lambda: self.recorder.status().generator == name)
        refocused = self.recorder.status().counts.refocused
        self.shoot_until(lambda: self.recorder.status().counts.refocused >= refocused + frames)


def in_use(run: Run) -> list[tuple[str, int]]:
    """Generators as they came to work, with the first frame that is theirs alone."""
    events = [line.fields for line in run.notes.events if line.event == "generator_in_use"]
    return [(fields["name"], fields["from_seq"]) for fields in events]


def makers(run: Run) -> Counter[str]:
    lines = run.notes.generators
    return Counter(lines[r.generator].name for r in refocused(run))


def refocused(run: Run) -> list[Record]:
    return [r for r in run.records(Kind.REFOCUS) if r.outcome == RefocusOutcome.REFOCUSED]


def assert_sound(run: Run, taken: list[np.ndarray]) -> None:
    """Raw is whole, every twin is its own generator's, and no frame went to one replaced before."""
    assert run.state is State.COMPLETE
    assert_raw(run, taken)
    assert [entry.seq for entry in run.frames()] == list(range(len(taken)))
    (scaling,) = run.notes.scalings.values()
    epochs = in_use(run)
    for record in refocused(run):
        name = run.notes.generators[record.generator].name
        raw, twin = taken[record.seq].astype(float), run.refocused(record.seq)
        wanted = {"identity": raw, "negated": np.clip(2 * scaling.offset - raw, 0, None)}[name]
        assert twin is not None
        assert np.abs(twin - wanted).max() <= 2, (record.seq, name)
        begun = sum(from_seq <= record.seq for _, from_seq in epochs)
        assert name in [later for later, _ in epochs[begun - 1 :]]
