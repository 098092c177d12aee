"""Options that mean the same in every command."""

import argparse
import contextlib
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

import msgspec

from refocus import settings as all_settings
from refocus.errors import SettingsError
from refocus.settings import Settings

INTERRUPTED = 130
"""Exit code of a command that Ctrl-C ended."""
ENGINES = ("auto", "openvino", "tensorrt", "none")


def add_generator(parser: argparse.ArgumentParser) -> None:
    """--generator NAME."""
    parser.add_argument(
        "--generator",
        metavar="NAME",
        help="current, one of `refocus models list`, or the folder of a model package "
        "(default: settings)",
    )


def add_engine(parser: argparse.ArgumentParser) -> None:
    """--engine auto|openvino|tensorrt|none."""
    parser.add_argument(
        "--engine", choices=ENGINES, help="what runs the generator (default: settings, auto)"
    )


def add_config(parser: argparse.ArgumentParser) -> None:
    """--config FILE."""
    parser.add_argument("--config", type=Path, metavar="FILE", help="settings file to use")


def add_run(parser: argparse.ArgumentParser) -> None:
    """RUN, the folder of one; `run_at` checks it."""
    parser.add_argument("path", metavar="RUN", type=Path, help="the run's folder")


def add_json(parser: argparse.ArgumentParser) -> None:
    """--json."""
    parser.add_argument("--json", action="store_true", help="print JSON, nothing else")


def frame_size(text: str) -> tuple[int, int]:
    """(y, x) in pixels, of "2048x2048"."""
    y, separator, x = text.partition("x")
    if not (separator and y.isdigit() and x.isdigit() and int(y) and int(x)):
        raise argparse.ArgumentTypeError(f"wanted a size as 2048x2048, got {text!r}")
    return int(y), int(x)


def run_at(path: Path) -> Path:
    """*path*, where it is a run's folder. Raises SettingsError."""
    from store.layout import is_run

    if not is_run(path):
        raise SettingsError(f"{path}: not a run (it has no folder journal); give a run's folder")
    return path


@contextlib.contextmanager
def planes_bar(doing: str, *, hidden: bool = False) -> Iterator[Callable[[int, int], None]]:
    """A function for (done, total) planes, which shows a bar where errors go to a terminal."""
    from rich.console import Console
    from rich.progress import BarColumn, MofNCompleteColumn, Progress, TimeRemainingColumn

    with Progress(
        "{task.description}",
        BarColumn(bar_width=30),
        MofNCompleteColumn(),
        TimeRemainingColumn(),
        console=Console(stderr=True),
        transient=True,
        disable=hidden or not sys.stderr.isatty(),
    ) as bar:
        task = bar.add_task(doing, total=None)
        yield lambda done, total: bar.update(task, completed=done, total=total)


def settings(arguments: argparse.Namespace) -> Settings:
    """Settings from the files, with what the command line says instead.

    Raises SettingsError for a runtime that was asked for by name and does not work here.
    """
    read = all_settings.load(arguments.config)
    engine = read.engine
    if arguments.engine is not None:
        engine = msgspec.structs.replace(engine, runtime=arguments.engine)
    if arguments.generator is not None:
        engine = msgspec.structs.replace(engine, generator=arguments.generator)
    if engine.runtime not in ("auto", "none"):
        from engine import doctor

        # In a process of its own: this one may be about to record.
        for device in engine.devices if engine.runtime == "tensorrt" else (0,):
            doctor.require(engine.runtime, device)
    return msgspec.structs.replace(read, engine=engine)
