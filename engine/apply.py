"""Refocusing TIFF files: the same name, shape, dtype and metadata out, whatever the size.

Small planes are refocused whole. Larger ones are read, refocused and written in bands of rows, each
cut into tiles with exact halo (engine/tiles.py): 30,000² RGB stays under 1 GiB. A generator that
looks at the whole plane has no such halo: with it, larger planes are rejected.

One scaling per channel holds for the whole file, derived from samples all over it before the first
plane is refocused: a stack does not flicker, tiles do not show.

An answer of a network is no measurement, so every file says that it was computed: in the Software
tag of every plane, and with all particulars in NAME.refocus.json beside it. The other tags that
describe the picture (OME-XML, ImageJ's and Micro-Manager's metadata, resolution, ...) are carried
over byte for byte.

A file appears whole or not at all, and never in place of another.
"""

import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path

import msgspec
import numpy as np

from engine.checks import check_plane
from engine.package import Package, unfit_pixels
from engine.runtimes import Runtime
from engine.scaling import Sample, Scaling, derive_from, take_sample
from engine.tiff_reader import Key, Layer, layers, open_tiff, pixel_um, read_blocks, read_rows
from engine.tiff_writer import WHOLE_PX, open_writer, tile_shape, write_layer
from engine.tiles import Span, spans
from refocus.errors import RejectedError, SettingsError
from refocus.frame import Pixels

CORE_PX = 2048
"""Side of a tile without its halo."""
BAND_BYTES = 256 << 20
"""Two bands of rows, one read and one refocused, fit into this."""
SAMPLED_LAYERS = 16
SAMPLED_BLOCKS = 64
"""A channel's scaling is derived from at most so many of its planes, and blocks of pixels."""

Progress = Callable[[int, int], None]
"""Called with pixels done and pixels in all."""


class ChannelScaling(msgspec.Struct, frozen=True, kw_only=True):
    """Scaling of a channel, or of one of its samples; None: flat, copied as it is."""

    channel: int
    sample: int
    scaling: Scaling | None


class Provenance(msgspec.Struct, frozen=True, kw_only=True):
    """What NAME.refocus.json says."""

    computed: bool = True
    source: str
    """Name of the file that was refocused."""
    refocus: str
    generator: str
    generator_version: str
    generator_sha256: str
    runtime: str
    pixel_um: float | None
    planes: int
    scalings: list[ChannelScaling]
    clipped_px: int
    """Pixels cut to a limit of the dtype; of layers in tiles, those in two halos count twice."""
    notes: list[str]


def refocus_file(
    source: Path,
    target: Path,
    package: Package,
    runtime: Runtime,
    *,
    pixel_size_um: float | None = None,
    progress: Progress = lambda done, total: None,
) -> Provenance:
    """Refocus the TIFF file *source* into *target*, which must not exist; say what was done.

    *pixel_size_um* overrides what the file says of its pixels. Raises RejectedError with the reason
    where the file is not one to refocus, EngineError where the runtime fails, and what tifffile
    raises where the file is damaged; then nothing is left behind.
    """
    sidecar = target.with_name(f"{target.name}.refocus.json")
    for path in (target, sidecar):
        if path.exists():
            raise SettingsError(f"{path} exists and stays; choose another --out, or move it away")
    unfinished = target.with_name(f".{target.name}.part")
    try:
        provenance = _refocus(source, unfinished, package, runtime, pixel_size_um, progress)
        sidecar.write_bytes(msgspec.json.format(msgspec.json.encode(provenance), indent=2))
        unfinished.rename(target)
    except BaseException:
        for path in (unfinished, sidecar):
            path.unlink(missing_ok=True)
        raise
    return provenance


def _refocus(
    source: Path,
    target: Path,
    package: Package,
    runtime: Runtime,
    pixel_size_um: float | None,
    progress: Progress,
) -> Provenance:
    with open_tiff(source) as tif:
        found, notes = layers(tif)
        size_um = pixel_size_um or pixel_um(tif)
        _check_fit(package, found, size_um, notes)
        scalings = _scalings(found)
        notes += _flat(scalings)
        total_px = sum(_work_px(layer, scalings) for layer in found)
        job = _Job(package, runtime, scalings, progress, total_px)
        label = (
            f"Refocus {version('refocus')}; computed image, refocused by generator "
            f"{package.manifest.name} {package.manifest.version} ({package.hash})"
        )
        with open_writer(target, tif, found) as writer:
            for layer in found:
                write_layer(writer, layer, _bands(layer, job), label)
    return Provenance(
        source=source.name,
        refocus=version("refocus"),
        generator=package.manifest.name,
        generator_version=package.manifest.version,
        generator_sha256=package.hash,
        runtime=runtime.name,
        pixel_um=size_um,
        planes=len(found),
        scalings=[
            ChannelScaling(channel=channel, sample=sample, scaling=scaling)
            for (channel, sample), scaling in sorted(scalings.items())
        ],
        clipped_px=job.clipped_px,
        notes=notes,
    )


@dataclass
class _Job:
    """One file on its way."""

    package: Package
    runtime: Runtime
    scalings: dict[Key, Scaling | None]
    progress: Progress
    total_px: int
    done_px: int = 0
    clipped_px: int = 0

    def refocus(self, pixels: Pixels, scaling: Scaling) -> Pixels:
        """A plane or a tile of one, (y, x)."""
        self.runtime.load(self.package, (pixels.shape[0], pixels.shape[1]))
        answer = self.runtime.refocus(pixels, scaling)
        check_plane(pixels, answer.pixels)
        self.clipped_px += answer.clipped
        return answer.pixels

    def advance(self, px: int) -> None:
        self.done_px += px
        self.progress(self.done_px, self.total_px)


def _work_px(layer: Layer, scalings: dict[Key, Scaling | None]) -> int:
    """Pixels of *layer* that will be refocused."""
    keys = [layer.key(sample) for sample in range(layer.separate * layer.interleaved)]
    moving = [key for key in keys if key is not None and scalings[key] is not None]
    return layer.height * layer.width * len(moving)


def _check_fit(
    package: Package, found: list[Layer], size_um: float | None, notes: list[str]
) -> None:
    for layer in found:
        if reason := unfit_pixels(package.manifest, str(layer.dtype), size_um):
            raise RejectedError(reason)
        if package.manifest.halo_px is None and layer.height * layer.width > WHOLE_PX:
            raise RejectedError(
                f"a plane of {layer.width} x {layer.height} px is too large to be refocused whole "
                f"(limit {WHOLE_PX / 1e6:.0f} megapixels), and generator "
                f"{package.manifest.name!r} cannot work in tiles, because its answer depends on "
                "the whole plane: choose another generator, or cut the picture"
            )
    if size_um is None:
        lowest, highest = package.manifest.pixel_um
        notes.append(
            f"pixel size unknown, the generator is for {lowest:g} to {highest:g} um: "
            "give --pixel-size-um to have it checked"
        )


def _scalings(found: list[Layer]) -> dict[Key, Scaling | None]:
    """One scaling per key, from blocks of pixels all over the planes that share it."""
    sharing: dict[Key, list[tuple[Layer, int]]] = {}
    for layer in found:
        for sample in range(layer.separate * layer.interleaved):
            if (key := layer.key(sample)) is not None:
                sharing.setdefault(key, []).append((layer, sample))
    return {key: derive_from(_samples(places)) for key, places in sharing.items()}


def _flat(scalings: dict[Key, Scaling | None]) -> list[str]:
    return [
        f"channel {channel}, sample {sample} holds one level wherever it was looked at: "
        "copied as it is"
        for (channel, sample), scaling in scalings.items()
        if scaling is None
    ]


def _samples(places: list[tuple[Layer, int]]) -> list[Sample]:
    count = min(len(places), SAMPLED_LAYERS)
    chosen = [places[index] for index in np.linspace(0, len(places) - 1, count).astype(int)]
    samples: list[Sample] = []
    for layer, number in chosen:
        separate = number if layer.separate > 1 else 0
        interleaved = number if layer.interleaved > 1 else 0
        for block in read_blocks(layer, SAMPLED_BLOCKS // count, separate):
            samples.append(take_sample(block[..., interleaved]))
            del block  # or it would live on while the next is decoded
    return samples


def _bands(layer: Layer, job: _Job) -> Iterator[Pixels]:
    """The refocused layer, top to bottom in bands (rows, x, interleaved).

    Separate samples come one after the other. But for the last, bands end where tiles do.
    """
    stride = job.package.manifest.stride
    halo = job.package.manifest.halo_px or 0  # None: this layer is whole, _check_fit saw to it
    core_y, core_x = _core(layer, stride, halo)
    columns = spans(layer.width, core_x, halo, stride)
    for sample in range(layer.separate):
        for rows in spans(layer.height, core_y, halo, stride):
            yield _band(layer, sample, rows, columns, job)


def _band(layer: Layer, sample: int, rows: Span, columns: list[Span], job: _Job) -> Pixels:
    raw = read_rows(layer, rows.read_start, rows.read_stop, sample)
    band = raw[rows.start - rows.read_start : rows.stop - rows.read_start].copy()
    for k in range(layer.interleaved):
        key = layer.key(sample + k)
        scaling = job.scalings[key] if key else None
        if scaling is None:
            continue
        for tile in columns:
            answer = job.refocus(raw[:, tile.read_start : tile.read_stop, k], scaling)
            band[:, tile.start : tile.stop, k] = _inner(answer, rows, tile)
            job.advance((tile.stop - tile.start) * band.shape[0])
    return band


def _inner(answer: Pixels, rows: Span, columns: Span) -> Pixels:
    """The part of a tile's answer without its halo."""
    return answer[
        rows.start - rows.read_start : rows.stop - rows.read_start,
        columns.start - columns.read_start : columns.stop - columns.read_start,
    ]


def _core(layer: Layer, stride: int, halo: int) -> tuple[int, int]:
    """Rows and columns of the tiles to compute, without their halo."""
    if layer.height * layer.width <= WHOLE_PX:
        return layer.height, layer.width
    tile = tile_shape(layer)
    step = math.lcm(stride, tile[0] if tile else 1)
    row_bytes = layer.width * layer.interleaved * layer.dtype.itemsize
    affordable = (BAND_BYTES // row_bytes - 2 * halo) // 2
    return max(1, min(affordable, CORE_PX) // step) * step, -(-CORE_PX // stride) * stride
