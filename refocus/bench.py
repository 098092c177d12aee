"""What `refocus bench` measures: every figure as a ratio within one run.

Absolute rates say more about the machine and its other users than about Refocus. So each figure is
taken beside a reference that does the least that anyone could do (a plain pwrite of the same bytes,
the bare network on the same cores), in interleaved rounds, and the median of the rounds' ratios is
reported. Frames are noise like a camera's, each with its number stamped into the first pixels; no
rendering takes part. Every raw plane that a round wrote is read back against its checksum.
"""

import os
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import msgspec
import numpy as np

from acquire.header import UNKNOWN
from acquire.recorder import Recorder
from engine import model_store, package
from engine.runtimes import open_runtime
from refocus.errors import EngineError, RunError
from refocus.frame import Frame, FrameHeader, Pixels
from refocus.settings import AcquireSettings, EngineSettings, RuntimeChoice, Settings
from store.check import check
from store.layout import RunInfo
from store.writer import RunWriter

RAW_SHAPE = (2048, 2048)
RAW_PLANES = 48
WORKER_SHAPE = (1024, 1024)
WORKER_S = 5.0
HOOK_FRAMES = 200
HOOK_RATE = 40.0
LATENCY_FRAMES = 60
ENGINE_READY_S = 120.0


class Figure(msgspec.Struct, frozen=True):
    """One line of the table."""

    name: str
    value: float
    unit: str
    reference: float | None = None
    """What the value is measured against, in the same unit; None where it stands alone."""
    ratio: float | None = None
    """Median over the rounds of value / reference."""


class Camera:
    """Frames (y, x) uint16 with their number in the first two pixels, each in memory of its own."""

    def __init__(self, shape: tuple[int, int]) -> None:
        self._noise = np.random.default_rng(0).poisson(400, shape).astype(np.uint16)
        self.number = 0

    def expose(self) -> tuple[Pixels, dict[str, Any]]:
        """The next frame and its Micro-Manager metadata."""
        image = self._noise.copy()
        image[0, :2] = self.number % 65_536, self.number // 65_536
        metadata = {
            "Axes": {"time": self.number},
            "Camera": "bench",
            "Exposure": 10.0,
            "PixelSize_um": 0.325,
            "PixelType": "GRAY16",
            "ImageNumber": str(self.number),
        }
        self.number += 1
        return image, metadata


def feed(recorder: Recorder, camera: Camera, frames: int, rate: float = 0.0) -> list[float]:
    """Calls the hook for *frames* frames, paced at *rate* (0: at once); returns its times in ms."""
    hook = recorder.hook
    times_ms = []
    start = time.perf_counter()
    for index in range(frames):
        image, metadata = camera.expose()
        if rate:
            time.sleep(max(0.0, start + index / rate - time.perf_counter()))
        began = time.perf_counter()
        hook(image, metadata)
        times_ms.append(1000 * (time.perf_counter() - began))
    return times_ms


@contextmanager
def recording(folder: Path, settings: Settings) -> Iterator[Recorder]:
    """A recorder on a fresh run that is checked and removed afterwards; it fills nothing."""
    acquire = msgspec.structs.replace(settings.acquire, fill_at_end_s=0)
    settings = msgspec.structs.replace(settings, acquire=acquire)
    with tempfile.TemporaryDirectory(dir=folder, prefix="refocus-bench-") as scratch:
        run = Path(scratch) / "run"
        with Recorder(settings, out=run, read_hardware=lambda event: UNKNOWN) as recorder:
            yield recorder
        report = check(run)
        if report.raw.damaged or report.raw.readable != recorder.status().received:
            raise RunError(f"{report.raw} of {recorder.status().received} frames: this disk lies")


def raw_only() -> Settings:
    """The trunk alone, with room for every frame of a round."""
    queue_mib = RAW_PLANES * RAW_SHAPE[0] * RAW_SHAPE[1] * 2 // 2**20 + 64
    return Settings(
        acquire=AcquireSettings(raw_queue_mib=queue_mib, raw_stall_ms=60_000),
        engine=EngineSettings(runtime="none"),
    )


def hook_cost(folder: Path) -> list[Figure]:
    """Time that the hook takes from Micro-Manager, 2048², while the writer works."""
    with recording(folder, raw_only()) as recorder:
        times_ms = feed(recorder, Camera(RAW_SHAPE), HOOK_FRAMES, HOOK_RATE)
    p50, p99 = (float(v) for v in np.percentile(times_ms, (50, 99)))
    return [Figure("hook p50, 2048²", p50, "ms"), Figure("hook p99, 2048²", p99, "ms")]


def raw_rate(folder: Path, rounds: int) -> list[Figure]:
    """Raw planes to disk, until they survive a power cut, against pwrite of the same bytes."""
    planes = [Camera(RAW_SHAPE).expose()[0] for _ in range(4)]
    pairs = [(_written(folder, planes), _pwritten(folder, planes)) for _ in range(rounds)]
    return [_ratio("raw written, 2048² uint16", "MB/s", pairs)]


def _written(folder: Path, planes: list[Pixels]) -> float:
    with tempfile.TemporaryDirectory(dir=folder, prefix="refocus-bench-") as scratch:
        info = RunInfo(run_id="bench", created_wall_ns=time.time_ns(), version="bench")
        writer = RunWriter.create(Path(scratch) / "run", info)
        began = time.perf_counter()
        for seq in range(RAW_PLANES):
            header = FrameHeader(
                run="bench", seq=seq, axes={"time": seq}, shape=RAW_SHAPE, dtype="uint16"
            )
            writer.put_raw(Frame(header, planes[seq % len(planes)]), {"ImageNumber": str(seq)})
        writer.close(complete=True, expected_frames=RAW_PLANES)
        return _mb(planes) / (time.perf_counter() - began)


def _pwritten(folder: Path, planes: list[Pixels]) -> float:
    with tempfile.TemporaryFile(dir=folder, buffering=0) as file:
        began = time.perf_counter()
        for seq in range(RAW_PLANES):
            plane = planes[seq % len(planes)]
            if hasattr(os, "pwrite"):
                written = os.pwrite(file.fileno(), plane.data, seq * plane.nbytes)
            else:  # Windows: the same bytes in the same order
                written = file.write(plane.data)
            assert written == plane.nbytes
        os.fsync(file.fileno())
        return _mb(planes) / (time.perf_counter() - began)


def _mb(planes: list[Pixels]) -> float:
    return RAW_PLANES * planes[0].nbytes / 1e6


def worker_rate(folder: Path, settings: Settings, rounds: int) -> list[Figure]:
    """The worker behind the wire against the bare network on the same cores, 1024²."""
    pairs = [
        (_through_the_wire(folder, settings), _bare_in_a_process(settings)) for _ in range(rounds)
    ]
    return [_ratio("worker loop, 1024²", "frames/s", pairs)]


def _through_the_wire(folder: Path, settings: Settings) -> float:
    with recording(folder, settings) as recorder:
        _wait(recorder)
        camera = Camera(WORKER_SHAPE)
        feed(recorder, camera, 4)
        _until(lambda: recorder.status().counts.refocused >= 1)
        first = recorder.status().counts.refocused
        began = time.perf_counter()
        while time.perf_counter() - began < WORKER_S:
            if recorder.slot_waiting < 2:  # the newest frame is always there, none is wasted
                feed(recorder, camera, 1)
            time.sleep(0.001)
        done = recorder.status().counts.refocused - first
        return done / (time.perf_counter() - began)


def _bare_in_a_process(settings: Settings) -> float:
    engine, shape = settings.engine, map(str, WORKER_SHAPE)
    command = [sys.executable, "-P", "-m", "refocus.bench", engine.generator, engine.runtime]
    command += [str(engine.threads), *shape, str(WORKER_S)]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    if done.returncode:
        raise EngineError(f"the bare network does not run: {done.stderr.strip()[-300:]}")
    return float(done.stdout)


def bare_rate(
    generator: str,
    runtime_name: RuntimeChoice,
    threads: int,
    shape: tuple[int, int],
    seconds: float,
) -> float:
    """Frames/s of the network alone: no scaling, no checks, no wire."""
    if hasattr(os, "nice"):
        os.nice(10)  # as the worker
    runtime = open_runtime(runtime_name, threads or None)
    infer = runtime.bare(package.load(model_store.find(generator)), shape)
    infer()
    began = time.perf_counter()
    count = 0
    while time.perf_counter() - began < seconds:
        infer()
        count += 1
    rate = count / (time.perf_counter() - began)
    runtime.close()
    return rate


def latency(folder: Path, settings: Settings, worker_fps: float) -> list[Figure]:
    """From the hook to the refocused plane on disk, 1024², paced at half the worker's rate.

    *worker_fps* is that rate, 0 where it is still to be measured.
    """
    rate = (worker_fps or _through_the_wire(folder, settings)) / 2
    with recording(folder, settings) as recorder:
        _wait(recorder)
        feed(recorder, Camera(WORKER_SHAPE), LATENCY_FRAMES, rate)
    measured = recorder.status().latency_ms
    refocused = recorder.status().counts.refocused
    if measured is None:
        raise EngineError("no plane was refocused; see the messages above")
    return [
        Figure(f"latency {name}, 1024² at {rate:.1f} frames/s", value, "ms")
        for name, value in (("p50", measured.p50), ("p95", measured.p95), ("p99", measured.p99))
    ] + [Figure("refocused of those", 100 * refocused / LATENCY_FRAMES, "%")]


def _wait(recorder: Recorder) -> None:
    if not recorder.wait_for_engine(ENGINE_READY_S):
        raise EngineError(f"no engine: {'; '.join(recorder.trouble) or 'none is wanted'}")


def _until(done: Callable[[], bool]) -> None:
    deadline = time.monotonic() + ENGINE_READY_S
    while not done():
        if time.monotonic() > deadline:
            raise EngineError("the engine refocused nothing")
        time.sleep(0.01)


def _ratio(name: str, unit: str, pairs: list[tuple[float, float]]) -> Figure:
    return Figure(
        name,
        statistics.median(value for value, _ in pairs),
        unit,
        statistics.median(reference for _, reference in pairs),
        statistics.median(value / reference for value, reference in pairs),
    )


if __name__ == "__main__":
    name, engine, threads, y, x, seconds = sys.argv[1:]
    chosen = msgspec.convert(engine, RuntimeChoice)
    print(bare_rate(name, chosen, int(threads), (int(y), int(x)), float(seconds)))
