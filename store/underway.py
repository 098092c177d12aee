"""Planes on their way to the disk: each ends in an outcome, in the order in which it was put.

The disk takes a plane while the caller sees to the next one. A plane is acknowledged once its write
has returned; one whose write fails is booked FAILED and its slot is free again.
"""

import time
from collections import deque
from dataclasses import dataclass

from refocus.errors import RunError
from refocus.frame import FrameHeader, Pixels, RefocusOutcome
from store.durable import Durability
from store.images import Put
from store.journal import Journal
from store.layout import Pair, Place
from store.outcomes import Outcomes
from store.records import Kind, Record, crc32c

PUT_AHEAD = 4
PUT_AHEAD_BYTES = 64 << 20
"""Planes on their way: one is being written, the next ones are ready. Four, so that the disk has
work while this process does not get a core; two, where they are larger than these bytes."""


@dataclass(eq=False)
class Pending:
    """A plane that was put: not settled yet, acknowledged (no error), or FAILED."""

    record: Record
    header: FrameHeader | None
    """Of a raw frame, with its segment."""
    pair: Pair
    place: Place
    put: Put
    settled: bool = False
    error: RunError | None = None

    @property
    def seq(self) -> int:
        """Number of the frame."""
        return self.record.seq


class Underway:
    """The planes of one run that are not settled yet."""

    def __init__(self, outcomes: Outcomes, journal: Journal, durability: Durability) -> None:
        self._outcomes = outcomes
        self._journal = journal
        self._durability = durability
        self._pending: deque[Pending] = deque()
        self._marked = 0  # what the journal's last mark says is durable

    def has(self, seq: int) -> bool:
        """Whether a plane of this frame is on its way."""
        return any(pending.seq == seq for pending in self._pending)

    def add(self, pending: Pending) -> Pending:
        """Follow a plane that was put; waits where too many are on their way."""
        self._pending.append(pending)
        ahead = 2 if PUT_AHEAD * pending.put.stored.nbytes > PUT_AHEAD_BYTES else PUT_AHEAD
        while len(self._pending) > ahead or (self._pending and self._pending[0].put.done.done()):
            self.settle_oldest()
        return pending

    def settle(self) -> None:
        """Wait until every plane is acknowledged or booked FAILED."""
        while self._pending:
            self.settle_oldest()

    def settle_oldest(self) -> None:
        """Wait for the plane that was put first. Interrupted by Ctrl-C, it can be done again."""
        pending = self._pending[0]
        try:
            pending.put.done.result()
            self._acknowledge(pending)
        except Exception as error:  # noqa: BLE001  # whatever it was, no frame may vanish unbooked
            self._fail(pending, error)
        pending.settled = True
        self._pending.popleft()
        self.mark()

    def mark(self) -> None:
        """Write down what has become durable meanwhile."""
        if self._durability.durable > self._marked:
            self._marked = self._durability.durable
            self._journal.book(Record(self._marked, time.time_ns(), kind=Kind.DURABLE))

    def _acknowledge(self, pending: Pending) -> None:
        try:
            self._outcomes.acknowledge(pending.record)
        except OSError:
            pending.put.unlist()
            raise

    def _fail(self, pending: Pending, error: Exception) -> None:
        seq = pending.seq
        if pending.record.kind == Kind.RAW:
            what = "not saved"
            pending.pair.leave(pending.place)
            self._outcomes.fail_raw(seq, reason_of(error))
        else:
            what = "refocused plane not saved"
            self._outcomes.answer(seq, RefocusOutcome.FAILED, reason_of(error))
        pending.error = RunError(f"frame {seq}: {what}: {describe(error)}")
        pending.error.__cause__ = error


def require_form(pixels: Pixels, shape: tuple[int, int], dtype: str, whose: str) -> None:
    """Raises RunError where a plane is of another form; *whose* it is: "raw is"."""
    if pixels.shape != shape or pixels.dtype.name != dtype:
        raise RunError(f"pixels are {pixels.dtype} {pixels.shape}, {whose} {dtype} {shape}")


def record_of(seq: int, kind: Kind, outcome: int, place: Place, stored: Pixels) -> Record:
    """Record of a plane that is on disk."""
    return Record(
        seq=seq,
        wall_ns=time.time_ns(),
        image=place.raw_image if kind == Kind.RAW else place.refocused_image,
        t=place.t,
        c=place.c,
        z=place.z,
        plane_crc32c=crc32c(stored),
        kind=kind,
        outcome=outcome,
    )


def describe(error: Exception) -> str:
    """What went wrong, in words, even where the error has none."""
    return str(error) or type(error).__name__


def reason_of(error: Exception) -> str:
    """As `describe`, without the plane's path: a reason is written once for all that share it."""
    if isinstance(error, OSError) and error.strerror:
        return f"{error.strerror} (errno {error.errno})"
    return describe(error)
