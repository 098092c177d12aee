"""What the wire carries: python benchmarks/wire.py [--size PX] [--rounds N] [--seconds S]

A link and a worker process, both the real ones, 2048² uint16 (benchmarks/on_gpu/track.py). The
worker's runtime is an echo: it copies each plane into memory of its own and back, as a GPU's
runtime does, and computes nothing. Rounds by message and by shared memory take turns; reported are
the medians. What a real runtime reaches through the wire is held against this (benchmarks/gpu.py).
"""

import argparse
import json
import statistics
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[1]))

from benchmarks.on_gpu.track import open_track
from engine import model_store, package
from refocus.errors import EngineError


def echo_rate(shape: tuple[int, int], seconds: float, *, shared_memory: bool) -> float:
    """Frames/s of uint16 through the link, to an echo worker and back.

    Raises EngineError where one does not come back as it went.
    """
    loaded = package.load(model_store.find("fluorescence"))
    with open_track("echo", loaded, shape, shared_memory=shared_memory) as track:
        rate = track.run(seconds)
        track.settle()
    if track.mixed_up:
        raise EngineError(f"{track.mixed_up} frames came back as others")
    return rate


def main() -> None:
    """Print the rates by message and by shared memory as one JSON object."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--size", type=int, default=2048, help="side of the frames in pixels")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--seconds", type=float, default=3.0, help="of each measurement")
    given = parser.parse_args()
    shape = (given.size, given.size)
    rates: dict[bool, list[float]] = {False: [], True: []}
    for _ in range(given.rounds):
        for shared, measured in rates.items():
            measured.append(echo_rate(shape, given.seconds, shared_memory=shared))
    message, shared_memory = (statistics.median(rates[shared]) for shared in (False, True))
    ratios = [after / before for before, after in zip(rates[False], rates[True], strict=True)]
    figures = {
        "size_px": given.size,
        "message_fps": round(message, 1),
        "shared_memory_fps": round(shared_memory, 1),
        "ratio": round(statistics.median(ratios), 2),
        "rounds": {
            "message_fps": [round(rate, 1) for rate in rates[False]],
            "shared_memory_fps": [round(rate, 1) for rate in rates[True]],
        },
    }
    print(json.dumps(figures, indent=1))


if __name__ == "__main__":
    main()
