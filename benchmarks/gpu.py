"""Refocus on this computer's GPU: every figure of the GPU path, in one command.

    python benchmarks/gpu.py [--only PART ...] [--soak MINUTES]

Takes up to five minutes (and those of the soak), prints a table and, in the last line, the same as
JSON. Each part runs in a process of its own (benchmarks/on_gpu/parts.py); one that fails is a line.
Where there is a GPU that the installed TensorRT refuses, PyTorch takes the network's place and an
empty network shows the seam alone: both are stand-ins, every line says so, and nothing is claimed
of TensorRT. `--only echo` needs no GPU.

Exit code 0, 1 where a figure was not reached or could not be measured, 2 where there is no GPU.
"""

import argparse
import os
import platform
import subprocess
import sys
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import TypeVar

import msgspec

sys.path.insert(0, str(Path(__file__).parents[1]))

from benchmarks.on_gpu import parts
from benchmarks.on_gpu.rows import HEAD, Row, line_of
from benchmarks.on_gpu.track import Kind
from engine import model_store, package
from engine.gpu import open_gpu
from refocus.errors import RefocusError, SettingsError

PARTS = ("host", "start", "echo", "wire", "comi")
"""In this order: the first builds the plan that the next one finds in the cache."""
LIMIT_S = 600.0
"""The full TensorRT builds a plan for minutes."""
PACKAGES = ("tensorrt", "tensorrt-rtx", "pycuda", "cuda-bindings", "torch", "onnx", "numpy")


class Machine(msgspec.Struct, frozen=True, kw_only=True):
    """What was measured on."""

    gpu: str
    driver: str
    seam: str
    computer: str
    versions: dict[str, str]
    kind: Kind
    """"tensorrt", or "stand-in" where TensorRT refuses the GPU."""
    refused: str = ""
    """Why there is a stand-in."""


class Outcome(msgspec.Struct, frozen=True, kw_only=True):
    """What one part gives."""

    rows: list[Row] = []
    failed: str = ""


class Report(msgspec.Struct, frozen=True, kw_only=True):
    """All of it."""

    machine: Machine | None
    rows: list[Row]
    failed: dict[str, str]
    """Parts that could not be measured, and why."""


Answer = TypeVar("Answer", Machine, Outcome)


def main() -> int:
    """Measure what the command line asks for."""
    arguments = _arguments()
    if arguments.child is not None:
        print("\n" + msgspec.json.encode(_child(arguments)).decode())
        return 0
    machine = None
    if arguments.soak or arguments.only != ["echo"]:
        try:
            machine = _asked("machine", Machine)
        except RefocusError as error:
            print(f"nothing to measure: {error}", file=sys.stderr)
            return SettingsError.exit_code
    report = measure(machine, arguments.only or list(PARTS), arguments.soak)
    print(table_of(report))
    print("\n" + msgspec.json.encode(report).decode())
    return int(bool(report.failed) or any(row.reached is False for row in report.rows))


def measure(machine: Machine | None, wanted: list[str], soak_minutes: float) -> Report:
    """Runs the *wanted* parts, and what shows the seam alone where there is a stand-in."""
    kind: Kind = machine.kind if machine else "echo"
    jobs: list[tuple[str, Kind]] = [(part, kind) for part in PARTS if part in wanted]
    if kind == "stand-in":
        jobs.append(("host", "seam"))
    if soak_minutes:
        jobs.append(("soak", kind))
    rows, failed = [], {}
    for part, with_kind in jobs:
        print(f"measuring {part} ({with_kind}) ...", file=sys.stderr)
        try:
            outcome = _asked(part, Outcome, "--kind", with_kind, "--soak", str(soak_minutes))
        except RefocusError as error:
            outcome = Outcome(failed=str(error))
        label = "" if with_kind in ("tensorrt", "echo") or part == "echo" else f"[{with_kind}] "
        # An empty network reaches nothing that is wanted of a generator.
        told = {"wanted": None} if with_kind == "seam" else {}
        rows += [msgspec.structs.replace(r, name=label + r.name, **told) for r in outcome.rows]
        if outcome.failed:
            failed[f"{label}{part}"] = outcome.failed
    return Report(machine=machine, rows=rows, failed=failed)


def table_of(report: Report) -> str:
    """As Markdown."""
    lines = []
    if report.machine:
        machine = report.machine
        versions = ", ".join(f"{name} {number}" for name, number in machine.versions.items())
        lines += [f"{machine.gpu}, {machine.driver}, {machine.seam}; {machine.computer}", versions]
        if machine.refused:
            lines.append(f"TensorRT is not measured here: {machine.refused}")
    lines += ["", HEAD, *map(line_of, report.rows)]
    lines += [f"| {part} | **failed**: {why} | | |" for part, why in report.failed.items()]
    return "\n".join(lines)


def _asked(part: str, wanted: type[Answer], *more: str) -> Answer:
    """What a process of its own answers. Raises SettingsError where it has nothing to say."""
    command = [sys.executable, str(Path(__file__)), "--child", part, *more]
    limit_s = LIMIT_S + 60 * float(more[-1] if more else 0)
    try:
        done = subprocess.run(command, capture_output=True, timeout=limit_s, check=False)
    except subprocess.TimeoutExpired as error:
        raise SettingsError(f"no answer within {limit_s:.0f} s") from error
    if done.returncode:
        words = done.stderr.decode(errors="replace").strip().splitlines()[-1:]
        raise SettingsError(" ".join(words) or f"exit code {done.returncode}")
    return msgspec.json.decode(done.stdout.splitlines()[-1], type=wanted)


def _child(arguments: argparse.Namespace) -> "Machine | Outcome":
    try:
        if arguments.child == "machine":
            return machine_here()
        if arguments.child == "soak":
            return Outcome(rows=parts.soak(arguments.kind, arguments.soak))
        return Outcome(rows=getattr(parts, arguments.child)(arguments.kind))
    except RefocusError as error:
        raise SystemExit(str(error)) from error


def machine_here() -> Machine:
    """Opens GPU and TensorRT, and builds the plan. Raises SettingsError where there is no GPU."""
    with open_gpu() as gpu:
        device, seam = gpu.device, gpu.seam
    refused = ""
    try:
        runtime = parts.open_runtime("tensorrt")
        runtime.load(package.load(model_store.find(parts.GENERATOR)), parts.SHAPE)
        runtime.close()
    except RefocusError as error:
        refused = str(error)
    return Machine(
        gpu=f"{device.name}, compute capability {device.capability[0]}.{device.capability[1]}, "
        f"{device.memory_bytes >> 20} MiB",
        driver=device.driver,
        seam=seam,
        computer=f"{os.cpu_count()} cores, {platform.system()}, Python {platform.python_version()}",
        versions=_versions(),
        kind="stand-in" if refused else "tensorrt",
        refused=refused,
    )


def _versions() -> dict[str, str]:
    found = {}
    for name in PACKAGES:
        try:
            found[name] = version(name)
        except PackageNotFoundError:
            continue
    return found


def _arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.split("\n\n")[0])
    parser.add_argument("--only", nargs="+", choices=PARTS, help="these parts alone")
    parser.add_argument(
        "--soak", type=float, default=0.0, metavar="MINUTES", help="and full rate for so long"
    )
    parser.add_argument("--child", help=argparse.SUPPRESS)
    parser.add_argument("--kind", default="tensorrt", help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.soak < 0:
        parser.error(f"--soak must be 0 or more minutes, got {arguments.soak}")
    return arguments


if __name__ == "__main__":
    sys.exit(main())
