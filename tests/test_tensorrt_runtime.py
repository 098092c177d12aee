"""The way of a plane over the GPU: buffers, graphs, slots, tiles, and what happens when it fails.

The driver is a stand-in behind the real bindings, plans are built by the real TensorRT for RTX, and
only their execution is played (tests/played_tensorrt.py). tests/gpu has the same on a real GPU.
"""

import contextlib
import errno
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import numpy.typing as npt
import pytest

from engine.gpu import Device
from engine.package import FILES, GOLDEN, Golden, Package, encode_golden, write
from engine.plan import PlanMemoryError, Profile, Toolkit
from engine.runtimes import choose, loaded, open_runtime, tensorrt
from engine.runtimes.openvino import OpenVino
from engine.runtimes.tensorrt import MAX_LOADED, SLOTS, TensorRt
from engine.scaling import Scaling
from engine.tiles import padded_shape
from refocus.errors import EngineError, PackageError, RefocusError, RejectedError, SettingsError
from tests import fake_driver, identity_package, played_tensorrt
from tests.played_tensorrt import Played

SCALING = Scaling(offset=100.0, scale=1000.0)


@pytest.fixture
def gpu() -> Iterator[None]:
    """A machine with a GPU, which must be left as it was found."""
    with fake_driver.plugged_in():
        yield
        assert not fake_driver.alive()


@pytest.fixture(scope="module")
def identity(tmp_path_factory: pytest.TempPathFactory) -> Package:
    return identity_package.make(tmp_path_factory.mktemp("packages") / "identity")


@pytest.fixture(scope="module")
def unet(tmp_path_factory: pytest.TempPathFactory) -> Package:
    return identity_package.make_unet(tmp_path_factory.mktemp("packages") / "unet")


def plane(shape: tuple[int, int], dtype: npt.DTypeLike = np.uint16) -> npt.NDArray[np.generic]:
    y, x = np.ogrid[: shape[0], : shape[1]]
    rng = np.random.default_rng(3)
    light = 0.3 + np.sin(y / 7) * np.sin(x / 9) + rng.normal(0, 0.05, shape)
    top = np.iinfo(np.dtype(dtype)).max // 16
    return np.clip(light * top + top / 8, 0, None).astype(dtype)


def opened(package: Package, **how: int) -> tuple[TensorRt, Played]:
    played = Played(played_tensorrt.master(package), **how)
    return TensorRt(open_executable=played.open), played


@pytest.mark.usefixtures("gpu")
@pytest.mark.parametrize("shape", [(1, 1), (3, 50), (48, 64), (65, 71), (97, 130)])
@pytest.mark.parametrize("dtype", [np.uint8, np.uint16])
def test_any_size_comes_back_as_it_was(
    identity: Package, shape: tuple[int, int], dtype: npt.DTypeLike
) -> None:
    runtime, played = opened(identity)
    raw = plane(shape, dtype)
    before = raw.copy()
    runtime.load(identity, shape)
    answer = runtime.refocus(raw, SCALING)
    runtime.close()
    assert answer.pixels.dtype == raw.dtype
    assert answer.clipped == 0
    np.testing.assert_array_equal(answer.pixels, before)
    np.testing.assert_array_equal(raw, before)
    assert played.is_closed
    assert played.plans[0], "a real plan"


@pytest.mark.usefixtures("gpu")
def test_it_computes_what_the_cpu_computes(unet: Package) -> None:
    raw = plane((150, 210))
    runtime, _ = opened(unet)
    runtime.load(unet, raw.shape)
    answer = runtime.refocus(raw, SCALING)
    runtime.close()
    cpu = OpenVino(threads=1, precision="f32")
    cpu.load(unet, raw.shape)
    wanted = cpu.refocus(raw, SCALING)
    cpu.close()
    assert np.abs(answer.pixels.astype(int) - wanted.pixels).max() <= 1
    assert abs(answer.clipped - wanted.clipped) <= 1


@pytest.mark.usefixtures("gpu")
def test_two_planes_in_work_keep_their_order_and_their_scaling(negated: Package) -> None:
    runtime, _ = opened(negated)
    runtime.load(negated, (48, 64))
    planes = [plane((48, 64)) + np.uint16(k) for k in range(5)]
    scalings = [Scaling(offset=2000.0 + 100 * k, scale=500.0 * (k + 1)) for k in range(5)]
    answers = []
    under_way = []
    for raw, scaling in zip(planes, scalings, strict=True):
        if len(under_way) == SLOTS:
            answers.append(under_way.pop(0)().pixels.copy())
        under_way.append(runtime.start(raw, scaling))
    with pytest.raises(EngineError, match="2 planes are in work"):
        runtime.start(planes[0], SCALING)
    answers += [answer().pixels.copy() for answer in under_way]
    runtime.close()
    for raw, scaling, answer in zip(planes, scalings, answers, strict=True):
        wanted = np.clip(2 * scaling.offset - raw.astype(float), 0, 65535)
        assert np.abs(answer - wanted).max() <= 1


@pytest.mark.usefixtures("gpu")
def test_8_and_16_bits_take_turns(identity: Package) -> None:
    runtime, _ = opened(identity)
    runtime.load(identity, (48, 64))
    for _ in range(3):
        for dtype in (np.uint8, np.uint16):
            raw = plane((48, 64), dtype)
            np.testing.assert_array_equal(runtime.refocus(raw, SCALING).pixels, raw)
    with pytest.raises(RejectedError, match="float32"):
        runtime.start(np.ones((48, 64), np.float32), SCALING)
    runtime.close()


@pytest.mark.usefixtures("gpu")
def test_what_cannot_be_captured_is_run_step_by_step(negated: Package) -> None:
    raw = plane((48, 64))
    runtime, played = opened(negated)
    runtime.load(negated, raw.shape)
    wanted = runtime.refocus(raw, SCALING).pixels
    assert "cuGraphLaunch" in fake_driver.calls()
    runtime.close()
    fake_driver.reset()
    runtime, played = opened(negated)
    played.is_capturable = False
    runtime.load(negated, raw.shape)
    np.testing.assert_array_equal(runtime.refocus(raw, SCALING).pixels, wanted)
    assert "cuGraphLaunch" not in fake_driver.calls()
    runtime.close()


@pytest.mark.usefixtures("gpu")
def test_where_a_capture_fails_planes_are_run_step_by_step(negated: Package) -> None:
    """The plan is not to blame: its plain run went well."""
    raw = plane((48, 64))
    told: list[str] = []
    played = Played(played_tensorrt.master(negated))
    played.refuses_capture = True
    runtime = TensorRt(open_executable=played.open, say=told.append)
    runtime.load(negated, raw.shape)
    before = len(fake_driver.calls())
    answer = runtime.refocus(raw, SCALING)
    assert np.abs(answer.pixels.astype(int) - np.clip(200 - raw.astype(int), 0, 65535)).max() <= 1
    assert "cuGraphLaunch" not in fake_driver.calls()[before:]
    assert any("step by step" in line for line in told)
    runtime.close()


@pytest.mark.usefixtures("gpu")
def test_no_plane_asks_the_driver_for_more_than_its_way(identity: Package) -> None:
    """Kernels are looked up, and graphs captured, before the first plane."""
    runtime, _ = opened(identity)
    runtime.load(identity, (48, 64))
    before = len(fake_driver.calls())
    for dtype in (np.uint8, np.uint16):
        runtime.refocus(plane((48, 64), dtype), SCALING)
    names = set(fake_driver.calls()[before:])
    assert names <= {"cuGraphLaunch", "cuEventRecord", "cuEventSynchronize"}
    runtime.close()


@pytest.mark.usefixtures("gpu")
def test_a_plan_that_tensorrt_does_not_take_is_built_anew_once(identity: Package) -> None:
    runtime, _ = opened(identity)
    runtime.load(identity, (48, 64))  # it is in the cache from here on
    runtime.close()
    told: list[str] = []
    played = Played(played_tensorrt.master(identity))
    played.open_fails = [EngineError("does not take its own plan")]
    runtime = TensorRt(open_executable=played.open, say=told.append)
    runtime.load(identity, (48, 64))
    assert len(played.plans) == 2
    assert any("built anew: does not take its own plan" in line for line in told)
    runtime.close()
    played.open_fails = [EngineError("again"), EngineError("and again")]
    runtime = TensorRt(open_executable=played.open)
    with pytest.raises(EngineError, match="and again"):
        runtime.load(identity, (48, 64))
    runtime.close()


@pytest.mark.usefixtures("gpu")
def test_what_cannot_be_kept_on_disk_is_said_and_costs_nothing(identity: Package) -> None:
    told: list[str] = []
    played = Played(played_tensorrt.master(identity))
    played.save_fails = OSError(errno.ENOSPC, "No space left on device")
    runtime = TensorRt(open_executable=played.open, say=told.append)
    raw = plane((48, 64))
    runtime.load(identity, raw.shape)
    np.testing.assert_array_equal(runtime.refocus(raw, SCALING).pixels, raw)
    assert any("No space left" in line for line in told)
    runtime.close()


@pytest.mark.usefixtures("gpu")
def test_golden_planes_may_be_larger_than_the_frame(identity: Package, tmp_path: Path) -> None:
    large = plane((640, 640))
    files = {name: (identity.folder / name).read_bytes() for name in FILES}
    files[GOLDEN] = encode_golden([Golden(large, SCALING, large)])
    package = write(tmp_path / "large", identity.manifest, files)
    runtime, _ = opened(package)
    runtime.load(package, (100, 100))
    runtime.close()


@pytest.mark.usefixtures("gpu")
def test_a_shape_that_is_rejected_costs_no_other(identity: Package) -> None:
    runtime, _ = opened(identity, scratch_bytes_per_px=1000)
    runtime.load(identity, (64, 64))
    runtime.load(identity, (80, 64))
    with pytest.raises(RejectedError):
        runtime.load(identity, (3000, 3000))
    assert list(runtime._loaded) == [(identity.hash, (64, 64)), (identity.hash, (80, 64))]
    runtime.close()


@pytest.mark.usefixtures("gpu")
def test_where_the_plan_takes_too_much_memory_smaller_ones_are_tried(
    identity: Package, monkeypatch: pytest.MonkeyPatch
) -> None:
    ensure = tensorrt.ensure

    def ensure_small(package: Package, toolkit: Toolkit, device: Device, profile: Profile, **how):  # type: ignore[no-untyped-def]
        if profile.most[0] > 1024:
            raise PlanMemoryError("OutOfMemory (Requested size was 6465171712 bytes)")
        return ensure(package, toolkit, device, profile, **how)

    monkeypatch.setattr(tensorrt, "ensure", ensure_small)
    runtime, _ = opened(identity)
    runtime.load(identity, (1100, 1100))
    assert runtime._loaded[identity.hash, (1100, 1100)].window == (544, 544)
    runtime.close()


@pytest.mark.usefixtures("gpu")
def test_shapes_do_not_pile_up(identity: Package) -> None:
    runtime, played = opened(identity)
    for k in range(MAX_LOADED + 2):
        runtime.load(identity, (64 + k, 64))
        runtime.load(identity, (64 + k, 64))
    assert played.contexts == SLOTS * MAX_LOADED
    assert len(played.plans) == 1, "all of them fit into one plan"
    with pytest.raises(EngineError, match="call load first"):
        runtime.refocus(plane((64, 64)), SCALING)
    runtime.close()
    runtime.close()


@pytest.mark.usefixtures("gpu")
def test_a_plan_that_computes_something_else_is_not_used(identity: Package) -> None:
    exact = played_tensorrt.master(identity)
    played = Played(lambda values: exact(values) * 1.02)
    runtime = TensorRt(open_executable=played.open)
    with pytest.raises(PackageError, match=r"accuracy gate: identity 0 .* at \d+\.\d dB"):
        runtime.load(identity, (48, 64))
    assert not played.contexts
    assert played.is_closed
    played.compute = lambda values: values * np.float32(np.nan)
    with pytest.raises(PackageError, match="non-finite"):
        runtime.load(identity, (48, 64))
    runtime.close()


@pytest.mark.usefixtures("gpu")
@pytest.mark.parametrize(("level", "reason"), [(np.nan, "non-finite"), (0.25, "everywhere")])
def test_rubbish_does_not_come_out(identity: Package, level: float, reason: str) -> None:
    runtime, played = opened(identity)
    runtime.load(identity, (48, 64))
    raw = plane((48, 64))
    exact, played.compute = played.compute, lambda values: np.full_like(values, level)
    with pytest.raises(EngineError, match=reason):
        runtime.refocus(raw, SCALING)
    played.compute = exact
    np.testing.assert_array_equal(runtime.refocus(raw, SCALING).pixels, raw)
    runtime.close()


@pytest.mark.usefixtures("gpu")
@pytest.mark.parametrize("shape", [(700, 400), (641, 1003), (200, 900), (35, 1200)])
def test_what_does_not_fit_goes_in_tiles_and_nobody_can_see_where(
    unet: Package, shape: tuple[int, int], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(loaded, "CORES_PX", (512, 256))
    raw = plane(shape)
    whole, _ = opened(unet)
    whole.load(unet, shape)
    wanted = whole.refocus(raw, SCALING)
    whole.close()
    height, width = padded_shape(shape, 16)
    runtime, played = opened(unet, scratch_bytes_per_px=200)
    fake_driver.set_memory(SLOTS * height * width * 190)
    runtime.load(unet, shape)
    assert runtime._loaded[unet.hash, shape].is_tiled
    answer = runtime.refocus(raw, SCALING)
    assert np.abs(answer.pixels.astype(int) - wanted.pixels).max() <= 1
    assert answer.clipped >= wanted.clipped
    assert played.contexts == SLOTS
    runtime.close()


@pytest.mark.usefixtures("gpu")
def test_room_is_made_by_letting_go_of_the_last_shape(identity: Package) -> None:
    runtime, played = opened(identity, scratch_bytes_per_px=100)
    fake_driver.set_memory(SLOTS * 512 * 512 * 140)
    runtime.load(identity, (512, 512))
    runtime.load(identity, (512, 496))
    assert list(runtime._loaded) == [(identity.hash, (512, 496))]
    assert not runtime._loaded[identity.hash, (512, 496)].is_tiled
    assert played.contexts == SLOTS
    runtime.close()


@pytest.mark.usefixtures("gpu")
def test_a_plane_that_fits_nowhere_is_rejected_with_the_reason(identity: Package) -> None:
    runtime, played = opened(identity, scratch_bytes_per_px=10_000)
    with pytest.raises(RejectedError, match=r"not even in tiles: .* MiB are free"):
        runtime.load(identity, (2048, 2048))
    assert not played.contexts
    runtime.load(identity, (64, 64))  # what is smaller goes on
    runtime.close()


@pytest.mark.parametrize("number", range(1, 220, 7))
@pytest.mark.parametrize("sticky", [True, False], ids=["for good", "once"])
def test_an_error_of_the_driver_anywhere_is_told_and_leaves_nothing_behind(
    identity: Package, number: int, sticky: bool
) -> None:
    """The n-th call of the driver fails; for good, as it mostly goes with CUDA, or once."""
    raw = plane((48, 64))
    played = Played(played_tensorrt.master(identity))
    with fake_driver.plugged_in():
        fake_driver.fail_at(number, fake_driver.ILLEGAL_ADDRESS, sticky=sticky)
        with contextlib.ExitStack() as closing, contextlib.suppress(RefocusError):
            runtime = TensorRt(open_executable=played.open)
            closing.callback(runtime.close)
            runtime.load(identity, raw.shape)
            under_way = [runtime.start(raw, SCALING), runtime.start(raw, SCALING)]
            for answer in under_way:
                np.testing.assert_array_equal(answer().pixels, raw)
        assert not played.contexts
        failed = fake_driver.calls()[number - 1 : number]
        if not sticky and failed != ["cuCtxPopCurrent_v2"]:  # after that one there is no way back
            assert not fake_driver.alive()


@pytest.mark.usefixtures("gpu")
def test_out_of_memory_in_between_is_no_broken_gpu(identity: Package) -> None:
    """Memory was free when it was counted, and gone when it was taken: the plane goes in tiles."""
    runtime, _ = opened(identity)
    runtime.load(identity, (64, 64))
    fake_driver.fail_at(5, fake_driver.OUT_OF_MEMORY, function="cuMemAlloc_v2", sticky=False)
    runtime.load(identity, (1200, 300))
    raw = plane((1200, 300))
    np.testing.assert_array_equal(runtime.refocus(raw, SCALING).pixels, raw)
    runtime.close()


@pytest.mark.usefixtures("gpu")
def test_auto_takes_the_gpu_and_says_so() -> None:
    choice = choose("auto")
    assert choice.why == "auto takes the GPU"
    assert choice.runtime.name.startswith("tensorrt_rtx ")
    choice.runtime.close()


def test_without_a_gpu_auto_takes_the_cpu_and_tensorrt_is_refused() -> None:
    choice = choose("auto", threads=1)
    assert isinstance(choice.runtime, OpenVino)
    assert choice.why.startswith("auto takes the CPU: no ")
    assert "NVIDIA GPU" in choice.why
    choice.runtime.close()
    with pytest.raises(SettingsError, match="NVIDIA GPU"):
        open_runtime("tensorrt")


@pytest.fixture
def negated(tmp_path: Path) -> Package:
    return identity_package.make(tmp_path / "negated", name="negated", answer="negated")
