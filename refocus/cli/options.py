"""Options that mean the same in every command."""

import argparse
from pathlib import Path

import msgspec

from refocus import settings as all_settings
from refocus.settings import Settings

INTERRUPTED = 130
"""Exit code of a command that Ctrl-C ended."""
ENGINES = ("auto", "openvino", "tensorrt", "none")


def add_generator(parser: argparse.ArgumentParser) -> None:
    """--generator NAME."""
    parser.add_argument(
        "--generator",
        metavar="NAME",
        help="a shipped generator or the folder of a model package (default: settings)",
    )


def add_engine(parser: argparse.ArgumentParser) -> None:
    """--engine auto|openvino|tensorrt|none."""
    parser.add_argument(
        "--engine", choices=ENGINES, help="what runs the generator (default: settings, auto)"
    )


def add_config(parser: argparse.ArgumentParser) -> None:
    """--config FILE."""
    parser.add_argument("--config", type=Path, metavar="FILE", help="settings file to use")


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
        from engine.runtimes import open_runtime

        open_runtime(engine.runtime).close()  # an explicit choice that cannot be had ends here
    return msgspec.structs.replace(read, engine=engine)
