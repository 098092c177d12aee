"""The networks of the papers are what their sources say: layers, names, shapes, first weights."""

from typing import Any

import numpy as np
import pytest
import torch
from torch import nn

from engine.generators.refocus_unet import RefocusUNet, ResNet34, Shuffle
from engine.generators.resnet9 import PAPER, RELEASED, ResNet9, SampleNorm

NORM = ("weight", "bias", "running_mean", "running_var", "num_batches_tracked")


def torchvision_resnet34() -> dict[str, tuple[int, ...]]:
    """Names and shapes of torchvision.models.resnet34().state_dict(), from its public source.

    https://github.com/pytorch/vision/blob/main/torchvision/models/resnet.py
    """
    shapes: dict[str, tuple[int, ...]] = {"conv1.weight": (64, 3, 7, 7)}

    def norm(name: str, width: int) -> None:
        shapes.update({f"{name}.{key}": (width,) for key in NORM[:4]})
        shapes[f"{name}.num_batches_tracked"] = ()

    norm("bn1", 64)
    inputs = 64
    for level, (blocks, width) in enumerate(((3, 64), (4, 128), (6, 256), (3, 512)), 1):
        for k in range(blocks):
            block = f"layer{level}.{k}"
            shapes[f"{block}.conv1.weight"] = (width, inputs, 3, 3)
            norm(f"{block}.bn1", width)
            shapes[f"{block}.conv2.weight"] = (width, width, 3, 3)
            norm(f"{block}.bn2", width)
            if inputs != width:
                shapes[f"{block}.downsample.0.weight"] = (width, inputs, 1, 1)
                norm(f"{block}.downsample.1", width)
            inputs = width
    shapes["fc.weight"], shapes["fc.bias"] = (1000, 512), (1000,)
    return shapes


def test_the_encoder_takes_an_imagenet_state_dict() -> None:
    published = torchvision_resnet34()
    assert len(published) == 218
    assert published["layer3.0.downsample.0.weight"] == (256, 128, 1, 1)
    floats = [shape for name, shape in published.items() if "running" not in name and shape]
    assert sum(int(np.prod(shape)) for shape in floats) == 21_797_672  # torchvision's own figure
    state = {name: torch.zeros(shape) for name, shape in published.items() if name[:3] != "fc."}
    encoder = ResNet34(width=64)
    assert {name: tuple(t.shape) for name, t in encoder.state_dict().items()} == {
        name: tuple(t.shape) for name, t in state.items()
    }
    encoder.load_state_dict(state)


def test_the_encoder_halves_as_resnet_does() -> None:
    levels = ResNet34(width=64)(torch.zeros(1, 1, 64, 96))
    assert [tuple(level.shape[1:]) for level in levels] == [
        (64, 32, 48),
        (64, 16, 24),
        (128, 8, 12),
        (256, 4, 6),
        (512, 2, 3),
    ]


def test_the_decoder_has_the_widths_of_fastais_dynamic_unet() -> None:
    """fastai v1, vision/models/unet.py, for resnet34; the input's one channel joins at last."""
    network = RefocusUNet()
    widths = [up.second[0].out_channels for up in network.up]
    assert widths == [512, 384, 256, 96]
    assert network.last[0][0].in_channels == 97
    assert network.bottom[0][0].out_channels == 1024


@pytest.mark.parametrize("norm", ["weight", "batch"])
def test_a_shuffle_starts_without_a_pattern(norm: Any) -> None:
    torch.manual_seed(0)
    shuffle = Shuffle(6, 3, norm).eval()
    with torch.inference_mode():
        flat = shuffle(torch.rand(1, 6, 1, 1).expand(1, 6, 5, 7))
    assert flat.shape == (1, 3, 10, 14)
    torch.testing.assert_close(flat, flat[..., :1, :1].expand_as(flat))
    assert flat.abs().max() > 0


@pytest.mark.parametrize("norm", ["weight", "batch"])
def test_what_the_unet_learns_reaches_every_weight(norm: Any) -> None:
    torch.manual_seed(0)
    network = RefocusUNet(width=4, norm=norm)
    network(torch.randn(2, 1, 64, 64)).square().mean().backward()
    idle = [n for n, p in network.named_parameters() if p.grad is None or not p.grad.any()]
    assert idle == []


def test_papers_and_code_differ_where_the_table_says() -> None:
    def count(network: ResNet9, kind: type[nn.Module]) -> int:
        return sum(isinstance(module, kind) for module in network.modules())

    paper, released = ResNet9(**PAPER), ResNet9(**RELEASED)
    assert (count(paper, nn.ConvTranspose2d), count(released, nn.ConvTranspose2d)) == (2, 0)
    assert (count(paper, nn.InstanceNorm2d), count(released, SampleNorm)) == (23, 23)
    for network in (paper, released):
        assert len(network.blocks) == 9
        assert [layer.stride for layer in network.down if isinstance(layer, nn.Conv2d)] == [
            (2, 2)
        ] * 2


def test_sample_norm_is_keras_contribs() -> None:
    """(x - mean) / (std + 0.001) over everything but the batch, times gamma plus beta."""
    x = np.random.default_rng(0).normal(3, 2, (2, 4, 5, 6)).astype(np.float32)
    norm = SampleNorm()
    nn.init.constant_(norm.scale, 1.5)
    nn.init.constant_(norm.shift, -0.25)
    axes = (1, 2, 3)
    wanted = (x - x.mean(axes, keepdims=True)) / (x.std(axes, keepdims=True) + 1e-3) * 1.5 - 0.25
    np.testing.assert_allclose(norm(torch.from_numpy(x)).detach().numpy(), wanted, atol=1e-5)


@pytest.mark.parametrize("variant", [PAPER, RELEASED])
def test_comis_correction_is_bounded(variant: dict[str, Any]) -> None:
    torch.manual_seed(0)
    network = ResNet9(width=4, blocks=2, **variant)
    plane = 100 * torch.randn(1, 1, 32, 32)
    with torch.inference_mode():
        correction = network(plane) - plane
    assert 0.1 < correction.abs().max() <= 1.0001
