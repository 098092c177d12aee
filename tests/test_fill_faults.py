"""Filling is stopped, killed, locked out or short of disk: it loses nothing and goes on."""

import json
import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import msgspec
import numpy as np
import psutil
import pytest

from acquire.fill import NOT_TRIED, fill
from acquire.own_generator import FILLED_WITH, IN_USE, own_package
from engine import model_store
from engine.package import Package
from engine.scaling import Scaling
from refocus.cli.main import main
from refocus.errors import DiskError, LockedError, PackageError, RunError, SettingsError
from refocus.settings import AcquireSettings, StoreSettings
from store.check import check
from store.reader import State, open_run
from store.recover import recover
from store.writer import RunWriter
from tests import hanging_package, identity_package
from tests.recording import plane, recorder, shoot
from tests.recording import settings as recording_settings
from tests.small_disk import make_read_only, small_disk
from tests.unfilled import (
    SHAPE,
    assert_made_with,
    digest,
    make_run,
    outcomes,
    settings,
    skipped,
    times,
)

LIMIT_S = 60


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
    assert filled.reasons == {NOT_TRIED: 8}, "what was said of them before is not of now"
    assert any("NVIDIA" in line for line in filled.trouble)
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
    assert child.returncode == 130, errors
    assert "Traceback" not in errors
    summary = json.loads(said)
    assert summary["left"]
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


def test_what_is_no_closed_run_is_refused_untouched(tmp_path: Path, negated: Package) -> None:
    with pytest.raises(RunError, match="not a run"):
        fill(tmp_path, settings())
    with recorder(tmp_path / "run", recording_settings(negated.folder, "none")) as r:
        shoot(r, plane(SHAPE))
        while not r.status().counts.skipped:
            time.sleep(0.005)
        killed = shutil.copytree(tmp_path / "run", tmp_path / "killed")  # as kill -9 leaves it
    files = digest(killed)
    with pytest.raises(RunError, match="refocus recover"):
        fill(killed, settings())
    assert digest(killed) == files
    recover(killed)
    assert fill(killed, settings()).filled == 1


def test_a_run_that_is_read_only_is_one_line(
    tmp_path: Path, negated: Package, capsys: pytest.CaptureFixture[str]
) -> None:
    with small_disk(tmp_path / "disk", 8) as disk:
        make_run(disk / "run", negated, times(2))
        make_read_only(disk)
        (tmp_path / "config.toml").write_text("[store]\nreserve_mib = 1\n")
        config = str(tmp_path / "config.toml")
        assert main(["fill", str(disk / "run"), "--config", config]) == 1
    said = capsys.readouterr().err
    assert said.count("\n") == 1
    assert "cannot be written to" in said
    assert "make it writable" in said


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


def line_of_generator(path: Path) -> tuple[list[bytes], int]:
    """The lines of a run's journal, and which one names its first generator."""
    lines = (path / "journal" / "run.jsonl").read_bytes().splitlines(keepends=True)
    return lines, next(k for k, line in enumerate(lines) if b'"kind":"generator"' in line)


@pytest.mark.parametrize("told", [False, True])
def test_a_damaged_line_of_the_generator_is_as_one_that_is_not_there(
    tmp_path: Path, negated: Package, monkeypatch: pytest.MonkeyPatch, told: bool
) -> None:
    monkeypatch.setenv("XDG_DATA_HOME", str(tmp_path / "data"))
    path = tmp_path / "run"
    own = identity_package.make(tmp_path / "own", name="own")
    model_store.use(own.folder)

    def note(writer: RunWriter) -> None:
        if told:
            writer.note_event(IN_USE, from_seq=0, name="own", version="0", package_hash=own.hash)

    make_run(path, negated, times(4), notes=note, outcome=lambda seq: skipped(seq) if seq else None)
    lines, damaged = line_of_generator(path)
    lines[damaged] = lines[damaged].replace(b'"number"', b'"numbes"')
    (path / "journal" / "run.jsonl").write_bytes(b"".join(lines))
    assert main(["fill", str(path)]) == 0
    run = open_run(path)
    assert outcomes(run) == {"REFOCUSED": 4}
    (line,) = run.notes.generators.values()
    assert line.package_hash == (own if told else negated).hash, "else what the settings say"


def test_a_damaged_copy_leaves_the_others_to_try(
    tmp_path: Path, negated: Package, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("XDG_DATA_HOME", str(tmp_path / "data"))
    path = tmp_path / "run"
    make_run(path, negated, times(3), outcome=lambda seq: skipped(seq) if seq else None)
    installed = model_store.use(negated.folder).folder
    (installed / "weights.safetensors").write_bytes(b"damaged")
    assert own_package(open_run(path)).folder == negated.folder
    assert fill(path, settings()).filled == 2
    (negated.folder / "golden.npz").write_bytes(b"damaged")
    with pytest.raises(PackageError, match=r"--generator \(.*weights.safetensors was altered"):
        own_package(open_run(path))


def test_a_run_whose_own_generator_never_answered_is_filled_by_it(
    tmp_path: Path, negated: Package, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Not by the one that is current when it is filled; and what fills is told apart from it."""
    monkeypatch.setenv("XDG_DATA_HOME", str(tmp_path / "data"))
    path = tmp_path / "run"
    model_store.use(negated.folder)
    chosen = recording_settings("current")
    hasty = msgspec.structs.replace(chosen, acquire=AcquireSettings(drain_s=0, fill_at_end_s=0))
    with recorder(path, hasty) as r:
        for _ in range(3):
            shoot(r, plane(SHAPE))
    assert open_run(path).counts.refocused == 0
    later = identity_package.make(tmp_path / "later", name="later", pixel_um=(6.0, 7.0))
    model_store.use(later.folder)
    assert fill(path, settings(), generator="later").rejected == 3
    assert own_package(open_run(path)).hash == negated.hash
    assert fill(path, settings(), generator="negated").filled == 3
    told = [(event.event, event.fields) for event in open_run(path).notes.events]
    used = [(kind, fields["name"]) for kind, fields in told if "package_hash" in fields]
    assert used == [(IN_USE, "negated"), (FILLED_WITH, "later"), (FILLED_WITH, "negated")]
    assert ["from_seq" in fields for kind, fields in told if kind == FILLED_WITH] == [False] * 2
