"""The journal: what became of every frame, and all that a pixel array cannot hold.

Three files in RUN/journal, each only ever appended to, a whole entry in one write:

- outcomes.bin: one record an outcome, the acknowledgement (store/records.py);
- frames.jsonl: one line a frame: its header and everything Micro-Manager sent with it;
- run.jsonl: run info, image pairs, scalings, generators, reasons, events, and at last the seal.

A line is written before the record that speaks of it, so whoever reads the records first finds
every line. A line cut short by a kill is left out by readers, who say so.
"""

import contextlib
import errno
from collections import deque
from pathlib import Path
from typing import Any

import msgspec

from refocus.frame import FrameHeader
from store import disk
from store.layout import AxisValue, Pair, RunInfo
from store.lock import WriterLock
from store.records import Record, encode, file_header

OUTCOMES, FRAMES, LINES, LOCK = "outcomes.bin", "frames.jsonl", "run.jsonl", "writer.lock"


class InfoLine(msgspec.Struct, frozen=True, tag="run", tag_field="kind"):
    """First line of run.jsonl."""

    info: RunInfo


class PairLine(msgspec.Struct, frozen=True, kw_only=True, tag="pair", tag_field="kind"):
    """An image pair (images 2·pair and 2·pair + 1), again whenever it gains a channel."""

    pair: int
    name: str
    position: AxisValue | None
    segment: int
    further: dict[str, AxisValue]
    shape: tuple[int, int]
    dtype: str
    pixel_um: float | None
    channels: list[str]
    shards: tuple[int, int] | None = None
    """Planes of a shard along t and z, in both arrays; None: a plane is a file."""

    @classmethod
    def of(cls, pair: Pair, shards: tuple[int, int] | None) -> "PairLine":
        """The line of *pair* as it is now."""
        return cls(
            pair=pair.number,
            name=pair.name,
            position=pair.position,
            segment=pair.segment,
            further=pair.further,
            shape=pair.form.shape,
            dtype=pair.form.dtype,
            pixel_um=pair.form.pixel_um,
            channels=pair.channel_names,
            shards=shards,
        )


class ScalingLine(msgspec.Struct, frozen=True, tag="scaling", tag_field="kind"):
    """The frozen map of a channel: network = (counts - offset) / scale."""

    channel: str
    offset: float
    scale: float


class GeneratorLine(msgspec.Struct, frozen=True, kw_only=True, tag="generator", tag_field="kind"):
    """A generator in a runtime, as records refer to it by number."""

    number: int
    package_hash: str
    name: str
    version: str
    runtime: str


class ReasonLine(msgspec.Struct, frozen=True, tag="reason", tag_field="kind"):
    """Why an outcome was not the good one, as records refer to it by number."""

    number: int
    text: str


class EventLine(msgspec.Struct, frozen=True, tag="event", tag_field="kind"):
    """Something that happened beside the frames: a worker died, restarted, ..."""

    wall_ns: int
    event: str
    fields: dict[str, Any]


class SealLine(msgspec.Struct, frozen=True, kw_only=True, tag="seal", tag_field="kind"):
    """Last line of a run that was closed."""

    wall_ns: int
    complete: bool
    """Every frame expected has its raw plane."""
    expected_frames: int | None
    saved: int
    failed: int
    note: str


RunLine = InfoLine | PairLine | ScalingLine | GeneratorLine | ReasonLine | EventLine | SealLine


class FrameLine(msgspec.Struct, frozen=True):
    """A frame's header, with its final segment, and Micro-Manager's tags."""

    header: FrameHeader
    tags: dict[str, Any]


class AppendFile:
    """A file that grows by whole entries. A failed append leaves its end where it was."""

    def __init__(self, path: Path, *, new: bool = True) -> None:
        self._descriptor: int | None = disk.open_new(path) if new else disk.open_existing(path)
        self._end = 0 if new else path.stat().st_size

    def append(self, entry: bytes) -> None:
        """Write one entry in one system call. Raises OSError where it did not go in whole."""
        if self._descriptor is None:
            raise OSError(errno.EBADF, "the journal is closed")
        try:
            disk.write_at(self._descriptor, entry, self._end)
        except OSError:
            with contextlib.suppress(OSError):
                disk.cut(self._descriptor, self._end)
            raise
        self._end += len(entry)

    def close(self) -> None:
        """Close the file. A second call does nothing."""
        if self._descriptor is not None:
            descriptor, self._descriptor = self._descriptor, None
            disk.close(descriptor)


class Journal:
    """The three files while a run is written, and the lock that says so."""

    def __init__(self, folder: Path, info: RunInfo) -> None:
        """Start a journal in a new *folder*. Raises OSError."""
        folder.mkdir()
        self._open(folder, WriterLock(folder / LOCK), new=True)
        try:
            self._records.append(file_header())
            self.line(InfoLine(info))
        except BaseException:
            self.close()
            raise

    @classmethod
    def reopen(cls, folder: Path, lock: WriterLock, records: int) -> "Journal":
        """Go on with a journal of so many *records*, which ends with a whole one, and whole lines.

        The caller took *lock* before it looked; it is released with the journal. Raises OSError.
        """
        journal = cls.__new__(cls)
        journal._open(folder, lock, new=False)
        journal.count = records
        return journal

    def _open(self, folder: Path, lock: WriterLock, *, new: bool) -> None:
        with contextlib.ExitStack() as opened:
            opened.callback(lock.release)
            self._records, self._frames, self._lines = (
                opened.enter_context(contextlib.closing(AppendFile(folder / name, new=new)))
                for name in (OUTCOMES, FRAMES, LINES)
            )
            self.count = 0
            """Records appended so far."""
            self._owed: deque[Record] = deque()
            self.files = (folder / FRAMES, folder / LINES, folder / OUTCOMES)
            """In the order in which they must become durable: lines before records."""
            self._opened = opened.pop_all()

    def acknowledge(self, record: Record) -> None:
        """Append a record, after those owed. Raises OSError: then it is not acknowledged."""
        self.settle()
        self._append(record)

    def book(self, record: Record) -> None:
        """Append a record, now or as soon as the disk takes it."""
        self._owed.append(record)
        with contextlib.suppress(OSError):
            self.settle()

    def settle(self) -> None:
        """Append what is owed. Raises OSError where the disk still does not take it."""
        while self._owed:
            self._append(self._owed[0])
            self._owed.popleft()

    def frame(self, line: FrameLine) -> None:
        """Append a frame's header and tags. Raises OSError."""
        self._frames.append(msgspec.json.encode(line) + b"\n")

    def line(self, line: RunLine) -> None:
        """Append a line to run.jsonl. Raises OSError."""
        self._lines.append(msgspec.json.encode(line) + b"\n")

    def close(self) -> None:
        """Close the files and give the lock back. A second call does nothing."""
        self._opened.close()

    def _append(self, record: Record) -> None:
        self._records.append(encode(record, self.count))
        self.count += 1
