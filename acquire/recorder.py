"""Records a pycromanager acquisition: raw to disk, refocused twins beside it.

    with Recorder(settings, out=DIR) as recorder:
        with Acquisition(**recorder.hooks()) as acq:
            acq.acquire(events)

Entering makes the run on disk, starts the writer's thread, the link and the worker. Leaving waits a
little for the frames that the engine still has, stops the worker, writes out every raw frame, seals
the run, and raises RunError if a frame was lost. Whatever happens to the engine, raw frames land:
without a usable model package or runtime the run is recorded raw only, and `trouble` says why.

Threads: Micro-Manager's own (the hooks), intake, writer, link, supervisor.
"""

import logging
import secrets
import threading
import time
from collections.abc import Callable
from importlib.metadata import version
from pathlib import Path
from types import TracebackType
from typing import Any

import msgspec

from acquire.engine_side import EngineSide, start_engine
from acquire.header import Hardware
from acquire.hook import Hook
from acquire.intake import Intake
from acquire.sources.hardware import hardware_reader
from acquire.writing import Writing
from refocus import status
from refocus.errors import PackageError, RunError
from refocus.settings import Settings
from store.layout import RunInfo
from store.writer import RunWriter

log = logging.getLogger(__name__)

INTERRUPTED_DRAIN_S = 0.5
"""How long an interrupted run waits for the engine: the user wants to leave."""
POLL_S = 0.02


class Recorder:
    """One run: hooks for pycromanager's Acquisition, and everything behind them."""

    def __init__(
        self,
        settings: Settings | None = None,
        *,
        out: Path,
        micromanager_saves: bool = False,
        expected_shape: tuple[int, int] | None = None,
        read_hardware: Callable[[], Hardware] | None = None,
    ) -> None:
        """*out*: folder of the run, which must not exist yet.

        *micromanager_saves*: hand every frame on to Micro-Manager's own storage as well.
        *expected_shape* (y, x): the engine gets ready for it before the first frame.
        *read_hardware*: replaces the reading of Micro-Manager's core (for other sources).
        """
        self.settings = settings or Settings()
        self.out = out
        self.trouble: list[str] = []
        """What went wrong so far, one line each; the same line only once."""
        self._lock = threading.Lock()
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
        self.stopping = self._hook.stopping
        """Set it, from any thread, to end the acquisition after the events under way."""
        self.started = False
        """The run exists on disk: from here on there is a status, whatever happens."""
        self._engine: EngineSide | None = None
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
        """Process id of the worker, None while there is none."""
        return self._engine.supervisor.pid if self._engine else None

    def wait_for_engine(self, timeout_s: float) -> bool:
        """True once a worker is ready; False where there is none after *timeout_s*."""
        deadline = time.monotonic() + timeout_s
        while time.monotonic() < deadline and self._engine and not self.stopping.is_set():
            if self._engine.link.wait_ready(POLL_S):
                return True
            if self._engine.supervisor.gave_up.is_set():
                return False
        return False

    def status(self) -> status.Status:
        """What the run is doing now; after leaving, what became of it."""
        counts = self._run.counts()
        writing = self._writing
        span_s = (writing.last_frame_ns - writing.first_frame_ns) / 1e9
        return status.Status(
            run=str(self.out),
            state=self._state,
            received=self._intake.received,
            counts=counts,
            expected=self._expected(),
            fps=(self._intake.received - 1) / span_s if span_s > 0 else 0.0,
            latency_ms=writing.latency(),
            raw_queue_mib=self._intake.waiting_bytes / 2**20,
            raw_queue_high_mib=self._intake.high_water_bytes / 2**20,
            workers=self._engine.link.workers if self._engine else 0,
            generator=self._engine.package.manifest.name if self._engine else "",
            trouble=list(self.trouble),
        )

    def __enter__(self) -> "Recorder":
        info = RunInfo(
            run_id=self._run_id,
            created_wall_ns=time.time_ns(),
            version=version("refocus"),
            settings=msgspec.to_builtins(self.settings),
        )
        self._run = RunWriter.create(self.out, info)
        self._writing = Writing(self._run, self._intake, self._raw_failed, self._complain)
        self.started = True
        self._intake.start()
        try:
            self._engine = start_engine(
                self.settings, self._intake, self.out, self._expected_shape, self._complain
            )
        except PackageError as error:
            self._intake.no_engine = f"no generator: {error}"
            self._complain(f"recording raw only: {error}")
        except BaseException:
            self._intake.end()
            self._intake.close()
            self._writing.join()
            self._seal(complete=False)
            raise
        if self._engine is None and not self._intake.no_engine:
            self._intake.no_engine = "refocusing is switched off ([engine] runtime = none)"
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        interrupted = kind is not None or self._hook.stopping.is_set()
        if self._engine is not None:
            drain_s = INTERRUPTED_DRAIN_S if interrupted else self.settings.acquire.drain_s
            self._drain(self._engine, drain_s)
        self._intake.end()
        if self._engine is not None:
            self._engine.close()
        self._intake.close()
        self._writing.join()
        finding = self._finding()
        self._seal(complete=not finding and self._missing() == 0)
        if finding and kind is None:
            raise RunError(f"run {self.out}: {finding}")

    def _drain(self, engine: EngineSide, limit_s: float) -> None:
        """Waits until every frame has an answer, no worker is left to give one, or *limit_s*."""
        deadline = time.monotonic() + limit_s
        while time.monotonic() < deadline and not engine.supervisor.gave_up.is_set():
            if self._writing.unanswered == 0 and self._intake.waiting_bytes == 0:
                return
            time.sleep(POLL_S)

    def _finding(self) -> str:
        """What was lost, in words, or nothing."""
        submitted, exposures = self._hook.events, self._intake.exposures
        received, failed = self._intake.received, self._run.counts().failed
        findings = []
        if failed:
            findings.append(f"{failed} of {received} frames could not be saved")
        if self._missing() and not self.stopping.is_set():
            findings.append(
                f"{submitted} events were submitted to Micro-Manager, {exposures} images came; "
                "Micro-Manager's own messages name the device or preset at fault"
            )
        if not received and not findings and not self.stopping.is_set():
            findings.append("not one frame came through the hook")
        if submitted is None and received:
            log.info("only recorder.hook is in use: nothing counts what was submitted")
        return "; ".join(findings)

    def _seal(self, *, complete: bool) -> None:
        self._run.close(
            complete=complete, expected_frames=self._expected(), note="; ".join(self.trouble)
        )
        self._state = (
            ("complete" if complete else "incomplete") if self._intake.received else "empty"
        )

    def _missing(self) -> int:
        """Images that were submitted and never came."""
        return max(0, (self._hook.events or 0) - self._intake.exposures)

    def _expected(self) -> int | None:
        """Frames that should be in the run: a colour image is three, what is missing is one."""
        if self._hook.events is None:
            return None
        return self._intake.received + self._missing()

    def _raw_failed(self, reason: str) -> None:
        self._complain(f"a raw frame could not be saved: {reason}")
        if not self._micromanager_saves:
            self._hook.stopping.set()  # going on would only expose the sample for nothing

    def _complain(self, line: str) -> None:
        with self._lock:
            if line in self.trouble:
                return
            self.trouble.append(line)
        log.error(line)
