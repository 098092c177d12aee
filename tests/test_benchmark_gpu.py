"""benchmarks/gpu.py without a GPU: its statistics, its table, its refusals, and the echo worker."""

import json
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import msgspec
import pytest

from benchmarks import gpu, roofline
from benchmarks.generators import Gpu
from benchmarks.on_gpu import parts
from benchmarks.on_gpu.rows import Row, growth, line_of, percentile
from benchmarks.on_gpu.track import open_track
from benchmarks.on_gpu.worker import Echo
from engine.runtimes import tensorrt
from engine.runtimes.tensorrt import TensorRt
from refocus.errors import EngineError, SettingsError
from refocus.frame import RefocusOutcome
from tests import fake_driver, identity_package, played_tensorrt
from tests.played_tensorrt import Played

SCRIPT = Path(gpu.__file__)
SMALL = (64, 96)
MACHINE = gpu.Machine(
    gpu="a GPU", driver="CUDA 13.0", seam="a seam", computer="a PC", versions={}, kind="tensorrt"
)


@pytest.mark.parametrize(
    ("value", "wanted", "sense", "reached"),
    [
        (301.0, 300.0, "at least", True),
        (299.0, 300.0, "at least", False),
        (4.9, 5.0, "at most", True),
        (5.1, 5.0, "at most", False),
        (None, 5.0, "at most", False),
        (5.0, None, "at most", None),
    ],
)
def test_a_figure_is_held_against_what_is_wanted(
    value: float | None, wanted: float | None, sense: str, reached: bool | None
) -> None:
    row = Row(name="x", value=value, unit="ms", wanted=wanted, sense=sense)  # type: ignore[arg-type]
    assert row.reached is reached
    assert line_of(row).count("|") == 5
    assert ("not measured" in line_of(row)) == (value is None)
    assert ("**no**" in line_of(row)) == (reached is False)


def test_growth_forgets_what_is_taken_once() -> None:
    assert growth([0, 500, 900, 1000, 1000, 1000, 1000, 1000] + [1000] * 8) == 0
    assert growth(list(range(40))) == 20
    with pytest.raises(ValueError, match="7 samples"):
        growth([1.0] * 7)


def test_percentiles_are_values_that_were_measured() -> None:
    values = [float(value) for value in range(100, 0, -1)]
    assert [percentile(values, share) for share in (0.0, 0.5, 0.99, 1.0)] == [1, 50, 99, 100]
    assert percentile([7.0], 0.99) == 7


def test_without_a_gpu_it_says_what_to_install() -> None:
    done = subprocess.run(
        [sys.executable, str(SCRIPT)], capture_output=True, text=True, check=False
    )
    if done.returncode != 2:
        pytest.skip("there is a GPU here")
    assert done.stdout == ""
    assert "NVIDIA GPU" in done.stderr
    assert "nvidia.com/drivers" in done.stderr


@pytest.mark.parametrize("arguments", [["--soak", "-1"], ["--only", "nonsense"], ["--soak", "x"]])
def test_wrong_arguments_are_refused(arguments: list[str]) -> None:
    command = [sys.executable, str(SCRIPT), *arguments]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 2
    assert arguments[0] in done.stderr


def test_a_part_that_fails_is_a_line_and_takes_no_other_along(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "")
    report = gpu.measure(MACHINE, ["start", "comi"], 0.0)
    assert list(report.failed) == ["start", "comi"]
    assert report.rows == []
    table = gpu.table_of(report)
    assert table.count("**failed**") == 2
    assert "a GPU, CUDA 13.0, a seam; a PC" in table


def test_a_stand_in_is_called_one_in_every_line(monkeypatch: pytest.MonkeyPatch) -> None:
    def answer(part: str, wanted: type, *more: str) -> gpu.Outcome:
        return gpu.Outcome(rows=[Row(name=f"{part} row", value=1.0)])

    monkeypatch.setattr(gpu, "_asked", answer)
    machine = msgspec.structs.replace(MACHINE, kind="stand-in", refused="it is a Hopper")
    report = gpu.measure(machine, list(gpu.PARTS), 1.0)
    names = [row.name for row in report.rows]
    assert [name for name in names if not name.startswith("[")] == ["echo row"]
    assert names[-2:] == ["[seam] host row", "[stand-in] soak row"]
    assert "not measured here: it is a Hopper" in gpu.table_of(report)


@pytest.mark.parametrize("shared_memory", [True, False])
def test_the_echo_worker_gives_back_every_frame(shared_memory: bool, tmp_path: Path) -> None:
    package = identity_package.make(tmp_path / "identity")
    with open_track("echo", package, SMALL, shared_memory=shared_memory) as track:
        assert track.run(0.2) > 0
        track.settle()
        assert set(track.outcomes) == {RefocusOutcome.REFOCUSED}
        before = track.outcomes.total()
        latency_ms = track.pace(20, 50.0)
        skipped = track.outcomes[RefocusOutcome.SKIPPED]  # where this machine stalls for 120 ms
        assert len(latency_ms) + skipped == 20 == track.outcomes.total() - before
    assert min(latency_ms) > 0
    assert track.mixed_up == 0


def test_a_worker_that_does_not_come_up_says_why(tmp_path: Path) -> None:
    package = identity_package.make(tmp_path / "identity")
    (package.folder / "golden.npz").unlink()
    with (
        pytest.raises(EngineError, match=r"golden\.npz"),
        open_track("echo", package, SMALL),
    ):
        pass


def test_a_rate_counts_each_answer_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(parts, "SHAPE", SMALL)
    echo = Echo()
    echo.load(identity_package.make(tmp_path / "identity"), SMALL)
    assert parts.rate(echo, 0.05) > 0


def test_the_command_prints_the_same_as_json(tmp_path: Path) -> None:
    command = [sys.executable, str(SCRIPT), "--only", "echo"]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    report = json.loads(done.stdout.splitlines()[-1])
    assert [row["value"] > 0 for row in report["rows"]] == [True, True]
    assert done.stdout.count("| echo worker") == 2


def test_multiplications_and_bytes_are_those_of_the_graph(tmp_path: Path) -> None:
    package = identity_package.make(tmp_path / "identity")
    convolution, total = roofline.nodes(package.generator, side_px=256)
    assert convolution.macs == 9 * 256**2
    plane_bytes = 4 * 256**2
    assert convolution.moved_bytes["all"] == 2 * plane_bytes + 9 * 4
    assert total.moved_bytes == {"nothing": 3 * plane_bytes, "joined": plane_bytes, "all": 0}
    slow = Gpu("slow", tflops=1.0, gb_per_s=1.0)
    assert roofline.seconds(slow, [total], "joined") == pytest.approx(plane_bytes / 0.8e9)


@pytest.fixture
def with_a_gpu(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """The driver and TensorRT's execution are played; the benchmark and the runtime are real."""
    pytest.importorskip("tensorrt_rtx", reason="TensorRT for RTX is not installed")
    package = identity_package.make(tmp_path / "identity")
    played = Played(played_tensorrt.master(package))
    defaults = TensorRt.__init__.__kwdefaults__
    assert defaults is not None
    monkeypatch.setitem(defaults, "open_executable", played.open)
    monkeypatch.setattr(parts, "GENERATOR", str(package.folder))
    monkeypatch.setattr(parts, "Nvml", PlayedNvml)
    for name, small in {"SHAPE": SMALL, "ROUND_S": 0.2, "ROUNDS": 2}.items():
        monkeypatch.setattr(parts, name, small)
    with fake_driver.plugged_in():
        yield
        assert not fake_driver.alive()


class PlayedNvml:
    """A GPU that is 95 % busy and has given out 7 MiB more each time that it is asked."""

    def __init__(self, uuid: str) -> None:
        assert uuid.startswith("GPU-")
        self._used_mib = 0.0

    def busy_percent(self) -> int:
        return 95

    def used_mib(self) -> float:
        self._used_mib += 7.0
        return self._used_mib


@pytest.mark.usefixtures("with_a_gpu")
def test_every_figure_of_the_runtime_is_taken() -> None:
    machine = gpu.machine_here()
    assert (machine.kind, machine.refused) == ("tensorrt", "")
    assert "tensorrt-rtx" in machine.versions
    rows = parts.host("tensorrt") + parts.start("tensorrt")
    assert all(row.value is not None for row in rows)
    by_name = {row.name: row for row in rows}
    assert by_name["GPU without a kernel in work at full load"].value == 5
    assert by_name["memory on the GPU, 2048², context included"].value == 7 / 1024
    assert by_name["golden planes against the float32 master"].reached


@pytest.mark.usefixtures("with_a_gpu")
def test_a_gpu_that_tensorrt_refuses_gets_a_stand_in(monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*_: object) -> None:
        raise SettingsError("it does not know a GPU of compute capability 9.0")

    monkeypatch.setattr(tensorrt, "rtx_capability", refuse)
    machine = gpu.machine_here()
    assert machine.kind == "stand-in"
    assert "9.0" in machine.refused
