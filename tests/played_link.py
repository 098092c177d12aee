"""A worker's loop for tests: the link is played by the test, the runtime does as it is told.

Sockets and the loop are real. Over inproc, what the test has sent is there when the worker looks
next, so the order of things is the same every time.
"""

import queue
import threading
from collections.abc import Callable

import numpy as np
import zmq

from engine.manners import Patience
from engine.package import Package
from engine.runtimes import Answer, Refocused
from engine.scaling import Scaling
from engine.uplink import Uplink
from engine.worker import _Worker
from refocus import wire
from refocus.arena import Arena
from refocus.frame import FrameHeader, Pixels

ADDRESS = "inproc://link"
WAIT_MS = 10_000
SHAPE = (16, 24)
LARGER = (32, 24)


class Told:
    """A runtime that answers each plane plus one, and keeps what was asked of it in order.

    `trouble`: what a plane fails with, by its first pixel and where: ("start", 3) or ("answer", 3).
    """

    name = "told"

    def __init__(self, slots: int = 2) -> None:
        self.slots = slots
        self.log: list[str] = []
        self.trouble: dict[tuple[str, int], Exception] = {}
        self.may_load = threading.Event()
        self.may_answer = threading.Event()
        self.may_answer.set()

    def load(self, package: Package, shape: tuple[int, int]) -> None:
        self.log.append(f"load {shape[0]}")
        assert self.may_load.wait(WAIT_MS / 1000)

    def start(self, pixels: Pixels, scaling: Scaling) -> Answer:
        number = int(pixels[0, 0])
        self._do("start", number)
        buffer = pixels + 1

        def answer() -> Refocused:
            assert self.may_answer.wait(WAIT_MS / 1000)
            self._do("answer", number)
            return Refocused(buffer[:], 0)

        return answer

    def refocus(self, pixels: Pixels, scaling: Scaling) -> Refocused:
        return self.start(pixels, scaling)()

    def bare(self, package: Package, shape: tuple[int, int]) -> Callable[[], None]:
        raise NotImplementedError

    def close(self) -> None:
        self.log.append("close")

    def _do(self, what: str, number: int) -> None:
        self.log.append(f"{what} {number}")
        if trouble := self.trouble.get((what, number)):
            raise trouble


class Played:
    """A link of one worker, which runs in a thread of this process."""

    def __init__(self, package: Package, runtime: Told) -> None:
        self.runtime = runtime
        self.context: zmq.Context[zmq.Socket[bytes]] = zmq.Context()
        self._router = self.context.socket(zmq.ROUTER)
        self._router.bind(ADDRESS)
        self._package = package
        self.ended: queue.SimpleQueue[Exception | None] = queue.SimpleQueue()
        self.beats: list[int | None] = []
        self._thread = threading.Thread(target=self._run)
        self._thread.start()
        self._identity = b""
        self.hello, _ = self.receive(wire.Hello)

    def _run(self) -> None:
        uplink = Uplink(self.context, ADDRESS, 250, None)
        try:
            _Worker(uplink, 250, self._package, self.runtime, Patience()).run(None)
            self.ended.put(None)
        except Exception as error:  # noqa: BLE001 - handed to the test
            self.ended.put(error)
        finally:
            uplink.close()

    def receive(self, kind: type[wire.Message]) -> tuple[wire.Message, Pixels | None]:
        """The next message but heartbeats, which must be of *kind*."""
        while True:
            assert self._router.poll(WAIT_MS), f"no {kind.__name__}"
            identity, *parts = self._router.recv_multipart()
            message, pixels = wire.decode(parts)
            if isinstance(message, wire.Beat):
                self.beats.append(message.seq)
                continue
            self._identity = identity
            assert isinstance(message, kind), message
            return message, pixels

    def send(self, message: wire.Message, pixels: Pixels | None = None) -> None:
        self._router.send_multipart([self._identity, *wire.encode(message, pixels)])

    def frame(self, seq: int, shape: tuple[int, int] = SHAPE, place: int | None = None) -> None:
        """Send a plane of *seq* everywhere, or say that one lies at *place*."""
        header = FrameHeader(run="r", seq=seq, axes={"time": seq}, shape=shape, dtype="uint16")
        job = wire.Job(epoch=self.hello.epoch, frame=header, offset=0.0, scale=1.0, place=place)
        self.send(job, np.full(shape, seq, np.uint16) if place is None else None)

    def load(self) -> None:
        """Let the runtime load, which the worker has said it is about to do."""
        self.receive(wire.Busy)
        self.runtime.may_load.set()
        self.receive(wire.Busy)

    def result(self, seq: int) -> wire.Result:
        """The next message, which must be the right answer to *seq*."""
        result, pixels = self.receive(wire.Result)
        assert isinstance(result, wire.Result)
        assert result.seq == seq
        if result.place is None:
            assert pixels is not None
            assert (pixels == seq + 1).all()
        return result

    def fault(self, seq: int) -> wire.Fault:
        """The next message, which must be the FAULT of *seq*."""
        fault, _ = self.receive(wire.Fault)
        assert isinstance(fault, wire.Fault)
        assert fault.seq == seq
        return fault

    def close(self) -> None:
        self.runtime.may_load.set()
        self.runtime.may_answer.set()
        if self.ended.empty():
            self.send(wire.Bye(epoch=self.hello.epoch))
        self._thread.join()
        self._router.close(0)
        self.context.term()


def offer(link: Played, arena: Arena) -> wire.Offer:
    return wire.Offer(
        epoch=link.hello.epoch,
        name=arena.name,
        slots=arena.slots,
        slot_bytes=arena.slot_bytes,
    )
