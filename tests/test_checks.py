"""What is no picture is stopped, and pictures are not."""

import math

import numpy as np
import pytest

from engine.checks import check_answer, check_plane
from refocus.errors import EngineError

PLANE = np.arange(20, dtype=np.uint16).reshape(4, 5)


@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf])
def test_one_value_that_is_no_number_is_enough(value: float) -> None:
    answer = np.ones((4, 5), np.float32)
    answer[1, 2] = value
    with pytest.raises(EngineError, match="non-finite"):
        check_answer(PLANE, float(answer.min()), float(answer.max()))


def test_a_constant_answer_needs_a_constant_plane() -> None:
    with pytest.raises(EngineError, match=r"answered 0\.5 everywhere"):
        check_answer(PLANE, 0.5, 0.5)
    check_answer(np.full_like(PLANE, 7), 0.5, 0.5)
    check_answer(PLANE, 0.5, np.nextafter(np.float32(0.5), np.float32(1)))


@pytest.mark.parametrize("answer", [PLANE[:3], PLANE.T, PLANE[None], PLANE.astype(np.uint8)])
def test_shape_and_dtype_are_the_raw_planes(answer: np.ndarray) -> None:
    with pytest.raises(EngineError, match=r"wanted uint16 \(4, 5\)"):
        check_plane(PLANE, answer)
    check_plane(PLANE, PLANE.copy())
