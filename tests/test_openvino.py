"""The CPU runtime, on real networks: any size of plane, no rubbish, no word to anybody outside."""

import json
import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import numpy.typing as npt
import pytest

from engine.package import FILES, ONNX, SHIPPED, WEIGHTS, Package, load, read_golden, write
from engine.runtimes import open_runtime
from engine.runtimes.openvino import MAX_LOADED, OpenVino, spare_cores
from engine.scaling import Scaling, derive
from refocus.errors import EngineError, PackageError, RejectedError, SettingsError
from tests import identity_package

SCALING = Scaling(offset=100.0, scale=1000.0)


@pytest.fixture
def runtime() -> Iterator[OpenVino]:
    opened = OpenVino(threads=1)
    yield opened
    opened.close()
    opened.close()


@pytest.fixture(scope="module")
def unet(tmp_path_factory: pytest.TempPathFactory) -> Package:
    return identity_package.make_unet(tmp_path_factory.mktemp("packages") / "unet")


def plane(shape: tuple[int, int], dtype: npt.DTypeLike = np.uint16) -> npt.NDArray[np.generic]:
    """Blurred spots on a background, with noise."""
    rng = np.random.default_rng(3)
    y, x = np.ogrid[: shape[0], : shape[1]]
    light = 0.3 + np.sin(y / 7) * np.sin(x / 9) + rng.normal(0, 0.05, shape)
    top = np.iinfo(np.dtype(dtype)).max // 16
    return np.clip(light * top + top / 8, 0, None).astype(dtype)


@pytest.mark.parametrize("shape", [(1, 1), (1, 2047), (2047, 1), (3, 50), (48, 64), (521, 697)])
@pytest.mark.parametrize("dtype", [np.uint8, np.uint16])
def test_any_size_comes_back_as_it_was(
    runtime: OpenVino, tmp_path: Path, shape: tuple[int, int], dtype: npt.DTypeLike
) -> None:
    raw = plane(shape, dtype)
    before = raw.copy()
    runtime.load(identity_package.make(tmp_path / "identity"), shape)
    answer = runtime.refocus(raw, SCALING)
    assert answer.pixels.dtype == raw.dtype
    assert answer.clipped == 0
    np.testing.assert_array_equal(answer.pixels, before)
    np.testing.assert_array_equal(raw, before)


def test_the_network_is_really_asked(runtime: OpenVino, tmp_path: Path) -> None:
    raw = np.array([[90, 100], [150, 250]], np.uint8)
    runtime.load(identity_package.make(tmp_path / "negated", answer="negated"), raw.shape)
    answer = runtime.refocus(raw, SCALING)
    expected = np.array([[110, 100], [50, 0]])  # 100 - (raw - 100); 250 would be -50
    assert np.abs(answer.pixels.astype(int) - expected).max() <= 1  # bfloat16 rounds
    assert answer.clipped == 1


@pytest.mark.parametrize(("answer", "reason"), [("nan", "non-finite"), ("constant", "everywhere")])
def test_rubbish_does_not_come_out(
    runtime: OpenVino, tmp_path: Path, answer: identity_package.Answer, reason: str
) -> None:
    runtime.load(identity_package.make(tmp_path / answer, answer=answer), (48, 64))
    with pytest.raises(EngineError, match=reason):
        runtime.refocus(plane((48, 64)), SCALING)


def test_float_planes_are_rejected(runtime: OpenVino, tmp_path: Path) -> None:
    runtime.load(identity_package.make(tmp_path / "identity"), (48, 64))
    with pytest.raises(RejectedError, match="float32"):
        runtime.refocus(np.ones((48, 64), np.float32), SCALING)


def test_a_shape_must_be_announced(runtime: OpenVino, tmp_path: Path) -> None:
    with pytest.raises(EngineError, match="call load first"):
        runtime.refocus(plane((48, 64)), SCALING)
    runtime.load(identity_package.make(tmp_path / "identity"), (48, 64))
    with pytest.raises(EngineError, match=r"\(48, 65\)"):
        runtime.refocus(plane((48, 65)), SCALING)


def test_compiled_networks_do_not_pile_up(runtime: OpenVino, tmp_path: Path) -> None:
    package = identity_package.make(tmp_path / "identity")
    for k in range(MAX_LOADED + 1):
        runtime.load(package, (64 + 16 * k, 64))
        runtime.load(package, (80, 64))  # used again and again: stays
    runtime.refocus(plane((80, 64)), SCALING)
    with pytest.raises(EngineError):
        runtime.refocus(plane((64, 64)), SCALING)


def test_what_runs_is_what_was_checked(runtime: OpenVino, tmp_path: Path) -> None:
    """The file may be exchanged once the package is loaded: new shapes compile the old bytes."""
    raw = plane((96, 112))
    package = identity_package.make(tmp_path / "identity")
    runtime.load(package, (64, 64))
    other = identity_package.make(tmp_path / "negated", answer="negated")
    (package.folder / ONNX).write_bytes((other.folder / ONNX).read_bytes())
    runtime.load(package, raw.shape)
    np.testing.assert_array_equal(runtime.refocus(raw, SCALING).pixels, raw)


def test_an_unusable_network_is_refused(runtime: OpenVino, unet: Package, tmp_path: Path) -> None:
    files = {name: (unet.folder / name).read_bytes() for name in FILES}
    nonsense = write(tmp_path / "nonsense", unet.manifest, {**files, ONNX: files[WEIGHTS]})
    with pytest.raises(PackageError, match="cannot compile"):
        runtime.load(nonsense, (48, 64))
    shrinks = write(
        tmp_path / "shrinks",
        unet.manifest,
        {**files, ONNX: identity_package.to_onnx(np.ones((1, 1, 3, 5), np.float32), False)},
    )
    with pytest.raises(PackageError, match=r"answers shape \[1, 1, 64, 62\]"):
        runtime.load(shrinks, (48, 64))


def test_lower_precision_is_precise_enough(runtime: OpenVino, unet: Package) -> None:
    raw = plane((256, 320))
    scaling = derive([raw])
    assert scaling is not None
    reference = OpenVino(threads=1, precision="f32")
    reference.load(unet, raw.shape)
    runtime.load(unet, raw.shape)
    wanted = reference.refocus(raw, scaling).pixels.astype(float)
    got = runtime.refocus(raw, scaling).pixels.astype(float)
    reference.close()
    span = np.ptp(wanted)
    assert np.abs(wanted - raw).max() > 0.1 * span
    assert 10 * np.log10(span**2 / np.mean((got - wanted) ** 2)) > 50


def test_brighter_and_offset_changes_nothing_else(runtime: OpenVino, unet: Package) -> None:
    raw = plane((96, 128)) + np.uint16(5000)  # room below: random weights undershoot
    brighter = raw * np.uint16(4) + np.uint16(500)
    runtime.load(unet, raw.shape)
    scalings = derive([raw]), derive([brighter])
    assert scalings[0] is not None
    assert scalings[1] is not None
    answers = runtime.refocus(raw, scalings[0]), runtime.refocus(brighter, scalings[1])
    assert answers[0].clipped == answers[1].clipped == 0
    a, b = (answer.pixels.astype(float) for answer in answers)
    assert np.abs(4 * a + 500 - b).max() <= 0.005 * np.ptp(b)


def test_the_shipped_generator_gives_its_golden_answers(runtime: OpenVino) -> None:
    package = load(SHIPPED / "fluorescence")
    golden = read_golden(package)
    assert golden
    for one in golden:
        runtime.load(package, one.pixels.shape)
        got = runtime.refocus(one.pixels, one.scaling).pixels.astype(float)
        span = np.ptp(np.percentile(one.pixels, (0.1, 99.9)))
        assert 10 * np.log10(span**2 / np.mean((got - one.answer) ** 2)) > 50


def test_engine_choices() -> None:
    runtime = open_runtime("auto", threads=1)
    assert runtime.name.startswith("openvino 20")
    runtime.close()
    with pytest.raises(SettingsError, match="none"):
        open_runtime("none")
    assert 1 <= spare_cores() < max(2, os.cpu_count() or 1)


SILENCE = """
import json, sys
events = []
watched = ("socket.", "urllib.", "http.", "os.fork", "os.posix_spawn", "subprocess.Popen")
sys.addaudithook(lambda name, _: events.append(name) if name.startswith(watched) else None)
import numpy as np
from pathlib import Path
from engine.package import load
from engine.runtimes.openvino import OpenVino
from engine.scaling import Scaling
raw = np.arange(64, dtype=np.uint8).reshape(8, 8)
runtime = OpenVino(threads=1)
runtime.load(load(Path(sys.argv[1])), raw.shape)
runtime.refocus(raw, Scaling(0.0, 64.0))
runtime.close()
import openvino.tools.ovc.telemetry_utils as utils
import threading
for thread in threading.enumerate():
    if thread is not threading.current_thread():
        thread.join(5)
seen = list(events)
import socket
socket.socket().close()
print(json.dumps({"seen": seen, "hook_works": len(events) > len(seen), "by": utils.tm.__name__}))
"""


def test_nothing_phones_home(tmp_path: Path) -> None:
    """Imports and runs the runtime where telemetry is allowed, and watches what it does."""
    package = identity_package.make(tmp_path / "identity")
    home = tmp_path / "home"
    home.mkdir()
    environment = {
        k: v for k, v in os.environ.items() if k not in ("CI", "TF_BUILD", "JENKINS_URL")
    }
    done = subprocess.run(
        [sys.executable, "-c", SILENCE, str(package.folder)],
        env={**environment, "HOME": str(home), "LOCALAPPDATA": str(home)},
        capture_output=True,
        text=True,
        check=True,
    )
    report = json.loads(done.stdout)
    assert report["seen"] == []
    assert report["hook_works"]
    assert report["by"] == "openvino.tools.ovc.telemetry_stub"
    assert list(home.iterdir()) == []
