"""Raw planes through RunWriter against plain pwrite of the same bytes, interleaved.

    python benchmarks/raw_write.py FOLDER [--planes 96] [--rounds 5]

FOLDER decides what is measured: on tmpfs the software's own cost, on a disk the page cache and the
disk as well. Each round writes the same noise planes both ways; the figure is the median of the
rounds' ratios, so that a slow moment of the machine falls on both. Nothing is synced: the writer
promises to survive a kill, which the page cache does.
"""

import argparse
import os
import shutil
import statistics
import time
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from refocus.frame import Frame, FrameHeader, Pixels
from store.layout import RunInfo
from store.writer import RunWriter


@dataclass(frozen=True)
class RawWrite:
    """Rates in MB/s, one a round, and the median of their ratios."""

    writer_mb_s: list[float]
    pwrite_mb_s: list[float]
    ratio: float


def raw_write_ratio(
    folder: Path, planes: int, shape: tuple[int, int] = (2048, 2048), rounds: int = 5
) -> RawWrite:
    """Measure in *folder* (made, and its files removed) with uint16 planes of *shape*."""
    folder.mkdir(parents=True, exist_ok=True)
    noise = np.random.default_rng(0)
    pool = [noise.poisson(100, shape).astype(np.uint16) for _ in range(4)]
    mb = planes * pool[0].nbytes / 1e6
    writer, pwrite = [], []
    for number in range(rounds + 1):
        pair = mb / _by_pwrite(folder, pool, planes), mb / _by_writer(folder, pool, planes)
        if number:  # the first round warms up
            pwrite.append(pair[0])
            writer.append(pair[1])
    ratio = statistics.median(w / p for w, p in zip(writer, pwrite, strict=True))
    return RawWrite(writer, pwrite, ratio)


def _by_pwrite(folder: Path, pool: list[Pixels], planes: int) -> float:
    path = folder / "pwrite.bin"
    descriptor = os.open(path, os.O_WRONLY | os.O_CREAT)
    start = time.perf_counter()
    for seq in range(planes):
        pixels = pool[seq % len(pool)]
        os.pwrite(descriptor, pixels.data, seq * pixels.nbytes)
    seconds = time.perf_counter() - start
    os.close(descriptor)
    path.unlink()
    return seconds


def _by_writer(folder: Path, pool: list[Pixels], planes: int) -> float:
    run = RunWriter.create(
        folder / "run", RunInfo(run_id="bench", created_wall_ns=time.time_ns(), version="bench")
    )
    tags = {f"Device-Property {number}": "value of a property" for number in range(100)}
    start = time.perf_counter()
    for seq in range(planes):
        pixels = pool[seq % len(pool)]
        header = FrameHeader(
            run="bench", seq=seq, axes={"time": seq}, shape=pixels.shape, dtype="uint16"
        )
        run.write_raw(Frame(header, pixels), tags)
    seconds = time.perf_counter() - start
    run.close(complete=True, expected_frames=planes)
    shutil.rmtree(folder / "run")
    return seconds


def main() -> None:
    """Print the rates and the ratio."""
    parser = argparse.ArgumentParser(description="raw planes through RunWriter against pwrite")
    parser.add_argument("folder", type=Path)
    parser.add_argument("--planes", type=int, default=96)
    parser.add_argument("--rounds", type=int, default=5)
    arguments = parser.parse_args()
    found = raw_write_ratio(arguments.folder, arguments.planes, rounds=arguments.rounds)
    print("writer MB/s", [round(rate) for rate in found.writer_mb_s])
    print("pwrite MB/s", [round(rate) for rate in found.pwrite_mb_s])
    print(f"ratio {found.ratio:.2f}")


if __name__ == "__main__":
    main()
