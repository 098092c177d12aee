"""Measure a model package on real through-focus stacks, as it ships: through a runtime, in counts.

Every plane out of focus is refocused and held against the stack's in-focus plane, which is real and
therefore noisy. So every figure stands beside two others: the input as it is, and the best Gaussian
blur, its width chosen with the truth, because denoising alone earns decibels. What no blur can
raise is the frequency up to which answer and truth agree (`metrics.frc_cutoff`). The in-focus plane
is refocused too and held against itself: what is sharp must come back as it was.

PSNR is CARE's, with a ceiling (`metrics.care_psnr`). Means are over fields of view, the stacks of
one field (its channels) averaged first, so that a stack of many planes does not outvote another
field.

    refocus evaluate fluorescence --data DATA
"""

import statistics
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path

import msgspec
import numpy as np
import tifffile
from scipy import ndimage

from calibration.metrics import care_psnr, frc_cutoff
from engine.package import Package
from engine.runtimes import Runtime
from engine.scaling import derive
from refocus.errors import SettingsError
from refocus.frame import Pixels

HARM_DB = -0.3
"""A plane that loses more than this counts as harmed."""

BLUR_SIGMAS_PX = (0.5, 0.75, 1.0, 1.5, 2.0, 3.0, 4.5)
"""Widths tried for the best blur; not to blur at all is among the choices, too."""

FLUORESCENCE = "fl"
"""Prefix of the kinds of stack in the data's manifest.json that a fluorescence generator is for."""


class Stack(msgspec.Struct, frozen=True):
    """A through-focus stack as the data's manifest.json lists it; it says more than we need."""

    file: str
    field: str
    kind: str
    z: list[float]
    """Offset of every plane from focus."""
    infocus_plane: int


class Row(msgspec.Struct, frozen=True, kw_only=True):
    """One plane. PSNR in dB, cut-off frequencies in cycles/px."""

    stack: str
    field: str
    plane: int
    z: float
    is_in_focus: bool
    psnr_input_db: float
    """The ceiling for the in-focus plane, which is its own truth."""
    psnr_blur_db: float
    psnr_refocused_db: float
    cutoff_input: float
    cutoff_refocused: float


class Summary(msgspec.Struct, frozen=True, kw_only=True):
    """Means over fields; see the module's text."""

    fields: int
    planes: int
    gain_db: float
    """Over the input as it is."""
    gain_over_blur_db: float
    """Over the best Gaussian blur chosen with the truth."""
    cutoff_raised: float
    """Rise of the frequency where answer and truth part, in cycles/px."""
    harmed_share: float
    in_focus_psnr_db: float


def read_stacks(data: Path, kind: str = FLUORESCENCE) -> list[Stack]:
    """The stacks in *data*/manifest.json whose kind begins with *kind*; at least one.

    Raises SettingsError where the list cannot be read or holds none.
    """
    path = data / "manifest.json"
    try:
        stacks = msgspec.json.decode(path.read_bytes(), type=list[Stack])
    except (OSError, msgspec.DecodeError) as error:
        raise SettingsError(
            f"{path}: no list of stacks can be read from it ({error}); "
            "point --data at the folder that holds manifest.json"
        ) from error
    found = [stack for stack in stacks if stack.kind.startswith(kind)]
    if not found:
        raise SettingsError(
            f"{path}: none of its {len(stacks)} stacks is of a kind {kind!r}; "
            "point --data at a folder that has some"
        )
    return found


def evaluate(
    package: Package, runtime: Runtime, data: Path, stacks: Sequence[Stack], every: int = 1
) -> Iterator[Row]:
    """Rows of *stacks* (files below *data*), plane by plane; only every *every*-th out of focus.

    The scaling of a stack comes from its first plane, as it would in a run. Raises SettingsError
    for a stack that cannot be read or is not what the list says.
    """
    if every < 1:
        raise SettingsError(f"evaluate: --every must be at least 1, got {every}")
    for stack in stacks:
        planes = _read(data, stack)
        scaling = derive([planes[0]])
        if scaling is None:
            raise SettingsError(f"{data / stack.file}: its first plane is flat; leave it out")
        truth = planes[stack.infocus_plane]
        runtime.load(package, truth.shape)
        others = [k for k in range(len(planes)) if k != stack.infocus_plane][::every]
        for k in sorted([*others, stack.infocus_plane]):
            answer = runtime.refocus(planes[k], scaling).pixels
            yield _row(stack, k, planes[k], answer, truth)


def summarise(rows: Sequence[Row]) -> Summary:
    """Means over fields, the stacks of a field averaged first.

    Wants a plane in focus and one out of it, or raises SettingsError.
    """
    defocused = [row for row in rows if not row.is_in_focus]
    sharp = [row for row in rows if row.is_in_focus]
    if not defocused or not sharp:
        raise SettingsError(
            f"evaluate: got {len(sharp)} planes in focus and {len(defocused)} out of it, "
            "wanted one of each or more; leave out stacks of a single plane"
        )
    return Summary(
        fields=len({row.field for row in rows}),
        planes=len(defocused),
        gain_db=_field_mean(defocused, lambda r: r.psnr_refocused_db - r.psnr_input_db),
        gain_over_blur_db=_field_mean(defocused, lambda r: r.psnr_refocused_db - r.psnr_blur_db),
        cutoff_raised=_field_mean(defocused, lambda r: r.cutoff_refocused - r.cutoff_input),
        harmed_share=statistics.fmean(
            r.psnr_refocused_db - r.psnr_input_db < HARM_DB for r in defocused
        ),
        in_focus_psnr_db=_field_mean(sharp, lambda r: r.psnr_refocused_db),
    )


def _read(data: Path, stack: Stack) -> Pixels:
    """Planes (z, y, x) of *stack*."""
    path = data / stack.file
    try:
        planes: Pixels = tifffile.imread(path)
    except (OSError, tifffile.TiffFileError) as error:
        raise SettingsError(
            f"{path}: the stack cannot be read ({error}); "
            "fetch it (docs/data.md) or take it off manifest.json"
        ) from error
    if planes.ndim != 3 or not 0 <= stack.infocus_plane < len(planes) == len(stack.z):
        raise SettingsError(
            f"{path}: its shape is {planes.shape}, manifest.json lists {len(stack.z)} planes, "
            f"number {stack.infocus_plane} of them in focus; correct manifest.json"
        )
    return planes


def _row(stack: Stack, plane: int, pixels: Pixels, answer: Pixels, truth: Pixels) -> Row:
    is_in_focus = plane == stack.infocus_plane
    before = care_psnr(pixels, truth)
    blurred = [ndimage.gaussian_filter(pixels.astype(np.float64), s) for s in BLUR_SIGMAS_PX]
    return Row(
        stack=Path(stack.file).stem,
        field=stack.field,
        plane=plane,
        z=stack.z[plane],
        is_in_focus=is_in_focus,
        psnr_input_db=before,
        psnr_blur_db=max(before, *(care_psnr(b, truth) for b in blurred)),
        psnr_refocused_db=care_psnr(answer, truth),
        cutoff_input=frc_cutoff(pixels, truth),
        cutoff_refocused=frc_cutoff(answer, truth),
    )


def _field_mean(rows: Sequence[Row], value: Callable[[Row], float]) -> float:
    stacks: dict[tuple[str, str], list[float]] = {}
    for row in rows:
        stacks.setdefault((row.field, row.stack), []).append(value(row))
    fields: dict[str, list[float]] = {}
    for (field, _), values in stacks.items():
        fields.setdefault(field, []).append(statistics.fmean(values))
    return statistics.fmean(statistics.fmean(means) for means in fields.values())
