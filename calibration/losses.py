"""What training minimises, and when.

The order matters more than the terms. A squared error spends everything on hopeless pictures and
spoils easy ones. Charbonnier with a Fourier term learns to undo strong blur. The mean over pictures
of the log of the error, which is the mean of their PSNR, weighs a picture that is nearly right as
much as one that is far off, and so teaches not to harm. Hence one after the other, with a
remainder of the first to the end, or what was learnt about strong blur fades again.

All take answer and truth as (n, 1, y, x) in the network's range and return a scalar.
"""

import torch
from torch import Tensor

FOURIER_WEIGHT = 0.05
LOG_WEIGHT = 0.1
"""Brings the log of the error to the size of the Charbonnier term: one learning rate fits."""

LOG_FLOOR = 1e-6
"""Relative squared error below which a picture counts as right: -60 dB of its own variance."""

BLEND_FROM, BLEND_TO = 0.5, 0.75
"""Shares of the training between which the loss passes from one to the other."""

REMAINDER = 0.25
"""Weight that the early loss keeps to the end."""


def charbonnier(answer: Tensor, truth: Tensor) -> Tensor:
    """Mean of √(d² + 0.01²): an absolute error without its kink at zero."""
    return ((answer - truth) ** 2 + 1e-4).sqrt().mean()


def fourier_l1(answer: Tensor, truth: Tensor) -> Tensor:
    """Mean absolute difference of the spectra: fine detail counts although its power is low."""
    return torch.view_as_real(torch.fft.rfft2(answer - truth, norm="ortho")).abs().mean()


def log_error(answer: Tensor, truth: Tensor) -> Tensor:
    """Mean over pictures of ln(MSE / variance of the truth): minus their PSNR, up to a factor."""
    error = ((answer - truth) ** 2).mean((1, 2, 3))
    return torch.log(error / (truth.var((1, 2, 3)) + 1e-3) + LOG_FLOOR).mean()


def scheduled(answer: Tensor, truth: Tensor, progress: float) -> Tensor:
    """The loss at *progress* (0 to 1) of the training."""
    log_share = min(1.0, max(0.0, (progress - BLEND_FROM) / (BLEND_TO - BLEND_FROM)))
    early = charbonnier(answer, truth) + FOURIER_WEIGHT * fourier_l1(answer, truth)
    if log_share == 0:
        return early
    early_weight = 1 - (1 - REMAINDER) * log_share
    return early_weight * early + LOG_WEIGHT * log_share * log_error(answer, truth)
