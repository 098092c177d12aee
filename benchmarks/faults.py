"""What a sick engine costs the raw frames: python benchmarks/faults.py [--rounds N] [--folder DIR]

A source runs at half of the highest raw rate of this computer (measured first) while the worker is
healthy, absent, killed, stopped (SIGSTOP) or hung (its network computes for ever). A second after
the start the fault strikes. Reported, as medians of interleaved rounds: raw frames lost, the raw
rate against the healthy one of the same round, when the fault was noticed, when a new worker was
ready. Run it from the repository: the hanging network is one of the tests' model packages.
"""

import argparse
import os
import signal
import statistics
import sys
import tempfile
import threading
import time
from collections import defaultdict
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import msgspec

sys.path.insert(0, str(Path(__file__).parents[1]))

from acquire.header import UNKNOWN
from acquire.recorder import Recorder
from refocus.bench import Camera, feed, raw_only
from refocus.settings import AcquireSettings, EngineSettings, Settings
from store.reader import open_run
from tests import hanging_package, identity_package

SHAPE = (1024, 1024)
PROBE_FRAMES = 400
STRIKE_S = 1.0
RUN_S = 5.0
FRAME_TIMEOUT_MS = 1000
READY_S = 60.0


@dataclass(frozen=True)
class Round:
    """One run under one fault."""

    lost: int
    raw_fps: float
    noticed_s: float | None
    ready_again_s: float | None


def highest_raw_rate(folder: Path) -> float:
    """Frames/s from the hook to the disk, nothing held back."""
    with tempfile.TemporaryDirectory(dir=folder) as scratch:
        recorder = Recorder(
            raw_only(), out=Path(scratch) / "run", read_hardware=lambda event: UNKNOWN
        )
        began = time.perf_counter()
        with recorder:
            feed(recorder, Camera(SHAPE), PROBE_FRAMES)
        return PROBE_FRAMES / (time.perf_counter() - began)


def strike(fault: str, recorder: Recorder) -> None:
    """Harms the worker as *fault* says; the hung one hangs by itself at its first frame."""
    number = {"killed": signal.SIGKILL, "stopped": signal.SIGSTOP}.get(fault)
    pid = recorder.worker_pid
    if number is not None and pid is not None:
        os.kill(pid, number)


def one_round(folder: Path, fault: str, rate: float, generator: Path) -> Round:
    """A run at *rate* frames/s with the fault a second after its start."""
    settings = Settings(
        acquire=AcquireSettings(raw_queue_mib=4096, fill_at_end_s=0),
        engine=EngineSettings(
            runtime="none" if fault == "absent" else "openvino",
            generator=str(generator),
            frame_timeout_ms=FRAME_TIMEOUT_MS,
            warmup_timeout_ms=FRAME_TIMEOUT_MS,
        ),
    )
    frames = int(rate * RUN_S)
    with tempfile.TemporaryDirectory(dir=folder) as scratch:
        out = Path(scratch) / "run"
        # The healthy and the struck worker are warm; the hanging one must not hang before its time.
        warm = None if fault == "hung" else SHAPE
        recorder = Recorder(
            settings, out=out, expected_shape=warm, read_hardware=lambda event: UNKNOWN
        )
        with recorder:
            if fault != "absent":
                recorder.wait_for_engine(READY_S)
            struck_ns = time.time_ns() + int(STRIKE_S * 1e9 * (fault != "hung"))
            timer = threading.Timer(STRIKE_S, strike, (fault, recorder))
            timer.start()
            began = time.perf_counter()
            feed(recorder, Camera(SHAPE), frames, rate)
            while recorder.status().counts.received < frames:
                time.sleep(0.001)
            seconds = time.perf_counter() - began
            timer.join()
        run = open_run(out)
        times = defaultdict(list)
        for event in run.notes.events:
            if event.wall_ns > struck_ns:
                times[event.event].append((event.wall_ns - struck_ns) / 1e9)
        noticed_s = min(times["worker_gone"] + times["worker_died"], default=None)
        ready = [ready_s for ready_s in times["worker_ready"] if ready_s > (noticed_s or 0)]
        return Round(
            lost=frames - run.counts.saved,
            raw_fps=frames / seconds,
            noticed_s=noticed_s,
            ready_again_s=min(ready, default=None),
        )


def main() -> int:
    """Measures and prints the table."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n\n")[0])
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--folder", type=Path, default=Path(tempfile.gettempdir()))
    parser.add_argument("--json", action="store_true")
    arguments = parser.parse_args()
    rate = highest_raw_rate(arguments.folder) / 2
    rounds: dict[str, list[Round]] = defaultdict(list)
    with tempfile.TemporaryDirectory() as scratch:
        good = identity_package.make(Path(scratch) / "identity").folder
        bad = hanging_package.make(Path(scratch) / "hanging").folder
        for _ in range(arguments.rounds):
            for fault in ("healthy", "absent", "killed", "stopped", "hung"):
                generator = bad if fault == "hung" else good
                rounds[fault].append(one_round(arguments.folder, fault, rate, generator))
    table = [_row(fault, done, rounds["healthy"]) for fault, done in rounds.items()]
    if arguments.json:
        print(msgspec.json.encode(table).decode())
        return 0
    print(f"source: {SHAPE[0]} x {SHAPE[1]} uint16 at {rate:.0f} frames/s, {RUN_S:g} s a round")
    print(f"{'worker':<9}{'raw lost':>9}{'raw rate':>10}{'noticed s':>11}{'ready again s':>15}")
    for row in table:
        print(
            f"{row['worker']:<9}{row['raw lost']:>9}{row['raw rate']:>10.3f}"
            f"{_text(row['noticed s']):>11}{_text(row['ready again s']):>15}"
        )
    return 0


def _row(fault: str, done: list[Round], healthy: list[Round]) -> dict[str, object]:
    ratios = [one.raw_fps / well.raw_fps for one, well in zip(done, healthy, strict=True)]
    return {
        "worker": fault,
        "raw lost": sum(one.lost for one in done),
        "raw rate": statistics.median(ratios),
        "noticed s": _worst(done, lambda one: one.noticed_s),
        "ready again s": _worst(done, lambda one: one.ready_again_s),
    }


def _worst(done: list[Round], pick: Callable[[Round], float | None]) -> float | None:
    return max((value for one in done if (value := pick(one)) is not None), default=None)


def _text(value: object) -> str:
    return f"{value:.2f}" if isinstance(value, float) else "-"


if __name__ == "__main__":
    sys.exit(main())
