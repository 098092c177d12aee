"""What each generator costs, and the frame sizes it sustains: the tables of docs/generators.md.

    python benchmarks/generators.py [--sides PX ...] [--repeats N] [--no-cpu]

Multiplications and bytes are counted. Times on this computer's CPU are measured: OpenVINO, the
network alone with random weights, in the precision that OpenVINO chooses, the shortest of N (other
programs only ever add time), and the time that cores worked for it, which tells more where others
are at work. What takes more than 1000 billion multiplications is left out. Rates on GPUs are
arithmetic, never measured: layer by layer the longer of computing and moving (ROOFLINE names the
assumptions).
"""

import argparse
import sys
import tempfile
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple

sys.path.insert(0, str(Path(__file__).parents[1]))

from engine.generators import Generator, build
from engine.generators.cost import Layer, layers, macs
from engine.generators.resnet9 import PAPER
from engine.package import Package
from engine.packing import untrained
from engine.runtimes.openvino import OpenVino

GENERATORS: dict[str, tuple[str, dict[str, Any]]] = {
    "light": ("light", {}),
    "resnet9, paper": ("resnet9", PAPER),
    "resnet9": ("resnet9", {}),
    "refocus-unet": ("refocus-unet", {}),
}
CPU_LIMIT_MACS = 1000e9


class Gpu(NamedTuple):
    """Peaks for dense FP16 with FP32 sums; the H200's is what a large product reached."""

    name: str
    tflops: float
    gb_per_s: float


GPUS = (
    Gpu("RTX A4000", 77, 448),
    Gpu("RTX 4070", 58, 504),
    Gpu("RTX 4090", 165, 1008),
    Gpu("RTX 5090", 210, 1792),
    Gpu("H200", 790, 4800),
)
WIDE_SHARE, NARROW_SHARE, WIDE_CHANNELS, BANDWIDTH_SHARE = 0.6, 0.25, 64, 0.8
ROOFLINE = (
    f"assumed: {WIDE_SHARE:.0%} of the peak for convolutions of {WIDE_CHANNELS} channels and more, "
    f"{NARROW_SHARE:.0%} for narrower ones, {BANDWIDTH_SHARE:.0%} of the memory's bandwidth; every "
    "convolution reads its input and writes its output once in FP16; the network alone"
)


def roofline_s(gpu: Gpu, costs: Sequence[Layer]) -> float:
    """Seconds that one plane should take on *gpu*."""
    total = 0.0
    for layer in costs:
        share = WIDE_SHARE if layer.channels >= WIDE_CHANNELS else NARROW_SHARE
        computing = 2 * layer.macs / (gpu.tflops * 1e12 * share)
        moving = layer.moved_bytes / (gpu.gb_per_s * 1e9 * BANDWIDTH_SHARE)
        total += max(computing, moving)
    return total


def cost_table(networks: dict[str, Generator], sides: Sequence[int]) -> Iterator[str]:
    yield from _head("generator", "parameters", "halo px", *(f"GMAC {side}²" for side in sides))
    for name, network in networks.items():
        million = sum(p.numel() for p in network.parameters()) / 1e6
        gmacs = (f"{macs(network, (side, side)) / 1e9:,.0f}" for side in sides)
        reach = network.reach_px()
        yield _row(name, f"{million:.2f} M", "whole plane" if reach is None else reach, *gmacs)


def cpu_table(networks: dict[str, Generator], sides: Sequence[int], repeats: int) -> Iterator[str]:
    runtime = OpenVino()
    try:
        yield from _head(f"ms (core-ms) on {runtime.name}", *(f"{side}²" for side in sides))
        for name, network in networks.items():
            fitting = [s for s in sides if macs(network, (s, s)) <= CPU_LIMIT_MACS]
            with tempfile.TemporaryDirectory() as folder:
                package = untrained(Path(folder) / "package", *GENERATORS[name])
                times = [_shortest(runtime, package, s, repeats) for s in fitting]
            yield _row(name, *times, *["-"] * (len(sides) - len(fitting)))
    finally:
        runtime.close()


def gpu_table(networks: dict[str, Generator], sides: Sequence[int]) -> Iterator[str]:
    yield from _head("frames/s, arithmetic", "side", *(gpu.name for gpu in GPUS))
    for name, network in networks.items():
        for side in sides:
            costs = layers(network, (side, side))
            yield _row(name, f"{side}²", *(f"{1 / roofline_s(gpu, costs):,.0f}" for gpu in GPUS))


def _shortest(runtime: OpenVino, package: Package, side: int, repeats: int) -> str:
    """Milliseconds that passed, and in brackets those that cores worked."""
    infer = runtime.bare(package, (side, side))
    infer()
    passed, worked = [], []
    for _ in range(repeats):
        begun, cores = time.perf_counter(), time.process_time()
        infer()
        passed.append(time.perf_counter() - begun)
        worked.append(time.process_time() - cores)
    return f"{min(passed) * 1e3:,.0f} ({min(worked) * 1e3:,.0f})"


def _head(*cells: object) -> Iterator[str]:
    yield _row(*cells)
    yield "|---|" + "--:|" * (len(cells) - 1)


def _row(*cells: object) -> str:
    return f"| {' | '.join(str(cell) for cell in cells)} |"


def main() -> None:
    """Print the tables."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--sides", type=int, nargs="+", default=[512, 1024, 2048], metavar="PX")
    parser.add_argument("--repeats", type=int, default=5, metavar="N")
    parser.add_argument("--no-cpu", action="store_true", help="measure nothing")
    arguments = parser.parse_args()
    networks = {name: build(*how) for name, how in GENERATORS.items()}
    print(*cost_table(networks, arguments.sides), "", sep="\n")
    if not arguments.no_cpu:
        for line in cpu_table(networks, arguments.sides, arguments.repeats):
            print(line, flush=True)
        print()
    print(*gpu_table(networks, arguments.sides), "", ROOFLINE, sep="\n")


if __name__ == "__main__":
    main()
