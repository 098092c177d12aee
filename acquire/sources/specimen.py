"""The demo's specimen: cells that really go out of focus when the stage moves.

A monolayer of cells with three stains (nuclei, stress fibres, mitochondria), spread over three
layers in depth. It repeats in x and y, so every stage position shows cells and a move of the stage
shows other ones; the same seed gives the same specimen.

A plane is what a 20x/0.75 objective makes of it: each layer convolved with the point spread
function of its own distance from focus (`calibration.optics`), plus background light, on an sCMOS
camera. The blur is rendered once, on a grid in z, before the run starts; a frame then costs an
interpolation between two rendered planes and its noise (3 ms at 512²), so that the demo
loads the machine like a camera, not like a simulation.

Noise is Gaussian with the variance of Poisson plus read noise: with 12 photons of background in
every pixel the skewness that this drops is below 0.3 in the darkest pixel, and numpy draws it ten
times as fast as Poisson numbers.
"""

import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
from scipy import fft, ndimage

from calibration.optics import Aberrations, Image, Optics, psf
from refocus.errors import SettingsError

PIXEL_UM = 0.325
NA = 0.75
OBJECTIVE = Aberrations(spherical=0.06, astigmatism_0=0.03)
"""Small and not zero: an objective that is as good as its maker promises."""

OFFSET_COUNTS = 100.0
PHOTONS_PER_COUNT = 0.46
READ_NOISE_PHOTONS = 1.6
BACKGROUND_PHOTONS = 12.0

LAYERS_UM = (-0.625, 0.0, 0.625)
GRID_STEP_UM = 0.625
"""Of the rendered planes, two thirds of a depth of field; equal to the distance of the layers, so
that neighbouring planes share their point spread functions."""
FIELD_SHARE = 1.5
"""Side of the repeating field over the side of a frame: two positions share a quarter at most."""
CELL_PITCH_UM = 28.0

Points = tuple[npt.NDArray[np.float64], npt.NDArray[np.float64], npt.NDArray[np.float64]]
"""y, x in pixels and the light of each point."""


@dataclass(frozen=True, slots=True)
class Stain:
    """A dye, and how bright its brightest structures are in focus (photons per pixel)."""

    emission_um: float
    photons: float


STAINS = {
    "DAPI": Stain(emission_um=0.460, photons=420.0),
    "FITC": Stain(emission_um=0.525, photons=300.0),
    "TRITC": Stain(emission_um=0.605, photons=240.0),
}
"""Micro-Manager's channel presets of demo.cfg: nuclei, stress fibres, mitochondria."""


@dataclass(frozen=True, slots=True)
class _Cell:
    y: float
    x: float
    angle: float
    """Of its long axis and its fibres, radians."""


class Specimen:
    """A field of cells and the pictures that the demo's objective and camera make of it."""

    def __init__(
        self,
        size_px: int,
        *,
        seed: int = 0,
        z_range_um: float = 2.5,
        progress: Callable[[float], None] | None = None,
    ) -> None:
        """Render all planes: 0.4 s and 65 MB at 512², in proportion to the area.

        *size_px* is the side of a frame, *z_range_um* how far from focus planes are rendered;
        farther away the outermost one is shown. *progress* is called with the share done, 0 to 1.
        """
        if size_px < 32:
            raise SettingsError(f"demo: size must be at least 32 pixels, got {size_px}")
        self._size_px = size_px
        self._seed = seed
        self._side_px = fft.next_fast_len(round(FIELD_SHARE * size_px), real=True)
        steps = math.ceil(z_range_um / GRID_STEP_UM)
        self._first_z_um = -steps * GRID_STEP_UM
        self._planes: dict[str, list[Image]] = {}
        count = 2 * steps + 1
        for done, (channel, stain) in enumerate(STAINS.items()):
            planes: list[Image] = []
            for plane in self._render(channel, stain, count):
                planes.append(plane)
                if progress is not None:
                    progress((done + len(planes) / count) / len(STAINS))
            self._planes[channel] = _exposed(planes, stain)

    def image(
        self, channel: str, z_um: float, x_um: float, y_um: float, frame_index: int
    ) -> npt.NDArray[np.uint16]:
        """One exposure in camera counts (size_px, size_px).

        *z_um* is the distance of the stage from focus, *x_um* and *y_um* are its position, rounded
        to whole pixels. *frame_index* chooses the noise.
        """
        photons = self._expected(channel, z_um, x_um, y_um)
        random = np.random.Generator(np.random.SFC64([self._seed, frame_index]))
        counts = random.standard_normal(photons.shape, dtype=np.float32)
        counts *= np.sqrt(photons + np.float32(READ_NOISE_PHOTONS**2))
        counts += photons
        counts *= np.float32(1 / PHOTONS_PER_COUNT)
        counts += np.float32(OFFSET_COUNTS + 0.5)  # + 0.5: the cast below cuts off
        np.clip(counts, 0, 65_535, out=counts)
        return counts.astype(np.uint16)

    def truth(self, channel: str, x_um: float, y_um: float) -> Image:
        """The noise-free picture in focus at that stage position: counts, (size_px, size_px)."""
        photons = self._expected(channel, 0.0, x_um, y_um)
        return OFFSET_COUNTS + photons / np.float32(PHOTONS_PER_COUNT)

    def _expected(self, channel: str, z_um: float, x_um: float, y_um: float) -> Image:
        """Mean photons per pixel of a frame, float32."""
        planes = self._planes[channel]
        place = min(max((z_um - self._first_z_um) / GRID_STEP_UM, 0.0), len(planes) - 1.0)
        below = min(int(place), len(planes) - 2)
        weight = place - below
        rows = np.arange(self._size_px) + round(y_um / PIXEL_UM)
        columns = np.arange(self._size_px) + round(x_um / PIXEL_UM)

        def window(plane: Image) -> Image:
            return plane.take(rows, axis=0, mode="wrap").take(columns, axis=1, mode="wrap")

        if weight in (0.0, 1.0):
            return window(planes[below + int(weight)])
        between = window(planes[below])
        between += np.float32(weight) * (window(planes[below + 1]) - between)
        return between

    def _render(self, channel: str, stain: Stain, count: int) -> Iterator[Image]:
        """The planes of one channel from the lowest z up, each (side, side), in any unit."""
        optics = Optics(
            na=NA, immersion_index=1.0, wavelength_um=stain.emission_um, pixel_um=PIXEL_UM
        )
        spectra = [fft.rfft2(layer) for layer in _draw(channel, self._side_px, self._seed)]
        reach = len(LAYERS_UM) // 2
        transfer = {
            step: self._transfer(optics, self._first_z_um + step * GRID_STEP_UM)
            for step in range(-reach, reach)
        }
        for step in range(count):
            newest = step + reach
            transfer[newest] = self._transfer(optics, self._first_z_um + newest * GRID_STEP_UM)
            picture = np.zeros_like(spectra[0])
            for place, spectrum in enumerate(spectra, start=-reach):
                # The layer at depth d is z - d from focus when the stage is z from it.
                picture += spectrum * transfer[step - place]
            yield fft.irfft2(picture, (self._side_px, self._side_px))
            del transfer[step - reach]

    def _transfer(self, optics: Optics, z_um: float) -> npt.NDArray[np.complex64]:
        """Optical transfer function at *z_um* on the field's own (periodic) grid."""
        kernel = psf(optics, z_um, OBJECTIVE)
        half = kernel.shape[0] // 2
        field = np.zeros((self._side_px, self._side_px), np.float32)
        place = np.arange(-half, half + 1) % self._side_px
        np.add.at(field, (place[:, None], place[None, :]), kernel)
        spectrum: npt.NDArray[np.complex64] = fft.rfft2(field)
        return spectrum


def _exposed(planes: list[Image], stain: Stain) -> list[Image]:
    """*planes* in photons per pixel: as bright as the stain in focus, with background light."""
    bright = np.percentile(planes[len(planes) // 2], 99.5)
    for plane in planes:
        plane *= np.float32(stain.photons / bright)
        plane += np.float32(BACKGROUND_PHOTONS)
        # FFT rounding leaves tiny negative values where there is no light.
        np.maximum(plane, np.float32(BACKGROUND_PHOTONS), out=plane)
    return planes


def _draw(channel: str, side_px: int, seed: int) -> list[Image]:
    """Where the light of a stain comes from: one picture (side, side) a layer."""
    cells = _cells(side_px, np.random.default_rng([seed, 0]))
    random = np.random.default_rng([seed, 1 + list(STAINS).index(channel)])
    if channel == "DAPI":
        return _nuclei(cells, side_px, random)
    strands = _fibres if channel == "FITC" else _mitochondria
    pieces = [piece for cell in cells for piece in strands(cell, random)]
    # Most of a cell's fibres and mitochondria lie in one layer, some above and below it.
    layer = random.choice(len(LAYERS_UM), size=len(pieces), p=(0.2, 0.6, 0.2))
    return [
        _splat([piece for piece, own in zip(pieces, layer, strict=True) if own == index], side_px)
        for index in range(len(LAYERS_UM))
    ]


def _cells(side_px: int, random: np.random.Generator) -> list[_Cell]:
    """Cells on a shaken square lattice: near each other and hardly overlapping."""
    across = max(1, round(side_px * PIXEL_UM / CELL_PITCH_UM))
    pitch = side_px / across
    shift = random.uniform(-0.28, 0.28, (across, across, 2))
    angle = random.normal(0.6, 0.5, (across, across))
    return [
        _Cell(
            y=(row + 0.5 + shift[row, column, 0]) * pitch,
            x=(column + 0.5 + shift[row, column, 1]) * pitch,
            angle=angle[row, column],
        )
        for row in range(across)
        for column in range(across)
    ]


def _nuclei(cells: list[_Cell], side_px: int, random: np.random.Generator) -> list[Image]:
    """Filled, dented ellipses with chromatin texture and dark nucleoli; domes over the layers."""
    layers = [np.zeros((side_px, side_px), np.float32) for _ in LAYERS_UM]
    half = min(side_px // 2, round(10.0 / PIXEL_UM))
    y, x = np.mgrid[-half:half, -half:half].astype(np.float32)
    theta = np.arctan2(y, x)
    for cell in cells:
        long_px = random.uniform(6.0, 8.5) / PIXEL_UM
        wide_px = long_px * random.uniform(0.65, 0.95)
        along = (x * math.cos(cell.angle) + y * math.sin(cell.angle)) / long_px
        across = (y * math.cos(cell.angle) - x * math.sin(cell.angle)) / wide_px
        dents = 1 + sum(
            0.05 * np.cos(n * theta + random.uniform(0, 2 * math.pi)) for n in (2, 3, 4)
        )
        radius = np.hypot(along, across) / dents
        chromatin = ndimage.gaussian_filter(random.standard_normal(x.shape), 0.8 / PIXEL_UM)
        light = random.uniform(0.5, 1.0) * (1 + 0.25 * chromatin / chromatin.std())
        for _ in range(random.integers(2, 5)):
            spot_y, spot_x = random.uniform(-0.5, 0.5, 2) * wide_px
            distance_px = np.hypot(y - spot_y, x - spot_x)
            light = light * (1 - 0.5 * np.exp(-((distance_px * PIXEL_UM / 1.1) ** 2)))
        rows = (np.arange(-half, half) + round(cell.y)) % side_px
        columns = (np.arange(-half, half) + round(cell.x)) % side_px
        for layer, depth_um in zip(layers, LAYERS_UM, strict=True):
            dome = 1 - 0.1 * abs(depth_um) / LAYERS_UM[-1]
            edge = np.clip((dome - radius) * wide_px + 0.5, 0, 1)  # one pixel wide
            layer[np.ix_(rows, columns)] += (np.maximum(light, 0) * edge).astype(np.float32)
    return layers


def _fibres(cell: _Cell, random: np.random.Generator) -> list[Points]:
    """Stress fibres: long, nearly parallel to the cell's axis, slightly bent."""
    pieces = []
    for _ in range(random.integers(12, 20)):
        length_px = random.uniform(14.0, 34.0) / PIXEL_UM
        along = np.arange(-length_px / 2, length_px / 2, 0.25)
        angle = cell.angle + random.normal(0, 0.12)
        bend = random.normal(0, 0.12) * along**2 / length_px
        side = random.normal(0, 5.5) / PIXEL_UM
        y = cell.y + along * math.sin(angle) + (bend + side) * math.cos(angle)
        x = cell.x + along * math.cos(angle) - (bend + side) * math.sin(angle)
        ends = np.clip(4 * (0.5 - np.abs(along) / length_px), 0, 1)
        pieces.append((y, x, random.lognormal(0, 0.4) * ends))
    return pieces


def _mitochondria(cell: _Cell, random: np.random.Generator) -> list[Points]:
    """Short winding tubes, half a micrometre thick, around the nucleus."""
    pieces = []
    for _ in range(random.integers(35, 55)):
        steps = round(random.uniform(2.0, 7.0) / PIXEL_UM / 0.1)
        heading = random.uniform(0, 2 * math.pi) + np.cumsum(random.normal(0, 0.06, steps))
        distance_px = random.uniform(6.5, 15.0) / PIXEL_UM
        around = random.uniform(0, 2 * math.pi)
        thick_px = random.normal(0, 0.18 / PIXEL_UM, (2, steps))
        y = cell.y + distance_px * math.sin(around) + 0.1 * np.cumsum(np.sin(heading)) + thick_px[0]
        x = cell.x + distance_px * math.cos(around) + 0.1 * np.cumsum(np.cos(heading)) + thick_px[1]
        pieces.append((y, x, np.full(steps, random.lognormal(0, 0.3))))
    return pieces


def _splat(pieces: list[Points], side_px: int) -> Image:
    """Add points to a periodic picture (side, side), each shared among its four pixels."""
    light = np.zeros(side_px * side_px)
    if pieces:
        y, x, weight = (np.concatenate(column) for column in zip(*pieces, strict=True))
        row, column = np.floor(y).astype(np.int64), np.floor(x).astype(np.int64)
        for down in (0, 1):
            for right in (0, 1):
                share = np.abs(1 - down - (y - row)) * np.abs(1 - right - (x - column))
                pixel = (row + down) % side_px * side_px + (column + right) % side_px
                light += np.bincount(pixel, weight * share, minlength=light.size)
    return light.reshape(side_px, side_px).astype(np.float32)
