"""Writing planes live: Refocus against plain pwrite and the libraries of the field.

    python benchmarks/storage.py [--folder DIR] [--rounds N] [--shape PX] [--peers NAME ...]
    python benchmarks/storage.py --reader --recover --memory

All contenders write the same noise, each in a process of its own, one after the other, in an order
that changes every round; the time ends when everything is durable (syncfs). The ratio is taken
against the better of the two pwrites of the same round: absolute rates say more about the disk and
its other users. Every plane is read back by its checksum afterwards. Then every contender is killed
(-9) at random moments, and has its disk filled up (a small tmpfs in a mount namespace of its own):
counted are planes that it had called written and that a fresh process cannot read back.

Prints Markdown, as in docs/storage-benchmark.md. Linux only. Needs 6 GB on the disk.
"""

import argparse
import os
import platform
import random
import statistics
import sys
import tempfile
from pathlib import Path

import msgspec
import numpy as np

sys.path.insert(0, str(Path(__file__).parents[1]))

from benchmarks.writers import own
from benchmarks.writers.contenders import (
    CONTENDERS,
    REFERENCES,
    REFOCUS,
    REFOCUS_TWO,
    Contender,
    named,
)
from benchmarks.writers.process import Filled, Measured, make_frames
from benchmarks.writers.rounds import Bench, measure_rounds
from refocus.bench import Figure

SHARD_MIB, SHARD_SLOTS = 512, 255
"""No shard of Refocus holds more."""
SMALL = (64, 64)
"""Planes (y, x) for what depends on their number alone."""
RAISED = {"append": "error on append", "close": "error on closing", "never": "no error"}
HEAD = (
    "| writer | ratio | MB/s | CPU ms/plane | CPU ratio | append p99 ms | extra memory MiB "
    "| lost to kill -9 | lost to a full disk |\n|---|---|---|---|---|---|---|---|---|"
)


class Row(msgspec.Struct, frozen=True, kw_only=True):
    """One line of the table; None where nothing was measured."""

    writer: str
    version: str | None
    """None: not installed."""
    failed: str = ""
    ratio: float | None = None
    """Median over the rounds of the rate against the better pwrite of the round."""
    mb_per_s: float | None = None
    cpu_ms: float | None = None
    """Per plane."""
    cpu_ratio: float | None = None
    """Median over the rounds against buffered pwrite."""
    append_p99_ms: float | None = None
    extra_rss_mib: float | None = None
    damaged: int = 0
    """Planes that were not read back as they were written, though nothing had happened."""
    killed_announced: int = 0
    killed_lost: int = 0
    full: Filled | None = None


def row_of(
    bench: Bench, contender: Contender, done: dict[str, list[Measured | str]], kills: int
) -> Row:
    """One line: from the rounds, then from the kills and the full disk."""
    name, version = contender.name, contender.version
    if version is None:
        return Row(writer=name, version=None)
    mine = [one for one in done[name] if isinstance(one, Measured)]
    failed = [one for one in done[name] if isinstance(one, str)]
    if failed:
        return Row(writer=name, version=version, failed=failed[0])
    buffered, direct = (done[reference] for reference in REFERENCES[contender.arrays])
    planes = bench.planes * contender.arrays
    megabytes = 2e-6 * bench.shape[0] * bench.shape[1] * planes
    killed = [bench.kill(contender, random.Random(number)) for number in range(kills)]
    return Row(
        writer=name,
        version=version,
        ratio=statistics.median(
            _better_s(*pair) / one.seconds
            for one, *pair in zip(mine, buffered, direct, strict=True)
        ),
        mb_per_s=statistics.median(megabytes / one.seconds for one in mine),
        cpu_ms=1e3 * statistics.median(one.cpu_s for one in mine) / planes,
        cpu_ratio=statistics.median(
            one.cpu_s / plain.cpu_s
            for one, plain in zip(mine, buffered, strict=True)
            if isinstance(plain, Measured)
        ),
        append_p99_ms=float(np.percentile([ms for one in mine for ms in one.append_ms], 99)),
        extra_rss_mib=max(one.extra_rss_mib for one in mine),
        damaged=sum(one.damaged for one in mine),
        killed_announced=sum(announced for announced, _ in killed),
        killed_lost=sum(lost for _, lost in killed),
        full=bench.fill(contender),
    )


def _better_s(buffered: Measured | str, direct: Measured | str) -> float:
    """Seconds of the better pwrite of a round; O_DIRECT is not offered by every file system."""
    return min(one.seconds for one in (buffered, direct) if isinstance(one, Measured))


def line_of(row: Row) -> str:
    """A row as Markdown."""
    if row.version is None:
        return f"| {row.writer} | not installed (pip install -e '.[benchmark]') |"
    name = f"{row.writer} {row.version}".strip()
    if row.failed:
        return f"| {name} | fails: {row.failed} |"
    killed = "not measured"
    if row.killed_announced:
        killed = f"{row.killed_lost} of {row.killed_announced}"
    full = "not measured"
    if row.full is not None:
        full = f"{row.full.lost} of {row.full.accepted}, {RAISED[row.full.raised]}"
    return (
        f"| {name} | {row.ratio:.2f} | {row.mb_per_s:.0f} | {row.cpu_ms:.1f} | {row.cpu_ratio:.2f} "
        f"| {row.append_p99_ms:.0f} | {row.extra_rss_mib:.0f} | {killed} | {full} |"
    )


def compare(arguments: argparse.Namespace, bench: Bench) -> int:
    """Measure all contenders, print the table; 1 where planes came back wrong or Refocus failed."""
    peers = [named(name) for name in arguments.peers] if arguments.peers else CONTENDERS
    wanted = {name for one in peers for name in (one.name, *REFERENCES[one.arrays])}
    chosen = [one for one in CONTENDERS if one.name in wanted]
    installed = [one for one in chosen if one.version is not None]
    done = measure_rounds(bench, installed, arguments.rounds)
    rows = [row_of(bench, contender, done, arguments.kills) for contender in chosen]
    if arguments.json:
        print(msgspec.json.encode(rows).decode())
    else:
        print(
            f"{bench.planes} planes of {bench.shape[0]}² uint16 an array, {arguments.rounds} "
            f"rounds, {os.cpu_count()} cores, Linux {platform.release()}\n\n{HEAD}"
        )
        print("\n".join(map(line_of, rows)))
    ours = [row for row in rows if row.writer in (REFOCUS, REFOCUS_TWO)]
    return int(any(row.damaged for row in rows) or any(row.failed for row in ours))


def own_figures(arguments: argparse.Namespace, bench: Bench) -> list[Figure]:
    """What is asked for of readers, recovery and memory."""
    small = Bench(bench.folder, bench.folder / "small.bin", SMALL, arguments.small_planes)
    make_frames(small.frames, small.shape)
    figures: list[Figure] = []
    if arguments.reader:
        figures += own.reader_lag(bench)
    if arguments.recover:
        figures += own.recovery_s(small) + own.recovery_rate(bench, arguments.rounds)
    if arguments.memory:
        figures += own.memory(small)
    return figures


def main() -> int:
    """Run what the command line asks for."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n\n")[0])
    parser.add_argument("--folder", type=Path, default=Path(tempfile.gettempdir()))
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--kills", type=int, default=3, help="kill -9 per contender")
    parser.add_argument("--planes", type=int, help="an array; default: two shards and a half")
    parser.add_argument("--shape", type=int, default=2048, help="side of a plane in pixels")
    parser.add_argument("--small-planes", type=int, default=10_000, help="for recover and memory")
    parser.add_argument("--peers", nargs="+", choices=[one.name for one in CONTENDERS])
    parser.add_argument("--json", action="store_true")
    parser.add_argument("--reader", action="store_true", help="lag of a reader that polls")
    parser.add_argument("--recover", action="store_true", help="time of `refocus recover`")
    parser.add_argument("--memory", action="store_true", help="growth over thousands of planes")
    arguments = parser.parse_args()
    shape = (arguments.shape, arguments.shape)
    shard = min(SHARD_SLOTS, (SHARD_MIB << 20) // (2 * arguments.shape**2))
    with tempfile.TemporaryDirectory(dir=arguments.folder, prefix="refocus-storage-") as scratch:
        folder = Path(scratch).resolve()
        bench = Bench(folder, folder / "frames.bin", shape, arguments.planes or shard * 5 // 2)
        make_frames(bench.frames, shape)
        if not (arguments.reader or arguments.recover or arguments.memory):
            return compare(arguments, bench)
        figures = own_figures(arguments, bench)
    if arguments.json:
        print(msgspec.json.encode(figures).decode())
    else:
        print("| what | figure | reference | ratio |\n|---|---|---|---|")
        for one in figures:
            ratio = "" if one.ratio is None else f"{one.ratio:.2f}"
            reference = "" if one.reference is None else f"{one.reference:.0f} {one.unit}"
            value = f"{one.value:.0f}" if one.value >= 100 else f"{one.value:.3g}"
            print(f"| {one.name} | {value} {one.unit} | {reference} | {ratio} |")
    return 0


if __name__ == "__main__":
    sys.exit(main())
