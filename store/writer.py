"""Writes a run: every frame gets its line, its plane and its record, in this order.

Promises:
- a plane whose `write_raw` or `write_refocused` returned survives kill -9 of this process;
- an acknowledged plane is never written again;
- from the first acknowledged plane on, and after every call, the folder is a valid OME-Zarr 0.5:
  an image's metadata are there before its first plane, and files are replaced, never rewritten;
- whatever goes wrong with a raw frame ends in a FAILED record and a RunError, also on a full
  disk: an outcome that could not even be booked is booked as soon as the disk takes it, at the
  latest in `close`.

A plane may also be `put`: the call returns while the disk still takes the plane, so that the next
one can be seen to meanwhile. It is acknowledged, or booked FAILED, by the time that `settle`
returns (store/underway.py).

All calls come from one thread. Readers may open the run at any moment (store/reader.py).
"""

import contextlib
import shutil
from collections.abc import Mapping
from pathlib import Path

import msgspec

from refocus.errors import RunError
from refocus.frame import Frame, FrameHeader, Pixels, RawOutcome, RefocusOutcome
from refocus.status import Counts
from store import disk
from store.durable import Durability
from store.images import Images
from store.journal import FrameLine, Journal, PairLine, SealLine
from store.layout import Pair, Place, Placer, RunInfo, journal_dir
from store.outcomes import Outcomes
from store.plain import plain_header, plain_info, plain_tags
from store.reader import Run
from store.rebuild import rebuild
from store.records import MAX_CLIPPED, Kind
from store.tails import resume
from store.underway import Pending, Underway, describe, reason_of, record_of, require_form


class Provenance(msgspec.Struct, frozen=True, kw_only=True):
    """How a refocused plane was made."""

    generator: int
    """As `RunWriter.note_generator` numbered it; it stands for package hash and runtime."""
    latency_ns: int
    """From the hook to the answer, just before the plane is written."""
    clipped: int = 0
    """Pixels that fell outside the dtype's range."""


class RunWriter:
    """One run while it is written. Made by `create`, ended by `close`."""

    def __init__(
        self, path: Path, journal: Journal, pixel_um: float | None, stack_planes: int | None
    ) -> None:
        self.path = path
        self._journal = journal
        self._placer = Placer(pixel_um)
        self._durability = Durability(journal.files, lambda: journal.count)
        for folder in (path.parent, path, journal_dir(path)):
            self._durability.changed(folder)
        self._images = Images(
            path,
            self._placer.pairs,
            stack_planes,
            self._durability.changed,
            self._durability.fail,
        )
        self._channels_told: dict[int, int] = {}  # pair -> channels of its last PairLine
        self._outcomes = Outcomes(journal)
        self._underway = Underway(self._outcomes, journal, self._durability)
        self._seal: SealLine | None = None  # of a run that was reopened
        self._closed = False
        self._durability.start()

    @classmethod
    def create(cls, path: Path, info: RunInfo, *, stack_planes: int | None = None) -> "RunWriter":
        """Start a run in a new folder. Raises RunError where *path* exists: it stays untouched.

        *stack_planes*: planes along z that come one after the other, 1 where time is the fastest
        axis; None: not known. Any order can be written; this one is written to the fewest files.
        """
        try:
            changed = disk.make_folders(path.parent)
            path.mkdir()
            try:
                journal = Journal(journal_dir(path), plain_info(info))
                writer = cls._of(path, journal, info.pixel_um, stack_planes)
            except BaseException:
                shutil.rmtree(path, ignore_errors=True)  # made just now, so nothing else is in it
                raise
        except FileExistsError as error:
            raise RunError(f"{path}: exists already; give a folder that does not") from error
        except OSError as error:
            raise RunError(f"{path}: a run cannot be made here ({describe(error)})") from error
        for folder in changed:
            writer._durability.changed(folder)
        return writer

    @classmethod
    def reopen(cls, path: Path) -> "RunWriter":
        """Go on with a run that was sealed, to write and book twins; `reseal` ends it.

        Raises LockedError where it has another writer, RunError where `recover` comes first.
        """
        run, journal = resume(path)
        try:
            writer = cls._of(path, journal, None, None)
        except OSError as error:
            raise RunError(f"{path}: cannot be written to ({describe(error)})") from error
        try:
            writer._adopt(run)
        except BaseException:
            writer._leave()
            raise
        return writer

    @classmethod
    def _of(
        cls, path: Path, journal: Journal, pixel_um: float | None, stack_planes: int | None
    ) -> "RunWriter":
        """A writer that owns *journal*, and has closed it where it cannot be. Raises OSError."""
        try:
            return cls(path, journal, pixel_um, stack_planes)
        except BaseException:
            journal.close()
            raise

    def write_raw(self, frame: Frame, tags: Mapping[str, object]) -> FrameHeader:
        """Place a frame, store its plane and acknowledge it; returns its header with the segment.

        Whatever goes wrong is journalled as FAILED and raised as RunError.
        """
        pending = self.put_raw(frame, tags)
        self.settle()
        if pending.error:
            raise pending.error
        assert pending.header is not None
        return pending.header

    def write_refocused(self, seq: int, pixels: Pixels, made: Provenance) -> None:
        """Store the refocused twin of a saved frame, of raw's shape and dtype, and acknowledge it.

        Whatever goes wrong with the plane is journalled as FAILED and raised as RunError.
        """
        pending = self.put_refocused(seq, pixels, made)
        self.settle()
        if pending.error:
            raise pending.error

    def put_raw(self, frame: Frame, tags: Mapping[str, object]) -> Pending:
        """Begin to write a frame. What goes wrong at once is booked FAILED and raised."""
        seq = frame.header.seq
        self._require_raw()
        if seq in self._outcomes.raw or self._underway.has(seq):
            raise RunError(f"frame {seq}: has a raw outcome already; each seq is written once")
        try:
            header, pair, place = self._place(frame, tags)
            self._images.prepare(pair, header, frame.pixels)
            self._tell_pair(pair)
            put = self._images.put_raw(place, frame.pixels)  # nothing may fail from here on
            pair.take(place)
        except Exception as error:  # whatever it was, no frame may vanish unbooked
            self._outcomes.fail_raw(seq, reason_of(error))
            raise RunError(f"frame {seq}: not saved: {describe(error)}") from error
        record = record_of(seq, Kind.RAW, RawOutcome.SAVED, place, put.stored)
        return self._underway.add(Pending(record, header, pair, place, put))

    def put_refocused(self, seq: int, pixels: Pixels, made: Provenance) -> Pending:
        """Begin to write the twin of a saved frame. What fails at once is booked and raised."""
        self._require_open()
        while self._underway.has(seq):
            self._underway.settle_oldest()
        place = self._outcomes.raw.get(seq)
        if place is None:
            raise RunError(
                f"frame {seq}: its raw plane is not saved; there is nothing to put a twin to"
            )
        self._outcomes.require_open_answer(seq)
        pair = self._placer.pairs[place.pair]
        try:
            require_form(pixels, pair.form.shape, pair.form.dtype, "raw is")
            put = self._images.put_refocused(place, pixels)
        except Exception as error:  # whatever it was, it ends in an outcome
            self._outcomes.answer(seq, RefocusOutcome.FAILED, reason_of(error))
            raise RunError(f"frame {seq}: refocused plane not saved: {describe(error)}") from error
        record = record_of(seq, Kind.REFOCUS, RefocusOutcome.REFOCUSED, place, put.stored)._replace(
            latency_ns=made.latency_ns,
            clipped=min(made.clipped, MAX_CLIPPED),
            generator=made.generator,
        )
        return self._underway.add(Pending(record, None, pair, place, put))

    def settle(self) -> None:
        """Wait until every plane that was put is acknowledged or booked FAILED."""
        self._underway.settle()

    def book_refocus(
        self, seq: int, outcome: RefocusOutcome, reason: str, *, generator: int = 0
    ) -> None:
        """Journal why a frame has no twin, and which *generator* rejected it or failed, if one did.

        Booking over a twin that is on disk raises RunError.
        """
        if outcome == RefocusOutcome.REFOCUSED:
            raise RunError(f"frame {seq}: REFOCUSED is booked by write_refocused, with the plane")
        self._require_open()
        self._outcomes.require_open_answer(seq)
        self._outcomes.answer(seq, outcome, reason, generator)

    def book_raw_failed(self, seq: int, reason: str) -> None:
        """Journal that a frame's own pixels were lost before they came here."""
        self._require_raw()
        if seq in self._outcomes.raw:
            raise RunError(f"frame {seq}: has a raw outcome already; each seq is booked once")
        self._outcomes.fail_raw(seq, reason)

    def note_scaling(self, channel: str, offset: float, scale: float) -> None:
        """Write down the frozen scaling of a channel: network = (counts - offset) / scale."""
        self._outcomes.note_scaling(channel, offset, scale)

    def note_generator(self, package_hash: str, name: str, version: str, runtime: str) -> int:
        """Write down a generator in a runtime; returns its number for `Provenance`."""
        return self._outcomes.note_generator(package_hash, name, version, runtime)

    def note_event(self, kind: str, **fields: object) -> None:
        """Write down something that happened beside the frames: a worker died, restarted, ..."""
        self._outcomes.note_event(kind, fields)

    @property
    def sync_trouble(self) -> str:
        """Why what was acknowledged may not survive a power cut; empty where nothing is known."""
        return self._durability.trouble

    def counts(self) -> Counts:
        """Outcomes so far, by the last record of every frame."""
        return self._outcomes.counts()

    def close(self, *, complete: bool, expected_frames: int | None, note: str = "") -> Counts:
        """Seal the run: cut shapes to what is there, write the seal, give the lock back.

        It is sealed complete only if *complete* is said, every frame 0..n-1 (n: *expected_frames*
        where known) has its raw plane, and none FAILED. Raises RunError where the seal could not be
        written; what was acknowledged is there all the same.
        """
        self._require_raw()
        return self._end(complete, expected_frames, note)

    def reseal(self) -> Counts:
        """End a run that was reopened: write its seal again, with the counts as they are now.

        Raises RunError where the seal could not be written; the old one stands then.
        """
        self._require_open()
        if self._seal is None:
            raise RunError(f"{self.path}: was not reopened; end it by close")
        return self._end(self._seal.complete, self._seal.expected_frames, self._seal.note)

    def _end(self, complete: bool, expected_frames: int | None, note: str) -> Counts:
        self._closed = True
        try:
            with contextlib.ExitStack() as last:
                last.callback(self._leave)
                self.settle()
                self._journal.settle()
                if self._seal is None:
                    self._images.finish()
                else:
                    self._images.trim()
                self._images.close()
                self._durability.sync()
                self._underway.mark()
                self._outcomes.seal(complete=complete, expected_frames=expected_frames, note=note)
                self._durability.sync()
        except OSError as error:
            what = f"{self.path}: not sealed ({describe(error)}); run `refocus recover`"
            raise RunError(what) from error
        return self.counts()

    def _leave(self) -> None:
        """End the threads, close all files, give the lock back. Raises OSError, after all that."""
        with contextlib.ExitStack() as last:
            last.callback(self._journal.close)
            last.callback(self._durability.close)
            self._images.close()

    def _adopt(self, run: Run) -> None:
        """Take over what the run has; its raw planes are all there are."""
        self._seal = run.notes.seal
        self._outcomes = Outcomes.of(run, self._journal)
        self._underway = Underway(self._outcomes, self._journal, self._durability)
        for rebuilt in rebuild(run):
            self._placer.pairs.append(rebuilt.pair)
            self._images.adopt(rebuilt.pair)

    def _require_open(self) -> None:
        if self._closed:
            raise RunError(f"{self.path}: was closed already; it takes nothing more")

    def _require_raw(self) -> None:
        self._require_open()
        if self._seal is not None:
            raise RunError(f"{self.path}: was sealed and takes refocused planes only, then reseal")

    def _place(self, frame: Frame, tags: Mapping[str, object]) -> tuple[FrameHeader, Pair, Place]:
        """Check a frame, give it its slot, and write its line."""
        header = plain_header(frame.header)
        require_form(frame.pixels, header.shape, header.dtype, "the header says")
        pair, place = self._placer.place(header)
        header = msgspec.structs.replace(header, segment=pair.segment)
        self._journal.frame(FrameLine(header, plain_tags(tags)))
        return header, pair, place

    def _tell_pair(self, pair: Pair) -> None:
        """Write down the pair where it is new or has a new channel."""
        if self._channels_told.get(pair.number) == len(pair.channel_names):
            return
        self._journal.line(PairLine.of(pair, self._images.shards(pair)))
        self._channels_told[pair.number] = len(pair.channel_names)
