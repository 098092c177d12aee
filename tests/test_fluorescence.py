"""The generator that ships: what it must reach on real stacks, and what it must never do.

The figures are those that `refocus evaluate fluorescence` prints. Training and testing are split by
file: no picture that was trained on is, as a whole, a plane that is tested on. Two files of one
slide, or a training picture cut out of a plane, would pass for different ones.
"""

import hashlib
from collections.abc import Iterator
from pathlib import Path

import imageio.v3 as iio
import numpy as np
import pytest
import tifffile
import torch
from PIL import Image
from safetensors.torch import load_file

from calibration.evaluate import evaluate, read_stacks, summarise
from calibration.metrics import care
from calibration.optics import Optics, blur, psf
from calibration.simulate import Camera, beads, expose, nuclei
from engine.generators import build
from engine.generators.light import Light
from engine.package import SHIPPED, Package, load, read_golden
from engine.runtimes import Runtime
from engine.runtimes.openvino import OpenVino
from engine.scaling import Scaling, derive, to_network
from refocus.frame import Pixels

AIR_20X = Optics(na=0.75, immersion_index=1.0, wavelength_um=0.52, pixel_um=0.325)
OIL_100X = Optics(na=1.4, immersion_index=1.515, wavelength_um=0.52, pixel_um=0.1)
FULL_WELL_E = 30_000
"""What a pixel of an sCMOS camera holds: no single exposure has less noise."""


@pytest.fixture(scope="module")
def package() -> Package:
    return load(SHIPPED / "fluorescence")


@pytest.fixture(scope="module")
def network(package: Package) -> Light:
    network = build(package.manifest.architecture, package.manifest.arguments)
    network.load_state_dict(load_file(package.folder / "weights.safetensors"))
    return network.eval()


@pytest.fixture
def runtime(package: Package) -> Iterator[Runtime]:
    runtime = OpenVino(threads=1)
    yield runtime
    runtime.close()


def refocused(network: Light, pixels: Pixels, scaling: Scaling) -> np.ndarray:
    """PyTorch's float32 answer in counts, not rounded; sides are multiples of the stride."""
    with torch.inference_mode():
        answer = network(torch.from_numpy(to_network(pixels, scaling))[None, None])[0, 0]
    return answer.numpy() * scaling.scale + scaling.offset


def answered(network: Light, pixels: Pixels) -> np.ndarray:
    scaling = derive([pixels])
    assert scaling is not None
    return refocused(network, pixels, scaling)


def sharp_beads(seed: int, optics: Optics, peak_e: float) -> tuple[Pixels, np.ndarray]:
    """25 beads in focus as a camera sees them, and the light that fell on it."""
    rng = np.random.default_rng(seed)
    density = blur(beads(rng, (256, 256), count=25), psf(optics, 0.0))
    truth = (density / density.max() * peak_e + 0.01 * peak_e).astype(np.float32)
    return expose(rng, truth, Camera(gain_e_per_count=peak_e / 40_000)), truth


def relative_difference(got: np.ndarray, wanted: np.ndarray) -> float:
    """Largest difference over the range of the answer wanted."""
    return float(np.abs(got - wanted).max() / np.ptp(wanted))


def test_weights_master_and_golden_planes_belong_together(
    package: Package, network: Light, runtime: Runtime
) -> None:
    assert package.manifest.stride == network.stride
    assert package.manifest.halo_px == network.reach_px()
    assert 200_000 <= sum(p.numel() for p in network.parameters()) <= 1_000_000
    for golden in read_golden(package):
        counts = np.round(refocused(network, golden.pixels, golden.scaling))
        limits = np.iinfo(golden.pixels.dtype)
        counts = np.clip(counts, limits.min, limits.max)
        spread = np.ptp(golden.answer.astype(int))
        assert np.abs(counts - golden.answer).max() <= max(1, 1e-4 * spread)
        runtime.load(package, golden.pixels.shape)
        fast = runtime.refocus(golden.pixels, golden.scaling).pixels.astype(float)
        assert relative_difference(fast, golden.answer.astype(float)) < 0.03  # bfloat16


def test_every_training_file_is_named_and_is_what_the_manifest_says(
    package: Package, data: Path
) -> None:
    training = package.manifest.training
    assert len(training.files) > 400
    assert "refocus train" in training.command
    for file in training.files:
        assert file.path.startswith("in-focus/")
        assert file.licence
        digest = hashlib.sha256((data / file.path).read_bytes()).hexdigest()
        assert digest == file.sha256, file.path


def as_grey(picture: np.ndarray) -> Image.Image:
    return Image.fromarray((picture[..., :3].mean(-1) if picture.ndim == 3 else picture) * 1.0)


def thumbnail(picture: Image.Image) -> np.ndarray:
    """32 x 32 px as a vector of zero mean and length 1: a scalar product is a correlation."""
    values = np.asarray(picture.resize((32, 32), Image.Resampling.BOX), np.float64).ravel()
    values = values - values.mean()
    return values / max(float(np.linalg.norm(values)), 1e-9)


def test_it_was_trained_on_no_plane_that_it_is_tested_on(package: Package, data: Path) -> None:
    """Pixels are compared, not files: another format, size or exposure hides no copy."""
    pictures = [as_grey(iio.imread(data / f.path)) for f in package.manifest.training.files]
    planes = []
    for path in sorted(data.glob("through-focus/**/*.*")):
        stack = iio.imread(path) if path.suffix == ".png" else tifffile.imread(path)
        planes += [as_grey(plane) for plane in (stack if stack.ndim == 3 else [stack])]
    assert len(planes) > 200
    trained, tested = (np.array([thumbnail(p) for p in found]) for found in (pictures, planes))
    copies = [p.resize((p.width * 2 // 3, p.height * 2 // 3)) for p in pictures]
    control = (trained * np.array([thumbnail(p) for p in copies])).sum(1)
    assert control.min() > 0.95, "a copy of another size is found"
    alike = np.abs(trained @ tested.T)
    assert alike.max() < 0.8, package.manifest.training.files[int(alike.max(1).argmax())].path


def test_it_refocuses_real_fluorescence(package: Package, runtime: Runtime, data: Path) -> None:
    rows = list(evaluate(package, runtime, data, read_stacks(data)))
    summary = summarise(rows)
    assert summary.planes == 157
    assert summary.gain_db > 0.9
    assert summary.gain_over_blur_db > 0.6
    assert summary.cutoff_raised > 0
    assert summary.harmed_share <= 0.02
    assert summary.in_focus_psnr_db > 37


@pytest.mark.parametrize("seed", [0, 1, 2])
@pytest.mark.parametrize("optics", [AIR_20X, OIL_100X], ids=["20x", "100x"])
def test_sharp_sparse_nearly_noise_free_pictures_are_unharmed(
    network: Light, optics: Optics, seed: int
) -> None:
    """What networks trained on noise spoil first: single beads on black, a full well of light."""
    pixels, truth = sharp_beads(seed, optics, FULL_WELL_E)
    answer = answered(network, pixels)
    assert care(answer, truth).psnr_db > care(pixels, truth).psnr_db - 0.3


@pytest.mark.parametrize("seed", [0, 1, 2])
def test_without_any_noise_the_error_stays_below_what_a_camera_resolves(
    network: Light, seed: int
) -> None:
    """A million electrons, more than any exposure holds: at most 0.2 % of the range go wrong."""
    pixels, truth = sharp_beads(seed, AIR_20X, 1_000_000)
    assert care(answered(network, pixels), truth).nrmse < 0.002


def test_a_plane_out_of_focus_gains(network: Light) -> None:
    rng = np.random.default_rng(0)
    density = nuclei(rng, (256, 256))
    truth, seen = (1000 * blur(density, psf(AIR_20X, z)) + 50 for z in (0.0, 4.0))
    pixels = expose(rng, seen, Camera())
    answer = answered(network, pixels)
    assert care(answer, truth).psnr_db > care(pixels, truth).psnr_db + 2


def test_a_tile_with_its_halo_is_the_whole(package: Package, network: Light) -> None:
    rng = np.random.default_rng(0)
    halo, side = package.manifest.halo_px, 64
    full = 2 * halo + side + 64
    pixels = expose(rng, 800 * nuclei(rng, (full, full)) + 100, Camera())
    scaling = derive([pixels])
    assert scaling is not None
    whole = refocused(network, pixels, scaling)[halo + 32 : -halo - 32, halo + 32 : -halo - 32]
    tile = refocused(network, np.ascontiguousarray(pixels[32:-32, 32:-32]), scaling)
    assert relative_difference(tile[halo:-halo, halo:-halo], whole) <= 0.005


def test_four_times_the_exposure_and_an_offset_change_nothing_else(network: Light) -> None:
    rng = np.random.default_rng(0)
    pixels = expose(rng, 800 * nuclei(rng, (192, 192)) + 100, Camera())
    more = 4 * pixels + 300
    plain, brighter = (answered(network, plane) for plane in (pixels, more))
    assert relative_difference(4 * plain + 300, brighter) <= 0.005


@pytest.mark.parametrize("shape", [(521, 697), (2047, 1)])
def test_awkward_frames_work(package: Package, runtime: Runtime, shape: tuple[int, int]) -> None:
    rng = np.random.default_rng(0)
    pixels = expose(rng, 800 * nuclei(rng, shape) + 100, Camera())
    scaling = derive([pixels])
    assert scaling is not None
    runtime.load(package, shape)
    answer = runtime.refocus(pixels, scaling).pixels
    assert answer.shape == shape
    assert answer.dtype == np.uint16
