"""`refocus doctor`: what is broken is a finding, and never takes down who asks."""

import json
from pathlib import Path

import pytest

from engine import doctor
from engine.doctor import Finding, GpuFound, advise
from refocus.cli.main import main
from refocus.errors import SettingsError

SHORT_S = 3.0
ABSENT = Finding(found=False, text="")
THERE = Finding(found=True, text="")


def with_library(name: str, code: str, folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Child processes find a library *name* that runs *code* when it is imported."""
    (folder / f"{name}.py").write_text(code)
    monkeypatch.setenv("PYTHONPATH", str(folder))


def test_the_cpu_is_enough(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["doctor", "--json"]) == 0
    report = json.loads(capsys.readouterr().out)
    assert report["can_refocus"]
    assert report["findings"]["OpenVINO, CPU"]["text"].startswith("openvino ")
    assert set(report["findings"]) == set(doctor.PARTS) - {"auto"}
    assert report["advice"]


def test_one_line_for_each_part(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["doctor"]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert [line[: line.index("  ")] for line in lines[:-1]] == [
        *(part for part in doctor.PARTS if part != "auto"),
        "auto picks",
    ]
    assert all("Traceback" not in line for line in lines)


@pytest.mark.parametrize(
    ("code", "words"),
    [
        ("import os, signal; os.kill(os.getpid(), signal.SIGSEGV)", "SIGSEGV"),
        ("import os; os._exit(3)", "exit code 3"),
        ("import time; time.sleep(600)", "hangs"),
        ("raise OSError('its library is missing')", "OSError: its library is missing"),
    ],
)
def test_a_broken_library_is_a_finding_and_nothing_can_refocus(
    code: str,
    words: str,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    with_library("openvino", code, tmp_path, monkeypatch)
    monkeypatch.setattr(doctor, "LIMIT_S", SHORT_S)
    report = doctor.examine(SHORT_S)
    assert not report.can_refocus
    assert words in report.findings["OpenVINO, CPU"].text
    with pytest.raises(SettingsError, match="cannot be had") as caught:
        doctor.require("openvino", SHORT_S)
    assert words in str(caught.value)


def test_a_library_may_print_what_it_likes(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    code = "print('hello from a library'); raise OSError('broken')"
    with_library("openvino", code, tmp_path, monkeypatch)
    assert doctor.examine().findings["OpenVINO, CPU"].text == "OSError: broken"


def test_nothing_can_refocus_is_exit_code_1(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    with_library("openvino", "raise OSError('broken')", tmp_path, monkeypatch)
    assert main(["doctor"]) == 1
    assert "auto picks nothing" in capsys.readouterr().out


def test_an_explicit_engine_that_cannot_be_had_is_refused_before_recording(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    with_library("openvino", "import os; os.abort()", tmp_path, monkeypatch)
    assert main(["demo", "--engine", "openvino", "--out", str(tmp_path / "run")]) == 2
    assert "SIGABRT" in capsys.readouterr().err
    assert not (tmp_path / "run").exists()


def gpu(name: str, capability: tuple[int, int], cuda: tuple[int, int] = (13, 0)) -> Finding:
    one = GpuFound(index=0, name=name, capability=capability, memory_mib=12_000)
    return Finding(found=True, text="", gpus=[one], cuda=cuda)


@pytest.mark.parametrize(
    ("found", "there", "words"),
    [
        (ABSENT, [], ["driver", "nvidia.com"]),
        (gpu("RTX 4070", (8, 9)), [], ['pip install "refocus[rtx]"']),
        (gpu("H200", (9, 0)), ["TensorRT-RTX"], ['pip install "refocus[tensorrt]"']),
        (gpu("RTX 4070", (8, 9)), ["TensorRT-RTX"], ["to reach", 'pip install "refocus[rtx]"']),
        (gpu("RTX 4070", (8, 9)), ["TensorRT", "pycuda"], ["nothing has to be installed"]),
        (gpu("RTX 4070", (8, 9), (12, 4)), ["TensorRT-RTX", "pycuda"], ["update", "12.4", "580"]),
    ],
)
def test_what_to_do(found: Finding, there: list[str], words: list[str]) -> None:
    findings = {part: THERE if part in there else ABSENT for part in doctor.PARTS}
    findings |= {"auto": THERE, "OpenVINO, CPU": THERE}
    advice = advise({**findings, "NVIDIA GPU": found})
    assert len(advice) == 1
    for word in words:
        assert word in advice[0]


def test_what_to_do_about_a_gpu_that_takes_auto_down() -> None:
    findings = dict.fromkeys(doctor.PARTS, THERE) | {"auto": ABSENT}
    assert "--engine openvino" in advise({**findings, "NVIDIA GPU": gpu("RTX 4070", (8, 9))})[0]
