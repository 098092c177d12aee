"""The daemon's socket for workers: one ROUTER, and a bell that wakes whoever waits at it.

Workers on this computer come in at one address; those on other hosts, where any are let in at all,
through a door of their own (`acquire.door`).

One thread owns the socket; `wake` is for any other. A message that finds nobody, or no room, is
told to the sender at once instead of being kept or dropped in silence.
"""

import contextlib
import socket
from collections.abc import Callable

import zmq

from acquire.door import Door, Outside, Remote
from refocus import wire
from refocus.errors import EngineError, RefocusError
from refocus.frame import Pixels

ENCRYPTING_THREADS = 4
"""Threads of ZeroMQ, which encrypt: 18 ms of one core for a 2048² frame there and back. Each worker
has two connections, one of them for heartbeats; of two threads one would get all the frames."""


class Router:
    """Listens at *address*, and *outside* for workers on other hosts.

    Raises EngineError where *address* cannot be opened, SettingsError for unusable keys. Where
    *outside* cannot be opened *on_trouble* is told so: workers on this computer can do without.
    """

    def __init__(
        self, address: str, outside: Outside | None, on_trouble: Callable[[str], None]
    ) -> None:
        self._context = zmq.Context(ENCRYPTING_THREADS if outside else 1)
        try:
            self._socket = _open_router(self._context, address)
            self.address = self._socket.getsockopt_string(zmq.LAST_ENDPOINT)
            """Where it really listens (a free port has been chosen by now)."""
            self._door: Door | None = None
            if outside is not None:
                self._door = Door(self._context, self._socket, outside, on_trouble)
        except RefocusError:
            self._context.destroy(linger=0)
            raise
        self._bell, self._ring = socket.socketpair()
        self._bell.setblocking(False)
        self._ring.setblocking(False)
        self._poller = zmq.Poller()
        self._poller.register(self._socket, zmq.POLLIN)
        self._poller.register(self._bell, zmq.POLLIN)
        if self._door is not None:
            self._poller.register(self._door.zap, zmq.POLLIN)
            self._poller.register(self._door.comings, zmq.POLLIN)

    def wake(self) -> None:
        """Any thread. `wait` returns."""
        with contextlib.suppress(OSError):  # full: the owner is awake anyway; or closed
            self._ring.send(b"!")

    def wait(self, timeout_ms: int) -> None:
        """Returns when a message or a worker is there, the bell was rung, or the time is over."""
        ready = dict(self._poller.poll(timeout_ms))
        if self._bell.fileno() in ready:
            self._bell.recv(4096)
        if self._door is not None and self._door.zap in ready:
            self._door.answer()
        if self._door is not None and self._door.comings in ready:
            self._door.count()

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

    def remote(self, part: zmq.Frame) -> Remote | None:
        """The worker on another host that sent *part*; None: it came from this one."""
        return self._door.remote(part) if self._door is not None else None

    def has_right(self, remote: Remote | None) -> bool:
        """Whether *remote* may be here (still); None, a worker on this computer, always may."""
        return remote is None or (self._door is not None and self._door.has_right(remote))

    def close(self) -> None:
        """Messages that are not on their way yet are dropped."""
        if self._door is not None:
            self._door.close()
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
