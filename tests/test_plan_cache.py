"""The plan cache, with plans that TensorRT for RTX really builds."""

import dataclasses
import os
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from engine import half, plan, plan_cache
from engine.files import PARTIAL
from engine.gpu import Device
from engine.package import Package, load
from engine.plan import Toolkit, open_toolkit, profile_for
from engine.plan_cache import Plan, ensure, workspace_bytes
from engine.sealed import write_sealed
from refocus.errors import PackageError, SettingsError
from tests import identity_package
from tests.small_networks import network

ADA = Device(0, "NVIDIA RTX 4070", (8, 9), 12 << 30, "GPU-0", "CUDA 13.0, driver 580.95")
SMALL = profile_for((512, 512), 16)

Ensure = Callable[..., Plan]


@pytest.fixture(scope="module")
def toolkit() -> Toolkit:
    return open_toolkit("tensorrt_rtx")


@pytest.fixture
def package(tmp_path: Path) -> Package:
    return identity_package.make(tmp_path / "package")


@pytest.fixture
def said() -> list[str]:
    return []


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    return tmp_path / "plans"


@pytest.fixture
def get(toolkit: Toolkit, package: Package, said: list[str], folder: Path) -> Ensure:
    """`ensure` for an Ada card, but for what the test names."""

    def ensured(**changed: Any) -> Plan:
        given = {"package": package, "toolkit": toolkit, "device": ADA, "profile": SMALL, **changed}
        return ensure(**given, folder=folder, say=said.append)

    return ensured


def test_built_once_and_found_again(
    get: Ensure, toolkit: Toolkit, folder: Path, said: list[str]
) -> None:
    built = get()
    assert len(built.data) > 100_000
    assert built.built_s > 0
    assert built.path.parent == built.jit_cache.parent == folder
    assert said == [built.note]
    assert said[0] == (
        f"{toolkit.name} builds a plan of identity 0 (frames of 64 x 64 to 512 x 512 px, "
        "best 512 x 512): there is none yet"
    )
    found = get()
    assert found == dataclasses.replace(built, built_s=0.0, note="")
    assert len(said) == 1


def test_plans_lie_in_the_user_s_cache(
    toolkit: Toolkit, package: Package, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    built = ensure(package, toolkit, ADA, SMALL, say=lambda line: None)
    assert built.path.parent == tmp_path / "cache/refocus/plans"


OTHERS: list[tuple[dict[str, Any], str]] = [
    (
        {"device": dataclasses.replace(ADA, driver="CUDA 13.1, driver 590.1")},
        "CUDA 13.0, driver 580.95, and none yet for CUDA 13.1, driver 590.1",
    ),
    (
        {"device": dataclasses.replace(ADA, name="NVIDIA RTX A4000", capability=(8, 6))},
        "NVIDIA RTX 4070 (compute capability 8.9), and none yet for "
        "NVIDIA RTX A4000 (compute capability 8.6)",
    ),
    (
        {"profile": profile_for((1024, 1024), 16)},
        "frames of 64 x 64 to 512 x 512 px, best 512 x 512, and none yet for "
        "frames of 64 x 64 to 1024 x 1024 px, best 1024 x 1024",
    ),
]


@pytest.mark.parametrize(("changed", "difference"), OTHERS)
def test_what_a_plan_depends_on_is_told(
    get: Ensure, said: list[str], changed: dict[str, Any], difference: str
) -> None:
    first = get()
    second = get(**changed)
    assert second.built_s > 0
    assert second.path != first.path
    assert second.jit_cache != first.jit_cache
    assert said[-1].endswith(f": there is one for {difference}")
    assert get().built_s == get(**changed).built_s == 0.0
    assert len(said) == 2


def test_another_version_builds_anew(
    get: Ensure, toolkit: Toolkit, said: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    get(toolkit=dataclasses.replace(toolkit, name="tensorrt_rtx 1.6.0"))
    get()
    assert said[-1].endswith(f"one for tensorrt_rtx 1.6.0, and none yet for {toolkit.name}")
    for module in (plan, half):
        monkeypatch.setattr(module, "RECIPE", module.RECIPE + 1)
        assert get().built_s > 0
        assert "none yet for recipe" in said[-1]
    assert len(said) == 4


def test_another_generator_has_plans_of_its_own(get: Ensure, negated: Package) -> None:
    mine, other = get(), get(package=negated)
    assert mine.data != other.data
    assert other.note.endswith("there is none yet")
    assert get().data == mine.data


def test_the_nearest_plan_is_the_one_compared_with(get: Ensure, said: list[str]) -> None:
    far = dataclasses.replace(ADA, name="NVIDIA RTX A4000", capability=(8, 6), driver="CUDA 12.9")
    get(device=far, profile=profile_for((1024, 1024), 16))
    get(device=dataclasses.replace(ADA, driver="CUDA 12.8"))
    get()
    assert said[-1].endswith("one for CUDA 12.8, and none yet for CUDA 13.0, driver 580.95")


def test_what_was_built_ahead_serves_every_gpu_it_was_made_for(
    get: Ensure, said: list[str]
) -> None:
    ahead = get(device=None)
    found = get()
    assert (found.path, found.data, found.built_s) == (ahead.path, ahead.data, 0.0)
    other = get(device=dataclasses.replace(ADA, name="NVIDIA RTX A4000", capability=(8, 6)))
    assert other.path == ahead.path
    assert len({one.jit_cache for one in (ahead, found, other)}) == 3
    assert len(said) == 1
    turing = get(device=dataclasses.replace(ADA, name="NVIDIA T4", capability=(7, 5)))
    assert turing.built_s > 0
    assert "any GPU from Ampere on, any driver, and none yet for NVIDIA T4" in said[-1]


@pytest.mark.parametrize("where", ["seal", "label", "plan", "end"])
def test_a_damaged_plan_is_built_anew(get: Ensure, said: list[str], where: str) -> None:
    path = get().path
    whole = path.read_bytes()
    plan_at = whole.index(b"\n", 48) + 1  # behind magic word and HMAC
    k = {"seal": 20, "label": plan_at - 9, "plan": plan_at + 5000, "end": len(whole) - 1}[where]
    damaged = bytearray(whole)
    damaged[k] ^= 0x10
    path.write_bytes(damaged)
    again = get()
    assert again.built_s > 0
    assert path.read_bytes() != damaged
    assert said[-1].endswith("the one at hand is damaged or was not made here")
    assert get().data == again.data
    assert len(said) == 2


@pytest.mark.parametrize("left", [0, 1, 47, 48, 400, -1])
def test_a_plan_that_was_cut_short_is_built_anew(get: Ensure, left: int) -> None:
    path = get().path
    path.write_bytes(path.read_bytes()[:left])
    assert "damaged" in get().note


def test_a_plan_under_another_s_name_is_built_anew(get: Ensure, negated: Package) -> None:
    mine, other = get(), get(package=negated)
    mine.path.write_bytes(other.path.read_bytes())
    again = get()
    assert "damaged" in again.note
    assert again.data != other.data


def test_a_sealed_file_with_another_label_is_no_plan(get: Ensure) -> None:
    """Same name, same key: still not what its own label says."""
    path = get().path
    write_sealed(path, b'{"onnx":"another"}\n' + b"not a plan")
    assert "damaged" in get().note


def test_plans_of_another_key_are_built_anew(
    get: Ensure, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    get()
    monkeypatch.setenv("XDG_DATA_HOME", str(tmp_path / "of another user"))
    assert "was not made here" in get().note
    assert get().built_s == 0


def test_nothing_is_used_with_a_key_that_others_can_read(
    get: Ensure, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("XDG_DATA_HOME", str(tmp_path / "data"))
    get()
    (tmp_path / "data/refocus/plan.key").chmod(0o644)
    with pytest.raises(SettingsError, match="only you can read"):
        get()


def test_the_fp16_twin_is_derived_once(
    get: Ensure, folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    derived = []

    def to_half(generator: bytes) -> bytes:
        derived.append(generator)
        return half_of(generator)

    half_of = half.to_half
    monkeypatch.setattr(half, "to_half", to_half)
    get()
    get(profile=profile_for((1024, 1024), 16))
    assert len(derived) == 1
    (twin,) = folder.glob("*.onnx")
    twin.write_bytes(twin.read_bytes()[:-1])
    get(profile=profile_for((2048, 2048), 16))
    assert len(derived) == 2


def test_the_folder_is_bounded(
    get: Ensure, folder: Path, monkeypatch: pytest.MonkeyPatch, negated: Package
) -> None:
    plans = [get(profile=profile_for((side, side), 16)).path for side in (512, 1024, 2048)]
    for age_s, path in enumerate(reversed(plans)):
        os.utime(path, (1e9 - age_s, 1e9 - age_s))
    get()  # the oldest is used again
    unrelated = folder / "notes.txt"
    unrelated.write_text("not ours")
    size = plans[0].stat().st_size
    monkeypatch.setattr(plan_cache, "MOST_BYTES", 3 * size + size // 2)
    newest = get(package=negated).path
    assert [path.exists() for path in (*plans, newest)] == [True, False, True, True]
    monkeypatch.setattr(plan_cache, "MOST_BYTES", 1)
    newest = get(profile=profile_for((4096, 4096), 16)).path
    assert sorted(folder.iterdir()) == sorted([newest, unrelated])


def test_unfinished_files_go_once_nobody_can_be_writing_them(get: Ensure, folder: Path) -> None:
    folder.mkdir()
    old, new = folder / f".old{PARTIAL}", folder / f".new{PARTIAL}"
    for path in (old, new):
        path.write_bytes(b"half a pl")
    long_ago = time.time() - plan_cache.PARTIAL_S - 60
    os.utime(old, (long_ago, long_ago))
    get()
    assert [path.exists() for path in (old, new)] == [False, True]


def test_a_folder_that_takes_nothing_costs_only_time(
    get: Ensure, folder: Path, said: list[str]
) -> None:
    folder.write_bytes(b"a file where a folder is wanted")
    for builds in (1, 2):
        assert get().built_s > 0
        assert len(said) == 2 * builds
        assert said[-1].startswith("the plan cannot be kept, so every start builds it again: ")


def test_a_gpu_that_rtx_does_not_know_is_refused_before_anything(
    get: Ensure, folder: Path, said: list[str]
) -> None:
    hopper = dataclasses.replace(ADA, name="NVIDIA H200", capability=(9, 0))
    get(device=None)
    with pytest.raises(SettingsError, match=r"compute capability 9\.0"):
        get(device=hopper)
    assert len(said) == 1


def test_the_full_tensorrt_builds_only_on_the_gpu(get: Ensure, toolkit: Toolkit) -> None:
    full = dataclasses.replace(toolkit, name="tensorrt 11.4.0", is_rtx=False)
    with pytest.raises(SettingsError, match="builds only on the GPU that is to run the plan"):
        get(toolkit=full, device=None)


def test_a_generator_that_cannot_be_built_leaves_no_plan(
    get: Ensure, folder: Path, tmp_path: Path
) -> None:
    generator = network([("Hardmax", ["raw"], "refocused", {})], {})
    weights = np.zeros(1, np.float32)
    strange = identity_package.write_package(tmp_path / "odd", generator, weights, "odd", 16, 0)
    with pytest.raises(PackageError, match="cannot build a plan"):
        get(package=strange)
    assert not list(folder.glob("*.plan"))


def test_memory_grows_with_the_frame_and_ends_with_the_gpu() -> None:
    assert workspace_bytes(SMALL, None) == 1 << 30
    assert workspace_bytes(profile_for((2048, 2048), 16), None) == 4 << 30
    assert workspace_bytes(profile_for((8192, 8192), 16), ADA) == 9 << 30


BUILDER = """
import sys
from pathlib import Path
from engine.package import load
from engine.plan import open_toolkit, profile_for
from engine.plan_cache import ensure
toolkit, package = open_toolkit("tensorrt_rtx"), load(Path(sys.argv[1]))
sys.stdout.write("ready")
sys.stdout.flush()
sys.stdin.read()
profile, folder = profile_for((512, 512), 16), Path(sys.argv[2])
built = ensure(package, toolkit, None, profile, folder=folder, say=lambda line: None)
assert len(built.data) > 100_000
"""


def test_two_processes_may_build_the_same_plan_at_once(
    get: Ensure, package: Package, folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("XDG_DATA_HOME", str(tmp_path / "no key yet"))
    command = [sys.executable, "-c", BUILDER, str(package.folder), str(folder)]
    pipes = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE}
    root = Path(__file__).parents[1]
    with (
        subprocess.Popen(command, cwd=root, **pipes) as one,
        subprocess.Popen(command, cwd=root, **pipes) as two,
    ):
        for process in (one, two):
            assert process.stdout is not None
            assert process.stdout.read(5) == b"ready"
        for process in (one, two):
            assert process.stdin is not None
            process.stdin.close()
        assert [one.wait(), two.wait()] == [0, 0]
    assert load(package.folder).hash == package.hash
    assert get(device=None).built_s == 0.0
    assert len(list(folder.iterdir())) == 2
