"""`refocus train`, `evaluate` and `publish`: make a generator, measure it, pack it."""

import argparse
from pathlib import Path
from typing import TYPE_CHECKING, Any

from refocus.errors import SettingsError

if TYPE_CHECKING:
    from calibration.evaluate import Summary


def register(subparsers: Any) -> None:
    """Describe the commands."""
    train: argparse.ArgumentParser = subparsers.add_parser(
        "train",
        help="train a generator on simulated pairs",
        description="Train the fluorescence generator on pictures blurred by physics. Writes "
        "checkpoints and log.csv into OUT, and goes on from there with --resume.",
    )
    _add_data(train)
    train.add_argument("--out", required=True, type=Path, metavar="DIR", help="where to write")
    length = train.add_mutually_exclusive_group(required=True)
    length.add_argument("--minutes", type=float, metavar="N", help="train for N minutes")
    length.add_argument("--steps", type=int, metavar="N", help="train for N steps")
    length.add_argument("--resume", action="store_true", help="go on with the training in --out")
    # No defaults here: what is not given is what `calibration.train.Settings` says, and --resume
    # must see what was given.
    train.add_argument("--seed", type=int, metavar="N", help="of everything drawn (default: 0)")
    train.add_argument(
        "--threads",
        type=int,
        metavar="N",
        help="of a CPU; one is faster where others use the cores, too (default: 2)",
    )
    train.add_argument("--device", help="cpu or cuda (default: cpu)")
    train.add_argument("--batch", type=int, metavar="N", help="pairs a step (default: 16)")
    train.add_argument(
        "--objectives", type=int, metavar="N", help="drawn at random at the start (default: 1000)"
    )
    train.add_argument(
        "--specimens", type=int, metavar="N", help="simulated at the start (default: 300)"
    )
    train.set_defaults(run=run_train)

    evaluate: argparse.ArgumentParser = subparsers.add_parser(
        "evaluate",
        help="measure a generator on real through-focus stacks",
        description="Refocus every plane of the fluorescence stacks that DATA/manifest.json lists "
        "and hold it against the plane in focus, beside the best Gaussian blur.",
    )
    evaluate.add_argument(
        "package", metavar="PACKAGE", help="current, one of `refocus models list`, or its folder"
    )
    _add_data(evaluate)
    evaluate.add_argument("--every", type=int, default=1, metavar="K", help="only each K-th plane")
    evaluate.add_argument("--json", action="store_true", help="every plane and the means, as JSON")
    evaluate.set_defaults(run=run_evaluate)

    publish: argparse.ArgumentParser = subparsers.add_parser(
        "publish",
        help="make a model package of a finished training",
        description="Write weights, ONNX master, golden planes and a manifest with figures "
        "measured on the real stacks of DATA.",
    )
    publish.add_argument("training", type=Path, metavar="RUN", help="the --out of refocus train")
    _add_data(publish)
    publish.add_argument("--out", required=True, type=Path, metavar="DIR", help="the package")
    publish.add_argument("--name", default="fluorescence", help="default: %(default)s")
    publish.add_argument("--version", required=True, metavar="X", help="of this generator")
    publish.add_argument("--note", metavar="TEXT", help="what the training command does not say")
    publish.set_defaults(run=run_publish)


def run_train(arguments: argparse.Namespace) -> int:
    """Train to the end of the schedule."""
    from calibration.train import OPTIONS, Settings, resume, train

    given = {key: value for key in OPTIONS if (value := getattr(arguments, key)) is not None}
    if arguments.resume:
        if given:
            raise SettingsError(
                f"train: with --resume the settings in {arguments.out} rule; "
                f"leave out {', '.join(f'--{key}' for key in given)}"
            )
        checkpoint = resume(arguments.data, arguments.out)
    else:
        settings = Settings(minutes=arguments.minutes, steps=arguments.steps, **given)
        checkpoint = train(arguments.data, arguments.out, settings)
    print(f"trained: {checkpoint}")
    return 0


def run_evaluate(arguments: argparse.Namespace) -> int:
    """Print a line a stack and the means over fields."""
    import msgspec

    from calibration.evaluate import evaluate, read_stacks, summarise
    from engine.model_store import find
    from engine.package import load
    from engine.runtimes import open_runtime

    package = load(find(arguments.package))
    runtime = open_runtime("openvino")
    rows = []
    try:
        for stack in read_stacks(arguments.data):
            found = list(evaluate(package, runtime, arguments.data, [stack], arguments.every))
            rows += found
            if not arguments.json:
                _print(Path(stack.file).stem, summarise(found))
    finally:
        runtime.close()
    summary = summarise(rows)
    if arguments.json:
        text = msgspec.json.encode({"summary": summary, "planes": rows})
        print(msgspec.json.format(text, indent=1).decode())
    else:
        _print(f"mean of {summary.fields} fields", summary)
    return 0


def run_publish(arguments: argparse.Namespace) -> int:
    """Write the package and name it."""
    from calibration.publish import publish

    package = publish(
        arguments.training,
        arguments.data,
        arguments.out,
        arguments.name,
        arguments.version,
        arguments.note,
    )
    print(
        f"{package.folder}: {package.manifest.name} {package.manifest.version}, {package.hash[:12]}"
    )
    return 0


def _add_data(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--data",
        required=True,
        type=Path,
        metavar="DIR",
        help="the folder of in-focus/, through-focus/ and manifest.json (docs/data.md)",
    )


def _print(name: str, found: "Summary") -> None:
    print(
        f"{name:22} {found.planes:4} planes  gain {found.gain_db:+.2f} dB  "
        f"over the best blur {found.gain_over_blur_db:+.2f} dB  "
        f"FRC cut-off {found.cutoff_raised:+.4f}/px  harmed {found.harmed_share:.1%}  "
        f"in focus {found.in_focus_psnr_db:.1f} dB"
    )
