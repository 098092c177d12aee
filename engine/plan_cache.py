"""Plans on disk: built once, found again, and never believed without proof.

A plan is executable code: whoever can exchange one runs what he likes in the worker. So every file
here is sealed (engine/sealed.py), and the seal is checked before a byte reaches TensorRT. A file
that was damaged, cut short, renamed, or made elsewhere is no plan, and is built anew.

The name of a plan is a hash of all that it was made from: ONNX file, recipes (of half.py and
plan.py), TensorRT's name and version, GPU, driver, profile. Another version or GPU thus simply
finds no plan, plans for several GPUs live beside each other in a home on a network, and what is
said before a build names the difference to the plan that comes nearest. What RTX built ahead for
any GPU serves every GPU that it was made for.

Two processes that build the same plan at once only work twice. All files together are bound to
MOST_BYTES: what was not used for longest goes first. Beside a plan lie the FP16 twin of the master
and RTX's cache of kernels compiled for the GPU (`Plan.jit_cache`), sealed alike.
"""

import contextlib
import hashlib
import os
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING

import msgspec
import platformdirs

from engine import plan
from engine.files import PARTIAL
from engine.package import Package
from engine.plan import Profile, Toolkit
from engine.sealed import read_sealed, write_sealed
from refocus.errors import SettingsError

if TYPE_CHECKING:
    from engine.gpu import Device

MOST_BYTES = 2 << 30
"""Of all files in the folder; a plan has 3 to 90 MB."""
SUFFIXES = (".plan", ".jit", ".onnx")
PARTIAL_S = 3600.0
"""A file that is not finished after so long belongs to nobody."""
WORKSPACE_BYTES_PER_PX = 1024
"""A network with 64 channels at full size wants 520 (ResNet-9, its normalisation in float32)."""


class _Label(msgspec.Struct, frozen=True):
    """All that a plan depends on, in words that can be shown."""

    onnx: str
    """sha256 of the float32 master."""
    recipe: str
    toolkit: str
    gpu: str
    driver: str
    profile: str


@dataclass(frozen=True, slots=True)
class Plan:
    """A plan that was built here."""

    data: bytes = field(repr=False)
    path: Path
    jit_cache: Path
    """For RTX's runtime cache; to be read and written by engine/sealed.py."""
    built_s: float
    """What building it took; 0 where it was there."""
    note: str
    """Why it was built, one line; empty where it was there."""


def ensure(
    package: Package,
    toolkit: Toolkit,
    device: "Device | None",
    profile: Profile,
    *,
    folder: Path | None = None,
    say: Callable[[str], None],
) -> Plan:
    """Plan of *package*'s generator for *device*: from the cache, else built now.

    *device* None builds ahead, for any GPU from Ampere on; only RTX can. The full TensorRT builds
    on the GPU whose context is current in this thread. *say* gets one line before a build: why.
    Raises PackageError and SettingsError as `engine.plan.build` does, SettingsError for a key that
    is not safe.
    """
    folder = folder or platformdirs.user_cache_path("refocus") / "plans"
    if toolkit.is_rtx and device is not None:
        plan.rtx_capability(toolkit, device.capability)
    if not toolkit.is_rtx and device is None:
        raise SettingsError(
            f"{toolkit.name} builds only on the GPU that is to run the plan, and there is none here"
        )
    labels = [_label(package, toolkit, device, profile)]
    if toolkit.is_rtx and device is not None and device.capability >= (8, 0):
        labels.append(_label(package, toolkit, None, profile))
    jit_cache = _path(folder, labels[0], "jit")  # also where the plan is for any GPU
    for label in labels:
        path = _path(folder, label, "plan")
        if (data := _find(path, label)) is not None:
            _touch(path, jit_cache)
            return Plan(data, path, jit_cache, built_s=0.0, note="")
    name = f"{package.manifest.name} {package.manifest.version}"
    note = f"{toolkit.name} builds a plan of {name} ({labels[0].profile}): {_why(folder, labels)}"
    say(note)
    started = time.monotonic()
    data = plan.build_from_half(
        toolkit,
        _half(folder, package),
        profile,
        workspace_bytes=workspace_bytes(profile, device),
        capability=None if device is None else device.capability,
    )
    built_s = time.monotonic() - started
    path = _path(folder, labels[0], "plan")
    try:
        write_sealed(path, msgspec.json.encode(labels[0]) + b"\n" + data)
        _prune(folder, keep=path)
    except OSError as error:
        say(f"the plan cannot be kept, so every start builds it again: {error}")
    return Plan(data, path, jit_cache, built_s, note)


def _label(package: Package, toolkit: Toolkit, device: "Device | None", profile: Profile) -> _Label:
    from engine import half  # needs onnx, which a machine without a GPU may lack

    gpu, driver = "any GPU from Ampere on", "any driver"
    if device is not None:
        capability = ".".join(map(str, device.capability))
        gpu, driver = f"{device.name} (compute capability {capability})", device.driver
    least, best, most = (f"{y} x {x}" for y, x in (profile.least, profile.best, profile.most))
    return _Label(
        onnx=hashlib.sha256(package.generator).hexdigest(),
        recipe=f"recipe {half.RECIPE}.{plan.RECIPE}",
        toolkit=toolkit.name,
        gpu=gpu,
        driver=driver,
        profile=f"frames of {least} to {most} px, best {best}",
    )


def _path(folder: Path, label: _Label, kind: str) -> Path:
    digest = hashlib.sha256(msgspec.json.encode(label)).hexdigest()
    return folder / f"{label.onnx[:16]}-{digest[:16]}.{kind}"


def _find(path: Path, label: _Label) -> bytes | None:
    head, _, data = (read_sealed(path) or b"").partition(b"\n")
    return data if head == msgspec.json.encode(label) else None


def _touch(*paths: Path) -> None:
    for path in paths:
        with contextlib.suppress(OSError):
            os.utime(path)


def _why(folder: Path, labels: list[_Label]) -> str:
    """Why there is no plan for any of *labels*: what the nearest one at hand is for instead."""
    if any(_path(folder, label, "plan").exists() for label in labels):
        return "the one at hand is damaged or was not made here"
    wanted = list(msgspec.structs.astuple(labels[0]))
    differences = []
    for path in folder.glob(f"{labels[0].onnx[:16]}-*.plan"):
        head = (read_sealed(path) or b"").partition(b"\n")[0]
        with contextlib.suppress(msgspec.DecodeError):  # not ours, or of another Refocus
            other = msgspec.structs.astuple(msgspec.json.decode(head, type=_Label))
            pairs = zip(other, wanted, strict=True)
            differences.append([(theirs, ours) for theirs, ours in pairs if theirs != ours])
    if not differences:
        return "there is none yet"
    theirs, ours = zip(*min(differences, key=len), strict=True)
    return f"there is one for {', '.join(theirs)}, and none yet for {', '.join(ours)}"


def _half(folder: Path, package: Package) -> bytes:
    """The FP16 twin of the package's master, kept beside its plans."""
    from engine import half

    onnx = hashlib.sha256(package.generator).hexdigest()
    path = folder / f"{onnx[:16]}-half{half.RECIPE}.onnx"
    head, _, twin = (read_sealed(path) or b"").partition(b"\n")
    if head != onnx.encode():
        twin = half.to_half(package.generator)
        with contextlib.suppress(OSError):  # `ensure` says so of the plan
            write_sealed(path, onnx.encode() + b"\n" + twin)
    return twin


def _prune(folder: Path, keep: Path) -> None:
    """Remove what was not used for longest until the folder holds MOST_BYTES, and what was left."""
    files = []
    for path in folder.iterdir():
        with contextlib.suppress(OSError):  # another process prunes, too
            status = path.stat()
            if path.suffix == PARTIAL and status.st_mtime < time.time() - PARTIAL_S:
                path.unlink()
            elif path.suffix in SUFFIXES and path != keep:
                files.append((status.st_mtime, status.st_size, path))
    room = MOST_BYTES - keep.stat().st_size
    for _, size, path in sorted(files, reverse=True):
        room -= size
        if room < 0:
            with contextlib.suppress(OSError):
                path.unlink()


def workspace_bytes(profile: Profile, device: "Device | None") -> int:
    """What a plan for *profile* may take on the GPU, at most three quarters of its memory."""
    wanted = max(1 << 30, WORKSPACE_BYTES_PER_PX * profile.most[0] * profile.most[1])
    return wanted if device is None else min(wanted, device.memory_bytes * 3 // 4)
