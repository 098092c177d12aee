"""What a network costs: multiplications, and bytes that its layers have to move.

Counted on torch's device `meta`, which computes no values: planes of any size take milliseconds.
"""

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from engine.generators.base import Generator
from engine.generators.resnet9 import SampleNorm

FP16_BYTES = 2


@dataclass(frozen=True, slots=True)
class Layer:
    """A convolution, or a norm that has to look at the whole plane before it can act."""

    macs: int
    """Multiplications, each with a sum; 0 for a norm."""
    moved_bytes: int
    """Input and weights read once, output written once, in FP16; a norm reads its input twice."""
    channels: int
    """Of input and output the smaller number."""


def layers(network: Generator, shape: tuple[int, int]) -> list[Layer]:
    """What one plane of *shape* (y, x), multiples of the stride, costs, in the order of execution.

    What lies between (rectifiers, sums, pads, BatchNorms) is taken to be done on the way.
    """
    twin = type(network)(**network.arguments).eval().to("meta")
    found: list[Layer] = []

    def convolved(module: nn.Module, inputs: tuple[Tensor, ...], output: Tensor) -> None:
        weight: Any = module.weight
        walked = inputs[0] if isinstance(module, nn.ConvTranspose2d) else output
        moved = inputs[0].numel() + weight.numel() + output.numel()
        channels = min(inputs[0].shape[1], output.shape[1])
        macs = walked[0, 0].numel() * weight.numel()
        found.append(Layer(macs, moved * FP16_BYTES, channels))

    def normed(module: nn.Module, inputs: tuple[Tensor, ...], output: Tensor) -> None:
        found.append(Layer(0, 3 * output.numel() * FP16_BYTES, output.shape[1]))

    for module in twin.modules():
        if isinstance(module, nn.Conv2d | nn.ConvTranspose2d):
            module.register_forward_hook(convolved)
        elif isinstance(module, nn.InstanceNorm2d | SampleNorm):
            module.register_forward_hook(normed)
    with torch.inference_mode():
        twin(torch.empty(1, 1, *shape, device="meta"))
    return found


def macs(network: Generator, shape: tuple[int, int]) -> int:
    """Multiplications that one plane of *shape* (y, x) takes."""
    return sum(layer.macs for layer in layers(network, shape))
