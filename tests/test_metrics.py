"""Metrics are what their definitions say, and what scikit-image says where it has them."""

import math

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from scipy import ndimage
from skimage.metrics import peak_signal_noise_ratio, structural_similarity

from calibration.metrics import (
    CEILING_DB,
    affine_fit,
    care,
    care_psnr,
    comi,
    frc,
    frc_cutoff,
    pearson,
    psnr,
    ssim,
)
from calibration.simulate import Camera, expose, filaments, nuclei
from refocus.errors import SettingsError


@pytest.fixture(scope="module")
def truth() -> np.ndarray:
    rng = np.random.default_rng(0)
    shape = (160, 144)
    electrons = 800 * (nuclei(rng, shape) + filaments(rng, shape)) + 50
    return expose(rng, electrons.astype(np.float32), Camera())


@pytest.fixture(scope="module")
def noisy(truth: np.ndarray) -> np.ndarray:
    rng = np.random.default_rng(1)
    return (truth + rng.normal(0, 60, truth.shape)).clip(0, 65535).astype(np.uint16)


def test_psnr_and_ssim_are_those_of_scikit_image(truth: np.ndarray, noisy: np.ndarray) -> None:
    wanted = peak_signal_noise_ratio(truth, noisy, data_range=4000)
    assert psnr(noisy, truth, 4000) == pytest.approx(wanted)
    similarity = structural_similarity(truth.astype(float), noisy.astype(float), data_range=4000)
    assert ssim(noisy, truth, 4000) == pytest.approx(similarity)


def test_equal_planes_are_perfect(truth: np.ndarray) -> None:
    assert psnr(truth, truth, 1) == math.inf
    assert ssim(truth, truth, 1000) == pytest.approx(1)
    assert pearson(truth, truth) == pytest.approx(1)
    assert frc_cutoff(truth, truth) == 0.5


@given(slope=st.floats(0.2, 5), offset=st.floats(-500, 500))
def test_care_does_not_see_exposure_and_offset(
    truth: np.ndarray, noisy: np.ndarray, slope: float, offset: float
) -> None:
    plain, moved = care(noisy, truth), care(slope * noisy + offset, truth)
    assert moved.psnr_db == pytest.approx(plain.psnr_db, abs=1e-3)
    assert moved.ssim == pytest.approx(plain.ssim, abs=1e-4)


def test_cares_psnr_alone_is_that_of_care_and_has_a_ceiling(
    truth: np.ndarray, noisy: np.ndarray
) -> None:
    assert care_psnr(noisy, truth) == pytest.approx(care(noisy, truth).psnr_db)
    assert care_psnr(truth, truth) == CEILING_DB


@pytest.mark.parametrize("shape", [(6, 40), (40, 6), (1, 1)])
def test_planes_smaller_than_the_window_have_no_similarity(shape: tuple[int, int]) -> None:
    with pytest.raises(SettingsError, match="7 px a side"):
        ssim(np.ones(shape), np.ones(shape), 1)


@pytest.mark.parametrize("shape", [(5, 40), (2047, 1)])
def test_planes_of_a_few_pixels_have_no_cutoff(shape: tuple[int, int]) -> None:
    with pytest.raises(SettingsError, match="6 px a side"):
        frc_cutoff(np.ones(shape), np.ones(shape))


def test_comi_does_see_them(truth: np.ndarray, noisy: np.ndarray) -> None:
    assert comi(noisy, truth, truth).psnr_db > comi(noisy // 2, truth, truth).psnr_db + 3


def test_comi_keeps_8_bit_planes_as_they_are() -> None:
    rng = np.random.default_rng(0)
    a, b = (rng.integers(0, 256, (40, 40)).astype(np.uint8) for _ in range(2))
    assert comi(a, b, b).psnr_db == pytest.approx(peak_signal_noise_ratio(b, a, data_range=255))


def test_the_affine_fit_undoes_an_affine_map_and_takes_a_flat_plane(truth: np.ndarray) -> None:
    np.testing.assert_allclose(affine_fit(0.3 * truth - 7, truth), truth, atol=1e-6)
    flat = affine_fit(np.zeros_like(truth), truth)
    np.testing.assert_allclose(flat, truth.mean())


def test_pearson_is_the_cosine_of_centred_planes(truth: np.ndarray, noisy: np.ndarray) -> None:
    wanted = np.corrcoef(truth.ravel(), noisy.ravel())[0, 1]
    assert pearson(noisy, truth) == pytest.approx(wanted)
    assert pearson(np.zeros_like(truth), truth) == 0


def test_ring_correlation_is_one_with_itself_and_near_zero_with_noise() -> None:
    rng = np.random.default_rng(0)
    a, b = rng.standard_normal((2, 128, 128))
    assert frc(a, a).min() == pytest.approx(1)
    assert np.abs(frc(a, b)[8:]).max() < 0.3


def test_the_cutoff_is_where_the_common_signal_ends() -> None:
    rng = np.random.default_rng(0)
    f = np.hypot(np.fft.fftfreq(256)[:, None], np.fft.fftfreq(256)[None, :])
    common = np.fft.ifft2(np.fft.fft2(rng.standard_normal((256, 256))) * (f < 0.2)).real
    a, b = (common + 0.05 * rng.standard_normal(common.shape) for _ in range(2))
    assert frc_cutoff(a, b) == pytest.approx(0.21, abs=0.02)  # five rings averaged


def test_a_blur_does_not_raise_the_cutoff(truth: np.ndarray, noisy: np.ndarray) -> None:
    soft = ndimage.gaussian_filter(noisy.astype(float), 1.0)
    assert frc_cutoff(soft, truth) <= frc_cutoff(noisy, truth) + 0.02
