"""ONNX to plan: what TensorRT executes, built from a generator's float32 master.

Two toolkits can do it: the full TensorRT (module `tensorrt`, 10.13 or later, 11) and TensorRT for
RTX (`tensorrt_rtx`). One code path serves both, over what all their versions share: the types stand
in the ONNX file (engine/half.py; version 11 has no FP16 flag any more), and the batch is explicit
without saying so. tests/test_tensorrt_api.py holds every name used here against the bindings of
10.13, 10.16, 11.4 and RTX 1.7. They differ in one thing: the full one builds on the very GPU that
will run the plan, RTX anywhere, also without a GPU, for the compute capabilities asked for.

A plan is built for one profile: a range of frame sizes. Its memory grows with the largest of them,
so frames are sorted into squares of a power of two, and every crop of a camera finds its square's.

TF32 is off: what is float32 in the ONNX file stays float32. No auxiliary streams: the whole network
runs on the one stream that captures it.
"""

import importlib
import re
from collections import deque
from collections.abc import Iterable
from dataclasses import dataclass, field
from typing import Any, Literal

from engine.tiles import SMALLEST_PX, round_up
from refocus.errors import PackageError, SettingsError
from refocus.words import install

RECIPE = 1
"""Version of how plans are built here: goes up whenever older plans are not to be used again."""

ToolkitName = Literal["tensorrt", "tensorrt_rtx"]
OLDEST: dict[ToolkitName, tuple[int, int]] = {"tensorrt": (10, 13), "tensorrt_rtx": (1, 7)}
EXTRA: dict[ToolkitName, str] = {"tensorrt": "tensorrt", "tensorrt_rtx": "rtx"}
"""Which of our extras brings each."""

SMALLEST_SQUARE_PX = 512
LARGEST_SQUARE_PX = 8192
"""Larger frames are cut into tiles."""
KEPT_MESSAGES = 200


class PlanMemoryError(PackageError):
    """A plan for frames of this size takes more memory than there may be; smaller ones may not."""


@dataclass(frozen=True, slots=True)
class Toolkit:
    """An imported TensorRT, its logger and what it said."""

    name: str
    """Module and version: "tensorrt_rtx 1.7.1.116"."""
    module: Any = field(repr=False)
    is_rtx: bool
    logger: Any = field(repr=False)
    """To be given to everything that wants one: TensorRT has one logger a process."""
    _kept: deque[str] = field(repr=False)

    def messages(self) -> list[str]:
        """Its errors and warnings since the last call, oldest first: collected, never printed."""
        messages = []
        while self._kept:  # TensorRT may be adding to it from a thread of its own
            messages.append(self._kept.popleft())
        return messages


@dataclass(frozen=True, slots=True)
class Profile:
    """The frame sizes (y, x) in px that a plan takes: batch 1, multiples of the stride."""

    least: tuple[int, int]
    best: tuple[int, int]
    """The size that it is tuned for."""
    most: tuple[int, int]


def open_toolkit(wanted: ToolkitName | None = None) -> Toolkit:
    """Import *wanted*, or the first there is, full TensorRT first.

    Raises SettingsError with what was found of each, and what to install.
    """
    names: tuple[ToolkitName, ...] = (wanted,) if wanted else ("tensorrt", "tensorrt_rtx")
    reasons = []
    for name in names:
        try:
            module = importlib.import_module(name)
            importlib.import_module("onnx")  # what plans are built from; of the same extras
        except (ImportError, OSError) as error:
            reasons.append(f"{name}: {_first_line(error)}")
            continue
        version = tuple(int(part) for part in re.findall(r"\d+", module.__version__)[:2])
        if version >= OLDEST[name]:
            logger, messages = _collecting_logger(module)
            is_rtx = name == "tensorrt_rtx"
            return Toolkit(f"{name} {module.__version__}", module, is_rtx, logger, messages)
        oldest = ".".join(map(str, OLDEST[name]))
        reasons.append(f"{name}: this is {module.__version__}, wanted {oldest} or later")
    best, *others = (EXTRA[name] for name in reversed(names))
    advice = ", or ".join([install(best), *(f"[{other}]" for other in others)])
    raise SettingsError(f"no TensorRT here ({'; '.join(reasons)}); {advice}")


def profile_for(shape: tuple[int, int], stride: int) -> Profile:
    """Profile for frames of *shape* (y, x) px: the square of the next power of two, 512 to 8192.

    *stride*: of the generator; sides are rounded up to a multiple of it.
    """
    power = 1 << (max(shape) - 1).bit_length()
    square = min(max(SMALLEST_SQUARE_PX, power), LARGEST_SQUARE_PX)
    least, most = round_up(SMALLEST_PX, stride), round_up(square, stride)
    return Profile((least, least), (most, most), (most, most))


def build(
    toolkit: Toolkit,
    generator: bytes,
    profile: Profile,
    *,
    workspace_bytes: int,
    capability: tuple[int, int] | None = None,
) -> bytes:
    """Plan of *generator*, a float32 master: the content of an ONNX file.

    *workspace_bytes*: what a step of the plan may take on the GPU beside its weights.
    *capability*: of the GPU to build for, RTX only; None builds for Ampere and all later ones.
    Raises PackageError where TensorRT cannot parse or build it, with TensorRT's own words, and
    SettingsError where it cannot start here or does not know that GPU.
    """
    from engine.half import to_half  # needs onnx, which a machine without a GPU may lack

    half = to_half(generator)
    return build_from_half(
        toolkit, half, profile, workspace_bytes=workspace_bytes, capability=capability
    )


def build_from_half(
    toolkit: Toolkit,
    half: bytes,
    profile: Profile,
    *,
    workspace_bytes: int,
    capability: tuple[int, int] | None = None,
) -> bytes:
    """`build` for what engine/half.py made of a master."""
    trt = toolkit.module
    toolkit.messages()  # what was said before is not about this build
    try:
        builder = trt.Builder(toolkit.logger)
    except (TypeError, RuntimeError) as error:  # a null pointer, to pybind11
        said = _said(toolkit) or str(error)
        raise SettingsError(
            f"{toolkit.name} cannot build on this machine: {said}; it needs an NVIDIA GPU and its "
            "driver (`refocus doctor` says what is found), TensorRT for RTX builds without"
        ) from error
    typed = 1 << int(trt.NetworkDefinitionCreationFlag.STRONGLY_TYPED)
    network = builder.create_network(typed)
    _parse(toolkit, network, half)
    config = builder.create_builder_config()
    config.set_memory_pool_limit(trt.MemoryPoolType.WORKSPACE, workspace_bytes)
    config.clear_flag(trt.BuilderFlag.TF32)
    config.max_aux_streams = 0
    # Or a context of a small frame would take the memory of the profile's largest.
    config.set_preview_feature(trt.PreviewFeature.RUNTIME_ACTIVATION_RESIZE_10_10, True)
    if toolkit.is_rtx:
        # Or it takes memory while it runs, which nobody counts, and no graph can be captured.
        config.set_flag(trt.BuilderFlag.REQUIRE_USER_ALLOCATION)
    if toolkit.is_rtx and capability is not None:
        config.num_compute_capabilities = 1
        config.set_compute_capability(rtx_capability(toolkit, capability), 0)
    sizes = builder.create_optimization_profile()
    least, best, most = ((1, 1, *side) for side in (profile.least, profile.best, profile.most))
    sizes.set_shape(network.get_input(0).name, least, best, most)
    config.add_optimization_profile(sizes)
    plan = builder.build_serialized_network(network, config)
    if plan is None:
        said = _said(toolkit) or "it gave no reason"
        kind = PlanMemoryError if "OutOfMemory" in said else PackageError
        raise kind(
            f"{toolkit.name} cannot build a plan of this generator for frames up to "
            f"{profile.most[0]} x {profile.most[1]} px with {workspace_bytes >> 20} MiB: {said}"
        )
    return bytes(memoryview(plan))


def rtx_capability(toolkit: Toolkit, capability: tuple[int, int]) -> Any:
    """RTX's name of a GPU's compute capability. Raises SettingsError where it has none.

    The one place that decides which GPUs TensorRT for RTX is for. Hopper (9.0), a data-centre GPU,
    is not among those that version 1.7 names.
    """
    known = toolkit.module.ComputeCapability.__members__
    wanted = f"SM{capability[0]}{capability[1]}"
    if wanted not in known:
        have = ", ".join(f"{name[2:-1]}.{name[-1]}" for name in known if name.startswith("SM"))
        raise SettingsError(
            f"{toolkit.name} does not know a GPU of compute capability "
            f"{capability[0]}.{capability[1]}, only {have}; install the full TensorRT: "
            f"{install(EXTRA['tensorrt'])}"
        )
    return known[wanted]


def _parse(toolkit: Toolkit, network: Any, half: bytes) -> None:
    parser = toolkit.module.OnnxParser(network, toolkit.logger)
    if not parser.parse(half):
        errors = [parser.get_error(i) for i in range(parser.num_errors)]
        reasons = [f"{e.node_operator()} {e.node_name()!r}: {e.desc()}" for e in errors]
        raise PackageError(
            f"{toolkit.name} cannot read this generator: "
            f"{'; '.join(reasons) or _said(toolkit) or 'it gave no reason'}"
        )
    inputs = [network.get_input(i) for i in range(network.num_inputs)]
    outputs = [network.get_output(i) for i in range(network.num_outputs)]
    if len(inputs) != 1 or len(outputs) != 1 or tuple(inputs[0].shape)[1:2] != (1,):
        raise PackageError(
            "a generator has one input (N, 1, H, W) and one output, this one has inputs "
            f"{_shapes(inputs)} and outputs {_shapes(outputs)}"
        )


def _shapes(tensors: Iterable[Any]) -> str:
    return ", ".join(f"{tensor.name} {tuple(tensor.shape)}" for tensor in tensors) or "none"


def _collecting_logger(module: Any) -> tuple[Any, deque[str]]:
    messages: deque[str] = deque(maxlen=KEPT_MESSAGES)
    severity = module.ILogger.Severity
    kept = (severity.INTERNAL_ERROR, severity.ERROR, severity.WARNING)

    class Collecting(module.ILogger):  # type: ignore[misc]
        def __init__(self) -> None:
            module.ILogger.__init__(self)  # pybind11 demands the explicit call

        def log(self, severity: Any, text: str) -> None:
            if severity in kept:
                messages.append(f"{severity.name}: {text}")

    return Collecting(), messages


def _said(toolkit: Toolkit) -> str:
    """The errors since the last build began, without the places in TensorRT's source."""
    errors = [text for text in toolkit.messages() if not text.startswith("WARNING")]
    return "; ".join(re.sub(r"^[A-Z_]+: (\[[^\]]*\] )?", "", text) for text in errors)


def _first_line(error: Exception) -> str:
    return next(iter(str(error).splitlines()), type(error).__name__)
