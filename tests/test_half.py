"""The FP16 twin: the same answers to 50 dB and better, at any brightness a camera knows."""

from typing import Any

import numpy as np
import numpy.typing as npt
import onnx
import pytest
from onnx import TensorProto, helper, numpy_helper
from onnx.reference import ReferenceEvaluator
from onnx.reference.ops.op_conv import Conv

from engine import half
from engine.gate import LEAST_PSNR_DB
from engine.half import HEADROOM, HEAVY, to_half
from engine.package import SHIPPED, Package, load, read_golden
from engine.scaling import to_counts, to_network
from refocus.errors import PackageError
from tests import identity_package
from tests.small_networks import SAME, network, random, styled

Planes = npt.NDArray[np.float32]


class TensorCoreConv(Conv):
    """FP16 in and out, sums in float32, as a GPU does it; numpy's own half sums are far slower."""

    op_domain = ""

    def _run(self, x: Any, w: Any, b: Any = None, **how: Any) -> tuple[Any]:
        wide = [one if one is None else one.astype(np.float32) for one in (x, w, b)]
        (y,) = super()._run(*wide, **how)
        with np.errstate(over="ignore"):
            return (y.astype(x.dtype),)


TensorCoreConv.__name__ = "Conv"


def answer(generator: bytes, planes: Planes) -> Planes:
    """What onnx's own evaluator makes of *planes*, rounding to FP16 where the file says so."""
    evaluator = ReferenceEvaluator(onnx.load_from_string(generator), new_ops=[TensorCoreConv])
    with np.errstate(all="ignore"):
        (got,) = evaluator.run(None, {evaluator.input_names[0]: planes})
    return np.asarray(got)


def psnr_db(got: Planes, wanted: Planes) -> float:
    return float(20 * np.log10(np.ptp(wanted) / np.sqrt(np.mean((got - wanted) ** 2))))


def kinds(generator: bytes) -> dict[str, int]:
    """Element type of every value."""
    model = onnx.shape_inference.infer_shapes(onnx.load_from_string(generator), strict_mode=True)
    graph = model.graph
    values = [*graph.input, *graph.value_info, *graph.output]
    types = {value.name: value.type.tensor_type.elem_type for value in values}
    return types | {tensor.name: tensor.data_type for tensor in graph.initializer}


def nodes(generator: bytes, *operators: str) -> list[onnx.NodeProto]:
    graph = onnx.load_from_string(generator).graph
    return [node for node in graph.node if node.op_type in operators]


@pytest.fixture(scope="module")
def shipped() -> Package:
    return load(SHIPPED / "fluorescence")


def test_the_shipped_generator_passes_the_gate_with_room(shipped: Package) -> None:
    twin = to_half(shipped.generator)
    for golden in read_golden(shipped):
        planes = to_network(golden.pixels, golden.scaling)[None, None]
        counts, _ = to_counts(answer(twin, planes)[0, 0], golden.scaling, golden.pixels.dtype)
        got, wanted = counts.astype(np.float32), golden.answer.astype(np.float32)
        assert psnr_db(got, wanted) > LEAST_PSNR_DB + 15


def test_only_the_way_around_stays_float32(shipped: Package) -> None:
    twin = to_half(shipped.generator)
    types = kinds(twin)
    assert (types["input"], types["output"]) == (TensorProto.FLOAT, TensorProto.FLOAT)
    for node in nodes(twin, *HEAVY):
        assert {types[name] for name in (*node.input, *node.output)} == {TensorProto.FLOAT16}
    assert {types[name] for name in nodes(twin, "Sub")[0].input} == {TensorProto.FLOAT}
    assert [node.input[0] for node in nodes(twin, "Cast")] == [
        "input/scaled",
        "conv2d_24/half",
        "conv2d_23/half",
    ]
    assert len(twin) < 0.51 * len(shipped.generator)
    assert to_half(shipped.generator) == twin


def test_bright_beads_stay_finite(shipped: Package, monkeypatch: pytest.MonkeyPatch) -> None:
    """Beads far beyond the 99.9th percentile: up to all that 16 bits hold, on a count of noise."""
    rng = np.random.default_rng(0)
    y, x = np.ogrid[:96, :96]
    bead = np.exp(-((y - 48.0) ** 2 + (x - 48.0) ** 2) / (2 * 4.0**2)).astype(np.float32)
    noise = rng.normal(0, 0.3, bead.shape).astype(np.float32)
    twin = to_half(shipped.generator)
    for peak in (30.0, 300.0, 3000.0, 65535.0):
        planes = (noise + np.float32(peak) * bead)[None, None]
        got, wanted = answer(twin, planes), answer(shipped.generator, planes)
        assert np.isfinite(got).all()
        assert psnr_db(got, wanted) > 60
    monkeypatch.setattr(half, "HEADROOM", 1.0)
    assert not np.isfinite(answer(to_half(shipped.generator), planes)).all()


def test_faint_pictures_survive_the_headroom(shipped: Package) -> None:
    planes = np.random.default_rng(0).normal(0, 0.03, (1, 1, 64, 64)).astype(np.float32)
    error = answer(to_half(shipped.generator), planes) - answer(shipped.generator, planes)
    assert np.abs(error).max() < 3e-4  # of a picture whose structures are 1


@pytest.fixture(scope="module")
def style() -> bytes:
    return styled()


def test_normalisation_stays_float32(style: bytes) -> None:
    twin = to_half(style)
    types = kinds(twin)
    for node in nodes(twin, "InstanceNormalization", "Tanh"):
        assert {types[name] for name in (*node.input, *node.output)} == {TensorProto.FLOAT}
    for node in nodes(twin, "Pad", "Relu", "Resize", *HEAVY):
        assert types[node.output[0]] == TensorProto.FLOAT16
    assert types["twice"] == TensorProto.FLOAT
    assert len(nodes(twin, "Cast")) == 1 + 2 * 2 + 1
    planes = np.random.default_rng(1).normal(0, 1, (2, 1, 32, 48)).astype(np.float32)
    planes[0, 0, 8:12, 8:12] += 500
    assert psnr_db(answer(twin, planes), answer(style, planes)) > 60
    assert np.isfinite(answer(twin, np.full((1, 1, 32, 32), 300, np.float32))).all()


def test_normalisation_that_is_written_out_stays_float32() -> None:
    mean = {"keepdims": 1}
    generator = network(
        [
            ("Conv", ["raw", "w"], "c", SAME),
            ("ReduceMean", ["c", "axes"], "mean", mean),
            ("Sub", ["c", "mean"], "centred", {}),
            ("Mul", ["centred", "centred"], "square", {}),
            ("ReduceMean", ["square", "axes"], "variance", mean),
            ("Sqrt", ["variance"], "deviation", {}),
            ("Div", ["centred", "deviation"], "normal", {}),
            ("Mul", ["normal", "gain"], "scaled", {}),
            ("Conv", ["scaled", "w2"], "refocused", SAME),
        ],
        {
            "w": random(4, 1, 3, 3),
            "w2": random(1, 4, 3, 3),
            "axes": np.array([1, 2, 3]),
            "gain": np.float32(0.5),
        },
    )
    twin = to_half(generator)
    types = kinds(twin)
    for name in ("mean", "centred", "square", "variance", "deviation", "normal"):
        assert types[name] == TensorProto.FLOAT
    assert types["scaled/half"] == TensorProto.FLOAT16
    planes = 3000 + np.random.default_rng(1).normal(0, 1, (1, 1, 32, 32)).astype(np.float32)
    assert psnr_db(answer(twin, planes), answer(generator, planes)) > 40


def test_what_both_kinds_want_is_there_in_both() -> None:
    """A weight before and after the last convolution; a value whose shape is asked for."""
    generator = network(
        [
            ("Conv", ["raw", "w"], "c", SAME),
            ("Shape", ["c"], "shape", {}),
            ("Relu", ["c"], "r", {}),
            ("Mul", ["r", "gain"], "k", {}),
            ("Expand", ["gain", "shape"], "plane", {}),
            ("Conv", ["k", "w"], "c2", SAME),
            ("Add", ["c2", "plane"], "s", {}),
            ("Mul", ["s", "gain"], "refocused", {}),
        ],
        {"w": random(1, 1, 3, 3), "gain": np.full((1, 1, 1, 1), 0.75, np.float32)},
    )
    twin = to_half(generator)
    types = kinds(twin)
    assert types["gain"] == TensorProto.FLOAT
    assert types["gain/half/factor"] == TensorProto.FLOAT16
    assert nodes(twin, "Shape")[0].input[0] == "c/half"
    assert types["k/half"] == TensorProto.FLOAT16
    assert [node.output[0] for node in nodes(twin, "Conv")] == ["c/half", "c2/half"]
    planes = np.random.default_rng(1).normal(0, 1, (1, 1, 16, 16)).astype(np.float32)
    np.testing.assert_allclose(answer(twin, planes), answer(generator, planes), atol=5e-3)


def test_a_branch_takes_what_lies_around_it() -> None:
    shape = ["n", 1, "height", "width"]
    inner = helper.make_graph(
        [helper.make_node("Neg", ["r"], ["negative"])],
        "branch",
        [],
        [helper.make_tensor_value_info("negative", TensorProto.FLOAT, shape)],
    )
    generator = network(
        [
            ("Conv", ["raw", "w"], "c", SAME),
            ("Relu", ["c"], "r", {}),
            ("If", ["yes"], "branched", {"then_branch": inner, "else_branch": inner}),
            ("Conv", ["branched", "w"], "refocused", SAME),
        ],
        {"w": random(1, 1, 3, 3), "yes": np.array(True)},
    )
    planes = np.random.default_rng(1).normal(0, 1, (1, 1, 16, 16)).astype(np.float32)
    assert psnr_db(answer(to_half(generator), planes), answer(generator, planes)) > 60


@pytest.mark.parametrize("unfit", [1e5, 3e-8, np.nan, np.inf])
def test_weights_that_do_not_fit_stay_float32(unfit: float) -> None:
    generator = network(
        [
            ("Conv", ["raw", "w"], "c", SAME),
            ("Conv", ["c", "unfit"], "c2", SAME),
            ("Conv", ["c2", "w"], "refocused", SAME),
        ],
        {"w": random(1, 1, 3, 3), "unfit": np.full((1, 1, 3, 3), unfit, np.float32)},
    )
    types = kinds(to_half(generator))
    assert types["unfit"] == TensorProto.FLOAT
    assert types["c2"] == TensorProto.FLOAT
    assert types["c/half"] == types["refocused/half"] == TensorProto.FLOAT16


def test_some_tiny_weights_do_no_harm() -> None:
    weights = random(1, 1, 3, 3)
    weights[0, 0, 0] = 1e-9
    generator = identity_package.to_onnx(weights, residual=True)
    assert kinds(to_half(generator))["convolved/half"] == TensorProto.FLOAT16


@pytest.mark.parametrize("operator", ["Sigmoid", "HardSwish", "Mul"])
def test_what_does_not_scale_gets_no_headroom(operator: str) -> None:
    generator = network(
        [
            ("Conv", ["raw", "w", "b"], "c", SAME),
            (operator, ["c", "c"] if operator == "Mul" else ["c"], "gate", {}),
            ("Conv", ["gate", "w"], "refocused", SAME),
        ],
        {"w": random(1, 1, 3, 3), "b": np.ones(1, np.float32)},
    )
    twin = to_half(generator)
    assert len(nodes(twin, "Cast")) == 2
    assert len(nodes(twin, "Mul")) == (operator == "Mul")
    planes = np.random.default_rng(1).normal(0, 1, (1, 1, 16, 16)).astype(np.float32)
    assert psnr_db(answer(twin, planes), answer(generator, planes)) > 60


def test_biases_and_slopes_scale_too() -> None:
    generator = network(
        [
            ("Conv", ["raw", "w", "b"], "c", SAME),
            ("PRelu", ["c", "slope"], "p", {}),
            ("Sub", ["threshold", "p"], "s", {}),
            ("Div", ["s", "half"], "d", {}),
            ("Max", ["d", "threshold"], "m", {}),
            ("Conv", ["m", "w"], "refocused", SAME),
        ],
        {
            "w": random(1, 1, 3, 3),
            "b": np.full(1, 3.0, np.float32),
            "slope": np.full((1, 1, 1), 0.2, np.float32),
            "threshold": np.full((1, 1, 1, 1), 0.4, np.float32),
            "half": np.float32(0.5),
        },
    )
    twin = to_half(generator)
    kept = {t.name: float(numpy_helper.to_array(t).flat[0]) for t in kept_weights(twin)}
    assert kept["b/half"] == 3 * HEADROOM
    assert kept["slope/half/factor"] == pytest.approx(0.2, rel=1e-3)
    planes = np.random.default_rng(1).normal(0, 1, (1, 1, 16, 16)).astype(np.float32)
    np.testing.assert_allclose(answer(twin, planes), answer(generator, planes), atol=5e-3)


def test_summands_too_small_for_the_headroom_do_without() -> None:
    """A layer a ten-thousandth as strong, its biases too, made large again by the next one."""
    rng, shrink = np.random.default_rng(0), 1e-4
    generator = network(
        [
            ("Conv", ["raw", "w1", "b1"], "c1", SAME),
            ("Relu", ["c1"], "r1", {}),
            ("Conv", ["r1", "w2"], "c2", SAME),
            ("Add", ["raw", "c2"], "refocused", {}),
        ],
        {
            "w1": (random(8, 1, 3, 3) * shrink).astype(np.float32),
            "b1": (rng.normal(0, 0.3, 8) * shrink).astype(np.float32),
            "w2": (random(1, 8, 3, 3) / shrink).astype(np.float32),
        },
    )
    planes = rng.normal(0, 1, (1, 1, 32, 32)).astype(np.float32)
    assert psnr_db(answer(to_half(generator), planes), answer(generator, planes)) > 70


def kept_weights(generator: bytes) -> list[onnx.TensorProto]:
    return list(onnx.load_from_string(generator).graph.initializer)


@pytest.mark.parametrize("rubbish", [b"", b"abc", b"\x08\x0a" * 20])
def test_rubbish_is_refused(rubbish: bytes) -> None:
    with pytest.raises(PackageError, match="cannot be brought to FP16"):
        to_half(rubbish)


def test_an_old_file_is_refused() -> None:
    generator = network([("Relu", ["raw"], "refocused", {})], {}, opset=11)
    with pytest.raises(PackageError, match="opset is 11, wanted at least 13"):
        to_half(generator)
