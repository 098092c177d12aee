"""Every frame given to the branch gets exactly one answer: what a healthy worker does."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np

from refocus.frame import RefocusOutcome
from tests import identity_package
from tests.branch import RNG, SHAPE, Branch


def test_every_frame_comes_back_as_its_own_answer(branch: Callable[..., Branch]) -> None:
    b = branch()
    b.ready()
    for _ in range(12):
        seq = b.send()
        b.drain(b.answered(seq))
    assert b.outcomes() == {"REFOCUSED": 12}
    offset = None
    for seq, (answer,) in b.answers.items():
        # The network answers -x, so counts are mirrored about the channel's one offset.
        assert answer.plane is not None
        mirror = (answer.plane.pixels.astype(float) + b.pixels[seq]) / 2
        inside = (answer.plane.pixels > 0) & (answer.plane.pixels < 65_535)
        offset = offset or float(np.median(mirror[inside]))
        assert np.abs(mirror[inside] - offset).max() <= 16, "bfloat16 keeps 8 bits of 4000 counts"
        assert answer.plane.clipped == np.count_nonzero(~inside)


def test_a_flood_is_skipped_not_queued(branch: Callable[..., Branch]) -> None:
    b = branch()
    b.ready()
    sent = [b.send() for _ in range(200)]
    b.drain(b.answered(*sent))
    counted = b.outcomes()
    assert sum(counted.values()) == 200
    assert set(counted) == {"REFOCUSED", "SKIPPED"}
    assert all(len(given) == 1 for given in b.answers.values())
    assert b.answers[sent[-1]][0].outcome is RefocusOutcome.REFOCUSED, "the newest goes first"


def test_what_the_generator_must_not_touch_is_rejected(branch: Callable[..., Branch]) -> None:
    b = branch()
    b.ready()
    unfit: dict[str, dict[str, Any]] = {
        "float32": {"pixels": np.ones(SHAPE, np.float32)},
        "0.05 to 2": {"pixel_um": 6.5},
        "is phase": {"channel": "trans"},
        "flat": {"pixels": np.full(SHAPE, 7, np.uint16), "channel": "empty"},
    }
    for words, frame in unfit.items():
        seq = b.send(**frame)
        b.drain(b.answered(seq))
        assert b.answers[seq][0].outcome is RefocusOutcome.REJECTED
        assert words in b.answers[seq][0].reason
    good = b.send()
    b.drain(b.answered(good))
    assert b.answers[good][0].outcome is RefocusOutcome.REFOCUSED


def test_any_shape_passes(branch: Callable[..., Branch]) -> None:
    b = branch()
    b.ready()
    for shape in ((521, 697), (2047, 1), (1, 1), (48, 32)):
        seq = b.send(RNG.integers(0, 255, shape, dtype=np.uint8) if shape != (1, 1) else None)
        b.drain(b.answered(seq))
        assert b.answers[seq][0].outcome is RefocusOutcome.REFOCUSED, b.answers[seq]


def test_rubbish_from_the_network_never_leaves_the_engine(
    branch: Callable[..., Branch], tmp_path: Path
) -> None:
    b = branch(identity_package.make(tmp_path / "nan", answer="nan"))
    b.ready()
    seq = b.send()
    b.drain(b.answered(seq))
    assert b.answers[seq][0].outcome is RefocusOutcome.FAILED
    assert "non-finite" in b.answers[seq][0].reason
