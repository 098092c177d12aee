"""Whom the link serves: the generators that are wanted, their workers, epochs that are over.

One generator is in use: its workers get the frames. Others may be let in beforehand, so that their
workers are ready when they are put to use. Workers whose generator was turned away get nothing new;
what they have they finish, then they are told to leave.
"""

import hmac
from collections import OrderedDict
from dataclasses import dataclass, field

from acquire.door import Remote
from acquire.items import Maker
from acquire.shared import SharedPixels
from engine.package import Package
from refocus import wire
from refocus.frame import FrameHeader

EPOCHS_KEPT = 16


@dataclass(frozen=True, slots=True)
class Limits:
    """How long the link is patient, in ns."""

    silence: int
    """Without any message, heartbeats included."""
    frame: int
    """With a frame unanswered while the heart beats."""
    warmup: int
    """The same while the worker says that it compiles."""


@dataclass
class Peer:
    """One introduced worker. Times are monotonic, in ns."""

    hello: wire.Hello
    package: Package
    identity: bytes
    seen_ns: int
    progress_ns: int
    """When it last got a frame while idle, answered one, or said what it is doing."""
    remote: Remote | None = None
    """Who it is by its key, where it is on another host; None on this one."""
    beat_identity: bytes | None = None
    busy: str = ""
    at: int | None = None
    """Frame in work, as the last heartbeat said."""
    working: "OrderedDict[int, FrameHeader]" = field(default_factory=OrderedDict)
    """Frames that it was given and has not answered."""
    shared: SharedPixels = field(default_factory=SharedPixels)

    @property
    def maker(self) -> Maker:
        """What it runs, as the run keeps it beside every plane."""
        manifest = self.package.manifest
        return Maker(self.package.hash, manifest.name, manifest.version, self.hello.runtime)

    @property
    def pid(self) -> int:
        """Its process on this computer; 0 for one on another host, whatever it says."""
        return 0 if self.remote else self.hello.pid

    @property
    def who(self) -> dict[str, str | int]:
        """It in the journal."""
        return {"remote": self.remote.name} if self.remote else {"pid": self.pid}

    @property
    def words(self) -> str:
        """It in a line for people."""
        return in_words(self.hello, self.remote)

    @property
    def credit(self) -> int:
        """Frames that it can be given now."""
        return self.hello.credit - len(self.working)

    def why_give_up(self, now_ns: int, limits: Limits) -> str:
        """Why it must be given up, or nothing."""
        silent_ns = now_ns - self.seen_ns
        if silent_ns > limits.silence:
            return f"silent for {silent_ns / 1e9:.1f} s"
        patience_ns = limits.warmup if self.busy else limits.frame
        if self.working and now_ns - self.progress_ns > patience_ns:
            doing = f"while {self.busy}" if self.busy else f"at frame {self.at}"
            return f"hung for {patience_ns / 1e9:g} s {doing}"
        return ""


class GivenUp:
    """The latest epochs that are no longer valid, and the frames lost with each."""

    def __init__(self) -> None:
        self._lost: OrderedDict[str, set[int]] = OrderedDict()
        self._first_heard_ns: OrderedDict[str, int] = OrderedDict()

    def __contains__(self, epoch: str) -> bool:
        return epoch in self._lost

    def add(self, peer: Peer) -> None:
        """*peer* is given up with the frames that it still has."""
        self._lost[peer.hello.epoch] = set(peer.working)
        if len(self._lost) > EPOCHS_KEPT:
            self._lost.popitem(last=False)

    def claim(self, epoch: str, seq: int) -> bool:
        """True, once, for a frame that was lost with *epoch* and is answered after all."""
        lost = self._lost.get(epoch, set())
        if seq not in lost:
            return False
        lost.discard(seq)
        return True

    def forget(self, seq: int) -> None:
        """The frame goes to a worker again: what those say who lost it counts no more."""
        for lost in self._lost.values():
            lost.discard(seq)

    def should_renew(self, epoch: str, now_ns: int, limits: Limits) -> bool:
        """Whether a worker that beats under *epoch* has to introduce itself again.

        A heartbeat may overtake the HELLO of its own worker, because they come over two sockets: an
        epoch never heard of is given the time of a silence.
        """
        if epoch in self._lost:
            return True
        first_ns = self._first_heard_ns.setdefault(epoch, now_ns)
        if len(self._first_heard_ns) > EPOCHS_KEPT:
            self._first_heard_ns.popitem(last=False)
        return now_ns - first_ns > limits.silence


class Roster:
    """Which generators may have workers, and the workers that they have.

    A generator is `let_in`, `use`d and `turn_away`ed by the recorder. A worker `enter`s where its
    HELLO has no `refusal`: its generator is let in, and it knows *secret* or has shown a key.
    """

    def __init__(self, secret: str) -> None:
        self._secret = secret
        self._let_in: dict[str, Package] = {}
        self.in_use: Package | None = None
        """The generator whose workers get the frames."""
        self.peers: dict[str, Peer] = {}
        """The living, by epoch."""
        self.given_up = GivenUp()

    def let_in(self, package: Package) -> None:
        """From now on its workers may introduce themselves."""
        self._let_in[package.hash] = package

    def turn_away(self, package: Package) -> None:
        """From now on its workers may not, and those that are here have to leave."""
        self._let_in.pop(package.hash, None)

    def use(self, package: Package) -> None:
        """From now on its workers get the frames; those of the one before have to leave."""
        if self.in_use is not None:
            self.turn_away(self.in_use)
        self.let_in(package)
        self.in_use = package

    def refusal(self, hello: wire.Hello, remote: Remote | None) -> str:
        """Why whoever says *hello* must not get a frame, or nothing.

        *remote*: who it is, where a key has proved that; whether it has a right is not asked here.
        """
        if hello.protocol != wire.PROTOCOL:
            return f"it speaks protocol {hello.protocol}, this daemon {wire.PROTOCOL}"
        if remote is None and not hmac.compare_digest(hello.secret.encode(), self._secret.encode()):
            return "it does not know the secret"
        if hello.model not in self._let_in:
            wanted = _words(self.in_use) if self.in_use else "none now"
            return f"it runs generator {hello.model[:12]}, wanted {wanted}"
        if hello.epoch in self.peers or hello.epoch in self.given_up:
            return "its epoch was used before"
        return ""

    def at(self, identity: bytes) -> list[Peer]:
        """Workers that speak, or let their heart beat, over that connection."""
        peers = self.peers.values()
        return [peer for peer in peers if identity in (peer.identity, peer.beat_identity)]

    def enter(self, hello: wire.Hello, identity: bytes, remote: Remote | None, now_ns: int) -> Peer:
        """A worker that was not refused."""
        package = self._let_in[hello.model]
        peer = Peer(hello, package, identity, now_ns, now_ns, remote)
        self.peers[hello.epoch] = peer
        return peer

    def leave(self, peer: Peer) -> None:
        """It is gone, or as good as: its epoch is not valid any more."""
        del self.peers[peer.hello.epoch]
        self.given_up.add(peer)

    def running(self, package: Package) -> list[Peer]:
        """Workers of that generator that are alive. Any thread."""
        return [peer for peer in list(self.peers.values()) if peer.package.hash == package.hash]

    @property
    def serving(self) -> list[Peer]:
        """Workers that get frames. Any thread."""
        in_use = self.in_use
        return self.running(in_use) if in_use else []

    def freest(self) -> Peer | None:
        """The worker of the generator in use that can take most frames; None: none can take one."""
        free = [peer for peer in self.serving if peer.credit > 0]
        return max(free, key=lambda peer: peer.credit, default=None)

    def done(self) -> list[Peer]:
        """Workers that have to leave and have finished what they had."""
        peers = self.peers.values()
        return [p for p in peers if p.package.hash not in self._let_in and not p.working]


def in_words(hello: wire.Hello, remote: Remote | None) -> str:
    """Whoever said *hello*, in a line for people."""
    return remote.name if remote else f"(pid {hello.pid})"


def _words(package: Package) -> str:
    return f"{package.manifest.name} {package.manifest.version} ({package.hash[:12]})"
