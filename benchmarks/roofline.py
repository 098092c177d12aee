"""What a GPU should reach with a generator, by arithmetic: python benchmarks/roofline.py [NAME]

Nothing is measured here. Multiplications and bytes are counted in the very graph that TensorRT gets
(the FP16 twin of the package's generator.onnx, engine/half.py), node by node, at the real size;
then each node takes the longer of computing and moving, on GPUs as NVIDIA describes them. How much
TensorRT fuses is not known beforehand, so three cases are given:

  nothing     every node reads its inputs from memory and writes its output there
  joined      a rectifier or sum behind a convolution is done with it, as TensorRT's manual says;
              of a sum the other summand still has to be read
  all         only convolutions move anything, what lies between them costs nothing

The two kernels of engine/gpu/convert.cu are added to all: they read counts and write float32, and
the other way round. Uploads and downloads hide behind computing (two slots) and are a line of their
own. Assumed shares of the peaks are those of benchmarks/generators.py.
"""

import argparse
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, Literal, NamedTuple, get_args

import numpy as np
import onnx
from onnx import numpy_helper
from onnx.reference import ReferenceEvaluator

sys.path.insert(0, str(Path(__file__).parents[1]))

from benchmarks.generators import (
    BANDWIDTH_SHARE,
    GPUS,
    NARROW_SHARE,
    ROOFLINE,
    WIDE_CHANNELS,
    WIDE_SHARE,
    Gpu,
)
from engine import half, model_store, package

COUNTED_SIDE_PX = 128
"""Shapes are taken at this size; all that grows grows with the area."""
PCIE_GB_PER_S = {"PCIe 4.0 x16": 25.0, "PCIe 3.0 x8": 6.3}
"""Of pinned memory, one way; both ways at once."""
COUNTS_BYTES, VALUE_BYTES = 2, 4


Fused = Literal["nothing", "joined", "all"]
JOINED = ("LeakyRelu", "Relu", "Add")


class Node(NamedTuple):
    """One step of the network for one plane."""

    name: str
    macs: float
    moved_bytes: dict[Fused, float]
    channels: int
    """Of a convolution's input and output the smaller number; 0 for all else."""


def nodes(generator: bytes, side_px: int) -> list[Node]:
    """What every node of an ONNX file costs for one plane of *side_px*², batch 1."""
    model = onnx.load_from_string(generator)
    arrays = _values(model)
    weights = {tensor.name for tensor in model.graph.initializer}
    area = (side_px / COUNTED_SIDE_PX) ** 2
    convolved: list[str] = []
    found = []

    def moved(names: Sequence[str]) -> float:
        return float(sum(arrays[n].nbytes * (1 if n in weights else area) for n in names))

    for node in model.graph.node:
        if not all(arrays[name].dtype.kind == "f" for name in node.output):
            continue  # sizes and indices, a few bytes
        read = [name for name in node.input if name in arrays]
        is_conv = node.op_type == "Conv"
        alone = moved([*read, *node.output])
        joined = alone
        at_hand = [name for name in convolved if name in read]
        if node.op_type in JOINED and at_hand:
            joined = moved([name for name in read if name != at_hand[-1]])  # the latest
            convolved += node.output
        macs, channels = 0.0, 0
        if is_conv:
            weight, answer = arrays[node.input[1]], arrays[node.output[0]]
            macs = area * float(answer[0, 0].size) * weight.size
            channels = min(weight.shape[0], weight.shape[1])
            convolved += node.output
        cost: dict[Fused, float] = {
            "nothing": alone,
            "joined": joined,
            "all": alone if is_conv else 0.0,
        }
        found.append(Node(node.op_type, macs, cost, channels))
    return found


def seconds(gpu: Gpu, costs: Sequence[Node], fused: Fused) -> float:
    """Of one plane on *gpu*, the longer of computing and moving, node by node."""
    total = 0.0
    for node in costs:
        share = WIDE_SHARE if node.channels >= WIDE_CHANNELS else NARROW_SHARE
        computing = 2 * node.macs / (gpu.tflops * 1e12 * share)
        total += max(computing, _moving_s(gpu, node.moved_bytes[fused]))
    return total


def converting_s(gpu: Gpu, side_px: int) -> float:
    """Counts to network range and back: two passes over counts and float32 values."""
    return _moving_s(gpu, 2 * (COUNTS_BYTES + VALUE_BYTES) * side_px**2)


def lines(costs: Sequence[Node], side_px: int) -> Iterator[str]:
    """The tables, as Markdown."""
    gmacs = sum(node.macs for node in costs) / 1e9
    moved = ", ".join(
        f"{sum(node.moved_bytes[fused] for node in costs) / 1e9:.2f} GB ({fused})"
        for fused in get_args(Fused)
    )
    converted = 2e-9 * (COUNTS_BYTES + VALUE_BYTES) * side_px**2
    yield (
        f"{side_px}²: {gmacs:.1f} GMAC = {2 * gmacs:.1f} GFLOP; moved by what is fused: {moved}; "
        f"{converted:.2f} GB more to convert"
    )
    yield ""
    yield "| frames/s, arithmetic | nothing fused | joined | all fused |"
    yield "|---|---|---|---|"
    for gpu in GPUS:
        extra = converting_s(gpu, side_px)
        rates = (1 / (seconds(gpu, costs, fused) + extra) for fused in get_args(Fused))
        yield f"| {gpu.name} | {' | '.join(f'{rate:.0f}' for rate in rates)} |"
    yield ""
    for name, rate in PCIE_GB_PER_S.items():
        each_way = COUNTS_BYTES * side_px**2 / (rate * 1e9)
        yield f"{name}: {1e3 * each_way:.2f} ms each way, {1 / each_way:.0f} frames/s at most"
    yield ""
    yield ROOFLINE


def _moving_s(gpu: Gpu, moved_bytes: float) -> float:
    return moved_bytes / (gpu.gb_per_s * 1e9 * BANDWIDTH_SHARE)


def _values(model: onnx.ModelProto) -> dict[str, Any]:
    """Every tensor of the graph by name, from a run at COUNTED_SIDE_PX²."""
    plane = np.zeros((1, 1, COUNTED_SIDE_PX, COUNTED_SIDE_PX), np.float32)
    evaluator: Any = ReferenceEvaluator(model)
    feed = {model.graph.input[0].name: plane}
    arrays: dict[str, Any] = evaluator.run(None, feed, intermediate=True)
    for tensor in model.graph.initializer:
        arrays[tensor.name] = numpy_helper.to_array(tensor)
    return arrays


def main() -> None:
    """Print the arithmetic for one generator."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n\n")[0])
    parser.add_argument("generator", nargs="?", default="fluorescence", metavar="NAME")
    parser.add_argument("--side", type=int, default=2048, help="of a plane in pixels")
    arguments = parser.parse_args()
    loaded = package.load(model_store.find(arguments.generator))
    print(*lines(nodes(half.to_half(loaded.generator), arguments.side), arguments.side), sep="\n")


if __name__ == "__main__":
    main()
