"""What a run or the daemon is doing, as one frozen record that everything else only renders.

The recorder builds it, the command line prints it; no second place counts anything.
"""

from collections.abc import Sequence

import msgspec
import numpy as np


class Latency(msgspec.Struct, frozen=True, kw_only=True):
    """From the hook to the refocused plane on disk, in ms."""

    p50: float
    p95: float
    p99: float


class Counts(msgspec.Struct, frozen=True, kw_only=True):
    """Frames of a run by the last record of each, so that they add up."""

    saved: int = 0
    failed: int = 0
    refocused: int = 0
    skipped: int = 0
    late: int = 0
    lost: int = 0
    rejected: int = 0
    refocus_failed: int = 0

    @property
    def received(self) -> int:
        """Frames with a raw outcome."""
        return self.saved + self.failed

    @property
    def unanswered(self) -> int:
        """Frames without a refocus outcome; none in a run that was closed in order."""
        answered = self.refocused + self.skipped + self.late + self.lost
        return self.received - answered - self.rejected - self.refocus_failed


class Status(msgspec.Struct, frozen=True, kw_only=True):
    """A run at one moment."""

    run: str
    state: str
    received: int
    """Frames that the hook got; those beyond counts.received are on their way to the disk."""
    counts: Counts
    expected: int | None = None
    """Frames submitted to Micro-Manager; None where nothing counts them."""
    fps: float = 0.0
    latency_ms: Latency | None = None
    raw_queue_mib: float = 0.0
    raw_queue_high_mib: float = 0.0
    workers: int = 0
    generator: str = ""
    runtime: str = ""
    trouble: list[str] = []


def latency(samples_ns: Sequence[int]) -> Latency | None:
    """Percentiles of hook-to-disk times; None without a sample."""
    if not samples_ns:
        return None
    p50, p95, p99 = (float(v) / 1e6 for v in np.percentile(samples_ns, (50, 95, 99)))
    return Latency(p50=p50, p95=p95, p99=p99)
