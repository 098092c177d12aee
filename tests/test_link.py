"""Every frame given to the branch gets exactly one answer: what a healthy worker does."""

import functools
from collections.abc import Callable
from pathlib import Path
from typing import Any

import msgspec
import numpy as np
import zmq

from refocus import wire
from refocus.frame import Pixels, RefocusOutcome
from tests import identity_package
from tests.branch import RNG, SHAPE, Branch, hello_of


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


def test_workers_of_another_generator_wait_until_it_is_put_to_use(
    branch: Callable[..., Branch], tmp_path: Path
) -> None:
    b, other = branch(), identity_package.make(tmp_path / "other", name="other")
    b.ready()
    assert b.engine.crew is not None
    hello = msgspec.structs.replace(hello_of(b, "guest"), model=other.hash)
    context, jobs = zmq.Context(), list[tuple[wire.Message, Pixels | None]]()
    try:
        with context.socket(zmq.DEALER) as guest:
            guest.linger = 0
            guest.connect(b.engine.link.address)
            beating = functools.partial(drain_beating, b, guest, jobs)
            b.engine.link.let_in(other)
            guest.send_multipart(wire.encode(hello))
            beating(lambda: b.engine.link.workers_of(other) == 1)
            before = b.send()
            beating(b.answered(before))
            assert not jobs, "the generator in use is another"
            b.engine.crew.retire()
            b.engine.link.use(other)
            beating(lambda: b.pid is None)  # it was told to leave, and did
            after = b.send()
            beating(lambda: bool(jobs))
            ((job, pixels),) = jobs
            assert isinstance(job, wire.Job)
            assert job.frame.seq == after
            result = wire.Result(epoch="guest", seq=after, shape=SHAPE, dtype="uint16", clipped=0)
            guest.send_multipart(wire.encode(result, pixels))
            beating(b.answered(after))
    finally:
        context.term()
    makers = [b.answers[seq][-1].maker for seq in (before, after)]
    assert [maker.name for maker in makers if maker] == ["identity", "other"]
    assert b.outcomes() == {"REFOCUSED": 2}


def drain_beating(
    b: Branch,
    guest: "zmq.Socket[bytes]",
    jobs: list[tuple[wire.Message, Pixels | None]],
    done: Callable[[], bool],
) -> None:
    """Plays the writer until *done*, and a worker with a heart, which collects its frames."""

    def beat() -> bool:
        guest.send_multipart(wire.encode(wire.Beat(epoch="guest")))
        while guest.poll(0):
            received = wire.decode(guest.recv_multipart())
            if isinstance(received[0], wire.Job):
                jobs.append(received)
        return done()

    b.drain(beat)


def test_rubbish_from_the_network_never_leaves_the_engine(
    branch: Callable[..., Branch], tmp_path: Path
) -> None:
    b = branch(identity_package.make(tmp_path / "nan", answer="nan"))
    b.ready()
    seq = b.send()
    b.drain(b.answered(seq))
    assert b.answers[seq][0].outcome is RefocusOutcome.FAILED
    assert "non-finite" in b.answers[seq][0].reason
