"""`refocus build`: real plans, built here without a GPU."""

import json
from pathlib import Path

import pytest

from engine.runtimes.tensorrt import TensorRt
from refocus.cli.main import main
from tests import fake_driver, identity_package, played_tensorrt
from tests.played_tensorrt import Played

SMALL = ["build", "--shape", "64x64"]


@pytest.fixture(autouse=True)
def _own_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("tensorrt_rtx", reason="TensorRT for RTX is not installed")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))


def test_a_plan_is_built_once_and_said_where_it_lies(capsys: pytest.CaptureFixture[str]) -> None:
    assert main([*SMALL, "--json"]) == 0
    (first,) = json.loads(capsys.readouterr().out)
    assert first["built_s"] > 0
    assert Path(first["path"]).stat().st_size / 2**20 == pytest.approx(first["mib"], abs=0.1)
    assert first["most"] == [512, 512]
    assert main([*SMALL, "--json"]) == 0
    (second,) = json.loads(capsys.readouterr().out)
    assert second == {**first, "built_s": 0.0}


def test_the_line_says_for_which_gpus(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(SMALL) == 0
    out = capsys.readouterr().out
    for words in ("fluorescence 1.0", "tensorrt_rtx", "8.0 or higher", "512 x 512", "built in"):
        assert words in out
    assert main(SMALL) == 0
    assert "there already" in capsys.readouterr().out


def test_sizes_of_one_plan_are_built_once(capsys: pytest.CaptureFixture[str]) -> None:
    assert main([*SMALL, "--shape", "300x512", "--json"]) == 0
    assert len(json.loads(capsys.readouterr().out)) == 1


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["--generator", "nonsense"], "nonsense"),
        (["--config", "nowhere.toml"], "nowhere.toml"),
    ],
)
def test_what_cannot_be_built_is_said(
    arguments: list[str], words: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main([*SMALL, *arguments]) == 2
    assert words in capsys.readouterr().err


@pytest.mark.parametrize("text", ["2048", "x", "0x64", "-1x64", "axb"])
def test_a_wrong_size_is_refused(text: str, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as caught:
        main(["build", f"--shape={text}"])
    assert caught.value.code == 2
    assert "2048x2048" in capsys.readouterr().err


def test_a_toolkit_that_is_not_there_is_exit_code_2_and_how_to_install_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "tensorrt.py").write_text("raise ImportError('its library is missing')")
    monkeypatch.syspath_prepend(str(tmp_path))
    assert main([*SMALL, "--toolkit", "tensorrt"]) == 2
    said = capsys.readouterr().err
    assert "its library is missing" in said
    assert ".[tensorrt]" in said


def test_with_a_gpu_the_plan_is_proven_as_well(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    package = identity_package.make(tmp_path / "identity")
    played = Played(played_tensorrt.master(package))
    defaults = TensorRt.__init__.__kwdefaults__
    assert defaults is not None
    monkeypatch.setitem(defaults, "open_executable", played.open)
    with fake_driver.plugged_in():
        assert main([*SMALL, "--generator", str(package.folder)]) == 0
        assert not fake_driver.alive()
    said = capsys.readouterr()
    assert "Fake GPU" in said.out
    assert "accuracy gate" in said.err
    assert played.is_closed
    assert len(played.plans[0]) > 1000
