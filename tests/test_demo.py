"""The whole line as a newcomer runs it: a real Micro-Manager core, hooks, disk, wire, engine."""

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import zarr
from yaozarrs import validate_zarr_store

from store.reader import State, open_run
from tests import identity_package
from tests.microscope import run_in_core

FRAMES = 24
KEYS = {
    "run",
    "received",
    "saved",
    "refocused",
    "skipped",
    "fps",
    "latency_ms",
    "psnr_db",
    "size",
    "channels",
}


def refocus(*arguments: str | Path, **options: Any) -> subprocess.CompletedProcess[str]:
    """Runs the command line in a process of its own."""
    command = [sys.executable, "-m", "refocus.cli.main", *map(str, arguments)]
    done = subprocess.run(
        command, capture_output=True, text=True, timeout=100, check=False, **options
    )
    assert "Traceback" not in done.stderr, done.stderr
    return done


def test_the_demo_says_what_became_of_every_frame(tmp_path: Path) -> None:
    package = identity_package.make(tmp_path / "negated", answer="negated")
    out = tmp_path / "run"
    done = refocus(
        *("demo", "--frames", FRAMES, "--size", 96, "--out", out),
        *("--generator", package.folder, "--json"),
    )
    assert done.returncode == 0, done.stderr
    summary = json.loads(done.stdout)
    assert set(summary) == KEYS
    assert summary["received"] == summary["saved"] == FRAMES
    assert 0 < summary["refocused"] == FRAMES - summary["skipped"]
    assert summary["psnr_db"]["raw"] > summary["psnr_db"]["refocused"], "it was negated"
    assert set(summary["latency_ms"]) == {"p50", "p95", "p99"}
    assert (out / "preview.png").stat().st_size > 1000
    validate_zarr_store(out)
    checked = refocus("check", out, "--json")
    assert checked.returncode == 0, checked.stderr
    report = json.loads(checked.stdout)
    assert report["state"] == "complete"
    assert report["raw"] == {"acknowledged": FRAMES, "readable": FRAMES, "damaged": 0, "failed": 0}
    assert report["refocus"]["refocused"] == summary["refocused"]


def record_what_the_hook_got(out: str, size: int) -> dict[str, Any]:
    """In a core of its own: the camera's own pixels, kept beside what is written."""
    from acquire.recorder import Recorder
    from acquire.sources import acquisition
    from acquire.sources.demo import DemoMicroscope
    from refocus.settings import EngineSettings, Settings

    got: list[tuple[dict[str, Any], np.ndarray]] = []
    microscope = DemoMicroscope(size)
    recorder = Recorder(Settings(engine=EngineSettings(runtime="none")), out=Path(out) / "run")
    with microscope, recorder:
        hooks = recorder.hooks()
        ours = hooks["image_process_fn"]

        def witness(image: np.ndarray, metadata: dict[str, Any]) -> Any:
            got.append((dict(metadata["Axes"]), image.copy()))
            return ours(image, metadata)

        hooks["image_process_fn"] = microscope.wrap(witness)
        events = microscope.events(FRAMES, frames_per_s=200)
        acquisition.run(events, hooks, stop=recorder.stopping)
    np.savez(Path(out) / "witness.npz", *[image for _, image in got])
    return {"axes": [axes for axes, _ in got]}


def test_every_raw_plane_is_what_the_hook_got_byte_for_byte(tmp_path: Path) -> None:
    axes = run_in_core(record_what_the_hook_got, str(tmp_path), 96)["axes"]
    run = open_run(tmp_path / "run")
    assert run.state is State.COMPLETE
    with np.load(tmp_path / "witness.npz") as witness:
        images = [witness[name] for name in witness.files]
    assert len(images) == FRAMES
    entries = list(run.frames())
    for entry, wanted_axes, image in zip(entries, axes, images, strict=True):
        assert entry.header is not None
        assert entry.place is not None
        assert entry.header.axes == wanted_axes
        place = entry.place
        array = zarr.open_array(tmp_path / "run" / str(place.raw_image) / "0", mode="r")
        assert np.asarray(array[place.t, place.c, place.z]).tobytes() == image.tobytes()
    assert len({entry.place for entry in entries}) == FRAMES, "no two frames share a slot"


@pytest.mark.skipif(os.name != "posix", reason="signals of POSIX")
@pytest.mark.parametrize("moment", ["engine", "frame 1", "frame 15"])
def test_ctrl_c_at_any_moment_closes_the_run_and_leaves_no_process(
    tmp_path: Path, moment: str
) -> None:
    package = identity_package.make(tmp_path / "identity")
    out = tmp_path / "run"
    child = subprocess.Popen(
        [
            *(sys.executable, "-m", "refocus.cli.main", "demo", "--frames", "600", "--size", "96"),
            *("--out", str(out), "--generator", str(package.folder)),
        ],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )
    wanted = 0 if moment == "engine" else int(moment.split()[1])
    deadline = time.monotonic() + 60
    while not (out / "journal" / "run.jsonl").exists() or _saved(out) < wanted:
        assert time.monotonic() < deadline
        assert child.poll() is None
        time.sleep(0.01)
    child.send_signal(signal.SIGINT)
    _, errors = child.communicate(timeout=30)
    assert child.returncode == 1, errors
    assert "Traceback" not in errors
    run = open_run(out)
    assert run.state in (State.INCOMPLETE, State.EMPTY)
    assert run.notes.seal is not None, "closed in order"
    assert run.counts.received == run.counts.saved >= wanted
    assert run.counts.unanswered == 0


def _saved(out: Path) -> int:
    try:
        return open_run(out).counts.saved
    except Exception:  # noqa: BLE001 - not there yet
        return 0


def test_nothing_is_connected_to_beyond_this_computer(tmp_path: Path) -> None:
    """Every Python process of a demo reports what it connects to, looks up or sends."""
    package = identity_package.make(tmp_path / "identity")
    report = tmp_path / "network.txt"
    hook = tmp_path / "hook"
    hook.mkdir()
    (hook / "sitecustomize.py").write_text(
        "import os, sys\n"
        "def watch(name, args):\n"
        "    if name in ('socket.connect', 'socket.getaddrinfo', 'socket.sendto', "
        "'socket.gethostbyname', 'socket.sendmsg', 'urllib.Request'):\n"
        f"        with open({str(report)!r}, 'a') as file:\n"
        "            print(name, args[1:] if name.startswith('socket.c') else args, file=file)\n"
        "sys.addaudithook(watch)\n"
        f"open({str(report)!r}, 'a').write(f'watching {{sys.argv[:1]}}\\n')\n"
    )
    environment = {name: value for name, value in os.environ.items() if name != "CI"}
    environment["PYTHONPATH"] = os.pathsep.join([str(hook), *sys.path])
    done = refocus(
        *("demo", "--frames", 6, "--size", 64, "--out", tmp_path / "run"),
        *("--generator", package.folder),
        env=environment,
    )
    assert done.returncode == 0, done.stderr
    lines = report.read_text().splitlines()
    assert sum(line.startswith("watching") for line in lines) >= 2, "demo and worker were watched"
    beyond = [
        line
        for line in lines
        if not line.startswith("watching") and "127.0.0.1" not in line and "/link" not in line
    ]
    assert beyond == []


def test_a_wrong_key_in_the_settings_ends_the_command(tmp_path: Path) -> None:
    (tmp_path / "config.toml").write_text("[engine]\ngenerater = 'x'\n")
    done = refocus("demo", cwd=tmp_path, env=os.environ | {"PYTHONPATH": os.pathsep.join(sys.path)})
    assert done.returncode == 2
    assert "generater" in done.stderr
    assert "generator" in done.stderr
    assert not (tmp_path / "runs").exists()


def test_a_run_that_exists_is_refused(tmp_path: Path) -> None:
    (tmp_path / "precious").write_text("data")
    done = refocus("demo", "--frames", 1, "--size", 64, "--engine", "none", "--out", tmp_path)
    assert done.returncode == 2
    assert "exists" in done.stderr
    assert [path.name for path in tmp_path.iterdir()] == ["precious"]


def test_help_needs_no_room() -> None:
    script = (
        "import sys; from refocus.cli.main import main\n"
        "try: main(['--help'])\n"
        "except SystemExit: pass\n"
        "print([name for name in ('numpy', 'zarr', 'zmq', 'torch', 'openvino', 'scipy') "
        "if name in sys.modules])"
    )
    done = subprocess.run(
        [sys.executable, "-c", script], capture_output=True, text=True, check=True
    )
    assert done.stdout.splitlines()[-1] == "[]"


def record_colour(out: str) -> list[str]:
    """In a core of its own: a camera that delivers B, G, R, A samples of 16 bits."""
    from acquire.recorder import Recorder
    from acquire.sources import acquisition
    from acquire.sources.demo import CONFIG, start_core, stop_core
    from refocus.settings import EngineSettings, Settings

    core = start_core(CONFIG)
    try:
        core.set_property("Camera", "PixelType", "64bitRGB")
        recorder = Recorder(Settings(engine=EngineSettings(runtime="none")), out=Path(out) / "run")
        events = [{"axes": {"time": index}, "exposure": 1.0} for index in range(3)]
        kept: list[np.ndarray] = []
        with recorder:
            hooks = recorder.hooks()
            ours = hooks["image_process_fn"]

            def witness(image: np.ndarray, metadata: dict[str, Any]) -> Any:
                kept.append(image.copy())
                return ours(image, metadata)

            hooks["image_process_fn"] = witness
            acquisition.run(events, hooks, stop=recorder.stopping)
        np.savez(Path(out) / "witness.npz", *kept)
        return recorder.trouble
    finally:
        stop_core()


def test_a_colour_camera_s_exposure_becomes_three_planes(tmp_path: Path) -> None:
    assert run_in_core(record_colour, str(tmp_path)) == []
    run = open_run(tmp_path / "run")
    assert run.state is State.COMPLETE
    with np.load(tmp_path / "witness.npz") as witness:
        images = [witness[name] for name in witness.files]
    entries = list(run.frames())
    assert len(entries) == 9
    for entry in entries:
        assert entry.header is not None
        exposure, colour = divmod(entry.seq, 3)
        samples = images[exposure].view(np.uint16).reshape(*images[exposure].shape, 4)
        assert entry.header.channel == f"Default-{'RGB'[colour]}"
        stored = run.raw(entry.seq)
        assert stored is not None
        assert np.array_equal(stored, samples[..., 2 - colour])
