"""`refocus check`: whole runs pass, every kind of damage is found and said."""

import json
import os
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from store_runs import frame, pixels, start

from refocus.cli.main import main
from refocus.errors import RunError
from refocus.frame import RefocusOutcome
from store.check import check
from store.reader import State, open_run
from store.records import RECORD_BYTES
from store.recover import recover
from store.writer import Provenance, RunWriter

FRAMES = 4


@pytest.fixture
def run(tmp_path: Path) -> Path:
    """A sealed run: four raw planes, two with a twin, one skipped, one rejected."""
    writer = fill(start(tmp_path / "run"))
    writer.close(complete=True, expected_frames=FRAMES)
    return tmp_path / "run"


def fill(writer: RunWriter) -> RunWriter:
    made = Provenance(
        generator=writer.note_generator("0123456789abcdef", "fluorescence", "1.2", "openvino"),
        latency_ns=1,
    )
    for seq in range(FRAMES):
        writer.write_raw(frame(seq, {"time": seq}), {"seq": seq})
    writer.write_refocused(0, pixels(10), made)
    writer.write_refocused(3, pixels(13), made)
    writer.book_refocus(1, RefocusOutcome.SKIPPED, "busy")
    writer.book_refocus(2, RefocusOutcome.REJECTED, "pixel size")
    return writer


def as_json(path: Path, capsys: pytest.CaptureFixture[str]) -> tuple[int, dict[str, Any]]:
    code = main(["check", str(path), "--json"])
    answer: dict[str, Any] = json.loads(capsys.readouterr().out)
    return code, answer


def test_a_whole_run(run: Path, capsys: pytest.CaptureFixture[str]) -> None:
    before = {path: path.read_bytes() for path in run.rglob("*") if path.is_file()}
    assert as_json(run, capsys) == (
        0,
        {
            "state": "complete",
            "raw": {"acknowledged": 4, "readable": 4, "damaged": 0, "failed": 0},
            "refocus": {
                "refocused": 2,
                "skipped": 1,
                "late": 0,
                "lost": 0,
                "rejected": 1,
                "failed": 0,
            },
            "generator": "fluorescence 1.2 (0123456789ab)",
            "valid_ome_zarr": True,
            "findings": [],
            "notes": [],
        },
    )
    assert main(["check", str(run)]) == 0
    said = capsys.readouterr().out
    assert "complete" in said
    assert "4 saved, 4 read back unchanged, 0 damaged" in said
    assert {path: path.read_bytes() for path in run.rglob("*") if path.is_file()} == before


def plane(run: Path, image: int = 0) -> Path:
    return run / str(image) / "0" / "c.0.0.0.0.0"


def flip(path: Path, byte: int) -> None:
    content = bytearray(path.read_bytes())
    content[byte] ^= 0x10
    path.write_bytes(content)


DAMAGE: list[tuple[Callable[[Path], object], int, str]] = [
    (lambda run: flip(plane(run), 100), 1, "does not fit its checksum"),
    (lambda run: plane(run).unlink(), 4, "not there any more"),
    (lambda run: plane(run).write_bytes(b"short"), 4, "not there any more"),
    (lambda run: flip(plane(run), -20), 0, "4 acknowledged planes hidden"),
    (lambda run: (run / "OME/METADATA.ome.xml").write_text("<"), 0, "not as it should be"),
    (lambda run: (run / "0/0/zarr.json").write_text("{"), 4, "cannot be read as a run's array"),
    (lambda run: flip(plane(run, 1), 0), 0, "does not fit its checksum"),
    (lambda run: (run / "1/zarr.json").unlink(), 0, "not a valid OME-Zarr"),
    (lambda run: flip(run / "journal/outcomes.bin", 5 * RECORD_BYTES), 0, "record damaged"),
    (lambda run: (run / "journal/frames.jsonl").write_text("{}\n"), 0, "header and tags"),
    (lambda run: flip(run / "journal/run.jsonl", 0), 0, "1 line of the journal cannot be read"),
]


@pytest.mark.parametrize(("damage", "planes", "finding"), DAMAGE)
def test_damage_is_found(
    run: Path, damage: Callable[[Path], object], planes: int, finding: str
) -> None:
    damage(run)
    report = check(run)
    assert report.raw.damaged == planes
    assert report.raw.acknowledged == report.raw.readable + planes
    assert any(finding in found for found in report.findings), report.findings
    assert main(["check", str(run)]) == 1


def test_one_torn_file_is_one_finding_however_many_planes_it_costs(
    run: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (run / "0/0/zarr.json").write_text("{")
    code, answer = as_json(run, capsys)
    assert (code, answer["raw"]["readable"]) == (1, 0)
    (finding,) = (found for found in answer["findings"] if "frames 0, 1, 2, 3" in found)
    assert "0/0/zarr.json: cannot be read" in finding
    assert "run `refocus recover`" in finding
    assert main(["check", str(run)]) == 1
    lines = capsys.readouterr().out.splitlines()
    assert all(line.startswith("  ") for line in lines[1:])
    assert all(line[2] != " " for line in lines[1:]), "a finding is one line"


def test_a_killed_run_says_what_recovering_will_write(tmp_path: Path) -> None:
    writer = fill(start(tmp_path / "run"))
    shutil.copytree(tmp_path / "run", tmp_path / "killed")
    writer.close(complete=True, expected_frames=FRAMES)
    (said,) = (note for note in check(tmp_path / "killed").remarks if "not final" in note)
    assert "0/0/zarr.json" in said
    (done,) = (what for what in recover(tmp_path / "killed").done if "not as the planes" in what)
    assert said.partition(": ")[2] == done.partition(": ")[0]


def test_without_a_validator_it_says_so(
    run: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setitem(sys.modules, "yaozarrs", None)
    assert main(["check", str(run)]) == 0
    assert "not checked (yaozarrs is not installed)" in capsys.readouterr().out


def test_a_shape_that_hides_planes_is_found(run: Path) -> None:
    path = run / "0/0/zarr.json"
    path.write_bytes(path.read_bytes().replace(b"4,", b"1,", 1))
    assert check(run).raw.damaged == 3


def test_a_journal_that_is_none_is_one_finding(
    run: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    flip(run / "journal/outcomes.bin", 0)
    assert main(["check", str(run)]) == 1
    assert "not a journal's" in capsys.readouterr().err


def test_a_live_run_and_one_with_a_failed_frame(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    writer = fill(start(tmp_path / "run"))
    assert as_json(tmp_path / "run", capsys)[1]["state"] == "live"
    assert main(["check", str(tmp_path / "run")]) == 0
    writer.book_raw_failed(FRAMES, "the raw queue was full")
    writer.close(complete=True, expected_frames=FRAMES + 1)
    assert main(["check", str(tmp_path / "run")]) == 1
    said = capsys.readouterr().out
    assert "4 raw planes saved of 5" in said
    assert "1 raw frame not saved: 1 x the raw queue was full" in said


def test_torn_tails_are_said_and_are_no_loss(run: Path) -> None:
    for name in ("outcomes.bin", "frames.jsonl", "run.jsonl"):
        with (run / "journal" / name).open("ab") as file:
            file.write(b'{"to')
    report = check(run)
    assert not report.findings
    assert report.remarks == (
        "outcomes.bin: the last record is torn (4 bytes); it acknowledged nothing",
        "frames.jsonl: its end is torn (4 bytes); what it spoke of was never acknowledged",
        "run.jsonl: its end is torn (4 bytes); what it spoke of was never acknowledged",
    )


def test_a_frame_without_refocus_outcome_is_a_finding_once_the_run_is_closed(
    tmp_path: Path,
) -> None:
    writer = fill(start(tmp_path / "run"))
    writer.write_raw(frame(FRAMES, {"time": FRAMES}), {})
    assert not check(tmp_path / "run").findings, "its answer may be on its way"
    writer.close(complete=True, expected_frames=FRAMES + 1)
    assert open_run(tmp_path / "run").state == State.COMPLETE, "no raw frame is missing"
    (finding,) = check(tmp_path / "run").findings
    assert finding.startswith("1 frame has no refocus outcome")
    assert main(["check", str(tmp_path / "run")]) == 1


def test_an_empty_run(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    start(tmp_path / "run").close(complete=True, expected_frames=0)
    code, answer = as_json(tmp_path / "run", capsys)
    assert (code, answer["state"], answer["valid_ome_zarr"]) == (0, "empty", None)


@pytest.mark.parametrize(
    "names", [[], ["writer.lock"], ["writer.lock", "outcomes.bin", "frames.jsonl"]]
)
def test_a_writer_killed_while_it_made_its_files_leaves_an_empty_run(
    tmp_path: Path, names: list[str], capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "run" / "journal").mkdir(parents=True)
    for name in names:
        (tmp_path / "run" / "journal" / name).touch()
    assert open_run(tmp_path / "run").state == State.EMPTY
    assert not list(open_run(tmp_path / "run").frames())
    code, answer = as_json(tmp_path / "run", capsys)
    assert (code, answer["state"]) == (0, "empty")


@pytest.mark.parametrize("name", ["outcomes.bin", "run.jsonl"])
def test_a_run_that_lost_a_file_of_its_journal_is_not_called_empty(run: Path, name: str) -> None:
    (run / "journal" / name).unlink()
    said = "is gone: .* Put it back from a copy" if name == "outcomes.bin" else "cannot be read"
    with pytest.raises(RunError, match=said):
        open_run(run)


def test_a_lost_list_of_frames_is_a_finding(run: Path) -> None:
    (run / "journal" / "frames.jsonl").unlink()
    assert "4 saved frames have no readable line with header and tags" in check(run).findings


def test_no_run_is_a_usage_error(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    for path in (tmp_path, tmp_path / "nothing"):
        assert main(["check", str(path)]) == 2
        assert f"{path}: not a run" in capsys.readouterr().err


def test_an_output_that_nobody_reads_is_no_error(run: Path) -> None:
    """As behind `| head`."""
    read, write = os.pipe()
    os.close(read)
    command = [sys.executable, "-m", "refocus.cli.main", "check", str(run)]
    done = subprocess.run(command, stdout=write, stderr=subprocess.PIPE, check=False)
    os.close(write)
    assert (done.returncode, done.stderr) == (141, b"")


def test_a_command_says_its_exit_codes(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        main(["--help"])
    assert "3 the disk is too full" in " ".join(capsys.readouterr().out.split())
