"""The accuracy gate: a plan must prove itself before it touches anyone's plane.

A compiler that computes in FP16 chooses among many kernels, and a driver update may choose others.
So every plan, each time it is loaded, refocuses the package's golden planes, and its answers are
held against those of the float32 master, in camera counts as a user would see them. A plan that
fails is not used: recording goes on raw only, with the reason.

50 dB is far below what FP16 costs (see docs/model-package.md) and far above what anyone could see:
the error is 0.3 % of the plane's range, root mean square.
"""

import math
from collections.abc import Callable

import numpy as np

from engine.gpu import GpuError
from engine.package import Package, read_golden
from engine.scaling import Scaling
from refocus.errors import EngineError, PackageError
from refocus.frame import Pixels

LEAST_PSNR_DB = 50.0


def check_golden(
    package: Package, refocus: Callable[[Pixels, Scaling], Pixels], name: str
) -> float:
    """Lowest PSNR in dB over the golden planes of *package*, as *refocus* answers them.

    *name* is that of the runtime. Raises PackageError where an answer is below LEAST_PSNR_DB or is
    no picture.
    """
    lowest_db = math.inf
    for number, golden in enumerate(read_golden(package)):
        try:
            psnr_db = _psnr_db(refocus(golden.pixels, golden.scaling), golden.answer)
        except GpuError:
            raise  # says nothing about the plan
        except EngineError as error:
            raise _refused(package, name, f"fails on golden plane {number}: {error}") from error
        if not psnr_db >= LEAST_PSNR_DB:
            raise _refused(
                package,
                name,
                f"answers golden plane {number} at {psnr_db:.1f} dB against the float32 master, "
                f"wanted at least {LEAST_PSNR_DB:g} dB",
            )
        lowest_db = min(lowest_db, psnr_db)
    return lowest_db


def _psnr_db(got: Pixels, wanted: Pixels) -> float:
    """10 log10(range² / mean squared error) in counts; the range is that of *wanted*."""
    error = got.astype(np.float64) - wanted
    mean_square = float(np.mean(error**2))
    if mean_square == 0:
        return math.inf
    span = float(wanted.max()) - float(wanted.min())
    return 10 * math.log10(span**2 / mean_square) if span else -math.inf


def _refused(package: Package, name: str, why: str) -> PackageError:
    return PackageError(
        f"accuracy gate: {package.manifest.name} {package.manifest.version} on {name} {why}; this "
        "plan is not used. `refocus doctor` shows the versions; --engine openvino computes on the "
        "CPU"
    )
