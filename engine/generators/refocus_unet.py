"""`refocus-unet`: the U-Net of the ReFocus blog, a decoder grown on ResNet-34.

The blog's network is one line of fastai v1: unet_learner(resnet34, blur=True, norm_type=Weight).
So this follows fastai's DynamicUnet: on each of four levels the plane is doubled by a 1 × 1
convolution and a pixel shuffle, blurred over 2 × 2 pixels against the checkerboard, joined with
what the encoder saw there, and convolved twice; at last it is joined with the input itself. Its
answer is the picture, not a correction. No self-attention: the blog's line does not ask for it.
41 million parameters.

Where we differ from fastai:

- A pixel shuffle's four convolutions start equal (ICNR), so that it starts without a pattern. With
  norm_type=Weight fastai sets them so, too, but on a tensor that the weight norm overwrites at the
  first step.
- Its pictures have three equal colours, ours has one plane: one channel is joined at last, and one
  is the answer. The encoder's first layer keeps ImageNet's three colours and gets the plane three
  times. Planes enter in the network's range, background near 0 and structures near 1: within what
  pictures normalised for ImageNet have (-2.1 to 2.6), so nothing is subtracted.

The shuffle before the last level is blurred as well: in fastai by an oversight (a layer takes the
name of the flag that should switch it), but the blog's network was trained like that.

The encoder's parameters have torchvision's names and shapes: an ImageNet state dict loads with
`network.encoder.load_state_dict`, once the classifier (`fc.weight`, `fc.bias`) is taken out.

The norms are BatchNorm and weight norm: both become plain factors when the network is exported, so
planes can be cut into tiles; but a pixel looks 637 px far, tiles carry a wide halo.
"""

from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.utils.parametrizations import weight_norm

from engine.generators.base import Generator
from engine.tiles import round_up

Norm = Literal["weight", "batch"]

BLOCKS = (3, 4, 6, 3)
"""Residual blocks on each level of ResNet-34."""


class BasicBlock(nn.Module):
    """ResNet's block of two 3 × 3 convolutions; *stride* 2 halves the sides."""

    def __init__(self, inputs: int, outputs: int, stride: int) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(inputs, outputs, 3, stride=stride, padding=1, bias=False)
        self.bn1 = nn.BatchNorm2d(outputs)
        self.conv2 = nn.Conv2d(outputs, outputs, 3, padding=1, bias=False)
        self.bn2 = nn.BatchNorm2d(outputs)
        self.downsample = nn.Sequential()
        if inputs != outputs or stride != 1:
            self.downsample.append(nn.Conv2d(inputs, outputs, 1, stride=stride, bias=False))
            self.downsample.append(nn.BatchNorm2d(outputs))

    def forward(self, x: Tensor) -> Tensor:
        y = F.relu(self.bn1(self.conv1(x)))
        return F.relu(self.bn2(self.conv2(y)) + self.downsample(x))


class ResNet34(nn.Module):
    """The encoder (He et al. 2016), without classifier; *width* is 64 in the original."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(3, width, 7, stride=2, padding=3, bias=False)
        self.bn1 = nn.BatchNorm2d(width)
        self.layer1 = _level(width, width, BLOCKS[0], stride=1)
        self.layer2 = _level(width, 2 * width, BLOCKS[1], stride=2)
        self.layer3 = _level(2 * width, 4 * width, BLOCKS[2], stride=2)
        self.layer4 = _level(4 * width, 8 * width, BLOCKS[3], stride=2)
        for module in self.modules():
            if isinstance(module, nn.Conv2d):
                nn.init.kaiming_normal_(module.weight, mode="fan_out", nonlinearity="relu")

    def forward(self, x: Tensor) -> list[Tensor]:
        """What each level sees of a grey plane, finest first."""
        h = F.relu(self.bn1(self.conv1(torch.cat([x, x, x], 1))))  # (n, 64, y/2, x/2)
        levels = [h]
        levels.append(self.layer1(F.max_pool2d(h, 3, stride=2, padding=1)))  # (n, 64, y/4, x/4)
        levels.append(self.layer2(levels[-1]))  # (n, 128, y/8, x/8)
        levels.append(self.layer3(levels[-1]))  # (n, 256, y/16, x/16)
        levels.append(self.layer4(levels[-1]))  # (n, 512, y/32, x/32)
        return levels


class Shuffle(nn.Module):
    """Twice the sides by a pixel shuffle, then the mean over 2 × 2 pixels."""

    def __init__(self, inputs: int, outputs: int, norm: Norm) -> None:
        super().__init__()
        self.convolution = _convolution(inputs, 4 * outputs, 1, norm, alike=4)

    def forward(self, x: Tensor) -> Tensor:
        y = F.pixel_shuffle(F.relu(self.convolution(x)), 2)
        return F.avg_pool2d(F.pad(y, (1, 0, 1, 0), mode="replicate"), 2, stride=1)


class Up(nn.Module):
    """One level up: (n, below, y, x) and (n, beside, 2 y, 2 x) to (n, outputs, 2 y, 2 x)."""

    def __init__(self, below: int, beside: int, outputs: int, norm: Norm) -> None:
        super().__init__()
        joined = below // 2 + beside
        self.shuffle = Shuffle(below, below // 2, norm)
        self.beside_norm = _batch_norm(beside)
        self.first = _active(joined, outputs, norm)
        self.second = _active(outputs, outputs, norm)

    def forward(self, below: Tensor, beside: Tensor) -> Tensor:
        joined = torch.cat([self.shuffle(below), self.beside_norm(beside)], 1)
        y: Tensor = self.second(self.first(F.relu(joined)))
        return y


class RefocusUNet(Generator):
    """*width*: channels of the encoder's first level; *norm*: the decoder's."""

    stride = 32

    def __init__(self, width: int = 64, norm: Norm = "weight") -> None:
        super().__init__()
        self.arguments = {"width": width, "norm": norm}
        self.encoder = ResNet34(width)
        self.bottom_norm = _batch_norm(8 * width)
        self.bottom = nn.Sequential(
            _active(8 * width, 16 * width, norm), _active(16 * width, 8 * width, norm)
        )
        self.up = nn.ModuleList()
        below = 8 * width
        for beside in (4 * width, 2 * width, width, width):
            joined = below // 2 + beside
            outputs = joined if len(self.up) < 3 else joined // 2  # fastai narrows the last level
            self.up.append(Up(below, beside, outputs, norm))
            below = outputs
        self.last_shuffle = Shuffle(below, below, norm)
        joined = below + 1
        self.last = nn.Sequential(_active(joined, joined, norm), _active(joined, joined, norm))
        self.tail = _convolution(joined, 1, 1, norm)

    def forward(self, x: Tensor) -> Tensor:
        levels = self.encoder(x)
        h = self.bottom(F.relu(self.bottom_norm(levels.pop())))  # (n, 512, y/32, x/32)
        for up in self.up:
            h = up(h, levels.pop())  # (n, 512, y/16, x/16), 384 at 1/8, 256 at 1/4, 96 at 1/2
        h = torch.cat([self.last_shuffle(h), x], 1)  # (n, 97, y, x)
        y: Tensor = self.tail(h + self.last(h))  # (n, 1, y, x)
        return y

    def reach_px(self) -> int:
        """Sum of the convolutions' radii, each times the side of a sample on its level.

        A strided convolution counts in samples of the level it looks at. The blurs look one sample
        of theirs up and left, and the way up adds the side of one bottom sample at most.
        """
        first_and_pool = 3 + 2
        encoder = 2 * BLOCKS[0] * 4 + sum(
            side // 2 + (2 * blocks - 1) * side
            for blocks, side in zip(BLOCKS[1:], (8, 16, 32), strict=True)
        )
        decoder = 2 * (32 + 16 + 8 + 4 + 2 + 1)
        blurs = 16 + 8 + 4 + 2 + 1
        return round_up(first_and_pool + encoder + decoder + blurs + self.stride, self.stride)


def _level(inputs: int, outputs: int, blocks: int, stride: int) -> nn.Sequential:
    first = BasicBlock(inputs, outputs, stride)
    return nn.Sequential(first, *(BasicBlock(outputs, outputs, 1) for _ in range(blocks - 1)))


def _active(inputs: int, outputs: int, norm: Norm) -> nn.Sequential:
    """fastai's layer: 3 × 3 convolution, rectifier, and only then a BatchNorm where one is used."""
    layers = _convolution(inputs, outputs, 3, norm)
    return layers.insert(1, nn.ReLU())


def _convolution(inputs: int, outputs: int, size: int, norm: Norm, alike: int = 1) -> nn.Sequential:
    """Convolution with norm, no rectifier; *alike* neighbouring outputs start equal."""
    layer = nn.Conv2d(inputs, outputs, size, padding=size // 2, bias=norm == "weight")
    drawn = nn.init.kaiming_normal_(torch.empty(outputs // alike, inputs, size, size))
    with torch.no_grad():
        layer.weight.copy_(drawn.repeat_interleave(alike, 0))
    if norm == "batch":
        return nn.Sequential(layer, _batch_norm(outputs))
    assert layer.bias is not None
    nn.init.zeros_(layer.bias)
    return nn.Sequential(weight_norm(layer))


def _batch_norm(width: int) -> nn.BatchNorm2d:
    """fastai starts its BatchNorms a little above zero."""
    layer = nn.BatchNorm2d(width)
    nn.init.constant_(layer.bias, 1e-3)
    return layer
