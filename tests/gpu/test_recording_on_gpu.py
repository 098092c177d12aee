"""Whole recordings over a real GPU: what it may break, and what it may not."""

import os
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from acquire.recorder import Recorder
from engine import model_store
from refocus.frame import RefocusOutcome
from refocus.settings import AcquireSettings, EngineSettings, Settings
from store.reader import State, open_run
from store.records import Kind
from tests import identity_package
from tests.recording import assert_raw, events, recorder, shoot

pytestmark = [pytest.mark.gpu, pytest.mark.timeout(900), pytest.mark.usefixtures("takes_plans")]

ROOT = Path(__file__).parents[2]
SHAPE = (256, 320)
LIMIT_S = 300.0
BREAKS_THE_CONTEXT = """
import os
from pathlib import Path
import numpy as np
from engine.runtimes import slot

plain = slot.Slot.start

def start(self, pixels, scaling):
    flag = Path(os.environ["REFOCUS_TEST_FLAG"])
    if flag.exists():
        flag.unlink()
        gpu = self._gpu
        address = np.uint64(8)  # nobody's memory: the context is gone after this kernel
        gpu.launch(gpu.kernel("reset_stats"), (1, 1), 1, [address], self._stream)
    plain(self, pixels, scaling)

slot.Slot.start = start
"""
"""A sitecustomize.py: what the worker's process does before anything else."""


class Recording:
    """A run over TensorRT, and what was shot in it."""

    def __init__(self, folder: Path, **engine: Any) -> None:
        chosen = Settings(
            acquire=AcquireSettings(drain_s=30.0),
            engine=EngineSettings(runtime="tensorrt", **engine),
        )
        self.path = folder / "run"
        self.recorder: Recorder = recorder(self.path, chosen, expected_shape=SHAPE)
        self.taken: list[np.ndarray] = []
        self._rng = np.random.default_rng(2)

    def shoot_until(self, done: Callable[[], bool]) -> None:
        deadline = time.monotonic() + LIMIT_S
        while not done():
            assert time.monotonic() < deadline, (self.recorder.status(), self.recorder.trouble)
            if self.recorder.slot_waiting < 2:
                self.taken.append(self._rng.integers(1, 4000, SHAPE).astype(np.uint16))
                shoot(self.recorder, self.taken[-1])
            time.sleep(0.005)

    def refocuses(self, more: int) -> None:
        """Goes on until so many more planes are refocused."""
        before = self.recorder.status().counts.refocused
        self.shoot_until(lambda: self.recorder.status().counts.refocused >= before + more)


def test_a_broken_context_ends_the_worker_and_costs_no_raw_frame(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    flag = tmp_path / "break it"
    (tmp_path / "sitecustomize.py").write_text(BREAKS_THE_CONTEXT)
    monkeypatch.setenv("PYTHONPATH", os.pathsep.join([str(tmp_path), str(ROOT)]))
    monkeypatch.setenv("REFOCUS_TEST_FLAG", str(flag))
    recording = Recording(tmp_path, generator="fluorescence")
    with recording.recorder as r:
        assert r.wait_for_engine(LIMIT_S), r.trouble
        recording.refocuses(5)
        flag.touch()
        recording.shoot_until(lambda: events(recording.path, "worker_died") == 1)
        recording.refocuses(5)
        assert not flag.exists()
    run = open_run(recording.path)
    assert run.state is State.COMPLETE
    assert_raw(run, recording.taken)
    assert [entry.seq for entry in run.frames()] == list(range(len(recording.taken)))
    outcomes = {RefocusOutcome(record.outcome) for record in run.records(Kind.REFOCUS)}
    assert RefocusOutcome.REFOCUSED in outcomes


def test_a_generator_chosen_meanwhile_takes_over_between_two_frames(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("XDG_DATA_HOME", str(tmp_path / "data"))
    first = identity_package.make(tmp_path / "identity", name="identity")
    second = identity_package.make(tmp_path / "negated", name="negated", answer="negated")
    model_store.use(first.folder)
    recording = Recording(tmp_path)
    with recording.recorder as r:
        assert r.wait_for_engine(LIMIT_S), r.trouble
        recording.refocuses(5)
        model_store.use(second.folder)
        recording.shoot_until(lambda: r.status().generator == "negated")
        recording.refocuses(5)
    run = open_run(recording.path)
    assert run.state is State.COMPLETE
    assert_raw(run, recording.taken)
    refocused = [
        record for record in run.records(Kind.REFOCUS) if record.outcome == RefocusOutcome.REFOCUSED
    ]
    names = [run.notes.generators[record.generator].name for record in refocused]
    assert names[0] == "identity"
    assert names[-1] == "negated"
    assert len(refocused) == len(recording.taken), "no frame was lost or skipped at the change"
