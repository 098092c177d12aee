"""What a model package is: a generator with everything needed to run it, and nothing else.

A package is a folder of four plain files, never an archive, never a pickle:

    manifest.json        what the generator is, what it was trained on, where it may be used
    weights.safetensors  its weights, for further training
    generator.onnx       the float32 master that every runtime starts from:
                         one input (N, 1, H, W) in network range, one output of the same shape,
                         H and W multiples of the manifest's stride
    golden.npz           planes with their float32 answers, for tests of runtimes

The manifest holds the sha256 of the other three, so the sha256 of its own bytes names the whole
package: that is the hash which the provenance of every refocused plane carries. `load` checks all
of it before any byte is interpreted by anything else, and keeps the very bytes of the ONNX file
that it checked: runtimes compile those, so whatever happens to the file later, what runs is what
the hash names. An ONNX file whose weights lie in a further file is refused, the hash would not
cover them. A hash finds damage and mix-ups; it does not prove who made the package.

Packages are read where no network may be loaded (the recorder, the link), so this module needs only
numpy and msgspec.
"""

import hashlib
import io
import math
import os
import re
import shutil
import tempfile
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal, cast

import msgspec
import numpy as np

from engine import scaling
from refocus.errors import PackageError
from refocus.frame import FrameHeader, Pixels

FORMAT = 1
"""Version of the package format that this code reads and writes."""

MANIFEST = "manifest.json"
WEIGHTS = "weights.safetensors"
ONNX = "generator.onnx"
GOLDEN = "golden.npz"
FILES = (WEIGHTS, ONNX, GOLDEN)

SHIPPED = Path(__file__).parent / "models"

_NAME = re.compile(r"[0-9A-Za-z][0-9A-Za-z_.-]{0,63}")
_EXTERNAL = b"\x0a\x08location"
"""The key, in protobuf, under which an ONNX tensor names the file that holds its data."""
_PIECE_BYTES = 1 << 20


class TrainingFile(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """One file that the training saw."""

    path: str
    """Relative to the data folder."""
    sha256: str
    licence: str
    source: str
    """Where the file was published."""


class Training(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """How the weights came about."""

    command: str
    """Typed at the root of the repository, it reproduces the weights."""
    files: tuple[TrainingFile, ...]
    notes: dict[str, Any] = {}
    """Free: seed, steps, hours, hardware, versions."""


class Manifest(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """The first file of a package. Ranges are (lowest, highest), both included."""

    format: int = FORMAT
    name: str
    version: str
    architecture: str
    """Name of the network in engine/generators."""
    arguments: dict[str, Any] = {}
    """What the network is constructed with."""
    stride: int
    """Height and width of the network's input are multiples of it, in pixels."""
    halo_px: int | None
    """Radius of the receptive field, rounded up to the stride: tiles with this halo are exact.

    None: the generator looks at the whole plane, which cannot be cut into tiles.
    """
    scale: Literal[1] = 1
    """Pixels out per pixel in, along one side."""
    modality: Literal["fluorescence", "brightfield", "phase"]
    pixel_um: tuple[float, float]
    """Pixel sizes in the sample that the training covered."""
    defocus_um: tuple[float, float]
    """Distances from focus that the training covered."""
    defocus_dof: tuple[float, float]
    """The same in depths of field."""
    scaling: str = scaling.RULE
    """Name of the rule in engine/scaling.py that brings counts into network range."""
    training: Training
    metrics: dict[str, Any] = {}
    """Free: what was measured, on what."""
    created: str
    """ISO 8601, UTC."""
    files: dict[str, str] = {}
    """sha256 of every other file of the package; `write` fills it in."""

    def __post_init__(self) -> None:
        for key in ("name", "version"):  # both go into a TIFF tag, which is ASCII
            if not _NAME.fullmatch(text := getattr(self, key)):
                raise ValueError(f"{key} must match {_NAME.pattern}, got {text!r}")
        if self.stride < 1:
            raise ValueError(f"stride must be at least 1, got {self.stride}")
        if self.halo_px is not None and (self.halo_px < 0 or self.halo_px % self.stride):
            raise ValueError(
                f"halo_px must be null or a multiple of the stride {self.stride}, "
                f"got {self.halo_px}"
            )
        for key in ("pixel_um", "defocus_um", "defocus_dof"):
            lowest, highest = getattr(self, key)
            if not (math.isfinite(highest) and 0 <= lowest <= highest):
                raise ValueError(f"{key} must be [lowest, highest], got [{lowest}, {highest}]")


@dataclass(frozen=True, slots=True)
class Package:
    """A package whose files were found to be what its manifest says."""

    folder: Path
    manifest: Manifest
    hash: str
    """sha256 of manifest.json."""
    generator: bytes = field(repr=False)
    """The float32 master, an ONNX file, as it was when its hash was checked."""


@dataclass(frozen=True, slots=True)
class Golden:
    """A plane and what the float32 master makes of it; both (y, x), same dtype, camera counts."""

    pixels: Pixels
    scaling: scaling.Scaling
    answer: Pixels


class _FormatOnly(msgspec.Struct):
    format: int


def load(folder: Path) -> Package:
    """Checked package in *folder*. Raises PackageError where it is missing, altered or too new."""
    data = _read_manifest(folder)
    manifest = _decode(data, folder)
    if set(manifest.files) != set(FILES):
        raise PackageError(
            f"model package {folder}: {MANIFEST} must hash {', '.join(FILES)}, "
            f"it hashes {', '.join(sorted(manifest.files)) or 'nothing'}; get the package again"
        )
    generator = _read_verified(folder / ONNX, manifest.files[ONNX])
    for name in (WEIGHTS, GOLDEN):
        _read_verified(folder / name, manifest.files[name])
    _check_whole(generator, folder)
    return Package(folder, manifest, hashlib.sha256(data).hexdigest(), generator)


def write(folder: Path, manifest: Manifest, files: Mapping[str, bytes]) -> Package:
    """Write a new package at *folder* (it must not exist) and return it as `load` sees it.

    *files* maps each name in FILES to its content. The folder appears whole or not at all.
    """
    if set(files) != set(FILES):
        raise PackageError(f"a model package needs {', '.join(FILES)}, got {', '.join(files)}")
    if folder.exists():
        raise PackageError(f"model package {folder} exists; choose another folder or remove it")
    _check_whole(files[ONNX], folder)
    hashes = {name: hashlib.sha256(files[name]).hexdigest() for name in FILES}
    manifest = msgspec.structs.replace(manifest, files=hashes)
    text = msgspec.json.format(msgspec.json.encode(manifest), indent=2) + b"\n"
    folder.parent.mkdir(parents=True, exist_ok=True)
    unfinished = Path(tempfile.mkdtemp(prefix=f".{folder.name}-", dir=folder.parent))
    try:
        for name, content in {**files, MANIFEST: text}.items():
            _write_durably(unfinished / name, content)
        unfinished.chmod(0o755)  # mkdtemp makes it private
        unfinished.rename(folder)
    except BaseException:
        shutil.rmtree(unfinished, ignore_errors=True)
        raise
    return load(folder)


def unfit(manifest: Manifest, header: FrameHeader) -> str | None:
    """Why this frame must not be refocused by this generator, or None where it may be.

    An unknown pixel size is let through: who runs the generator says so once per run.
    """
    return unfit_pixels(manifest, header.dtype, header.pixel_um)


def unfit_pixels(manifest: Manifest, dtype: str, pixel_um: float | None) -> str | None:
    """`unfit` for pixels that no camera's header describes (files)."""
    if dtype not in ("uint8", "uint16"):
        return f"pixels are {dtype}; only uint8 and uint16 are refocused"
    lowest, highest = manifest.pixel_um
    if pixel_um is not None and not lowest <= pixel_um <= highest:
        return (
            f"pixel size {pixel_um:g} um is outside {lowest:g} to {highest:g} um, "
            f"the range of generator {manifest.name!r}"
        )
    return None


def encode_golden(planes: Sequence[Golden]) -> bytes:
    """Content of golden.npz: pixels_K, scaling_K = [offset, scale], answer_K for K = 0, 1, ..."""
    arrays: dict[str, Pixels] = {}
    for k, golden in enumerate(planes):
        arrays[f"pixels_{k}"] = golden.pixels
        arrays[f"scaling_{k}"] = np.array([golden.scaling.offset, golden.scaling.scale])
        arrays[f"answer_{k}"] = golden.answer
    buffer = io.BytesIO()
    np.savez_compressed(buffer, allow_pickle=False, **cast(Any, arrays))
    return buffer.getvalue()


def read_golden(package: Package) -> list[Golden]:
    """The package's golden planes, in order."""
    with np.load(package.folder / GOLDEN, allow_pickle=False) as arrays:
        return [
            Golden(
                pixels=arrays[f"pixels_{k}"],
                scaling=scaling.Scaling(*(float(v) for v in arrays[f"scaling_{k}"])),
                answer=arrays[f"answer_{k}"],
            )
            for k in range(len(arrays.files) // 3)
        ]


def _read_manifest(folder: Path) -> bytes:
    try:
        return (folder / MANIFEST).read_bytes()
    except OSError as error:
        raise PackageError(
            f"{folder} is no model package: wanted a readable {MANIFEST}, got {error.strerror}"
        ) from error


def _decode(data: bytes, folder: Path) -> Manifest:
    try:
        version = msgspec.json.decode(data, type=_FormatOnly).format
        if version > FORMAT:
            raise PackageError(
                f"model package {folder} has format {version}, this Refocus reads up to {FORMAT}: "
                "update it"
            )
        manifest = msgspec.json.decode(data, type=Manifest)
    except (ValueError, RecursionError) as error:  # msgspec's own are ValueErrors; text not UTF-8
        raise PackageError(
            f"model package {folder}: {MANIFEST} is damaged ({error}); get the package again"
        ) from error
    if manifest.scaling != scaling.RULE:
        raise PackageError(
            f"model package {folder} wants scaling {manifest.scaling!r}, this Refocus knows "
            f"{scaling.RULE!r}; use the Refocus that the package was made with"
        )
    return manifest


def _read_verified(path: Path, wanted: str) -> bytes:
    try:
        content = path.read_bytes()
    except OSError as error:
        raise PackageError(
            f"model package {path.parent}: {path.name} cannot be read ({error.strerror}); "
            "get the package again"
        ) from error
    got = hashlib.sha256(content).hexdigest()
    if got != wanted:
        raise PackageError(
            f"model package {path.parent}: {path.name} was altered: its sha256 is {got[:12]}…, "
            f"the manifest says {wanted[:12]}…; get the package again"
        )
    return content


def _check_whole(generator: bytes, folder: Path) -> None:
    # In pieces: a search holds the interpreter, and a recording may be under way beside it.
    starts = range(0, len(generator), _PIECE_BYTES)
    if any(generator.find(_EXTERNAL, k, k + _PIECE_BYTES + len(_EXTERNAL)) >= 0 for k in starts):
        raise PackageError(
            f"model package {folder}: {ONNX} keeps weights in another file, which the package's "
            "hash does not cover; export it again as one file, without external data"
        )


def _write_durably(path: Path, content: bytes) -> None:
    with path.open("xb") as file:
        file.write(content)
        file.flush()
        os.fsync(file.fileno())
