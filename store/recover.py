"""Makes a run whole after any death of its writer: as far as it was acknowledged, and no further.

In this order, so that recovering may itself be killed at any moment and begun again:

1. the torn ends of the journal's files are cut off;
2. arrays whose zarr.json is gone are described again, so that their planes can be read;
3. planes that are gone or damaged are booked FAILED, frames of which no plane was saved too, and
   frames without an answer LOST: from here on the journal says what is there;
4. shard indices, shapes and all metadata are made to say what the journal says, and what nothing
   needs is removed;
5. all of it is made durable, marked so, and sealed. The run is complete only if it was sealed so
   before and nothing of it is lost.

Each step is derived from what is on disk, so a second time there is nothing left to do, and not a
byte changes. A plane that cannot be vouched for becomes absent, never wrong: its bytes stay where
they are, the index and the journal say that it is not there.
"""

import contextlib
import time
from collections import defaultdict
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import msgspec

from refocus.errors import RunError
from refocus.frame import RefocusOutcome
from refocus.status import Counts
from refocus.words import counted, few, frames
from store import disk, levels
from store.durable import Durability
from store.faults import Faults, find_faults, slots_by_shard
from store.grid import repair_index
from store.journal import LOCK, Journal, PairLine
from store.layout import array_dir, is_run, journal_dir
from store.lock import WriterLock
from store.outcomes import Outcomes
from store.planes import PlaneArray
from store.reader import Run, State, is_unborn, open_run
from store.rebuild import Rebuilt, rebuild
from store.records import Kind, Record
from store.refused import refused
from store.tails import Tail, cut, torn_tails
from store.verify import LostPlane, Progress, acknowledged, lost_planes

NO_PLANE = "the writer ended before the plane was saved"
NO_ANSWER = "the writer ended before the answer came"
NO_RAW = "no raw frame was saved"
NO_SEAL = "its writer ended without closing it; recovered"


class Recovery(msgspec.Struct, frozen=True, kw_only=True):
    """What was found, and what was done about it."""

    state: State
    counts: Counts
    lost: int
    """Planes, raw and refocused, that were acknowledged and cannot be had any more."""
    done: tuple[str, ...]
    """In words; empty where nothing had to be done."""

    def as_json(self) -> dict[str, Any]:
        """The object that `refocus recover --json` prints."""
        return {
            "state": str(self.state),
            "saved": self.counts.saved,
            "refocused": self.counts.refocused,
            "lost": self.lost,
            "done": list(self.done),
        }


def recover(
    path: Path,
    *,
    verify: bool = True,
    progress: Progress = lambda _done, _total: None,
) -> Recovery:
    """Make the run at *path* whole; see the module's docstring.

    *verify*: read every plane back; otherwise only those that a power cut could have touched.
    Raises LockedError where its writer lives, RunError where *path* is no run, where too little of
    the journal is left to tell planes from rubbish, or where the disk does not take what must be
    written (DiskError: it is full): then nothing acknowledged is worse than before, and recovering
    may be begun again.
    """
    if not is_run(path):
        raise RunError(f"{path}: not a run (it has no folder journal); give a run's folder")
    lock = None
    try:
        lock = WriterLock(journal_dir(path) / LOCK)
        if is_unborn(journal_dir(path)):
            return Recovery(state=State.EMPTY, counts=open_run(path).counts, lost=0, done=())
        return _recover(path, lock, verify, progress)
    except OSError as error:
        raise refused(path, "not recovered, nothing is worse than before", error) from error
    finally:
        if lock is not None:
            lock.release()


def _recover(path: Path, lock: WriterLock, verify: bool, progress: Progress) -> Recovery:
    tails = torn_tails(journal_dir(path))
    for tail in tails:
        cut(tail)
    run = open_run(path)
    with contextlib.closing(
        Journal.reopen(journal_dir(path), lock, run.all_records.count)
    ) as journal:
        work = _Work(path, journal)
        work.tell(tails)
        pairs = rebuild(run)
        if work.book(run, pairs, verify, progress):
            run = open_run(path)
            pairs = rebuild(run)
        work.mend_files(run, pairs)
        if work.seal(run, pairs):
            run = open_run(path)
    cut_off = sum(tail.damaged_records for tail in tails)
    lost = cut_off + len(run.damaged_records) + _superseded_planes(run)
    return Recovery(state=run.state, counts=run.counts, lost=lost, done=tuple(work.done))


class _Work:
    """One recovery: what was done so far, and what of it is not durable yet."""

    def __init__(self, path: Path, journal: Journal) -> None:
        self.done: list[str] = []
        self._path = path
        self._journal = journal
        self._changed: set[Path] = set()

    def tell(self, tails: list[Tail]) -> None:
        """Say which ends of the journal were cut."""
        for tail in tails:
            self._touched(tail.path)
            self.done.append(f"{tail.said}: mended")

    def book(self, run: Run, pairs: list[Rebuilt], verify: bool, progress: Progress) -> bool:
        """Bring the journal to what is really there; whether anything was to be booked."""
        self._describe_arrays(pairs)
        outcomes = Outcomes.of(run, self._journal)
        lost = list(lost_planes(run, trust_durable=not verify, progress=progress))
        for plane in lost:
            _book_lost(outcomes, plane)
        self.done += _booked(lost)
        unsaved = sorted(_seqs(run).difference(outcomes.raw))
        for seq in unsaved:
            outcomes.fail_raw(seq, NO_PLANE)
        if unsaved:
            self.done.append(f"{frames(unsaved)}: came too late to be saved: booked FAILED")
        unanswered = sorted(outcomes.raw.keys() - outcomes.refocus.keys())
        for seq in unanswered:
            if outcomes.raw[seq] is None:
                outcomes.answer(seq, RefocusOutcome.FAILED, NO_RAW)
            else:
                outcomes.answer(seq, RefocusOutcome.LOST, NO_ANSWER)
        if unanswered:
            self.done.append(
                f"{frames(unanswered)}: no refocus outcome: booked LOST, without raw FAILED"
            )
        self._journal.settle()
        untold = [rebuilt for rebuilt in pairs if rebuilt.known and not rebuilt.told]
        for rebuilt in untold:
            self._journal.line(PairLine.of(rebuilt.pair, rebuilt.shards))
            self.done.append(f"pair {rebuilt.pair.number}: its line was missing: written")
        return bool(lost or unsaved or unanswered or untold)

    def mend_files(self, run: Run, pairs: list[Rebuilt]) -> None:
        """Make indices and metadata say what the journal says; remove what nothing needs."""
        faults = find_faults(run, pairs)
        for index in faults.indices:
            repair_index(index.path, index.grid, index.slots)
            self._touched(index.path)
        for path, content in faults.metadata:
            disk.make_folders(path.parent)
            disk.replace_file(path, content)
            self._touched(path)
        for path in faults.strays:
            disk.rename(path, path.with_name(f"lost.{path.name}"))
            self._touched(path.parent)
        for path in faults.levels:
            if levels.unlist(path):
                self._touched(path / "zarr.json")
        for path in faults.leftovers:
            _remove(path)
            self._changed.add(path.parent)
        self.done += _words(self._path, faults)

    def seal(self, run: Run, pairs: list[Rebuilt]) -> bool:
        """Make all durable, mark it so, and write the seal where the last one is not right.

        Whether any of that was needed.
        """
        seal, counts = run.notes.seal, run.counts
        is_right = seal is not None and (seal.saved, seal.failed) == (counts.saved, counts.failed)
        if is_right and not self.done:
            return False
        if seal is None:
            for path in (*self._path.rglob("zarr.json"), *self._path.rglob("METADATA.ome.xml")):
                self._touched(path)
        volatile = [record for record in acknowledged(run) if not run.is_durable(record)]
        for path in slots_by_shard(volatile, pairs):
            self._touched(path)
        durability = Durability(self._journal.files, lambda: self._journal.count)
        for path in self._changed:
            durability.changed(path)
        durability.sync()
        if volatile:
            mark = Record(durability.durable, time.time_ns(), kind=Kind.DURABLE)
            self._journal.acknowledge(mark)
        if not is_right:
            Outcomes.of(run, self._journal).seal(
                complete=seal is not None and seal.complete,
                expected_frames=seal.expected_frames if seal else None,
                note=seal.note if seal else NO_SEAL,
            )
            what = "it was not sealed: sealed" if seal is None else "its seal was old: sealed again"
            self.done.append(what)
        durability.sync()
        return True

    def _describe_arrays(self, pairs: list[Rebuilt]) -> None:
        """Write the zarr.json of arrays that cannot be read, or are too short for their planes."""
        for rebuilt in (rebuilt for rebuilt in pairs if rebuilt.known):
            extent = rebuilt.pair.extent
            for twin, array in enumerate(rebuilt.arrays):
                folder = array_dir(self._path, 2 * rebuilt.pair.number + twin)
                with contextlib.suppress(RunError):
                    found = PlaneArray.open(folder)
                    is_same = found.resized(folder, *extent).zarr_json() == array.zarr_json()
                    if is_same and found.holds(*(length - 1 for length in extent)):
                        continue
                disk.make_folders(folder)
                disk.replace_file(folder / "zarr.json", array.zarr_json())
                self._touched(folder / "zarr.json")
                self.done.append(
                    f"{folder.relative_to(self._path)}: its zarr.json was missing, damaged or "
                    "hid planes: written"
                )

    def _touched(self, path: Path) -> None:
        self._changed.update((path, path.parent))


def _book_lost(outcomes: Outcomes, plane: LostPlane) -> None:
    reason = f"found by recover: the plane {plane.reason}"
    if plane.record.kind == Kind.RAW:
        outcomes.fail_raw(plane.record.seq, reason)
    else:
        outcomes.answer(plane.record.seq, RefocusOutcome.FAILED, reason)


def _booked(lost: list[LostPlane]) -> Iterator[str]:
    alike: defaultdict[tuple[int, str], list[int]] = defaultdict(list)
    for plane in lost:
        alike[plane.record.kind, plane.reason].append(plane.record.seq)
    for (kind, reason), seqs in alike.items():
        what = counted(len(seqs), "raw plane" if kind == Kind.RAW else "refocused plane")
        each = "which" if len(seqs) == 1 else "each of which"
        yield f"{what} lost, {each} {reason}: booked FAILED: {frames(sorted(seqs))}"


def _seqs(run: Run) -> set[int]:
    """Every frame that anything on disk speaks of."""
    return {frame.seq for frame in run.frames()} | {r.seq for r in run.records(Kind.REFOCUS)}


def _superseded_planes(run: Run) -> int:
    """Planes that were acknowledged once, and whose last record says that they are not there."""
    there = {(record.kind, record.seq) for record in acknowledged(run)}
    once = {(r.kind, r.seq) for r in run.all_records.records if r.has_plane}
    return len(once - there)


def _words(run: Path, faults: Faults) -> Iterator[str]:
    yield from few([f"{i.path.relative_to(run)}: {i}: index rebuilt" for i in faults.indices])
    if faults.metadata:
        names = ", ".join(few([str(path.relative_to(run)) for path, _ in faults.metadata]))
        yield f"{names}: missing or not as the planes are: written"
    yield from few(
        [
            f"{path.relative_to(run)}: a plane that nobody vouches for: now lost.{path.name}"
            for path in faults.strays
        ]
    )
    yield from few(
        [f"{path.relative_to(run)}: nothing needs it: removed" for path in faults.leftovers]
    )
    for path in faults.levels:
        what = "smaller copies were listed and not there: unlisted; `refocus finish` makes them"
        yield f"{path.relative_to(run)}: {what}"


def _remove(path: Path) -> None:
    if path.is_dir():
        disk.remove_tree(path)
    elif path.exists():  # writing the file that it was to become has used it up
        disk.remove(path)
