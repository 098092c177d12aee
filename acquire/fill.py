"""Refocuses what has no twin yet in a run that was closed or recovered: `refocus fill`.

Which planes, and how they get to the engine, says acquire/again.py. The run decides what becomes of
them, not the settings of the day: its own generator by package hash, its scalings bit for bit, the
modality of its channels. Where the user names another generator, that one makes the missing twins,
and planes that the run's own rejected are given to it, too.

Planes that come back without an answer (their worker died) are given again as long as that makes
them fewer, so one that kills every worker ends the call instead of repeating it for ever.

`fill` can be stopped or killed at any moment: what it refocused is acknowledged plane by plane, and
the next call goes on with what is left. Where nothing is left it writes nothing.
"""

import contextlib
import logging
import math
import threading
import time
from collections import Counter
from collections.abc import Set
from dataclasses import dataclass
from pathlib import Path

import msgspec
import numpy as np

from acquire.again import Progress, refocus_again, without_twin
from acquire.engine_side import EngineSide, check_address, start_engine
from acquire.intake import Intake
from acquire.own_generator import own_package, settings_of
from acquire.trouble import Trouble
from acquire.writing import Writing
from engine import model_store, package
from engine.package import Package
from engine.scaling import Scaling
from refocus.errors import EngineError, LockedError, SettingsError
from refocus.frame import RefocusOutcome
from refocus.settings import ChannelSettings, Settings
from refocus.words import counted
from store.guard import DiskGuard
from store.reader import Run, State, open_run
from store.records import Kind, Record
from store.writer import RunWriter

log = logging.getLogger(__name__)

UNANSWERED = (RefocusOutcome.SKIPPED, RefocusOutcome.LATE, RefocusOutcome.LOST)
NOT_TRIED = "not tried yet"
GUEST_S = 60.0
"""How long a fill without a GPU of its own waits for a worker from another computer."""
POLL_S = 0.2
NEVER_CLOSED = "was never closed; run `refocus recover`"


@dataclass(frozen=True, slots=True)
class Filled:
    """What became of the planes that had no twin."""

    planes: int
    filled: int
    rejected: int
    failed: int
    left: int
    """Without an answer: the engine is gone, or the call was ended before."""
    reasons: dict[str, int]
    """Why, of those rejected, failed and left; what an earlier call said of a plane is not."""
    generator: str
    """Name and version; empty where there was nothing to do."""
    full: str
    """Why the disk guard ended it; empty where it did not."""
    trouble: list[str]


def fill(
    path: Path,
    settings: Settings,
    *,
    generator: str | None = None,
    stop: threading.Event | None = None,
    limit_s: float = math.inf,
    progress: Progress = lambda _done, _total: None,
) -> Filled:
    """Refocus what has no twin in the run at *path*, until *stop* is set or *limit_s* are over.

    *settings* say what runs the generator (engine, threads, timeouts, reserve); the rest is the
    run's own, except for *generator*, a name or folder. Raises RunError where there is no run or
    it was never sealed, LockedError where it is being written, PackageError where the generator
    cannot be had, SettingsError where the settings want no engine, DiskError where the planes do
    not fit.
    """
    run = open_run(path)
    if run.state is State.LIVE:
        raise LockedError(f"{path}: this run is being written; fill it when it is closed")
    chosen = package.load(model_store.find(generator)) if generator is not None else None
    todo = without_twin(run, chosen.hash if chosen else None)
    if not todo:
        trouble = [] if run.notes.seal else [f"{path}: {NEVER_CLOSED}"]
        return _sum_up(run, run, set(), None, "", trouble)
    if settings.engine.runtime == "none":
        raise SettingsError(
            "fill: [engine] runtime = none refocuses nothing; say --engine auto, or change it"
        )
    check_address(settings)
    chosen, tries_rejected = chosen or own_package(run), chosen is not None
    filling = _Filling(path, chosen, settings)
    filling.guard.require(_plane_bytes(run, todo), f"the twins of {counted(len(todo), 'plane')}")
    return filling.run(tries_rejected, stop or threading.Event(), limit_s, progress)


def _channels(run: Run) -> dict[str, ChannelSettings]:
    """What was said of the run's channels; a newer Refocus may have said more."""
    return {
        name: ChannelSettings(modality=body.get("modality"))
        for name, body in settings_of(run, "channels").items()
        if isinstance(body, dict)
    }


class _Filling:
    """One run while it is filled: writer, link and worker behind an intake without a hook."""

    def __init__(self, path: Path, chosen: Package, settings: Settings) -> None:
        self._path = path
        self._package = chosen
        self._settings = settings
        self.guard = DiskGuard(path, settings.store.reserve_mib * 2**20)
        self._trouble = Trouble()
        self._full = ""

    def run(
        self, tries_rejected: bool, stop: threading.Event, limit_s: float, progress: Progress
    ) -> Filled:
        deadline = time.monotonic() + limit_s
        with contextlib.ExitStack() as closing:
            writer = RunWriter.reopen(self._path)
            closing.callback(writer.reseal)
            run = found = open_run(self._path)  # again: this time nobody else writes
            todo = without_twin(run, self._package.hash if tries_rejected else None)
            intake, writing = self._start_writing(run, writer, closing)
            engine = self._start_engine(run, todo, intake, closing)
            left = todo
            while engine is not None and self._has_worker(engine, stop):
                refocus_again(
                    run,
                    left,
                    intake,
                    writing,
                    engine,
                    stopped=lambda: stop.is_set() or bool(self._full),
                    limit_s=deadline - time.monotonic(),
                    progress=lambda done, total: progress(len(todo) - total + done, len(todo)),
                )
                run, before = open_run(self._path), left
                left = {seq for seq in before if _is_unanswered(run.record(seq, Kind.REFOCUS))}
                halted = stop.is_set() or self._full or time.monotonic() > deadline
                if not left or len(left) == len(before) or halted or engine.hopeless:
                    break
        run, trouble = open_run(self._path), self._trouble.lines
        return _sum_up(found, run, todo, self._package, self._full, trouble)

    def _start_writing(
        self, run: Run, writer: RunWriter, closing: contextlib.ExitStack
    ) -> tuple[Intake, Writing]:
        """Queues and writer's thread. No image comes in: the intake needs no thread of its own."""
        intake = Intake(
            run.notes.info.run_id if run.notes.info else "",
            raw_queue_bytes=0,
            raw_stall_ms=0,
            slot_frames=self._settings.acquire.refocus_slot_frames,
            on_trouble=self._trouble.tell,
        )
        writing = Writing(
            writer,
            intake,
            self.guard,
            on_raw_saved=lambda _: None,
            on_raw_failure=self._trouble.tell,
            on_full=self._disk_full,
            on_trouble=self._trouble.tell,
        )
        closing.callback(writing.join)
        closing.callback(intake.close)
        return intake, writing

    def _start_engine(
        self, run: Run, todo: Set[int], intake: Intake, closing: contextlib.ExitStack
    ) -> EngineSide | None:
        """Link and worker with the run's own scalings; None, and told, where they cannot start."""
        wanted = msgspec.structs.replace(self._settings.engine, generator=str(self._package.folder))
        settings = msgspec.structs.replace(self._settings, channels=_channels(run), engine=wanted)
        noted = run.notes.scalings.items()
        try:
            engine = start_engine(
                settings,
                intake,
                self._path,
                _first_shape(run, todo),
                self._trouble.tell,
                scalings={name: Scaling(line.offset, line.scale) for name, line in noted},
                filling=True,
            )
        except (EngineError, OSError) as error:
            self._trouble.tell(f"nothing can be refocused: {error}")
            engine = None
        if engine is not None:
            closing.callback(engine.close)
        return engine

    def _has_worker(self, engine: EngineSide, stop: threading.Event) -> bool:
        """Where no worker is started here, one from another computer has to come."""
        if self._settings.engine.devices or engine.link.workers:
            return True
        address = self._settings.link.address
        log.warning("waiting %g s for a worker at %s", GUEST_S, address)
        deadline = time.monotonic() + GUEST_S
        while not engine.link.wait_ready(POLL_S):
            if stop.is_set():
                return False
            if time.monotonic() > deadline:
                self._trouble.tell(
                    f"no worker came to {address} within {GUEST_S:g} s: start `refocus worker` on "
                    "the computer with the GPU, or name devices in [engine]"
                )
                return False
        return True

    def _disk_full(self, reason: str) -> None:
        self._full = self._full or reason


def _is_unanswered(record: Record | None) -> bool:
    return record is None or record.outcome in UNANSWERED


def _plane_bytes(run: Run, seqs: Set[int]) -> int:
    """Bytes that the twins of these planes take."""
    planes = Counter(r.image // 2 for r in run.records(Kind.RAW) if r.seq in seqs)
    pairs = run.notes.pairs
    return sum(
        count * math.prod(pairs[pair].shape) * np.dtype(pairs[pair].dtype).itemsize
        for pair, count in planes.items()
    )


def _first_shape(run: Run, seqs: Set[int]) -> tuple[int, int] | None:
    first = next((r for r in run.records(Kind.RAW) if r.seq in seqs), None)
    return run.notes.pairs[first.image // 2].shape if first else None


def _sum_up(
    before: Run, run: Run, seqs: Set[int], chosen: Package | None, full: str, trouble: list[str]
) -> Filled:
    """What became of *seqs* between *before* and *run*, two states of the same run."""
    outcomes: Counter[RefocusOutcome] = Counter()
    reasons: Counter[str] = Counter()
    for seq in seqs:
        record = run.record(seq, Kind.REFOCUS)
        if record is None or record == before.record(seq, Kind.REFOCUS):
            outcomes[RefocusOutcome.SKIPPED] += 1
            reasons[NOT_TRIED] += 1
            continue
        outcome = RefocusOutcome(record.outcome)
        outcomes[outcome] += 1
        if outcome is not RefocusOutcome.REFOCUSED:
            reasons[run.reason(record)] += 1
    manifest = chosen.manifest if chosen else None
    return Filled(
        planes=len(seqs),
        filled=outcomes[RefocusOutcome.REFOCUSED],
        rejected=outcomes[RefocusOutcome.REJECTED],
        failed=outcomes[RefocusOutcome.FAILED],
        left=sum(outcomes[outcome] for outcome in UNANSWERED),
        reasons=dict(reasons),
        generator=f"{manifest.name} {manifest.version}" if manifest else "",
        full=full,
        trouble=trouble,
    )
