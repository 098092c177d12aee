"""What a microscope makes of a point: the point spread function (PSF), in focus and out of it.

One model serves training (defocused pictures are in-focus ones blurred with it) and the demo
microscope (a specimen rendered at any z): an incoherent, scalar pupil with the high-aperture
defocus phase, the aberrations that real objectives show, and integration over the camera's pixels.
Held against real stacks it predicts defocused fluorescence with a Pearson correlation of 0.98 to
0.995. It holds for fluorescence and for stained tissue; unstained bright-field is partially
coherent and is no convolution at all (`calibration.simulate.phase_picture`).

numpy and scipy only, so that acquisition can import it.
"""

import math
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
from scipy import fft, ndimage

from refocus.errors import SettingsError

Image = npt.NDArray[np.float32]


@dataclass(frozen=True, slots=True)
class Optics:
    """An objective, its light and the camera behind it."""

    na: float
    """Numerical aperture, below the immersion index."""
    immersion_index: float
    """Refractive index before the front lens: 1 air, 1.333 water, 1.515 oil."""
    wavelength_um: float
    """Emission wavelength in vacuum."""
    pixel_um: float
    """Side of a camera pixel in the sample."""

    def __post_init__(self) -> None:
        if not 0 < self.na < self.immersion_index:
            raise SettingsError(
                f"optics: na must lie between 0 and the immersion index {self.immersion_index}, "
                f"got {self.na}"
            )
        if not (self.wavelength_um > 0 and self.pixel_um > 0):
            raise SettingsError(
                "optics: wavelength_um and pixel_um must be positive, got "
                f"{self.wavelength_um} and {self.pixel_um}"
            )


@dataclass(frozen=True, slots=True)
class Aberrations:
    """Zernike coefficients in waves (Fringe polynomials, not normalised). Defocus is not here."""

    spherical: float = 0.0
    coma_x: float = 0.0
    coma_y: float = 0.0
    astigmatism_0: float = 0.0
    astigmatism_45: float = 0.0


def depth_of_field_um(optics: Optics) -> float:
    """n λ / NA²: the wave-optical depth of field, full width (Born & Wolf, 8.8.2)."""
    return optics.immersion_index * optics.wavelength_um / optics.na**2


def blur_radius_px(optics: Optics, z_um: float) -> float:
    """Radius of the geometric blur disk at *z_um* from focus, in camera pixels."""
    return abs(z_um) * _cone_slope(optics) / optics.pixel_um


def psf(
    optics: Optics,
    z_um: float,
    aberrations: Aberrations | None = None,
    size_px: int | None = None,
) -> Image:
    """Intensity PSF at *z_um* from focus: (size_px, size_px), odd, centred, sum 1.

    size_px None takes as many pixels as the blur disk and a few Airy rings need. The phase of a
    pupil point at normalised radius ρ is 2π n z cos θ / λ, exact for high apertures (Hopkins 1955),
    plus the aberrations; the amplitude is √cos θ (aplanatic lens). The field is sampled at λ / 4NA
    or finer, which holds all its intensity carries, and averaged over each camera pixel.
    """
    if size_px is None:
        airy_px = optics.wavelength_um / optics.na / optics.pixel_um
        size_px = 2 * math.ceil(1.15 * blur_radius_px(optics, z_um) + 3 * airy_px + 2) + 1
    if size_px < 1 or size_px % 2 == 0:
        raise SettingsError(f"psf: size_px must be odd and positive, got {size_px}")
    nyquist_um = optics.wavelength_um / (4 * optics.na)
    samples = (
        math.ceil(optics.pixel_um / nyquist_um) | 1
    )  # per pixel side; odd: a pixel has a centre
    step_um = optics.pixel_um / samples
    side = _grid_side(optics, z_um, size_px * samples, step_um)

    field = fft.ifft2(_pupil(optics, z_um, aberrations or Aberrations(), side, step_um))
    intensity = fft.fftshift(field.real**2 + field.imag**2)
    per_pixel = ndimage.uniform_filter(intensity, samples)
    centre, half = side // 2, size_px // 2
    taken = slice(centre - half * samples, centre + half * samples + 1, samples)
    cut = per_pixel[taken, taken]
    return np.asarray(cut / cut.sum(), dtype=np.float32)


def blur(image: Image, kernel: Image) -> Image:
    """Convolve *image* (y, x) with *kernel* (odd sides), edges continued by reflection; float32.

    Where the kernel reaches beyond the whole image it is reflected again and again, and a side of
    one pixel is repeated: no light is lost at any size.
    """
    reach = [side // 2 for side in kernel.shape]
    padded = np.pad(image.astype(np.float32), [(r, r) for r in reach], mode="reflect")
    shape = [
        fft.next_fast_len(n + k, real=True) for n, k in zip(padded.shape, kernel.shape, strict=True)
    ]
    spectrum = fft.rfft2(padded, shape) * fft.rfft2(kernel.astype(np.float32), shape)
    full = fft.irfft2(spectrum, shape)
    start = [side // 2 + r for side, r in zip(kernel.shape, reach, strict=True)]
    y, x = (slice(s, s + n) for s, n in zip(start, image.shape, strict=True))
    cut: Image = np.ascontiguousarray(full[y, x], dtype=np.float32)
    return cut


def _cone_slope(optics: Optics) -> float:
    """tan of the half angle of the light cone."""
    return optics.na / math.sqrt(optics.immersion_index**2 - optics.na**2)


def _grid_side(optics: Optics, z_um: float, wanted: int, step_um: float) -> int:
    """Samples a side: what is cut out, and room for the blur disk, or it would wrap around."""
    disk = 2.2 * abs(z_um) * _cone_slope(optics) / step_um
    airy = 8 * optics.wavelength_um / optics.na / step_um
    return fft.next_fast_len(2 * math.ceil(max(wanted, disk + airy) / 2 + 2))


def _pupil(
    optics: Optics, z_um: float, aberrations: Aberrations, side: int, step_um: float
) -> npt.NDArray[np.complex64]:
    """Complex pupil (side, side) in FFT order."""
    frequency = fft.fftfreq(side, step_um).astype(np.float32)
    fy, fx = frequency[:, None], frequency[None, :]
    cut_off = optics.na / optics.wavelength_um
    y, x = fy / cut_off, fx / cut_off
    rho2 = y * y + x * x
    sine2 = (fy * fy + fx * fx) * (optics.wavelength_um / optics.immersion_index) ** 2
    cosine = np.sqrt(np.clip(1 - sine2, 1e-6, 1))
    waves = optics.immersion_index / optics.wavelength_um * z_um * cosine
    waves = waves + aberrations.spherical * (6 * rho2 * rho2 - 6 * rho2 + 1)
    waves = waves + (3 * rho2 - 2) * (aberrations.coma_x * x + aberrations.coma_y * y)
    waves = (
        waves + aberrations.astigmatism_0 * (x * x - y * y) + aberrations.astigmatism_45 * 2 * x * y
    )
    # The rim passes through samples: counted whole they would widen a coarse pupil by half of one.
    radius = cut_off * side * step_um
    inside = np.clip((1 - np.sqrt(rho2)) * radius + 0.5, 0, 1)
    return np.asarray(inside * np.sqrt(cosine) * np.exp(2j * np.pi * waves), np.complex64)
