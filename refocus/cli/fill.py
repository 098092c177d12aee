"""`refocus fill`: refocus what has no refocused twin yet in a run on disk.

Exit codes: 0 every raw plane has its twin or was rejected for good, 1 some failed or are left,
2 no run at this path or no such generator, 3 the disk is too full, 4 the run is being written,
130 stopped by Ctrl-C with planes left.
"""

import argparse
import json
import threading
from pathlib import Path
from typing import TYPE_CHECKING

from refocus.cli import options
from refocus.errors import DiskError
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
    options.add_run(parser)
    parser.add_argument(
        "--generator",
        metavar="NAME",
        help="another generator than the run's own, also for planes that its own rejected: "
        "current, one of `refocus models list`, or the folder of a model package",
    )
    options.add_engine(parser)
    options.add_config(parser)
    options.add_json(parser)
    parser.set_defaults(run=run)


def run(arguments: argparse.Namespace) -> int:
    """Fill the run; Ctrl-C ends it in order."""
    from acquire.fill import fill
    from acquire.sources.acquisition import signals_set

    options.run_at(arguments.path)
    stop = threading.Event()
    settings = options.settings(arguments)
    with (
        options.planes_bar("refocusing", hidden=arguments.json) as progress,
        signals_set(stop),
    ):
        filled = fill(
            arguments.path, settings, generator=arguments.generator, stop=stop, progress=progress
        )
    print(_as_json(arguments.path, filled) if arguments.json else _summary(arguments.path, filled))
    if filled.full:
        raise DiskError(f"{arguments.path}: stopped: {filled.full}")
    if stop.is_set() and filled.left:
        return options.INTERRUPTED
    return 1 if filled.failed or filled.left else 0


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
