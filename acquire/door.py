"""The link's endpoint for workers on other hosts: encrypted, and nobody gets in without a key.

The link has one ROUTER, bound twice. Workers on this computer come in over the private endpoint
with a secret made at this start; what they are sent stays as it is, because encrypting 2048² planes
would cost them three quarters of the rate. Then CURVE is switched on, which holds for what is bound
later, and this endpoint is opened: frames are encrypted, a worker knows that it talks to its
recorder, and the recorder that it talks to a worker whose key is in its key set (`refocus.keys`).

ZeroMQ asks a ZAP handler about every key: a socket here, answered by the link's own thread. Without
an answer nobody gets in. The key set is looked at again every second, so that a right which was
given, or taken away, needs no new start. A right belongs to a key under a name: where the name has
been given to a new key meanwhile, the old one has none.

ZeroMQ accepts any number of connections, and each takes a file of this process, of which the
writer of raw needs some: strangers that hold 1000 connections would end a recording. So whoever
comes when there are MOST_CONNECTIONS is cut off, and who shows no key is, too, after a while.
"""

import contextlib
import logging
import os
import secrets
import socket
import threading
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

import zmq
from zmq.utils import z85
from zmq.utils.monitor import parse_monitor_message

from refocus import keys

log = logging.getLogger(__name__)

ZAP = "inproc://zeromq.zap.01"
"""Where ZeroMQ asks whether a key may come in (ZMQ RFC 27)."""
COMINGS = "inproc://refocus-comings"
DOMAIN = b"refocus"
HANDSHAKE_MS = 2000
"""Who has not shown a key by then is disconnected."""
MOST_CONNECTIONS = 128
"""Two a worker; a process on Linux may usually open 1024 files."""
MOST_EVENTS = 256
"""Comings and goings counted in a row before the link looks at anything else."""
LOOK_AGAIN_S = 1.0
CLOSE_S = 1.0
"""A key set on a network drive that hangs must not keep a run from being closed."""
MOST_REFUSALS_TOLD = 64


class Outside(NamedTuple):
    """Where workers on other hosts are let in, and the folder of the key set that says which."""

    address: str
    keys: Path


class Remote(NamedTuple):
    """A worker on another host, as its key says: nothing that it says itself is in here."""

    public: str
    name: str
    """What the key set calls that key; empty: it is not in there any more."""


class Rights:
    """Which keys may come in, by the key set in *folder*; any thread.

    A thread of its own reads it, because a folder on a network drive may hang, and workers on this
    computer must not wait for that. What cannot be read now stays as it was, and *on_trouble* is
    told.
    """

    def __init__(self, folder: Path, on_trouble: Callable[[str], None]) -> None:
        self._folder = folder
        self._on_trouble = on_trouble
        self._is_told = False
        self._names: dict[str, str] = {}
        self._stopping = threading.Event()
        self._look()
        self._thread = threading.Thread(target=self._run, name="refocus-keys", daemon=True)
        self._thread.start()

    def name(self, public: str) -> str:
        """Of the worker with that key, empty where it has no right to come in."""
        return self._names.get(public, "")

    def close(self) -> None:
        """Returns soon, also where the folder hangs."""
        self._stopping.set()
        self._thread.join(CLOSE_S)

    def _run(self) -> None:
        while not self._stopping.wait(LOOK_AGAIN_S):
            self._look()

    def _look(self) -> None:
        try:
            self._names = keys.allowed(self._folder)
            self._is_told = False
        except OSError as error:
            if not self._is_told:
                self._on_trouble(
                    f"the key set {self._folder} cannot be read ({error.strerror}): until it can, "
                    "workers on other hosts keep the rights that they had"
                )
            self._is_told = True


class Door:
    """Opens *outside* on *router*, for one thread, or tells *on_trouble* why it cannot.

    Raises SettingsError for unusable keys.
    """

    def __init__(
        self,
        context: "zmq.Context[zmq.Socket[bytes]]",
        router: "zmq.Socket[bytes]",
        outside: Outside,
        on_trouble: Callable[[str], None],
    ) -> None:
        key = keys.read_recorder(outside.keys)
        self._folder = outside.keys
        self._port = 0
        self._connected: set[int] = set()
        self._refused: set[str] = set()
        # Proves that it was we who let a connection in: a peer could claim any User-Id that it
        # knows, where nobody is asked (the private endpoint).
        self._mark = secrets.token_hex(16)
        self.zap = context.socket(zmq.REP)
        self.zap.linger = 0
        self.zap.bind(ZAP)
        router.curve_server = True
        router.curve_publickey = key.public.encode()
        router.curve_secretkey = key.secret.encode()
        router.zap_domain = DOMAIN
        router.setsockopt(zmq.ZAP_ENFORCE_DOMAIN, 1)  # no handler, no entry
        router.setsockopt(zmq.HANDSHAKE_IVL, HANDSHAKE_MS)
        self._router = router
        self.comings = _monitor(context, router)
        """Readable when a connection has come or gone: to be `count`ed then."""
        try:
            router.bind(outside.address)
            self._port = int(router.getsockopt_string(zmq.LAST_ENDPOINT).rpartition(":")[2])
        except zmq.ZMQError as error:
            on_trouble(
                f"no workers on other hosts: [link] address {outside.address} cannot be opened "
                f"({error}); another recorder, or refocus fill, may use it: end that, or choose "
                "another port"
            )
        self._rights = Rights(outside.keys, on_trouble)

    def answer(self) -> None:
        """Says to ZeroMQ whether the next key may come in; to be called when `zap` is readable."""
        version, request, _, address, _, mechanism, *credentials = self.zap.recv_multipart()
        public = z85.encode(credentials[0]).decode() if mechanism == b"CURVE" else ""
        if not self._rights.name(public):
            self._tell_refused(public, address.decode(errors="replace"))
            self.zap.send_multipart([version, request, b"400", b"unknown key", b"", b""])
            return
        user = f"{self._mark} {public}".encode()
        self.zap.send_multipart([version, request, b"200", b"", user, b""])

    def count(self) -> None:
        """Notes who came and went, and cuts off those who are too many."""
        for _ in range(MOST_EVENTS):
            if not self.comings.poll(0):
                return
            event = parse_monitor_message(self.comings.recv_multipart())
            connection = event["value"]
            if event["event"] == zmq.EVENT_DISCONNECTED:
                self._connected.discard(connection)
                continue
            self._connected.add(connection)
            if len(self._connected) > MOST_CONNECTIONS:
                self._cut_off(connection)

    def remote(self, part: zmq.Frame) -> Remote | None:
        """The worker on another host that sent *part*; None: it came from this one."""
        try:
            mark, _, public = str(part.get("User-Id")).partition(" ")
        except zmq.ZMQError:  # nobody was asked about this connection
            return None
        if not secrets.compare_digest(mark.encode(), self._mark.encode()):
            return None
        return Remote(public, self._rights.name(public))

    def has_right(self, remote: Remote) -> bool:
        """Whether *remote* may be here, still under the name that it had."""
        return bool(remote.name) and self._rights.name(remote.public) == remote.name

    def close(self) -> None:
        """Nobody is let in any more."""
        self._rights.close()
        self._router.disable_monitor()
        self.comings.close(0)
        self.zap.close(0)

    def _cut_off(self, descriptor: int) -> None:
        if os.name != "posix":
            return  # handles are plenty there, and cannot be looked at safely
        # ZeroMQ may have closed it meanwhile, and anything may have got its number: a duplicate
        # stays what it is, and only a connection to our own port is shut.
        with contextlib.suppress(OSError):
            duplicate = os.dup(descriptor)
            try:
                connection = socket.socket(fileno=duplicate)
            except OSError:  # a file has got the number
                os.close(duplicate)
                return
            with connection:
                of_network = connection.family in (socket.AF_INET, socket.AF_INET6)
                if of_network and connection.getsockname()[1] == self._port:
                    connection.shutdown(socket.SHUT_RDWR)

    def _tell_refused(self, public: str, address: str) -> None:
        if public in self._refused or len(self._refused) == MOST_REFUSALS_TOLD:
            return  # it tries again and again
        self._refused.add(public)
        log.warning(
            "a worker at %s was refused: its key is not, or no longer, in %s",
            address,
            self._folder / keys.WORKERS,
        )


def _monitor(
    context: "zmq.Context[zmq.Socket[bytes]]", router: "zmq.Socket[bytes]"
) -> "zmq.Socket[bytes]":
    router.monitor(COMINGS, zmq.EVENT_ACCEPTED | zmq.EVENT_DISCONNECTED)
    monitor = context.socket(zmq.PAIR)
    monitor.linger = 0
    monitor.rcvhwm = 0  # ZeroMQ's own thread would wait for room
    monitor.connect(COMINGS)
    return monitor
