"""Every raw plane gets its twin in the end, or a written reason, by the run's own generator."""

import hashlib
import json
import os
import signal
import subprocess
import sys
import threading
import time
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

import msgspec
import numpy as np
import psutil
import pytest

from acquire.fill import Filled, fill
from engine import scaling
from engine.package import Package
from engine.runtimes import open_runtime
from engine.scaling import Scaling
from refocus.errors import DiskError, LockedError, PackageError, RunError, SettingsError
from refocus.frame import Pixels, RefocusOutcome
from refocus.settings import (
    AcquireSettings,
    ChannelSettings,
    EngineSettings,
    LinkSettings,
    Settings,
    StoreSettings,
)
from store.check import check
from store.layout import RunInfo
from store.reader import Run, State, open_run
from store.records import Kind
from store.writer import Provenance, RunWriter
from tests import hanging_package, identity_package
from tests.recording import assert_raw, plane, recorder, shoot
from tests.recording import settings as recording_settings
from tests.small_disk import small_disk
from tests.store_runs import frame

SHAPE = (64, 96)
LIMIT_S = 60
Prepare = Callable[[RunWriter], None]


def settings(**engine: Any) -> Settings:
    return Settings(
        engine=EngineSettings(**{"runtime": "openvino", **engine}), link=LinkSettings(beat_ms=100)
    )


@pytest.fixture
def negated(tmp_path: Path) -> Package:
    return identity_package.make(tmp_path / "negated", name="negated", answer="negated")


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
) -> None:
    """A closed run whose planes have no twin; *outcome* says why (None: REFOCUSED live)."""
    chosen = Settings(engine=EngineSettings(generator=str(package.folder)), channels=channels or {})
    info = RunInfo(run_id="r", created_wall_ns=1, version="0", settings=msgspec.to_builtins(chosen))
    writer = RunWriter.create(path, info)
    notes(writer)
    for seq, place in enumerate(axes):
        made = frame(seq, place, shape)
        if planes and seq in planes:
            made = type(made)(made.header, planes[seq])
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


def test_every_plane_that_was_not_refocused_gets_its_twin(tmp_path: Path, negated: Package) -> None:
    path = tmp_path / "run"
    why = {
        0: (RefocusOutcome.SKIPPED, "engine busy or absent"),
        1: (RefocusOutcome.LOST, "its worker was given up"),
        2: (RefocusOutcome.LATE, "answered after its worker had been given up"),
        3: (RefocusOutcome.FAILED, "out of memory"),
        4: (RefocusOutcome.REJECTED, "pixel size 9 um is outside"),
    }
    make_run(path, negated, times(7), outcome=lambda seq: why.get(seq))
    before = open_run(path)
    said: list[tuple[int, int]] = []
    filled = fill(path, settings(), progress=lambda done, total: said.append((done, total)))
    assert (filled.planes, filled.filled, filled.left) == (4, 4, 0), filled
    assert said[-1] == (4, 4)
    run = open_run(path)
    assert outcomes(run) == {"REFOCUSED": 6, "REJECTED": 1}
    assert run.state is State.COMPLETE
    assert check(path).findings == ()
    for seq in (5, 6):  # refocused live: untouched
        assert run.record(seq, Kind.REFOCUS) == before.record(seq, Kind.REFOCUS)
    for seq in range(4):
        record = run.record(seq, Kind.REFOCUS)
        assert record is not None
        assert record.latency_ns == 0, "nobody waited for it"
        assert run.notes.generators[record.generator].package_hash == negated.hash


def test_nothing_left_means_nothing_written(tmp_path: Path, negated: Package) -> None:
    path = tmp_path / "run"
    make_run(path, negated, times(3))
    assert fill(path, settings()).filled == 3
    files = digest(path)
    again = fill(path, settings())
    assert (again.planes, again.filled, again.left) == (0, 0, 0)
    assert digest(path) == files


def test_the_scaling_is_the_runs_own_bit_for_bit(tmp_path: Path, negated: Package) -> None:
    """Not what today's rule would say of these frames; two channels, each its own."""
    path = tmp_path / "run"
    maps = {"DAPI": Scaling(131.0 / 3, 1e3 / 7), "FITC": Scaling(77.7, 0.1 + 0.2)}

    def note(writer: RunWriter) -> None:
        for name, one in maps.items():
            writer.note_scaling(name, one.offset, one.scale)

    axes = [{"time": t, "channel": c} for t in range(3) for c in maps]
    make_run(path, negated, axes, notes=note)
    assert fill(path, settings()).filled == 6
    run = open_run(path)
    assert {n: Scaling(s.offset, s.scale) for n, s in run.notes.scalings.items()} == maps
    assert_made_with(run, negated, maps)
    lines = (path / "journal" / "run.jsonl").read_text().splitlines()
    assert sum('"scaling"' in line for line in lines) == 2, "none was written again"


def test_a_channel_without_scaling_gets_one_that_later_fills_use(
    tmp_path: Path, negated: Package
) -> None:
    path = tmp_path / "run"
    flat = np.full(SHAPE, 7, np.uint16)
    make_run(path, negated, times(60), planes={0: flat})
    stop = threading.Event()
    first = fill(path, settings(), stop=stop, progress=lambda done, _: done >= 2 and stop.set())
    assert 0 < first.left < 59
    run = open_run(path)
    rule = scaling.derive([run.raw(1)])  # type: ignore[list-item]
    assert rule is not None
    noted = run.notes.scalings["DAPI"]
    assert Scaling(noted.offset, noted.scale) == rule
    rest = fill(path, settings())
    assert (rest.planes, rest.filled) == (first.left, first.left)
    run = open_run(path)
    assert run.notes.scalings["DAPI"] == noted
    assert outcomes(run) == {"REFOCUSED": 59, "REJECTED": 1}
    rejected = run.record(0, Kind.REFOCUS)
    assert rejected is not None
    assert "flat" in run.reason(rejected)


@pytest.mark.parametrize("known", [None, "Default-G"])
def test_the_planes_of_a_colour_exposure_share_one_scaling(
    tmp_path: Path, negated: Package, known: str | None
) -> None:
    path = tmp_path / "run"
    own = Scaling(40.5, 33.25)
    make_run(
        path,
        negated,
        [{"time": t, "channel": f"Default-{c}"} for t in range(2) for c in "RGB"],
        notes=lambda writer: known and writer.note_scaling(known, own.offset, own.scale),
    )
    assert fill(path, settings()).filled == 6
    run = open_run(path)
    maps = {name: Scaling(s.offset, s.scale) for name, s in run.notes.scalings.items()}
    assert set(maps) == {"Default-R", "Default-G", "Default-B"}
    assert len(set(maps.values())) == 1
    assert known is None or maps["Default-R"] == own
    assert_made_with(run, negated, maps)


def test_the_modality_of_the_run_holds_not_that_of_the_day(
    tmp_path: Path, negated: Package
) -> None:
    path = tmp_path / "run"
    phase = ChannelSettings(modality="phase")
    axes = times(2, "trans") + times(2, "DAPI")
    make_run(path, negated, axes, channels={"trans": phase})
    today = msgspec.structs.replace(settings(), channels={"DAPI": phase})
    filled = fill(path, today)
    assert (filled.filled, filled.rejected, filled.left) == (2, 2, 0)
    assert "[channels.trans] modality is phase" in next(iter(filled.reasons))
    assert fill(path, today).planes == 0, "rejected for good"


def test_another_generator_gets_what_the_runs_own_rejected(
    tmp_path: Path, negated: Package
) -> None:
    path = tmp_path / "run"
    fine = identity_package.make(tmp_path / "fine", name="fine", pixel_um=(0.01, 0.02))
    make_run(path, fine, [{"time": 0}], outcome=skipped)
    writer_rejects = fill(path, settings())
    assert writer_rejects.filled == 1, "an unknown pixel size is let through"
    path = tmp_path / "run2"
    make_run(path, fine, times(2, "trans"), channels={"trans": ChannelSettings(modality="phase")})
    assert fill(path, settings()).rejected == 2
    own = open_run(path).record(0, Kind.REFOCUS)
    assert own is not None
    assert open_run(path).notes.generators[own.generator].package_hash == fine.hash
    assert fill(path, settings()).planes == 0
    assert fill(path, settings(), generator=str(fine.folder)).planes == 0, "it said so already"
    other = fill(path, settings(), generator=str(negated.folder))
    assert (other.planes, other.rejected) == (2, 2)
    assert fill(path, settings(), generator=str(negated.folder)).planes == 0


def test_a_run_without_its_generator_says_so(tmp_path: Path, negated: Package) -> None:
    path = tmp_path / "run"
    make_run(path, negated, times(3), outcome=lambda seq: skipped(seq) if seq else None)
    identity = identity_package.make(tmp_path / "identity")
    negated.folder.rename(tmp_path / "elsewhere")
    identity.folder.rename(negated.folder)  # another one under its name
    files = digest(path)
    with pytest.raises(PackageError, match=rf"negated 0 \({negated.hash[:12]}\).*--generator"):
        fill(path, settings())
    assert digest(path) == files
    assert fill(path, settings(), generator=str(tmp_path / "elsewhere")).filled == 2


def test_a_damaged_raw_plane_fails_alone(tmp_path: Path, negated: Package) -> None:
    path = tmp_path / "run"
    make_run(path, negated, times(4))
    record = open_run(path).record(2, Kind.RAW)
    assert record is not None
    raw = open_run(path).raw(2)
    assert raw is not None
    shards = [file for file in (path / "0" / "0").rglob("*") if file.is_file()]
    (shard,) = (file for file in shards if raw.tobytes() in file.read_bytes())
    content = bytearray(shard.read_bytes())
    content[content.index(raw.tobytes())] ^= 1
    shard.write_bytes(content)
    filled = fill(path, settings())
    assert (filled.filled, filled.failed, filled.left) == (3, 1, 0)
    (reason,) = filled.reasons
    assert "does not fit its checksum" in reason
    assert "cannot be read back" in reason


def test_a_worker_that_dies_costs_nothing(tmp_path: Path, negated: Package) -> None:
    path = tmp_path / "run"
    make_run(path, negated, times(200))
    killed: list[int] = []

    def kill(done: int, total: int) -> None:
        if done >= 20 and not killed:
            (worker,) = psutil.Process().children()
            killed.append(worker.pid)
            worker.kill()

    filled = fill(path, settings(), progress=kill)
    assert killed
    assert (filled.filled, filled.left) == (200, 0)
    run = open_run(path)
    assert outcomes(run) == {"REFOCUSED": 200}
    assert any(event.event == "worker_died" for event in run.notes.events)


def test_planes_that_hang_every_worker_end_the_call(tmp_path: Path) -> None:
    path = tmp_path / "run"
    package = hanging_package.make(tmp_path / "hanging")
    make_run(path, package, times(2))
    filled = fill(path, settings(frame_timeout_ms=300))
    assert (filled.filled, filled.left) == (0, 2)
    assert outcomes(open_run(path)) == {"LOST": 2}


def test_an_engine_that_cannot_start_leaves_the_planes_as_they_were(
    tmp_path: Path, negated: Package
) -> None:
    path = tmp_path / "run"
    make_run(path, negated, times(8))
    filled = fill(path, settings(runtime="tensorrt"))
    assert (filled.filled, filled.left) == (0, 8)
    assert any("tensorrt" in line for line in filled.trouble)
    assert outcomes(open_run(path)) == {"SKIPPED": 8}
    with pytest.raises(SettingsError, match="--engine auto"):
        fill(path, settings(runtime="none"))


def start_fill(path: Path) -> "subprocess.Popen[str]":
    command = [sys.executable, "-m", "refocus.cli.main", "fill", str(path), "--json"]
    return subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)


@pytest.mark.skipif(os.name != "posix", reason="signals of POSIX")
def test_kill_9_in_the_middle_and_on_it_goes(tmp_path: Path, negated: Package) -> None:
    path = tmp_path / "run"
    total = 400
    make_run(path, negated, times(total))
    child = start_fill(path)
    try:
        deadline = time.monotonic() + LIMIT_S
        while open_run(path).counts.refocused < 20:
            assert time.monotonic() < deadline
        child.send_signal(signal.SIGSTOP)
        done = open_run(path).counts.refocused
        assert done < total
        with pytest.raises(LockedError):
            fill(path, settings())
        second = start_fill(path)
        _, errors = second.communicate(timeout=30)
        assert second.returncode == 4, errors
    finally:
        child.kill()
        child.communicate()
    acknowledged = open_run(path)
    made = {seq: acknowledged.refocused(seq) for seq in range(total)}
    assert sum(plane is not None for plane in made.values()) >= done
    filled = fill(path, settings())
    assert (filled.planes, filled.left) == (total - acknowledged.counts.refocused, 0)
    run = open_run(path)
    assert outcomes(run) == {"REFOCUSED": total}
    assert run.state is State.COMPLETE
    assert check(path).findings == ()
    for seq, twin in made.items():
        assert twin is None or np.array_equal(twin, run.refocused(seq))
    (noted,) = run.notes.scalings.values()
    assert_made_with(run, negated, {"DAPI": Scaling(noted.offset, noted.scale)})
    files = digest(path)
    assert fill(path, settings()).planes == 0
    assert digest(path) == files


@pytest.mark.skipif(os.name != "posix", reason="signals of POSIX")
def test_ctrl_c_ends_a_fill_in_order(tmp_path: Path, negated: Package) -> None:
    path = tmp_path / "run"
    make_run(path, negated, times(400))
    child = start_fill(path)
    try:
        deadline = time.monotonic() + LIMIT_S
        while open_run(path).counts.refocused < 5:
            assert time.monotonic() < deadline
        child.send_signal(signal.SIGINT)
        said, errors = child.communicate(timeout=30)
    finally:
        child.kill()
        child.communicate()
    assert child.returncode == 1, errors
    assert "Traceback" not in errors
    summary = json.loads(said)
    assert summary["filled"] + summary["left"] == summary["planes"] == 400
    assert summary["failed"] == 0
    assert open_run(path).counts.refocused == summary["filled"]
    assert check(path).findings == ()


def test_a_run_that_is_written_is_not_filled(tmp_path: Path, negated: Package) -> None:
    chosen = recording_settings(negated.folder, "none")
    with recorder(tmp_path / "run", chosen) as r:
        shoot(r, plane(SHAPE))
        with pytest.raises(LockedError):
            fill(tmp_path / "run", settings())
    assert fill(tmp_path / "run", settings()).filled == 1
    with pytest.raises(RunError, match="not a run"):
        fill(tmp_path, settings())


def test_a_full_disk_ends_a_fill_before_and_meanwhile(tmp_path: Path, negated: Package) -> None:
    with small_disk(tmp_path / "disk", 8) as disk:
        path = disk / "run"
        make_run(path, negated, times(40), shape=(128, 256))  # 2.5 MiB
        tight = msgspec.structs.replace(settings(), store=StoreSettings(reserve_mib=4))
        with pytest.raises(DiskError, match="twins of 40 planes needs"):
            fill(path, tight)
        room = msgspec.structs.replace(settings(), store=StoreSettings(reserve_mib=2))

        def download(done: int, total: int) -> None:
            if done >= 3:
                (disk / "download").write_bytes(bytes(3 * 2**20))

        filled = fill(path, room, progress=download)
        assert "reserve_mib" in filled.full
        assert filled.left
        assert not filled.failed
        (disk / "download").unlink()
        assert fill(path, room).left == 0
        assert check(path).findings == ()


def test_a_recorder_refocuses_what_it_skipped_before_it_leaves(
    tmp_path: Path, negated: Package
) -> None:
    taken = [plane(SHAPE) for _ in range(60)]
    with recorder(tmp_path / "run", recording_settings(negated.folder)) as r:
        assert r.wait_for_engine(30)
        for pixels in taken:
            shoot(r, pixels)
        deadline = time.monotonic() + LIMIT_S
        while r._writing.unanswered or r.status().counts.received < 60:
            assert time.monotonic() < deadline
            time.sleep(0.005)
        assert r.status().counts.skipped > 0
    assert r.status().counts.refocused == 60
    assert r.trouble == []
    run = open_run(tmp_path / "run")
    assert run.state is State.COMPLETE
    assert outcomes(run) == {"REFOCUSED": 60}
    assert_raw(run, taken)
    (noted,) = run.notes.scalings.values()
    assert_made_with(run, negated, {"Default": Scaling(noted.offset, noted.scale)})
    latencies = [r.latency_ns for r in run.records(Kind.REFOCUS)]
    assert 0 in latencies
    assert max(latencies) > 0


def test_a_recorder_told_to_stop_while_it_waits_for_the_engine_leaves(tmp_path: Path) -> None:
    """As Ctrl-C does it in `refocus demo`; nobody may have to wait 1000 s here."""
    package = hanging_package.make(tmp_path / "hanging")
    patient = EngineSettings(
        runtime="openvino", generator=str(package.folder), frame_timeout_ms=1_000_000
    )
    chosen = Settings(acquire=AcquireSettings(drain_s=1000, fill_at_end_s=1000), engine=patient)
    with recorder(tmp_path / "run", chosen) as r:
        assert r.wait_for_engine(30)
        shoot(r, plane(SHAPE))

        def press() -> None:
            while not r._hook.closed:
                time.sleep(0.005)
            r.stopping.set()

        presser = threading.Thread(target=press)
        presser.start()
    presser.join()
    assert not r.interrupted, "every frame had come by then"
    assert r.status().state == "complete"
    assert outcomes(open_run(tmp_path / "run")) == {"LOST": 1}


@pytest.mark.parametrize("why_not", ["switched off", "interrupted"])
def test_a_recorder_that_shall_not_fill_leaves_it_to_later(
    tmp_path: Path, negated: Package, why_not: str
) -> None:
    limit_s = 0.0 if why_not == "switched off" else 10.0
    chosen = msgspec.structs.replace(
        recording_settings(negated.folder), acquire=AcquireSettings(fill_at_end_s=limit_s)
    )
    with recorder(tmp_path / "run", chosen) as r:
        assert r.wait_for_engine(30)
        for _ in range(60):
            shoot(r, plane(SHAPE))
        if why_not == "interrupted":
            r.stopping.set()
    skipped_live = open_run(tmp_path / "run").counts.skipped
    assert skipped_live > 0
    done = subprocess.run(
        [sys.executable, "-m", "refocus.cli.main", "fill", str(tmp_path / "run")],
        capture_output=True,
        text=True,
        timeout=LIMIT_S,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    assert f"{skipped_live} of {skipped_live} planes refocused with negated 0" in done.stdout
    assert fill(tmp_path / "run", settings()) == Filled(0, 0, 0, 0, 0, {}, "", "", [])
