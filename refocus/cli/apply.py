"""`refocus apply`: refocus TIFF files that are already there."""

import argparse
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from engine.apply import Provenance


def register(subparsers: Any) -> None:
    """Describe the command."""
    parser: argparse.ArgumentParser = subparsers.add_parser(
        "apply",
        help="refocus TIFF files",
        description="Refocus TIFF files into a folder: same names, shapes, dtypes and metadata. "
        "What was computed, and how, stands in NAME.refocus.json beside each.",
    )
    parser.add_argument("inputs", nargs="+", type=Path, metavar="INPUT.tif")
    parser.add_argument("--out", required=True, type=Path, metavar="DIR", help="where to write")
    parser.add_argument(
        "--generator",
        default="current",
        metavar="NAME",
        help="current, one of `refocus models list`, or the folder of a model package "
        "(default: %(default)s)",
    )
    parser.add_argument(
        "--pixel-size-um",
        type=_positive,
        metavar="X",
        help="side of a pixel in the sample; default: what the file says",
    )
    parser.add_argument(
        "--engine",
        choices=("auto", "openvino", "tensorrt", "none"),
        default="auto",
        help="what computes (default: %(default)s)",
    )
    parser.set_defaults(run=run)


def run(arguments: argparse.Namespace) -> int:
    """Refocus every input; 1 where any could not be."""
    from engine.model_store import find
    from engine.package import load
    from engine.runtimes import open_runtime
    from refocus.errors import SettingsError

    try:
        arguments.out.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise SettingsError(
            f"--out {arguments.out}: no folder there, nor can one be made"
        ) from error
    package = load(find(arguments.generator))
    runtime = open_runtime(arguments.engine)
    try:
        print(f"computing with {package.manifest.name} on {runtime.name}", file=sys.stderr)
        bad = sum(not _refocus(source, arguments, package, runtime) for source in arguments.inputs)
    finally:
        runtime.close()
    if bad:
        print(f"{bad} of {len(arguments.inputs)} files not refocused", file=sys.stderr)
    return 1 if bad else 0


def _refocus(source: Path, arguments: argparse.Namespace, package: Any, runtime: Any) -> bool:
    from rich.console import Console
    from rich.progress import BarColumn, Progress, TextColumn, TimeRemainingColumn

    from engine.apply import refocus_file
    from refocus.errors import RefocusError, RejectedError

    columns = (TextColumn("{task.description}"), BarColumn(), TimeRemainingColumn())
    console = Console(stderr=True)
    try:
        disable = not console.is_terminal
        with Progress(*columns, console=console, transient=True, disable=disable) as bar:
            task = bar.add_task(source.name, total=None)
            done = refocus_file(
                source,
                arguments.out / source.name,
                package,
                runtime,
                pixel_size_um=arguments.pixel_size_um,
                progress=lambda px, total: bar.update(task, completed=px, total=total),
            )
    except RejectedError as reason:
        print(f"{source}: REJECTED: {reason}", file=sys.stderr)
    except RefocusError as reason:
        print(f"{source}: FAILED: {reason}", file=sys.stderr)
    except Exception as error:  # noqa: BLE001 - a damaged file can break a decoder in any way
        print(f"{source}: FAILED: {type(error).__name__}: {error}", file=sys.stderr)
    else:
        _report(source, done)
        return True
    return False


def _report(source: Path, done: "Provenance") -> None:
    clipped = f", {done.clipped_px} pixels clipped" if done.clipped_px else ""
    planes = "1 plane" if done.planes == 1 else f"{done.planes} planes"
    print(f"{source}: {planes} refocused{clipped}")
    for note in done.notes:
        print(f"{source}: {note}")


def _positive(text: str) -> float:
    value = float(text)
    if not 0 < value < float("inf"):
        raise argparse.ArgumentTypeError(f"wanted a length in um above 0, got {text}")
    return value
