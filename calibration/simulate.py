"""Specimens that never were, and the camera that looks at them.

Specimens are fluorophore densities (y, x), float32, 0 where nothing glows and about 1 at the bright
end: nuclei, filaments, beads, a dense texture, or all together. They carry no light yet: blur them
with `calibration.optics` and expose them with a `Camera`. They need not pass for biology: a network
that must not invent structure is better off with more variety than any one tissue has.

Everything is drawn from the generator passed in, so a seed is a picture. numpy and scipy only.
"""

import math
from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
from scipy import ndimage

Image = npt.NDArray[np.float32]
Shape = tuple[int, int]


@dataclass(frozen=True, slots=True)
class Camera:
    """A camera of the sCMOS kind: what it adds to the light, and how it counts."""

    read_noise_e: float = 1.6
    """Median read noise of a pixel in electrons, RMS."""
    read_noise_spread: float = 0.25
    """Standard deviation of ln(read noise) over the pixels; 0 for a CCD."""
    gain_e_per_count: float = 0.46
    offset_counts: float = 100.0
    bit_depth: int = 16


def expose(rng: np.random.Generator, electrons: Image, camera: Camera) -> npt.NDArray[np.uint16]:
    """One exposure of *electrons* (y, x; expected photoelectrons a pixel) in counts, uint16.

    Shot noise is Poisson; read noise is Gaussian with a width of its own in every pixel
    (log-normal, as for the sCMOS of Huang et al. 2013); then gain, offset, rounding, saturation.
    """
    sigma_e = camera.read_noise_e * np.exp(rng.normal(0, camera.read_noise_spread, electrons.shape))
    read_e = rng.standard_normal(electrons.shape) * sigma_e
    detected_e = rng.poisson(np.clip(electrons, 0, None)) + read_e
    counts = np.rint(detected_e / camera.gain_e_per_count + camera.offset_counts)
    return np.clip(counts, 0, 2**camera.bit_depth - 1).astype(np.uint16)


def nuclei(rng: np.random.Generator, shape: Shape, count: int | None = None) -> Image:
    """Textured ellipses with soft rims, 5 to 30 px in radius; 5 to 40 on 320², or *count*."""
    density = np.zeros(shape, np.float32)
    if count is None:
        count = max(1, round(rng.uniform(5, 40) * _area(shape)))
    for _ in range(count):
        long_px, short_px, angle = rng.uniform(6, 30), rng.uniform(5, 20), rng.uniform(0, math.pi)
        centre = rng.uniform((0, 0), shape)
        window, y, x = _window(shape, centre, max(long_px, short_px) + 2)
        u, v = x * math.cos(angle) + y * math.sin(angle), y * math.cos(angle) - x * math.sin(angle)
        radius2 = (u / long_px) ** 2 + (v / short_px) ** 2
        rim = np.clip((1 - radius2) * long_px / 2, 0, 1)
        dome = np.clip(1.2 - rng.random() * radius2, 0, 1)
        density[window] += rng.lognormal(0, 0.4) * rim * dome
    density *= np.clip(1 + rng.uniform(0.1, 0.5) * _cloud(rng, shape, 1.0), 0.1, None)
    return _finish(rng, density)


def filaments(rng: np.random.Generator, shape: Shape, count: int | None = None) -> Image:
    """Slowly bending random walks, a pixel thin before softening; 15 to 120 on 320², or *count*."""
    density = np.zeros(shape, np.float32)
    if count is None:
        count = max(1, round(rng.uniform(15, 120) * _area(shape)))
    for _ in range(count):
        steps = int(rng.integers(80, 500))
        bend = rng.normal(0, rng.uniform(0.01, 0.08), steps)
        heading = rng.uniform(0, 2 * math.pi) + np.cumsum(bend)
        path = rng.uniform((0, 0), shape)[:, None] + 0.7 * np.cumsum(
            [np.sin(heading), np.cos(heading)], 1
        )
        _splat(density, path, rng.lognormal(0, 0.4))
    return _finish(rng, density)


def beads(rng: np.random.Generator, shape: Shape, count: int | None = None) -> Image:
    """Discs of 0.4 to 8 px radius on black, most below 3; 4 to 300 on 320², or *count*.

    Half of the pictures hold beads as one buys them: one size, nearly one brightness.
    """
    density = np.zeros(shape, np.float32)
    if count is None:
        count = max(3, round(math.exp(rng.uniform(math.log(4), math.log(300))) * _area(shape)))
    calibrated = rng.random() < 0.5
    common_px, spread = rng.uniform(0.4, 2.5), 0.15 if calibrated else 0.7
    for _ in range(count):
        radius_px = common_px
        if not calibrated:
            radius_px = rng.uniform(0.4, 3) if rng.random() < 0.9 else rng.uniform(3, 8)
        window, y, x = _window(shape, rng.uniform((0, 0), shape), radius_px + 2)
        disc = np.clip(radius_px + 0.5 - np.hypot(y, x), 0, 1)
        density[window] += rng.lognormal(0, spread) * disc
    return _finish(rng, density)


def texture(rng: np.random.Generator, shape: Shape) -> Image:
    """A field without a background: cytoplasm, membranes, dense tissue."""
    cloud = _cloud(rng, shape, rng.uniform(0.7, 2.0))
    return _finish(rng, np.exp(rng.uniform(0.3, 1.2) * cloud))


def mixed(rng: np.random.Generator, shape: Shape) -> Image:
    """Nuclei, filaments and beads in one field."""
    parts = [rng.uniform(0.2, 1) * draw(rng, shape) for draw in (nuclei, filaments, beads)]
    return _finish(rng, np.sum(parts, axis=0, dtype=np.float32))


SPECIMENS: dict[str, Callable[[np.random.Generator, Shape], Image]] = {
    "nuclei": nuclei,
    "filaments": filaments,
    "beads": beads,
    "texture": texture,
    "mixed": mixed,
}


def slabs(rng: np.random.Generator, density: Image) -> tuple[Image, Image]:
    """Share a specimen between two depths by a smooth random mask; both add up to *density*."""
    coarse = rng.standard_normal((6, 6))
    zoom = [n / 6 for n in density.shape]
    mask = (
        3 * ndimage.zoom(coarse, zoom, order=1)[: density.shape[0], : density.shape[1]]
        + rng.normal()
    )
    share = _float32(1 / (1 + np.exp(-mask)))
    return density * (1 - share), density * share


def phase_picture(rng: np.random.Generator, side_px: int, sources: int = 16) -> Image:
    """Unstained cells in bright-field out of focus: (side_px, side_px), 0..1, partially coherent.

    Abbe's sum over *sources* points of the condenser aperture (Goodman, Fourier Optics, ch. 7).
    Contrast inverts through focus, so no deconvolution is right: a generator must leave it alone.
    """
    shape = (side_px, side_px)
    density = ndimage.gaussian_filter(mixed(rng, shape) + nuclei(rng, shape), rng.uniform(0.7, 3))
    density /= density.max() + 1e-6
    na, pixel_um, wavelength_um = rng.uniform(0.4, 0.8), rng.uniform(0.12, 0.4), 0.55
    z_um, coherence = rng.uniform(-14, 14), rng.uniform(0.2, 0.6)
    absorbed, phase = 0.05 * rng.random() * density, rng.uniform(0.4, 2.5) * density
    transmitted = np.fft.fft2(np.exp(-absorbed + 1j * phase))
    f = np.fft.fftfreq(side_px, pixel_um)
    f2 = f[:, None] ** 2 + f[None, :] ** 2
    axial = np.sqrt(np.clip(1 - f2 * wavelength_um**2, 0, 1))
    pupil = (f2 <= (na / wavelength_um) ** 2) * np.exp(2j * np.pi * z_um / wavelength_um * axial)
    light = np.zeros(shape)
    for i in range(sources):  # Vogel's spiral fills the condenser disc evenly
        tilt = math.sqrt((i + 0.5) / sources) * coherence * na / wavelength_um
        angle = i * 2.39996
        shift = [round(trig(angle) * tilt * side_px * pixel_um) for trig in (math.sin, math.cos)]
        light += np.abs(np.fft.ifft2(np.roll(transmitted, shift, (0, 1)) * pupil)) ** 2
    return _float32(light / light.max())


def _area(shape: Shape) -> float:
    """Picture area in units of 320², for which counts of objects are given."""
    return shape[0] * shape[1] / 320**2


def _window(
    shape: Shape, centre: npt.NDArray[np.float64], reach_px: float
) -> tuple[tuple[slice, slice], Image, Image]:
    """The part of the picture around *centre*, and y and x of its pixels from there."""
    low = np.maximum(np.floor(centre - reach_px).astype(int), 0)
    high = np.minimum(np.ceil(centre + reach_px).astype(int) + 1, shape)
    y = np.arange(low[0], high[0], dtype=np.float32)[:, None] - np.float32(centre[0])
    x = np.arange(low[1], high[1], dtype=np.float32)[None, :] - np.float32(centre[1])
    return (slice(low[0], high[0]), slice(low[1], high[1])), y, x


def _cloud(rng: np.random.Generator, shape: Shape, sigma_px: float) -> Image:
    """Noise of zero mean over three octaves from *sigma_px* on, each of about the same variance."""
    octaves = [sigma_px * 2**k for k in range(3)]
    parts = [s * ndimage.gaussian_filter(rng.standard_normal(shape), s) for s in octaves]
    return _float32(np.sum(parts, axis=0))


def _splat(density: Image, path: npt.NDArray[np.float64], brightness: float) -> None:
    """Add points (2, n) to the four pixels around each, bilinearly."""
    corner = np.floor(path).astype(int)
    inside = ((corner >= 0) & (corner < np.array(density.shape)[:, None] - 1)).all(0)
    corner, fraction = corner[:, inside], (path - corner)[:, inside]
    for dy in (0, 1):
        for dx in (0, 1):
            weight = np.abs(1 - dy - fraction[0]) * np.abs(1 - dx - fraction[1])
            np.add.at(density, (corner[0] + dy, corner[1] + dx), brightness * weight)


def _finish(rng: np.random.Generator, density: Image) -> Image:
    """Soften the pixel grid away and bring the bright end to 1."""
    soft = ndimage.gaussian_filter(density, rng.uniform(0.3, 0.9))
    bright = float(np.percentile(soft, 99.9)) or float(soft.max())
    return _float32(np.clip(soft / (bright + 1e-6), 0, 1.6))


def _float32(values: npt.ArrayLike) -> Image:
    return np.asarray(values, dtype=np.float32)
