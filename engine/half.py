"""The FP16 twin of a generator's float32 master, derived with `onnx` alone: no torch.

TensorRT computes in the types that the ONNX file names ("strongly typed"), so who wants FP16 has to
write it into the file. The master stays the one truth; this derives from it, always in the same
way, a graph that

- takes and gives float32, so that the way around the network keeps camera counts exactly;
- does what is heavy (HEAVY), and the light steps around and between (LIGHT), in FP16;
- keeps float32 for everything not on these two lists, normalisation first: the variance of a nearly
  flat frame vanishes in FP16, and a sum of squares overflows; also where it is written out, as
  means, a difference and a division;
- keeps float32 for what lies between the last convolution and the output, above all the sum with
  the input: FP16 has 11 bits, a camera 16;
- keeps float32 for a step whose weights FP16 cannot hold: not finite, above 65504, or so small that
  rounding moves the tensor by more than MAX_ROUNDING of its norm (below 6e-5 FP16 loses digits,
  below 3e-8 all).

A value keeps its name where it is float32 and is called NAME/half where it is FP16; one cast serves
all that want the other kind. A weight wanted in both kinds is kept in both.

**Room at the top.** FP16 ends at 65504. The scaling rule puts the 99.9th percentile near 1, so a
few beads on a dark field lie thousands beyond, and the shipped generator makes up to 200 times its
input of a large bead, 790 times of a checkerboard. A network of convolutions and rectifiers scales
(f(a x) = a f(x), biases multiplied too), so there every FP16 value is kept HEADROOM as large: the
entry multiplies by it in float32, the exit divides. Then it takes whatever a 16-bit camera can hold
(tests/test_half.py); the price is FP16's coarsest step, 6e-8 / HEADROOM = 1.5e-5 of the picture's
range. Networks that do not scale in FP16 (a sigmoid, a product of two activations) get no headroom.

**Where FP16 overflows all the same**, the activation becomes infinite and then NaN, the check of
the answer (engine/checks.py) finds it, and the plane is booked as FAILED: raw is untouched, and no
rubbish is shown.
"""

from collections import defaultdict
from collections.abc import Iterable
from typing import Any

import numpy as np
import numpy.typing as npt
import onnx
from onnx import GraphProto, ModelProto, NodeProto, TensorProto, helper, numpy_helper

from refocus.errors import PackageError

RECIPE = 1
"""Version of what this module makes of a master: goes up whenever the same master gives another."""

HEAVY = frozenset({"Conv", "ConvTranspose", "Gemm", "MatMul"})
LIGHT = frozenset(
    """Abs Add AveragePool Clip Concat DepthToSpace Div Dropout Elu Expand Flatten Gather
    HardSigmoid HardSwish Identity LeakyRelu Max MaxPool Min Mul Neg PRelu Pad Relu Reshape Resize
    Sigmoid Slice SpaceToDepth Split Squeeze Sub Tanh Transpose Unsqueeze""".split()  # noqa: SIM905
)
"""Steps that round once, or only move values."""
FACTOR = frozenset({"Conv", "ConvTranspose", "Gemm", "MatMul", "PRelu", "Div"})
"""Their second input multiplies or divides: where it is a weight, they scale with the first."""
NOT_SCALING = frozenset({"Clip", "Elu", "HardSigmoid", "HardSwish", "Sigmoid", "Tanh"})
"""Light steps whose answer does not double with their input."""
SHAPE_ONLY = frozenset({"Shape", "Size"})
"""Look at no value, so either kind will do."""

HEADROOM = 2.0**-8
"""What FP16 values are multiplied by where the network allows it; a power of two rounds nothing."""
OLDEST_OPSET = 13
"""Since then bounds, paddings and axes are inputs, not attributes."""
MAX_ROUNDING = 2.0**-10
"""Norm of the rounding error over the norm of the tensor; about 2^-12.5 where nothing is lost."""


def to_half(generator: bytes) -> bytes:
    """The FP16 twin of *generator*, an ONNX file in float32; each is a whole file.

    Raises PackageError where *generator* is no valid ONNX file.
    """
    try:
        model = onnx.load_from_string(generator)
        onnx.checker.check_model(model)
        if (opset := _opset(model)) < OLDEST_OPSET:
            raise ValueError(f"its opset is {opset}, wanted at least {OLDEST_OPSET}")
        _constants_to_weights(model.graph)
        types = _element_types(onnx.shape_inference.infer_shapes(model).graph)
        _Rewriter(model, types).run()
        onnx.checker.check_model(model, full_check=True)
    except Exception as error:  # protobuf, checker and inference share no root
        raise PackageError(
            f"the generator cannot be brought to FP16: {' '.join(str(error).split())}; it must "
            "be a valid ONNX file, as engine/to_onnx.py writes it"
        ) from error
    return bytes(model.SerializeToString())


class _Rewriter:
    """Goes once through a graph, whose nodes ONNX demands to be in the order of execution."""

    def __init__(self, model: ModelProto, types: dict[str, int]) -> None:
        self.graph: GraphProto = model.graph
        self.types = types
        self.opset = _opset(model)
        self.weights = {tensor.name: tensor for tensor in model.graph.initializer}
        self.nodes: list[NodeProto] = []
        self.present = {value.name for value in model.graph.input} - set(self.weights)
        self.headroom = 1.0
        """What an FP16 value is multiplied by."""
        self.kept: dict[str, TensorProto] = {}
        """The weights of the twin, by name."""

    def run(self) -> None:
        graph, half = self.graph, self.choose()
        if all(self.may_scale(graph.node[k]) for k in half):
            self.headroom = HEADROOM
        for k, node in enumerate(graph.node):
            self.nodes.append(self.in_half(node) if k in half else self.as_it_is(node))
            self.present.update(self.nodes[-1].output)
        for value in graph.output:
            self.as_float(value.name)
        _replace(graph.node, self.nodes)
        _replace(graph.initializer, self.kept.values())
        _replace(graph.input, [value for value in graph.input if value.name not in self.weights])
        _replace(graph.value_info, ())  # describes the master

    def choose(self) -> set[int]:
        """Indices of the nodes that compute in FP16: spreads from the heavy ones over light ones.

        A light step without a heavy one near it would be in FP16 for the price of two casts.
        """
        nodes = list(self.graph.node)
        last = _after_the_last_heavy(self.graph, self.types)
        float32 = last | _around_statistics(self.graph, self.types)
        able = {k for k, node in enumerate(nodes) if k not in float32 and self.able(node)}
        makers = {name: k for k in able for name in nodes[k].output}
        users = defaultdict(list)
        for k in able:
            for i in self.halved(nodes[k]):
                users[nodes[k].input[i]].append(k)
        waiting = [k for k in able if nodes[k].op_type in HEAVY]
        chosen = set(waiting)
        while waiting:
            node = nodes[waiting.pop()]
            near = {makers[node.input[i]] for i in self.halved(node) if node.input[i] in makers}
            near.update(k for name in node.output for k in users[name])
            waiting += near - chosen
            chosen |= near
        return chosen

    def able(self, node: NodeProto) -> bool:
        """Whether *node* is on a list, works on float32, and has weights that FP16 holds."""
        values = [node.input[i] for i in self.halved(node)]
        return bool(values) and all(_fits(self.weights[v]) for v in values if v in self.weights)

    def halved(self, node: NodeProto) -> list[int]:
        """Which inputs of *node* become FP16 with it; none where it is on no list or no float32."""
        if node.domain not in ("", "ai.onnx") or node.op_type not in HEAVY | LIGHT:
            return []
        schema = onnx.defs.get_schema(node.op_type, self.opset)
        kind = schema.outputs[0].type_str
        allowed = {c.type_param_str: c.allowed_type_strs for c in schema.type_constraints}
        if "tensor(float16)" not in allowed[kind]:
            return []
        formal = [schema.inputs[min(i, len(schema.inputs) - 1)] for i in range(len(node.input))]
        return [
            i
            for i, name in enumerate(node.input)
            if formal[i].type_str == kind and self.types.get(name) == TensorProto.FLOAT
        ]

    def factors(self, node: NodeProto) -> set[int] | None:
        """Inputs of *node* that multiply; None where its answer does not scale with the others."""
        if node.op_type == "Mul":
            candidates = [i for i in (0, 1) if node.input[i] in self.weights][:1]
        elif node.op_type in FACTOR:
            candidates = [1] if node.input[1] in self.weights else []
        else:
            return None if node.op_type in NOT_SCALING else set()
        return set(candidates) or None

    def may_scale(self, node: NodeProto) -> bool:
        """Whether *node* can work on values times HEADROOM, with its summands as small."""
        factors = self.factors(node)
        if factors is None:
            return False
        summands = [node.input[i] for i in self.halved(node) if i not in factors]
        return all(_fits(self.weights[v], HEADROOM) for v in summands if v in self.weights)

    def in_half(self, node: NodeProto) -> NodeProto:
        twin = NodeProto()
        twin.CopyFrom(node)
        halved, factors = self.halved(node), self.factors(node) or ()
        for i, name in enumerate(node.input):
            if i in halved:
                twin.input[i] = self.as_half(name, 1.0 if i in factors else self.headroom)
            else:
                twin.input[i] = self.as_float(name)
        for i, name in enumerate(node.output):
            if self.types.get(name) == TensorProto.FLOAT:
                twin.output[i] = _half_name(name)
        return twin

    def as_it_is(self, node: NodeProto) -> NodeProto:
        twin = NodeProto()
        twin.CopyFrom(node)
        for i, name in enumerate(node.input):
            any_kind = node.op_type in SHAPE_ONLY and _half_name(name) in self.present
            twin.input[i] = _half_name(name) if any_kind else self.as_float(name)
        for name in _captured(node):
            self.as_float(name)
        return twin

    def as_half(self, name: str, scale: float) -> str:
        """Name of *scale* times *name* in FP16, which is made where it is not there yet."""
        half = _half_name(name)
        if name in self.weights:
            half += "" if scale == self.headroom else "/factor"
            values = numpy_helper.to_array(self.weights[name]) * np.float32(scale)
            self.keep_weight(values.astype(np.float16), half)
        elif half not in self.present:
            source = self.as_float(name)
            if scale != 1:
                source = self.add("Mul", [source, self.scalar(scale)], f"{name}/scaled")
            self.add("Cast", [source], half, to=TensorProto.FLOAT16)
        return half

    def as_float(self, name: str) -> str:
        """*name* itself, of whatever kind it has in the master; made where it is not there yet."""
        if name in self.weights:
            self.kept[name] = self.weights[name]
        elif name not in self.present and _half_name(name) in self.present:
            if self.headroom == 1:
                self.add("Cast", [_half_name(name)], name, to=TensorProto.FLOAT)
            else:
                wide = self.add("Cast", [_half_name(name)], f"{name}/wide", to=TensorProto.FLOAT)
                self.add("Mul", [wide, self.scalar(1 / self.headroom)], name)
        return name

    def scalar(self, value: float) -> str:
        return self.keep_weight(np.array(value, np.float32), f"times/{value:g}")

    def keep_weight(self, values: npt.NDArray[np.floating], name: str) -> str:
        self.kept[name] = numpy_helper.from_array(values, name)
        return name

    def add(self, operator: str, inputs: list[str], output: str, **how: Any) -> str:
        name = f"{operator}/{output}"
        self.nodes.append(helper.make_node(operator, inputs, [output], name, **how))
        self.present.add(output)
        return output


def _opset(model: ModelProto) -> int:
    return next(int(o.version) for o in model.opset_import if o.domain in ("", "ai.onnx"))


def _half_name(name: str) -> str:
    return f"{name}/half"


def _fits(tensor: TensorProto, scale: float = 1.0) -> bool:
    values = scale * numpy_helper.to_array(tensor).astype(np.float64)
    with np.errstate(over="ignore"):
        rounded = values.astype(np.float16).astype(np.float64)
    if not np.isfinite(rounded).all():
        return False
    return bool(np.linalg.norm(rounded - values) <= MAX_ROUNDING * np.linalg.norm(values))


def _after_the_last_heavy(graph: GraphProto, types: dict[str, int]) -> set[int]:
    """Indices of the nodes that the output is reached from without passing a heavy one."""
    makers = {name: k for k, node in enumerate(graph.node) for name in node.output}
    found: set[int] = set()
    waiting = [value.name for value in graph.output]
    while waiting:
        name = waiting.pop()
        k = makers.get(name)
        if k is None or k in found or types.get(name) != TensorProto.FLOAT:
            continue  # an input, a weight, or arithmetic on shapes
        if graph.node[k].op_type not in HEAVY:
            found.add(k)
            waiting.extend(graph.node[k].input)
    return found


def _around_statistics(graph: GraphProto, types: dict[str, int]) -> set[int]:
    """Indices of the light nodes between a mean or sum and the division that uses it."""
    found: set[int] = set()
    statistics: set[str] = set()
    for k, node in enumerate(graph.node):
        floats = {name for name in node.output if types.get(name) == TensorProto.FLOAT}
        if node.op_type.startswith("Reduce"):
            statistics |= floats
        elif node.op_type not in HEAVY and not statistics.isdisjoint(node.input):
            found.add(k)
            statistics |= floats if node.op_type != "Div" else set()
    return found


def _constants_to_weights(graph: GraphProto) -> None:
    """Constant nodes with a tensor become initialisers, so that there is one kind of weight."""
    nodes = []
    for node in graph.node:
        tensors = [a.t for a in node.attribute if a.name == "value"]
        if node.op_type == "Constant" and tensors:
            tensors[0].name = node.output[0]
            graph.initializer.append(tensors[0])
        else:
            nodes.append(node)
    _replace(graph.node, nodes)


def _replace(field: Any, content: Iterable[Any]) -> None:
    kept = list(content)
    del field[:]
    field.extend(kept)


def _element_types(graph: GraphProto) -> dict[str, int]:
    values = [*graph.input, *graph.value_info, *graph.output]
    types = {value.name: value.type.tensor_type.elem_type for value in values}
    return types | {tensor.name: tensor.data_type for tensor in graph.initializer}


def _captured(node: NodeProto) -> Iterable[str]:
    """Names that the subgraphs of *node* may take from around them."""
    for attribute in node.attribute:
        if attribute.type == onnx.AttributeProto.GRAPH:
            for inner in attribute.g.node:
                yield from inner.input
                yield from _captured(inner)
