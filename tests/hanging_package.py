"""A model package whose network computes for ever: a real hang of a real runtime."""

from pathlib import Path

import numpy as np
import onnx
from onnx import TensorProto, helper

from engine.package import Package
from tests import identity_package

TURNS = 2**31 - 1
"""Each turn of the loop takes microseconds: hours, and no runtime unrolls or folds it."""


def make(folder: Path) -> Package:
    """Writes the package at *folder*."""

    def value(name: str, kind: int, shape: list[int | str] | None) -> onnx.ValueInfoProto:
        return helper.make_tensor_value_info(name, kind, shape)

    body = helper.make_graph(
        [
            helper.make_node("Identity", ["going_in"], ["going_out"]),
            helper.make_node("Mul", ["v_in", "v_in"], ["squared"]),
            helper.make_node("Sin", ["squared"], ["v_out"]),
        ],
        "turn",
        [
            value("i", TensorProto.INT64, []),
            value("going_in", TensorProto.BOOL, []),
            value("v_in", TensorProto.FLOAT, None),
        ],
        [value("going_out", TensorProto.BOOL, []), value("v_out", TensorProto.FLOAT, None)],
    )
    turns = helper.make_tensor("turns", TensorProto.INT64, [], [TURNS])
    going = helper.make_tensor("going", TensorProto.BOOL, [], [True])
    graph = helper.make_graph(
        [helper.make_node("Loop", ["turns", "going", "raw"], ["refocused"], body=body)],
        "generator",
        [value("raw", TensorProto.FLOAT, ["n", 1, "height", "width"])],
        [value("refocused", TensorProto.FLOAT, ["n", 1, "height", "width"])],
        [turns, going],
    )
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 17)], ir_version=8)
    weights = np.zeros((1, 1, 3, 3), np.float32)
    generator = bytes(model.SerializeToString())
    return identity_package.write_package(folder, generator, weights, "hanging", 16, 16, ends=False)
