"""The shipped generator on the CPU: OpenVINO against onnxruntime, same ONNX file, same threads.

    python benchmarks/cpu.py [--rounds N] [--seconds S] [--threads N] [--shape PX] [--json]

Each contender computes in a process of its own, one after the other, in an order that turns with
every round, so that a busy machine is busy for both; the ratio is the median over the rounds. The
network alone is timed on one float32 plane that lies ready; the runtime line is what a worker does:
from camera counts to camera counts, with scaling and checks. onnxruntime needs
pip install -e ".[benchmark]".
"""

import argparse
import os
import statistics
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import msgspec
import numpy as np

sys.path.insert(0, str(Path(__file__).parents[1]))

from engine import model_store, package
from engine.package import Package
from engine.runtimes.openvino import OpenVino
from engine.scaling import Scaling
from refocus.bench import Figure

Shape = tuple[int, int]


def _openvino(loaded: Package, shape: Shape, threads: int) -> Callable[[], object]:
    return OpenVino(threads).bare(loaded, shape)


def _openvino_f32(loaded: Package, shape: Shape, threads: int) -> Callable[[], object]:
    return OpenVino(threads, "f32").bare(loaded, shape)


def _runtime(loaded: Package, shape: Shape, threads: int) -> Callable[[], object]:
    runtime = OpenVino(threads)
    runtime.load(loaded, shape)
    plane = np.random.default_rng(0).poisson(400, shape).astype(np.uint16)
    return lambda: runtime.refocus(plane, Scaling(offset=380.0, scale=500.0))


def _onnxruntime(loaded: Package, shape: Shape, threads: int) -> Callable[[], object]:
    import onnxruntime

    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = threads
    session = onnxruntime.InferenceSession(
        loaded.generator, options, providers=["CPUExecutionProvider"]
    )
    feed = {session.get_inputs()[0].name: np.zeros((1, 1, *shape), np.float32)}
    return lambda: session.run(None, feed)


REFERENCE = "onnxruntime float32, network alone"
CONTENDERS: dict[str, Callable[[Package, Shape, int], Callable[[], object]]] = {
    "OpenVINO as it ships, network alone": _openvino,
    "OpenVINO float32, network alone": _openvino_f32,
    "OpenVINO as it ships, counts to counts": _runtime,
    REFERENCE: _onnxruntime,
}


def main() -> int:
    """Measure, print; 2 where onnxruntime is not installed."""
    arguments = _arguments()
    if arguments.one is not None:
        print(_rate(arguments))
        return 0
    names = list(CONTENDERS)
    before = os.getloadavg()[0]
    rounds: list[dict[str, float]] = []
    for number in range(arguments.rounds):
        turned = names[number % len(names) :] + names[: number % len(names)]
        print(f"round {number + 1} of {arguments.rounds}", file=sys.stderr)
        rounds.append({name: _in_a_process(name) for name in turned})
    figures = figures_of(rounds)
    if arguments.json:
        print(msgspec.json.encode(figures).decode())
        return 0
    print(
        f"{arguments.shape}², {arguments.threads} threads of {os.cpu_count()} cores, "
        f"{arguments.rounds} rounds, load {before:.1f} before and {os.getloadavg()[0]:.1f} after\n"
    )
    print("| what | frames/s | times onnxruntime |\n|---|---|---|")
    for one in figures:
        print(f"| {one.name} | {one.value:.2f} | {one.ratio:.2f} |")
    return 0


def figures_of(rounds: list[dict[str, float]]) -> list[Figure]:
    """Medians over the rounds, each of which has frames/s by contender."""
    reference = statistics.median(one[REFERENCE] for one in rounds)
    return [
        Figure(
            name,
            statistics.median(one[name] for one in rounds),
            "frames/s",
            reference,
            statistics.median(one[name] / one[REFERENCE] for one in rounds),
        )
        for name in rounds[0]
    ]


def _in_a_process(name: str) -> float:
    command = [sys.executable, *sys.argv, "--one", name]
    done = subprocess.run(command, stdout=subprocess.PIPE, text=True, check=False)
    if done.returncode:
        raise SystemExit(f"{name} does not run; see above")
    return float(done.stdout.splitlines()[-1])


def _rate(arguments: argparse.Namespace) -> float:
    shape = (arguments.shape, arguments.shape)
    loaded = package.load(model_store.find(arguments.generator))
    infer = CONTENDERS[arguments.one](loaded, shape, arguments.threads)
    infer()
    infer()
    began = time.perf_counter()
    count = 0
    while count == 0 or time.perf_counter() - began < arguments.seconds:
        infer()
        count += 1
    return count / (time.perf_counter() - began)


def _arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.split("\n\n")[0])
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--seconds", type=float, default=4.0, help="of each contender in a round")
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--shape", type=int, default=2048, help="side of a plane in pixels")
    parser.add_argument("--generator", default="fluorescence")
    parser.add_argument("--json", action="store_true", help="print a JSON list of figures")
    parser.add_argument("--one", choices=CONTENDERS, help=argparse.SUPPRESS)
    return parser.parse_args()


if __name__ == "__main__":
    sys.exit(main())
