"""`refocus build`: TensorRT plans made ahead, so that no recording waits for one.

A plan that is not there is built when a worker starts, which takes seconds (TensorRT for RTX) or
minutes (TensorRT). This does it before. With a GPU the plan is also loaded and proven
(engine/gate.py) and its kernels are compiled; without one, TensorRT for RTX builds for later.
"""

import argparse
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

import msgspec

from refocus import settings
from refocus.cli import options

if TYPE_CHECKING:
    from engine.gpu import Device
    from engine.package import Package
    from engine.plan import Profile, Toolkit

LATER = "any GPU from Ampere on (compute capability 8.0 or higher: RTX 30, RTX A and later)"


class Built(msgspec.Struct, frozen=True, kw_only=True):
    """One plan, as `--json` prints it."""

    generator: str
    toolkit: str
    gpu: str
    """Empty: built ahead, without a GPU."""
    least: tuple[int, int]
    most: tuple[int, int]
    """Smallest and largest frame (y, x) in pixels."""
    built_s: float
    """0: it was there."""
    mib: float
    path: str


def register(subparsers: Any) -> None:
    """Describe the command."""
    parser: argparse.ArgumentParser = subparsers.add_parser(
        "build",
        help="build a generator's TensorRT plans ahead of the first frame",
        description="Build TensorRT plans ahead, and say how long it took and where they lie. "
        "Plans are used on this computer alone: they are sealed with a key that stays here.",
    )
    options.add_generator(parser)
    options.add_config(parser)
    parser.add_argument(
        "--shape",
        type=options.frame_size,
        action="append",
        metavar="YxX",
        help="frame size in pixels (default 2048x2048; may be given several times)",
    )
    parser.add_argument(
        "--toolkit",
        choices=("tensorrt", "tensorrt_rtx"),
        help="which TensorRT, where both are installed (default: as a worker takes it)",
    )
    options.add_json(parser)
    parser.set_defaults(run=run)


def run(arguments: argparse.Namespace) -> int:
    """Build what is not there for each GPU of the settings and each size, print a line each."""
    from engine import model_store, package
    from engine.plan import open_toolkit, profile_for

    engine = settings.load(arguments.config).engine
    toolkit = open_toolkit(arguments.toolkit)
    loaded = package.load(model_store.find(arguments.generator or engine.generator))
    shapes = {
        profile_for(shape, loaded.manifest.stride): shape
        for shape in arguments.shape or [(2048, 2048)]
    }
    built = []
    for index in engine.devices or (0,):
        for profile, shape in shapes.items():
            made = _build(loaded, toolkit, index, profile)
            built.append(made)
            if not arguments.json:
                print(_line(made))
            if made.gpu and arguments.toolkit is None:
                _prove(loaded, index, shape)
    if arguments.json:
        print(msgspec.json.encode(built).decode())
    return 0


def _build(loaded: "Package", toolkit: "Toolkit", index: int, profile: "Profile") -> Built:
    from engine import plan_cache

    with _device(index) as device:
        plan = plan_cache.ensure(loaded, toolkit, device, profile, say=_say)
    return Built(
        generator=f"{loaded.manifest.name} {loaded.manifest.version}",
        toolkit=toolkit.name,
        gpu=device.name if device else "",
        least=profile.least,
        most=profile.most,
        built_s=round(plan.built_s, 2),
        mib=round(len(plan.data) / 2**20, 1),
        path=str(plan.path),
    )


@contextmanager
def _device(index: int) -> "Iterator[Device | None]":
    """GPU *index*, its context current; None where this computer has no GPU at all."""
    from engine.gpu import NoGpuError, open_gpu

    try:
        gpu = open_gpu(index)
    except NoGpuError:
        if index:
            raise
        yield None
        return
    with gpu:
        yield gpu.device


def _prove(loaded: "Package", index: int, shape: tuple[int, int]) -> None:
    """Loads the plan as a worker does, and says what the accuracy gate says."""
    from engine.runtimes import choose

    runtime = choose("tensorrt", device=index, say=_say).runtime
    try:
        runtime.load(loaded, shape)
    finally:
        runtime.close()


def _line(built: Built) -> str:
    how = f"built in {built.built_s:.1f} s" if built.built_s else "there already"
    least, most = (f"{y} x {x}" for y, x in (built.least, built.most))
    return (
        f"{built.generator} on {built.toolkit} for {built.gpu or LATER}, frames of {least} to "
        f"{most} px: {how}, {built.mib:g} MiB, {built.path}"
    )


def _say(line: str) -> None:
    print(f"refocus: {line}", file=sys.stderr)
