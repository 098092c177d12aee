"""No rubbish leaves the engine.

A broken network does not crash: it answers NaN, or one grey level everywhere. These checks turn
that into an EngineError, so that it becomes a FAILED outcome in the journal and never pixels on
disk. They cost two reductions per plane (0.2 ms at 1024², measured), so they always run.

A runtime calls `check_answer` before the answer becomes counts (afterwards a NaN is just a number),
and whoever holds a runtime calls `check_plane` on what it returned.
"""

import math

from refocus.errors import EngineError
from refocus.frame import Pixels


def check_answer(raw: Pixels, lowest: float, highest: float) -> None:
    """Raise EngineError unless a network's answer to *raw* can be a picture.

    *lowest* and *highest* are the extremes of the answer in network range; numpy's are NaN where
    any value is. A constant answer is fine only for a constant plane.
    """
    if not (math.isfinite(lowest) and math.isfinite(highest)):
        raise EngineError(
            f"the network answered non-finite values (range {lowest} to {highest}); "
            "the plane is kept raw; check the model package"
        )
    if lowest == highest and raw.min() != raw.max():
        raise EngineError(
            f"the network answered {lowest:g} everywhere to a plane that is not constant; "
            "the plane is kept raw; check the model package"
        )


def check_plane(raw: Pixels, refocused: Pixels) -> None:
    """Raise EngineError unless *refocused* has the shape and dtype of *raw*."""
    if refocused.shape != raw.shape or refocused.dtype != raw.dtype:
        raise EngineError(
            f"the runtime answered {refocused.dtype} {refocused.shape}, wanted {raw.dtype} "
            f"{raw.shape} as in the raw plane; the plane is kept raw"
        )
