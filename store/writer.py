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
returns. At most PUT_AHEAD planes are on their way.

All calls come from one thread. Readers may open the run at any moment (store/reader.py).
"""

import contextlib
import shutil
import time
from collections import deque
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path

import msgspec

from refocus.errors import RunError
from refocus.frame import Frame, FrameHeader, Pixels, RawOutcome, RefocusOutcome
from refocus.status import Counts
from store.durable import Durability
from store.images import Images, Put
from store.journal import FrameLine, Journal, PairLine, plain, plain_tags
from store.layout import Pair, Place, Placer, RunInfo, journal_dir
from store.outcomes import Outcomes
from store.records import MAX_CLIPPED, Kind, Record, crc32c

PUT_AHEAD = 2
"""Planes on their way to the disk: one is being written, the next one is ready."""


class Provenance(msgspec.Struct, frozen=True, kw_only=True):
    """How a refocused plane was made."""

    generator: int
    """As `RunWriter.note_generator` numbered it; it stands for package hash and runtime."""
    latency_ns: int
    """From the hook to the answer, just before the plane is written."""
    clipped: int = 0
    """Pixels that fell outside the dtype's range."""


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
        self._images = Images(path, self._placer.pairs, stack_planes, self._durability.changed)
        self._pending: deque[Pending] = deque()
        self._channels_told: dict[int, int] = {}  # pair -> channels of its last PairLine
        self._outcomes = Outcomes(journal)
        self._marked = 0  # what the journal's last mark says is durable
        self._durability.start()

    @classmethod
    def create(cls, path: Path, info: RunInfo, *, stack_planes: int | None = None) -> "RunWriter":
        """Start a run in a new folder. Raises RunError where *path* exists: it stays untouched.

        *stack_planes*: planes along z that come one after the other, 1 where time is the fastest
        axis; None: not known. Any order can be written; this one is written to the fewest files.
        """
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
        return cls(path, journal, info.pixel_um, stack_planes)

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
        if seq in self._outcomes.raw or any(p.record.seq == seq for p in self._pending):
            raise RunError(f"frame {seq}: has a raw outcome already; each seq is written once")
        try:
            header, pair, place = self._place(frame, tags)
            put = self._images.put_raw(pair, place, header, frame.pixels)
            pair.take(place)
            self._tell_pair(pair)
        except Exception as error:  # whatever it was, no frame may vanish unbooked
            self._outcomes.fail_raw(seq, _reason(error))
            raise RunError(f"frame {seq}: not saved: {_describe(error)}") from error
        record = _saved(seq, Kind.RAW, RawOutcome.SAVED, place, put.stored)
        return self._follow(Pending(record, header, pair, place, put))

    def put_refocused(self, seq: int, pixels: Pixels, made: Provenance) -> Pending:
        """Begin to write the twin of a saved frame. What fails at once is booked and raised."""
        while any(p.record.seq == seq for p in self._pending):
            self._settle_oldest()
        place = self._outcomes.raw.get(seq)
        if place is None:
            raise RunError(
                f"frame {seq}: its raw plane is not saved; there is nothing to put a twin to"
            )
        self._require_open_answer(seq)
        pair = self._placer.pairs[place.pair]
        try:
            if pixels.shape != pair.form.shape or pixels.dtype.name != pair.form.dtype:
                raise RunError(
                    f"refocused plane is {pixels.dtype} {pixels.shape}, "
                    f"raw is {pair.form.dtype} {pair.form.shape}"
                )
            put = self._images.put_refocused(place, pixels)
        except Exception as error:  # whatever it was, it ends in an outcome
            self._outcomes.answer(seq, RefocusOutcome.FAILED, _reason(error))
            raise RunError(f"frame {seq}: refocused plane not saved: {_describe(error)}") from error
        record = _saved(seq, Kind.REFOCUS, RefocusOutcome.REFOCUSED, place, put.stored)._replace(
            latency_ns=made.latency_ns,
            clipped=min(made.clipped, MAX_CLIPPED),
            generator=made.generator,
        )
        return self._follow(Pending(record, None, pair, place, put))

    def settle(self) -> None:
        """Wait until every plane that was put is acknowledged or booked FAILED."""
        while self._pending:
            self._settle_oldest()

    def book_refocus(
        self, seq: int, outcome: RefocusOutcome, reason: str, *, generator: int = 0
    ) -> None:
        """Journal why a frame has no twin, and which *generator* rejected it or failed, if one did.

        Booking over a twin that is on disk raises RunError.
        """
        if outcome == RefocusOutcome.REFOCUSED:
            raise RunError(f"frame {seq}: REFOCUSED is booked by write_refocused, with the plane")
        self._require_open_answer(seq)
        self._outcomes.answer(seq, outcome, reason, generator)

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
        self.settle()
        counts = self.counts()
        try:
            self._journal.settle()
            self._images.finish()
            self._images.close()
            self._durability.sync()
            self._outcomes.seal(complete=complete, expected_frames=expected_frames, note=note)
        except OSError as error:
            raise RunError(
                f"{self.path}: not sealed ({_describe(error)}); it is incomplete"
            ) from error
        finally:
            self._images.close()
            self._durability.close()
            self._journal.close()
        return counts

    def _follow(self, pending: Pending) -> Pending:
        self._pending.append(pending)
        while len(self._pending) > PUT_AHEAD:
            self._settle_oldest()
        return pending

    def _settle_oldest(self) -> None:
        pending = self._pending.popleft()
        record = pending.record
        try:
            pending.put.done.result()
            self._outcomes.acknowledge(record)
        except Exception as error:  # noqa: BLE001  # whatever it was, no frame may vanish unbooked
            if record.kind == Kind.RAW:
                what = "not saved"
                pending.pair.leave(pending.place)
                self._outcomes.fail_raw(record.seq, _reason(error))
            else:
                what = "refocused plane not saved"
                self._outcomes.answer(record.seq, RefocusOutcome.FAILED, _reason(error))
            pending.error = RunError(f"frame {record.seq}: {what}: {_describe(error)}")
            pending.error.__cause__ = error
        pending.settled = True
        if self._durability.durable > self._marked:
            self._marked = self._durability.durable
            self._journal.book(Record(self._marked, time.time_ns(), kind=Kind.DURABLE))

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
