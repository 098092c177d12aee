"""Makes engine/gpu/convert.ptx from convert.cu: `python -m tests.make_ptx`, where nvcc is.

nvcc stamps its own, newest PTX version on the file, and a driver refuses what is newer than itself.
The kernels use nothing of it: the file is stamped with the oldest version that knows its target,
compute capability 7.5, and every driver since 2018 loads it. ptxas has the last word
(tests/test_gpu_ptx.py).
"""

import hashlib
import re
import subprocess
from pathlib import Path

KERNELS = Path(__file__).parents[1] / "engine" / "gpu"
SOURCE, PTX = KERNELS / "convert.cu", KERNELS / "convert.ptx"
TARGET = 75
VERSION = "6.3"


def make() -> str:
    """The text of convert.ptx; nvcc has to be there."""
    told = subprocess.run(
        ["nvcc", "-ptx", "-O3", f"-arch=compute_{TARGET}", "-o", "/dev/stdout", str(SOURCE)],
        check=True,
        capture_output=True,
        text=True,
    ).stdout
    body, stamped = re.subn(r"(?m)^\.version .*$", f".version {VERSION}", told)
    assert stamped == 1, f"nvcc's answer has {stamped} lines with .version; wanted one"
    return f"{made_from()}{body}"


def made_from() -> str:
    """First line of convert.ptx: which source it belongs to."""
    digest = hashlib.sha256(SOURCE.read_bytes()).hexdigest()
    return f"// convert.cu sha256 {digest}, by tests/make_ptx.py\n"


if __name__ == "__main__":
    PTX.write_text(make(), encoding="ascii")
