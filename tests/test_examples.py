"""The scripts in docs/ do what docs/ says."""

import os
import subprocess
import sys
import textwrap
from pathlib import Path

import numpy as np
import pytest
import zarr

from engine.gate import LEAST_PSNR_DB, check_golden
from engine.package import load, read_golden
from engine.runtimes import open_runtime

DOCS = Path(__file__).parents[1] / "docs"
SCRIPT = DOCS / "examples" / "record_timelapse.py"


@pytest.fixture(scope="module")
def recorded(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, str]:
    """Folder of the run that the example made on Micro-Manager's demo devices, and its words."""
    from mm_test_adapters import device_adapter_path

    devices = Path(device_adapter_path())
    folder = tmp_path_factory.mktemp("example")
    (folder / "config.toml").write_text('[engine]\nruntime = "none"\n')
    arguments = ["run", "--micromanager", devices, "--config", devices / "MMConfig_demo.cfg"]
    done = subprocess.run(
        [sys.executable, "-W", "error", SCRIPT, *arguments],
        cwd=folder,
        env=os.environ | {"PYTHONPATH": os.pathsep.join(sys.path)},
        capture_output=True,
        text=True,
        timeout=60,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    return folder / "run", done.stdout


def test_the_recorder_example_records_every_frame(recorded: tuple[Path, str]) -> None:
    run, said = recorded
    assert "30 raw and 0 refocused planes in run" in said
    raw = zarr.open_group(run, mode="r")["0/0"]
    assert raw.shape == (3, 2, 5, 512, 512)
    flat = [plane for plane in raw[:].reshape(-1, 512, 512) if plane.min() == plane.max()]
    assert not flat, "the demo camera's waves fill every plane"
    lines = (run / "journal" / "frames.jsonl").read_text().splitlines()
    assert len(lines) == 30


def test_the_page_shows_the_lines_of_the_example() -> None:
    page = (DOCS / "recorder.md").read_text()
    shown = page.split("```python\n")[1].split("```")[0]
    assert textwrap.indent(shown, "    ") in SCRIPT.read_text()  # there it stands in a function


def test_a_network_of_ones_own_becomes_a_package_that_runs(tmp_path: Path) -> None:
    folder = tmp_path / "sharpen"
    script = DOCS / "examples" / "own_generator.py"
    done = subprocess.run(
        [sys.executable, script, folder],
        env=os.environ | {"PYTHONPATH": os.pathsep.join(sys.path)},
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    package = load(folder)
    (golden,) = read_golden(package)
    runtime = open_runtime("openvino", threads=1)
    runtime.load(package, golden.pixels.shape)
    answer = runtime.refocus(golden.pixels, golden.scaling)
    runtime.close()
    assert np.std(answer.pixels) > np.std(golden.pixels)
    assert check_golden(package, lambda *_: answer.pixels, "the CPU") > LEAST_PSNR_DB
