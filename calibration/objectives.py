"""Objectives drawn at random, and what each makes of a point in focus and out of it.

A bank holds their transfer functions, so that a batch is blurred by one product in Fourier space:
making a point spread function takes longer than a training step. Apertures, wavelengths, sampling
and aberrations span what fluorescence microscopes have; defocus is spread evenly in ln, from a
third of a depth of field to where nothing is left to find.
"""

import math
from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from calibration.optics import Aberrations, Optics, blur_radius_px, depth_of_field_um, psf

CROP_PX = 128
MARGIN_PX = 32
WINDOW_PX = CROP_PX + 2 * MARGIN_PX
"""What is blurred; the margin is cut off, so that no crop shows the transform's wrap-around."""

COMMON = (
    *((0.3, 1.0), (0.45, 1.0), (0.6, 1.0), (0.75, 1.0), (0.8, 1.0), (0.95, 1.0)),
    *((1.2, 1.333), (1.4, 1.515)),
)
"""(numerical aperture, immersion index) of common objectives."""
HIGHEST_SINE = 0.97
WAVELENGTH_UM = (0.43, 0.70)
SAMPLING = (0.8, 2.5, 8.0)
"""Pixel in units of λ / 4NA, Nyquist's: from fine to middling in 72 of 100, else to coarse."""

MAX_DEFOCUS_DOF = 9.0
MAX_BLUR_RADIUS_PX = 21.0


@dataclass(frozen=True, slots=True)
class Bank:
    """Transfer functions of many objectives, each at four depths."""

    transfer: npt.NDArray[np.complex64]
    """(objective, 4, WINDOW_PX, WINDOW_PX // 2 + 1): focus, a slab beside it, both defocused."""
    defocus_dof: npt.NDArray[np.float32]
    """(objective,) |defocus| in depths of field."""


@dataclass(frozen=True, slots=True)
class Range:
    """Lowest and highest that a bank holds; focus itself is always in."""

    pixel_um: tuple[float, float]
    defocus_um: tuple[float, float]
    defocus_dof: tuple[float, float]


def build_bank(objectives: int, seed: int = 0) -> Bank:
    """Random objectives at random defocus; about 15 ms each."""
    shape = (objectives, 4, WINDOW_PX, WINDOW_PX // 2 + 1)
    bank = Bank(np.zeros(shape, np.complex64), np.zeros(objectives, np.float32))
    for i, (rng, optics, z_um, slab_um) in enumerate(_draw_objectives(objectives, seed)):
        bends = np.clip(rng.normal(0, 0.06, 5), -0.17, 0.17)  # waves; worse lenses are sent back
        for k, depth_um in enumerate((0.0, slab_um, z_um, z_um + slab_um)):
            kernel = psf(optics, depth_um, Aberrations(*bends), 2 * MARGIN_PX + 1)
            canvas = np.zeros((WINDOW_PX, WINDOW_PX), np.float32)
            canvas[: kernel.shape[0], : kernel.shape[1]] = kernel
            bank.transfer[i, k] = np.fft.rfft2(np.roll(canvas, (-MARGIN_PX, -MARGIN_PX), (0, 1)))
        bank.defocus_dof[i] = abs(z_um) / depth_of_field_um(optics)
    return bank


def training_range(objectives: int, seed: int = 0) -> Range:
    """What `build_bank` of the same arguments covers; the pixel size as it may be drawn."""
    drawn = [(optics, abs(z_um)) for _, optics, z_um, _ in _draw_objectives(objectives, seed)]
    finest_um = SAMPLING[0] * WAVELENGTH_UM[0] / (4 * HIGHEST_SINE * COMMON[-1][1])
    coarsest_um = SAMPLING[-1] * WAVELENGTH_UM[1] / (4 * 0.9 * COMMON[0][0])
    return Range(
        pixel_um=(round(finest_um, 3), round(coarsest_um, 3)),
        defocus_um=(0.0, round(float(max(z_um for _, z_um in drawn)), 1)),
        defocus_dof=(0.0, round(float(max(z / depth_of_field_um(o) for o, z in drawn)), 1)),
    )


def _draw_objectives(
    count: int, seed: int
) -> Iterator[tuple[np.random.Generator, Optics, float, float]]:
    """Objectives at a defocus, with the distance of the second slab, and what to draw on with."""
    for i in range(count):
        rng = np.random.default_rng([seed, i])
        optics = _draw_optics(rng)
        yield rng, optics, *_draw_defocus(rng, optics)


def _draw_optics(rng: np.random.Generator) -> Optics:
    """A common objective, its aperture off by up to a tenth, sampled well or badly."""
    na, index = COMMON[rng.integers(len(COMMON))]
    na = min(na * rng.uniform(0.9, 1.1), HIGHEST_SINE * index)
    wavelength_um = rng.uniform(*WAVELENGTH_UM)
    fine, middle, coarse = SAMPLING
    low, high = (fine, middle) if rng.random() < 0.72 else (middle, coarse)
    sampling = math.exp(rng.uniform(math.log(low), math.log(high)))
    return Optics(na, index, wavelength_um, sampling * wavelength_um / (4 * na))


def _draw_defocus(rng: np.random.Generator, optics: Optics) -> tuple[float, float]:
    """Distance from focus, and from there to a second slab of the specimen, both in um."""
    dof_um = depth_of_field_um(optics)
    px_um = 1 / blur_radius_px(optics, 1.0)  # defocus that widens the blur disk by a pixel
    if rng.random() < 0.6:
        z_um = dof_um * math.exp(rng.uniform(math.log(0.3), math.log(MAX_DEFOCUS_DOF)))
    else:
        z_um = px_um * math.exp(rng.uniform(math.log(0.7), math.log(MAX_BLUR_RADIUS_PX)))
    z_um = min(z_um, MAX_BLUR_RADIUS_PX * px_um)
    slab_um = rng.normal() * max(0.7 * dof_um, 0.25 * z_um)
    return z_um * rng.choice((-1, 1)), float(np.clip(slab_um, -8 * px_um, 8 * px_um))
