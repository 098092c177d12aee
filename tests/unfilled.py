"""Runs on disk whose planes have no twin yet, and what is to be found in them afterwards."""

import hashlib
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

import msgspec

from engine.package import Package
from engine.runtimes import open_runtime
from engine.scaling import Scaling
from refocus.frame import Frame, Pixels, RefocusOutcome
from refocus.settings import ChannelSettings, EngineSettings, LinkSettings, Settings
from store.layout import RunInfo
from store.reader import Run
from store.records import Kind
from store.writer import Provenance, RunWriter
from tests.store_runs import frame

SHAPE = (64, 96)
Prepare = Callable[[RunWriter], None]


def settings(**engine: Any) -> Settings:
    return Settings(
        engine=EngineSettings(**{"runtime": "openvino", **engine}), link=LinkSettings(beat_ms=100)
    )


def skipped(seq: int) -> tuple[RefocusOutcome, str]:
    return RefocusOutcome.SKIPPED, "engine busy or absent"


def make_run(
    path: Path,
    package: Package,
    axes: list[dict[str, Any]],
    *,
    shape: tuple[int, int] = SHAPE,
    outcome: Callable[[int], tuple[RefocusOutcome, str] | None] = skipped,
    notes: Prepare = lambda writer: None,
    channels: dict[str, ChannelSettings] | None = None,
    planes: dict[int, Pixels] | None = None,
    pixel_um: float | None = None,
) -> None:
    """A closed run whose planes have no twin; *outcome* says why (None: REFOCUSED live)."""
    chosen = Settings(engine=EngineSettings(generator=str(package.folder)), channels=channels or {})
    info = RunInfo(run_id="r", created_wall_ns=1, version="0", settings=msgspec.to_builtins(chosen))
    writer = RunWriter.create(path, info)
    notes(writer)
    for seq, place in enumerate(axes):
        made = frame(seq, place, shape, pixel_um=pixel_um)
        if planes and seq in planes:
            made = Frame(made.header, planes[seq])
        writer.write_raw(made, {})
        said = outcome(seq)
        if said is None:
            number = writer.note_generator(package.hash, package.manifest.name, "0", "test")
            writer.write_refocused(seq, made.pixels, Provenance(generator=number, latency_ns=5))
        else:
            writer.book_refocus(seq, *said)
    writer.close(complete=True, expected_frames=len(axes))


def times(count: int, channel: str = "DAPI") -> list[dict[str, Any]]:
    return [{"time": index, "channel": channel} for index in range(count)]


def digest(run: Path) -> dict[str, str]:
    """What every file of a run holds."""
    files = sorted(path for path in run.rglob("*") if path.is_file())
    return {str(path): hashlib.sha256(path.read_bytes()).hexdigest() for path in files}


def outcomes(run: Run) -> Counter[str]:
    return Counter(RefocusOutcome(r.outcome).name for r in run.records(Kind.REFOCUS))


def assert_made_with(run: Run, package: Package, maps: dict[str, Scaling]) -> None:
    """Every twin is, bit for bit, what the package makes of raw with its channel's scaling."""
    runtime = open_runtime("openvino")
    try:
        for entry in run.frames():
            raw, twin = run.raw(entry.seq), run.refocused(entry.seq)
            assert entry.header is not None
            assert raw is not None
            assert twin is not None
            runtime.load(package, raw.shape)
            made = runtime.refocus(raw, maps[entry.header.channel])
            assert twin.tobytes() == made.pixels.tobytes()
    finally:
        runtime.close()
