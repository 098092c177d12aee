"""What every generator promises, whatever its architecture: as a network, a package and a plan."""

import json
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
import torch
from safetensors.torch import load_file
from torch import nn

from engine import plan
from engine.generators import ARCHITECTURES, Generator, build
from engine.generators.resnet9 import PAPER, RELEASED
from engine.package import WEIGHTS, Package, read_golden
from engine.packing import golden, untrained
from engine.runtimes.openvino import OpenVino
from refocus.errors import PackageError

SMALL: dict[str, tuple[str, dict[str, Any]]] = {
    "paper": ("resnet9", {**PAPER, "width": 4, "blocks": 1}),
    "released": ("resnet9", {**RELEASED, "width": 4, "blocks": 1}),
    "for tiles": ("resnet9", {"norm": "batch", "width": 4, "blocks": 1}),
    "refocus-unet": ("refocus-unet", {"width": 4}),
}


@pytest.fixture(autouse=True, scope="module")
def no_progress_thread() -> Iterator[None]:
    """torch.fx opens progress bars even where none is shown; tqdm keeps a thread for them."""
    with pytest.MonkeyPatch.context() as patch:
        if "tqdm" in sys.modules:
            patch.setattr("tqdm.tqdm.monitor_interval", 0)
        yield


@pytest.fixture(scope="module", params=SMALL)
def package(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Package:
    return untrained(tmp_path_factory.mktemp("packages") / "small", *SMALL[request.param])


def network_of(package: Package) -> Generator:
    network = build(package.manifest.architecture, package.manifest.arguments)
    network.load_state_dict(load_file(package.folder / WEIGHTS))
    return network.eval()


@pytest.mark.parametrize(
    ("architecture", "arguments", "parameters"),
    [
        ("light", {}, 924_864),
        ("resnet9", {}, 11_365_633),
        ("resnet9", PAPER, 11_365_633),
        ("refocus-unet", {}, 41_221_945),
    ],
)
def test_parameters(architecture: str, arguments: dict[str, Any], parameters: int) -> None:
    """COMI's generator is known to have 11.37 million; ResNet-34 without classifier has 21.28."""
    network = build(architecture, arguments)
    assert sum(p.numel() for p in network.parameters()) == parameters


@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_the_smallest_plane_and_any_multiple_of_the_stride(architecture: str) -> None:
    torch.manual_seed(0)
    narrow = {"widths": [4, 4, 4, 4]} if architecture == "light" else {"width": 4}
    network = build(architecture, narrow).eval()
    for rows, columns in ((1, 1), (2, 3)):
        plane = torch.randn(2, 1, rows * network.stride, columns * network.stride)
        with torch.inference_mode():
            answer = network(plane)
        assert answer.shape == plane.shape
        assert answer.isfinite().all()


@pytest.mark.parametrize(("architecture", "arguments"), SMALL.values(), ids=SMALL)
def test_arguments_are_enough_to_build_it_anew(
    architecture: str, arguments: dict[str, Any]
) -> None:
    network = build(architecture, arguments)
    again = build(architecture, json.loads(json.dumps(network.arguments)))
    again.load_state_dict(network.state_dict())
    assert again.arguments == network.arguments
    assert again.arguments.items() >= arguments.items()


def test_wrong_arguments_are_refused_by_name() -> None:
    with pytest.raises(PackageError, match=r"'resnet9' cannot be built with \{'depth': 3\}"):
        build("resnet9", {"depth": 3})


def averaging(architecture: str, arguments: dict[str, Any]) -> Generator:
    """In float64, all weights positive: no rectifier and no cancelling hides what is looked at."""
    network = build(architecture, arguments).eval().double()
    for module in network.modules():
        if isinstance(module, nn.Conv2d | nn.ConvTranspose2d):
            if nn.utils.parametrize.is_parametrized(module):
                nn.utils.parametrize.remove_parametrizations(module, "weight")
            nn.init.constant_(module.weight, 1 / module.weight[0].numel())
    return network


@pytest.mark.parametrize(
    ("architecture", "arguments"),
    [
        ("resnet9", {"width": 2, "norm": "batch"}),
        ("resnet9", {"width": 2, "norm": "batch", "upsampling": "transposed"}),
        ("resnet9", {"width": 2, "norm": "batch", "padding": "zeros"}),
        ("refocus-unet", {"width": 2}),
    ],
)
def test_no_pixel_beyond_the_reach_is_seen(architecture: str, arguments: dict[str, Any]) -> None:
    network = averaging(architecture, arguments)
    reach, stride = network.reach_px(), network.stride
    assert reach is not None
    plane = torch.full(
        (1, 1, 2 * reach + 3 * stride, stride), 1e-3, dtype=torch.float64, requires_grad=True
    )
    answer = network(plane)
    seen = 0
    for row in range(reach + stride, reach + 2 * stride):  # every place within a bottom sample
        (gradient,) = torch.autograd.grad(answer[0, 0, row].sum(), plane, retain_graph=True)
        rows = gradient[0, 0].abs().sum(1).nonzero()
        seen = max(seen, row - int(rows.min()), int(rows.max()) - row)
    assert reach - stride < seen <= reach


def test_what_looks_at_the_whole_plane_promises_no_reach() -> None:
    for norm in ("instance", "sample"):
        torch.manual_seed(0)
        network = build("resnet9", {"width": 4, "blocks": 1, "norm": norm}).eval()
        assert network.reach_px() is None
        plane = torch.randn(1, 1, 8, 512)
        other = plane.clone()
        other[..., -8:] += 5
        with torch.inference_mode():
            assert (network(plane) - network(other))[..., :8].abs().max() > 1e-4


@pytest.mark.parametrize(
    "package", ["for tiles", pytest.param("refocus-unet", marks=pytest.mark.long)], indirect=True
)
def test_a_tile_with_its_halo_is_the_whole(package: Package) -> None:
    network, halo = network_of(package), package.manifest.halo_px
    assert halo is not None
    start, side = 3 * network.stride, 64
    plane = torch.randn(1, 1, start + side + 2 * halo + network.stride, 64)
    with torch.inference_mode():
        whole = network(plane)[:, :, start + halo : start + halo + side]
        tile = network(plane[:, :, start : start + side + 2 * halo])[:, :, halo : halo + side]
        near = network(plane[:, :, start + halo : start + halo + side])
    torch.testing.assert_close(tile, whole, atol=1e-5, rtol=1e-5)
    assert (near - whole).abs().max() > 0.01


def test_openvino_answers_as_pytorch_does(package: Package) -> None:
    """Golden planes, and a size that is no multiple of any stride."""
    network, runtime = network_of(package), OpenVino(threads=1, precision="f32")
    try:
        for known in read_golden(package):
            assert np.abs(known.answer.astype(int) - known.pixels).mean() > 1
            runtime.load(package, known.pixels.shape)
            answer = runtime.refocus(known.pixels, known.scaling).pixels
            assert np.abs(answer.astype(int) - known.answer).max() <= 1
        odd = known.pixels[:75, :101]
        pad = [(0, -side % network.stride) for side in odd.shape]
        wanted = golden(network, np.pad(odd, pad, mode="reflect"))
        runtime.load(package, odd.shape)
        answer = runtime.refocus(odd, wanted.scaling).pixels
        assert np.abs(answer.astype(int) - wanted.answer[:75, :101]).max() <= 1
    finally:
        runtime.close()


def test_the_master_is_plain(package: Package) -> None:
    """Any batch and size, no norm that training alone needs, no path of the machine."""
    master = onnx.load_from_string(package.generator)
    for value in (*master.graph.input, *master.graph.output):
        n, channels, rows, columns = value.type.tensor_type.shape.dim
        assert channels.dim_value == 1
        assert not any(d.dim_value for d in (n, rows, columns))
    operators = {node.op_type for node in master.graph.node}
    assert not operators & {"BatchNormalization", "Shape", "ReduceSum", "Expand"}
    assert str(Path(__file__).parents[1]).encode() not in package.generator
    assert str(Path(torch.__file__).parents[1]).encode() not in package.generator


@pytest.mark.parametrize("package", ["for tiles"], indirect=True)
def test_the_same_seed_gives_the_same_package(package: Package, tmp_path: Path) -> None:
    again = untrained(tmp_path / "again", *SMALL["for tiles"])
    assert again.hash == package.hash


def test_tensorrt_for_rtx_builds_a_plan_of_it(package: Package) -> None:
    pytest.importorskip("tensorrt_rtx")
    toolkit = plan.open_toolkit("tensorrt_rtx")
    profile = plan.profile_for((200, 300), package.manifest.stride)
    built = plan.build(toolkit, package.generator, profile, workspace_bytes=1 << 30)
    assert len(built) > len(package.generator) / 2
    assert toolkit.messages() == []


@pytest.mark.long
@pytest.mark.parametrize(
    ("architecture", "arguments"),
    [
        ("resnet9", PAPER),
        ("resnet9", RELEASED),
        ("refocus-unet", {}),
        ("refocus-unet", {"norm": "batch"}),
    ],
)
def test_networks_of_full_size_become_plans_for_large_frames(
    architecture: str, arguments: dict[str, Any], tmp_path: Path
) -> None:
    """The exporter itself holds them against PyTorch."""
    pytest.importorskip("tensorrt_rtx")
    package = untrained(tmp_path / "package", architecture, arguments)
    toolkit = plan.open_toolkit("tensorrt_rtx")
    profile = plan.profile_for((2048, 2048), package.manifest.stride)
    built = plan.build(toolkit, package.generator, profile, workspace_bytes=8 << 30)
    assert len(built) > len(package.generator) / 2
    assert toolkit.messages() == []
