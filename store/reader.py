"""Reads a run, at any moment: while it is written, after a kill, after it was sealed.

`open_run` takes a snapshot of the journal; open again to see more. The journal alone says what is
there: a plane without its record is absent (None), never black, even where a file or the array's
shape says otherwise. Every plane read is held against its record's checksum. Nothing is written.
"""

import enum
from collections import Counter
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, TypeVar

import msgspec

from refocus.errors import RunError, WireError
from refocus.frame import FrameHeader, Pixels, RawOutcome, RefocusOutcome
from refocus.status import Counts
from store.journal import (
    FRAMES,
    LINES,
    LOCK,
    OUTCOMES,
    EventLine,
    FrameLine,
    GeneratorLine,
    InfoLine,
    PairLine,
    ReasonLine,
    RunLine,
    ScalingLine,
    SealLine,
)
from store.layout import Place, RunInfo, array_dir, is_run, journal_dir
from store.lock import is_held
from store.planes import PlaneArray
from store.records import Kind, Record, Records, count, crc32c, read_records

T = TypeVar("T")

OUTCOMES_GONE = "is gone: which planes are right cannot be known. Put it back from a copy"


class State(enum.StrEnum):
    """What a run is."""

    EMPTY = "empty"
    """Without a frame, and nobody writes."""
    LIVE = "live"
    """Its writer is alive."""
    COMPLETE = "complete"
    """Sealed, and every frame expected is there."""
    INCOMPLETE = "incomplete"
    """Sealed with frames missing, or never sealed and its writer is gone."""


@dataclass
class Notes:
    """What run.jsonl says, by kind."""

    info: RunInfo | None = None
    """None only where the writer was killed while it made the run."""
    pairs: dict[int, PairLine] = field(default_factory=dict)
    """By pair number; raw is image 2·pair, refocused 2·pair + 1."""
    scalings: dict[str, ScalingLine] = field(default_factory=dict)
    """By channel."""
    generators: dict[int, GeneratorLine] = field(default_factory=dict)
    reasons: dict[int, str] = field(default_factory=dict)
    events: list[EventLine] = field(default_factory=list)
    seal: SealLine | None = None
    unreadable: int = 0
    """Lines that are damaged, or of a newer Refocus."""


@dataclass(frozen=True)
class FrameEntry:
    """One frame, and what became of it."""

    seq: int
    header: FrameHeader | None
    """None where the frame itself never came to the store."""
    tags: Mapping[str, Any]
    """What Micro-Manager sent with it."""
    raw: Record | None
    """None where the writer was killed before it could acknowledge the frame."""
    refocus: Record | None
    """None where nothing is decided yet."""

    @property
    def place(self) -> Place | None:
        """Where the frame's planes are; None where raw was not saved."""
        return None if self.raw is None else place_of(self.raw)


def place_of(record: Record) -> Place | None:
    """Slot of the plane that a record speaks of; None where it left none."""
    if not record.has_plane:
        return None
    return Place(record.image // 2, record.t, record.c, record.z)


class Run:
    """A run as it was when it was opened. Made by `open_run`."""

    def __init__(self, path: Path, *, held: bool, records: Records, notes: Notes) -> None:
        self.path = path
        self.notes = notes
        self.damaged_records = records.damaged
        """Numbers of journal records whose checksum does not fit."""
        self.torn_bytes = records.torn_bytes
        """Length of a last record that never got whole; it acknowledged nothing."""
        self.all_records = records
        """Every record that is sound, also those that a later one supersedes."""
        self._held = held
        self._last: dict[tuple[int, int], Record] = {}
        self._durable: set[tuple[int, int]] = set()
        marks = (record.seq for record in records.records if record.kind == Kind.DURABLE)
        durable_records = max(marks, default=0)
        for number, record in records.numbered():
            key = record.kind, record.seq
            self._last[key] = record
            if number < durable_records:
                self._durable.add(key)
            else:
                self._durable.discard(key)
        self._arrays: dict[int, PlaneArray] = {}

    @property
    def state(self) -> State:
        """What the run is; see State."""
        seal, counts = self.notes.seal, self.counts
        if seal is None and self._held:
            return State.LIVE
        if not counts.received:
            return State.EMPTY
        if seal and seal.complete and (counts.saved, counts.failed) == (seal.saved, 0):
            return State.COMPLETE
        return State.INCOMPLETE

    @property
    def counts(self) -> Counts:
        """Outcomes by the last record of every frame."""
        return count(Counter((kind, r.outcome) for (kind, _), r in self._last.items()))

    def record(self, seq: int, kind: Kind) -> Record | None:
        """Last outcome of a frame's raw plane or of its refocusing."""
        return self._last.get((kind, seq))

    def records(self, kind: Kind) -> Iterator[Record]:
        """Last outcome of every frame, in the order in which the frames came."""
        return (record for (found, _), record in self._last.items() if found == kind)

    def is_durable(self, record: Record) -> bool:
        """Whether a last outcome, and its plane, survive a power cut."""
        return (record.kind, record.seq) in self._durable

    def reason(self, record: Record) -> str:
        """Why an outcome was not the good one; empty where nothing was said."""
        return self.notes.reasons.get(record.reason, "")

    def frames(self) -> Iterator[FrameEntry]:
        """Every frame in the order written, then those that were booked as failed unseen."""
        seen: set[int] = set()
        path = journal_dir(self.path) / FRAMES
        lines = _lines(path, msgspec.json.Decoder(FrameLine)) if path.exists() else ()
        for line in lines:
            if line is not None and line.header.seq not in seen:
                seen.add(line.header.seq)
                yield self._entry(line.header.seq, line)
        for record in self.records(Kind.RAW):
            if record.seq not in seen:
                yield self._entry(record.seq, None)

    def raw(self, seq: int) -> Pixels | None:
        """Raw plane (y, x), read-only, None where it was not saved. Raises RunError if damaged."""
        return self._plane(self.record(seq, Kind.RAW), RawOutcome.SAVED)

    def refocused(self, seq: int) -> Pixels | None:
        """Refocused plane (y, x), read-only, None where there is none. RunError if damaged."""
        return self._plane(self.record(seq, Kind.REFOCUS), RefocusOutcome.REFOCUSED)

    def array(self, image: int) -> PlaneArray:
        """The array of image number *image*. Raises RunError where it cannot be read."""
        if image not in self._arrays:
            self._arrays[image] = PlaneArray.open(array_dir(self.path, image))
        return self._arrays[image]

    def _entry(self, seq: int, line: FrameLine | None) -> FrameEntry:
        return FrameEntry(
            seq=seq,
            header=line.header if line else None,
            tags=line.tags if line else {},
            raw=self.record(seq, Kind.RAW),
            refocus=self.record(seq, Kind.REFOCUS),
        )

    def _plane(self, record: Record | None, wanted: int) -> Pixels | None:
        if record is None or record.outcome != wanted:
            return None
        where = f"frame {record.seq}: plane {record.image}/t{record.t}/c{record.c}/z{record.z}"
        pixels = self.array(record.image).read(record.t, record.c, record.z)
        if pixels is None:
            raise RunError(f"{where} was acknowledged and is not there any more")
        if crc32c(pixels) != record.plane_crc32c:
            raise RunError(f"{where} does not fit its checksum; its pixels are damaged")
        return pixels


def open_run(path: Path) -> Run:
    """Open a run for reading, whatever state it is in. Raises RunError where *path* is none."""
    if not is_run(path):
        raise RunError(f"{path}: not a run (it has no folder journal); give a run's folder")
    folder = journal_dir(path)
    held = is_held(folder / LOCK)  # first: a writer that closes meanwhile has written its seal
    try:
        if is_unborn(folder):
            return Run(path, held=held, records=Records([], [], 0), notes=Notes())
        records = read_records(folder / OUTCOMES)  # before the lines: then none is missing
        notes = _read_notes(folder / LINES)
    except OSError as error:
        if isinstance(error, FileNotFoundError) and _told_by_frames(folder):
            raise RunError(f"{folder / OUTCOMES} {OUTCOMES_GONE}") from error
        raise RunError(
            f"{path}: its journal cannot be read ({error}); run `refocus recover`"
        ) from error
    return Run(path, held=held, records=records, notes=notes)


def _told_by_frames(folder: Path) -> bool:
    """Whether the journal lacks its outcomes alone: a frame came, and what became of it is gone."""
    frames = folder / FRAMES
    return not (folder / OUTCOMES).exists() and frames.exists() and frames.stat().st_size > 0


def is_unborn(folder: Path) -> bool:
    """Whether the writer was killed, or is, between making its files: the last one is missing.

    *folder* is the journal's.
    """
    before = (LOCK, OUTCOMES, FRAMES)
    return all(path.name in before and not path.stat().st_size for path in folder.iterdir())


def _read_notes(path: Path) -> Notes:
    notes = Notes()
    for line in _lines(path, msgspec.json.Decoder(RunLine)):
        match line:
            case None:
                notes.unreadable += 1
            case InfoLine():
                notes.info = line.info
            case PairLine():
                notes.pairs[line.pair] = line
            case ScalingLine():
                notes.scalings[line.channel] = line
            case GeneratorLine():
                notes.generators[line.number] = line
            case ReasonLine():
                notes.reasons[line.number] = line.text
            case EventLine():
                notes.events.append(line)
            case SealLine():
                notes.seal = line
    return notes


def _lines(path: Path, decoder: "msgspec.json.Decoder[T]") -> Iterator[T | None]:
    """The lines of a file in order; None for one that cannot be read. A torn tail is left out."""
    with path.open("rb") as file:
        for line in file:
            if not line.endswith(b"\n"):
                return
            try:
                yield decoder.decode(line)
            except (msgspec.MsgspecError, WireError, UnicodeDecodeError):
                yield None
