"""`refocus bench` runs, and what it prints is what it measured. No test looks at a clock."""

import json
from pathlib import Path

import pytest

from refocus import bench
from refocus.cli.main import main
from tests import identity_package


def test_every_part_prints_its_figures(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    package = identity_package.make(tmp_path / "identity")
    for name, small in {
        "RAW_SHAPE": (128, 128),
        "WORKER_SHAPE": (64, 64),
        "WORKER_S": 0.3,
        "RAW_PLANES": 6,
        "HOOK_FRAMES": 10,
        "LATENCY_FRAMES": 5,
    }.items():
        monkeypatch.setattr(bench, name, small)
    arguments = ["--rounds", "2", "--folder", str(tmp_path), "--generator", str(package.folder)]
    assert main(["bench", "--json", *arguments]) == 0
    figures = json.loads(capsys.readouterr().out)
    assert all(set(figure) == {"name", "value", "unit", "reference", "ratio"} for figure in figures)
    by_name = {figure["name"]: figure for figure in figures}
    assert len(by_name) == len(figures) == 8
    for name in ("raw written, 2048² uint16", "worker loop, 1024²"):
        assert by_name[name]["ratio"] > 0
        assert by_name[name]["reference"] > 0
    assert [path.name for path in tmp_path.iterdir()] == ["identity"], "nothing is left behind"
    assert main(["bench", "--only", "raw", *arguments]) == 0
    assert "raw written" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["--folder", "nowhere"], "nowhere"),
        (["--rounds", "0"], "--rounds"),
        (["--only", "worker", "--engine", "none"], "no engine"),
        (["--only", "worker", "--generator", "nonsense"], "nonsense"),
    ],
)
def test_what_cannot_be_measured_is_said(
    capsys: pytest.CaptureFixture[str], arguments: list[str], words: str
) -> None:
    assert main(["bench", *arguments]) in (1, 2)
    assert words in capsys.readouterr().err
