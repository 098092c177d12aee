"""Recorders that a test drives through their hook, and what it finds on disk afterwards."""

from pathlib import Path
from typing import Any

import numpy as np
import zarr

from acquire.header import UNKNOWN
from acquire.recorder import Recorder
from refocus.settings import EngineSettings, Settings
from store.reader import Run

RNG = np.random.default_rng(3)


def settings(generator: Path | str, runtime: Any = "openvino") -> Settings:
    return Settings(engine=EngineSettings(runtime=runtime, generator=str(generator)))


def recorder(out: Path | str, chosen: Settings, **options: Any) -> Recorder:
    return Recorder(chosen, out=out, read_hardware=lambda event: UNKNOWN, **options)


def plane(shape: tuple[int, int] = (32, 48), dtype: str = "uint16") -> np.ndarray:
    return RNG.integers(1, 250, shape).astype(dtype)


def shoot(r: Recorder, pixels: np.ndarray, **metadata: Any) -> None:
    hooks = r.hooks()
    event = {"axes": metadata.setdefault("Axes", {"time": r.expected.submitted or 0})}
    hooks["event_generation_hook_fn"](event)
    hooks["post_hardware_hook_fn"](event)
    hooks["image_process_fn"](pixels.copy(), {"PixelSize_um": 0.325, **metadata})


def events(run: Path, kind: str) -> int:
    """How often this happened so far in a run that is being written."""
    lines = (run / "journal" / "run.jsonl").read_text().splitlines()
    return sum(f'"event":"{kind}"' in line for line in lines)


def assert_raw(run: Run, taken: list[np.ndarray]) -> None:
    """Every frame as another reader finds it, byte for byte."""
    for entry in run.frames():
        assert entry.place is not None
        place = entry.place
        array = zarr.open_array(run.path / str(place.raw_image) / "0", mode="r")
        stored = np.asarray(array[place.t, place.c, place.z])
        assert stored.dtype == taken[entry.seq].dtype
        assert stored.tobytes() == taken[entry.seq].tobytes()
