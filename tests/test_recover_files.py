"""Recovering a run whose metadata, shard indices or planes were damaged, each and all of them."""

import json
import shutil
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import short_run
import zarr
from damaged_runs import ARRAYS, METADATA, flip, make_killed_and_sealed
from short_run import assert_readable, assert_recovers, snapshot
from store_runs import frame, start

from refocus.cli.main import main
from refocus.errors import RunError
from refocus.frame import RefocusOutcome
from store import disk
from store.check import check
from store.finish import finish
from store.grid import Grid, repair_index
from store.reader import State, open_run
from store.records import Kind
from store.recover import recover


@pytest.fixture(autouse=True)
def unsynced(monkeypatch: pytest.MonkeyPatch) -> None:
    """Waiting for the disk is most of what recovering takes, and only a power cut shows it."""
    monkeypatch.setattr(disk, "sync", lambda path: None)


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_killed_and_sealed(tmp_path_factory.mktemp("made"))


@pytest.fixture
def killed(made: Path, tmp_path: Path) -> Path:
    """A run of six frames, four with a twin, whose writer was killed after the last one."""
    return Path(shutil.copytree(made / "killed", tmp_path / "killed"))


@pytest.fixture
def sealed(made: Path, tmp_path: Path) -> Path:
    """The same run, complete."""
    return Path(shutil.copytree(made / "sealed", tmp_path / "sealed"))


TORN = {"empty": b"", "short": b'{"zarr_f', "zeros": bytes(700), "other": b'{"shape": [1]}'}


@pytest.mark.parametrize("name", METADATA)
def test_metadata_that_are_gone_or_torn_are_written_again(sealed: Path, name: str) -> None:
    before = snapshot(sealed)
    (sealed / name).unlink()
    assert check(sealed).findings
    assert_recovers(sealed)
    assert snapshot(sealed) == before
    for content in TORN.values():
        (sealed / name).write_bytes(content)
        assert recover(sealed).lost == 0
        assert snapshot(sealed).keys() == before.keys()
        assert (sealed / name).read_bytes() == before[Path(name)]


@pytest.mark.parametrize("name", ARRAYS)
@pytest.mark.parametrize(("right", "wrong"), [("uint16", "uint8"), ("37", "36"), ("5,", "1,")])
def test_an_array_that_says_something_else_hides_no_plane(
    sealed: Path, name: str, right: str, wrong: str
) -> None:
    path = sealed / name
    before = path.read_text()
    path.write_text(before.replace(right, wrong))
    assert recover(sealed).lost == 0
    assert path.read_text() == before
    assert_recovers(sealed)


@pytest.mark.parametrize("name", ARRAYS)
def test_an_array_that_says_another_shard_hides_no_plane(sealed: Path, name: str) -> None:
    before = snapshot(sealed)
    document = json.loads((sealed / name).read_bytes())
    document["chunk_grid"]["configuration"]["chunk_shape"][0] = 8
    (sealed / name).write_text(json.dumps(document))
    assert recover(sealed).lost == 0
    assert snapshot(sealed) == before


@pytest.mark.parametrize("content", TORN.values(), ids=TORN)
def test_all_metadata_at_once(sealed: Path, killed: Path, content: bytes) -> None:
    wanted = {name: (sealed / name).read_bytes() for name in METADATA}
    for run in (sealed, killed):
        for name in METADATA:
            (run / name).write_bytes(content)
        assert_recovers(run)
        assert {name: (run / name).read_bytes() for name in METADATA} == wanted
        assert_readable(run, [(Kind.RAW, seq) for seq in range(6)])


def index_of(run: Path) -> tuple[Path, int]:
    """A shard with two planes, and where its index begins."""
    path = run / "0/0/c.0.0.0.0.0"
    return path, 4 * 4096


INDEX_DAMAGE: dict[str, Callable[[bytes], bytes]] = {
    "flipped": lambda index: bytes([index[0] ^ 1]) + index[1:],
    "torn": lambda index: index[:20],
    "gone": lambda index: b"",
    "zeros": lambda index: bytes(len(index)),
    "empty": lambda index: Grid((24, 37), "uint16", 4, 1).empty_index().tobytes(),
}


@pytest.mark.parametrize("damage", INDEX_DAMAGE.values(), ids=INDEX_DAMAGE)
def test_a_shard_index_lists_what_was_acknowledged(
    sealed: Path, damage: Callable[[bytes], bytes]
) -> None:
    path, end = index_of(sealed)
    before = path.read_bytes()
    path.write_bytes(before[:end] + damage(before[end:]))
    report = check(sealed)
    assert any("2 acknowledged planes hidden" in found for found in report.findings)
    assert report.raw.damaged == 0
    assert_recovers(sealed)
    assert path.read_bytes() == before


def test_a_plane_that_nobody_acknowledged_is_taken_from_the_index(sealed: Path) -> None:
    path, _ = index_of(sealed)
    before = path.read_bytes()
    grid = Grid((24, 37), "uint16", 4, 1)
    repair_index(path, grid, range(4))
    report = check(sealed)
    assert not report.findings
    assert report.remarks == ("0/0/c.0.0.0.0.0: 2 planes listed that must not be",)
    assert_recovers(sealed)
    assert path.read_bytes() == before


def test_a_damaged_plane_becomes_absent(sealed: Path, capsys: pytest.CaptureFixture[str]) -> None:
    flip(sealed / "0/0/c.0.0.0.0.0", 2 * 4096)  # frame 1, raw
    flip(sealed / "1/0/c.0.1.0.0.0", 4096 + 9)  # frame 2, refocused
    assert main(["recover", str(sealed), "--json"]) == 1
    said = json.loads(capsys.readouterr().out)
    assert (said["lost"], said["saved"], said["refocused"]) == (2, 5, 3)
    assert "1 raw plane lost, which does not fit its checksum" in said["done"][0]
    assert said["done"][0].endswith("booked FAILED: frame 1")
    assert said["done"][1].endswith("booked FAILED: frame 2")
    run = assert_recovers(sealed)
    assert main(["recover", str(sealed)]) == 1, "they are still lost"
    assert run.raw(1) is None
    assert run.refocused(2) is None
    assert run.state == State.INCOMPLETE
    assert run.notes.seal is not None
    assert (run.notes.seal.expected_frames, run.notes.seal.note) == (6, "by hand")
    assert not np.any(zarr.open_array(sealed / "0/0", mode="r")[2, 0, 0])
    assert_readable(sealed, [(Kind.RAW, seq) for seq in (0, 2, 3, 4, 5)])


def test_a_shard_that_is_gone_costs_its_planes_only(sealed: Path) -> None:
    (sealed / "0/0/c.1.0.0.0.0").unlink()  # frame 3
    assert recover(sealed).lost == 1
    run = assert_recovers(sealed)
    assert run.counts.failed == 1
    assert run.refocused(3) is not None, "its twin is sound and stays"


def test_a_file_that_was_never_filled_reads_as_a_loss(killed: Path) -> None:
    """What a power cut leaves: the length is there, the bytes are not."""
    path = killed / "0/0/c.0.0.0.0.0"
    path.write_bytes(bytes(path.stat().st_size))
    recovery = recover(killed, verify=False)
    assert recovery.lost == 2
    assert_recovers(killed)


def test_what_is_durable_is_trusted_where_checksums_are_not_read(killed: Path) -> None:
    recover(killed)  # marks all of it durable
    flip(killed / "0/0/c.0.0.0.0.0", 0)
    before = snapshot(killed)
    assert recover(killed, verify=False).lost == 0
    assert snapshot(killed) == before
    (killed / "0/0/c.1.0.0.0.0").unlink()
    assert recover(killed, verify=False).lost == 1, "a file that is gone is seen"
    assert recover(killed).lost == 2


def test_a_shard_all_of_whose_planes_are_lost_stays_for_who_may_read_it(sealed: Path) -> None:
    path = sealed / "0/0/c.0.1.0.0.0"
    flip(path, 4096)
    assert recover(sealed).lost == 1
    assert_recovers(sealed)
    assert path.exists()


def test_a_run_without_shards(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """As on exFAT: every file is a plane that other programs see."""
    monkeypatch.setattr(disk, "has_sparse_files", lambda folder: False)
    run = start(tmp_path / "run")
    for seq in range(3):
        run.write_raw(frame(seq, {"time": seq}), {})
    path = Path(shutil.copytree(tmp_path / "run", tmp_path / "killed"))
    run.close(complete=True, expected_frames=3)
    flip(path / "0/0/c.0.0.0.0.0", 9)
    (path / "0/0/c.2.0.0.0.0").unlink()
    shutil.copy(path / "0/0/c.1.0.0.0.0", path / "0/0/c.5.0.0.0.0")
    (path / "0/0/zarr.json").unlink()
    assert recover(path).lost == 2
    run_found = assert_recovers(path)
    assert short_run.planes(run_found).keys() == {(Kind.RAW, 1)}
    names = sorted(found.name for found in (path / "0/0").iterdir())
    assert names == ["c.1.0.0.0.0", "lost.c.0.0.0.0.0", "lost.c.5.0.0.0.0", "zarr.json"]


def test_a_finished_run_is_left_as_it_is(tmp_path: Path) -> None:
    path = tmp_path / "run"
    run = start(path)
    for seq in range(3):
        run.write_raw(frame(seq, {"time": seq}, shape=(300, 310)), {})
        run.book_refocus(seq, RefocusOutcome.REJECTED, "not ours")
    run.close(complete=True, expected_frames=3)
    finish(path, compress=True)
    before = snapshot(path)
    assert not recover(path).done
    assert not check(path).findings
    assert snapshot(path) == before
    (path / "0/zarr.json").unlink()
    (path / "OME/METADATA.ome.xml").unlink()
    assert recover(path).lost == 0
    assert open_run(path).raw(2) is not None
    (path / "0/0/zarr.json").unlink()
    with pytest.raises(RunError, match="nothing else says how its planes are compressed"):
        recover(path)
