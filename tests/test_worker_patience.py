"""A worker that nobody watches ends itself where it hangs while it gets ready."""

import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
import zmq

from engine.launch import FIRST_PAUSE_S, LIVED_S, LONGEST_PAUSE_S, Order, Pauses
from refocus import wire
from refocus.frame import FrameHeader
from tests import identity_package

WAIT_S = 40
SHAPE = (16, 24)
HANGS_WHILE_IT_COMPILES = """
import sys, threading
from tests.played_link import Told
from engine.worker import main
sys.exit(main(sys.argv[1:], open_runtime=lambda given: Told()))  # loads once it is told to: never
"""


@pytest.fixture
def router() -> Iterator["zmq.Socket[bytes]"]:
    with zmq.Context() as context, context.socket(zmq.ROUTER) as socket:
        socket.linger = 0
        yield socket


@pytest.mark.parametrize("when", ["before its first word", "at a frame"])
def test_a_worker_that_hangs_while_it_compiles_ends_itself(
    router: "zmq.Socket[bytes]", tmp_path: Path, when: str
) -> None:
    port = router.bind_to_random_port("tcp://127.0.0.1")
    order = Order(
        address=f"tcp://127.0.0.1:{port}",
        model=identity_package.make(tmp_path / "identity").folder,
        runtime="openvino",
        device=0,
        threads=1,
        beat_ms=500,
        warm=SHAPE if when == "before its first word" else None,
        ready_ms=3000,
    )
    command = [sys.executable, "-c", HANGS_WHILE_IT_COMPILES, *order.arguments()]
    worker = subprocess.Popen(command, stderr=subprocess.PIPE)
    try:
        if when == "at a frame":
            hangs_at_a_frame(router)
        _, said = worker.communicate(timeout=WAIT_S)
    finally:
        worker.kill()
        worker.wait()
    assert worker.returncode == 1
    assert b"not ready within 3 s" in said


def hangs_at_a_frame(router: "zmq.Socket[bytes]") -> None:
    """Gives the worker a frame to compile for, and lets it know that its link is alive."""
    assert router.poll(1000 * WAIT_S)
    identity, *parts = router.recv_multipart()
    hello, _ = wire.decode(parts)
    assert isinstance(hello, wire.Hello)
    header = FrameHeader(run="r", seq=0, axes={"time": 0}, shape=SHAPE, dtype="uint16")
    job = wire.Job(epoch=hello.epoch, frame=header, offset=0.0, scale=1.0)
    router.send_multipart([identity, *wire.encode(job, np.ones(SHAPE, np.uint16))])
    said: wire.Message = hello
    while not isinstance(said, wire.Busy):
        assert router.poll(1000 * WAIT_S)
        said, _ = wire.decode(router.recv_multipart()[1:])


def test_pauses_grow_until_a_worker_has_lived() -> None:
    pauses = Pauses()
    grown = [pauses.after(0.1) for _ in range(8)]
    assert grown == [0.5, 1, 2, 4, 8, 16, LONGEST_PAUSE_S, LONGEST_PAUSE_S]
    assert pauses.after(LIVED_S + 1) == FIRST_PAUSE_S
