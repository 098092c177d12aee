"""Reads a whole run back and says what of it can be trusted. Read-only.

Every acknowledged plane is read and held against the checksum in its record, every record against
its own; and what other programs go by (shard indices, shapes, metadata) against the journal. What
`refocus recover` would mend, it says here.

Whether the folder is a valid OME-Zarr is left to yaozarrs, whose opinion is worth something because
nobody here wrote it; without it installed (a test dependency) the answer is "not known", never a
guess of our own.
"""

from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import msgspec

from refocus.errors import RunError
from refocus.frame import RawOutcome, RefocusOutcome
from refocus.status import Counts
from refocus.words import counted, few
from store.faults import Faults, find_faults
from store.journal import SealLine
from store.layout import journal_dir
from store.reader import FrameEntry, Run, State, is_unborn, open_run
from store.rebuild import rebuild
from store.records import Kind
from store.tails import torn_tails
from store.verify import Progress, lost_planes, told


class RawCheck(msgspec.Struct, frozen=True, kw_only=True):
    """Raw planes; acknowledged = readable + damaged."""

    acknowledged: int
    readable: int
    damaged: int


class Report(msgspec.Struct, frozen=True, kw_only=True):
    """What `check` found."""

    state: State
    raw: RawCheck
    counts: Counts
    generator: str | None
    """The generators that made the refocused planes, "name version (start of package hash)"."""
    valid_ome_zarr: bool | None
    """None where it is not known: no plane yet, or no validator installed."""
    findings: tuple[str, ...]
    """What is wrong, in words; empty where nothing is."""
    remarks: tuple[str, ...]
    """What is worth knowing and is not wrong."""

    def as_json(self) -> dict[str, Any]:
        """The object that `refocus check --json` prints."""
        counts = self.counts
        return {
            "state": str(self.state),
            "raw": {**msgspec.to_builtins(self.raw), "failed": counts.failed},
            "refocus": {
                "refocused": counts.refocused,
                "skipped": counts.skipped,
                "late": counts.late,
                "lost": counts.lost,
                "rejected": counts.rejected,
                "failed": counts.refocus_failed,
            },
            "generator": self.generator,
            "valid_ome_zarr": self.valid_ome_zarr,
            "findings": list(self.findings),
            "notes": list(self.remarks),
        }


def check(path: Path, progress: Progress = lambda _done, _total: None) -> Report:
    """Read everything back. Raises RunError where *path* is no run, or its journal no journal."""
    run = open_run(path)
    counts = run.counts
    try:
        lost = list(lost_planes(run, progress=progress))
        # A writer that is at work is about to bring both to where the journal is.
        faults = None if run.state == State.LIVE else find_faults(run, rebuild(run))
    except OSError as error:
        raise RunError(f"{path}: cannot be read ({error})") from error
    raw = sum(plane.record.kind == Kind.RAW for plane in lost)
    valid, complaint = _validate(path) if counts.saved else (None, "")
    findings = [*_findings(run), *(f"{what}; run `refocus recover`" for what in told(lost))]
    remarks = []
    if faults is not None:
        findings += _wrong(run, faults)
        remarks += [*_remarks(run, faults), *_superfluous(run, faults)]
    if complaint:
        findings.append(f"not a valid OME-Zarr: {complaint}")
    return Report(
        state=run.state,
        raw=RawCheck(acknowledged=counts.saved, readable=counts.saved - raw, damaged=raw),
        counts=counts,
        generator=_generators(run),
        valid_ome_zarr=valid,
        findings=tuple(findings),
        remarks=tuple(remarks),
    )


def _wrong(run: Run, faults: Faults) -> Iterator[str]:
    """What other programs do not see, or see wrong."""
    for index in faults.indices:
        if index.hidden or not index.unknown:
            yield f"{index.path.relative_to(run.path)}: {index}; run `refocus recover`"
    for path in faults.strays:
        yield f"{path.relative_to(run.path)}: a plane that nobody vouches for"
    for path in faults.levels:
        name = path.relative_to(run.path)
        yield f"{name}: smaller copies are listed and not there; run `refocus finish`"
    if run.notes.seal is None:  # shapes run ahead until then, and names and steps lag behind
        return
    for path, _ in faults.metadata:
        name = path.relative_to(run.path)
        yield f"{name}: missing, or not as it should be; run `refocus recover`"


def _superfluous(run: Run, faults: Faults) -> Iterator[str]:
    """What is there and nothing needs."""
    for index in faults.indices:
        if index.unknown and not index.hidden:
            yield f"{index.path.relative_to(run.path)}: {index}"
    for path in faults.leftovers:
        yield f"{path.relative_to(run.path)}: nothing needs it"


def _findings(run: Run) -> Iterator[str]:
    """What is wrong beside the planes."""
    counts, seal = run.counts, run.notes.seal
    if run.state == State.INCOMPLETE:
        yield "the run is incomplete: " + (
            _shortfall(counts, seal) if seal else "its writer ended without closing it"
        )
    if seal and counts.unanswered > 0:  # a writer that was killed could not book them
        yield f"{_without(counts.unanswered)} refocus outcome, though the run was closed"
    if counts.failed:
        yield f"{counted(counts.failed, 'raw frame')} not saved: {_reasons(run)}"
    if run.damaged_records:
        numbers = ", ".join(few([str(number) for number in run.damaged_records]))
        yield f"{counted(len(run.damaged_records), 'journal record')} damaged: number {numbers}"
    if run.notes.unreadable:
        yield f"{counted(run.notes.unreadable, 'line')} of the journal cannot be read"
    unknown = sum(frame.header is None for frame in run.frames() if _saved(frame))
    if unknown:
        yield f"{_without(unknown, 'saved frame')} readable line with header and tags"


def _remarks(run: Run, faults: Faults) -> Iterator[str]:
    """What is worth knowing of a killed run, and is no loss."""
    if not is_unborn(journal_dir(run.path)):
        yield from (tail.said for tail in torn_tails(journal_dir(run.path)))
    unacknowledged = sum(frame.raw is None for frame in run.frames())
    if unacknowledged:
        yield f"{counted(unacknowledged, 'frame')} came too late to be acknowledged"
    if run.notes.seal is None and run.counts.unanswered > 0:
        yield f"{_without(run.counts.unanswered)} refocus outcome"
    if run.notes.seal is not None or not run.counts.received:
        return
    if faults.metadata:
        yield (
            "shapes may run ahead of the planes, and metadata are not final: "
            + ", ".join(few([str(path.relative_to(run.path)) for path, _ in faults.metadata]))
        )
    yield "`refocus recover` cuts and writes them, and closes it as far as it was acknowledged"


def _shortfall(counts: Counts, seal: SealLine) -> str:
    wanted = "an unknown number" if seal.expected_frames is None else str(seal.expected_frames)
    note = f" ({seal.note})" if seal.note else ""
    return f"{counted(counts.saved, 'raw plane')} saved of {wanted}{note}"


def _without(frames: int, thing: str = "frame") -> str:
    return f"{counted(frames, thing)} {'has' if frames == 1 else 'have'} no"


def _saved(frame: FrameEntry) -> bool:
    return frame.raw is not None and frame.raw.outcome == RawOutcome.SAVED


def _reasons(run: Run) -> str:
    failed = (r for r in run.records(Kind.RAW) if r.outcome == RawOutcome.FAILED)
    counted = Counter(run.reason(record) or "no reason could be written" for record in failed)
    return "; ".join(f"{count} x {reason}" for reason, count in counted.most_common(3))


def _generators(run: Run) -> str | None:
    used = {r.generator for r in run.records(Kind.REFOCUS) if r.outcome == RefocusOutcome.REFOCUSED}
    known = [run.notes.generators[number] for number in sorted(used & run.notes.generators.keys())]
    names = dict.fromkeys(f"{g.name} {g.version} ({g.package_hash[:12]})" for g in known)
    return ", ".join(names) or None


def _validate(path: Path) -> tuple[bool | None, str]:
    try:
        import yaozarrs
    except ImportError:
        return None, ""
    try:
        yaozarrs.validate_zarr_store(str(path))
    except (ValueError, OSError, KeyError) as error:
        return False, " ".join(str(error).split())
    except ImportError:  # yaozarrs without its extra "io"
        return None, ""
    return True, ""
