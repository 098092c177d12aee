"""Muon: an optimiser for weights that are matrices, which convolutions are, too (Jordan 2024).

The momentum of each weight, as a matrix (outputs, inputs × kernel), is replaced by the nearest
orthogonal one, so that a step moves all directions of it alike instead of the few that the gradient
favours. In 400 steps from scratch this generator gained 1.54 dB with it and 1.25 with AdamW at
2e-3, at a tenth more time a step. First and last layers are no maps between features and keep
AdamW.

The rate matters more than it looks: undoing strong blur takes a large and exact amplification,
which large steps shake apart. After 3,900 steps the gain beyond two depths of field was 0.82 dB at
a rate of 0.02, 1.66 dB at 0.01 and 2.18 dB at 0.004 (0.97 dB after 3,300 steps of AdamW at 2e-3).
"""

import math
from collections.abc import Iterable

import torch
from torch import Tensor

MOMENTUM = 0.95
QUINTIC = (3.4445, -4.7750, 2.0315)
"""Jordan's coefficients: five iterations bring all singular values to 0.7 to 1.2."""


class Muon(torch.optim.Optimizer):
    """One learning rate, Nesterov momentum, no weight decay. *parameters* have two axes or more."""

    def __init__(self, parameters: Iterable[Tensor], lr: float) -> None:
        super().__init__(parameters, {"lr": lr})

    @torch.no_grad()
    def step(self) -> None:  # type: ignore[override]  # no closure
        for group in self.param_groups:
            for weight in group["params"]:
                if "momentum" not in self.state[weight]:
                    self.state[weight]["momentum"] = torch.zeros_like(weight)
                momentum = self.state[weight]["momentum"]
                momentum.lerp_(weight.grad, 1 - MOMENTUM)
                ahead = weight.grad.lerp(momentum, MOMENTUM)
                direction = _orthogonalise(ahead.reshape(len(ahead), -1)).reshape(weight.shape)
                weight.add_(direction, alpha=-group["lr"])


def _orthogonalise(matrix: Tensor) -> Tensor:
    """Newton-Schulz iteration towards U V' of the matrix's U S V', in bfloat16.

    Scaled by √(rows / columns) where that is above 1, so that a step changes outputs alike.
    """
    a, b, c = QUINTIC
    is_tall = matrix.shape[0] > matrix.shape[1]
    x = matrix.bfloat16()
    x = x.T if is_tall else x
    x = x / (x.norm() + 1e-7)
    for _ in range(5):
        gram = x @ x.T
        x = a * x + (b * gram + c * gram @ gram) @ x
    x = x.T if is_tall else x
    scaled: Tensor = math.sqrt(max(1.0, matrix.shape[0] / matrix.shape[1])) * x.float()
    return scaled
