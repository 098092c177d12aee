"""Point spread functions behave as diffraction and geometry say."""

import numpy as np
import pytest
from scipy import special

from calibration.optics import (
    Aberrations,
    Optics,
    blur,
    blur_radius_px,
    depth_of_field_um,
    psf,
)
from refocus.errors import SettingsError

AIR = Optics(na=0.75, immersion_index=1.0, wavelength_um=0.536, pixel_um=0.325)


@pytest.mark.parametrize("z_um", [0.0, 2.0, -2.0, 15.0])
def test_a_psf_is_odd_centred_non_negative_and_sums_to_one(z_um: float) -> None:
    kernel = psf(AIR, z_um)
    assert kernel.shape[0] == kernel.shape[1]
    assert kernel.shape[0] % 2 == 1
    assert kernel.min() >= 0
    assert kernel.sum() == pytest.approx(1, abs=1e-5)
    np.testing.assert_allclose(kernel, kernel[::-1, ::-1], atol=1e-6)
    np.testing.assert_allclose(kernel, kernel.T, atol=1e-6)


def test_in_focus_it_is_the_airy_pattern() -> None:
    optics = Optics(na=0.2, immersion_index=1.0, wavelength_um=0.5, pixel_um=0.05)
    kernel = psf(optics, 0.0, size_px=121)
    r_um = optics.pixel_um * np.arange(1, 61)
    v = 2 * np.pi * optics.na * r_um / optics.wavelength_um
    airy = np.concatenate([[1.0], (2 * special.j1(v) / v) ** 2])
    np.testing.assert_allclose(kernel[60, 60:] / kernel[60, 60], airy, atol=0.01)


def test_far_from_focus_it_fills_the_disk_of_geometric_optics() -> None:
    z_um = 30.0
    kernel = psf(AIR, z_um)
    centre = len(kernel) // 2
    r_px = np.hypot(*(np.indices(kernel.shape) - centre))
    radius_px = blur_radius_px(AIR, z_um)
    assert radius_px == pytest.approx(30 * 0.75 / np.sqrt(1 - 0.75**2) / 0.325)
    assert kernel[r_px <= 1.05 * radius_px].sum() > 0.95
    assert kernel[r_px <= 0.5 * radius_px].sum() < 0.5


def test_only_spherical_aberration_tells_the_two_sides_of_focus_apart() -> None:
    size = 61
    np.testing.assert_allclose(psf(AIR, 3, size_px=size), psf(AIR, -3, size_px=size), atol=1e-6)
    spherical = Aberrations(spherical=0.15)
    before, behind = (psf(AIR, z, spherical, size).max() for z in (-3, 3))
    assert abs(before - behind) > 0.1 * max(before, behind)


def test_coma_moves_light_to_one_side() -> None:
    kernel = psf(AIR, 0, Aberrations(coma_x=0.15), 41)
    assert abs(kernel[:, :20].sum() - kernel[:, 21:].sum()) > 0.02
    np.testing.assert_allclose(kernel, kernel[::-1], atol=1e-6)


def test_depth_of_field_is_n_lambda_over_na_squared() -> None:
    oil = Optics(na=1.4, immersion_index=1.515, wavelength_um=0.5, pixel_um=0.1)
    assert depth_of_field_um(oil) == pytest.approx(1.515 * 0.5 / 1.96)


def test_blur_keeps_a_flat_picture_and_puts_the_kernel_where_a_point_was() -> None:
    kernel = psf(AIR, 2.0, Aberrations(coma_x=0.1, astigmatism_45=0.1))
    flat = np.full((40, 57), 3.0, np.float32)
    np.testing.assert_allclose(blur(flat, kernel), flat, atol=1e-4)
    point = np.zeros((81, 91), np.float32)
    point[40, 45] = 1
    half = len(kernel) // 2
    around = blur(point, kernel)[40 - half : 41 + half, 45 - half : 46 + half]
    np.testing.assert_allclose(around, kernel, atol=1e-6)


def test_blur_takes_a_picture_smaller_than_the_kernel() -> None:
    thin = np.ones((3, 1), np.float32)
    np.testing.assert_allclose(blur(thin, psf(AIR, 5.0)), thin, atol=1e-5)  # no light is lost


@pytest.mark.parametrize(
    ("na", "pixel_um", "said"), [(1.2, 0.1, "immersion index 1.0"), (0.5, 0.0, "pixel_um")]
)
def test_impossible_optics_are_refused(na: float, pixel_um: float, said: str) -> None:
    with pytest.raises(SettingsError, match=said):
        Optics(na=na, immersion_index=1.0, wavelength_um=0.5, pixel_um=pixel_um)


def test_an_even_size_is_refused() -> None:
    with pytest.raises(SettingsError, match="odd"):
        psf(AIR, 0, size_px=10)
