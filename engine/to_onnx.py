"""A PyTorch generator as ONNX: the float32 master that every runtime starts from.

One input `input`, one output `output`, both (n, 1, y, x), n free, y and x free multiples of the
stride. OPSET is one that TensorRT 10.13 and later, TensorRT-RTX and OpenVINO read; the widths of
pads and the factors of resizing are constants in the file, whatever the size of a plane.

What training alone needs is gone: weight norms are multiplied out, BatchNorms are part of the
convolution before them (the exporter does that), or a factor and a summand a channel where
something stands between. The same network gives the same bytes, without any path in them.

The master is run by onnx's own reference evaluator on planes of two sizes and held against PyTorch
before it is handed out: an exporter that changes what is computed is found here and not in
someone's run.
"""

import logging
import warnings
from typing import cast

import numpy as np
import numpy.typing as npt
import onnx
import torch
from onnx import helper, numpy_helper
from onnx.reference import ReferenceEvaluator
from torch.nn.utils import parametrize

from engine.generators import Generator
from refocus.errors import PackageError

OPSET = 20

TOLERANCE = 1e-4
"""Largest difference allowed, relative to the largest value of the answer; float32 gives 1e-6."""

_EXPORTER_LOG = "torch.onnx._internal.exporter._registration"
"""Logs that torchvision is absent, which a generator does not use."""


def export(network: Generator) -> bytes:
    """ONNX of *network*, checked. Raises PackageError where its answers differ from PyTorch's."""
    stride = network.stride
    plain = _plain(network)
    example = torch.zeros(2, 1, 2 * stride, 3 * stride)
    free = {
        0: torch.export.Dim("n", min=1, max=1024),
        2: stride * torch.export.Dim("rows", min=1, max=4096),
        3: stride * torch.export.Dim("columns", min=1, max=4096),
    }
    logger = logging.getLogger(_EXPORTER_LOG)
    level = logger.level
    logger.setLevel(logging.ERROR)
    try:
        with warnings.catch_warnings():
            # torch.export's own use of its pytree, not ours to change.
            warnings.filterwarnings("ignore", "`isinstance.treespec, LeafSpec", FutureWarning)
            program = torch.onnx.export(
                plain,
                (example,),
                input_names=["input"],
                output_names=["output"],
                dynamic_shapes=(free,),
                dynamo=True,
                opset_version=OPSET,
                verbose=False,
            )
    finally:
        logger.setLevel(level)
    assert program is not None  # None only where a file was asked for
    model = program.model_proto
    del model.metadata_props[:]  # the exporter's notes, with paths of this machine
    for node in model.graph.node:
        del node.metadata_props[:]
    _plain_norms(model.graph)
    verify(model, plain)
    return bytes(model.SerializeToString())


def _plain(network: Generator) -> Generator:
    """The same network in float32 on the CPU, its weight norms multiplied out."""
    # Not a deep copy: it shares its class with the original, which would lose its weights as well.
    plain = type(network)(**network.arguments)
    plain.load_state_dict(network.state_dict())
    for module in plain.modules():
        if parametrize.is_parametrized(module, "weight"):
            parametrize.remove_parametrizations(module, "weight")
    return plain.eval()


def _plain_norms(graph: onnx.GraphProto) -> None:
    """Every BatchNormalization as one product and one sum a channel, which all runtimes do fast."""
    weights = {tensor.name: tensor for tensor in graph.initializer}
    nodes = []
    for node in graph.node:
        if node.op_type != "BatchNormalization":
            nodes.append(node)
            continue
        factor, shift, mean, variance = (
            numpy_helper.to_array(weights[name]).astype(np.float64) for name in node.input[1:]
        )
        epsilon = next(a.f for a in node.attribute if a.name == "epsilon")
        factor = factor / np.sqrt(variance + epsilon)
        shift = shift - mean * factor
        x, y = node.input[0], node.output[0]
        for name, values in ((f"{y}/factor", factor), (f"{y}/shift", shift)):
            channels = values.astype(np.float32)[None, :, None, None]
            graph.initializer.append(numpy_helper.from_array(channels, name))
        nodes.append(helper.make_node("Mul", [x, f"{y}/factor"], [f"{y}/scaled"], f"{y}/mul"))
        nodes.append(helper.make_node("Add", [f"{y}/scaled", f"{y}/shift"], [y], f"{y}/add"))
    used = {name for node in nodes for name in node.input}
    kept = [tensor for tensor in graph.initializer if tensor.name in used]
    for field, content in ((graph.node, nodes), (graph.initializer, kept)):
        content = list(content)
        del field[:]
        field.extend(content)


def verify(model: onnx.ModelProto, network: Generator) -> None:
    """Raises PackageError where *model* does not compute what *network* does."""
    onnx.checker.check_model(model)
    evaluator = ReferenceEvaluator(model)
    rng = np.random.default_rng(0)
    side = network.stride
    for shape in ((1, 1, side, 2 * side), (3, 1, 2 * side, side)):
        planes = rng.standard_normal(shape).astype(np.float32)
        with torch.inference_mode():
            wanted = network(torch.from_numpy(planes)).numpy()
        (got,) = cast(list[npt.NDArray[np.float32]], evaluator.run(None, {"input": planes}))
        difference = float(np.abs(got - wanted).max() / np.abs(wanted).max())
        if not difference <= TOLERANCE:
            raise PackageError(
                f"ONNX export: on {shape} the master differs from PyTorch by {difference:.2g} of "
                f"the largest value, want at most {TOLERANCE:g}; try other versions of torch and "
                "onnxscript"
            )
