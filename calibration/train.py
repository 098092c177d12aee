"""Train a generator on simulated pairs. Reads from top to bottom.

    refocus train --data DATA --out runs/fluorescence --minutes 80

OUT gets `checkpoint.safetensors` every few minutes, `log.csv`, and `settings.json`. A training that
was stopped goes on with --resume, with the settings and the schedule it began with. Its length is
given in minutes (the schedule then follows the clock, whatever the machine does besides) or in
steps (then the same command gives the same schedule anywhere).
"""

import copy
import csv
import math
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import msgspec
import numpy as np
import torch
from torch import Tensor, nn

from calibration import losses
from calibration.dataset import Batch, Sources, load_sources, make_batch
from calibration.objectives import Bank, build_bank
from calibration.weights import load_checkpoint, save_checkpoint
from engine.generators.light import Light
from refocus.errors import SettingsError

CHECKPOINT = "checkpoint.safetensors"
SETTINGS = "settings.json"
LOG = "log.csv"
CHECKPOINT_MIN = 3.0
VALIDATION_BATCHES = 10
LOG_COLUMNS = (
    *("step", "minutes", "loss", "learning_rate", "loader_share"),
    *("gain_db", "gain_far_db", "harmed", "in_focus_gain_db", "in_focus_harmed", "phase_gain_db"),
)


class Settings(msgspec.Struct, frozen=True, kw_only=True):
    """Everything that decides what a training becomes; stored in its checkpoints."""

    minutes: float | None = None
    steps: int | None = None
    """One of the two is the length."""
    batch: int = 16
    learning_rate: float = 2e-3
    weight_decay: float = 1e-4
    clip_norm: float = 1.0
    average_decay: float = 0.999
    objectives: int = 1000
    specimens: int = 300
    seed: int = 0
    threads: int = 2
    device: str = "cpu"

    def __post_init__(self) -> None:
        if (self.minutes is None) == (self.steps is None):
            raise SettingsError(
                f"train: give --minutes or --steps, one of them; got {self.minutes}, {self.steps}"
            )


@dataclass
class Progress:
    """Where a training stands."""

    step: int = 0
    minutes: float = 0.0

    def share(self, settings: Settings) -> float:
        """0 at the beginning, 1 when done."""
        if settings.steps is not None:
            return min(1.0, self.step / settings.steps)
        assert settings.minutes is not None
        return min(1.0, self.minutes / settings.minutes)


def train(data: Path, out: Path, settings: Settings) -> Path:
    """Train to the end of the schedule; returns the path of the last checkpoint."""
    if (out / CHECKPOINT).exists():
        raise SettingsError(f"train: {out} holds a training; go on with --resume or change --out")
    out.mkdir(parents=True, exist_ok=True)
    (out / SETTINGS).write_bytes(msgspec.json.format(msgspec.json.encode(settings)))
    _write_row(out / LOG, None)
    return _train(data, out, settings)


def resume(data: Path, out: Path) -> Path:
    """Go on with the training in *out*, with the settings and the schedule it began with."""
    try:
        settings = msgspec.json.decode((out / SETTINGS).read_bytes(), type=Settings)
    except (OSError, msgspec.DecodeError) as error:
        raise SettingsError(f"train: {out} holds no training to resume: {error}") from error
    return _train(data, out, settings)


def _train(data: Path, out: Path, settings: Settings) -> Path:
    torch.set_num_threads(settings.threads)
    torch.manual_seed(settings.seed)
    network = Light().to(settings.device)
    network.to(memory_format=torch.channels_last)  # type: ignore[call-overload]  # torch's stubs
    average = copy.deepcopy(network).eval()
    optimiser = torch.optim.AdamW(
        network.parameters(),
        settings.learning_rate,
        betas=(0.9, 0.98),
        weight_decay=settings.weight_decay,
        fused=True,
    )
    path = out / CHECKPOINT
    progress = Progress()
    if path.exists():
        progress = Progress(**load_checkpoint(path, network, average, optimiser))

    sources = load_sources(data, held_out=False, specimens=settings.specimens, seed=settings.seed)
    bank = build_bank(settings.objectives, settings.seed)
    unseen = list(_validation_batches(data, settings))
    running_loss, loader_s, saved_min = 0.0, 0.0, progress.minutes
    batches = _pairs(sources, bank, settings, progress.step)

    while progress.share(settings) < 1:
        started = time.perf_counter()
        rate = _learning_rate(settings, progress)
        for group in optimiser.param_groups:
            group["lr"] = rate
        blurred, truth = next(batches)
        loader_s += time.perf_counter() - started

        with torch.autocast(settings.device, dtype=torch.bfloat16):
            answer = network(blurred.to(settings.device))
        target = truth.to(settings.device)
        loss = losses.scheduled(answer.float(), target, progress.share(settings))
        optimiser.zero_grad(set_to_none=True)
        torch.autograd.backward(loss)
        nn.utils.clip_grad_norm_(network.parameters(), settings.clip_norm)
        optimiser.step()
        _follow(average, network, settings.average_decay, progress.step)

        running_loss += (loss.item() - running_loss) / min(100, progress.step + 1)
        progress.step += 1
        progress.minutes += (time.perf_counter() - started) / 60
        is_due = progress.minutes - saved_min >= CHECKPOINT_MIN
        if is_due or progress.share(settings) >= 1:
            figures: dict[str, Any] = _validate(average, unseen, settings)
            figures |= {"step": progress.step, "minutes": progress.minutes, "loss": running_loss}
            figures["learning_rate"] = rate
            figures["loader_share"] = loader_s / 60 / (progress.minutes - saved_min)
            _write_row(out / LOG, figures)
            state = {"step": progress.step, "minutes": progress.minutes}
            save_checkpoint(path, network, average, optimiser, state)
            loader_s, saved_min = 0.0, progress.minutes
    return path


def _learning_rate(settings: Settings, progress: Progress) -> float:
    """A hundred steps of warm-up, then half a cosine down to a two-hundredth."""
    warm_up = min(1.0, (progress.step + 1) / 100)
    cosine = 0.5 * (1 + math.cos(math.pi * progress.share(settings)))
    return settings.learning_rate * warm_up * (cosine + 0.005)


def _pairs(
    sources: Sources, bank: Bank, settings: Settings, step: int
) -> Iterator[tuple[Tensor, Tensor]]:
    """Every batch twice, the second time transposed: making one costs a third of a step."""
    while True:
        batch = make_batch(sources, bank, settings.batch, settings.seed, step // 2)
        if step % 2 == 0:
            yield batch.blurred, batch.truth
            step += 1
        yield batch.blurred.transpose(-1, -2), batch.truth.transpose(-1, -2)
        step += 1


def _validation_batches(data: Path, settings: Settings) -> Iterator[Batch]:
    """The same pictures at every validation: files and objectives that training never sees."""
    specimens = max(10, settings.specimens // 10)
    sources = load_sources(data, held_out=True, specimens=specimens, seed=settings.seed + 1)
    bank = build_bank(max(4, settings.objectives // 12), settings.seed + 1)
    for index in range(VALIDATION_BATCHES):
        yield make_batch(sources, bank, 24, settings.seed + 1, index)


@torch.no_grad()
def _follow(average: nn.Module, network: nn.Module, decay: float, step: int) -> None:
    """Exponential moving average of the weights, short at first so that the start is forgotten."""
    weight = 1 - min(decay, (step + 1) / (step + 20))
    torch._foreach_lerp_(list(average.parameters()), list(network.parameters()), weight)


@torch.no_grad()
def _validate(network: nn.Module, batches: list[Batch], settings: Settings) -> dict[str, float]:
    """Gains over the input in dB of PSNR after an affine fit (the CARE way), by kind of picture."""
    gains, defocus, phase = [], [], []
    for batch in batches:
        with torch.autocast(settings.device, dtype=torch.bfloat16):
            answer = network(batch.blurred.to(settings.device)).float().cpu()
        before, after = (_residual(p, batch.truth) for p in (batch.blurred, answer))
        gains.append((10 * torch.log10(before / after)).numpy())
        defocus.append(batch.defocus_dof)
        phase.append(batch.is_phase)
    gain, dof, is_phase = (np.concatenate(parts) for parts in (gains, defocus, phase))
    is_blurred, is_sharp = dof > 0, (dof == 0) & ~is_phase
    return {
        "gain_db": float(gain[is_blurred].mean()),
        "gain_far_db": float(gain[dof > 2].mean()),
        "harmed": float((gain[is_blurred] < -0.3).mean()),
        "in_focus_gain_db": float(gain[is_sharp].mean()),
        "in_focus_harmed": float((gain[is_sharp] < -0.3).mean()),
        "phase_gain_db": float(gain[is_phase].mean()),
    }


def _residual(picture: Tensor, truth: Tensor) -> Tensor:
    """(n,) mean squared error after the best scale and offset."""
    a = picture - picture.mean((1, 2, 3), keepdim=True)
    b = truth - truth.mean((1, 2, 3), keepdim=True)
    fit = (a * b).mean((1, 2, 3), keepdim=True) / (a * a).mean((1, 2, 3), keepdim=True).clamp(1e-12)
    return ((fit * a - b) ** 2).mean((1, 2, 3)).clamp(1e-9)


def _write_row(path: Path, figures: dict[str, Any] | None) -> None:
    """Append a row; None begins the file anew."""
    with path.open("a" if figures else "w", newline="") as file:
        writer = csv.DictWriter(file, LOG_COLUMNS)
        if figures is None:
            writer.writeheader()
        else:
            rounded = {k: f"{v:.4g}" if isinstance(v, float) else v for k, v in figures.items()}
            writer.writerow(rounded)
