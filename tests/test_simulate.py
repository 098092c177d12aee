"""Specimens and camera: what training and the demo microscope build on."""

import numpy as np
import pytest

from calibration.simulate import SPECIMENS, Camera, expose, phase_picture, slabs


@pytest.mark.parametrize("name", SPECIMENS)
def test_a_seed_is_a_picture(name: str) -> None:
    first, again, other = (
        SPECIMENS[name](np.random.default_rng(seed), (96, 130)) for seed in (1, 1, 2)
    )
    assert first.shape == (96, 130)
    assert first.dtype == np.float32
    np.testing.assert_array_equal(first, again)
    assert not np.array_equal(first, other)
    assert first.min() >= 0
    assert 0.5 < first.max() <= 1.6


def test_beads_lie_sparsely_on_black() -> None:
    density = SPECIMENS["beads"](np.random.default_rng(3), (200, 200))
    assert np.median(density) == 0


def test_slabs_add_up_to_the_specimen() -> None:
    rng = np.random.default_rng(0)
    density = SPECIMENS["mixed"](rng, (100, 120))
    near, far = slabs(rng, density)
    np.testing.assert_allclose(near + far, density, atol=1e-5)
    assert near.sum() > 0
    assert far.sum() > 0


def test_a_phase_picture_is_bright_where_nothing_is() -> None:
    picture = phase_picture(np.random.default_rng(0), 128)
    assert picture.shape == (128, 128)
    assert picture.max() == 1
    assert np.median(picture) > 0.2


def test_counts_have_the_mean_and_the_variance_of_shot_and_read_noise() -> None:
    camera = Camera(read_noise_e=2.0, read_noise_spread=0.0, gain_e_per_count=0.5)
    electrons = np.full((300, 300), 400.0, np.float32)
    detected_e = (expose(np.random.default_rng(0), electrons, camera) - 100.0) * 0.5
    assert detected_e.mean() == pytest.approx(400, abs=0.5)
    assert detected_e.var() == pytest.approx(400 + 4, rel=0.03)


def test_darkness_is_the_offset_and_glare_saturates() -> None:
    rng = np.random.default_rng(0)
    camera = Camera(offset_counts=100, bit_depth=12)
    dark = expose(rng, np.zeros((50, 50), np.float32), camera)
    assert dark.mean() == pytest.approx(100, abs=1)
    glare = expose(rng, np.full((50, 50), 1e6, np.float32), camera)
    assert (glare == 4095).all()
