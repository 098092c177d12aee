"""Writes a run: every frame gets its line, its plane and its record, in this order.

Promises:
- a plane whose `write_raw` or `write_refocused` returned survives kill -9 of this process;
- an acknowledged plane is never written again;
- from the first acknowledged plane on, and after every call, the folder is a valid OME-Zarr 0.5:
  an image's metadata are there before its first plane, and files are replaced, never rewritten;
- whatever goes wrong with a raw frame ends in a FAILED record and a RunError, also on a full
  disk: an outcome that could not even be booked is booked as soon as the disk takes it, at the
  latest in `close`.

All calls come from one thread. Readers may open the run at any moment (store/reader.py).
"""

import contextlib
import shutil
import time
from collections.abc import Iterator, Mapping
from pathlib import Path

import msgspec

from refocus.errors import RunError
from refocus.frame import Frame, FrameHeader, Pixels, RawOutcome, RefocusOutcome
from refocus.status import Counts
from store.images import Images
from store.journal import FrameLine, Journal, PairLine, plain, plain_tags
from store.layout import Pair, Place, Placer, RunInfo, journal_dir
from store.outcomes import Outcomes
from store.records import MAX_CLIPPED, Kind, Record, crc32c


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

    def __init__(self, path: Path, journal: Journal, pixel_um: float | None) -> None:
        self.path = path
        self._journal = journal
        self._placer = Placer(pixel_um)
        self._images = Images(path, self._placer.pairs)
        self._channels_told: dict[int, int] = {}  # pair -> channels of its last PairLine
        self._outcomes = Outcomes(journal)

    @classmethod
    def create(cls, path: Path, info: RunInfo) -> "RunWriter":
        """Start a run in a new folder. Raises RunError where *path* exists: it stays untouched."""
        try:
            path.mkdir(parents=True)
            try:
                journal = Journal(journal_dir(path), _plain_info(info))
            except BaseException:
                shutil.rmtree(path, ignore_errors=True)  # made just now, so nothing else is in it
                raise
        except FileExistsError as error:
            raise RunError(f"{path}: exists already; give a folder that does not") from error
        except OSError as error:
            raise RunError(f"{path}: a run cannot be made here ({_describe(error)})") from error
        return cls(path, journal, info.pixel_um)

    def write_raw(self, frame: Frame, tags: Mapping[str, object]) -> FrameHeader:
        """Place a frame, store its plane and acknowledge it; returns its header with the segment.

        Whatever goes wrong is journalled as FAILED and raised as RunError.
        """
        seq = frame.header.seq
        if seq in self._outcomes.raw:
            raise RunError(f"frame {seq}: has a raw outcome already; each seq is written once")
        try:
            header, pair, place = self._place(frame, tags)
            stored = self._images.write_raw(pair, place, header, frame.pixels)
            self._tell_pair(pair)
            self._outcomes.acknowledge(_saved(seq, Kind.RAW, RawOutcome.SAVED, place, stored))
        except Exception as error:  # whatever it was, no frame may vanish unbooked
            self._outcomes.fail_raw(seq, _reason(error))
            raise RunError(f"frame {seq}: not saved: {_describe(error)}") from error
        pair.take(place)
        return header

    def write_refocused(self, seq: int, pixels: Pixels, made: Provenance) -> None:
        """Store the refocused twin of a saved frame, of raw's shape and dtype, and acknowledge it.

        Whatever goes wrong with the plane is journalled as FAILED and raised as RunError.
        """
        place = self._outcomes.raw.get(seq)
        if place is None:
            raise RunError(
                f"frame {seq}: its raw plane is not saved; there is nothing to put a twin to"
            )
        self._require_open_answer(seq)
        try:
            form = self._placer.pairs[place.pair].form
            if pixels.shape != form.shape or pixels.dtype.name != form.dtype:
                raise RunError(
                    f"refocused plane is {pixels.dtype} {pixels.shape}, "
                    f"raw is {form.dtype} {form.shape}"
                )
            stored = self._images.write_refocused(place, pixels)
            record = _saved(seq, Kind.REFOCUS, RefocusOutcome.REFOCUSED, place, stored)
            self._outcomes.acknowledge(
                record._replace(
                    latency_ns=made.latency_ns,
                    clipped=min(made.clipped, MAX_CLIPPED),
                    generator=made.generator,
                )
            )
        except Exception as error:  # whatever it was, it ends in an outcome
            self._outcomes.answer(seq, RefocusOutcome.FAILED, _reason(error))
            raise RunError(f"frame {seq}: refocused plane not saved: {_describe(error)}") from error

    def book_refocus(self, seq: int, outcome: RefocusOutcome, reason: str) -> None:
        """Journal why a frame has no twin. Booking over a twin that is on disk raises RunError."""
        if outcome == RefocusOutcome.REFOCUSED:
            raise RunError(f"frame {seq}: REFOCUSED is booked by write_refocused, with the plane")
        self._require_open_answer(seq)
        self._outcomes.answer(seq, outcome, reason)

    def book_raw_failed(self, seq: int, reason: str) -> None:
        """Journal that a frame's own pixels were lost before they came here."""
        if seq in self._outcomes.raw:
            raise RunError(f"frame {seq}: has a raw outcome already; each seq is booked once")
        self._outcomes.fail_raw(seq, reason)

    def note_scaling(self, channel: str, offset: float, scale: float) -> None:
        """Write down the frozen scaling of a channel: network = (counts - offset) / scale."""
        with self._noting():
            self._outcomes.note_scaling(channel, offset, scale)

    def note_generator(self, package_hash: str, name: str, version: str, runtime: str) -> int:
        """Write down a generator in a runtime; returns its number for `Provenance`."""
        with self._noting():
            return self._outcomes.note_generator(package_hash, name, version, runtime)

    def note_event(self, kind: str, **fields: object) -> None:
        """Write down something that happened beside the frames: a worker died, restarted, ..."""
        with self._noting():
            self._outcomes.note_event(kind, fields)

    def counts(self) -> Counts:
        """Outcomes so far, by the last record of every frame."""
        return self._outcomes.counts()

    def close(self, *, complete: bool, expected_frames: int | None, note: str = "") -> Counts:
        """Seal the run: cut shapes to what is there, write the seal, give the lock back.

        It is sealed complete only if *complete* is said, every frame 0..n-1 (n: *expected_frames*
        where known) has its raw plane, and none FAILED. Raises RunError where the seal could not be
        written; what was acknowledged is there all the same.
        """
        counts = self.counts()
        try:
            self._journal.settle()
            self._images.finish()
            self._outcomes.seal(complete=complete, expected_frames=expected_frames, note=note)
        except OSError as error:
            raise RunError(
                f"{self.path}: not sealed ({_describe(error)}); it is incomplete"
            ) from error
        finally:
            self._journal.close()
        return counts

    def _place(self, frame: Frame, tags: Mapping[str, object]) -> tuple[FrameHeader, Pair, Place]:
        """Check a frame, give it its slot, and write its line."""
        header, pixels = _clean(frame.header), frame.pixels
        if pixels.shape != header.shape or pixels.dtype.name != header.dtype:
            raise RunError(
                f"pixels are {pixels.dtype} {pixels.shape}, "
                f"the header says {header.dtype} {header.shape}"
            )
        pair, place = self._placer.place(header)
        header = msgspec.structs.replace(header, segment=pair.segment)
        self._journal.frame(FrameLine(header, plain_tags(tags)))
        return header, pair, place

    def _tell_pair(self, pair: Pair) -> None:
        """Write down the pair where it is new or has a new channel."""
        if self._channels_told.get(pair.number) == len(pair.channel_names):
            return
        line = PairLine(
            pair=pair.number,
            name=pair.name,
            position=pair.position,
            segment=pair.segment,
            further=pair.further,
            shape=pair.form.shape,
            dtype=pair.form.dtype,
            pixel_um=pair.form.pixel_um,
            channels=pair.channel_names,
        )
        self._journal.line(line)
        self._channels_told[pair.number] = len(pair.channel_names)

    def _require_open_answer(self, seq: int) -> None:
        if self._outcomes.refocus.get(seq) == RefocusOutcome.REFOCUSED:
            raise RunError(f"frame {seq}: its refocused twin is on disk; it is never written again")

    @contextlib.contextmanager
    def _noting(self) -> Iterator[None]:
        try:
            yield
        except OSError as error:
            raise RunError(
                f"{self.path}: the journal takes no line ({_describe(error)})"
            ) from error


def _saved(seq: int, kind: Kind, outcome: int, place: Place, stored: Pixels) -> Record:
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


def _clean(header: FrameHeader) -> FrameHeader:
    """The header with axis values that are whole numbers or text, and text that is UTF-8.

    True and False become text: as numbers they would share the slots of 1 and 0.
    """
    axes = {
        key: value if type(value) in (int, str) else str(value)
        for key, value in plain_tags(header.axes).items()
    }
    return msgspec.structs.replace(
        header, axes=axes, channel=plain(header.channel), camera=plain(header.camera)
    )


def _plain_info(info: RunInfo) -> RunInfo:
    return msgspec.structs.replace(
        info, settings=plain(info.settings), microscope=plain(info.microscope)
    )


def _describe(error: Exception) -> str:
    return str(error) or type(error).__name__


def _reason(error: Exception) -> str:
    """As `_describe`, without the plane's path: a reason is written once for all that share it."""
    if isinstance(error, OSError) and error.strerror:
        return f"{error.strerror} (errno {error.errno})"
    return _describe(error)
