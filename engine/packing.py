"""From a network in PyTorch to the files of a model package.

`pack` is what publishing a training and making an untrained generator share. The golden planes'
answers are PyTorch's own, in float32, so whatever runs the package later is held against the
network and not against another runtime.

`untrained` serves benchmarks and tests, which need a package of any architecture and no training.
Its weights are random, but the numbers inside stay in the range that a trained network's have.
"""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors.torch import save
from torch import nn

from engine.generators import Generator, build
from engine.package import (
    GOLDEN,
    ONNX,
    WEIGHTS,
    Golden,
    Manifest,
    Package,
    Training,
    encode_golden,
    write,
)
from engine.scaling import derive, to_counts, to_network
from engine.to_onnx import export
from refocus.frame import Pixels


def pack(network: Generator, planes: Sequence[Pixels]) -> dict[str, bytes]:
    """Weights, ONNX master and golden planes of *network*, by file name.

    *planes*: (y, x), uint8 or uint16, none flat, sides multiples of the network's stride.
    """
    network = network.eval()
    weights = {name: tensor.contiguous() for name, tensor in network.state_dict().items()}
    return {
        WEIGHTS: save(weights),
        ONNX: export(network),
        GOLDEN: encode_golden([golden(network, pixels) for pixels in planes]),
    }


def golden(network: Generator, pixels: Pixels) -> Golden:
    """*pixels*, and what *network* makes of them in float32 with the scaling that they derive."""
    scaling = derive([pixels])
    assert scaling is not None, "a flat plane has no scaling"
    with torch.inference_mode():
        plane = torch.from_numpy(to_network(pixels, scaling))[None, None]
        answer, _ = to_counts(network(plane)[0, 0].numpy(), scaling, pixels.dtype)
    return Golden(pixels=pixels, scaling=scaling, answer=answer)


def untrained(
    folder: Path, architecture: str, arguments: dict[str, Any] | None = None, *, seed: int = 0
) -> Package:
    """Write a package of a network with random weights at *folder*, which must not exist.

    The same *seed* gives the same package. It takes planes of any pixel size and refocuses nothing.
    """
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        network = build(architecture, arguments or {})
        _wake(network)
    manifest = Manifest(
        name=f"{architecture}-untrained",
        version="0",
        architecture=architecture,
        arguments=network.arguments,
        stride=network.stride,
        halo_px=network.reach_px(),
        modality="fluorescence",
        pixel_um=(0.0, 1000.0),
        defocus_um=(0.0, 0.0),
        defocus_dof=(0.0, 0.0),
        training=Training(command="none: random weights", files=(), notes={"seed": seed}),
        created="1970-01-01T00:00:00+00:00",
    )
    planes = [_spots(np.uint16), _spots(np.uint8)]
    return write(folder, manifest, pack(network, planes))


def _wake(network: Generator) -> None:
    """Random weights for layers that start at zero, and statistics of a plane for BatchNorms."""
    for parameter in network.parameters():
        if parameter.ndim == 4 and not parameter.any():
            nn.init.normal_(parameter, std=0.2)
    norms = [module for module in network.modules() if isinstance(module, nn.BatchNorm2d)]
    for norm in norms:
        norm.momentum = 1.0
    pixels = _spots(np.uint16)
    scaling = derive([pixels])
    assert scaling is not None
    with torch.no_grad():
        network.train()(torch.from_numpy(to_network(pixels, scaling))[None, None])
    for norm in norms:
        assert norm.running_var is not None
        # A channel that one plane hardly moves would be blown up to a thousand times its value.
        norm.running_var.clamp_(min=float(norm.running_var.mean()) / 10)


def _spots(dtype: type[np.uint8] | type[np.uint16], side_px: int = 128) -> Pixels:
    """Smooth spots under photon noise, with room for answers above and below them."""
    rng = np.random.default_rng(0)
    y, x = np.mgrid[:side_px, :side_px]
    light = np.zeros((side_px, side_px))
    for _ in range(20):
        centre_y, centre_x, radius_px = *rng.uniform(0, side_px, 2), rng.uniform(2, 8)
        light += np.exp(-((y - centre_y) ** 2 + (x - centre_x) ** 2) / (2 * radius_px**2))
    full = 65_535
    electrons = rng.poisson((0.45 + 0.15 * light / light.max()) * full)
    spots: Pixels = (electrons * (np.iinfo(dtype).max / full)).astype(dtype)
    return spots
