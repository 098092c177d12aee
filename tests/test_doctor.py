"""`refocus doctor`: what is broken is a finding, and never takes down who asks."""

import json
import os
from pathlib import Path

import pytest

from engine import doctor
from engine.doctor import Finding, GpuFound, advise
from refocus.cli.main import main
from refocus.errors import SettingsError
from tests import fake_driver

ROOT = Path(__file__).parents[1]
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
    ("code", "words", "limit_s"),
    [
        ("import os, signal; os.kill(os.getpid(), signal.SIGSEGV)", "SIGSEGV", doctor.LIMIT_S),
        ("import os; os._exit(3)", "exit code 3", doctor.LIMIT_S),
        ("import time; time.sleep(600)", "hangs", SHORT_S),
        ("raise OSError('its library is missing')", "its library is missing", doctor.LIMIT_S),
    ],
)
def test_what_a_broken_library_does_is_said(
    code: str, words: str, limit_s: float, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with_library("openvino", code, tmp_path, monkeypatch)
    with pytest.raises(SettingsError, match="cannot be had") as caught:
        doctor.require("openvino", limit_s=limit_s)
    assert words in str(caught.value)


def test_nothing_can_refocus_is_exit_code_1(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    code = "print('hello from a library'); raise OSError('broken')"
    with_library("openvino", code, tmp_path, monkeypatch)
    assert main(["doctor"]) == 1
    out = capsys.readouterr().out
    assert "OSError: broken" in out
    assert "auto picks nothing" in out


def test_an_explicit_engine_that_cannot_be_had_is_refused_before_recording(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    with_library("openvino", "import os; os.abort()", tmp_path, monkeypatch)
    assert main(["demo", "--engine", "openvino", "--out", str(tmp_path / "run")]) == 2
    assert "SIGABRT" in capsys.readouterr().err
    assert not (tmp_path / "run").exists()


def test_a_gpu_is_found_through_the_driver_alone(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    driver = fake_driver.compiled()
    monkeypatch.setenv(fake_driver.FAKE_DRIVER, str(driver))
    # Each process that the doctor starts has a GPU from its first line on.
    code = "from tests import fake_driver; fake_driver.reset()"
    (tmp_path / "sitecustomize.py").write_text(code)
    monkeypatch.setenv("PYTHONPATH", os.pathsep.join([str(tmp_path), str(ROOT)]))
    report = doctor.examine()
    found = report.findings["NVIDIA GPU"]
    assert [one.memory_mib for one in found.gpus] == [fake_driver.MEMORY_BYTES >> 20]
    assert found.gpus[0].name in found.text
    assert found.cuda is not None
    assert f"CUDA {found.cuda[0]}.{found.cuda[1]}" in found.text
    for seam in ("pycuda", "cuda-bindings"):
        if report.findings[seam].text != "not installed":  # pycuda has to be compiled
            assert found.gpus[0].name in report.findings[seam].text
    assert report.can_refocus
    with pytest.raises(SettingsError, match="no GPU 1"):
        doctor.require("tensorrt", device=1)


def gpu(name: str, capability: tuple[int, int], cuda: tuple[int, int] = (13, 0)) -> Finding:
    one = GpuFound(index=0, name=name, capability=capability, memory_mib=12_000)
    return Finding(found=True, text="", gpus=[one], cuda=cuda)


@pytest.mark.parametrize(
    ("found", "there", "words"),
    [
        (ABSENT, [], ["driver", "nvidia.com"]),
        (gpu("RTX 4070", (8, 9)), [], ['pip install -e ".[rtx]"']),
        (gpu("H200", (9, 0)), ["TensorRT-RTX"], ['pip install -e ".[tensorrt]"']),
        (gpu("RTX 4070", (8, 9)), ["TensorRT-RTX"], ["to reach", 'pip install -e ".[rtx]"']),
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
