"""convert.ptx, which ships, belongs to convert.cu, and every GPU we name can run it."""

import re
import shutil
import subprocess

import pytest

from tests import make_ptx

GPUS = (75, 80, 86, 87, 89, 90, 100, 103, 120, 121)


def nvcc() -> str:
    """Version of nvcc: "13.0"; skips where there is none."""
    if not shutil.which("nvcc"):
        pytest.skip("no nvcc here")
    said = subprocess.run(["nvcc", "--version"], check=True, capture_output=True, text=True).stdout
    found = re.search(r"V(\d+\.\d+\.\d+)", said)
    assert found
    return found[1]


def test_it_was_made_from_the_source_beside_it() -> None:
    assert make_ptx.PTX.read_text(encoding="ascii").startswith(make_ptx.made_from())


def test_it_is_what_nvcc_makes_of_the_source() -> None:
    version, shipped = nvcc(), make_ptx.PTX.read_text(encoding="ascii")
    if f"V{version}" not in shipped:
        pytest.skip(f"made by another nvcc than {version}")
    assert make_ptx.make() == shipped


@pytest.mark.parametrize("capability", GPUS)
def test_it_assembles_for_every_gpu(capability: int) -> None:
    if not shutil.which("ptxas"):
        pytest.skip("no ptxas here")
    known = subprocess.run(["ptxas", "--help"], check=True, capture_output=True, text=True).stdout
    if f"sm_{capability}" not in known:
        pytest.skip(f"this ptxas does not know sm_{capability}")
    command = ["ptxas", f"-arch=sm_{capability}", "-o", "/dev/null", str(make_ptx.PTX)]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr


def test_it_contracts_nothing_into_a_fused_multiply_add() -> None:
    assert not re.search(r"\b(fma|mad)\.(rn\.)?(ftz\.)?f32", make_ptx.PTX.read_text())
