"""The demo's specimen: it defocuses like one, and its noise is a camera's."""

from itertools import pairwise

import numpy as np
import pytest

from acquire.sources.specimen import (
    BACKGROUND_PHOTONS,
    GRID_STEP_UM,
    OFFSET_COUNTS,
    PHOTONS_PER_COUNT,
    PIXEL_UM,
    READ_NOISE_PHOTONS,
    STAINS,
    Specimen,
)

SIZE_PX = 128


@pytest.fixture(scope="module")
def specimen() -> Specimen:
    return Specimen(SIZE_PX, seed=3)


@pytest.mark.parametrize("channel", STAINS)
def test_planes_lose_contrast_step_by_step_away_from_focus(
    specimen: Specimen, channel: str
) -> None:
    for sign in (-1, 1):
        sharpness = [
            float(np.diff(specimen.image(channel, sign * z_um, 0, 0, 7).astype(float)).std())
            for z_um in (0.0, 1.25, 2.5)
        ]
        assert all(nearer > farther for nearer, farther in pairwise(sharpness)), sharpness


@pytest.mark.parametrize("channel", STAINS)
def test_a_frame_in_focus_is_the_truth_plus_camera_noise(specimen: Specimen, channel: str) -> None:
    truth = specimen.truth(channel, 5.0, 9.0).astype(np.float64)
    residual = specimen.image(channel, 0.0, 5.0, 9.0, 1) - truth
    photons = (truth - OFFSET_COUNTS) * PHOTONS_PER_COUNT
    expected = np.sqrt(photons + READ_NOISE_PHOTONS**2) / PHOTONS_PER_COUNT
    # Standard errors of mean and standard deviation over this many pixels, five times.
    assert abs((residual / expected).mean()) < 5 / SIZE_PX
    assert abs((residual / expected).std() - 1) < 5 / SIZE_PX / np.sqrt(2)
    assert photons.min() >= BACKGROUND_PHOTONS * 0.99


def test_a_plane_between_two_rendered_ones_lies_between_them(specimen: Specimen) -> None:
    below, between, above = (
        specimen.image("FITC", share * GRID_STEP_UM, 0, 0, 5).astype(float)
        for share in (1.0, 1.5, 2.0)
    )
    # The same noise in all three: what is left is rounding and the root of the noise's variance.
    assert np.abs(between - (below + above) / 2).mean() < 1.0
    assert np.abs(above - below).mean() > 5.0


def test_same_seed_same_picture_other_seed_other_picture(specimen: Specimen) -> None:
    again, other = Specimen(SIZE_PX, seed=3), Specimen(SIZE_PX, seed=4)
    place = ("DAPI", 1.25, 3.0, 4.0, 11)
    np.testing.assert_array_equal(specimen.image(*place), again.image(*place))
    assert not np.array_equal(specimen.truth("DAPI", 0, 0), other.truth("DAPI", 0, 0))
    assert not np.array_equal(specimen.image(*place), specimen.image(*place[:4], 12))


def test_moving_the_stage_moves_the_picture_and_never_leaves_the_specimen(
    specimen: Specimen,
) -> None:
    here = specimen.truth("TRITC", 0.0, 0.0)
    moved = specimen.truth("TRITC", 10 * PIXEL_UM, -7 * PIXEL_UM)
    np.testing.assert_array_equal(moved[7:, :-10], here[:-7, 10:])
    assert specimen.truth("TRITC", 1e5, -1e5).std() > 10


def test_progress_ends_at_one() -> None:
    seen: list[float] = []
    Specimen(64, progress=seen.append)
    assert seen[-1] == pytest.approx(1.0)
    assert seen == sorted(seen)
