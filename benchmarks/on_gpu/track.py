"""The real wire with a runtime of our choosing: intake, link and a worker in a process of its own.

Only the disk is left out: a thread takes the writer's place, settles what it is given and notes
when. So frames go the way that they go in a recording, and the echo worker, which is the real
worker with a runtime that answers its input, is the most that any generator could reach.
"""

import contextlib
import os
import subprocess
import sys
import tempfile
import threading
import time
from collections import Counter, deque
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Literal

import numpy as np

from acquire.header import UNKNOWN
from acquire.intake import Intake
from acquire.items import Answer, Arrival, Item
from acquire.link import Link
from engine.package import Package
from refocus import wire
from refocus.errors import EngineError
from refocus.frame import Pixels, RefocusOutcome
from refocus.settings import EngineSettings, LinkSettings, Settings

Kind = Literal["echo", "tensorrt", "stand-in", "seam"]
"""What the worker runs: see benchmarks/on_gpu/worker.py."""

WORKER = Path(__file__).with_name("worker.py")
READY_S = 300.0
STOP_S = 10.0
RING = 8
HOPELESS = (RefocusOutcome.FAILED, RefocusOutcome.LOST, RefocusOutcome.REJECTED)
AHEAD = 6
"""Frames on their way: three at the worker, and the next ones here already."""
PAUSE_S = 0.0002
KEPT = 10_000
"""Latencies: a soak must not grow by what it notes."""


class Track:
    """Frames through one worker; made by `open_track`."""

    def __init__(self, kind: Kind, intake: Intake, pid: int, shape: tuple[int, int]) -> None:
        self.pid = pid
        """Process id of the worker."""
        self.outcomes: Counter[RefocusOutcome] = Counter()
        self.latencies_ms: deque[tuple[int, float]] = deque(maxlen=KEPT)
        """Frame, and from the call of the hook to the refocused plane in the writer's hands."""
        self.mixed_up = 0
        """Answers of the echo that are not the frame they belong to."""
        self.reasons: Counter[str] = Counter()
        self._intake = intake
        self._hooked_ns: dict[int, int] = {}
        self._frames = 0
        self._ring = [_plane(shape, number) for number in range(RING)]
        self._is_echo = kind == "echo"

    def hook(self) -> None:
        """The next frame, now."""
        number = self._frames
        self._frames += 1
        metadata = {"Axes": {"time": number}, "PixelSize_um": 0.325, "PixelType": "GRAY16"}
        self._hooked_ns[number] = now_ns = time.monotonic_ns()
        pixels = self._ring[number % RING]
        refused = self._intake.put(
            pixels, metadata, UNKNOWN, time.time_ns(), now_ns, may_wait=False
        )
        if refused:
            raise EngineError(refused)

    def run(self, seconds: float) -> float:
        """Frames/s refocused when the next frame is always there and none is wasted."""
        self._feed_until(lambda: self.outcomes[RefocusOutcome.REFOCUSED] >= RING)
        first, began = self.outcomes[RefocusOutcome.REFOCUSED], time.perf_counter()
        self._feed_until(lambda: time.perf_counter() - began >= seconds)
        done = self.outcomes[RefocusOutcome.REFOCUSED] - first
        return done / (time.perf_counter() - began)

    def pace(self, frames: int, rate: float) -> list[float]:
        """Latencies in ms of *frames* frames that come at *rate* a second."""
        first, began = self._frames, time.perf_counter()
        for number in range(frames):
            time.sleep(max(0.0, began + number / rate - time.perf_counter()))
            self.hook()
        self.settle()
        return [ms for number, ms in self.latencies_ms if number >= first]

    def settle(self) -> None:
        """Waits until every frame has its outcome."""
        self._until(lambda: self.outcomes.total() == self._frames)

    def take(self, item: Item) -> None:
        """The writer's part (writer's thread)."""
        if isinstance(item, Arrival):
            self._intake.settled(item)
        elif isinstance(item, Answer):
            hooked_ns = self._hooked_ns.pop(item.seq)
            if item.plane is not None:
                self.latencies_ms.append((item.seq, (time.monotonic_ns() - hooked_ns) / 1e6))
                if self._is_echo:
                    self.mixed_up += int(item.plane.pixels[0, 0]) != item.seq % RING
                self._intake.plane_settled(item.plane)
            else:
                self.reasons[item.reason] += 1
            self.outcomes[item.outcome] += 1

    def _feed_until(self, done: Callable[[], bool]) -> None:
        began = time.monotonic()
        while not done():
            while self._frames - self.outcomes.total() < AHEAD:
                self.hook()
            time.sleep(PAUSE_S)
            if not self.outcomes and time.monotonic() - began > READY_S:
                raise EngineError("no frame was answered")
            if sum(self.outcomes[outcome] for outcome in HOPELESS) > RING:
                raise EngineError(f"frames are not refocused: {dict(self.reasons)}")

    def _until(self, done: Callable[[], bool]) -> None:
        deadline = time.monotonic() + READY_S
        while not done():
            if time.monotonic() > deadline:
                raise EngineError(f"frames without an outcome; so far {dict(self.outcomes)}")
            time.sleep(PAUSE_S)


@contextlib.contextmanager
def open_track(
    kind: Kind, package: Package, shape: tuple[int, int], *, shared_memory: bool = True
) -> Iterator[Track]:
    """A track whose worker is ready for planes of *shape* (y, x) uint16.

    Raises EngineError, with the worker's last words, where it does not come up.
    """
    trouble: list[str] = []
    settings = Settings(
        engine=EngineSettings(generator=str(package.folder)),
        link=LinkSettings(shared_memory=shared_memory),
    )
    intake = Intake(
        "benchmark",
        raw_queue_bytes=2**31,
        raw_stall_ms=0,
        slot_frames=AHEAD,
        on_trouble=trouble.append,
    )
    with tempfile.TemporaryDirectory(prefix="refocus-wire-") as folder:
        intake.start()
        link = Link(
            intake,
            settings,
            {},
            address=f"ipc://{folder}/link" if os.name == "posix" else "tcp://127.0.0.1:*",
            outside=None,
            secret="benchmark",
            on_ready=lambda pid: None,
            on_gone=lambda pid, reason: trouble.append(reason),
            on_trouble=trouble.append,
        )
        link.let_in(package)
        link.use(package)
        words = Path(folder) / "worker.log"
        worker = _start(kind, package, shape, link.address, words)
        track = Track(kind, intake, worker.pid, shape)
        writer = threading.Thread(target=_write, args=(intake, track), name="refocus-benchmark")
        writer.start()
        try:
            _wait_for(link, worker, words)
            yield track
        finally:
            intake.end()
            link.close()
            intake.close()
            writer.join()
            _stop(worker)


def _start(
    kind: Kind, package: Package, shape: tuple[int, int], address: str, words: Path
) -> "subprocess.Popen[bytes]":
    command = [sys.executable, str(WORKER), kind, "--supervised", "--address", address]
    command += ["--model", str(package.folder), "--warm", f"{shape[0]}x{shape[1]}"]
    with words.open("wb") as output:
        return subprocess.Popen(
            command,
            stdin=subprocess.PIPE,  # the worker leaves when it is closed
            stdout=output,
            stderr=subprocess.STDOUT,
            env={**os.environ, wire.SECRET_VARIABLE: "benchmark"},
        )


def _wait_for(link: Link, worker: "subprocess.Popen[bytes]", words: Path) -> None:
    deadline = time.monotonic() + READY_S
    while not link.wait_ready(0.05):
        if worker.poll() is not None or time.monotonic() > deadline:
            raise EngineError(f"no worker: {words.read_text(errors='replace').strip()[-500:]}")


def _stop(worker: "subprocess.Popen[bytes]") -> None:
    assert worker.stdin is not None
    worker.stdin.close()
    try:
        worker.wait(STOP_S)
    except subprocess.TimeoutExpired:
        worker.kill()
        worker.wait()


def _write(intake: Intake, track: Track) -> None:
    while (item := intake.take(lambda: None)) is not None:
        track.take(item)


def _plane(shape: tuple[int, int], number: int) -> Pixels:
    plane = np.random.default_rng(number).poisson(400, shape).astype(np.uint16)
    plane[0, 0] = number
    return plane
