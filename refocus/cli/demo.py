"""`refocus demo`: the whole line on this computer, without a microscope, in about a minute."""

import argparse
import contextlib
import sys
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

from refocus.cli import options

if TYPE_CHECKING:
    from rich.progress import Progress

    from acquire.recorder import Recorder
    from acquire.sources.demo import DemoMicroscope
    from acquire.sources.demo_report import Summary
    from store.reader import Run

ENGINE_READY_S = 60.0
"""How long the demo waits for the engine before it starts without; a cold start takes seconds."""
REFRESH_S = 0.1


def register(subparsers: Any) -> None:
    """Describe the command."""
    parser: argparse.ArgumentParser = subparsers.add_parser(
        "demo",
        help="record and refocus a simulated specimen through a real Micro-Manager core",
        description="Start a headless Micro-Manager core and acquire a time-lapse of z-stacks "
        "through pycromanager; raw planes and their refocused twins land in an OME-Zarr run while "
        "it goes on. The pixels are a simulated specimen, whose truth is known, seen through a "
        "physical point spread function with photon and camera noise.",
    )
    parser.add_argument("--frames", type=int, default=120, help="how many (default: %(default)s)")
    parser.add_argument(
        "--size", type=int, default=512, help="side of a frame in pixels (default: %(default)s)"
    )
    parser.add_argument("--out", type=Path, metavar="DIR", help="the run (default runs/demo-TIME)")
    parser.add_argument(
        "--pixels",
        choices=("specimen", "camera"),
        default="specimen",
        help="a simulated specimen, or Micro-Manager's DemoCamera as it is (default: %(default)s)",
    )
    options.add_generator(parser)
    options.add_engine(parser)
    options.add_config(parser)
    parser.add_argument("--json", action="store_true", help="print the summary as one JSON object")
    parser.set_defaults(run=run)


def run(arguments: argparse.Namespace) -> int:
    """Run the demo; 0 when every frame landed."""
    from acquire.recorder import Recorder
    from acquire.sources import demo_report
    from acquire.sources.demo import CHANNELS
    from refocus.errors import RunError, SettingsError
    from store.reader import open_run

    settings = options.settings(arguments)
    out = arguments.out or Path("runs") / time.strftime("demo-%Y%m%d-%H%M%S")
    side = arguments.size
    failure: RunError | None = None
    if out.exists():  # said before the specimen is simulated, which takes seconds
        raise SettingsError(f"{out}: exists already; give a folder that does not")
    with _progress(arguments.json) as progress:
        microscope = _simulate(arguments, progress)
        events = microscope.events(arguments.frames)
        recorder = Recorder(settings, out=out, expected_shape=(side, side), events=events)
        try:
            _acquire(microscope, recorder, events, progress)
        except RunError as error:
            if not recorder.started:
                raise
            failure = error  # the summary first; main tells it
    status = recorder.status()
    finished = open_run(out)
    summary = demo_report.summarise(status, finished, microscope, list(CHANNELS))
    picture = _picture(finished, microscope, out / "preview.png")
    if arguments.json:
        print(demo_report.to_json(summary))
    else:
        _print(summary, finished, picture)
    if failure is not None:  # other trouble was told when it came
        raise failure
    if recorder.interrupted:
        raise RunError("stopped before its end; every frame that came until then is saved")
    return 0


def _simulate(arguments: argparse.Namespace, progress: "Progress") -> "DemoMicroscope":
    from acquire.sources.demo import DemoMicroscope

    task = progress.add_task("simulating the specimen", total=1.0, note="")
    microscope = DemoMicroscope(
        arguments.size,
        specimen=arguments.pixels == "specimen",
        progress=lambda share: progress.update(task, completed=share),
    )
    progress.remove_task(task)
    return microscope


def _picture(run: "Run", microscope: "DemoMicroscope", path: Path) -> Path | None:
    """The preview's file; None where there is nothing to show, or, told, no room for it."""
    from acquire.sources import demo_report

    try:
        return path if demo_report.preview(run, microscope, path) else None
    except OSError as error:  # what became of the run is told all the same
        print(f"refocus: no picture: {path}: {error.strerror or error}", file=sys.stderr)
        path.unlink(missing_ok=True)
        return None


def _acquire(
    microscope: "DemoMicroscope", recorder: "Recorder", events: list[Any], progress: "Progress"
) -> None:
    from acquire.sources import acquisition

    # The signals first: a Ctrl-C at any moment from here on ends in a closed run. What follows the
    # recorder goes around it, because leaving it refocuses what was skipped.
    with (
        acquisition.signals_set(recorder.stopping),
        microscope,
        _following(recorder, progress, len(events)),
        recorder,
    ):
        waiting = progress.add_task("starting the engine", total=None, note="")
        recorder.wait_for_engine(ENGINE_READY_S)
        progress.remove_task(waiting)
        hooks = recorder.hooks()
        hooks["image_process_fn"] = microscope.wrap(hooks["image_process_fn"])
        acquisition.run(events, hooks, stop=recorder.stopping)


@contextlib.contextmanager
def _following(recorder: "Recorder", progress: "Progress", total: int) -> Iterator[None]:
    """Shows the recorder's status until the run is closed."""
    task = progress.add_task("acquiring", total=total, note="", visible=False)
    done = threading.Event()

    def follow() -> None:
        while not done.wait(REFRESH_S):
            status = recorder.status() if recorder.started else None
            if status is None or not status.received:
                continue
            counts = status.counts
            note = f"saved {counts.saved}, refocused {counts.refocused}, skipped {counts.skipped}"
            acquired = status.received >= total
            what = "refocusing the skipped" if acquired and counts.skipped else "acquiring"
            progress.update(
                task, description=what, completed=status.received, note=note, visible=True
            )

    thread = threading.Thread(target=follow, name="demo-progress")
    thread.start()
    try:
        yield
    finally:
        done.set()
        thread.join()


def _progress(quiet: bool) -> "Progress":
    from rich.console import Console
    from rich.progress import BarColumn, Progress, TaskProgressColumn, TextColumn

    return Progress(
        TextColumn("{task.description:<23}"),
        BarColumn(bar_width=30),
        TaskProgressColumn(),
        TextColumn("{task.fields[note]}"),
        console=Console(stderr=True),
        disable=quiet,
        transient=True,
    )


def _print(summary: "Summary", run: "Run", picture: Path | None) -> None:
    from acquire.sources import demo_report

    print(f"run          {summary.run}")
    print(f"received     {summary.received} frames, {summary.fps:g} frames/s")
    print(f"saved        {summary.saved}")
    print(f"refocused    {summary.refocused}")
    for maker in demo_report.made_by(run):
        print(f"  by         {maker}")
    for reason, count in demo_report.why_not(run).most_common():
        print(f"  {count:>4} not    {reason}")
    if summary.skipped:
        print(f"             refocus fill {summary.run}  # does the rest")
    if summary.latency_ms is not None:
        p50, p95 = summary.latency_ms.p50, summary.latency_ms.p95
        print(
            f"latency      {p50:.0f} ms from hook to refocused on disk (95 % within {p95:.0f} ms)"
        )
    if summary.psnr_db is not None:
        raw, refocused = summary.psnr_db.raw, summary.psnr_db.refocused
        gain = refocused - raw
        print(f"PSNR         {raw:.1f} dB raw, {refocused:.1f} dB refocused ({gain:+.1f} dB)")
    if picture is not None:
        print(f"picture      {picture}")
