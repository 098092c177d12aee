"""Smaller copies of a plane, for viewers that show an overview before the detail.

Each level halves the one before it by the mean of 2x2 pixels. An odd last row or column counts
twice, so no pixel is left out and a level has ceil(side / 2) pixels. Mean pixels lie between the
pixels they stand for, hence the translation beside the scale (NGFF 0.4 and 0.5, multiscales).
"""

from typing import Any

import numpy as np

from refocus.frame import Pixels

SMALLEST_PX = 256
"""No level is made of one whose sides are this small."""


def halved(plane: Pixels) -> Pixels:
    """Mean of 2x2 pixels, rounded half up, (ceil(y / 2), ceil(x / 2)), same dtype."""
    if plane.shape[0] % 2 or plane.shape[1] % 2:
        plane = np.pad(plane, [(0, side % 2) for side in plane.shape], mode="edge")
    wide = plane.astype(np.float32 if plane.dtype.kind == "f" else np.uint32)
    total = wide[::2, ::2] + wide[1::2, ::2] + wide[::2, 1::2] + wide[1::2, 1::2]
    mean = total / 4 if plane.dtype.kind == "f" else (total + 2) // 4
    return mean.astype(plane.dtype)


def level_shapes(y: int, x: int) -> list[tuple[int, int]]:
    """(y, x) of level 0, 1, ...; just one where the plane itself is small."""
    shapes = [(y, x)]
    while max(shapes[-1]) > SMALLEST_PX:
        y, x = -(-y // 2), -(-x // 2)
        shapes.append((y, x))
    return shapes


def datasets(scale: list[float], levels: int) -> list[dict[str, Any]]:
    """NGFF's list of levels, named "0", "1", ...; *scale* (t, c, z, y, x) is that of level 0."""
    return [_dataset(level, scale) for level in range(levels)]


def _dataset(level: int, scale: list[float]) -> dict[str, Any]:
    factor = 2**level
    steps: list[dict[str, Any]] = [
        {"type": "scale", "scale": [*scale[:3], *(side * factor for side in scale[3:])]}
    ]
    if level:
        shift = [0.0, 0.0, 0.0, *(side * (factor - 1) / 2 for side in scale[3:])]
        steps.append({"type": "translation", "translation": shift})
    return {"path": str(level), "coordinateTransformations": steps}
