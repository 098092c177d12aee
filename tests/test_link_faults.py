"""Every frame gets exactly one answer, whatever happens to the worker.

All workers here are real processes with a real runtime; they are killed, stopped, thawed and hung.
"""

import os
import signal
from collections.abc import Callable
from pathlib import Path

import msgspec
import pytest
import zmq

from refocus import wire
from refocus.frame import Frame, RefocusOutcome
from tests import hanging_package, identity_package
from tests.branch import Branch, hello_of


def lives_on(b: Branch, pid: int) -> None:
    """A new worker has taken over and refocuses."""
    b.drain(lambda: b.pid not in (None, pid))
    b.ready()
    seq = b.send()
    b.drain(b.answered(seq))
    assert b.answers[seq][-1].outcome is RefocusOutcome.REFOCUSED


def kills(branch: Callable[..., Branch], how: signal.Signals, times: int) -> None:
    b = branch()
    for _ in range(times):
        pid = b.ready()
        sent = [b.send() for _ in range(3)]
        os.kill(pid, how)
        sent += [b.send() for _ in range(3)]
        b.drain(b.answered(*sent))
        lives_on(b, pid)
    assert set(b.outcomes()) <= {"REFOCUSED", "SKIPPED", "LOST"}
    assert all(len(given) == 1 for given in b.answers.values())


@pytest.mark.skipif(os.name != "posix", reason="signals of POSIX")
@pytest.mark.parametrize("how", [signal.SIGKILL, signal.SIGSTOP], ids=lambda s: s.name)
def test_a_dead_or_stopped_worker_is_replaced(
    branch: Callable[..., Branch], how: signal.Signals
) -> None:
    kills(branch, how, times=2)


@pytest.mark.long
@pytest.mark.timeout(1800)
def test_a_worker_is_killed_again_and_again(branch: Callable[..., Branch]) -> None:
    kills(branch, signal.SIGKILL, times=4)  # five deaths within a minute are the limit


def test_a_hung_worker_is_noticed_and_killed(branch: Callable[..., Branch], tmp_path: Path) -> None:
    b = branch(hanging_package.make(tmp_path / "hanging"), frame_timeout_ms=500)
    pid = b.ready()
    seq = b.send()
    b.drain(b.answered(seq))
    assert b.answers[seq][0].outcome is RefocusOutcome.LOST
    assert "hung" in b.answers[seq][0].reason
    b.drain(lambda: b.pid not in (None, pid))


def test_a_thawed_worker_s_answer_is_late_and_it_introduces_itself_again(
    branch: Callable[..., Branch],
) -> None:
    """A frozen worker on another host cannot be killed from here: it thaws and answers."""
    b = branch()
    b.ready()
    hello = hello_of(b, "guest")
    context = zmq.Context()
    try:
        with context.socket(zmq.DEALER) as guest:
            guest.linger = 0
            guest.connect(b.engine.link.address)
            guest.send_multipart(wire.encode(hello))
            b.drain(lambda: b.engine.link.workers == 2)
            seq = b.send()
            assert guest.poll(5000)
            job, _ = wire.decode(guest.recv_multipart())
            assert isinstance(job, wire.Job)
            assert job.frame.seq == seq
            b.drain(b.answered(seq))  # silent: given up
            assert b.answers[seq][-1].outcome is RefocusOutcome.LOST
            fault = wire.Fault(epoch="guest", seq=seq, reason="thawed")
            guest.send_multipart(wire.encode(fault))
            b.drain(lambda: len(b.answers[seq]) == 2)
            assert b.answers[seq][-1].outcome is RefocusOutcome.LATE
            guest.send_multipart(wire.encode(fault))  # a second time it is nothing at all
            guest.send_multipart(wire.encode(wire.Beat(epoch="guest")))
            assert guest.poll(5000)
            assert wire.decode(guest.recv_multipart())[0] == wire.Renew(epoch="guest")
            assert len(b.answers[seq]) == 2
            renewed = msgspec.structs.replace(hello, epoch="guest again")
            guest.send_multipart(wire.encode(renewed))
            b.drain(lambda: b.engine.link.workers == 2)
    finally:
        context.term()


def test_who_lost_a_frame_has_nothing_to_say_once_another_has_got_it(
    branch: Callable[..., Branch],
) -> None:
    b = branch()
    b.ready()
    with zmq.Context() as context, context.socket(zmq.DEALER) as guest:
        guest.linger = 0
        guest.connect(b.engine.link.address)
        guest.send_multipart(wire.encode(hello_of(b, "guest")))
        b.drain(lambda: b.engine.link.workers == 2)
        seq = b.send()
        assert guest.poll(5000)
        job, pixels = wire.decode(guest.recv_multipart())
        assert isinstance(job, wire.Job)
        assert pixels is not None
        b.drain(b.answered(seq))
        assert b.answers[seq][-1].outcome is RefocusOutcome.LOST
        assert b.intake.offer_again(Frame(job.frame, pixels))
        b.drain(lambda: len(b.answers[seq]) == 2)
        late = wire.Fault(epoch="guest", seq=seq, reason="thawed")
        guest.send_multipart(wire.encode(late))
        guest.send_multipart(wire.encode(wire.Beat(epoch="guest")))
        assert guest.poll(5000)
        assert wire.decode(guest.recv_multipart())[0] == wire.Renew(epoch="guest")
        after = b.send()
        b.drain(b.answered(after))
    outcomes = [answer.outcome.name for answer in b.answers[seq]]
    assert outcomes == ["LOST", "REFOCUSED"]


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"secret": "guessed"}, "secret"),
        ({"protocol": 99}, "protocol"),
        ({"model": "0" * 64}, "generator"),
    ],
)
def test_a_stranger_gets_no_frame(
    branch: Callable[..., Branch],
    caplog: pytest.LogCaptureFixture,
    change: dict[str, object],
    words: str,
) -> None:
    b = branch()
    good = hello_of(b, "stranger")
    context = zmq.Context()
    try:
        with context.socket(zmq.DEALER) as stranger:
            stranger.linger = 0
            stranger.connect(b.engine.link.address)
            stranger.send_multipart([b"FRAME", b"rubbish"])
            stranger.send_multipart(wire.encode(msgspec.structs.replace(good, **change)))
            assert stranger.poll(5000)
            answer, _ = wire.decode(stranger.recv_multipart())
            assert isinstance(answer, wire.Bye)
            assert words in answer.refused
            b.ready()
            seq = b.send()
            b.drain(b.answered(seq))
            assert not stranger.poll(0)
    finally:
        context.term()
    assert words in caplog.text


def test_a_worker_that_cannot_start_is_not_tried_for_ever(
    branch: Callable[..., Branch], tmp_path: Path
) -> None:
    package = identity_package.make(tmp_path / "damaged")
    b = branch(package)
    b.ready()
    pid = b.pid
    (package.folder / "generator.onnx").write_bytes(b"damaged after the start")
    assert pid is not None
    os.kill(pid, signal.SIGTERM)
    b.drain(lambda: b.engine.hopeless)
    assert any("altered" in line for line in b.trouble), b.trouble
    seq = b.send()  # nobody is left to take it
    b.close()
    assert b.answers[seq][-1].outcome is RefocusOutcome.SKIPPED


def test_a_worker_frozen_before_its_first_word_is_replaced(branch: Callable[..., Branch]) -> None:
    b = branch(warmup_timeout_ms=1500)
    b.drain(lambda: b.pid is not None)
    pid = b.pid
    assert pid is not None
    os.kill(pid, signal.SIGSTOP)
    assert not b.engine.link.wait_ready(0)
    lives_on(b, pid)


def test_a_worker_that_sends_rubbish_is_given_up(branch: Callable[..., Branch]) -> None:
    b = branch()
    b.ready()
    context = zmq.Context()
    try:
        with context.socket(zmq.DEALER) as guest:
            guest.linger = 0
            guest.connect(b.engine.link.address)
            guest.send_multipart(wire.encode(hello_of(b, "guest")))
            b.drain(lambda: b.engine.link.workers == 2)
            seq = b.send()
            assert guest.poll(5000)
            guest.send_multipart([b"RESULT", b"{}", b"rubbish"])
            b.drain(b.answered(seq))
            assert b.engine.link.workers == 1
            assert b.answers[seq][-1].outcome is RefocusOutcome.LOST
            after = b.send()
            b.drain(b.answered(after))
            assert b.answers[after][-1].outcome is RefocusOutcome.REFOCUSED
    finally:
        context.term()


def test_a_header_too_long_for_the_wire_costs_its_own_frame_alone(
    branch: Callable[..., Branch],
) -> None:
    b = branch()
    pid = b.ready()
    long, short = b.send(channel="x" * wire.MAX_HEADER_BYTES), b.send()
    b.drain(b.answered(long, short))
    assert b.answers[long][0].outcome is RefocusOutcome.REJECTED
    assert b.answers[short][0].outcome is RefocusOutcome.REFOCUSED
    assert b.pid == pid


def test_a_link_that_fails_still_answers_for_every_frame(
    branch: Callable[..., Branch], monkeypatch: pytest.MonkeyPatch
) -> None:
    b = branch()
    b.ready()

    def fail() -> None:
        raise MemoryError("no more")

    monkeypatch.setattr(b.engine.link, "_dispatch", fail)
    sent = [b.send()]
    b.drain(b.answered(*sent))
    sent.append(b.send())
    b.drain(b.answered(*sent))
    assert b.outcomes() == {"SKIPPED": 2}
    assert any("no more" in line for line in b.trouble)
    assert "no more" in b.answers[sent[-1]][0].reason


def test_a_worker_that_cannot_even_be_started_is_said(
    branch: Callable[..., Branch], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("sys.executable", "/no/such/python")
    b = branch()
    b.drain(lambda: b.engine.hopeless)
    b.drain(lambda: bool(b.trouble))
    assert "cannot be started" in b.trouble[0]
    seq = b.send()
    b.drain(b.answered(seq))
    assert "cannot be started" in b.answers[seq][0].reason
