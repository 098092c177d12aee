"""Real plans on a real GPU, held against the float32 master on the CPU.

The FP16 of a plan and the choice of its kernels differ from GPU to GPU, so answers are compared as
the accuracy gate does: at least 50 dB of the plane's range.
"""

import numpy as np
import psutil
import pytest

from benchmarks.on_gpu.nvml import Nvml
from benchmarks.on_gpu.rows import growth
from engine import model_store, package
from engine.gate import LEAST_PSNR_DB, check_golden
from engine.gpu import GpuError, GpuMemoryError
from engine.package import Package
from engine.runtimes import Answer
from engine.runtimes.openvino import OpenVino
from engine.runtimes.tensorrt import TensorRt
from engine.scaling import Scaling, derive
from refocus.errors import RejectedError
from refocus.frame import Pixels
from tests import identity_package

pytestmark = pytest.mark.gpu

CYCLES = 200
SIDES = ((1, 1), (3, 50), (16, 16), (63, 65), (97, 1030), (511, 513), (1024, 1024), (1500, 2049))


@pytest.fixture(scope="module")
def shipped() -> Package:
    return package.load(model_store.find("fluorescence"))


def spots(shape: tuple[int, int], dtype: str = "uint16") -> Pixels:
    """Blurred spots on a background, under photon noise: the network has something to do."""
    rng = np.random.default_rng(shape[0] * 10_000 + shape[1])
    y, x = np.ogrid[: shape[0], : shape[1]]
    light = np.full(shape, 0.1)
    for _ in range(40):
        centre_y, centre_x = rng.uniform(0, shape[0]), rng.uniform(0, shape[1])
        light += np.exp(-((y - centre_y) ** 2 + (x - centre_x) ** 2) / rng.uniform(10, 200))
    top = np.iinfo(dtype).max // 8
    made: Pixels = rng.poisson(light / light.max() * top).astype(dtype)
    return made


def scaling_of(pixels: Pixels) -> Scaling:
    return derive([pixels]) or Scaling(offset=0.0, scale=float(max(1, int(pixels.max()))))


def on_the_cpu(loaded: Package, pixels: Pixels, scaling: Scaling) -> Pixels:
    """What the float32 master makes of it."""
    reference = OpenVino(precision="f32")
    reference.load(loaded, (pixels.shape[0], pixels.shape[1]))
    answer = reference.refocus(pixels, scaling).pixels
    reference.close()
    return answer


def assert_alike(got: Pixels, wanted: Pixels) -> None:
    error = np.sqrt(np.mean((got.astype(np.float64) - wanted) ** 2))
    span = max(16.0, float(wanted.max()) - float(wanted.min()))
    assert error == 0 or 20 * np.log10(span / error) >= LEAST_PSNR_DB, (error, span)


def refocused(runtime: TensorRt, loaded: Package, pixels: Pixels, scaling: Scaling) -> Pixels:
    runtime.load(loaded, (pixels.shape[0], pixels.shape[1]))
    return runtime.refocus(pixels, scaling).pixels.copy()


@pytest.mark.timeout(600)
def test_golden_planes_come_back_as_the_float32_master_answers(
    runtime: TensorRt, shipped: Package
) -> None:
    worst_db = check_golden(
        shipped, lambda pixels, scaling: refocused(runtime, shipped, pixels, scaling), runtime.name
    )
    assert worst_db >= LEAST_PSNR_DB


@pytest.mark.timeout(600)
@pytest.mark.parametrize("shape", SIDES)
@pytest.mark.parametrize("dtype", ["uint8", "uint16"])
def test_any_size_is_refocused(
    runtime: TensorRt, shipped: Package, shape: tuple[int, int], dtype: str
) -> None:
    pixels = spots(shape, dtype)
    scaling = scaling_of(pixels)
    got = refocused(runtime, shipped, pixels, scaling)
    assert (got.shape, got.dtype) == (pixels.shape, pixels.dtype)
    assert_alike(got, on_the_cpu(shipped, pixels, scaling))


@pytest.mark.timeout(600)
def test_counts_pass_a_network_that_changes_nothing_bit_for_bit(
    runtime: TensorRt, tmp_path_factory: pytest.TempPathFactory
) -> None:
    identity = identity_package.make(tmp_path_factory.mktemp("packages") / "identity")
    for dtype in ("uint8", "uint16"):
        pixels = np.random.default_rng(0).integers(0, np.iinfo(dtype).max, (97, 131), dtype=dtype)
        scaling = Scaling(offset=100.25, scale=1000.5)
        assert np.array_equal(refocused(runtime, identity, pixels, scaling), pixels)


@pytest.mark.timeout(600)
def test_answers_come_in_order_with_both_slots_at_work(runtime: TensorRt, shipped: Package) -> None:
    planes = [spots((512, 512)), spots((512, 512))[::-1].copy(), spots((512, 512))[:, ::-1].copy()]
    scaling = scaling_of(planes[0])
    alone = [refocused(runtime, shipped, plane, scaling) for plane in planes]
    waiting: list[tuple[int, Answer]] = []
    for number in range(60):
        if len(waiting) == runtime.slots:
            which, answer = waiting.pop(0)
            assert np.array_equal(answer().pixels, alone[which])
        which = number % len(planes)
        waiting.append((which, runtime.start(planes[which], scaling)))
    for which, answer in waiting:
        assert np.array_equal(answer().pixels, alone[which])


@pytest.mark.timeout(900)
def test_many_sizes_take_no_more_memory_than_few(
    runtime: TensorRt, shipped: Package, nvml: Nvml
) -> None:
    rng = np.random.default_rng(1)
    used_mib = []
    for _ in range(40):
        shape = (int(rng.integers(1, 500)), int(rng.integers(1, 500)))
        refocused(runtime, shipped, spots(shape), Scaling(100.0, 1000.0))
        used_mib.append(nvml.used_mib())
    assert growth(used_mib) <= 32


@pytest.mark.timeout(600)
def test_a_plane_that_does_not_fit_is_cut_into_tiles_with_the_same_answer(
    runtime: TensorRt, shipped: Package, monkeypatch: pytest.MonkeyPatch
) -> None:
    pixels = spots((1500, 2049))
    scaling = scaling_of(pixels)
    whole = refocused(runtime, shipped, pixels, scaling)
    key = (shipped.hash, (1500, 2049))
    assert not runtime._loaded[key].is_tiled
    taken_bytes = sum(slot.device_bytes for slot in runtime._loaded[key].slots)
    runtime.close()
    small = TensorRt()
    monkeypatch.setattr(small, "_free_bytes", lambda: taken_bytes * 6 // 10)
    try:
        tiled = refocused(small, shipped, pixels, scaling)
        assert small._loaded[key].is_tiled
    finally:
        small.close()
    assert_alike(tiled, whole)


@pytest.mark.timeout(600)
def test_no_room_at_all_is_rejected_and_breaks_nothing(
    runtime: TensorRt, shipped: Package, monkeypatch: pytest.MonkeyPatch
) -> None:
    with monkeypatch.context() as patch:
        patch.setattr(runtime, "_free_bytes", lambda: 0)
        with pytest.raises(RejectedError, match="MiB"):
            runtime.load(shipped, (1024, 1024))
    pixels = spots((256, 256))
    scaling = scaling_of(pixels)
    assert_alike(refocused(runtime, shipped, pixels, scaling), on_the_cpu(shipped, pixels, scaling))


def test_more_memory_than_there_is_is_refused_by_the_driver(runtime: TensorRt) -> None:
    gpu = runtime._gpu
    with pytest.raises(GpuMemoryError, match="MiB"):
        gpu.alloc(2 * gpu.device.memory_bytes)
    gpu.free(gpu.alloc(1 << 20))


def test_another_thread_may_not_touch_it(runtime: TensorRt) -> None:
    from concurrent.futures import ThreadPoolExecutor

    with ThreadPoolExecutor(1) as pool, pytest.raises(GpuError, match="thread"):
        pool.submit(runtime._gpu.memory).result()


@pytest.mark.timeout(1800)
def test_opening_and_closing_leaks_nothing(takes_plans: None, shipped: Package, nvml: Nvml) -> None:
    pixels = spots((256, 256))
    scaling = scaling_of(pixels)
    on_gpu_mib, on_host_mib = [], []
    for _ in range(CYCLES):
        runtime = TensorRt()
        refocused(runtime, shipped, pixels, scaling)
        runtime.close()
        assert runtime._gpu.leaks() == {}
        on_gpu_mib.append(nvml.used_mib())
        on_host_mib.append(psutil.Process().memory_info().rss / 2**20)
    assert growth(on_gpu_mib) <= 8
    assert growth(on_host_mib) <= 32
