"""Plans, really built: TensorRT for RTX needs no GPU for it."""

import dataclasses
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any

import pytest
import tensorrt_rtx

from engine.generators import build as make_generator
from engine.package import SHIPPED, load
from engine.plan import Profile, Toolkit, build, open_toolkit, profile_for, rtx_capability
from engine.to_onnx import export
from refocus.errors import PackageError, SettingsError
from tests import identity_package
from tests.small_networks import SAME, network, random, styled

WORKSPACE_BYTES = 1 << 30


@pytest.fixture(scope="module")
def toolkit() -> Toolkit:
    return open_toolkit("tensorrt_rtx")


@pytest.fixture(autouse=True, scope="module")
def no_progress_thread() -> Iterator[None]:
    """torch.fx opens progress bars even where none is shown; tqdm keeps a thread for them."""
    with pytest.MonkeyPatch.context() as patch:
        if "tqdm" in sys.modules:
            patch.setattr("tqdm.tqdm.monitor_interval", 0)
        yield


def build_for(toolkit: Toolkit, generator: bytes, side_px: int, **how: Any) -> bytes:
    profile = profile_for((side_px, side_px), 16)
    return build(toolkit, generator, profile, **{"workspace_bytes": WORKSPACE_BYTES, **how})


@pytest.mark.parametrize(
    ("shape", "stride", "least", "most"),
    [
        ((48, 64), 16, 64, 512),
        ((512, 512), 16, 64, 512),
        ((513, 200), 16, 64, 1024),
        ((1024, 2048), 16, 64, 2048),
        ((2049, 1), 16, 64, 4096),
        ((2000, 2040), 32, 64, 2048),
        ((9000, 100), 16, 64, 8192),
        ((512, 512), 12, 72, 516),
        ((2048, 2048), 100, 100, 2100),
    ],
)
def test_frames_are_sorted_into_squares(
    shape: tuple[int, int], stride: int, least: int, most: int
) -> None:
    profile = profile_for(shape, stride)
    assert profile == Profile((least, least), (most, most), (most, most))
    assert least % stride == most % stride == 0


@pytest.mark.parametrize("side_px", [512, 2048])
def test_the_shipped_generator(
    toolkit: Toolkit, side_px: int, capfd: pytest.CaptureFixture[str]
) -> None:
    package = load(SHIPPED / "fluorescence")
    plan = build_for(toolkit, package.generator, side_px)
    assert 1_000_000 < len(plan) < 10_000_000
    assert toolkit.messages() == []
    assert capfd.readouterr() == ("", "")


@pytest.mark.parametrize("answer", ["identity", "negated", "constant", "nan"])
def test_the_packages_of_tests(
    toolkit: Toolkit, tmp_path: Path, answer: identity_package.Answer
) -> None:
    package = identity_package.make(tmp_path / answer, answer=answer)
    assert build_for(toolkit, package.generator, 512)


def test_networks_with_all_that_generators_are_made_of(toolkit: Toolkit, tmp_path: Path) -> None:
    assert build_for(toolkit, styled(), 2048)
    assert build_for(toolkit, identity_package.make_unet(tmp_path / "unet").generator, 2048)


@pytest.mark.long
@pytest.mark.parametrize("architecture", ["resnet9", "refocus-unet"])
def test_the_large_generators_at_full_size(toolkit: Toolkit, architecture: str) -> None:
    generator = export(make_generator(architecture, {}))
    profile = profile_for((2048, 2048), 32)
    assert build(toolkit, generator, profile, workspace_bytes=4 << 30)


def test_built_for_one_gpu_or_for_all(toolkit: Toolkit) -> None:
    generator = styled()
    plans = [build_for(toolkit, generator, 512, capability=one) for one in ((7, 5), (8, 9), None)]
    assert all(plans)


def test_a_gpu_that_rtx_does_not_know_is_refused(toolkit: Toolkit) -> None:
    assert rtx_capability(toolkit, (12, 0)) == tensorrt_rtx.ComputeCapability.SM120
    wanted = r"capability 9\.0, only 7\.5, 8\.0, .*12\.0.*; install .*\[tensorrt\]"
    with pytest.raises(SettingsError, match=wanted):
        build_for(toolkit, styled(), 512, capability=(9, 0))


def test_too_little_memory_is_said_in_figures(toolkit: Toolkit) -> None:
    wanted = r"up to 4096 x 4096 px with 256 MiB: .*OutOfMemory"
    with pytest.raises(PackageError, match=wanted) as caught:
        build_for(
            toolkit, load(SHIPPED / "fluorescence").generator, 4096, workspace_bytes=256 << 20
        )
    assert ".cpp" not in str(caught.value)
    assert build_for(toolkit, styled(), 512), "a failed build must not spoil the next"


def test_what_tensorrt_cannot_read_is_named(toolkit: Toolkit) -> None:
    weights = {"w": random(1, 1, 3, 3)}
    conv = ("Conv", ["raw", "w"], "c", SAME)
    strange = ("Bernoulli", ["c"], "refocused", {"name": "strange"})
    generator = network([conv, strange], weights)
    with pytest.raises(PackageError, match="cannot read this generator: Bernoulli 'strange': "):
        build_for(toolkit, generator, 512)


def test_more_than_one_channel_is_refused(toolkit: Toolkit) -> None:
    generator = network(
        [("Conv", ["raw", "w"], "refocused", SAME)], {"w": random(2, 2, 3, 3)}, channels=2
    )
    with pytest.raises(PackageError, match=r"has inputs raw \(-1, 2, -1, -1\)"):
        build_for(toolkit, generator, 512)


def stand_in(version: str) -> ModuleType:
    """A module `tensorrt` of that version; its logger is RTX's."""
    module = ModuleType("tensorrt")
    module.__dict__.update(__version__=version, ILogger=tensorrt_rtx.ILogger)
    return module


def test_the_full_tensorrt_comes_first(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "tensorrt", stand_in("10.13.3.9"))
    opened = open_toolkit()
    assert (opened.name, opened.is_rtx) == ("tensorrt 10.13.3.9", False)
    rtx = open_toolkit("tensorrt_rtx")
    assert (rtx.name, rtx.is_rtx) == (f"tensorrt_rtx {tensorrt_rtx.__version__}", True)


def test_what_is_too_old_is_passed_over(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "tensorrt", stand_in("10.9.0"))
    assert open_toolkit().is_rtx
    with pytest.raises(SettingsError, match=r"this is 10\.9\.0, wanted 10\.13 or later"):
        open_toolkit("tensorrt")


def test_nothing_installed_says_what_to_install(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "tensorrt", None)
    monkeypatch.setitem(sys.modules, "tensorrt_rtx", None)
    wanted = r"no TensorRT here \(tensorrt: .*; tensorrt_rtx: .*\[rtx\]\" in .*, or \[tensorrt\]"
    with pytest.raises(SettingsError, match=wanted):
        open_toolkit()


def test_tensorrt_without_onnx_says_what_to_install(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "onnx", None)
    with pytest.raises(SettingsError, match=r"tensorrt_rtx: .*onnx.*\[rtx\]"):
        open_toolkit()


def test_without_onnx_the_modules_can_be_imported() -> None:
    """Auto must be able to say that there is no TensorRT, and take the CPU."""
    lines = ("import sys", "sys.modules['onnx'] = None", "import engine.plan_cache")
    root = Path(__file__).parents[1]
    subprocess.run([sys.executable, "-c", "; ".join(lines)], cwd=root, check=True)


def test_a_builder_that_cannot_start_says_why(toolkit: Toolkit) -> None:
    """As the full TensorRT does on a machine without a GPU."""

    def builder(logger: Any) -> None:
        text = "[checkMacros.cpp::catchCudaError::212] CUDA initialization failure with error: 35"
        logger.log(tensorrt_rtx.ILogger.Severity.ERROR, text)
        raise TypeError("pybind11::init(): factory function returned nullptr")

    blind = dataclasses.replace(toolkit, module=SimpleNamespace(Builder=builder))
    with pytest.raises(SettingsError, match="machine: CUDA initialization failure"):
        build_for(blind, styled(), 512)


def test_messages_are_kept_once(toolkit: Toolkit) -> None:
    severity = tensorrt_rtx.ILogger.Severity
    for number in range(300):
        toolkit.logger.log(severity.WARNING, f"warning {number}")
    toolkit.logger.log(severity.VERBOSE, "chatter")
    assert toolkit.messages()[-1] == "WARNING: warning 299"
    assert toolkit.messages() == []


def test_weights_of_a_half_network_are_half_as_large(toolkit: Toolkit) -> None:
    """So FP16 has reached the plan."""
    generator = network(
        [
            ("Conv", ["raw", "widen"], "c", SAME),
            ("Conv", ["c", "big"], "d", SAME),
            ("Conv", ["d", "narrow"], "refocused", SAME),
        ],
        {
            "big": random(512, 512, 3, 3),
            "widen": random(512, 1, 3, 3),
            "narrow": random(1, 512, 3, 3),
        },
    )
    assert len(generator) > 9_400_000 > 1.5 * len(build_for(toolkit, generator, 512))
