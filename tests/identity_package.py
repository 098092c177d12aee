"""Model packages for tests: real ONNX that runtimes run, with answers known in advance.

Built as the generators are: a convolution and a way around it, which stays float32 where the
runtime computes in less. So `identity` gives exactly what it gets; `negated` (x - 2x) visibly
differs from its input, to prove that an answer came from the network; `nan` and `constant` are the
rubbish that checks must stop. `make_unet` has random weights and looks as far around a pixel as a
real generator does.
"""

from itertools import pairwise
from pathlib import Path
from typing import Any, Literal, cast

import numpy as np
import numpy.typing as npt
import onnx
from google.protobuf.message import DecodeError
from onnx import TensorProto, helper, numpy_helper
from onnx.reference import ReferenceEvaluator
from safetensors.numpy import save

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
from engine.scaling import Scaling, to_counts, to_network

GOLDEN_SCALING = Scaling(offset=100.0, scale=1000.0)
Answer = Literal["identity", "negated", "constant", "nan"]


def make(
    folder: Path,
    *,
    name: str = "identity",
    answer: Answer = "identity",
    stride: int = 16,
    halo_px: int | None = 16,
    pixel_um: tuple[float, float] = (0.05, 2.0),
) -> Package:
    """Write a package at *folder* whose network gives *answer*, and return it."""
    centre, residual = {
        "identity": (0.0, True),
        "negated": (-2.0, True),
        "constant": (0.0, False),
        "nan": (np.nan, False),
    }[answer]
    weights = np.zeros((1, 1, 3, 3), np.float32)
    weights[0, 0, 1, 1] = centre
    return write_package(
        folder, to_onnx(weights, residual), weights, name, stride, halo_px, pixel_um
    )


def write_package(
    folder: Path,
    generator: bytes,
    weights: npt.NDArray[np.float32],
    name: str,
    stride: int,
    halo_px: int | None,
    pixel_um: tuple[float, float] = (0.05, 2.0),
    ends: bool = True,
) -> Package:
    """Write a package at *folder* around the ONNX file *generator*; *ends*: it gives an answer."""
    manifest = Manifest(
        name=name,
        version="0",
        architecture="test",
        stride=stride,
        halo_px=halo_px,
        modality="fluorescence",
        pixel_um=pixel_um,
        defocus_um=(0.0, 10.0),
        defocus_dof=(0.0, 10.0),
        training=Training(command="none", files=()),
        created="2026-01-01T00:00:00Z",
    )
    plane = np.random.default_rng(0).integers(0, 4096, (96, 96), dtype=np.uint16)
    golden = encode_golden(
        [Golden(plane, GOLDEN_SCALING, _answer(generator, plane) if ends else plane)]
    )
    files = {WEIGHTS: save({"weight": weights}), ONNX: generator, GOLDEN: golden}
    return write(folder, manifest, files)


def _answer(generator: bytes, plane: npt.NDArray[np.uint16]) -> npt.NDArray[np.generic]:
    """The float32 master's; *plane* itself where it answers rubbish or is none."""
    try:
        evaluator = ReferenceEvaluator(onnx.load_from_string(generator))
    except DecodeError:
        return plane
    values = to_network(plane, GOLDEN_SCALING)[None, None]
    (made,) = cast(Any, evaluator.run(None, {evaluator.input_names[0]: values}))
    is_picture = made.shape == values.shape and np.isfinite(made).all()
    return to_counts(made[0, 0], GOLDEN_SCALING, np.uint16)[0] if is_picture else plane


def to_onnx(weights: npt.NDArray[np.float32], residual: bool) -> bytes:
    """ONNX file of one 3 × 3 convolution, plus its input where *residual*; (N, 1, H, W) both."""
    shape = ["n", 1, "height", "width"]
    nodes = [helper.make_node("Conv", ["raw", "weight"], ["convolved"], pads=[1, 1, 1, 1])]
    if residual:
        nodes.append(helper.make_node("Add", ["raw", "convolved"], ["refocused"]))
    graph = helper.make_graph(
        nodes,
        "generator",
        [helper.make_tensor_value_info("raw", TensorProto.FLOAT, shape)],
        [helper.make_tensor_value_info(nodes[-1].output[0], TensorProto.FLOAT, shape)],
        [numpy_helper.from_array(weights, "weight")],
    )
    return _encode(graph)


def with_external_data(generator: bytes, folder: Path) -> bytes:
    """The ONNX file *generator* with its weights moved to a file of their own in *folder*."""
    folder.mkdir()
    onnx.save_model(
        onnx.load_from_string(generator),
        str(folder / ONNX),
        save_as_external_data=True,
        location="weights.bin",
        size_threshold=0,
    )
    return (folder / ONNX).read_bytes()


UNET_HALO_PX = 64
"""Radius of `make_unet`'s receptive field, rounded up to its stride, 16."""


def make_unet(folder: Path, *, halo_px: int = UNET_HALO_PX) -> Package:
    """Write a package around a small bias-free U-Net with random weights, folded 2 × 2."""
    rng = np.random.default_rng(1)
    widths = (8, 12, 16, 16)
    nodes, tensors = [], []

    def add(operator: str, inputs: list[str], output: str, **attributes: object) -> str:
        nodes.append(helper.make_node(operator, inputs, [output], **attributes))
        return output

    def convolve(source: str, name: str, shape: tuple[int, int], size: int, **how: object) -> str:
        gain = np.sqrt(2 / (shape[1] * size**2))
        weight = rng.normal(0, gain, (*shape, size, size)).astype(np.float32)
        tensors.append(numpy_helper.from_array(weight, f"{name}.weight"))
        operator = "ConvTranspose" if name.startswith("up") else "Conv"
        y = add(operator, [source, f"{name}.weight"], f"{name}.y", **how)
        return add("LeakyRelu", [y], name, alpha=0.1)

    h = convolve(
        add("SpaceToDepth", ["raw"], "folded", blocksize=2), "head", (8, 4), 3, pads=[1] * 4
    )
    skips = []
    for k, (a, b) in enumerate(pairwise(widths)):
        skips.append(h)
        h = convolve(h, f"down{k}", (b, a), 2, strides=[2, 2])
        h = convolve(h, f"encode{k}", (b, b), 3, pads=[1] * 4)
    for k, (a, b) in reversed(list(enumerate(pairwise(widths)))):
        h = convolve(h, f"up{k}", (b, a), 2, strides=[2, 2])
        h = add("Add", [h, skips.pop()], f"joined{k}")
        h = convolve(h, f"decode{k}", (a, a), 3, pads=[1] * 4)
    h = convolve(h, "tail", (4, 8), 3, pads=[1] * 4)
    add("Add", ["raw", add("DepthToSpace", [h], "unfolded", blocksize=2)], "refocused")
    shape = ["n", 1, "height", "width"]
    graph = helper.make_graph(
        nodes,
        "generator",
        [helper.make_tensor_value_info("raw", TensorProto.FLOAT, shape)],
        [helper.make_tensor_value_info("refocused", TensorProto.FLOAT, shape)],
        tensors,
    )
    weights = np.zeros((1,), np.float32)
    return write_package(folder, _encode(graph), weights, "unet", 16, halo_px)


def _encode(graph: onnx.GraphProto) -> bytes:
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 20)], ir_version=10)
    onnx.checker.check_model(model)
    return bytes(model.SerializeToString())
