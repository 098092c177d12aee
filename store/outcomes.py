"""What became of every frame: the writer's memory of it, and the booking of it in the journal.

Every outcome passes through here on its way to the journal, so the counts, the numbers of reasons
and generators, and the question whether a run is complete have one place. Rebuilt from a journal
(`Outcomes.of`) it goes on where the one that wrote that journal ended: numbers that a record
refers to are not given again, even where the line they stood for is lost.
"""

import math
import time
from collections import Counter

from refocus.errors import RunError
from refocus.frame import RawOutcome, RefocusOutcome
from refocus.status import Counts
from store.journal import (
    EventLine,
    GeneratorLine,
    Journal,
    ReasonLine,
    RunLine,
    ScalingLine,
    SealLine,
)
from store.layout import Place
from store.plain import plain
from store.reader import Run, place_of
from store.records import Kind, Record, count


class Outcomes:
    """The outcomes of one run, in memory and in its journal."""

    def __init__(self, journal: Journal) -> None:
        """Of a run without a frame."""
        self._journal = journal
        self._tally: Counter[tuple[int, int]] = Counter()
        self._reasons: dict[str, int] = {}
        self._last_reason = 0
        self._generators: dict[tuple[str, str], int] = {}
        self._last_generator = 0
        self.raw: dict[int, Place | None] = {}
        """seq -> where it is SAVED, None where it FAILED."""
        self.refocus: dict[int, RefocusOutcome] = {}

    @classmethod
    def of(cls, run: Run, journal: Journal) -> "Outcomes":
        """As the writer of *run* had them; *journal* is that run's, open again."""
        outcomes = cls(journal)
        for kind in (Kind.RAW, Kind.REFOCUS):
            for record in run.records(kind):
                outcomes._remember(record)
        reasons, generators = run.notes.reasons, run.notes.generators
        outcomes._reasons = {text: number for number, text in reasons.items()}
        outcomes._last_reason = max(outcomes._last_reason, *reasons, 0)
        outcomes._generators = {
            (line.package_hash, line.runtime): number for number, line in generators.items()
        }
        outcomes._last_generator = max(outcomes._last_generator, *generators, 0)
        return outcomes

    def acknowledge(self, record: Record) -> None:
        """Append the record of a plane that is on disk. Raises OSError: it is not acknowledged."""
        self._journal.acknowledge(record)
        self._remember(record)

    def fail_raw(self, seq: int, reason: str) -> None:
        """Book that a frame's own pixels are not on disk, now or as soon as the disk takes it."""
        self._book(seq, Kind.RAW, RawOutcome.FAILED, reason)

    def answer(self, seq: int, outcome: RefocusOutcome, reason: str, generator: int = 0) -> None:
        """Book why a frame has no twin, now or as soon as the disk takes it."""
        self._book(seq, Kind.REFOCUS, outcome, reason, generator)

    def require_open_answer(self, seq: int) -> None:
        """Raises RunError where a frame has its twin."""
        if self.refocus.get(seq) == RefocusOutcome.REFOCUSED:
            raise RunError(f"frame {seq}: its refocused twin is on disk; it is never written again")

    def note_scaling(self, channel: str, offset: float, scale: float) -> None:
        """Write down the frozen scaling of a channel. Raises RunError."""
        if not (math.isfinite(offset) and math.isfinite(scale) and scale > 0):
            raise RunError(f"scaling of {channel!r}: wanted finite numbers, got {offset}, {scale}")
        self._note(ScalingLine(plain(channel), offset, scale))

    def note_generator(self, package_hash: str, name: str, version: str, runtime: str) -> int:
        """Write down a generator in a runtime once; returns its number. Raises RunError."""
        known = self._generators.get((package_hash, runtime))
        if known is not None:
            return known
        number = self._last_generator + 1
        self._note(
            GeneratorLine(
                number=number,
                package_hash=package_hash,
                name=name,
                version=version,
                runtime=runtime,
            )
        )
        self._generators[package_hash, runtime] = number
        self._last_generator = number
        return number

    def note_event(self, kind: str, fields: dict[str, object]) -> None:
        """Write down something that happened beside the frames. Raises RunError."""
        self._note(EventLine(time.time_ns(), kind, plain(fields)))

    def counts(self) -> Counts:
        """Outcomes so far, by the last record of every frame."""
        return count(self._tally)

    def seal(self, *, complete: bool, expected_frames: int | None, note: str) -> None:
        """Write the seal: complete only if *complete* is said and the frames add up. OSError."""
        counts = self.counts()
        self._journal.line(
            SealLine(
                wall_ns=time.time_ns(),
                complete=complete and self._adds_up(expected_frames),
                expected_frames=expected_frames,
                saved=counts.saved,
                failed=counts.failed,
                note=plain(note),
            )
        )

    def _note(self, line: RunLine) -> None:
        try:
            self._journal.line(line)
        except OSError as error:
            raise RunError(f"the journal takes no line ({error})") from error

    def _adds_up(self, expected_frames: int | None) -> bool:
        """Whether every frame 0..n-1 (n: *expected_frames* where known) has its raw plane."""
        received = max(self.raw, default=-1) + 1
        wanted = received if expected_frames is None else expected_frames
        return received == wanted == len(self.raw) and None not in self.raw.values()

    def _book(self, seq: int, kind: Kind, outcome: int, reason: str, generator: int = 0) -> None:
        record = Record(
            seq,
            time.time_ns(),
            generator=generator,
            reason=self._number_of(reason),
            kind=kind,
            outcome=outcome,
        )
        self._journal.book(record)
        self._remember(record)

    def _number_of(self, reason: str) -> int:
        """Number of the reason's line; 0 where it could not be written: the outcome counts more."""
        if reason not in self._reasons:
            number = self._last_reason + 1
            try:
                self._journal.line(ReasonLine(number, plain(reason)))
            except OSError:
                return 0
            self._reasons[reason] = self._last_reason = number
        return self._reasons[reason]

    def _remember(self, record: Record) -> None:
        """Take a frame's last record into memory."""
        if record.kind == Kind.RAW:
            if record.seq in self.raw:
                before = RawOutcome.FAILED if self.raw[record.seq] is None else RawOutcome.SAVED
                self._tally[Kind.RAW, before] -= 1
            self.raw[record.seq] = place_of(record) if record.outcome == RawOutcome.SAVED else None
        elif record.kind == Kind.REFOCUS:
            if record.seq in self.refocus:
                self._tally[Kind.REFOCUS, self.refocus[record.seq]] -= 1
            self.refocus[record.seq] = RefocusOutcome(record.outcome)
        self._tally[record.kind, record.outcome] += 1
        self._last_reason = max(self._last_reason, record.reason)
        self._last_generator = max(self._last_generator, record.generator)
