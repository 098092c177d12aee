"""The link's endpoint for workers on other hosts: encrypted, and nobody gets in without a key.

The link has one ROUTER, bound twice. Workers on this computer come in over the private endpoint
with a secret made at this start; what they are sent stays as it is, because encrypting 2048² planes
would cost them three quarters of the rate. Then CURVE is switched on, which holds for what is bound
later, and this endpoint is opened: frames are encrypted, a worker knows that it talks to its
recorder, and the recorder that it talks to a worker whose key is in its key set (`refocus.keys`).

ZeroMQ asks a ZAP handler about every key: a socket here, answered by the link's own thread. Without
an answer nobody gets in. A key set is looked at again every second, so that a right which was
given, or taken away, needs no new start.
"""

import logging
import secrets
import time
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

import zmq
from zmq.utils import z85

from refocus import keys

log = logging.getLogger(__name__)

ZAP = "inproc://zeromq.zap.01"
"""Where ZeroMQ asks whether a key may come in (ZMQ RFC 27)."""
DOMAIN = b"refocus"
HANDSHAKE_MS = 2000
"""Who has not shown a key by then is disconnected."""
LOOK_AGAIN_NS = 1_000_000_000
MOST_REFUSALS_TOLD = 64


class Outside(NamedTuple):
    """Where workers on other hosts are let in, and the folder of the key set that says which."""

    address: str
    keys: Path


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
        self._allowed: dict[str, str] = {}
        self._looked_ns = 0
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
        try:
            router.bind(outside.address)
        except zmq.ZMQError as error:
            on_trouble(
                f"no workers on other hosts: [link] address {outside.address} cannot be opened "
                f"({error}); another recorder, or refocus fill, may use it: end that, or choose "
                "another port"
            )

    def answer(self) -> None:
        """Says to ZeroMQ whether the next key may come in; to be called when `zap` is readable."""
        version, request, _, address, _, mechanism, *credentials = self.zap.recv_multipart()
        public = z85.encode(credentials[0]).decode() if mechanism == b"CURVE" else ""
        name = self._names().get(public)
        if name is None:
            self._tell_refused(public, address.decode(errors="replace"))
            self.zap.send_multipart([version, request, b"400", b"unknown key", b"", b""])
            return
        user = f"{self._mark} {name}".encode()
        self.zap.send_multipart([version, request, b"200", b"", user, b""])

    def worker(self, part: zmq.Frame) -> str:
        """Name of the worker on another host that sent *part*; empty: it came from this one."""
        try:
            mark, _, name = str(part.get("User-Id")).partition(" ")
        except zmq.ZMQError:  # nobody was asked about this connection
            return ""
        return name if secrets.compare_digest(mark.encode(), self._mark.encode()) else ""

    def lets_in(self, name: str) -> bool:
        """Whether worker *name* still has its right."""
        return name in self._names().values()

    def close(self) -> None:
        """Nobody is let in any more."""
        self.zap.close(0)

    def _names(self) -> dict[str, str]:
        now_ns = time.monotonic_ns()
        if not self._looked_ns or now_ns - self._looked_ns > LOOK_AGAIN_NS:
            self._allowed = keys.allowed(self._folder)
            self._looked_ns = now_ns
        return self._allowed

    def _tell_refused(self, public: str, address: str) -> None:
        if public in self._refused or len(self._refused) == MOST_REFUSALS_TOLD:
            return  # it tries again and again
        self._refused.add(public)
        log.warning(
            "a worker at %s was refused: its key is not, or no longer, in %s",
            address,
            self._folder / keys.WORKERS,
        )
