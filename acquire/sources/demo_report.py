"""What the demo says at its end: did every frame land, and is the refocused picture the truer one?

The specimen's truth is known exactly, so the gain is measured, not asserted: PSNR in CARE's way
(`calibration.metrics`) of the raw and of the refocused plane against the noise-free picture in
focus, over the planes that have a refocused twin.
"""

import random
from collections import Counter
from pathlib import Path

import msgspec
import numpy as np
import numpy.typing as npt
from PIL import Image, ImageDraw, ImageFont

from acquire.sources.demo import DemoMicroscope
from calibration import metrics
from refocus.frame import FrameHeader, RefocusOutcome
from refocus.status import Latency, Status
from store.reader import Run
from store.records import Kind

MOST_COMPARED = 60
"""Planes compared with the truth; a random choice of them where there are more."""
PANEL_PX = 300
MARGIN_PX = 8
CAPTION_PX = 26


class Psnr(msgspec.Struct, frozen=True):
    """Mean PSNR against the truth, dB."""

    raw: float
    refocused: float


class Summary(msgspec.Struct, frozen=True, kw_only=True):
    """`refocus demo --json`."""

    run: str
    received: int
    saved: int
    refocused: int
    skipped: int
    fps: float
    latency_ms: Latency | None
    psnr_db: Psnr | None
    size: int
    channels: list[str]


def summarise(status: Status, run: Run, microscope: DemoMicroscope, channels: list[str]) -> Summary:
    """Figures of a finished run, which is read back from disk as any reader would."""
    return Summary(
        run=status.run,
        received=status.received,
        saved=status.counts.saved,
        refocused=status.counts.refocused,
        skipped=status.counts.skipped,
        fps=round(status.fps, 2),
        latency_ms=status.latency_ms,
        psnr_db=compare(run, microscope),
        size=microscope.size_px,
        channels=channels,
    )


def to_json(summary: Summary) -> str:
    """One line of JSON."""
    return msgspec.json.encode(summary).decode()


def compare(run: Run, microscope: DemoMicroscope) -> Psnr | None:
    """PSNR before and after, of planes with a refocused twin; None where there is no truth."""
    headers = _refocused(run)
    if len(headers) > MOST_COMPARED:
        headers = random.Random(0).sample(headers, MOST_COMPARED)
    raw, refocused = [], []
    for header in headers:
        truth = microscope.truth_for(header)
        before, after = run.raw(header.seq), run.refocused(header.seq)
        if truth is None or before is None or after is None:
            continue
        raw.append(metrics.care_psnr(before, truth))
        refocused.append(metrics.care_psnr(after, truth))
    if not raw:
        return None
    return Psnr(raw=round(float(np.mean(raw)), 2), refocused=round(float(np.mean(refocused)), 2))


def why_not(run: Run) -> Counter[str]:
    """How many frames have no refocused twin, by outcome and reason."""
    return Counter(
        f"{RefocusOutcome(record.outcome).name.lower()}: {run.reason(record)}"
        for record in run.records(Kind.REFOCUS)
        if record.outcome != RefocusOutcome.REFOCUSED
    )


def made_by(run: Run) -> list[str]:
    """Generators and runtimes that worked on the run, in the order in which they came."""
    lines = sorted(run.notes.generators.values(), key=lambda line: line.number)
    return [f"{line.name} {line.version} on {line.runtime}" for line in lines]


def preview(run: Run, microscope: DemoMicroscope, path: Path) -> bool:
    """Writes raw | refocused | truth, a row for each channel; False where nothing can be shown."""
    rows = []
    for header in _one_a_channel(run):
        truth = microscope.truth_for(header)
        before, after = run.raw(header.seq), run.refocused(header.seq)
        if truth is not None and before is not None and after is not None:
            rows.append((header, [before, after, truth]))
    if not rows:
        return False
    width = 3 * PANEL_PX + 4 * MARGIN_PX
    height = len(rows) * (PANEL_PX + CAPTION_PX + MARGIN_PX) + MARGIN_PX
    canvas = Image.new("L", (width, height), 24)
    draw = ImageDraw.Draw(canvas)
    font = ImageFont.load_default(15)
    for row, (header, panels) in enumerate(rows):
        top = MARGIN_PX + row * (PANEL_PX + CAPTION_PX + MARGIN_PX)
        names = (
            f"raw, {header.channel}, {header.z_um or 0.0:+.2f} um from focus",
            "refocused (computed)",
            "truth: in focus, no noise",
        )
        low, high = np.percentile(panels[2], (0.5, 99.9))
        for column, (name, panel) in enumerate(zip(names, panels, strict=True)):
            left = MARGIN_PX + column * (PANEL_PX + MARGIN_PX)
            draw.text((left + 2, top + 3), name, fill=220, font=font)
            canvas.paste(_panel(panel, low, high), (left, top + CAPTION_PX))
    canvas.save(path)
    return True


def _panel(plane: npt.NDArray[np.generic], low: float, high: float) -> Image.Image:
    side = min(PANEL_PX, *plane.shape)
    y, x = ((length - side) // 2 for length in plane.shape)
    crop = plane[y : y + side, x : x + side].astype(np.float64)
    grey = (255 * np.clip((crop - low) / max(high - low, 1e-9), 0, 1)).astype(np.uint8)
    picture = Image.fromarray(grey)
    if side < PANEL_PX:
        picture = picture.resize((PANEL_PX, PANEL_PX), Image.Resampling.NEAREST)
    return picture


def _refocused(run: Run) -> list[FrameHeader]:
    """Headers of the frames with a refocused twin."""
    done = {r.seq for r in run.records(Kind.REFOCUS) if r.outcome == RefocusOutcome.REFOCUSED}
    return [entry.header for entry in run.frames() if entry.header and entry.seq in done]


def _one_a_channel(run: Run) -> list[FrameHeader]:
    """Of each channel the refocused plane that was farthest from focus, the latest of those."""
    best: dict[str, FrameHeader] = {}
    for header in _refocused(run):
        known = best.get(header.channel)
        if known is None or abs(header.z_um or 0.0) >= abs(known.z_um or 0.0):
            best[header.channel] = header
    return list(best.values())
