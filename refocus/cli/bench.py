"""`refocus bench`: how fast this computer is, and how much of it Refocus leaves unused."""

import argparse
import sys
from pathlib import Path
from typing import Any

from refocus.cli import options
from refocus.errors import SettingsError

PARTS = ("hook", "raw", "worker", "latency")


def register(subparsers: Any) -> None:
    """Describe the command."""
    parser: argparse.ArgumentParser = subparsers.add_parser(
        "bench",
        help="measure this computer: hook, disk, engine, latency",
        description="Measure the live path on this computer. Rates are set beside a reference "
        "taken in the same run: plain pwrite of the same bytes, the bare network on the same "
        "cores; ratios are medians of interleaved rounds.",
    )
    parser.add_argument(
        "--only", choices=PARTS, action="append", help="this part (may be given several times)"
    )
    parser.add_argument(
        "--rounds", type=int, default=5, metavar="N", help="interleaved rounds (%(default)s)"
    )
    parser.add_argument(
        "--folder", type=Path, default=Path(), metavar="DIR", help="disk to measure (default: here)"
    )
    options.add_generator(parser)
    options.add_engine(parser)
    options.add_config(parser)
    parser.add_argument("--json", action="store_true", help="print a JSON list of figures")
    parser.set_defaults(run=run)


def run(arguments: argparse.Namespace) -> int:
    """Measure what was asked for, print the table."""
    import msgspec

    from refocus import bench

    settings = options.settings(arguments)
    if not arguments.folder.is_dir():
        raise SettingsError(f"--folder: no folder {arguments.folder}")
    if arguments.rounds < 1:
        raise SettingsError(f"--rounds must be at least 1, got {arguments.rounds}")
    parts = arguments.only or PARTS
    figures: list[bench.Figure] = []
    worker_fps = 0.0
    for part in PARTS:
        if part not in parts:
            continue
        print(f"measuring {part} ...", file=sys.stderr)
        match part:
            case "hook":
                figures += bench.hook_cost(arguments.folder)
            case "raw":
                figures += bench.raw_rate(arguments.folder, arguments.rounds)
            case "worker":
                figures += bench.worker_rate(arguments.folder, settings, arguments.rounds)
                worker_fps = figures[-1].value
            case "latency":
                figures += bench.latency(arguments.folder, settings, worker_fps)
    if arguments.json:
        print(msgspec.json.encode(figures).decode())
    else:
        _print(figures)
    return 0


def _print(figures: list[Any]) -> None:
    width = max(len(figure.name) for figure in figures)
    for figure in figures:
        line = f"{figure.name:<{width}}  {figure.value:10.3f} {figure.unit:<9}"
        if figure.ratio is not None:
            line += f"  {figure.ratio:6.2f} of {figure.reference:.1f} {figure.unit}"
        print(line.rstrip())
