"""benchmarks/storage.py works: tiny planes, one round, the writers that every installation has."""

import json
import random
import subprocess
import sys
from pathlib import Path
from typing import Any

import msgspec
import pytest

from benchmarks.storage import HEAD, Row, line_of, row_of
from benchmarks.writers.contenders import PWRITE, REFERENCES, Contender, Pwrite, named, read_files
from benchmarks.writers.process import in_fresh_process, load_frames, make_frames
from benchmarks.writers.rounds import KILL_AFTER_PLANES, Bench

SCRIPT = Path(__file__).parents[1] / "benchmarks" / "storage.py"
TINY = ("--rounds", "1", "--kills", "0", "--shape", "64", "--planes", "20", "--small-planes", "20")

pytestmark = pytest.mark.skipif(sys.platform != "linux", reason="the benchmark needs Linux")


@pytest.fixture
def bench(tmp_path: Path) -> Bench:
    """Four planes of 64²."""
    bench = Bench(tmp_path, tmp_path / "frames.bin", (64, 64), planes=4)
    make_frames(bench.frames, bench.shape)
    return bench


def printed(folder: Path, *arguments: str) -> list[dict[str, Any]]:
    """What the script prints; everything that it made in *folder* must be gone."""
    command = [sys.executable, str(SCRIPT), "--json", "--folder", str(folder), *TINY, *arguments]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert list(folder.iterdir()) == []
    rows: list[dict[str, Any]] = json.loads(done.stdout)
    return rows


def test_table_of_writers(tmp_path: Path) -> None:
    rows = [
        msgspec.convert(row, Row) for row in printed(tmp_path, "--peers", "refocus", "zarr-python")
    ]
    assert [row.writer for row in rows] == [*REFERENCES[1], "refocus", "zarr-python"]
    assert sum(row.damaged for row in rows) == 0
    assert all(line_of(row).count("|") in (3, HEAD.splitlines()[0].count("|")) for row in rows)
    for row in rows[-2:]:  # O_DIRECT before them is not offered by every file system
        assert row.failed == ""
        assert row.ratio is not None
        assert row.ratio > 0
        assert row.full is None or (row.full.raised, row.full.lost) == ("append", 0)


def test_figures_of_refocus_alone(tmp_path: Path) -> None:
    rows = printed(tmp_path, "--reader", "--recover", "--memory")
    figures = {row["name"]: row["value"] for row in rows}
    assert figures["wrong pixels shown as right"] == 0
    assert figures["acknowledged planes never seen"] == 0
    assert figures["recover, 20 planes, checksums not read"] > 0
    assert len(figures) == 8


def test_killed_writer_is_read_back(bench: Bench) -> None:
    announced, lost = bench.kill(named("refocus"), random.Random(0))
    assert announced >= KILL_AFTER_PLANES[0]
    assert lost == 0


def test_a_plane_with_other_pixels_is_lost_as_one_that_is_not_there(bench: Bench) -> None:
    frames = load_frames(bench.frames, bench.shape)
    writer = Pwrite(bench.folder, bench.shape)
    for index, frame in enumerate((frames[0], frames[2], frames[2])):
        writer.append(index, frame)
    writer.close()
    job = bench.job("read", named(PWRITE), str(bench.folder))
    assert in_fresh_process(job) == [True, False, True, False]


def test_a_library_that_is_not_installed_is_a_line(bench: Bench) -> None:
    absent = Contender("some library", "no-such-distribution", Pwrite, read_files)
    line = line_of(row_of(bench, absent, done={}, kills=1))
    assert line == "| some library | not installed (pip install -e '.[benchmark]') |"
