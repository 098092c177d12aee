"""What the link knows of its workers: the living, and the epochs that it has given up."""

from collections import OrderedDict
from dataclasses import dataclass, field

from acquire.items import Maker
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
    maker: Maker
    identity: bytes
    seen_ns: int
    progress_ns: int
    """When it last got a frame while idle, answered one, or said what it is doing."""
    beat_identity: bytes | None = None
    busy: str = ""
    at: int | None = None
    """Frame in work, as the last heartbeat said."""
    working: "OrderedDict[int, FrameHeader]" = field(default_factory=OrderedDict)
    """Frames that it was given and has not answered."""

    @property
    def credit(self) -> int:
        """Frames that it can be given now."""
        return self.hello.credit - len(self.working)

    def fault(self, now_ns: int, limits: Limits) -> str:
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
