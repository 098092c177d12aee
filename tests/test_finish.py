"""`refocus finish`: pyramids and compression of a closed run, killed and stopped at any moment."""

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import yaozarrs
import zarr
from store_runs import file_size_limit, frame, pixels, start

from refocus.cli.main import main
from refocus.errors import DiskError, LockedError, RunError
from refocus.frame import RefocusOutcome
from store import packing
from store.check import check
from store.finish import finish
from store.pyramid import halved
from store.reader import open_run
from store.recover import recover
from store.writer import Provenance, RunWriter
from tests.small_disk import make_read_only, small_disk

SHAPE = (300, 521)
T, Z = 3, 2
FRAMES = T * Z
TWINS = (0, 1, 3)
HERE = Path(__file__).parent


def write(path: Path) -> RunWriter:
    """Three stacks of two planes, one of them black; half of them with a twin."""
    writer = start(path, pixel_um=0.5)
    number = writer.note_generator("0123456789abcdef", "fluorescence", "1.2", "openvino")
    for seq in range(FRAMES):
        writer.write_raw(frame(seq, {"time": seq // Z, "z": seq % Z}, SHAPE), {})
        if seq in TWINS:
            made = Provenance(generator=number, latency_ns=1)
            writer.write_refocused(seq, twin(seq), made)
        else:
            writer.book_refocus(seq, RefocusOutcome.SKIPPED, "busy")
    return writer


def twin(seq: int) -> Any:
    return np.zeros(SHAPE, np.uint16) if seq == 1 else pixels(1000 + seq, SHAPE)


@pytest.fixture
def run(tmp_path: Path) -> Path:
    write(tmp_path / "run").close(complete=True, expected_frames=FRAMES)
    return tmp_path / "run"


@pytest.fixture(autouse=True)
def _small_shards(monkeypatch: pytest.MonkeyPatch) -> None:
    """So small a run has several shards of every array: two planes of level 0 each."""
    monkeypatch.setattr(packing, "SHARD_BYTES", 2 * 2 * SHAPE[0] * SHAPE[1])


def require_planes(run: Path) -> None:
    """Every acknowledged plane reads back, and the rest is absent."""
    require_raw(run, FRAMES)
    opened = open_run(run)
    for seq in range(FRAMES):
        found = opened.refocused(seq)
        if seq in TWINS:
            np.testing.assert_array_equal(found, twin(seq))
        else:
            assert found is None


def require_raw(run: Path, frames: int) -> None:
    """Every raw plane reads back."""
    opened = open_run(run)
    for seq in range(frames):
        np.testing.assert_array_equal(opened.raw(seq), pixels(seq, SHAPE))


def require_both_pyramids(run: Path) -> None:
    """Raw and refocused have theirs."""
    raw = {(seq // Z, 0, seq % Z): pixels(seq, SHAPE) for seq in range(FRAMES)}
    refocused = {(seq // Z, 0, seq % Z): twin(seq) for seq in TWINS}
    require_levels(run, 0, raw)
    require_levels(run, 1, refocused)


def require_levels(run: Path, image: int, planes: dict[packing.Slot, Any]) -> None:
    """An image lists two smaller levels, each half of the one before, zeros where is no plane."""
    group: Any = zarr.open_group(run / str(image), mode="r")
    (multiscale,) = group.attrs.asdict()["ome"]["multiscales"]
    assert [dataset["path"] for dataset in multiscale["datasets"]] == ["0", "1", "2"]
    full, half, quarter = (group[path][:] for path in ("0", "1", "2"))
    assert quarter.shape[3:] == (75, 131)
    for slot in np.ndindex(full.shape[:3]):
        plane = planes.get(slot, np.zeros(SHAPE, np.uint16))
        np.testing.assert_array_equal(full[slot], plane)
        np.testing.assert_array_equal(half[slot], halved(plane))
        np.testing.assert_array_equal(quarter[slot], halved(halved(plane)))


def contents(run: Path) -> dict[str, tuple[bytes, int]]:
    """Every file with its content and when it was written."""
    return {
        str(path.relative_to(run)): (path.read_bytes(), path.stat().st_mtime_ns)
        for path in run.rglob("*")
        if path.is_file()
    }


def test_pyramids_are_valid_and_a_second_time_changes_nothing(run: Path) -> None:
    done = finish(run)
    assert [image.levels for image in done.images] == [((150, 261), (75, 131))] * 2
    assert [image.built for image in done.images] == [True, True]
    assert done.fillable == FRAMES - len(TWINS)
    yaozarrs.validate_zarr_store(str(run))
    require_planes(run)
    require_both_pyramids(run)
    assert check(run).findings == ()
    before = contents(run)
    assert not any(image.built or image.packed for image in finish(run).images)
    assert contents(run) == before


def test_level_pixels_lie_between_the_pixels_they_stand_for(run: Path) -> None:
    finish(run)
    group = json.loads((run / "0" / "zarr.json").read_bytes())["attributes"]["ome"]
    assert [d["coordinateTransformations"] for d in group["multiscales"][0]["datasets"][1:]] == [
        [
            {"type": "scale", "scale": [1.0, 1.0, 1.0, 1.0, 1.0]},
            {"type": "translation", "translation": [0.0, 0.0, 0.0, 0.25, 0.25]},
        ],
        [
            {"type": "scale", "scale": [1.0, 1.0, 1.0, 2.0, 2.0]},
            {"type": "translation", "translation": [0.0, 0.0, 0.0, 0.75, 0.75]},
        ],
    ]


def test_absent_planes_stay_absent(run: Path) -> None:
    finish(run, compress=True)
    assert (run / "1/0/c/0/0/0/0/0").exists()
    assert (run / "1/0/c/1/0/0/0/0").exists()
    assert not (run / "1/0/c/2/0/0/0/0").exists(), "the last stack has no twin"


def test_compressed_planes_are_the_same_to_every_reader(run: Path) -> None:
    before = sum(path.stat().st_size for path in (run / "0" / "0").iterdir())
    done = finish(run, compress=True)
    for image in done.images:
        assert image.packed
        assert image.compressed
        assert image.stored_bytes < 0.7 * image.plane_bytes
    after = sum(path.stat().st_size for path in (run / "0" / "0").rglob("*"))
    assert after < 0.7 * before
    yaozarrs.validate_zarr_store(str(run))
    require_planes(run)
    require_both_pyramids(run)
    assert check(run).findings == ()
    tensorstore: Any = pytest.importorskip("tensorstore")
    kvstore = {"driver": "file", "path": str(run / "0" / "0")}
    array = tensorstore.open({"driver": "zarr3", "kvstore": kvstore}).result().read().result()
    for seq in range(FRAMES):
        np.testing.assert_array_equal(array[seq // Z, 0, seq % Z], pixels(seq, SHAPE))

    before_again = contents(run)
    again = finish(run, compress=True)
    assert not any(image.built or image.packed for image in again.images)
    assert contents(run) == before_again


def test_compressed_later_than_built(run: Path) -> None:
    finish(run)
    done = finish(run, compress=True)
    assert [(image.built, image.packed) for image in done.images] == [(False, True)] * 2
    require_planes(run)
    require_both_pyramids(run)


def test_a_run_without_shards_is_finished_too(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("store.disk.has_sparse_files", lambda _folder: False)
    run = tmp_path / "run"
    write(run).close(complete=True, expected_frames=FRAMES)
    assert len(list((run / "0" / "0").glob("c.*"))) == FRAMES, "a file a plane"
    finish(run, compress=True)
    assert not list((run / "0" / "0").glob("c.*"))
    require_planes(run)
    require_both_pyramids(run)
    assert check(run).findings == ()


@pytest.mark.parametrize("compress", [False, True])
def test_a_plane_refocused_later_gets_its_place_in_the_pyramid(run: Path, compress: bool) -> None:
    finish(run, compress=compress)
    writer = RunWriter.reopen(run)
    number = writer.note_generator("0123456789abcdef", "fluorescence", "1.2", "openvino")
    writer.write_refocused(5, twin(5), Provenance(generator=number, latency_ns=1))
    writer.reseal()
    group = json.loads((run / "1" / "zarr.json").read_bytes())["attributes"]["ome"]
    assert len(group["multiscales"][0]["datasets"]) == 1, "the pyramid does not have the plane"
    yaozarrs.validate_zarr_store(str(run))
    np.testing.assert_array_equal(open_run(run).refocused(5), twin(5))

    done = finish(run, compress=compress)
    assert [image.built for image in done.images] == [False, True]
    twins = {(seq // Z, 0, seq % Z): twin(seq) for seq in (*TWINS, 5)}
    require_levels(run, 1, twins)
    yaozarrs.validate_zarr_store(str(run))


def test_recover_leaves_a_finished_run_alone(run: Path) -> None:
    finish(run, compress=True)
    before = contents(run)
    assert recover(run).done == ()
    assert contents(run) == before


def test_small_planes_need_no_pyramid(tmp_path: Path) -> None:
    writer = start(tmp_path / "run")
    writer.write_raw(frame(0, {}), {})
    writer.close(complete=True, expected_frames=1)
    before = contents(tmp_path / "run")
    (image,) = finish(tmp_path / "run").images
    assert (image.levels, image.built) == ((), False)
    assert contents(tmp_path / "run") == before


def test_an_empty_run_has_nothing_to_finish(tmp_path: Path) -> None:
    start(tmp_path / "run").close(complete=True, expected_frames=0)
    assert finish(tmp_path / "run", compress=True).images == ()


def test_a_live_run_and_one_never_sealed_are_refused(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    writer = write(tmp_path / "run")
    with pytest.raises(LockedError, match="another writer"):
        finish(tmp_path / "run")
    assert main(["finish", str(tmp_path / "run")]) == 4
    shutil.copytree(tmp_path / "run", tmp_path / "killed")
    writer.close(complete=True, expected_frames=FRAMES)
    before = contents(tmp_path / "killed")
    with pytest.raises(RunError, match="refocus recover"):
        finish(tmp_path / "killed", compress=True)
    assert contents(tmp_path / "killed") == before


def test_a_damaged_plane_is_never_copied(run: Path) -> None:
    bad = pixels(3, SHAPE).tobytes()
    (path,) = (p for p in list((run / "0/0").iterdir()) if bad in p.read_bytes())
    with path.open("r+b") as file:
        file.seek(path.read_bytes().find(bad) + 5)
        file.write(b"\xff\xff\xff")
    with pytest.raises(RunError, match=r"t1/c0/z1 is damaged; run `refocus recover`"):
        finish(run, compress=True)
    yaozarrs.validate_zarr_store(str(run))
    group = json.loads((run / "0" / "zarr.json").read_bytes())["attributes"]["ome"]
    assert len(group["multiscales"][0]["datasets"]) == 1


def test_a_full_disk_leaves_the_run_as_it_was(run: Path) -> None:
    before = contents(run)
    with file_size_limit(50_000), pytest.raises(RunError, match="the run is whole"):
        finish(run, compress=True)
    assert contents(run) == before
    finish(run, compress=True)
    require_planes(run)
    require_both_pyramids(run)


def test_too_little_room_is_said_first(run: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    before = contents(run)
    monkeypatch.setattr("shutil.disk_usage", lambda _path: type("Usage", (), {"free": 1000}))
    with pytest.raises(DiskError, match="are free"):
        finish(run)
    assert contents(run) == before


def test_a_copy_that_came_back_changed_replaces_nothing(
    run: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    put = packing.Packed.put

    def put_changed(self: packing.Packed, block: packing.Block, planes: packing.Planes) -> None:
        if self.path.name == ".0.partial":
            planes = planes + 1
        put(self, block, planes)

    monkeypatch.setattr(packing.Packed, "put", put_changed)
    with pytest.raises(RunError, match="came back changed"):
        finish(run, compress=True)
    require_planes(run)
    assert not list((run / "0").glob(".*"))


def killed_copies(run: Path, out: Path) -> list[Path]:
    """Of *run*, one for each file operation of `finish` that a kill came before."""
    said = subprocess.run(
        [sys.executable, HERE / "killed_finish.py", run, out, str(packing.SHARD_BYTES)],
        env=os.environ | {"PYTHONPATH": str(HERE.parent)},
        stdout=subprocess.PIPE,
        text=True,
        check=True,
    )
    copies = sorted(out.iterdir())
    assert len(copies) == int(said.stdout)
    return copies


@pytest.mark.skipif(not hasattr(os, "fork"), reason="needs fork")
@pytest.mark.parametrize(
    "step", [3, pytest.param(1, marks=pytest.mark.long)], ids=["every third", "every one"]
)
def test_killed_before_each_of_its_file_operations(tmp_path: Path, step: int) -> None:
    """One image is enough: each is finished by itself."""
    writer = start(tmp_path / "run")
    for seq in range(3):
        writer.write_raw(frame(seq, {"time": seq}, SHAPE), {})
    writer.close(complete=True, expected_frames=3)
    copies = killed_copies(tmp_path / "run", tmp_path / "killed")
    assert len(copies) > 30
    for copy in copies[::step]:
        yaozarrs.validate_zarr_store(str(copy))
        require_raw(copy, 3)
        finish(copy, compress=True)
        yaozarrs.validate_zarr_store(str(copy))
        require_raw(copy, 3)
        require_levels(copy, 0, {(seq, 0, 0): pixels(seq, SHAPE) for seq in range(3)})
        assert not list(copy.rglob(".*"))
        assert not list((copy / "0" / "0").glob("c.*"))


def test_the_command_says_what_it_did(run: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["finish", str(run), "--compress", "--json"]) == 0
    answer = json.loads(capsys.readouterr().out)
    assert [image["levels"] for image in answer["images"]] == [[[150, 261], [75, 131]]] * 2
    assert main(["finish", str(run)]) == 0
    said = capsys.readouterr().out
    assert "nothing to do" in said
    assert "0: 6 planes; smaller copies: 261x150, 131x75; compressed from" in said
    assert "note: 3 planes without a twin yet; after refocus fill, finish again" in said


@pytest.mark.parametrize("command", ["finish", "recover"])
def test_a_run_on_a_disk_that_is_read_only_is_one_line(
    tmp_path: Path, command: str, capsys: pytest.CaptureFixture[str]
) -> None:
    with small_disk(tmp_path / "disk", mib=16) as disk:
        write(disk / "run").close(complete=True, expected_frames=FRAMES)
        make_read_only(disk)
        assert main([command, str(disk / "run")]) == 1
    said = capsys.readouterr().err
    assert said.count("\n") == 1
    assert "cannot be written to" in said
    assert "make it writable" in said


@pytest.mark.parametrize("name", ["0/zarr.json", "0/0/zarr.json"])
@pytest.mark.parametrize("content", ["{", "{}"])
def test_torn_metadata_are_recovered_first(run: Path, name: str, content: str) -> None:
    (run / name).write_text(content)
    with pytest.raises(RunError, match="run `refocus recover`"):
        finish(run)
    assert recover(run).lost == 0
    finish(run)
    require_planes(run)


def test_a_level_that_is_gone_is_found_and_made_anew(
    run: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    finish(run)
    before = contents(run)
    shutil.rmtree(run / "0" / "1")
    monkeypatch.setitem(sys.modules, "yaozarrs", None)
    (finding,) = check(run).findings
    assert finding.startswith("0: smaller copies are listed and not there")
    assert any("refocus finish" in done for done in recover(run).done)
    assert not check(run).findings
    assert not recover(run).done
    finish(run)
    assert {name: content for name, (content, _) in contents(run).items()} == {
        name: content for name, (content, _) in before.items()
    }
    shutil.rmtree(run / "1" / "2")
    finish(run)
    assert not check(run).findings, "without recovering, too"
    assert contents(run).keys() == before.keys()
