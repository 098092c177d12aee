"""Lines of the table of benchmarks/gpu.py, and the statistics behind them."""

import statistics
from collections.abc import Sequence
from typing import Literal

import msgspec

HEAD = "| what | figure | wanted | reached |\n|---|---|---|---|"


class Row(msgspec.Struct, frozen=True, kw_only=True):
    """One figure."""

    name: str
    value: float | None
    """None: it could not be measured; *note* says why."""
    unit: str = ""
    wanted: float | None = None
    """None: it is told, not judged."""
    sense: Literal["at least", "at most"] = "at least"
    note: str = ""

    @property
    def reached(self) -> bool | None:
        """None where nothing is wanted."""
        if self.wanted is None:
            return None
        if self.value is None:
            return False
        if self.sense == "at least":
            return self.value >= self.wanted
        return self.value <= self.wanted


def line_of(row: Row) -> str:
    """A row as Markdown."""
    figure = "not measured" if row.value is None else f"{_number(row.value)} {row.unit}".strip()
    name = f"{row.name} ({row.note})" if row.note else row.name
    if row.wanted is None:
        return f"| {name} | {figure} | | |"
    sign = "≥" if row.sense == "at least" else "≤"
    reached = "yes" if row.reached else "**no**"
    return f"| {name} | {figure} | {sign} {_number(row.wanted)} {row.unit} | {reached} |"


def growth(samples: Sequence[float]) -> float:
    """How much the last quarter of *samples* lies above the second one, medians both.

    The first quarter is for everything that is taken once. Below eight samples there is no telling.
    """
    if len(samples) < 8:
        raise ValueError(f"{len(samples)} samples tell no growth; wanted at least 8")
    quarter = len(samples) // 4
    return statistics.median(samples[-quarter:]) - statistics.median(samples[quarter : 2 * quarter])


def percentile(values: Sequence[float], share: float) -> float:
    """The smallest of *values* that *share* (0 to 1) of them do not exceed."""
    ordered = sorted(values)
    return ordered[max(0, -(-int(share * 10_000) * len(ordered) // 10_000) - 1)]


def _number(value: float) -> str:
    return f"{value:.0f}" if abs(value) >= 100 else f"{value:.3g}"
