"""What benchmarks/storage.py measures of Refocus alone: readers, recovery, memory."""

import os
import statistics
import tempfile
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np

from benchmarks.writers.contenders import PWRITE, REFOCUS, REFOCUS_TWO, named
from benchmarks.writers.process import FRAMES, Measured, load_frames, result_of, start, sync
from benchmarks.writers.rounds import Bench, announcements
from refocus.bench import Figure
from refocus.errors import RunError
from store.reader import Run, open_run
from store.records import Kind, crc32c
from store.recover import recover

READER_FPS = 40.0
POLL_S = 0.005
BLOCK_BYTES = 8 << 20


class _Reader:
    """Looks again and again at a run that another process writes."""

    def __init__(self, bench: Bench) -> None:
        self._wanted = [crc32c(frame) for frame in load_frames(bench.frames, bench.shape)]
        self.seen_ns: dict[int, int] = {}
        self.refused = 0
        self.wrong = 0

    def look(self, run: Run) -> None:
        """Read every plane that is new; one that is refused is asked for again the next time."""
        for record in run.records(Kind.RAW):
            if record.seq in self.seen_ns:
                continue
            try:
                pixels = run.raw(record.seq)
            except RunError:
                self.refused += 1
                continue
            self.seen_ns[record.seq] = time.monotonic_ns()
            self.wrong += pixels is None or crc32c(pixels) != self._wanted[record.seq % FRAMES]


def reader_lag(bench: Bench) -> list[Figure]:
    """From a plane's acknowledgement until a process that polls the run has its pixels, checked."""
    reader = _Reader(bench)
    with tempfile.TemporaryDirectory(dir=bench.folder) as scratch, ThreadPoolExecutor(1) as beside:
        job = bench.job("announce", named(REFOCUS), scratch, fps=READER_FPS)
        writer = beside.submit(announcements, job, job.planes)
        ended = False
        while not ended:
            time.sleep(POLL_S)
            ended = writer.done()  # before the look, which then sees all
            if (Path(scratch) / "run" / "journal").exists():
                reader.look(open_run(Path(scratch) / "run"))
    acks_ns = dict(enumerate(writer.result()))
    lags_ms = [max(0, seen - acks_ns[seq]) / 1e6 for seq, seen in reader.seen_ns.items()]
    p50, p99 = np.percentile(lags_ms, (50, 99))
    return [
        Figure(f"reader at {READER_FPS:g} planes/s, acknowledged to seen, p50", float(p50), "ms"),
        Figure("the same, p99", float(p99), "ms"),
        Figure("acknowledged planes never seen", len(acks_ns) - len(lags_ms), "planes"),
        Figure("planes refused, then read", reader.refused, "planes"),
        Figure("wrong pixels shown as right", reader.wrong, "planes"),
    ]


def recovery_s(bench: Bench) -> list[Figure]:
    """Seconds to recover a killed run without reading its planes again."""
    with tempfile.TemporaryDirectory(dir=bench.folder) as scratch:
        _leave_killed(bench, REFOCUS, scratch)
        began = time.perf_counter()
        recover(Path(scratch) / "run", verify=False)
        seconds = time.perf_counter() - began
    return [Figure(f"recover, {bench.planes:,} planes, checksums not read", seconds, "s")]


def recovery_rate(bench: Bench, rounds: int) -> list[Figure]:
    """Recovery that reads every plane again, against a plain read of the same bytes.

    Both read from the disk and not from the page cache.
    """
    megabytes = 2e-6 * bench.shape[0] * bench.shape[1] * bench.planes
    rates = []
    for _ in range(rounds):
        with tempfile.TemporaryDirectory(dir=bench.folder) as scratch:
            _leave_killed(bench, REFOCUS, scratch)
            _leave_killed(bench, PWRITE, scratch)
            _leave_cache(Path(scratch))
            began = time.perf_counter()
            recover(Path(scratch) / "run", verify=True)
            recovered = time.perf_counter()
            _read_plainly(Path(scratch) / "0.bin")
            read = time.perf_counter()
        rates.append((megabytes / (recovered - began), megabytes / (read - recovered)))
    return [
        Figure(
            f"recover with checksums, {bench.shape[0]}², against a plain read",
            statistics.median(ours for ours, _ in rates),
            "MB/s",
            statistics.median(plain for _, plain in rates),
            statistics.median(ours / plain for ours, plain in rates),
        )
    ]


def memory(bench: Bench) -> list[Figure]:
    """How much the writing process grows over a long run, raw and refocused."""
    with tempfile.TemporaryDirectory(dir=bench.folder) as scratch:
        grown = result_of(start(bench.job("measure", named(REFOCUS_TWO), scratch)), Measured)
    return [Figure(f"memory, {bench.planes:,} frames with twins", grown.extra_rss_mib, "MiB")]


def _leave_killed(bench: Bench, contender: str, folder: str) -> None:
    """What a writer leaves that is killed after its last plane."""
    job = bench.job("announce", named(contender), folder)
    announcements(job, job.planes)


def _leave_cache(folder: Path) -> None:
    """Make the page cache forget all files of *folder*."""
    sync(folder)
    for path in folder.rglob("*"):
        if path.is_file():
            with path.open("rb") as file:
                os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)


def _read_plainly(path: Path) -> None:
    block = bytearray(BLOCK_BYTES)
    with path.open("rb", buffering=0) as file:
        while file.readinto(block):
            pass
