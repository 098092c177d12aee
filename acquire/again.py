"""Planes that are on disk already, given to the engine once more while a run is open for writing.

`refocus fill` does it (acquire/fill.py), and a recorder for what it had to skip. Raw planes are
read back, held against their checksums, and offered to the same link and worker as live frames, a
few at a time, so memory stays bounded however long the run is; a live frame always goes first. The
oldest plane goes first: a channel that has no scaling yet gets it from its first plane that is not
flat, as live.

Given again is every saved plane whose last outcome is SKIPPED, LATE, LOST or FAILED, or that has
none. REJECTED is final for the generator that said so. Every outcome is a record that supersedes
the one before (docs/decisions/2026-11-20-late.md). Its latency is 0: nobody waited for it.
"""

import math
import time
from collections.abc import Callable, Iterator, Set

from acquire.engine_side import EngineSide
from acquire.intake import Intake
from acquire.items import Answer
from acquire.writing import Writing
from refocus.errors import RunError
from refocus.frame import Frame, RawOutcome, RefocusOutcome
from store.reader import FrameEntry, Run
from store.records import Kind, Record

POLL_S = 0.005
LAST_S = 1.0
"""When the rest is called off, planes in work get so long to be answered."""

Progress = Callable[[int, int], None]
"""Called with (planes answered, planes to answer)."""


def without_twin(run: Run, package_hash: str | None = None) -> set[int]:
    """Saved planes to refocus; with *package_hash* also those that another generator rejected."""
    saved = (r.seq for r in run.records(Kind.RAW) if r.outcome == RawOutcome.SAVED)
    return {seq for seq in saved if _is_open(run, run.record(seq, Kind.REFOCUS), package_hash)}


def _is_open(run: Run, record: Record | None, package_hash: str | None) -> bool:
    if record is None:
        return True
    if record.outcome == RefocusOutcome.REJECTED:
        by = run.notes.generators.get(record.generator)
        return package_hash is not None and (by is None or by.package_hash != package_hash)
    return record.outcome != RefocusOutcome.REFOCUSED


def refocus_again(
    run: Run,
    seqs: Set[int],
    intake: Intake,
    writing: Writing,
    engine: EngineSide,
    *,
    stopped: Callable[[], bool],
    limit_s: float = math.inf,
    progress: Progress = lambda _done, _total: None,
) -> None:
    """Give these planes of *run* to the *engine*; returns once each has an outcome on disk.

    Earlier where *stopped* says so, after *limit_s*, or where no worker is left: then planes not
    given to the engine keep the outcome that they had. Raises RunError, OSError where the run
    cannot be read.
    """
    deadline = time.monotonic() + limit_s
    offered = 0

    def go_on() -> bool:
        progress(offered - writing.unanswered, len(seqs))
        hopeless = bool(intake.no_engine) or engine.hopeless
        return not (stopped() or hopeless or time.monotonic() > deadline)

    for answer in _read(run, seqs):
        offered += 1
        seq = answer.seq if isinstance(answer, Answer) else answer.header.seq
        writing.expect_again(seq)
        if isinstance(answer, Answer):
            intake.answer(answer)
            continue
        while not intake.offer_again(answer):
            if not go_on():
                writing.forget(seq)
                break
            time.sleep(POLL_S)
        if not go_on():
            break
    while writing.unanswered and go_on():
        time.sleep(POLL_S)
    for seq in intake.withdraw():
        writing.forget(seq)
    last = time.monotonic() + LAST_S
    while writing.unanswered and time.monotonic() < last:
        time.sleep(POLL_S)
    progress(offered - writing.unanswered, len(seqs))


def _read(run: Run, seqs: Set[int]) -> Iterator[Frame | Answer]:
    """The frames of *seqs* in the order in which they came, or why one cannot be read."""
    for entry in run.frames():
        if entry.seq not in seqs:
            continue
        try:
            yield _frame(run, entry)
        except (RunError, OSError) as error:
            reason = f"its raw plane cannot be read back: {error}"
            yield Answer(entry.seq, RefocusOutcome.FAILED, reason)


def _frame(run: Run, entry: FrameEntry) -> Frame:
    pixels = run.raw(entry.seq)
    if entry.header is None or pixels is None:
        raise RunError("its header in the journal is damaged")
    return Frame(entry.header, pixels)
