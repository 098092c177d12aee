"""`refocus fill`: refocus what has no refocused twin yet in a run on disk.

Exit codes: 0 every raw plane has its twin or was rejected for good, 1 some failed or are left,
2 no run at this path or no such generator, 3 the disk is too full, 4 the run is being written,
130 stopped by Ctrl-C with planes left.
"""

import argparse
import json
import sys
import threading
from pathlib import Path
from typing import TYPE_CHECKING

from refocus.cli import options
from refocus.errors import DiskError, SettingsError
from refocus.words import counted

if TYPE_CHECKING:
    from acquire.fill import Filled


def register(subparsers: "argparse._SubParsersAction[argparse.ArgumentParser]") -> None:
    """Describe the command."""
    parser = subparsers.add_parser(
        "fill",
        help="refocus the planes of a run that have no refocused twin yet",
        description="Refocus every raw plane of a run that was skipped, lost or failed, with the "
        "run's own generator and scaling. It may be stopped or killed at any moment; the next "
        "call goes on with what is left.",
    )
    parser.add_argument("path", metavar="RUN", type=Path, help="the run's folder")
    parser.add_argument(
        "--generator",
        metavar="NAME",
        help="another generator than the run's own, also for planes that its own rejected: one "
        "that ships, or the folder of a model package",
    )
    options.add_engine(parser)
    options.add_config(parser)
    parser.add_argument("--json", action="store_true", help="print one JSON object, nothing else")
    parser.set_defaults(run=run)


def run(arguments: argparse.Namespace) -> int:
    """Fill the run; Ctrl-C ends it in order."""
    from acquire.fill import fill
    from acquire.sources.acquisition import signals_set
    from store.layout import is_run

    if not is_run(arguments.path):
        raise SettingsError(f"{arguments.path}: not a run; give the folder of one")
    stop = threading.Event()
    settings = options.settings(arguments)
    with _Bar(hidden=arguments.json) as bar, signals_set(stop):
        filled = fill(
            arguments.path, settings, generator=arguments.generator, stop=stop, progress=bar.show
        )
    print(_as_json(arguments.path, filled) if arguments.json else _summary(arguments.path, filled))
    if filled.full:
        raise DiskError(f"{arguments.path}: stopped: {filled.full}")
    if stop.is_set() and filled.left:
        return options.INTERRUPTED
    return 1 if filled.failed or filled.left else 0


class _Bar:
    """A progress bar on a terminal, nothing elsewhere."""

    def __init__(self, *, hidden: bool) -> None:
        from rich.console import Console
        from rich.progress import BarColumn, MofNCompleteColumn, Progress, TimeRemainingColumn

        self._progress = Progress(
            "refocusing",
            BarColumn(bar_width=30),
            MofNCompleteColumn(),
            TimeRemainingColumn(),
            console=Console(stderr=True),
            disable=hidden or not sys.stderr.isatty(),
            transient=True,
        )
        self._task = self._progress.add_task("", total=None)

    def __enter__(self) -> "_Bar":
        self._progress.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._progress.stop()

    def show(self, done: int, total: int) -> None:
        self._progress.update(self._task, completed=done, total=total)


def _as_json(path: Path, filled: "Filled") -> str:
    names = ("planes", "filled", "rejected", "failed", "left", "generator")
    return json.dumps({"run": str(path)} | {name: getattr(filled, name) for name in names})


def _summary(path: Path, filled: "Filled") -> str:
    if not filled.planes:
        nothing = f"{path}: nothing to fill, no plane is waiting to be refocused"
        return "\n".join([nothing, *(f"  note: {line}" for line in filled.trouble)])
    counts = (
        f"{filled.filled} of {counted(filled.planes, 'plane')} refocused with {filled.generator}"
    )
    lines = [f"{path}: {counts}"]
    others = {name: getattr(filled, name) for name in ("rejected", "failed", "left")}
    lines += [f"  {name:9} {count}" for name, count in others.items() if count]
    lines += [f"  {count:>9} x {reason}" for reason, count in filled.reasons.items() if reason]
    if filled.left:
        lines.append("  call again to go on with those left")
    return "\n".join(lines)
