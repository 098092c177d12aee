"""`resnet9`: COMI's generator.

Zhang et al. 2022, Computational and Structural Biotechnology Journal, "Correction of out-of-focus
microscopic images by deep learning"; their code is jiangdat/COMI on GitHub.

A plane is folded to a quarter of its sides by two strided convolutions, changed by nine residual
blocks, unfolded again, and added to the input: 11.37 million parameters, 0.74 million
multiplications a pixel (0.85 with `resize`). It is for small frames or a large GPU
(docs/generators.md).

The paper describes it in two sentences; the released code (deblur.py) differs from them. Each
difference is an argument:

| argument | paper | released code |
|---|---|---|
| `upsampling` | `transposed` convolutions | `resize`: nearest neighbour, 3 × 3 convolution |
| `norm` | not said | `sample`: over all channels and pixels of a plane together |
| `padding` | not said | `zeros`, in strided layers below and on the right only |

`sample` is what keras_contrib's InstanceNormalization() does by its default, axis=None, whatever it
is called: one factor and one summand a layer. Both add tanh of the last convolution to the input
("global skip"), so no pixel changes by more than 1 of the network's range.

The paper calls the network one of "style-transfer type". Its well-known relatives (CycleGAN,
DeblurGAN) normalise by `instance`, each channel of a plane for itself, and pad by reflection
(`reflect`): PAPER takes that for what the paper leaves open, RELEASED is the code. The defaults are
PAPER but for the code's upsampling: a transposed convolution reaches neighbouring pixels through
different numbers of weights, which shows as a checkerboard; an interpolated plane has none.

`norm="batch"` is ours: its statistics are frozen after training and become part of the weights, so
that planes can be cut into tiles. `instance` and `sample` look at the whole plane.
"""

from typing import Any, Literal

import torch
from torch import Tensor, nn

from engine.generators.base import Generator
from engine.tiles import round_up

Upsampling = Literal["transposed", "resize"]
Norm = Literal["instance", "sample", "batch"]
Padding = Literal["reflect", "zeros"]

PAPER: dict[str, Any] = {"upsampling": "transposed", "norm": "instance", "padding": "reflect"}
RELEASED: dict[str, Any] = {"upsampling": "resize", "norm": "sample", "padding": "zeros"}

FOLD = 4
"""Sides of the folded plane are so many times smaller."""


class SampleNorm(nn.Module):
    """Each sample of a batch to mean 0 and deviation 1 over all its channels and pixels.

    As keras_contrib does it with axis=None: 0.001 is added to the deviation, not to the variance.
    """

    def __init__(self) -> None:
        super().__init__()
        self.scale = nn.Parameter(torch.ones(()))
        self.shift = nn.Parameter(torch.zeros(()))

    def forward(self, x: Tensor) -> Tensor:
        centred = x - x.mean((1, 2, 3), keepdim=True)
        deviation = centred.square().mean((1, 2, 3), keepdim=True).sqrt()
        return centred / (deviation + 1e-3) * self.scale + self.shift


class Block(nn.Module):
    """Two 3 × 3 convolutions with norms, added to the input; nothing after the sum."""

    def __init__(self, width: int, norm: Norm, padding: Padding) -> None:
        super().__init__()
        self.layers = nn.Sequential(
            nn.Conv2d(width, width, 3, padding=1, padding_mode=padding),
            _norm(norm, width),
            nn.ReLU(),
            nn.Conv2d(width, width, 3, padding=1, padding_mode=padding),
            _norm(norm, width),
        )

    def forward(self, x: Tensor) -> Tensor:
        y: Tensor = self.layers(x)
        return x + y


class ResNet9(Generator):
    """See the table above. *width*: channels of the first layer; *blocks*: residual blocks."""

    stride = 2 * FOLD  # not FOLD: a reflected border needs a second sample on the folded plane

    def __init__(
        self,
        width: int = 64,
        blocks: int = 9,
        upsampling: Upsampling = "resize",
        norm: Norm = "instance",
        padding: Padding = "reflect",
    ) -> None:
        super().__init__()
        self.arguments = {
            "width": width,
            "blocks": blocks,
            "upsampling": upsampling,
            "norm": norm,
            "padding": padding,
        }
        self.head = nn.Sequential(
            nn.Conv2d(1, width, 7, padding=3, padding_mode=padding), _norm(norm, width), nn.ReLU()
        )
        self.down = nn.Sequential(
            *_down(width, 2 * width, norm, padding), *_down(2 * width, 4 * width, norm, padding)
        )
        self.blocks = nn.Sequential(*(Block(4 * width, norm, padding) for _ in range(blocks)))
        self.up = nn.Sequential(
            *_up(4 * width, 2 * width, upsampling, norm, padding),
            *_up(2 * width, width, upsampling, norm, padding),
        )
        self.tail = nn.Conv2d(width, 1, 7, padding=3, padding_mode=padding)
        for module in self.modules():
            if isinstance(module, nn.Conv2d | nn.ConvTranspose2d):  # Keras' defaults
                nn.init.xavier_uniform_(module.weight)
                if module.bias is not None:
                    nn.init.zeros_(module.bias)

    def forward(self, x: Tensor) -> Tensor:
        h = self.head(x)  # (n, 64, y, x)
        h = self.blocks(self.down(h))  # (n, 256, y/4, x/4)
        h = self.up(h)  # (n, 64, y, x)
        return x + torch.tanh(self.tail(h))

    def reach_px(self) -> int | None:
        """Sum of the convolutions' radii, a sample of the folded plane being FOLD pixels wide."""
        if self.arguments["norm"] != "batch":
            return None
        head_and_tail = 3 + 3
        down_and_up = 2 * (1 + 2)
        blocks = self.arguments["blocks"] * 2 * FOLD
        return round_up(head_and_tail + down_and_up + blocks + FOLD, self.stride)


def _norm(norm: Norm, width: int) -> nn.Module:
    if norm == "sample":
        return SampleNorm()
    return nn.InstanceNorm2d(width) if norm == "instance" else nn.BatchNorm2d(width)


def _down(inputs: int, outputs: int, norm: Norm, padding: Padding) -> list[nn.Module]:
    """Half the sides."""
    if padding == "zeros":
        layers = [nn.ZeroPad2d((0, 1, 0, 1)), nn.Conv2d(inputs, outputs, 3, stride=2)]
    else:
        layers = [nn.Conv2d(inputs, outputs, 3, stride=2, padding=1, padding_mode=padding)]
    return [*layers, _norm(norm, outputs), nn.ReLU()]


def _up(
    inputs: int, outputs: int, upsampling: Upsampling, norm: Norm, padding: Padding
) -> list[nn.Module]:
    """Twice the sides."""
    if upsampling == "transposed":
        layers: list[nn.Module] = [
            nn.ConvTranspose2d(inputs, outputs, 3, stride=2, padding=1, output_padding=1)
        ]
    else:
        layers = [
            nn.Upsample(scale_factor=2.0, mode="nearest"),
            nn.Conv2d(inputs, outputs, 3, padding=1, padding_mode=padding),
        ]
    return [*layers, _norm(norm, outputs), nn.ReLU()]
