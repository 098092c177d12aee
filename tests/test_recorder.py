"""The trunk with everything behind it, driven through the hook: raw always lands."""

import os
import signal
import subprocess
import sys
import textwrap
import time
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import zarr
import zmq

from acquire.header import UNKNOWN
from acquire.recorder import Recorder
from refocus.errors import RunError, SettingsError
from refocus.frame import RefocusOutcome
from refocus.settings import AcquireSettings, EngineSettings, LinkSettings, Settings
from store.reader import Run, State, open_run
from store.records import Kind
from tests import hanging_package, identity_package

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


def assert_raw(run: Run, taken: list[np.ndarray]) -> None:
    """Every frame as another reader finds it, byte for byte."""
    for entry in run.frames():
        assert entry.place is not None
        place = entry.place
        array = zarr.open_array(run.path / str(place.raw_image) / "0", mode="r")
        stored = np.asarray(array[place.t, place.c, place.z])
        assert stored.dtype == taken[entry.seq].dtype
        assert stored.tobytes() == taken[entry.seq].tobytes()


def test_raw_and_refocused_twins_land_side_by_side(tmp_path: Path) -> None:
    package = identity_package.make(tmp_path / "negated", name="negated", answer="negated")
    taken = [plane() for _ in range(6)]
    with recorder(tmp_path / "run", settings(package.folder), expected_shape=(32, 48)) as r:
        assert r.wait_for_engine(30)
        for number, pixels in enumerate(taken, start=1):
            shoot(r, pixels)
            deadline = time.monotonic() + 20
            while r.status().counts.refocused < number:
                assert time.monotonic() < deadline, r.status()
                time.sleep(0.005)
        assert r.status().state == "live"
    status = r.status()
    assert status.state == "complete"
    assert status.counts.saved == status.counts.refocused == status.expected == 6
    assert status.latency_ms is not None
    run = open_run(tmp_path / "run")
    assert run.state is State.COMPLETE
    assert_raw(run, taken)
    (scaling,) = run.notes.scalings.values()
    (generator,) = run.notes.generators.values()
    assert (generator.package_hash, generator.name) == (package.hash, "negated")
    assert generator.runtime.startswith("openvino")
    for entry in run.frames():
        refocused = run.refocused(entry.seq)
        assert refocused is not None
        mirrored = np.clip(2 * scaling.offset - taken[entry.seq].astype(float), 0, None)
        assert np.abs(refocused - mirrored).max() <= 2
        assert entry.refocus is not None
        assert entry.refocus.latency_ns > 0


def test_any_shape_dtype_and_repeat_is_kept(tmp_path: Path) -> None:
    package = identity_package.make(tmp_path / "identity")
    taken = [
        plane((32, 48)),
        plane((521, 697)),
        plane((2047, 1), "uint8"),
        plane((32, 48)).astype(np.float32),
        plane((32, 48)),
    ]
    with recorder(tmp_path / "run", settings(package.folder)) as r:
        assert r.wait_for_engine(30)
        for pixels in taken:
            shoot(r, pixels, Axes={"time": 0})  # one index, five times: nothing is overwritten
    run = open_run(tmp_path / "run")
    assert run.state is State.COMPLETE
    assert_raw(run, taken)
    outcomes = [entry.refocus.outcome for entry in run.frames() if entry.refocus is not None]
    assert outcomes[3] == RefocusOutcome.REJECTED
    rejected = run.record(3, Kind.REFOCUS)
    assert rejected is not None
    assert "float32" in run.reason(rejected)


@pytest.mark.parametrize("how", ["missing", "altered", "too new", "none wanted", "no such runtime"])
def test_without_a_usable_engine_raw_recording_goes_on(tmp_path: Path, how: str) -> None:
    folder = identity_package.make(tmp_path / "identity").folder
    chosen = settings(folder)
    words = how
    match how:
        case "missing":
            chosen, words = settings("nowhere"), "nowhere"
        case "altered":
            with (folder / "generator.onnx").open("ab") as file:
                file.write(b"!")
        case "too new":
            manifest = folder / "manifest.json"
            manifest.write_bytes(manifest.read_bytes().replace(b'"format": 1', b'"format": 999', 1))
            words = "format 999"
        case "none wanted":
            chosen = settings(folder, "none")
        case "no such runtime":
            chosen, words = settings(folder, "tensorrt"), "tensorrt"
    taken = [plane() for _ in range(8)]
    with recorder(tmp_path / "run", chosen) as r:
        if how == "no such runtime":
            assert not r.wait_for_engine(30)
        for pixels in taken:
            shoot(r, pixels)
    run = open_run(tmp_path / "run")
    assert run.state is State.COMPLETE
    assert_raw(run, taken)
    assert r.status().counts.skipped == 8
    assert how == "none wanted" or any(words in line for line in r.trouble), r.trouble


def test_a_folder_that_exists_is_refused_and_untouched(tmp_path: Path) -> None:
    (tmp_path / "precious").write_text("data")
    with (
        pytest.raises(RunError, match="exists"),
        recorder(tmp_path, settings("identity", "none")),
    ):
        pass
    assert [path.name for path in tmp_path.iterdir()] == ["precious"]


def test_an_acquisition_that_succeeds_with_nothing_is_an_error(tmp_path: Path) -> None:
    """pycromanager ends normally with 0 frames when a hook or a device fails."""
    with (
        pytest.raises(RunError, match=r"3 events were submitted.*0 images came"),
        recorder(tmp_path / "run", settings("identity", "none")) as r,
    ):
        for index in range(3):
            r.hooks()["event_generation_hook_fn"]({"axes": {"time": index}})
    assert open_run(tmp_path / "run").state is State.EMPTY


def test_a_missing_frame_makes_the_run_incomplete(tmp_path: Path) -> None:
    with (
        pytest.raises(RunError, match=r"2 events were submitted.*1 images came"),
        recorder(tmp_path / "run", settings("identity", "none")) as r,
    ):
        r.hooks()["event_generation_hook_fn"]({"axes": {"time": 1}})
        shoot(r, plane(), Axes={"time": 0})
    assert open_run(tmp_path / "run").state is State.INCOMPLETE


def test_the_hook_alone_works_and_cannot_count(tmp_path: Path) -> None:
    with recorder(tmp_path / "run", settings("identity", "none")) as r:
        r.hook(plane(), {"Axes": {"time": 0}})
    assert r.status().expected is None
    assert open_run(tmp_path / "run").state is State.COMPLETE


def test_an_interrupted_run_that_nobody_counted_is_not_called_complete(tmp_path: Path) -> None:
    with recorder(tmp_path / "run", settings("identity", "none")) as r:
        r.hook(plane(), {"Axes": {"time": 0}})
        r.stopping.set()
    assert open_run(tmp_path / "run").state is State.INCOMPLETE


def test_an_address_in_use_costs_the_refocusing_not_the_run(tmp_path: Path) -> None:
    package = identity_package.make(tmp_path / "identity")
    context = zmq.Context()
    try:
        with context.socket(zmq.ROUTER) as other:
            port = other.bind_to_random_port("tcp://127.0.0.1")
            chosen = Settings(
                engine=EngineSettings(runtime="openvino", generator=str(package.folder)),
                link=LinkSettings(address=f"tcp://127.0.0.1:{port}"),
            )
            with recorder(tmp_path / "run", chosen) as r:
                shoot(r, plane())
    finally:
        context.term()
    assert r.status().state == "complete"
    assert r.status().counts.skipped == 1
    assert str(port) in r.trouble[0]


@pytest.mark.parametrize("micromanager_saves", [False, True])
def test_the_same_trouble_is_told_once(tmp_path: Path, micromanager_saves: bool) -> None:
    out = tmp_path / "run"
    with (
        pytest.raises(RunError, match="3 of 3 frames could not be saved"),
        recorder(out, settings("x", "none"), micromanager_saves=micromanager_saves) as r,
    ):
        (out / "0").write_text("a file where a folder must be")
        for index in range(3):
            r.hook(plane(), {"Axes": {"time": index}})
        deadline = time.monotonic() + 10
        while r.status().counts.failed < 3:
            assert time.monotonic() < deadline
            time.sleep(0.005)
        assert r.stopping.is_set() is not micromanager_saves
    (line,) = (line for line in r.trouble if "could not be saved" in line)
    assert line.endswith("(3 times)")


def test_a_recorder_records_one_run(tmp_path: Path) -> None:
    r = recorder(str(tmp_path / "run"), settings("x", "none"))
    with pytest.raises(RunError, match="not started"):
        r.status()
    with r:
        r.hook(plane(), {"Axes": {"time": 0}})
    with pytest.raises(RunError, match="one run"):
        r.__enter__()


def test_only_loopback_is_opened_without_keys(tmp_path: Path) -> None:
    package = identity_package.make(tmp_path / "identity")
    chosen = Settings(
        engine=EngineSettings(runtime="openvino", generator=str(package.folder)),
        link=LinkSettings(address="tcp://0.0.0.0:5555"),
    )
    with pytest.raises(SettingsError, match=r"0\.0\.0\.0"), recorder(tmp_path / "run", chosen):
        pass
    assert not (tmp_path / "run").exists()


def test_the_wire_works_over_tcp_too(tmp_path: Path) -> None:
    """Windows has no ipc: there it is loopback with a secret."""
    package = identity_package.make(tmp_path / "identity")
    chosen = Settings(
        engine=EngineSettings(runtime="openvino", generator=str(package.folder)),
        link=LinkSettings(address="tcp://127.0.0.1:*"),
    )
    with recorder(tmp_path / "run", chosen) as r:
        assert r.wait_for_engine(30)
        shoot(r, plane())
    assert r.status().counts.refocused == 1


def test_a_disk_that_takes_no_more_costs_no_acknowledged_frame(tmp_path: Path) -> None:
    """A real limit on what this process may write, in a child that carries it."""
    script = textwrap.dedent(
        """
        import resource, signal, sys
        from pathlib import Path
        import numpy as np
        from acquire.header import UNKNOWN
        from acquire.recorder import Recorder
        from refocus.errors import RunError
        from refocus.settings import EngineSettings, Settings
        signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
        out = Path(sys.argv[1])
        chosen = Settings(engine=EngineSettings(runtime="none"))
        try:
            with Recorder(chosen, out=out, read_hardware=lambda event: UNKNOWN) as r:
                for index in range(6):
                    side = 64 if index < 3 else 512  # from the fourth on, larger than the limit
                    if index == 3:
                        resource.setrlimit(resource.RLIMIT_FSIZE, (300_000, 300_000))
                    r.hook(np.full((side, side), index + 1, np.uint16), {"Axes": {"time": index}})
        except RunError as error:
            print(error)
        print(r.stopping.is_set(), r.trouble)
        """
    )
    done = subprocess.run(
        [sys.executable, "-c", script, str(tmp_path / "run")],
        capture_output=True,
        text=True,
        check=True,
    )
    assert "3 of 6 frames could not be saved" in done.stdout, done.stdout + done.stderr
    assert "True" in done.stdout
    run = open_run(tmp_path / "run")
    assert run.state is State.INCOMPLETE
    for seq in range(3):
        pixels = run.raw(seq)
        assert pixels is not None
        assert np.all(pixels == seq + 1)
    assert [run.raw(seq) for seq in range(3, 6)] == [None] * 3


@pytest.mark.skipif(os.name != "posix", reason="signals of POSIX")
def test_kill_9_of_the_recorder_leaves_no_worker_and_every_acknowledged_frame(
    tmp_path: Path,
) -> None:
    package = identity_package.make(tmp_path / "identity")
    script = textwrap.dedent(
        """
        import sys, time
        from pathlib import Path
        import numpy as np
        from acquire.header import UNKNOWN
        from acquire.recorder import Recorder
        from refocus.settings import EngineSettings, Settings
        chosen = Settings(engine=EngineSettings(runtime="openvino", generator=sys.argv[2]))
        with Recorder(chosen, out=Path(sys.argv[1]), read_hardware=lambda event: UNKNOWN) as r:
            assert r.wait_for_engine(30)
            for index in range(100_000):
                r.hook(np.full((64, 64), index % 60_000, np.uint16), {"Axes": {"time": index}})
                print(r.status().counts.saved, flush=True)
        """
    )
    child = subprocess.Popen(
        [sys.executable, "-c", script, str(tmp_path / "run"), str(package.folder)],
        stdout=subprocess.PIPE,
        text=True,
    )
    assert child.stdout is not None
    saved = 0
    while saved < 50:
        saved = int(child.stdout.readline())
    child.send_signal(signal.SIGKILL)
    child.wait()
    rest = child.stdout.read().splitlines()
    child.stdout.close()
    saved = max([saved, *(int(line) for line in rest if line)])
    run = open_run(tmp_path / "run")
    assert run.state is State.INCOMPLETE
    readable = [entry.seq for entry in run.frames() if run.raw(entry.seq) is not None]
    assert len(readable) >= saved
    for seq in readable:
        pixels = run.raw(seq)
        assert pixels is not None
        assert np.all(pixels == seq)
    # conftest fails this test if the orphaned worker were still there


def test_a_stall_of_the_disk_waits_then_stops(tmp_path: Path) -> None:
    """The raw queue is bounded: what does not fit is booked, and nothing vanishes."""
    chosen = Settings(
        acquire=AcquireSettings(raw_queue_mib=1, raw_stall_ms=1),
        engine=EngineSettings(runtime="none"),
    )
    with (
        pytest.raises(RunError, match="could not be saved"),
        recorder(tmp_path / "run", chosen) as r,
    ):
        r._intake.note(lambda _: time.sleep(0.3))  # the writer's thread sleeps: the disk stalls
        for index in range(8):
            r.hook(plane((512, 512)), {"Axes": {"time": index}})
    counts = r.status().counts
    assert counts.saved + counts.failed == r.status().received == 8
    assert counts.failed > 0
    assert any("does not keep up" in line for line in r.trouble)


@pytest.mark.skipif(os.name != "posix", reason="signals of POSIX")
@pytest.mark.parametrize("presses", [1, 2])
def test_ctrl_c_while_a_run_is_closed_closes_it(tmp_path: Path, presses: int) -> None:
    """In a user's own script nobody else handles Ctrl-C; a frame that hangs keeps the run open."""
    package = hanging_package.make(tmp_path / "hanging")
    script = textwrap.dedent(
        """
        import sys
        from pathlib import Path
        import numpy as np
        from acquire.header import UNKNOWN
        from acquire.recorder import Recorder
        from refocus.settings import EngineSettings, Settings
        chosen = Settings(engine=EngineSettings(runtime="openvino", generator=sys.argv[2]))
        with Recorder(chosen, out=Path(sys.argv[1]), read_hardware=lambda event: UNKNOWN) as r:
            assert r.wait_for_engine(30)
            r.hook(np.eye(64, dtype=np.uint16), {"Axes": {"time": 0}})
            print("leaving", flush=True)
        """
    )
    child = subprocess.Popen(
        [sys.executable, "-c", script, str(tmp_path / "run"), str(package.folder)],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )
    assert child.stdout is not None
    assert child.stdout.readline() == "leaving\n"
    for _ in range(presses):
        time.sleep(0.3)
        child.send_signal(signal.SIGINT)
    _, errors = child.communicate(timeout=30)
    assert "KeyboardInterrupt" in errors
    run = open_run(tmp_path / "run")
    assert run.counts.saved == 1
    assert run.counts.unanswered == 0
    assert run.notes.seal is not None
