"""What the `light` generator promises by its architecture, trained or not."""

import sys
from collections.abc import Iterator

import numpy as np
import onnx
import pytest
import torch
from onnx.reference import ReferenceEvaluator

from engine import to_onnx
from engine.generators import build
from engine.generators.light import Light
from refocus.errors import PackageError


@pytest.fixture(autouse=True, scope="module")
def no_progress_thread() -> Iterator[None]:
    """torch.fx opens progress bars even where none is shown; tqdm keeps a thread for them."""
    with pytest.MonkeyPatch.context() as patch:
        if "tqdm" in sys.modules:
            patch.setattr("tqdm.tqdm.monitor_interval", 0)
        yield


@pytest.fixture(scope="module")
def network() -> Light:
    """Random weights, the last layer too: a network that changes its input everywhere."""
    torch.manual_seed(0)
    network = Light(widths=(4, 6, 8, 8)).eval()
    torch.nn.init.normal_(network.tail.weight, std=0.2)
    return network


@pytest.fixture(scope="module")
def master(network: Light) -> onnx.ModelProto:
    return onnx.load_from_string(to_onnx.export(network))


def test_untrained_it_changes_nothing() -> None:
    planes = torch.randn(2, 1, 32, 48)
    assert torch.equal(Light()(planes), planes)


def test_it_is_light() -> None:
    assert 200_000 <= sum(p.numel() for p in Light().parameters()) <= 1_000_000


def test_the_answer_scales_with_the_input(network: Light) -> None:
    planes = torch.randn(1, 1, 64, 64)
    with torch.inference_mode():
        torch.testing.assert_close(network(4 * planes), 4 * network(planes), atol=1e-3, rtol=0)


def test_no_pixel_beyond_the_reach_is_seen() -> None:
    torch.manual_seed(0)
    network = Light(widths=(2, 2, 2, 2))
    torch.nn.init.normal_(network.tail.weight)
    reach, stride = network.reach_px(), network.stride
    seen = 0
    for row in range(reach + stride, reach + 2 * stride):  # every place within a bottom sample
        plane = torch.randn(1, 1, 2 * reach + 3 * stride, stride, requires_grad=True)
        (gradient,) = torch.autograd.grad(network(plane)[0, 0, row].sum(), plane)
        rows = gradient[0, 0].abs().sum(1).nonzero()
        seen = max(seen, row - int(rows.min()), int(rows.max()) - row)
    assert reach - stride < seen <= reach


def test_a_tile_with_its_halo_is_the_whole(network: Light) -> None:
    halo, side = network.reach_px(), 32
    plane = torch.randn(1, 1, side + 2 * halo + 48, side + 2 * halo + 80)
    with torch.inference_mode():
        whole = network(plane)[..., halo + 48 : halo + 48 + side, halo + 64 : halo + 64 + side]
        tile = network(plane[..., 48 : 48 + side + 2 * halo, 64 : 64 + side + 2 * halo])
    torch.testing.assert_close(tile[..., halo:-halo, halo:-halo], whole, atol=1e-5, rtol=1e-5)


def test_a_manifest_builds_the_network_it_names() -> None:
    network = build("light", {"widths": [4, 8], "bottom_blocks": 1})
    assert network.arguments == {"widths": [4, 8], "bottom_blocks": 1}
    assert network.stride == 4
    with pytest.raises(PackageError, match=r"'heavy' is not known; this Refocus has light"):
        build("heavy", {})


def test_the_onnx_master_takes_any_batch_and_any_multiple_of_the_stride(
    network: Light, master: onnx.ModelProto
) -> None:
    planes = np.random.default_rng(0).standard_normal((3, 1, 48, 32)).astype(np.float32)
    (answer,) = ReferenceEvaluator(master).run(None, {"input": planes})
    with torch.inference_mode():
        wanted = network(torch.from_numpy(planes)).numpy()
    np.testing.assert_allclose(answer, wanted, atol=1e-5)


def test_a_master_that_computes_something_else_is_not_handed_out(master: onnx.ModelProto) -> None:
    torch.manual_seed(1)
    other = Light(widths=(4, 6, 8, 8)).eval()
    torch.nn.init.normal_(other.tail.weight, std=0.2)
    with pytest.raises(PackageError, match="differs from PyTorch"):
        to_onnx.verify(master, other)
