"""What a network costs is counted right: held against torch's own counter and figures by hand."""

from typing import Any

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode

from benchmarks.generators import GPUS, roofline_s
from engine.generators import build
from engine.generators.cost import Layer, layers, macs
from engine.generators.resnet9 import PAPER


@pytest.mark.parametrize(
    ("architecture", "arguments"),
    [
        ("light", {"widths": [4, 6, 8, 8]}),
        ("resnet9", {"width": 4, "blocks": 2}),
        ("resnet9", {**PAPER, "width": 4, "blocks": 2}),
        ("refocus-unet", {"width": 4}),
    ],
)
def test_multiplications_are_those_that_torch_counts(
    architecture: str, arguments: dict[str, Any]
) -> None:
    network = build(architecture, arguments).eval()
    with FlopCounterMode(display=False) as counter, torch.no_grad():
        network(torch.zeros(1, 1, 64, 96))
    assert macs(network, (64, 96)) == counter.get_total_flops() / 2


def test_comis_generator_at_2048() -> None:
    assert round(macs(build("resnet9", PAPER), (2048, 2048)) / 1e9) == 3119


def test_what_layers_move() -> None:
    """The first layer by hand: 1 channel in, 8 out, 7 × 7 weights, 2 bytes each; then its norm."""
    first, norm, *_ = layers(build("resnet9", {"width": 8, "blocks": 1}), (64, 80))
    assert first == Layer(64 * 80 * 8 * 49, 2 * (64 * 80 * (1 + 8) + 8 * 49), 1)
    assert norm == Layer(0, 2 * 3 * 64 * 80 * 8, 8)


def test_the_roofline_takes_the_longer_of_computing_and_moving() -> None:
    gpu = GPUS[0]
    computing = Layer(macs=10**12, moved_bytes=1, channels=64)
    moving = Layer(macs=1, moved_bytes=10**9, channels=64)
    assert roofline_s(gpu, [computing]) == pytest.approx(2 / (77 * 0.6))
    assert roofline_s(gpu, [moving]) == pytest.approx(1 / (448 * 0.8))
    both = roofline_s(gpu, [computing, moving])
    assert both == pytest.approx(roofline_s(gpu, [computing]) + roofline_s(gpu, [moving]))
