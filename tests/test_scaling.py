"""Counts to the network's range: what a picture's own scaling is, and when there is none."""

import numpy as np
import pytest

from engine.scaling import SAMPLE_PX, Scaling, derive, derive_from, take_sample

RNG = np.random.default_rng(0)


def beads(side: int, level: int) -> np.ndarray:
    """8 beads of 4 × 4 px on zeros: far less than a thousandth of the picture."""
    plane = np.zeros((side, side), np.uint16)
    for k in range(8):
        plane[40 + 50 * k :, 30 + 57 * k :][:4, :4] = level
    return plane


@pytest.mark.parametrize("side", [512, 2048])
def test_a_few_beads_on_nothing_are_a_picture(side: int) -> None:
    assert derive([beads(side, 900)]) == Scaling(offset=0.0, scale=900.0)
    dark = np.full((side, side), 1000, np.uint16) - beads(side, 900)
    assert derive([dark]) == Scaling(offset=1000.0, scale=900.0)


def test_a_single_lit_pixel_between_those_sampled_is_seen() -> None:
    plane = np.zeros((2048, 2048), np.uint8)
    plane[0, 1] = 1
    assert not take_sample(plane).counts.any()
    assert derive([plane]) == Scaling(offset=0.0, scale=1.0)


@pytest.mark.parametrize("level", [0, 7, 65535])
def test_one_level_everywhere_is_no_picture(level: int) -> None:
    assert derive([np.full((64, 64), level, np.uint16)] * 2) is None
    assert derive([]) is None


def test_everything_else_goes_by_percentiles_of_every_nth_pixel() -> None:
    plane = RNG.poisson(100, (1500, 1400)).astype(np.uint16)
    plane[3, 5] = 65535  # a hot pixel says nothing
    step = plane.size // SAMPLE_PX | 1
    low, middle, high = np.percentile(plane.ravel()[::step], (0.1, 50.0, 99.9))
    assert derive([plane]) == Scaling(float(middle), float(max(high - middle, middle - low)))
    assert derive_from([take_sample(plane)]) == derive([plane])


def test_a_sample_lets_its_plane_go() -> None:
    assert take_sample(np.zeros((8, 8), np.uint8)).counts.base is None
