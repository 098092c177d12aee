"""Opening a GPU: through which door, and what is said where there is none."""

import subprocess
import sys
from collections.abc import Iterator

import pytest

import engine.gpu
from engine.gpu import NoGpuError, Seam, open_gpu
from tests import fake_driver


@pytest.fixture(params=["pycuda", "cuda-bindings"])
def seam(request: pytest.FixtureRequest) -> Iterator[Seam]:
    with fake_driver.plugged_in():
        pytest.importorskip("pycuda" if request.param == "pycuda" else "cuda.bindings")
        yield request.param


def test_no_gpu_behind_the_driver(seam: Seam) -> None:
    fake_driver.reset(plugged_in=False)
    with pytest.raises(NoGpuError, match=r"finds no GPU that it can use: .*no CUDA"):
        open_gpu(0, seam)


def test_one_door_is_enough() -> None:
    """Where pycuda is not to be had, cuda-bindings are taken."""
    pytest.importorskip("cuda.bindings")
    with fake_driver.plugged_in(), pytest.MonkeyPatch.context() as patch:
        patch.setitem(sys.modules, "pycuda", None)
        patch.delitem(sys.modules, "engine.gpu.pycuda_driver", raising=False)
        with open_gpu() as gpu:
            assert gpu.seam.startswith("cuda-bindings ")
        with pytest.raises(NoGpuError, match="pycuda is not installed"):
            open_gpu(seam="pycuda")


def test_a_gpu_that_is_not_there(seam: Seam, monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(NoGpuError, match=r"there is no GPU 99; this machine has 0: \w+"):
        open_gpu(99, seam)
    monkeypatch.setattr(engine.gpu, "OLDEST", (99, 0))
    with pytest.raises(NoGpuError, match=r"has compute capability \d+\.\d; Refocus needs 99\.0"):
        open_gpu(0, seam)


def python(code: str) -> str:
    """What a fresh process, that has loaded no driver, prints."""
    ran = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert ran.returncode == 0, ran.stderr
    return ran.stdout


def test_nothing_is_loaded_before_a_gpu_is_opened() -> None:
    loaded = python("import engine, engine.gpu, engine.gpu.convert, sys; print(*sys.modules)")
    assert {"pycuda", "cuda"}.isdisjoint(loaded.split())


WITHOUT = """
import ctypes, sys
from engine.gpu import LIBRARY, NoGpuError, open_gpu
try:
    ctypes.CDLL(LIBRARY)
    print("has a driver")
except OSError:
    try:
        open_gpu()
    except NoGpuError as error:
        print(error)
"""


def test_without_a_driver_it_says_what_to_install() -> None:
    said = python(WITHOUT)
    if said.startswith("has a driver"):
        pytest.skip("this machine has NVIDIA's driver")
    assert said.startswith("no NVIDIA GPU can be used without NVIDIA's driver")
    assert engine.gpu.LIBRARY in said
    assert "nvidia.com/drivers" in said
    assert "pip install" not in said, "no package helps here"


def test_without_a_binding_it_says_what_to_install(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(fake_driver.FAKE_DRIVER, str(fake_driver.compiled()))
    said = python(
        "import sys; from tests import fake_driver; from engine.gpu import NoGpuError, open_gpu\n"
        "fake_driver.load(); sys.modules['pycuda'] = sys.modules['cuda'] = None\n"
        "try: open_gpu()\n"
        "except NoGpuError as error: print(error)"
    )
    assert "pycuda is not installed" in said
    assert "cuda-bindings is not installed" in said
    assert 'pip install -e ".[rtx]"' in said
