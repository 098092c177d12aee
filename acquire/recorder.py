"""Records a pycromanager acquisition: raw to disk, refocused twins beside it.

    with Recorder(settings, out=DIR) as recorder:
        with Acquisition(**recorder.hooks()) as acq:
            acq.acquire(events)

Entering makes the run on disk, starts the writer's thread, the link and the worker. Leaving waits a
little for the frames that the engine still has, gives it for a while those that it was too busy for
(acquire/again.py), stops the worker, writes out every raw frame, seals the run, and raises RunError
if a frame was lost. Whatever happens to the engine, raw frames land: without a usable model package
or runtime the run is recorded raw only, and `trouble` says why. Where the settings want the current
generator, one that is chosen meanwhile takes over (acquire/succession.py).

A run that does not fit onto the disk is refused on entering (DiskError), or stopped at its first
frame where nobody knew the size before. Whatever else fills the disk meanwhile: at the reserve the
acquisition is stopped, what came is written, and leaving raises DiskError.

Threads: Micro-Manager's own (the hooks), intake, writer, link, succession, a supervisor a worker.
"""

import contextlib
import logging
import math
import secrets
import time
from collections.abc import Callable, Iterable, Mapping
from importlib.metadata import version
from pathlib import Path
from types import TracebackType
from typing import Any

import msgspec

from acquire.again import refocus_again, without_twin
from acquire.engine_side import EngineSide, check_address, start_engine
from acquire.forecast import Room, forecast
from acquire.header import Hardware
from acquire.hook import Hook
from acquire.intake import Intake
from acquire.interrupts import interrupts_deferred
from acquire.sources.hardware import hardware_reader
from acquire.trouble import Trouble
from acquire.writing import Writing
from refocus import status
from refocus.errors import DiskError, EngineError, PackageError, RunError
from refocus.settings import Settings
from store.guard import DiskGuard
from store.layout import RunInfo
from store.reader import open_run
from store.writer import RunWriter

log = logging.getLogger(__name__)

INTERRUPTED_DRAIN_S = 0.5
"""How long an interrupted run waits for the engine: the user wants to leave."""
POLL_S = 0.02
USUAL_PIXEL_BYTES = 2
"""Of a camera, while no frame has come."""


class Recorder:
    """One run: hooks for pycromanager's Acquisition, and everything behind them."""

    def __init__(
        self,
        settings: Settings | None = None,
        *,
        out: Path | str,
        micromanager_saves: bool = False,
        expected_shape: tuple[int, int] | None = None,
        events: Iterable[Mapping[str, Any]] | None = None,
        read_hardware: Callable[[Mapping[str, Any]], Hardware] | None = None,
    ) -> None:
        """*out*: folder of the run, which must not exist yet.

        *events*: those that will be acquired, where they are known before: they say how large the
        run gets, and in which order its planes come.
        *micromanager_saves*: hand every frame on to Micro-Manager's own storage as well.
        *expected_shape* (y, x): the engine gets ready for it before the first frame.
        *read_hardware*: replaces the reading of Micro-Manager's core for an event (for other
        sources).
        """
        self.settings = settings or Settings()
        self.out = Path(out)
        self._trouble = Trouble()
        self._complain = self._trouble.tell
        self._room = Room(
            DiskGuard(self.out, self.settings.store.reserve_mib * 2**20),
            forecast(events) if events is not None else None,
            refocused=self.settings.engine.runtime != "none",
        )
        self._size_known = False
        self._full = ""
        self._expected_shape = expected_shape
        self._micromanager_saves = micromanager_saves
        self._run_id = f"{time.strftime('%Y%m%d-%H%M%S')}-{secrets.token_hex(3)}"
        self._intake = Intake(
            self._run_id,
            raw_queue_bytes=self.settings.acquire.raw_queue_mib * 2**20,
            raw_stall_ms=self.settings.acquire.raw_stall_ms,
            slot_frames=self.settings.acquire.refocus_slot_frames,
            on_trouble=self._complain,
        )
        self._hook = Hook(
            self._intake,
            read_hardware=read_hardware or hardware_reader(),
            micromanager_saves=micromanager_saves,
            on_trouble=self._complain,
        )
        self.expected = self._hook.expected
        self.stopping = self._hook.stopping
        """Set it, from any thread, to end the acquisition after the events under way."""
        self.started = False
        """The run exists on disk: from here on there is a status, whatever happens."""
        self._engine: EngineSide | None = None
        self.interrupted = False
        """The run was left by an exception, or told to stop, before its acquisition was over."""
        self._cut_short = ""
        """Why the disk guard ended the acquisition, where it did."""
        self._state = "live"

    def hooks(self) -> dict[str, Callable[..., Any]]:
        """Keyword arguments for pycromanager's Acquisition."""
        return {
            "image_process_fn": self._hook.image,
            "event_generation_hook_fn": self._hook.event,
            "post_hardware_hook_fn": self._hook.hardware,
        }

    @property
    def hook(self) -> Callable[..., Any]:
        """image_process_fn alone. The run then cannot know how many frames were submitted."""
        return self._hook.image

    @property
    def slot_waiting(self) -> int:
        """Frames that wait for the engine now."""
        return self._intake.slot_waiting

    @property
    def worker_pid(self) -> int | None:
        """Process id of a worker on this computer, None while there is none."""
        pids = self._engine.pids if self._engine else []
        return pids[0] if pids else None

    def wait_for_engine(self, timeout_s: float) -> bool:
        """True once a worker is ready; False where there is none after *timeout_s*."""
        deadline = time.monotonic() + timeout_s
        while time.monotonic() < deadline and self._engine and not self.stopping.is_set():
            if self._engine.link.wait_ready(POLL_S):
                return True
            if self._engine.hopeless:
                return False
        return False

    def status(self) -> status.Status:
        """What the run is doing now; after leaving, what became of it."""
        if not self.started:
            raise RunError(f"run {self.out}: not started; enter the recorder first")
        writing, engine = self._writing, self._engine
        span_s = (writing.last_frame_ns - writing.first_frame_ns) / 1e9
        return status.Status(
            run=str(self.out),
            state=self._state,
            received=self._intake.received,
            counts=self._run.counts(),
            expected=self.expected.frames(self._intake.received),
            fps=(writing.frames - 1) / span_s if span_s > 0 else 0.0,
            latency_ms=writing.latency(),
            raw_queue_mib=self._intake.waiting_bytes / 2**20,
            raw_queue_high_mib=self._intake.high_water_bytes / 2**20,
            workers=engine.link.workers if engine else 0,
            generator=engine.package.manifest.name if engine and engine.package else "",
            runtime=engine.link.runtime if engine else "",
            trouble=self.trouble,
        )

    @property
    def trouble(self) -> list[str]:
        """What went wrong so far, one line each, however often it did."""
        return self._trouble.lines

    def __enter__(self) -> "Recorder":
        if self.started:
            raise RunError(f"run {self.out}: a recorder records one run; make another")
        check_address(self.settings)
        shape, expected = self._expected_shape, self._room.forecast
        self._room.require(math.prod(shape) * USUAL_PIXEL_BYTES if shape else None)
        stack_planes = expected.stack_planes if expected else None
        info = RunInfo(
            run_id=self._run_id,
            created_wall_ns=time.time_ns(),
            version=version("refocus"),
            settings=msgspec.to_builtins(self.settings),
        )
        with contextlib.ExitStack() as closing:
            # Inside the stack: a Ctrl-C that came meanwhile is raised where the run still closes.
            with interrupts_deferred():
                self._run = RunWriter.create(self.out, info, stack_planes=stack_planes)
                closing.callback(self._seal)
                self._writing = Writing(
                    self._run,
                    self._intake,
                    self._room.guard,
                    on_raw_saved=self._raw_saved,
                    on_raw_failure=self._raw_failed,
                    on_full=self._disk_full,
                    on_trouble=self._complain,
                )
                closing.callback(self._writing.join)
                closing.callback(self._intake.close)
                self._intake.start()
                closing.callback(self._end_branch)
                self.started = True
                self._start_engine()
            self._closing = closing.pop_all()
        return self

    def _start_engine(self) -> None:
        try:
            self._engine = start_engine(
                self.settings, self._intake, self.out, self._expected_shape, self._complain
            )
        except (PackageError, EngineError, OSError) as error:
            self._intake.no_engine = str(error)
            self._complain(f"recording raw only: {error}")
            return
        if self._engine is None:
            self._intake.no_engine = "refocusing is switched off ([engine] runtime = none)"

    def _end_branch(self) -> None:
        """Every image is handed on first, so that the link answers for all that it was given."""
        try:
            self._intake.end()
        finally:
            if self._engine is not None:
                self._engine.close()

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self.interrupted = kind is not None or self.stopping.is_set()
        self._cut_short = self._full  # later there is nothing left to cut
        self._hook.closed = True  # an acquisition that still runs has nobody to record it any more
        with interrupts_deferred() as pressed:

            def hurry() -> bool:
                return pressed.is_set() or (self.stopping.is_set() and not self.interrupted)

            try:
                self._drain(hurry)
                self._fill(hurry)
            finally:
                self.stopping.set()
                self._closing.close()
        if kind is None and self._cut_short:
            raise DiskError(f"run {self.out}: stopped: {self._cut_short}")
        if kind is None and (finding := self._finding()):
            raise RunError(f"run {self.out}: {finding}")

    def _drain(self, hurry: Callable[[], bool]) -> None:
        """Waits a while for every frame to have its answer, unless there is nobody to give one."""
        limit_s = INTERRUPTED_DRAIN_S if self.interrupted else self.settings.acquire.drain_s
        deadline = time.monotonic() + limit_s
        while self._engine is not None and time.monotonic() < deadline and not hurry():
            done = self._writing.unanswered == 0 and self._intake.waiting_bytes == 0
            if done or self._engine.hopeless:
                return
            time.sleep(POLL_S)

    def _fill(self, hurry: Callable[[], bool]) -> None:
        """Refocuses what was skipped, with an engine that has answered for all it was given."""
        limit_s, engine = self.settings.acquire.fill_at_end_s, self._engine
        if self.interrupted or engine is None or not limit_s or self._writing.unanswered:
            return
        try:
            run = open_run(self.out)
            refocus_again(
                run,
                without_twin(run),
                self._intake,
                self._writing,
                engine,
                stopped=hurry,
                limit_s=limit_s,
            )
        except (RunError, OSError) as error:
            self._complain(f"what was skipped stays so, `refocus fill` tries again: {error}")

    def _seal(self) -> None:
        """Last step, with all threads ended."""
        certain = self.expected.submitted is not None or not self.interrupted
        lost = bool(self._cut_short or self._finding() or self.expected.missing)
        complete = certain and not lost
        note = "; ".join(self.trouble)
        self._run.close(
            complete=complete,
            expected_frames=self.expected.frames(self._intake.received),
            note=note,
        )
        self._state = (
            ("complete" if complete else "incomplete") if self._writing.frames else "empty"
        )

    def _finding(self) -> str:
        """What was lost, in words, or nothing."""
        return self.expected.finding(
            exposures=self._intake.exposures,
            received=self._intake.received,
            failed=self._run.counts().failed,
            interrupted=self.interrupted,
        )

    def _raw_saved(self, plane_bytes: int) -> None:
        """Writer's thread. With the first one it is known how large the others will be."""
        if self._size_known:
            return
        self._size_known = True
        try:
            self._room.require(plane_bytes)
        except DiskError as error:
            self._disk_full(str(error))

    def _disk_full(self, reason: str) -> None:
        """Writer's thread. Also where Micro-Manager saves: its storage may be on the same disk."""
        if not self._full:
            self._full = reason
            self._complain(f"nothing more is begun: {reason}")
        self.stopping.set()

    def _raw_failed(self, reason: str) -> None:
        self._complain(f"a raw frame could not be saved: {reason}")
        if not self._micromanager_saves:
            self.stopping.set()  # going on would only expose the sample for nothing
