"""Raw lands whatever happens: to the engine, the disk, the process, the user's patience."""

import os
import signal
import subprocess
import sys
import textwrap
import time
from pathlib import Path

import numpy as np
import pytest
import zmq

from refocus.errors import RunError
from refocus.settings import AcquireSettings, EngineSettings, LinkSettings, Settings
from store.reader import State, open_run
from tests import hanging_package, identity_package
from tests.recording import assert_raw, plane, recorder, settings, shoot


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
            chosen, words = settings(folder, "tensorrt"), "NVIDIA"
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


def test_a_disk_that_takes_no_more_costs_no_acknowledged_frame(tmp_path: Path) -> None:
    """A real limit on what this process may write, in a child that carries it."""
    script = textwrap.dedent(
        """
        import resource, signal, sys, time
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
                        while r.status().counts.saved < 3:
                            time.sleep(0.01)
                        resource.setrlimit(resource.RLIMIT_FSIZE, (3_000_000, 3_000_000))
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


def test_a_branch_that_cannot_even_begin_costs_the_refocusing_not_the_run(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def full(*arguments: object) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("acquire.recorder.start_engine", full)
    with recorder(tmp_path / "run", settings("x")) as r:
        r.hook(plane(), {"Axes": {"time": 0}})
    assert r.status().state == "complete"
    assert "No space left" in r.trouble[0]


def test_a_recorder_that_cannot_be_entered_leaves_nothing_running(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A thread left behind would keep the user's process alive; conftest looks for it."""

    def fail(*arguments: object) -> None:
        raise RuntimeError("no")

    monkeypatch.setattr("acquire.recorder.start_engine", fail)
    with pytest.raises(RuntimeError), recorder(tmp_path / "run", settings("x")):
        pass
    assert open_run(tmp_path / "run").notes.seal is not None


@pytest.mark.skipif(os.name != "posix", reason="signals of POSIX")
def test_ctrl_c_while_a_recorder_is_entered_closes_the_run(tmp_path: Path) -> None:
    script = textwrap.dedent(
        """
        import signal, sys
        import acquire.recorder
        from acquire.header import UNKNOWN
        acquire.recorder.start_engine = lambda *_: signal.raise_signal(signal.SIGINT)
        with acquire.recorder.Recorder(out=sys.argv[1], read_hardware=lambda event: UNKNOWN):
            print("entered")
        """
    )
    command = [sys.executable, "-c", script, str(tmp_path / "run")]
    done = subprocess.run(command, capture_output=True, text=True, timeout=30, check=False)
    assert "KeyboardInterrupt" in done.stderr
    assert "entered" not in done.stdout
    assert open_run(tmp_path / "run").notes.seal is not None
