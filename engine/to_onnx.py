"""A PyTorch generator as ONNX: the float32 master that every runtime starts from.

One input `input`, one output `output`, both (n, 1, y, x), n free, y and x free multiples of the
stride. The master is run by onnx's own reference evaluator on planes of two sizes and held against
PyTorch before it is handed out: an exporter that changes what is computed is found here and not in
someone's run.
"""

import copy
import logging
import warnings
from typing import cast

import numpy as np
import numpy.typing as npt
import onnx
import torch
from onnx.reference import ReferenceEvaluator

from engine.generators.light import Light
from refocus.errors import PackageError

TOLERANCE = 1e-4
"""Largest difference allowed, relative to the largest value of the answer; float32 gives 1e-6."""

_EXPORTER_LOG = "torch.onnx._internal.exporter._registration"
"""Logs that torchvision is absent, which a generator does not use."""


def export(network: Light) -> bytes:
    """ONNX of *network*, checked. Raises PackageError where its answers differ from PyTorch's."""
    stride = network.stride
    plain = copy.deepcopy(network).eval().cpu().to(torch.float32)
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
                verbose=False,
            )
    finally:
        logger.setLevel(level)
    assert program is not None  # None only where a file was asked for
    model = program.model_proto
    del model.metadata_props[:]  # the exporter's notes, with paths of this machine
    for node in model.graph.node:
        del node.metadata_props[:]
    verify(model, plain)
    return bytes(model.SerializeToString())


def verify(model: onnx.ModelProto, network: Light) -> None:
    """Raises PackageError where *model* does not compute what *network* does."""
    onnx.checker.check_model(model)
    evaluator = ReferenceEvaluator(model)
    rng = np.random.default_rng(0)
    side = network.stride
    for shape in ((1, 1, side, 2 * side), (3, 1, 4 * side, 3 * side)):
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
