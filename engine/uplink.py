"""A worker's connection to its link: introductions, the heartbeat, and the way that pixels take.

Two sockets: one for the thread that works, and one for the heartbeat's own thread, so that a long
computation is no silence and a stopped process is. Pixels come and go in messages, or through
memory that the link offers and that can be opened here; whoever works need not know which.
"""

import contextlib
import os
import threading
import time
import uuid

import zmq

from engine.runtimes import Refocused
from refocus import keys, wire
from refocus.arena import Arena
from refocus.errors import WireError
from refocus.frame import Pixels
from refocus.keys import WorkerKey

DEAF_BEATS = 40
"""After so many heartbeats of the link that did not come, the worker leaves. It does so, too, where
as many said that it was given up and the working thread takes no notice: that hangs, and a link on
another host cannot kill it. How long it may compile is bounded in engine/worker.py."""
SEND_TIMEOUT_MS = 5000
LAST_WORDS_MS = 1000
"""What is said before leaving has so long to get away."""
SAME_COMPUTER = ("ipc://", "tcp://127.0.0.1:", "tcp://localhost:", "tcp://[::1]:")
"""Addresses of links with which memory may be shared."""


class Uplink:
    """Connects to the link at *address*; `seq` is what the heartbeat calls the frame in work.

    *key*: for a link on another host, which opens to keys only.
    Raises zmq.Again from `introduce` where nobody listens.
    """

    def __init__(
        self,
        context: "zmq.Context[zmq.Socket[bytes]]",
        address: str,
        beat_ms: int,
        key: WorkerKey | None,
    ) -> None:
        self._context = context
        self._address = address
        self._key = key
        self._beat_ms = beat_ms
        self._arena: Arena | None = None
        self._renew = threading.Event()
        self._busy = False
        self._stopped = threading.Event()
        self._heart = threading.Thread(target=self._beat, name="refocus-beat", daemon=True)
        self._socket = _dealer(context, address, key)
        self.epoch = ""
        """Names the latest introduction."""
        self.seq: int | None = None

    @property
    def must_renew(self) -> bool:
        """The link has given this worker up: it has to introduce itself again."""
        return self._renew.is_set()

    def introduce(
        self, model: str, runtime: str, slots: int, shape: tuple[int, int] | None
    ) -> None:
        """Say HELLO under a new epoch."""
        self._let_go()
        self._renew.clear()
        self.epoch = uuid.uuid4().hex
        hello = wire.Hello(
            epoch=self.epoch,
            secret=os.environ.get(wire.SECRET_VARIABLE, ""),
            pid=os.getpid(),
            model=model,
            runtime=runtime,
            shapes=[shape] if shape else [],
            shared_memory=self._key is None and self._address.startswith(SAME_COMPUTER),
            credit=slots + 1,  # the next one is here already when a slot is free
        )
        self.send(hello)
        if not self._heart.is_alive():
            self._heart.start()

    def poll(self, wait_ms: int) -> bool:
        """Whether a message is there."""
        return bool(self._socket.poll(wait_ms))

    def receive(self) -> tuple[wire.Message, Pixels | None]:
        """The next message, with its pixels if they came with it. Raises WireError."""
        return wire.decode(self._socket.recv_multipart(copy=False))

    def raw(self, job: wire.Job, pixels: Pixels | None) -> Pixels:
        """The plane of *job*, wherever it lies; read-only. Raises WireError for a wrong place."""
        if pixels is None:
            pixels = self._slot(job.place, job.frame.shape, job.frame.dtype)
            pixels.flags.writeable = False
        return pixels

    def send(self, message: wire.Message) -> None:
        if isinstance(message, wire.Busy):
            self._busy = bool(message.what)
        self._socket.send_multipart(wire.encode(message))

    def answer(self, job: wire.Job, made: Refocused) -> None:
        """Send the refocused plane of *job* the way that its frame came.

        From the return on *made* is not looked at any more.
        """
        shape, dtype = made.pixels.shape, str(made.pixels.dtype)
        result = wire.Result(
            epoch=job.epoch,
            seq=job.frame.seq,
            shape=shape,
            dtype=dtype,
            clipped=made.clipped,
            place=job.place,
        )
        if job.place is not None:
            self._slot(job.place, shape, dtype)[:] = made.pixels
            self.send(result)
            return
        # A copy: ZeroMQ reads when it likes, and the runtime may use its buffer again.
        self._socket.send_multipart(wire.encode(result, made.pixels))

    def take(self, offer: wire.Offer) -> None:
        """Open the memory that the link offers; no plane may be in work."""
        self._let_go()
        trouble = ""
        try:
            self._arena = Arena.open(offer.name, offer.slots, offer.slot_bytes)
        except (OSError, ValueError, WireError) as error:
            trouble = str(error) or repr(error)
        self.send(wire.Taken(epoch=self.epoch, name=offer.name, trouble=trouble))

    def say_goodbye(self) -> None:
        """The last message, and it gets away although this process ends."""
        self.send(wire.Bye(epoch=self.epoch))
        self._socket.linger = LAST_WORDS_MS

    def close(self) -> None:
        """Stop the heartbeat and close both sockets."""
        self._stopped.set()
        if self._heart.is_alive():
            self._heart.join()
        self._socket.close()
        self._let_go()

    def _slot(self, place: int | None, shape: tuple[int, int], dtype: str) -> Pixels:
        if self._arena is None or place is None:
            raise WireError(f"the pixels are said to lie in slot {place}, but no memory is shared")
        return self._arena.plane(place, shape, dtype)

    def _let_go(self) -> None:
        if self._arena is not None:
            self._arena.close()
            self._arena = None

    def _beat(self) -> None:
        heard = time.monotonic()
        unheeded = 0
        with contextlib.closing(_dealer(self._context, self._address, self._key)) as socket:
            while not self._stopped.is_set():
                with contextlib.suppress(zmq.Again):
                    beat = wire.Beat(epoch=self.epoch, seq=self.seq)
                    socket.send_multipart(wire.encode(beat), zmq.DONTWAIT)
                if socket.poll(self._beat_ms):
                    heard = time.monotonic()
                    parts = socket.recv_multipart()
                    with contextlib.suppress(WireError):
                        message, _ = wire.decode(parts)
                        unheeded = self._renewed(message, unheeded)
                    if unheeded > DEAF_BEATS:
                        os._exit(1)
                    self._stopped.wait(self._beat_ms / 1000)
                elif time.monotonic() - heard > DEAF_BEATS * self._beat_ms / 1000:
                    os._exit(0)  # the work thread may be deep in a computation: no orderly way out

    def _renewed(self, message: wire.Message, unheeded: int) -> int:
        """How often in a row the link has asked for a new introduction in vain."""
        if not isinstance(message, wire.Renew) or message.epoch != self.epoch:
            return 0
        self._renew.set()
        return 0 if self._busy else unheeded + 1


def _dealer(
    context: "zmq.Context[zmq.Socket[bytes]]", address: str, key: WorkerKey | None
) -> "zmq.Socket[bytes]":
    socket = context.socket(zmq.DEALER)
    if key is not None:
        keys.show(socket, key)
    for option, value in (
        (zmq.LINGER, 0),
        (zmq.SNDHWM, 4),
        (zmq.RCVHWM, 66),
        (zmq.IMMEDIATE, 1),
        (zmq.SNDTIMEO, SEND_TIMEOUT_MS),
        (zmq.MAXMSGSIZE, wire.MAX_PIXEL_BYTES),
    ):
        socket.setsockopt(option, value)
    socket.connect(address)
    return socket
