"""The daemon's socket for workers: one ROUTER, and a bell that wakes whoever waits at it.

One thread owns the socket; `wake` is for any other. A message that finds nobody, or no room, is
told to the sender at once instead of being kept or dropped in silence.
"""

import contextlib
import socket

import zmq

from refocus import wire
from refocus.errors import EngineError
from refocus.frame import Pixels


class Router:
    """Listens at *address*. Raises EngineError where that cannot be opened."""

    def __init__(self, address: str) -> None:
        self._context = zmq.Context()
        try:
            self._socket = _open_router(self._context, address)
        except EngineError:
            self._context.destroy(linger=0)
            raise
        self.address = self._socket.getsockopt_string(zmq.LAST_ENDPOINT)
        """Where it really listens (a free port has been chosen by now)."""
        self._bell, self._ring = socket.socketpair()
        self._bell.setblocking(False)
        self._ring.setblocking(False)
        self._poller = zmq.Poller()
        self._poller.register(self._socket, zmq.POLLIN)
        self._poller.register(self._bell, zmq.POLLIN)

    def wake(self) -> None:
        """Any thread. `wait` returns."""
        with contextlib.suppress(OSError):  # full: the owner is awake anyway; or closed
            self._ring.send(b"!")

    def wait(self, timeout_ms: int) -> None:
        """Returns when a message is there, the bell was rung, or the time is over."""
        if self._bell.fileno() in dict(self._poller.poll(timeout_ms)):
            self._bell.recv(4096)

    def receive(self) -> list[zmq.Frame] | None:
        """The parts of the next message, the sender's identity first; None: there is none."""
        try:
            return self._socket.recv_multipart(zmq.DONTWAIT, copy=False)
        except zmq.Again:
            return None

    def send(self, identity: bytes, message: wire.Message, pixels: Pixels | None = None) -> bool:
        """Whether it is on its way. Raises WireError for what cannot be sent at all."""
        parts = [identity, *wire.encode(message, pixels)]
        try:
            self._socket.send_multipart(parts, zmq.DONTWAIT, copy=False)
        except zmq.ZMQError:  # nobody there, or its queue is full although it has no credit left
            return False
        return True

    def close(self) -> None:
        """Messages that are not on their way yet are dropped."""
        self._socket.close(0)
        self._context.term()
        self._bell.close()
        self._ring.close()


def _open_router(context: "zmq.Context[zmq.Socket[bytes]]", address: str) -> "zmq.Socket[bytes]":
    """Raises EngineError where *address* cannot be bound."""
    router = context.socket(zmq.ROUTER)
    for option, value in (
        (zmq.LINGER, 0),
        (zmq.ROUTER_MANDATORY, 1),  # a vanished worker is an error here, not a silent drop
        (zmq.SNDHWM, 66),  # the largest credit + 2, so that a legal send never waits
        (zmq.RCVHWM, 66),
        (zmq.IMMEDIATE, 1),
        (zmq.MAXMSGSIZE, wire.MAX_PIXEL_BYTES),
    ):
        router.setsockopt(option, value)
    try:
        router.bind(address)
    except zmq.ZMQError as error:
        raise EngineError(
            f"[link] address {address} cannot be opened ({error}); another daemon may use it: "
            "choose another port, or auto"
        ) from error
    return router
