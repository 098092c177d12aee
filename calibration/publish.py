"""From a finished training to a model package: weights, ONNX master, golden planes, manifest.

What the manifest claims is taken from where it is true: the settings that the training stored, the
range of objectives it drew, and figures measured now on the real stacks, with the package itself
through a runtime. The training files are those that lie in --data now, and their hashes are of now:
publish with the data that was trained on. A training that was cut short cannot be published as if
it had run to its end, nor one with settings that `refocus train` has no option for: the command in
the manifest must be the one that trains this generator.

Golden planes are simulated, so a package holds no one's picture.
"""

import platform
import tempfile
from datetime import UTC, datetime
from importlib.metadata import version as installed_version
from pathlib import Path
from typing import Any

import msgspec
import numpy as np

from calibration.dataset import training_files
from calibration.evaluate import FLUORESCENCE, evaluate, read_stacks, summarise
from calibration.objectives import training_range
from calibration.optics import Optics, blur, depth_of_field_um, psf
from calibration.simulate import Camera, beads, expose, mixed, nuclei
from calibration.train import CHECKPOINT, OPTIONS, Progress, Settings, read_settings
from calibration.weights import load_average
from engine.generators.light import Light
from engine.package import Manifest, Package, Training, write
from engine.packing import pack
from engine.runtimes import open_runtime
from refocus.errors import PackageError
from refocus.frame import Pixels


def publish(
    run: Path, data: Path, out: Path, name: str, version: str, note: str | None = None
) -> Package:
    """Write the generator of the training in *run* as a package at *out*, which must not exist.

    *data* holds the training pictures (in-focus/) and the real stacks that it is measured on;
    *note* is anything about this training that its command does not say.
    Raises PackageError where *out* exists, the training has not reached its end, or `refocus train`
    cannot be told its settings.
    """
    if out.exists():
        raise PackageError(f"model package {out} exists; choose another --out or remove it")
    settings = read_settings(run)
    _check_can_be_said(settings, run)
    weights, state = load_average(run / CHECKPOINT)
    done = Progress(**state).share(settings)
    if done < 1:
        raise PackageError(
            f"{run}: the training is at {done:.0%} of its schedule; go on with it: "
            f"refocus train --out {run.name} --resume"
        )
    network = Light()
    network.load_state_dict(weights)
    covered = training_range(settings.objectives, settings.seed)
    manifest = Manifest(
        name=name,
        version=version,
        architecture="light",
        arguments=network.arguments,
        stride=network.stride,
        halo_px=network.reach_px(),
        modality="fluorescence",
        pixel_um=covered.pixel_um,
        defocus_um=covered.defocus_um,
        defocus_dof=covered.defocus_dof,
        training=_training(settings, state, data, note),
        created=datetime.now(UTC).isoformat(timespec="seconds"),
    )
    files = pack(network, _golden_planes())
    with tempfile.TemporaryDirectory() as folder:
        trial = write(Path(folder) / name, manifest, files)
        metrics = _measure(trial, data)
    return write(out, msgspec.structs.replace(manifest, metrics=metrics), files)


def _training(settings: Settings, state: dict[str, Any], data: Path, note: str | None) -> Training:
    options = [f"--{key} {value}" for key, value in _changed(settings).items()]
    command = ["refocus train --data DATA --out OUT", f"--steps {state['step']}", *options]
    notes = {
        "steps": state["step"],
        "minutes": round(state["minutes"], 1),
        "settings": msgspec.structs.asdict(settings),
        "machine": platform.machine(),
        "torch": installed_version("torch"),
        "refocus": installed_version("refocus"),
    }
    if settings.minutes is not None:
        notes["length"] = (
            f"The schedule followed a clock of {settings.minutes:g} minutes, in which "
            f"{state['step']} steps were done: the command trains as many steps on the same data, "
            "but not to the same bits."
        )
    if note:
        notes["note"] = note
    return Training(command=" ".join(command), files=tuple(training_files(data)), notes=notes)


def _changed(settings: Settings) -> dict[str, Any]:
    """Settings that are not the defaults, the length aside."""
    values, defaults = (msgspec.structs.asdict(s) for s in (settings, Settings(steps=1)))
    return {
        key: value
        for key, value in values.items()
        if key not in ("minutes", "steps") and value != defaults[key]
    }


def _check_can_be_said(settings: Settings, run: Path) -> None:
    unsaid = {key: value for key, value in _changed(settings).items() if key not in OPTIONS}
    if unsaid:
        raise PackageError(
            f"{run}: trained with {', '.join(f'{k} = {v}' for k, v in unsaid.items())}, for which "
            "refocus train has no option, so no command could repeat it; make that the default "
            "or train without it"
        )


def _measure(package: Package, data: Path) -> dict[str, Any]:
    runtime = open_runtime("openvino")
    try:
        rows = list(evaluate(package, runtime, data, read_stacks(data, FLUORESCENCE)))
    finally:
        runtime.close()
    stacks = {
        stack: msgspec.structs.asdict(summarise([row for row in rows if row.stack == stack]))
        for stack in dict.fromkeys(row.stack for row in rows)
    }
    figures = {"all": msgspec.structs.asdict(summarise(rows)), **stacks}
    return {
        "command": f"refocus evaluate {package.manifest.name} --data DATA",
        "runtime": runtime.name,
        "through-focus": {k: {n: round(v, 4) for n, v in f.items()} for k, f in figures.items()},
    }


def _golden_planes() -> list[Pixels]:
    """Simulated planes, out of focus and in it, 8 and 16 bits."""
    rng = np.random.default_rng(0)
    optics = Optics(na=0.75, immersion_index=1.0, wavelength_um=0.52, pixel_um=0.325)
    # (specimen, defocus in depths of field, peak electrons, bits)
    wanted = ((nuclei, 3.0, 2000, 16), (mixed, 1.5, 300, 8), (beads, 0.0, 500_000, 16))
    planes: list[Pixels] = []
    for draw, dof, peak_e, bits in wanted:
        density = draw(rng, (128, 160))
        seen = blur(density, psf(optics, dof * depth_of_field_um(optics)))
        gain = peak_e / (200 if bits == 8 else 20_000)
        camera = Camera(
            gain_e_per_count=gain, offset_counts=10 if bits == 8 else 100, bit_depth=bits
        )
        counts = expose(rng, np.clip(seen / seen.max(), 0, None) * np.float32(peak_e), camera)
        planes.append(counts.astype(np.uint8 if bits == 8 else np.uint16))
    return planes
