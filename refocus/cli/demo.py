"""`refocus demo`: the whole line on this computer, without a microscope, in about a minute."""

import argparse
import contextlib
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING

from refocus.cli import options

if TYPE_CHECKING:
    from acquire.recorder import Recorder
    from acquire.sources.demo_report import Summary

ENGINE_READY_S = 60.0
"""How long the demo waits for the engine before it starts without: a cold start takes seconds."""


def register(subparsers: "argparse._SubParsersAction[argparse.ArgumentParser]") -> None:
    """Adds the command."""
    parser = subparsers.add_parser(
        "demo",
        help="record and refocus a simulated specimen through a real Micro-Manager core",
        description=(
            "Starts a headless Micro-Manager core and acquires a time-lapse of z-stacks through "
            "pycromanager: raw planes and their refocused twins land in an OME-Zarr run while it "
            "goes on. The pixels are those of a simulated specimen, whose truth is known, seen "
            "through a physical point spread function with photon and camera noise."
        ),
    )
    parser.add_argument("--frames", type=int, default=120, help="frames to acquire (default 120)")
    parser.add_argument("--size", type=int, default=512, help="side of a frame in px (default 512)")
    parser.add_argument("--out", type=Path, help="folder of the run (default runs/demo-TIME)")
    parser.add_argument(
        "--pixels",
        choices=("specimen", "camera"),
        default="specimen",
        help="simulated specimen (default), or the pixels of Micro-Manager's DemoCamera",
    )
    options.add_generator(parser)
    options.add_engine(parser)
    options.add_config(parser)
    parser.add_argument("--json", action="store_true", help="print the summary as one JSON object")
    parser.set_defaults(run=run)


def run(arguments: argparse.Namespace) -> int:
    """Runs the demo; 0 when every frame landed."""
    import msgspec

    from acquire.recorder import Recorder
    from acquire.sources import acquisition, demo, demo_report
    from refocus.errors import RunError
    from store.reader import open_run

    settings = options.settings(arguments)
    out = arguments.out or Path("runs") / time.strftime("demo-%Y%m%d-%H%M%S")
    finding = ""
    with _bar(arguments.json) as bar:
        task = bar.add_task("simulating the specimen", total=1.0)
        microscope = demo.DemoMicroscope(
            arguments.size,
            specimen=arguments.pixels == "specimen",
            progress=lambda share: bar.update(task, completed=share),
        )
        bar.remove_task(task)
        shape = (arguments.size, arguments.size)
        recorder = Recorder(settings, out=out, expected_shape=shape)
        with microscope:
            try:
                with recorder:
                    _wait_for_engine(recorder, bar)
                    events = microscope.events(arguments.frames)
                    hooks = recorder.hooks()
                    hooks["image_process_fn"] = microscope.wrap(hooks["image_process_fn"])
                    with _following(recorder, bar, len(events)):
                        acquisition.run(events, hooks, stop=recorder.stopping)
            except RunError as error:
                finding = str(error)
            status = recorder.status()
            summary = demo_report.summarise(status, microscope, list(demo.CHANNELS))
            picture = out / "preview.png"
            shown = demo_report.preview(open_run(out), microscope, picture)
    if arguments.json:
        print(msgspec.json.encode(summary).decode())
    else:
        reasons = demo_report.why_not(open_run(out))
        _print(summary, reasons, picture if shown else None)
    for line in [*status.trouble, *([finding] if finding else [])]:
        print(f"refocus: {line}", file=sys.stderr)
    interrupted = recorder.stopping.is_set() and not finding
    if interrupted:
        print("refocus: stopped before its end; what came until then is saved", file=sys.stderr)
    return 1 if finding or interrupted else 0


def _bar(quiet: bool):  # type: ignore[no-untyped-def]
    from rich.console import Console
    from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn

    return Progress(
        TextColumn("{task.description:<24}"),
        BarColumn(),
        MofNCompleteColumn(),
        TextColumn("{task.fields[note]}"),
        console=Console(stderr=True),
        disable=quiet,
        transient=True,
    )
