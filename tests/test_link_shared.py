"""Pixels through shared memory: the same as by message, never a wrong one, nothing left behind."""

import errno
import os
import signal
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest

from acquire.shared import SharedPixels
from engine.package import Package
from refocus import arena, wire
from refocus.arena import Arena
from refocus.frame import Pixels, RefocusOutcome
from tests.branch import RNG, Branch

posix = pytest.mark.skipif(sys.platform == "win32", reason="there it is no file")


@pytest.fixture
def places(monkeypatch: pytest.MonkeyPatch) -> list[int | None]:
    """Where each frame was put that a worker was given, None: into the message."""
    seen: list[int | None] = []
    put = SharedPixels.put

    def watched(self: SharedPixels, seq: int, pixels: Pixels) -> int | None:
        seen.append(put(self, seq, pixels))
        return seen[-1]

    monkeypatch.setattr(SharedPixels, "put", watched)
    return seen


def answers_to(b: Branch, frames: list[Pixels]) -> list[Pixels]:
    """What the branch makes of *frames*, one after the other."""
    answers = []
    for frame in frames:
        seq = b.send(frame)
        b.drain(b.answered(seq))
        (answer,) = b.answers[seq]
        assert answer.plane is not None, answer
        answers.append(answer.plane.pixels)
    return answers


def test_both_ways_give_the_same_pixels(
    branch: Callable[..., Branch], places: list[int | None], negated: Package
) -> None:
    shapes = [(64, 96)] * 4 + [(33, 21)] * 2 + [(128, 96)] * 3 + [(64, 96)] * 2
    frames = [RNG.integers(100, 4000, shape, dtype=np.uint16) for shape in shapes]
    frames += [RNG.integers(0, 255, (40, 64), dtype=np.uint8) for _ in range(3)]
    shared = branch(negated, shared_memory=True)
    shared.ready()
    by_memory = answers_to(shared, frames)
    assert [i for i, place in enumerate(places) if place is None] == [0, 6], "until it is open"
    places.clear()
    message = branch(negated, shared_memory=False)
    message.ready()
    by_message = answers_to(message, frames)
    assert set(places) == {None}
    for one, other in zip(by_memory, by_message, strict=True):
        assert one.dtype == other.dtype
        assert np.array_equal(one, other)


def test_many_frames_at_once_keep_their_own_pixels(
    branch: Callable[..., Branch], places: list[int | None]
) -> None:
    b = branch()
    b.ready()
    answers_to(b, [RNG.integers(100, 4000, (64, 96), dtype=np.uint16)] * 2)
    sent = [b.send() for _ in range(3)]
    for _ in range(100):
        sent.append(b.send())
        b.drain(b.answered(*sent[:-3]))
    b.drain(b.answered(*sent))
    offset = None
    for seq in sent:
        plane = b.answers[seq][0].plane
        assert plane is not None
        mirror = (plane.pixels.astype(float) + b.pixels[seq]) / 2  # the network answers -x
        inside = (plane.pixels > 0) & (plane.pixels < 65_535)
        offset = offset or float(np.median(mirror[inside]))
        assert np.abs(mirror[inside] - offset).max() <= 16
    assert None not in places[1:]


def test_every_slot_comes_back(branch: Callable[..., Branch], places: list[int | None]) -> None:
    """Also from frames that failed, and from those that could not be sent."""
    b = branch()
    b.ready()
    answers_to(b, [RNG.integers(100, 4000, (64, 96), dtype=np.uint16)] * 2)
    for turn in range(40):
        unsendable = b.send(channel="x" * wire.MAX_HEADER_BYTES)
        b.drain(b.answered(unsendable))
        assert b.answers[unsendable][0].outcome is RefocusOutcome.REJECTED
        if turn % 4 == 0:
            answers_to(b, [RNG.integers(100, 4000, (64, 96), dtype=np.uint16)])
    (slots,) = (peer.shared._slots for peer in b.engine.link._roster.peers.values())
    assert slots is not None
    assert sorted(slots.free) == list(range(slots.arena.slots))
    assert None not in places[2:]


def test_no_room_for_the_memory_is_said_once_and_costs_nothing(
    branch: Callable[..., Branch],
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
    places: list[int | None],
) -> None:
    def full(slots: int, nbytes: int) -> Arena:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(Arena, "make", full)
    b = branch()
    b.ready()
    answers_to(b, [RNG.integers(100, 4000, (64, 96), dtype=np.uint16)] * 5)
    assert places == [None] * 5
    assert caplog.text.count(os.strerror(errno.ENOSPC)) == 1


@posix
def test_a_killed_worker_leaves_no_file(branch: Callable[..., Branch]) -> None:
    before = files()
    b = branch()
    for _ in range(2):
        pid = b.ready()
        answers_to(b, [RNG.integers(100, 4000, (64, 96), dtype=np.uint16)] * 2)
        assert len(files() - before) == 1
        os.kill(pid, signal.SIGKILL)
        b.drain(lambda: b.engine.link.workers == 0)
        assert files() == before
    b.close()
    assert files() == before


@posix
def test_a_killed_recorder_s_memory_is_swept_at_the_next_start(
    branch: Callable[..., Branch], negated: Package, tmp_path: Path
) -> None:
    killed = subprocess.run(
        [sys.executable, "-c", KILLED, str(negated.folder), str(tmp_path / "killed")],
        capture_output=True,
        text=True,
        check=False,
    )
    assert killed.returncode == -signal.SIGKILL, killed.stderr
    left = Path(killed.stdout.strip())
    assert left.exists()
    branch(negated)
    assert not left.exists()


KILLED = """
import os, signal, sys
from pathlib import Path
from engine import package
from tests.branch import Branch, settings

b = Branch(settings(package.load(Path(sys.argv[1]))), Path(sys.argv[2]))
b.ready()
b.drain(b.answered(b.send()))
(peer,) = b.engine.link._roster.peers.values()
print(peer.shared._slots.arena.name, flush=True)
os.kill(os.getpid(), signal.SIGKILL)
"""
"""A recorder that is killed in the middle of its work."""


def files() -> set[Path]:
    """Shared memory of this process that has a name."""
    return set(arena._folder().glob(f"{arena.PREFIX}{os.getpid()}-*"))
