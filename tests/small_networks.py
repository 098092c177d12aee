"""Small ONNX files of what generators are made of, for what compiles them."""

from typing import Any

import numpy as np
import numpy.typing as npt
from onnx import TensorProto, helper, numpy_helper

SAME = {"pads": [1, 1, 1, 1]}
"""For convolutions of 3 x 3: the answer has the input's size."""


def network(
    nodes: list[tuple[str, list[str], str, dict[str, Any]]],
    weights: dict[str, npt.ArrayLike],
    opset: int = 20,
    channels: int = 1,
) -> bytes:
    """ONNX file from `raw` to `refocused`, (n, 1, height, width)."""
    shape = ["n", channels, "height", "width"]
    graph = helper.make_graph(
        [helper.make_node(op, given, [name], **how) for op, given, name, how in nodes],
        "generator",
        [helper.make_tensor_value_info("raw", TensorProto.FLOAT, shape)],
        [helper.make_tensor_value_info("refocused", TensorProto.FLOAT, shape)],
        [numpy_helper.from_array(np.asarray(value), name) for name, value in weights.items()],
    )
    opsets = [helper.make_opsetid("", opset)]
    return bytes(helper.make_model(graph, opset_imports=opsets, ir_version=10).SerializeToString())


def random(*shape: int) -> npt.NDArray[np.float32]:
    rng = np.random.default_rng(sum(shape))
    return (rng.standard_normal(shape) / np.sqrt(np.prod(shape[1:]))).astype(np.float32)


def styled() -> bytes:
    """All that residual style networks are made of."""
    ones, zeros = np.ones(4, np.float32), np.zeros(4, np.float32)
    norm = ["gain", "shift"]
    return network(
        [
            ("Pad", ["raw", "pad"], "padded", {"mode": "reflect"}),
            ("Conv", ["padded", "w1", "b1"], "c1", {}),
            ("InstanceNormalization", ["c1", *norm], "n1", {}),
            ("Relu", ["n1"], "r1", {}),
            ("Conv", ["r1", "w2"], "c2", {"strides": [2, 2], **SAME}),
            ("InstanceNormalization", ["c2", *norm], "n2", {}),
            ("Relu", ["n2"], "r2", {}),
            ("Resize", ["r2", "", "twice"], "big", {"mode": "nearest"}),
            ("Conv", ["big", "w2"], "c3", SAME),
            ("Relu", ["c3"], "r3", {}),
            ("Conv", ["r3", "w2"], "c4", {"strides": [2, 2], **SAME}),
            ("ConvTranspose", ["c4", "w3"], "up", {"strides": [2, 2]}),
            ("Relu", ["up"], "r4", {}),
            ("Conv", ["r4", "w4"], "c5", SAME),
            ("Tanh", ["c5"], "bounded", {}),
            ("Add", ["raw", "bounded"], "refocused", {}),
        ],
        {
            "pad": np.array([0, 0, 3, 3, 0, 0, 3, 3]),
            "twice": np.array([1, 1, 2, 2], np.float32),
            "w1": random(4, 1, 7, 7),
            "b1": random(4),
            "w2": random(4, 4, 3, 3),
            "w3": random(4, 4, 2, 2),
            "w4": random(1, 4, 3, 3),
            "gain": ones,
            "shift": zeros,
        },
    )
