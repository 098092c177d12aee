"""How good a refocused plane is, and how sharp a plane looks. numpy and scipy only.

With the truth at hand: PSNR, SSIM and Pearson's correlation in two conventions that papers use
(`care`, `comi`), and the Fourier ring correlation (`frc_cutoff`). Read PSNR together with the ring
correlation: a real truth is noisy, so plain smoothing earns decibels, but no linear filter raises
the frequency up to which answer and truth agree. A rise there is detail put back.

Without it: `brenner` and `tenengrad`, which find the sharpest plane of one stack and nothing more.
Noise and ringing raise both, so neither may ever be what a generator is trained for or judged by.
"""

import math
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt
from scipy import fft, ndimage
from scipy.signal import windows

Plane = npt.NDArray[np.number[Any]]
"""(y, x), any real dtype."""
Values = npt.NDArray[np.float64]

FRC_THRESHOLD = 1 / 7
"""The usual bar of single-particle and light microscopy (Rosenthal & Henderson 2003)."""


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

    Sample covariance and no border of 3 px, which is scikit-image's default.
    """
    x, y = prediction.astype(np.float64), truth.astype(np.float64)

    def mean(values: Values) -> Values:
        local: Values = ndimage.uniform_filter(values, 7)[3:-3, 3:-3]
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
    """
    curve = ndimage.uniform_filter1d(frc(prediction, truth), 5)
    below = np.flatnonzero(curve[2:] < FRC_THRESHOLD)
    ring = int(below[0]) + 2 if below.size else len(curve)
    return 0.5 * ring / len(curve)


def brenner(plane: Plane) -> float:
    """Mean squared difference of pixels two apart, in counts² (Brenner et al. 1976), both axes."""
    x = plane.astype(np.float64)
    down, across = x[2:] - x[:-2], x[:, 2:] - x[:, :-2]
    return float((np.mean(down**2) + np.mean(across**2)) / 2)


def tenengrad(plane: Plane) -> float:
    """Mean squared Sobel gradient over the squared mean (Krotkov 1988): no unit, exposure-free."""
    x = plane.astype(np.float64)
    gradient = np.mean(ndimage.sobel(x, 0) ** 2 + ndimage.sobel(x, 1) ** 2)
    return float(gradient) / max(float(x.mean()) ** 2, 1e-12)


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
