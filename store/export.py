"""Copies of a run for programs that do not open OME-Zarr 0.5: OME-TIFF, or OME-Zarr 0.4.

The run is only read, in any state; a live one as it was when the export began. What is copied is
held against the journal's checksums on the way. The copy appears under its final name when it is
whole; until then it is a hidden folder beside it, which goes away where the export fails.
"""

import errno
import glob
import re
import secrets
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Literal

import msgspec

from refocus.errors import DiskError, RunError, SettingsError
from store.export_images import ExportImage, Slot, What, images
from store.export_tiff import Compression, write_tiff
from store.export_zarr import write_zarr
from store.reader import Run, State, open_run

Target = Literal["ome-tiff", "ome-zarr-0.4"]
Progress = Callable[[int, int], None]
"""Called with (planes done, planes in all)."""


class Exported(msgspec.Struct, frozen=True, kw_only=True):
    """One image of an export."""

    path: str
    """Of its file or group."""
    image: What
    shape: tuple[int, int, int, int, int]
    """(t, c, z, y, x)"""
    planes: int
    """Copied, and equal to what the journal acknowledged."""
    absent: tuple[Slot, ...]
    """(t, c, z) of planes that the run does not have: zeros."""
    damaged: tuple[Slot, ...]
    """(t, c, z) of planes that could not be read: zeros."""


class Export(msgspec.Struct, frozen=True, kw_only=True):
    """What `export` made."""

    out: str
    format: Target
    images: tuple[Exported, ...]
    damage: tuple[str, ...]
    """Why planes could not be read, one line each."""
    notes: tuple[str, ...]
    """What is worth knowing and is not wrong."""


def export(
    path: Path,
    out: Path,
    target: Target,
    *,
    what: tuple[What, ...] = ("raw", "refocused"),
    compression: Compression = "none",
    progress: Progress = lambda _done, _total: None,
) -> Export:
    """Copy the run at *path* to the new folder *out*; a damaged plane is left out and said.

    Raises SettingsError for an *out* that cannot be, RunError where there is nothing to copy or it
    cannot be written, or where the metadata of an array are damaged: not a plane of it could be
    had, though all may be there. DiskError where it does not fit.
    """
    _check_out(path, out, target)
    run = open_run(path)
    found = images(run, what)
    if not found:
        raise RunError(f"{path}: has no {' or '.join(what)} plane to export")
    _require_arrays(run, found)
    partial = out.with_name(f".{out.name}.{secrets.token_hex(4)}.partial")
    try:
        out.parent.mkdir(parents=True, exist_ok=True)
        _require_room(out.parent, found)
        partial.mkdir()
        try:
            places = _write(found, partial, target, compression, progress)
            _require_new(out)
            partial.rename(out)
        finally:
            shutil.rmtree(partial, ignore_errors=True)
    except OSError as error:
        kind = DiskError if error.errno == errno.ENOSPC else RunError
        raise kind(f"{out}: not exported ({error}); nothing is left there") from error
    return Export(
        out=str(out),
        format=target,
        images=tuple(_told(image, out / place) for image, place in zip(found, places, strict=True)),
        damage=tuple(reason for image in found for reason in image.damaged.values()),
        notes=tuple(_notes(run, what, found, out)),
    )


def _check_out(path: Path, out: Path, target: Target) -> None:
    _require_new(out)
    if out.resolve().is_relative_to(path.resolve()):
        raise SettingsError(f"{out}: lies inside the run; give a folder outside of {path}")
    if target == "ome-zarr-0.4" and out.suffix != ".zarr":
        raise SettingsError(
            f"{out}: Bio-Formats knows an OME-Zarr by its name alone; "
            "give one that ends in .zarr, such as NAME.ome.zarr"
        )


def _require_arrays(run: Run, found: list[ExportImage]) -> None:
    for image in found:
        try:
            run.array(image.number)
        except RunError as error:
            raise RunError(f"{error}; run `refocus recover`, then export again") from error


def _require_new(out: Path) -> None:
    if out.exists():
        raise SettingsError(f"{out}: exists already; give a folder that does not")


def _require_room(folder: Path, found: list[ExportImage]) -> None:
    """Raises DiskError where not even the planes, uncompressed, would fit. Zeros are cheap."""
    needed = sum(len(image.present) * image.plane_bytes for image in found)
    free = shutil.disk_usage(folder).free
    if free < needed:
        raise DiskError(
            f"{folder}: the export needs {needed >> 20} MiB, {free >> 20} MiB are free; "
            "make room, or export elsewhere"
        )


def _write(
    found: list[ExportImage],
    folder: Path,
    target: Target,
    compression: Compression,
    progress: Progress,
) -> list[str]:
    """Write all images; returns the file or group of each, below *folder*."""
    total = sum(len(image.slots) for image in found)
    done = 0

    def tell() -> None:
        nonlocal done
        done += 1
        progress(done, total)

    if target == "ome-zarr-0.4":
        write_zarr(found, folder, compression, tell)
        return [str(number) for number in range(len(found))]
    alone = len({image.pair.pair for image in found}) == 1
    names = [_file_name(image, alone=alone) for image in found]
    for image, name in zip(found, names, strict=True):
        write_tiff(image, folder / name, compression, tell)
    return names


def _file_name(image: ExportImage, *, alone: bool) -> str:
    """RUN_raw.ome.tif, or with number and name of the pair where the run has several."""
    parts = [image.run.path.resolve().name]
    if not alone:
        parts.append(str(image.pair.pair))
    parts += [re.sub(r"[^\w.=-]+", "-", image.pair.name).strip("-")[:80], image.what]
    return "_".join(part for part in parts if part) + ".ome.tif"


def _told(image: ExportImage, path: Path) -> Exported:
    return Exported(
        path=str(path),
        image=image.what,
        shape=image.shape,
        planes=len(image.present) - len(image.damaged),
        absent=tuple(image.absent),
        damaged=tuple(sorted(image.damaged)),
    )


def _notes(run: Run, what: tuple[What, ...], found: list[ExportImage], out: Path) -> Iterator[str]:
    if run.state == State.LIVE:
        yield "the run is live: what came after the export began is not in it"
    elif run.state == State.INCOMPLETE:
        yield "the run is incomplete: frames are missing, or its writer ended without closing it"
    for kind in what:
        if not any(image.what == kind for image in found):
            yield f"the run has no {kind} plane; no {kind} image is in the export"
    if any(image.pair.pixel_um is None for image in found):
        yield "the pixel size is unknown; the export has none"
    for left in sorted(out.parent.glob(f".{glob.escape(out.name)}.*.partial")):
        yield f"{left}: left by an export that was killed; delete it"
