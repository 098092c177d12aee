"""Training: pairs, losses, checkpoints, and that a training can be stopped and gone on with."""

import csv
import math
from pathlib import Path

import imageio.v3 as iio
import numpy as np
import pytest
import torch

from calibration import losses
from calibration import train as training
from calibration.dataset import Sources, load_sources, make_batch, training_files
from calibration.muon import Muon
from calibration.objectives import CROP_PX, Bank, build_bank, training_range
from calibration.simulate import nuclei
from calibration.train import Settings, resume, train
from calibration.weights import load_average
from refocus.cli.main import main
from refocus.errors import PackageError, SettingsError

TINY = Settings(steps=6, batch=2, objectives=4, specimens=5, threads=1)


@pytest.fixture(scope="module")
def pictures(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder laid out like the real data, its pictures simulated; a stained one among them."""
    data = tmp_path_factory.mktemp("data")
    rng = np.random.default_rng(0)
    for folder, count, suffix in (("dsb2018", 43, "png"), ("bccd", 27, "jpg")):
        (data / "in-focus" / folder).mkdir(parents=True)
        for k in range(count):
            grey = np.clip(nuclei(rng, (48, 48), 3) * 150 + 20, 0, 255).astype(np.uint8)
            stain = 255 - grey if folder == "bccd" or k == 1 else grey
            colour = np.stack([stain] * 3, -1)
            iio.imwrite(data / "in-focus" / folder / f"{k:03}.{suffix}", colour)
    return data


@pytest.fixture(scope="module")
def sources(pictures: Path) -> Sources:
    return load_sources(pictures, held_out=False, specimens=10)


@pytest.fixture(scope="module")
def bank() -> Bank:
    return build_bank(6)


def test_a_batch_is_a_function_of_seed_and_index(sources: Sources, bank: Bank) -> None:
    first, again = (make_batch(sources, bank, 4, seed=3, index=7) for _ in range(2))
    other = make_batch(sources, bank, 4, seed=3, index=8)
    assert first.blurred.shape == first.truth.shape == (4, 1, CROP_PX, CROP_PX)
    assert torch.equal(first.blurred, again.blurred)
    assert torch.equal(first.truth, again.truth)
    assert not torch.equal(first.blurred, other.blurred)


def test_inputs_in_focus_differ_from_their_truth_by_noise_alone(
    sources: Sources, bank: Bank
) -> None:
    batches = [make_batch(sources, bank, 16, seed=0, index=k) for k in range(6)]
    is_sharp = np.concatenate([(b.defocus_dof == 0) & ~b.is_phase for b in batches])
    is_far = np.concatenate([b.defocus_dof > 2 for b in batches])
    assert 0.08 < is_sharp.mean() < 0.4
    # Noise has no structure: smoothed over 8 x 8 px little of it is left, of blur much is.
    smooth = [torch.nn.functional.avg_pool2d(b.blurred - b.truth, 8) for b in batches]
    left = torch.cat(smooth).square().mean((1, 2, 3)).numpy()
    spread = torch.cat([b.truth for b in batches]).var((1, 2, 3)).numpy()
    assert np.median((left / spread)[is_sharp]) < 0.1 * np.median((left / spread)[is_far])


def test_files_held_out_are_no_training_files(pictures: Path, sources: Sources) -> None:
    unseen = load_sources(pictures, held_out=True, specimens=5)
    assert {f.path for f in sources.files}.isdisjoint(f.path for f in unseen.files)
    assert sources.files == training_files(pictures)
    assert len(unseen.files) == 65
    names = [f.path for f in sources.files]
    assert "in-focus/dsb2018/000.png" in names
    assert "in-focus/dsb2018/001.png" not in names  # stained: not fluorescence


def test_too_few_pictures_are_refused(tmp_path: Path) -> None:
    with pytest.raises(SettingsError, match="0 pictures found, more than 40 wanted"):
        load_sources(tmp_path, held_out=False)


def test_the_range_that_a_manifest_states_holds_what_is_drawn(bank: Bank) -> None:
    covered = training_range(6)
    assert covered.pixel_um[0] < 0.065 < 3 < covered.pixel_um[1]
    assert covered.defocus_dof[1] == pytest.approx(bank.defocus_dof.max(), abs=0.1)


def test_log_error_counts_the_share_that_is_wrong() -> None:
    truth = torch.randn(4, 1, 32, 32)
    far, near = truth + 0.1 * torch.randn_like(truth), truth + 0.01 * torch.randn_like(truth)
    gap = losses.log_error(far, truth) - losses.log_error(near, truth)
    assert gap.item() == pytest.approx(np.log(100), rel=0.1)
    both = losses.log_error(5 * far, 5 * truth) - losses.log_error(far, truth)
    assert both.item() == pytest.approx(0, abs=0.01)


def test_the_schedule_goes_from_charbonnier_to_the_log_of_the_error() -> None:
    truth = torch.randn(2, 1, 32, 32)
    answer = truth + 0.1
    early = losses.charbonnier(answer, truth) + 0.05 * losses.fourier_l1(answer, truth)
    late = 0.25 * early + 0.1 * losses.log_error(answer, truth)
    assert losses.scheduled(answer, truth, 0.3).item() == pytest.approx(early.item())
    assert losses.scheduled(answer, truth, 1.0).item() == pytest.approx(late.item())
    middle = losses.scheduled(answer, truth, 0.625).item()
    assert middle == pytest.approx(0.625 * early.item() + 0.05 * (late - 0.25 * early).item() / 0.1)


def test_a_stopped_training_goes_on_as_if_it_had_not_stopped(
    pictures: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    whole, state = load_average(train(pictures, tmp_path / "whole", TINY))
    assert state["step"] == 6
    write = training.save_checkpoint

    def stop_after_three(path: Path, *rest: object) -> None:
        write(path, *rest)
        if rest[-1]["step"] == 3:
            raise KeyboardInterrupt

    monkeypatch.setattr(training, "CHECKPOINT_MIN", 0.0)
    monkeypatch.setattr(training, "save_checkpoint", stop_after_three)
    with pytest.raises(KeyboardInterrupt):
        train(pictures, tmp_path / "stopped", TINY)
    monkeypatch.undo()
    resumed, _ = load_average(resume(pictures, tmp_path / "stopped"))
    for name, weights in whole.items():
        torch.testing.assert_close(resumed[name], weights, rtol=0, atol=0)
    with (tmp_path / "stopped" / "log.csv").open() as file:
        assert [row["step"] for row in csv.DictReader(file)] == ["1", "2", "3", "6"]


def test_a_training_is_neither_overwritten_nor_resumed_from_nothing(
    pictures: Path, tmp_path: Path
) -> None:
    (tmp_path / "checkpoint.safetensors").write_bytes(b"")
    with pytest.raises(SettingsError, match="--resume"):
        train(pictures, tmp_path, TINY)
    with pytest.raises(SettingsError, match="holds no training"):
        resume(pictures, tmp_path / "nothing")
    with pytest.raises(PackageError, match="no checkpoint"):
        load_average(tmp_path / "checkpoint.safetensors")


def test_a_length_is_minutes_or_steps() -> None:
    for wrong in ({}, {"minutes": 1.0, "steps": 1}):
        with pytest.raises(SettingsError, match="--minutes or --steps"):
            Settings(**wrong)


@pytest.mark.parametrize(
    ("wrong", "said"),
    [
        ({"steps": 0}, "--steps must be at least 1, got 0"),
        ({"steps": -3}, "--steps must be at least 1, got -3"),
        ({"minutes": 0.0}, "--minutes must be above 0"),
        ({"minutes": -1.0}, "--minutes must be above 0"),
        ({"minutes": math.nan}, "--minutes must be above 0"),
        ({"steps": 1, "threads": 0}, "--threads must be at least 1"),
        ({"steps": 1, "seed": -1}, "--seed must be at least 0"),
    ],
)
def test_a_training_that_would_do_nothing_is_refused(wrong: dict[str, float], said: str) -> None:
    with pytest.raises(SettingsError, match=said):
        Settings(**wrong)


def test_the_command_refuses_it_in_a_sentence(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = ["--out", str(tmp_path / "run")]
    assert main(["train", "--data", str(tmp_path), *out, "--minutes", "0"]) == 2
    assert "--minutes must be above 0" in capsys.readouterr().err
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize("option", [("--seed", "1"), ("--threads", "2"), ("--device", "cpu")])
def test_a_resumed_training_takes_no_other_settings(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], option: tuple[str, str]
) -> None:
    command = ["train", "--data", str(tmp_path), "--out", str(tmp_path), "--resume", *option]
    assert main(command) == 2
    assert f"leave out {option[0]}" in capsys.readouterr().err


def test_training_learns(sources: Sources, bank: Bank) -> None:
    """Sixty steps on one batch: the answer comes well nearer to the truth than the input was."""
    torch.manual_seed(0)
    network = training.Light(widths=(8, 16, 16, 16))
    optimiser = torch.optim.AdamW(network.parameters(), 5e-3)
    batch = make_batch(sources, bank, 4, seed=0, index=0)
    for _ in range(60):
        loss = losses.log_error(network(batch.blurred), batch.truth)
        optimiser.zero_grad()
        loss.backward()
        optimiser.step()
    gain_db = 4.34 * (losses.log_error(batch.blurred, batch.truth) - loss).item()
    assert gain_db > 0.7


@pytest.mark.parametrize("shape", [(12, 4, 3, 3), (40, 10, 1, 1)])
def test_muon_moves_a_weight_alike_in_all_directions(shape: tuple[int, ...]) -> None:
    torch.manual_seed(0)
    weight = torch.nn.Parameter(torch.zeros(shape))
    # A gradient with one direction a hundred times as strong as the others.
    weight.grad = torch.randn(shape)
    weight.grad[0] *= 100
    Muon([weight], lr=0.1).step()
    matrix = weight.detach().reshape(len(weight), -1) / 0.1
    scale = max(1.0, matrix.shape[0] / matrix.shape[1]) ** 0.5
    strengths = torch.linalg.svdvals(matrix) / scale
    assert strengths.min() > 0.4
    assert strengths.max() < 1.4
    assert (weight.detach() * weight.grad).sum() < 0
