"""`refocus recover`: whatever was damaged, the run is whole again; what cannot be had is absent."""

import json
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np
import pytest
import short_run
import zarr
from short_run import assert_open_to_all, assert_readable, assert_recovers, snapshot
from store_runs import frame, start

from refocus.cli.main import main
from refocus.errors import LockedError, RunError
from refocus.frame import RawOutcome, RefocusOutcome
from store import disk, durable, shards
from store.check import check
from store.journal import EventLine
from store.layout import RunInfo
from store.reader import State, open_run
from store.records import RECORD_BYTES, Kind
from store.recover import NO_ANSWER, NO_PLANE, NO_RAW, recover
from store.writer import RunWriter

OUTCOMES, FRAMES, LINES = "journal/outcomes.bin", "journal/frames.jsonl", "journal/run.jsonl"
ARRAYS = ("0/0/zarr.json", "1/0/zarr.json", "2/0/zarr.json", "3/0/zarr.json")
METADATA = (
    *ARRAYS,
    "0/zarr.json",
    "1/zarr.json",
    "2/zarr.json",
    "3/zarr.json",
    "OME/zarr.json",
    "OME/METADATA.ome.xml",
    "zarr.json",
)


@pytest.fixture(autouse=True)
def unsynced(monkeypatch: pytest.MonkeyPatch) -> None:
    """Waiting for the disk is most of what recovering takes, and only a power cut shows it."""
    monkeypatch.setattr(disk, "sync", lambda path: None)


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    """The short run: as its writer had it after the last frame, and sealed."""
    folder = tmp_path_factory.mktemp("made")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(shards, "SHARD_BYTES", short_run.SHARD_BYTES)
        patch.setattr(durable, "PAUSE_S", 3600.0)  # no mark among the records
        run = start(folder / "sealed", pixel_um=0.1)
        generator = run.note_generator("hash", "identity", "1", "numpy")
        for seq in range(len(short_run.FRAMES)):
            short_run.write_frame(run, seq, generator, lambda _: None)
        shutil.copytree(folder / "sealed", folder / "killed")
        run.close(complete=True, expected_frames=len(short_run.FRAMES), note="by hand")
        yield folder


@pytest.fixture
def killed(made: Path, tmp_path: Path) -> Path:
    """A run whose writer was killed between two frames."""
    return Path(shutil.copytree(made / "killed", tmp_path / "killed"))


@pytest.fixture
def sealed(made: Path, tmp_path: Path) -> Path:
    """A complete run of six frames, four with a twin."""
    return Path(shutil.copytree(made / "sealed", tmp_path / "sealed"))


def flip(path: Path, byte: int) -> None:
    content = bytearray(path.read_bytes())
    content[byte] ^= 0x10
    path.write_bytes(content)


def append(path: Path, content: bytes) -> None:
    with path.open("ab") as file:
        file.write(content)


def test_a_sound_run_is_left_as_it_is(sealed: Path, capsys: pytest.CaptureFixture[str]) -> None:
    before = snapshot(sealed)
    for arguments in ([], ["--no-verify"]):
        assert main(["recover", str(sealed), *arguments]) == 0
        assert "nothing had to be done" in capsys.readouterr().out
    assert snapshot(sealed) == before


def test_a_killed_run_becomes_what_a_sealed_one_is(killed: Path, sealed: Path) -> None:
    run = assert_recovers(killed)
    for name in METADATA:
        assert (killed / name).read_bytes() == (sealed / name).read_bytes()
    assert run.state == State.INCOMPLETE, "nobody knows whether more frames were to come"
    assert run.notes.seal is not None
    assert "recovered" in run.notes.seal.note
    assert (run.counts.saved, run.counts.refocused) == (6, 4)


def test_frames_and_answers_that_came_too_late_are_booked(killed: Path) -> None:
    path = killed / OUTCOMES
    path.write_bytes(path.read_bytes()[: -2 * RECORD_BYTES])  # frame 5: its plane and its twin
    run = assert_recovers(killed)
    raw, twin = run.record(5, Kind.RAW), run.record(5, Kind.REFOCUS)
    assert raw is not None
    assert twin is not None
    assert (raw.outcome, run.reason(raw)) == (RawOutcome.FAILED, NO_PLANE)
    assert (twin.outcome, run.reason(twin)) == (RefocusOutcome.FAILED, NO_RAW)
    path.write_bytes(path.read_bytes()[: -4 * RECORD_BYTES])
    assert_recovers(killed)

    (recovered,) = [r for r in open_run(killed).records(Kind.REFOCUS) if r.seq == 5]
    assert recovered.outcome == RefocusOutcome.FAILED


def test_a_frame_without_an_answer_is_lost(killed: Path) -> None:
    path = killed / OUTCOMES
    path.write_bytes(path.read_bytes()[:-RECORD_BYTES])
    recovery = recover(killed)
    assert recovery.lost == 0, "its twin was never acknowledged"
    run = open_run(killed)
    record = run.record(5, Kind.REFOCUS)
    assert record is not None
    assert (record.outcome, run.reason(record)) == (RefocusOutcome.LOST, NO_ANSWER)
    assert_open_to_all(killed, exactly=True)


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
    "empty": lambda index: shards.Grid((24, 37), "uint16", 4, 1).empty_index().tobytes(),
}


@pytest.mark.parametrize("damage", INDEX_DAMAGE.values(), ids=INDEX_DAMAGE)
def test_a_shard_index_lists_what_was_acknowledged(
    sealed: Path, damage: Callable[[bytes], bytes]
) -> None:
    path, end = index_of(sealed)
    before = path.read_bytes()
    path.write_bytes(before[:end] + damage(before[end:]))
    report = check(sealed)
    assert any("2 acknowledged planes are hidden" in found for found in report.findings)
    assert report.raw.damaged == 0
    assert_recovers(sealed)
    assert path.read_bytes() == before


def test_a_plane_that_nobody_acknowledged_is_taken_from_the_index(sealed: Path) -> None:
    path, _ = index_of(sealed)
    before = path.read_bytes()
    grid = shards.Grid((24, 37), "uint16", 4, 1)
    shards.repair_index(path, grid, range(4))
    report = check(sealed)
    assert not report.findings
    assert report.remarks == ("0/0/c.0.0.0.0.0: 2 planes are listed that nobody acknowledged",)
    assert_recovers(sealed)
    assert path.read_bytes() == before


def test_a_damaged_plane_becomes_absent(sealed: Path, capsys: pytest.CaptureFixture[str]) -> None:
    flip(sealed / "0/0/c.0.0.0.0.0", 2 * 4096)  # frame 1, raw
    flip(sealed / "1/0/c.0.1.0.0.0", 4096 + 9)  # frame 2, refocused
    assert main(["recover", str(sealed), "--json"]) == 1
    said = json.loads(capsys.readouterr().out)
    assert (said["lost"], said["saved"], said["refocused"]) == (2, 5, 3)
    assert "does not fit its checksum" in said["done"][0]
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


def test_leftovers_are_removed_and_nothing_else(sealed: Path) -> None:
    before = snapshot(sealed)
    leftovers = [
        *("0/.zarr.json.partial", "journal/.probe.partial", ".zarr.json.partial"),
        *("0/0/c.9.0.0.0.0", "3/0/c.0.1.0.0.0", "4/zarr.json", "5/0/zarr.json"),
    ]
    for name in leftovers:
        (sealed / name).parent.mkdir(parents=True, exist_ok=True)
        (sealed / name).write_bytes(b"\0")
    (sealed / "notes.txt").write_text("mine")
    (sealed / "0/.1.partial").mkdir()  # finish was at work
    remarks = check(sealed).remarks
    assert len(remarks) == 7
    assert all("nothing needs it" in remark for remark in remarks)
    assert len(recover(sealed).done) == 7
    mine = {Path("notes.txt"): b"mine", Path("0/.1.partial"): None}
    assert snapshot(sealed) == before | mine


def test_a_shard_all_of_whose_planes_are_lost_stays_for_who_may_read_it(sealed: Path) -> None:
    path = sealed / "0/0/c.0.1.0.0.0"
    flip(path, 4096)
    assert recover(sealed).lost == 1
    assert_recovers(sealed)
    assert path.exists()


def test_a_run_that_is_being_written_is_refused(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    run = start(tmp_path / "run")
    run.write_raw(frame(0, {"time": 0}), {})
    before = snapshot(tmp_path / "run" / "journal")
    with pytest.raises(LockedError):
        recover(tmp_path / "run")
    assert main(["recover", str(tmp_path / "run")]) == 4
    assert snapshot(tmp_path / "run" / "journal") == before
    run.close(complete=True, expected_frames=1)


def test_no_run_is_a_usage_error(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["recover", str(tmp_path)]) == 2
    with pytest.raises(RunError, match="not a run"):
        recover(tmp_path)
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("names", [[], ["writer.lock", "outcomes.bin", "frames.jsonl"]])
def test_a_run_that_was_never_born_stays_empty(tmp_path: Path, names: list[str]) -> None:
    folder = tmp_path / "run" / "journal"
    folder.mkdir(parents=True)
    for name in {*names, "writer.lock"}:
        (folder / name).touch()
    before = snapshot(tmp_path / "run")
    assert recover(tmp_path / "run").state == State.EMPTY
    assert snapshot(tmp_path / "run") == before


def test_an_empty_run_is_sealed(tmp_path: Path) -> None:
    info = RunInfo(run_id="test", created_wall_ns=1, version="0")
    run = RunWriter.create(tmp_path / "run", info)
    shutil.copytree(tmp_path / "run", tmp_path / "killed")
    run.close(complete=True, expected_frames=0)
    assert assert_recovers(tmp_path / "killed").state == State.EMPTY
    assert [path.name for path in (tmp_path / "killed").iterdir()] == ["journal"]


def test_notes_after_the_seal_stay(sealed: Path) -> None:
    append(sealed / LINES, json.dumps({"kind": "event", "wall_ns": 1, "event": "x"}).encode())
    lines = len((sealed / LINES).read_bytes().splitlines())
    recover(sealed)
    assert len((sealed / LINES).read_bytes().splitlines()) == lines - 1, "it was never whole"
    line = json.dumps({"kind": "event", "wall_ns": 1, "event": "x", "fields": {}}) + "\n"
    append(sealed / LINES, line.encode())
    before = snapshot(sealed)
    assert not recover(sealed).done
    assert snapshot(sealed) == before
    assert open_run(sealed).notes.events[-1] == EventLine(1, "x", {})


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
