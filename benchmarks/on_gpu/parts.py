"""What benchmarks/gpu.py measures, part by part; each runs in a process of its own.

So a part that breaks the GPU's context takes no other with it, and the first frame after a start is
really that. A part returns rows; what it cannot measure it says in one.
"""

import statistics
import tempfile
import time
from collections import deque
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import psutil

from benchmarks.on_gpu.nvml import Nvml, Watch
from benchmarks.on_gpu.rows import Row, growth, percentile
from benchmarks.on_gpu.track import Kind, Track, open_track
from engine import gate, model_store, package
from engine.gpu import Device, open_gpu
from engine.package import Package
from engine.runtimes import Runtime
from engine.scaling import Scaling
from refocus.errors import PackageError
from refocus.frame import Pixels, RefocusOutcome

SHAPE = (2048, 2048)
COMI_SHAPE = (1024, 1024)
GENERATOR = "fluorescence"
ROUNDS = 5
ROUND_S = 2.0
WARM_UP = 20
DATA_CENTRE = ((8, 0), (9, 0), (10, 0), (10, 3))
"""Compute capabilities of GPUs for data centres: A100, H100 and H200, B200, B300."""
SCALING = Scaling(offset=380.0, scale=500.0)
CAMERA_FPS = 100.0
PACED_FRAMES = 600


def wanted_fps(device: Device) -> float:
    """Frames/s that the shipped generator has to reach at 2048²."""
    return 300.0 if device.capability in DATA_CENTRE else 100.0


def host(kind: Kind) -> list[Row]:
    """Host buffer to host buffer: rate, network alone, idle share, memory, accuracy."""
    loaded = package.load(model_store.find(GENERATOR))
    with open_gpu() as gpu:
        device = gpu.device
    nvml = Nvml(device.uuid)
    before_mib = nvml.used_mib()
    runtime = open_runtime(kind)
    runtime.load(loaded, SHAPE)
    rate(runtime, 0.0)
    memory = Row(
        name="memory on the GPU, 2048², context included",
        value=(nvml.used_mib() - before_mib) / 1024,
        unit="GiB",
        wanted=1.5,
        sense="at most",
    )
    rows = [*_rates(runtime, loaded, nvml, wanted_fps(device)), memory]
    if kind != "seam":
        rows.append(_golden(runtime, loaded))
    runtime.close()
    return rows


def _rates(runtime: Runtime, loaded: Package, nvml: Nvml, wanted: float) -> list[Row]:
    with Watch(nvml) as watch:
        rates = [rate(runtime, ROUND_S) for _ in range(ROUNDS)]
    alone_s = _seconds_of(runtime.bare(loaded, SHAPE), ROUND_S)
    frames = statistics.median(rates)
    from_times = max(0.0, 1 - frames * alone_s)
    return [
        Row(
            name="2048² uint16, host buffer to host buffer",
            value=frames,
            unit="frames/s",
            wanted=wanted,
            note=f"{runtime.name}; rounds {min(rates):.0f} to {max(rates):.0f}",
        ),
        Row(name="the network alone, 2048²", value=1 / alone_s, unit="frames/s"),
        Row(
            name="GPU without a kernel in work at full load",
            value=100 - statistics.median(watch.busy_percent),
            unit="%",
            wanted=10.0,
            sense="at most",
            note=f"NVML; from rate and network alone {100 * from_times:.0f} %",
        ),
    ]


def start(kind: Kind) -> list[Row]:
    """From nothing in this process to the first frame, the plan in the cache."""
    loaded = package.load(model_store.find(GENERATOR))
    plane = _plane(SHAPE)
    began = time.perf_counter()
    runtime = open_runtime(kind)
    runtime.load(loaded, SHAPE)
    runtime.refocus(plane, SCALING)
    seconds = time.perf_counter() - began
    runtime.close()
    return [
        Row(
            name="plan from the cache to the first frame, 2048²",
            value=seconds,
            unit="s",
            wanted=3.0,
            sense="at most",
        )
    ]


def echo(kind: Kind) -> list[Row]:
    """What the wire carries, by shared memory and by message; needs no GPU."""
    loaded = package.load(model_store.find(GENERATOR))
    rows = []
    for shared in (True, False):
        with open_track("echo", loaded, SHAPE, shared_memory=shared) as track:
            way = "shared memory" if shared else "messages"
            value = track.run(ROUND_S)
            rows.append(Row(name=f"echo worker, 2048², {way}", value=value, unit="frames/s"))
    return rows


def wire(kind: Kind) -> list[Row]:
    """The same through the wire, beside an echo worker, in rounds that take turns; latency."""
    loaded = package.load(model_store.find(GENERATOR))
    pairs = []
    with (
        open_track(kind, loaded, SHAPE) as ours,
        open_track("echo", loaded, SHAPE) as echoing,
    ):
        for _ in range(ROUNDS):
            pairs.append((ours.run(ROUND_S), echoing.run(ROUND_S)))
            ours.settle()
            echoing.settle()
        latency_ms = ours.pace(PACED_FRAMES, CAMERA_FPS)
        lost = ours.outcomes.total() - ours.outcomes[RefocusOutcome.REFOCUSED]
    reached, echoed = (statistics.median(rates) for rates in zip(*pairs, strict=True))
    ratio = statistics.median(mine / theirs for mine, theirs in pairs)
    note = f"of {echoed:.0f} frames/s; {lost} frames not refocused"
    rows = [
        Row(name="through the wire, 2048²", value=reached, unit="frames/s"),
        Row(name="the same against an echo worker", value=ratio, wanted=0.9, note=note),
    ]
    paced = f"hook to refocused, 2048² at {CAMERA_FPS:.0f} frames/s"
    for name, share, wanted in (("p50", 0.5, 5.0), ("p99", 0.99, 10.0)):
        value = percentile(latency_ms, share)
        rows.append(
            Row(name=f"{paced}, {name}", value=value, unit="ms", wanted=wanted, sense="at most")
        )
    return rows


def comi(kind: Kind) -> list[Row]:
    """COMI's ResNet-9 with random weights, the network alone, against torch.compile."""
    import torch

    from benchmarks.on_gpu.standin import network_of
    from engine.packing import untrained

    runtime = open_runtime(kind)
    with tempfile.TemporaryDirectory() as folder:
        loaded = untrained(Path(folder) / "resnet9", "resnet9")
        ours = runtime.bare(loaded, COMI_SHAPE)
        compiled = torch.compile(network_of(loaded))
        plane = torch.rand(1, 1, *COMI_SHAPE, device="cuda", dtype=torch.float16)
        plane = plane.contiguous(memory_format=torch.channels_last)

        def theirs() -> None:
            with torch.inference_mode():
                compiled(plane)
            torch.cuda.synchronize()

        theirs()
        pairs = [
            (1 / _seconds_of(ours, ROUND_S), 1 / _seconds_of(theirs, ROUND_S))
            for _ in range(ROUNDS)
        ]
        runtime.close()
    reached = statistics.median(mine for mine, _ in pairs)
    compared = statistics.median(other for _, other in pairs)
    name = "COMI's ResNet-9, 1024², the network alone"
    return [
        Row(name=name, value=reached, unit="frames/s"),
        Row(
            name="the same against torch.compile FP16 channels_last",
            value=statistics.median(mine / other for mine, other in pairs),
            wanted=1.2 if kind == "tensorrt" else None,
            note=f"of {compared:.0f} frames/s, torch {torch.__version__}",
        ),
    ]


def soak(kind: Kind, minutes: float) -> list[Row]:
    """Full rate through the wire for *minutes*: nothing grows, nothing is lost."""
    loaded = package.load(model_store.find(GENERATOR))
    with open_gpu() as gpu:
        nvml = Nvml(gpu.device.uuid)
    samples: dict[str, list[float]] = {"this process": [], "the worker": [], "the GPU": []}
    with open_track(kind, loaded, SHAPE) as track:
        rates, end = [], time.monotonic() + 60 * minutes
        processes = {"this process": psutil.Process(), "the worker": psutil.Process(track.pid)}
        while time.monotonic() < end:
            rates.append(track.run(1.0))
            for name, process in processes.items():
                samples[name].append(process.memory_info().rss / 2**20)
            samples["the GPU"].append(nvml.used_mib())
        track.settle()
    return [
        Row(name=f"soak of {minutes:g} minutes", value=statistics.median(rates), unit="frames/s"),
        _lost(track),
        *(
            Row(
                name=f"growth of memory, {name}",
                value=growth(values),
                unit="MiB",
                wanted=8.0,
                sense="at most",
            )
            for name, values in samples.items()
        ),
    ]


def _lost(track: Track) -> Row:
    refocused = track.outcomes[RefocusOutcome.REFOCUSED]
    return Row(
        name="frames that were not refocused",
        value=track.outcomes.total() - refocused,
        wanted=0.0,
        sense="at most",
        note=f"of {track.outcomes.total()}; {dict(track.reasons) or 'no reasons'}",
    )


def open_runtime(kind: Kind, say: Callable[[str], None] = print) -> Runtime:
    """The runtime that is measured, in this process."""
    if kind == "tensorrt":
        from engine.runtimes import choose

        return choose("tensorrt", say=say).runtime
    from benchmarks.on_gpu.standin import StandIn

    return StandIn(nothing=kind == "seam")


def rate(runtime: Runtime, seconds: float) -> float:
    """Frames/s with as many planes in work as the runtime has slots; 2048², loaded before."""
    planes = [_plane(SHAPE, number) for number in range(4)]
    in_work: deque[Any] = deque()
    began, done = time.perf_counter(), -WARM_UP
    while done < 1 or time.perf_counter() - began < seconds:
        if len(in_work) == runtime.slots:
            in_work.popleft()()
            done += 1
            if done == 0:
                began = time.perf_counter()
        in_work.append(runtime.start(planes[done % len(planes)], SCALING))
    elapsed = time.perf_counter() - began
    while in_work:
        in_work.popleft()()
    return done / elapsed


def _seconds_of(infer: Callable[[], None], seconds: float) -> float:
    infer()
    began, count = time.perf_counter(), 0
    while count == 0 or time.perf_counter() - began < seconds:
        infer()
        count += 1
    return (time.perf_counter() - began) / count


def _golden(runtime: Runtime, loaded: Package) -> Row:
    def answer(pixels: Pixels, scaling: Scaling) -> Pixels:
        runtime.load(loaded, (pixels.shape[0], pixels.shape[1]))
        return runtime.refocus(pixels, scaling).pixels.copy()

    name = "golden planes against the float32 master"
    try:
        value = gate.check_golden(loaded, answer, runtime.name)
    except PackageError as error:
        return Row(name=name, value=None, wanted=gate.LEAST_PSNR_DB, unit="dB", note=str(error))
    return Row(name=name, value=value, unit="dB", wanted=gate.LEAST_PSNR_DB)


def _plane(shape: tuple[int, int], number: int = 0) -> Pixels:
    return np.random.default_rng(number).poisson(400, shape).astype(np.uint16)
