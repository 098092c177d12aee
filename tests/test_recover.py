"""`refocus recover`: whatever was damaged, the run is whole again; what cannot be had is absent."""

import json
import shutil
from pathlib import Path

import pytest
from damaged_runs import METADATA, append, make_killed_and_sealed
from short_run import assert_open_to_all, assert_recovers, snapshot
from store_runs import frame, start

from refocus.cli.main import main
from refocus.errors import LockedError, RunError
from refocus.frame import RawOutcome, RefocusOutcome
from store import disk
from store.check import check
from store.journal import EventLine
from store.layout import RunInfo
from store.reader import State, open_run
from store.records import RECORD_BYTES, Kind
from store.recover import NO_ANSWER, NO_PLANE, NO_RAW, recover
from store.writer import RunWriter

OUTCOMES, FRAMES, LINES = "journal/outcomes.bin", "journal/frames.jsonl", "journal/run.jsonl"


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
