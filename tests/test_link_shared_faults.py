"""Workers that lie about places in shared memory, freeze or leave: never a wrong pixel."""

import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import msgspec
import numpy as np
import pytest
import zmq

from refocus import wire
from refocus.arena import Arena
from refocus.frame import Pixels, RefocusOutcome
from tests.branch import Branch, hello_of


class Guest:
    """A worker that the test plays, with memory that it shares."""

    def __init__(self, b: Branch, socket: "zmq.Socket[bytes]") -> None:
        self._socket = socket
        self._branch = b
        hello = msgspec.structs.replace(hello_of(b, "guest"), shared_memory=True)
        self.send(hello)
        b.drain(lambda: b.engine.link.workers == 2)

    def send(self, message: wire.Message, pixels: Pixels | None = None) -> None:
        self._socket.send_multipart(wire.encode(message, pixels))

    def receive(self, kind: type[wire.Message]) -> Any:
        assert self._socket.poll(5000)
        message, _ = wire.decode(self._socket.recv_multipart())
        assert isinstance(message, kind), message
        return message

    def frames(self, count: int) -> list[wire.Job]:
        """As many frames as that, given to this worker."""
        for _ in range(count):
            self._branch.send()
        return [self.receive(wire.Job) for _ in range(count)]

    def take(self) -> Arena:
        """Open what is offered with the first frame, which comes by message."""
        seq = self._branch.send()
        offer = self.receive(wire.Offer)
        assert self.receive(wire.Job).place is None
        self.send(wire.Taken(epoch="guest", name=offer.name))
        self.send(wire.Fault(epoch="guest", seq=seq, reason="never mind"))
        self._branch.drain(self._branch.answered(seq))
        return Arena.open(offer.name, offer.slots, offer.slot_bytes)

    def answer(self, job: wire.Job, place: int | None, pixels: Pixels | None = None) -> None:
        frame = job.frame
        result = wire.Result(
            epoch="guest",
            seq=frame.seq,
            shape=frame.shape,
            dtype=frame.dtype,
            clipped=0,
            place=place,
        )
        self.send(result, pixels)


@contextmanager
def guest_of(b: Branch) -> Iterator[Guest]:
    b.ready()
    with zmq.Context() as context, context.socket(zmq.DEALER) as socket:
        socket.linger = 0
        socket.connect(b.engine.link.address)
        yield Guest(b, socket)


def test_a_frame_lies_where_it_is_said_to_and_so_does_the_answer(
    branch: Callable[..., Branch],
) -> None:
    b = branch()
    with guest_of(b) as guest:
        memory = guest.take()
        jobs = guest.frames(3)
        for job in reversed(jobs):
            seq, shape = job.frame.seq, job.frame.shape
            assert job.place is not None
            plane = memory.plane(job.place, shape, "uint16")
            assert np.array_equal(plane, b.pixels[seq])
            plane[:] = seq
            guest.answer(job, job.place)
            b.drain(b.answered(seq))
            plane = b.answers[seq][0].plane
            assert plane is not None
            assert (plane.pixels == seq).all()


@pytest.mark.parametrize("lie", ["nowhere", "another's", "never given", "in the message", "twice"])
def test_a_worker_that_lies_about_places_is_given_up(
    branch: Callable[..., Branch], lie: str
) -> None:
    b = branch()
    with guest_of(b) as guest:
        guest.take()
        first, second = guest.frames(2)
        match lie:
            case "nowhere":
                guest.answer(first, 10_000)
            case "another's":
                guest.answer(first, second.place)
            case "never given":
                guest.answer(first, -1)
            case "in the message":
                guest.answer(first, None, np.zeros(first.frame.shape, np.uint16))
            case "twice":
                guest.answer(first, first.place)
                guest.answer(first, first.place)
        b.drain(b.answered(first.frame.seq, second.frame.seq))
        b.drain(lambda: b.engine.link.workers == 1)
        outcome = b.answers[first.frame.seq][0].outcome
        wanted = RefocusOutcome.REFOCUSED if lie == "twice" else RefocusOutcome.LOST
        assert outcome is wanted
        assert b.answers[second.frame.seq][0].outcome is RefocusOutcome.LOST
        after = b.send()
        b.drain(b.answered(after))
        assert b.answers[after][0].outcome is RefocusOutcome.REFOCUSED
    assert all(len(given) == 1 for given in b.answers.values())


def test_an_answer_of_another_size_fails_and_its_slot_is_free(
    branch: Callable[..., Branch],
) -> None:
    b = branch()
    with guest_of(b) as guest:
        guest.take()
        (job,) = guest.frames(1)
        guest.send(
            wire.Result(
                epoch="guest",
                seq=job.frame.seq,
                shape=(8, 8),
                dtype="uint16",
                clipped=0,
                place=job.place,
            )
        )
        b.drain(b.answered(job.frame.seq))
        assert b.answers[job.frame.seq][0].outcome is RefocusOutcome.FAILED
        slots = b.engine.link._roster.peers["guest"].shared._slots
        assert slots is not None
        assert len(slots.free) == slots.arena.slots
        (job,) = guest.frames(1)
        guest.send(
            wire.Result(
                epoch="guest",
                seq=job.frame.seq,
                shape=(8000, 8000),
                dtype="uint16",
                clipped=0,
                place=job.place,
            )
        )
        b.drain(b.answered(job.frame.seq))
        assert b.answers[job.frame.seq][0].outcome is RefocusOutcome.LOST, "no such room"


def test_planes_that_wait_for_the_disk_are_not_written_over(
    branch: Callable[..., Branch],
) -> None:
    """A slot is somebody else's only once its plane is settled, also when its worker is gone."""
    b = branch()
    with guest_of(b) as guest:
        memory = guest.take()
        jobs = guest.frames(3)
        for job in jobs:
            memory.plane(job.place, job.frame.shape, "uint16")[:] = job.frame.seq
            guest.answer(job, job.place)
        shared = b.engine.link._roster.peers["guest"].shared
        slots = shared._slots
        assert slots is not None
        until(lambda: b.intake.planes_waiting == 3)  # the test is the writer: none is settled
        taken = set(range(slots.arena.slots)) - set(slots.free)
        assert taken == {job.place for job in jobs}
        guest.send(wire.Bye(epoch="guest"))
        until(lambda: b.engine.link.workers == 1)
        assert not Path(memory.name).exists()
        b.drain(b.answered(*(job.frame.seq for job in jobs)))
        for job in jobs:
            plane = b.answers[job.frame.seq][0].plane
            assert plane is not None
            assert (plane.pixels == job.frame.seq).all()
        assert len(slots.free) == slots.arena.slots


def test_a_thawed_worker_s_answer_in_shared_memory_is_late(branch: Callable[..., Branch]) -> None:
    b = branch()
    with guest_of(b) as guest:
        memory = guest.take()
        (job,) = guest.frames(1)
        seq = job.frame.seq
        b.drain(b.answered(seq))  # silent: given up
        assert b.answers[seq][-1].outcome is RefocusOutcome.LOST
        for slot in range(memory.slots):
            memory.plane(slot, job.frame.shape, "uint16")[:] = 13
        guest.answer(job, job.place)
        b.drain(lambda: len(b.answers[seq]) == 2)
        assert b.answers[seq][-1].outcome is RefocusOutcome.LATE
        assert b.answers[seq][-1].plane is None
        sent = [b.send() for _ in range(3)]
        b.drain(b.answered(*sent))
        for after in sent:
            plane = b.answers[after][0].plane
            assert plane is not None
            assert not (plane.pixels == 13).all(), "its memory is nobody else's"


def test_a_worker_that_cannot_open_the_memory_gets_messages(
    branch: Callable[..., Branch], caplog: pytest.LogCaptureFixture
) -> None:
    b = branch()
    with guest_of(b) as guest:
        seq = b.send()
        offer = guest.receive(wire.Offer)
        assert guest.receive(wire.Job).frame.seq == seq
        guest.send(wire.Taken(epoch="guest", name="another", trouble="not this one"))
        guest.send(wire.Taken(epoch="guest", name=offer.name, trouble="no such file"))
        jobs = guest.frames(3)
        assert {job.place for job in jobs} == {None}
        for job in jobs:
            guest.answer(job, None, np.full(job.frame.shape, 5, np.uint16))
        b.drain(b.answered(*(job.frame.seq for job in jobs)))
        assert not Path(offer.name).exists()
    assert caplog.text.count("no such file") == 1
    assert b.outcomes()["REFOCUSED"] == 3


def until(done: Callable[[], bool]) -> None:
    """Waits without taking what the writer would."""
    deadline = time.monotonic() + 20
    while not done():
        assert time.monotonic() < deadline
        time.sleep(0.001)
