"""How good a refocused plane is, the truth at hand. numpy and scipy only.

PSNR, SSIM and Pearson's correlation in two conventions that papers use (`care`, `comi`), and the
Fourier ring correlation (`frc_cutoff`). Read PSNR together with the ring correlation: a real truth
is noisy, so plain smoothing earns decibels, but no linear filter raises the frequency up to which
answer and truth agree. A rise there is detail put back.
"""

import math
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt
from scipy import fft, ndimage
from scipy.signal import windows

from refocus.errors import SettingsError

Plane = npt.NDArray[np.number[Any]]
"""(y, x), any real dtype."""
Values = npt.NDArray[np.float64]

FRC_THRESHOLD = 1 / 7
"""The usual bar of single-particle and light microscopy (Rosenthal & Henderson 2003)."""

CEILING_DB = 100.0
"""Highest PSNR that `care_psnr` gives."""

SSIM_WINDOW_PX = 7
FRC_RINGS = 3
"""Fewest that a cut-off can be read from: the two lowest hold the background."""


@dataclass(frozen=True, slots=True)
class Quality:
    """One prediction against its truth."""

    psnr_db: float
    ssim: float
    """-1..1, 1 is equal."""
    nrmse: float
    """Root of the mean squared error over the truth's range."""
    pearson: float
    """-1..1."""


def psnr(prediction: Plane, truth: Plane, data_range: float) -> float:
    """10 log10(R² / MSE) in dB; infinite for equal planes."""
    error = float(np.mean((prediction.astype(np.float64) - truth.astype(np.float64)) ** 2))
    return math.inf if error == 0 else 10 * math.log10(data_range**2 / error)


def pearson(prediction: Plane, truth: Plane) -> float:
    """Pearson's correlation over all pixels, -1..1; 0 where one of the planes is flat."""
    a, b = (p.astype(np.float64) - float(np.mean(p)) for p in (prediction, truth))
    norm = math.sqrt(float((a * a).sum() * (b * b).sum()))
    return float((a * b).sum()) / norm if norm > 0 else 0.0


def ssim(prediction: Plane, truth: Plane, data_range: float) -> float:
    """Mean structural similarity, -1..1 (Wang et al. 2004): 7 × 7 uniform window, K1 .01, K2 .03.

    Sample covariance and no border of 3 px, which is scikit-image's default. Raises SettingsError
    for planes smaller than the window.
    """
    if min(truth.shape) < SSIM_WINDOW_PX:
        raise SettingsError(
            f"ssim: wanted a plane of {SSIM_WINDOW_PX} px a side or more, got {truth.shape}"
        )
    x, y = prediction.astype(np.float64), truth.astype(np.float64)

    def mean(values: Values) -> Values:
        local: Values = ndimage.uniform_filter(values, SSIM_WINDOW_PX)[3:-3, 3:-3]
        return local

    sample = 49 / 48
    mx, my = mean(x), mean(y)
    vx, vy = sample * (mean(x * x) - mx * mx), sample * (mean(y * y) - my * my)
    covariance = sample * (mean(x * y) - mx * my)
    c1, c2 = (0.01 * data_range) ** 2, (0.03 * data_range) ** 2
    similarity = (2 * mx * my + c1) * (2 * covariance + c2)
    similarity /= (mx * mx + my * my + c1) * (vx + vy + c2)
    return float(similarity.mean())


def affine_fit(prediction: Plane, truth: Plane) -> Values:
    """a · prediction + b with the a and b that come nearest to *truth* in least squares."""
    x, y = prediction.astype(np.float64), truth.astype(np.float64)
    centred = x - x.mean()
    variance = float((centred * centred).mean())
    slope = float((centred * (y - y.mean())).mean()) / variance if variance > 0 else 0.0
    fitted: Values = slope * centred + y.mean()
    return fitted


def care(prediction: Plane, truth: Plane) -> Quality:
    """The convention of CARE (Weigert et al. 2018), primary for fluorescence.

    The truth's 0.1th and 99.9th percentiles become 0 and 1, the prediction is scaled and shifted
    onto it by least squares, and R is 1: what is judged is structure, not exposure.
    """
    low, span = _percentile_range(truth)
    wanted = (truth.astype(np.float64) - low) / span
    fitted = affine_fit((prediction.astype(np.float64) - low) / span, wanted)
    return _quality(fitted, wanted, data_range=1.0)


def care_psnr(prediction: Plane, truth: Plane) -> float:
    """`care`'s PSNR alone, in dB, at most CEILING_DB; the similarity index takes most of its time.

    Equal planes have an infinite PSNR, and one of them would make every mean infinite. What is
    rounded to counts cannot be told apart much beyond the ceiling: rounding alone leaves
    20 log10(R √12) dB of a range of R counts, 83 dB for 4096 and 100 dB for 29,000.
    """
    _, span = _percentile_range(truth)
    return min(CEILING_DB, psnr(affine_fit(prediction, truth), truth, span))


def comi(prediction: Plane, truth: Plane, in_focus: Plane) -> Quality:
    """The convention of COMI's published code: 8 bits, clipped and rounded, R = 255.

    One affine map a field takes 0.1th and 99.9th percentile of its plane *in_focus* to 0 and 255,
    for prediction and truth alike: a photometric error stays visible. 8-bit planes are kept as are.
    """
    maps = np.asarray(truth).dtype != np.uint8
    low, span = _percentile_range(in_focus) if maps else (0.0, 255.0)
    as_8_bit = [
        np.clip(np.rint((p.astype(np.float64) - low) / span * 255), 0, 255)
        for p in (prediction, truth)
    ]
    return _quality(as_8_bit[0], as_8_bit[1], data_range=255.0)


def frc(prediction: Plane, truth: Plane) -> Values:
    """Fourier ring correlation, -1..1, of min(y, x) // 2 rings from 0 to 0.5 cycles/px.

    Σ A B* / √(Σ|A|² Σ|B|²) over each ring (Saxton & Baumeister 1982), planes tapered by a Tukey
    window of 0.25 so that their edges do not correlate.
    """
    rings = min(truth.shape) // 2
    taper = np.outer(*(windows.tukey(side, 0.25) for side in truth.shape))
    a, b = (
        fft.fft2((p.astype(np.float64) - float(np.mean(p))) * taper) for p in (prediction, truth)
    )
    cross = _ring_sums((a * np.conj(b)).real, rings)
    power = _ring_sums(np.abs(a) ** 2, rings) * _ring_sums(np.abs(b) ** 2, rings)
    return cross / np.sqrt(power + 1e-30)


def frc_cutoff(prediction: Plane, truth: Plane) -> float:
    """Frequency in cycles/px, 0..0.5, where the ring correlation first falls below 1/7.

    The curve is averaged over five rings; the two lowest hold the background and are passed over.
    Raises SettingsError for planes of fewer than three rings (a side below 6 px).
    """
    if min(truth.shape) // 2 < FRC_RINGS:
        raise SettingsError(
            f"frc_cutoff: wanted a plane of {2 * FRC_RINGS} px a side or more, got {truth.shape}"
        )
    curve = ndimage.uniform_filter1d(frc(prediction, truth), 5)
    below = np.flatnonzero(curve[2:] < FRC_THRESHOLD)
    ring = int(below[0]) + 2 if below.size else len(curve)
    return 0.5 * ring / len(curve)


def _quality(prediction: Values, truth: Values, data_range: float) -> Quality:
    error = float(np.mean((prediction - truth) ** 2))
    return Quality(
        psnr_db=psnr(prediction, truth, data_range),
        ssim=ssim(prediction, truth, data_range),
        nrmse=math.sqrt(error) / data_range,
        pearson=pearson(prediction, truth),
    )


def _percentile_range(plane: Plane) -> tuple[float, float]:
    low, high = np.percentile(plane.astype(np.float64), (0.1, 99.9))
    return float(low), max(float(high - low), 1e-9)


def _ring_sums(values: Values, rings: int) -> Values:
    """Sums of a spectrum in FFT order over rings of equal width up to 0.5 cycles/px."""
    fy, fx = fft.fftfreq(values.shape[0])[:, None], fft.fftfreq(values.shape[1])[None, :]
    ring = np.minimum((np.hypot(fy, fx) / 0.5 * rings).astype(int), rings)
    return np.asarray(np.bincount(ring.ravel(), values.ravel(), rings + 1)[:rings], np.float64)
