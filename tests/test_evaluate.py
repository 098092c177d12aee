"""Publishing a training and measuring the package, on a stack simulated here."""

import json
import sys
from importlib.metadata import version
from pathlib import Path

import imageio.v3 as iio
import msgspec
import numpy as np
import pytest
import tifffile

from calibration.evaluate import Row, evaluate, read_stacks, summarise
from calibration.metrics import CEILING_DB, care_psnr
from calibration.optics import Optics, blur, psf
from calibration.publish import publish
from calibration.simulate import Camera, expose, nuclei
from calibration.train import CHECKPOINT, SETTINGS, Settings, read_settings, train
from engine.package import Package, load, read_golden
from engine.runtimes.openvino import OpenVino
from refocus.cli.main import main
from refocus.errors import PackageError, SettingsError

Z_UM = [-4.0, 0.0, 2.0]
TINY = Settings(steps=2, batch=2, objectives=4, specimens=5, threads=1)


def row(stack: str, field: str, gain: float, blur_gain: float = 0.0) -> Row:
    return Row(
        stack=stack,
        field=field,
        plane=0,
        z=1.0,
        is_in_focus=False,
        psnr_input_db=20.0,
        psnr_blur_db=20.0 + blur_gain,
        psnr_refocused_db=20.0 + gain,
        cutoff_input=0.1,
        cutoff_refocused=0.1 + gain / 100,
    )


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Training pictures and a through-focus stack, laid out like the real ones."""
    folder = tmp_path_factory.mktemp("data")
    rng = np.random.default_rng(0)
    for name, count in (("dsb2018", 42), ("bccd", 26)):
        (folder / "in-focus" / name).mkdir(parents=True)
        for k in range(count):
            grey = np.clip(nuclei(rng, (48, 48), 3) * 150 + 20, 0, 255).astype(np.uint8)
            iio.imwrite(folder / "in-focus" / name / f"{k:03}.png", np.stack([grey] * 3, -1))
    (folder / "through-focus").mkdir()
    optics = Optics(na=0.75, immersion_index=1, wavelength_um=0.52, pixel_um=0.325)
    density = nuclei(rng, (70, 90), 6)
    planes = [expose(rng, 900 * blur(density, psf(optics, z)) + 50, Camera()) for z in Z_UM]
    tifffile.imwrite(
        folder / "through-focus" / "cells.tif", np.stack(planes), photometric="minisblack"
    )
    stack = {"file": "through-focus/cells.tif", "field": "cells", "kind": "fl", "z": Z_UM}
    other = {"file": "x.tif", "field": "x", "kind": "bf", "z": [0.0], "infocus_plane": 0}
    (folder / "manifest.json").write_text(json.dumps([stack | {"infocus_plane": 1}, other]))
    return folder


@pytest.fixture(scope="module")
def training(data: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("run")
    train(data, out, TINY)
    return out


def copied(training: Path, folder: Path, **changes: object) -> Path:
    """The training with other settings beside its checkpoint."""
    folder.mkdir()
    (folder / CHECKPOINT).write_bytes((training / CHECKPOINT).read_bytes())
    settings = json.loads((training / SETTINGS).read_bytes()) | changes
    (folder / SETTINGS).write_text(json.dumps(settings))
    return folder


@pytest.fixture(scope="module")
def package(data: Path, training: Path, tmp_path_factory: pytest.TempPathFactory) -> Package:
    with pytest.MonkeyPatch.context() as patch:
        if "tqdm" in sys.modules:  # torch.fx opens progress bars, for which tqdm keeps a thread
            patch.setattr("tqdm.tqdm.monitor_interval", 0)
        out = tmp_path_factory.mktemp("models") / "tiny"
        return publish(training, data, out, "tiny", "0.1")


def test_a_published_package_says_where_it_comes_from(package: Package, data: Path) -> None:
    manifest = load(package.folder).manifest
    assert manifest.name == "tiny"
    assert manifest.training.command == (
        "refocus train --data DATA --out OUT --steps 2 "
        "--batch 2 --objectives 4 --specimens 5 --threads 1"
    )
    assert manifest.training.notes["settings"] == msgspec.structs.asdict(TINY)
    assert manifest.training.notes["refocus"] == version("refocus")
    assert "length" not in manifest.training.notes
    assert len(manifest.training.files) == 2 + 1
    assert {file.licence for file in manifest.training.files} == {"CC0-1.0", "MIT"}
    assert set(manifest.metrics["through-focus"]) == {"all", "cells"}
    assert len(read_golden(package)) == 3


def test_an_unfinished_training_is_not_published(
    data: Path, training: Path, tmp_path: Path
) -> None:
    half = copied(training, tmp_path / "half", steps=4)
    with pytest.raises(PackageError, match=r"at 50% of its schedule; .* --resume"):
        publish(half, data, tmp_path / "package", "tiny", "0.1")


def test_a_training_that_no_command_repeats_is_not_published(
    data: Path, training: Path, tmp_path: Path
) -> None:
    other = copied(training, tmp_path / "other", muon_rate=0.01, clip_norm=2.0)
    with pytest.raises(PackageError, match=r"muon_rate = 0\.01, clip_norm = 2\.0, for which"):
        publish(other, data, tmp_path / "package", "tiny", "0.1")


def test_a_training_by_the_clock_is_published_as_such(
    data: Path, training: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    if "tqdm" in sys.modules:
        monkeypatch.setattr("tqdm.tqdm.monitor_interval", 0)
    timed = copied(training, tmp_path / "timed", steps=None, minutes=1e-4)
    found = publish(timed, data, tmp_path / "package", "tiny", "0.1", note="by hand")
    notes = found.manifest.training.notes
    assert notes["length"].startswith("The schedule followed a clock of 0.0001 minutes")
    assert notes["settings"]["minutes"] == 1e-4
    assert notes["note"] == "by hand"
    assert "--steps 2 " in found.manifest.training.command


def test_a_package_is_not_overwritten_nor_computed_for_nothing(data: Path, tmp_path: Path) -> None:
    with pytest.raises(PackageError, match="exists; choose another --out"):
        publish(tmp_path / "no training", data, tmp_path, "tiny", "0.1")


def test_the_command_in_the_manifest_trains_with_the_same_settings(
    package: Package, data: Path, tmp_path: Path
) -> None:
    command = package.manifest.training.command
    words = command.replace("DATA", str(data)).replace("OUT", str(tmp_path / "again")).split()
    assert main(words[1:]) == 0
    assert read_settings(tmp_path / "again") == TINY


def test_every_plane_is_held_against_the_one_in_focus(package: Package, data: Path) -> None:
    runtime = OpenVino(threads=1)
    try:
        rows = list(evaluate(package, runtime, data, read_stacks(data)))
    finally:
        runtime.close()
    assert [row.z for row in rows] == Z_UM
    assert [row.is_in_focus for row in rows] == [False, True, False]
    far, focus, near = rows
    assert far.psnr_input_db < near.psnr_input_db < focus.psnr_input_db
    assert all(row.psnr_blur_db >= row.psnr_input_db for row in rows)
    assert near.cutoff_input < focus.cutoff_input == 0.5
    # Two steps of training hardly change a plane.
    assert far.psnr_refocused_db == pytest.approx(far.psnr_input_db, abs=0.2)
    assert focus.psnr_refocused_db > 40


def test_means_are_over_fields_their_stacks_averaged_first() -> None:
    rows = [row("a1", "a", 1.0), row("a1", "a", 3.0), row("a2", "a", 4.0), row("b", "b", -1.0, 0.5)]
    sharp = msgspec.structs.replace(row("a1", "a", 20.0), is_in_focus=True)
    summary = summarise([*rows, sharp])
    assert summary.fields == 2
    assert summary.planes == 4
    assert summary.gain_db == pytest.approx(((1 + 3) / 2 + 4) / 2 / 2 - 0.5)
    assert summary.gain_over_blur_db == pytest.approx((3 - 1.5) / 2)
    assert summary.cutoff_raised == pytest.approx(0.01)
    assert summary.harmed_share == 0.25
    assert summary.in_focus_psnr_db == 40


def test_one_plane_that_came_back_untouched_does_not_hide_the_others() -> None:
    rng = np.random.default_rng(0)
    truth = rng.integers(0, 4096, (40, 40)).astype(np.uint16)
    untouched = care_psnr(truth, truth)
    rows = [
        msgspec.structs.replace(row(name, name, psnr - 20), is_in_focus=True)
        for name, psnr in (("a", untouched), ("b", 20.0))
    ]
    found = summarise([*rows, row("a", "a", 1.0), row("b", "b", 1.0)])
    assert found.in_focus_psnr_db == pytest.approx((CEILING_DB + 20) / 2)


def listed(folder: Path, **changes: object) -> Path:
    """Lists one stack, of a file that is not there unless it is written."""
    stack = {"file": "a.tif", "field": "a", "kind": "fl", "z": Z_UM, "infocus_plane": 1}
    (folder / "manifest.json").write_text(json.dumps([stack | changes]))
    return folder


@pytest.mark.parametrize(
    ("planes", "changes", "said"),
    [
        (None, {}, "a.tif: the stack cannot be read"),
        (3, {"infocus_plane": 3}, "number 3 of them in focus; correct manifest.json"),
        (2, {}, r"its shape is \(2, 40, 40\), manifest.json lists 3 planes"),
        (3, {"kind": "bf"}, "none of its 1 stacks is of a kind 'fl'"),
        (1, {"z": [0.0], "infocus_plane": 0}, "leave out stacks of a single plane"),
    ],
)
def test_stacks_that_are_not_as_listed_are_refused(
    package: Package, tmp_path: Path, planes: int | None, changes: dict[str, object], said: str
) -> None:
    listed(tmp_path, **changes)
    if planes:
        pixels = np.random.default_rng(0).integers(0, 999, (planes, 40, 40)).astype(np.uint16)
        tifffile.imwrite(tmp_path / "a.tif", pixels, photometric="minisblack")
    runtime = OpenVino(threads=1)
    try:
        with pytest.raises(SettingsError, match=said):
            summarise(list(evaluate(package, runtime, tmp_path, read_stacks(tmp_path))))
    finally:
        runtime.close()


@pytest.mark.parametrize("every", ["0", "-1"])
def test_no_plane_at_all_is_no_choice(
    package: Package, data: Path, capsys: pytest.CaptureFixture[str], every: str
) -> None:
    assert main(["evaluate", str(package.folder), "--data", str(data), "--every", every]) == 2
    assert "--every must be at least 1" in capsys.readouterr().err


def test_data_without_a_list_of_stacks_is_refused(tmp_path: Path) -> None:
    with pytest.raises(SettingsError, match="point --data at"):
        read_stacks(tmp_path)


def test_the_command_prints_a_line_a_stack_or_json(
    package: Package, data: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    command = ["evaluate", str(package.folder), "--data", str(data)]
    assert main(command) == 0
    lines = capsys.readouterr().out.splitlines()
    assert lines[0].startswith("cells")
    assert lines[1].startswith("mean of 1 fields")
    assert main([*command, "--json"]) == 0
    found = json.loads(capsys.readouterr().out, parse_constant=pytest.fail)  # no Infinity
    assert len(found["planes"]) == 3
    assert found["summary"]["planes"] == 2
