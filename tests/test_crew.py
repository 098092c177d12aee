"""Several workers share the frames; which of them made a plane makes no difference to the run."""

import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import msgspec
import numpy as np
import pytest

from acquire.crew import Seat, seats
from engine.package import Package
from refocus import arena
from refocus.frame import RefocusOutcome
from refocus.settings import AcquireSettings, EngineSettings, LinkSettings, Settings
from store.reader import open_run
from store.records import Kind
from tests import identity_package
from tests.branch import Branch, settings
from tests.other_host import free_port
from tests.recording import assert_raw, events, plane, recorder, shoot

LIMIT_S = 60.0
NO_SUCH_GPU = 99


def place(monkeypatch: pytest.MonkeyPatch, *where: Seat) -> None:
    """Workers as on a computer with several GPUs; this one has none."""
    monkeypatch.setattr("acquire.engine_side.seats", lambda _: list(where))


@pytest.mark.parametrize(
    ("engine", "wanted"),
    [
        (EngineSettings(), [Seat(0, "auto")]),
        (EngineSettings(devices=(2, 0)), [Seat(2, "auto"), Seat(0, "tensorrt")]),
        (
            EngineSettings(runtime="tensorrt", devices=(0, 1)),
            [Seat(0, "tensorrt"), Seat(1, "tensorrt")],
        ),
        (EngineSettings(runtime="openvino", devices=(0, 1)), [Seat(0, "openvino")]),
        (EngineSettings(devices=()), []),
    ],
)
def test_one_worker_a_gpu_and_one_on_the_cpu(engine: EngineSettings, wanted: list[Seat]) -> None:
    assert seats(Settings(engine=engine)) == wanted


@pytest.mark.skipif(os.name != "posix", reason="signals of POSIX")
def test_three_workers_share_the_frames_and_one_is_killed(
    tmp_path: Path, negated: Package, monkeypatch: pytest.MonkeyPatch
) -> None:
    place(monkeypatch, *(Seat(device, "openvino") for device in range(3)))
    chosen = Settings(
        acquire=AcquireSettings(drain_s=LIMIT_S, fill_at_end_s=LIMIT_S),
        engine=EngineSettings(runtime="openvino", generator=str(negated.folder), threads=1),
        link=LinkSettings(beat_ms=100),
    )
    taken = [plane() for _ in range(90)]
    with recorder(tmp_path / "run", chosen, expected_shape=taken[0].shape) as r:

        def until(done: Callable[[], bool]) -> None:
            deadline = time.monotonic() + LIMIT_S
            while not done():
                assert time.monotonic() < deadline, r.status()
                time.sleep(0.002)

        until(lambda: r.status().workers == 3)
        for number, pixels in enumerate(taken):
            until(lambda: r.slot_waiting < 2)
            shoot(r, pixels)
            if number == 30:
                assert r.worker_pid is not None
                os.kill(r.worker_pid, signal.SIGKILL)
            if number == 60:  # one more has taken its place
                until(lambda: events(tmp_path / "run", "worker_ready") == 4)
    run = open_run(tmp_path / "run")
    assert_raw(run, taken)
    outcomes = {RefocusOutcome(one.outcome) for one in run.records(Kind.REFOCUS)}
    assert outcomes == {RefocusOutcome.REFOCUSED}, "what the dead one had was given again"
    (scaling,) = run.notes.scalings.values()
    for entry in run.frames():
        twin = run.refocused(entry.seq)
        assert twin is not None
        mirrored = np.clip(2 * scaling.offset - taken[entry.seq].astype(float), 0, None)
        assert np.abs(twin - mirrored).max() <= 2, "its own raw plane's twin, at its place"


def test_a_crew_that_is_dropped_while_the_engine_closes_leaves_no_other_running(
    branch: Callable[..., Branch], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    b = branch()
    b.ready()
    other = identity_package.make(tmp_path / "other", name="other")
    first, second = b.engine.crew, b.engine.prepare(other)
    assert first is not None
    b.drain(lambda: len(second.pids) == 1)
    close = first.close

    def drop_meanwhile() -> None:  # as a succession does that was slow to end
        monkeypatch.setattr(first, "close", close)
        b.engine.drop(first)
        b.engine.drop(first)

    monkeypatch.setattr(first, "close", drop_meanwhile)
    b.close()
    assert first.pids == second.pids == []


@pytest.mark.skipif(sys.platform != "linux", reason="shared memory of Linux")
def test_what_a_killed_recorder_left_goes_whatever_the_address(
    tmp_path: Path, negated: Package
) -> None:
    with subprocess.Popen([sys.executable, "-c", ""]) as gone:
        gone.wait()
    left = Path("/dev/shm") / f"{arena.PREFIX}{gone.pid}-left"
    left.write_bytes(b"planes")
    chosen = settings(negated)
    fixed = msgspec.structs.replace(chosen.link, address=f"tcp://127.0.0.1:{free_port()}")
    Branch(msgspec.structs.replace(chosen, link=fixed), tmp_path / "run").close()
    assert not left.exists()


def test_a_device_without_a_worker_is_told_and_the_others_work(
    branch: Callable[..., Branch], monkeypatch: pytest.MonkeyPatch
) -> None:
    place(monkeypatch, Seat(NO_SUCH_GPU, "tensorrt"), Seat(0, "openvino"))
    b = branch()
    b.drain(lambda: bool(b.trouble) and b.engine.link.workers == 1, limit_s=LIMIT_S)
    assert f"no worker on device {NO_SUCH_GPU}" in b.trouble[0]
    seq = b.send()
    b.drain(b.answered(seq))
    assert b.answers[seq][-1].outcome is RefocusOutcome.REFOCUSED
    assert not b.engine.hopeless
