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
from calibration.muon import Muon
from calibration.objectives import Bank, build_bank
from calibration.weights import load_checkpoint, save_checkpoint
from engine.generators.light import Light
from refocus.errors import SettingsError

CHECKPOINT = "checkpoint.safetensors"
SETTINGS = "settings.json"
OPTIONS = ("batch", "objectives", "specimens", "seed", "threads", "device")
"""Settings that the command line can say besides the length."""
LOG = "log.csv"
CHECKPOINT_MIN = 3.0
VALIDATION_BATCHES = 10
LOG_COLUMNS = (
    *("step", "minutes", "loss", "loader_share"),
    *("gain_db", "gain_far_db", "harmed", "in_focus_gain_db", "in_focus_harmed", "phase_gain_db"),
)


class Settings(msgspec.Struct, frozen=True, kw_only=True):
    """Everything that decides what a training becomes; stored beside its checkpoints."""

    minutes: float | None = None
    steps: int | None = None
    """One of the two is the length."""
    batch: int = 16
    muon_rate: float = 0.004
    adamw_rate: float = 1e-3
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
        if self.minutes is not None and not 0 < self.minutes < math.inf:
            raise SettingsError(f"train: --minutes must be above 0 and finite, got {self.minutes}")
        for key in ("steps", "batch", "objectives", "specimens", "threads"):
            value = getattr(self, key)
            if value is not None and value < 1:
                raise SettingsError(f"train: --{key} must be at least 1, got {value}")
        if self.seed < 0:
            raise SettingsError(f"train: --seed must be at least 0, got {self.seed}")


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
    return _train(data, out, read_settings(out))


def read_settings(out: Path) -> Settings:
    """The settings of the training in *out*."""
    try:
        return msgspec.json.decode((out / SETTINGS).read_bytes(), type=Settings)
    except (OSError, msgspec.DecodeError) as error:
        raise SettingsError(f"{out} holds no training that can be read: {error}") from error


def _train(data: Path, out: Path, settings: Settings) -> Path:
    torch.set_num_threads(settings.threads)
    torch.manual_seed(settings.seed)
    network = Light().to(settings.device)
    network.to(memory_format=torch.channels_last)  # type: ignore[call-overload]  # torch's stubs
    average = copy.deepcopy(network).eval()
    optimisers = _optimisers(network, settings)
    path, progress = out / CHECKPOINT, Progress()
    if path.exists():
        state = load_checkpoint(path, network, average, list(optimisers))
        progress = Progress(**state)

    sources = load_sources(data, held_out=False, specimens=settings.specimens, seed=settings.seed)
    bank = build_bank(settings.objectives, settings.seed)
    unseen = list(_validation_batches(data, settings))
    pairs = _pairs(sources, bank, settings, progress.step)
    recent_losses: list[float] = []
    loader_s, saved_min = 0.0, progress.minutes

    while progress.share(settings) < 1:
        started = time.perf_counter()
        pair = next(pairs)
        loader_s += time.perf_counter() - started
        recent_losses.append(_step(network, optimisers, pair, progress, settings))
        _follow(average, network, settings.average_decay, progress.step)
        progress.step += 1
        progress.minutes += (time.perf_counter() - started) / 60

        since_min = progress.minutes - saved_min
        if since_min >= CHECKPOINT_MIN or progress.share(settings) >= 1:
            figures = _validate(average, unseen, settings)
            figures["loss"] = float(np.mean(recent_losses))
            figures["loader_share"] = loader_s / 60 / since_min
            state = {"step": progress.step, "minutes": progress.minutes}
            _write_row(out / LOG, state | figures)
            save_checkpoint(path, network, average, list(optimisers), state)
            recent_losses, loader_s, saved_min = [], 0.0, progress.minutes
    return path


def _step(
    network: Light,
    optimisers: dict[torch.optim.Optimizer, float],
    pair: tuple[Tensor, Tensor],
    progress: Progress,
    settings: Settings,
) -> float:
    """Forward in bfloat16, loss in float32, back, and one step of every optimiser; the loss."""
    blurred, truth = (tensor.to(settings.device) for tensor in pair)
    with torch.autocast(settings.device, dtype=torch.bfloat16):
        answer = network(blurred)
    loss = losses.scheduled(answer.float(), truth, progress.share(settings))
    network.zero_grad(set_to_none=True)
    torch.autograd.backward(loss)
    nn.utils.clip_grad_norm_(network.parameters(), settings.clip_norm)
    for optimiser, full_rate in optimisers.items():
        for group in optimiser.param_groups:
            group["lr"] = full_rate * _rate(progress, settings)
        optimiser.step()
    return loss.item()


def _optimisers(network: Light, settings: Settings) -> dict[torch.optim.Optimizer, float]:
    """Muon for the maps between features, AdamW for the ways in and out; each with its rate."""
    ends = [*network.head.parameters(), *network.tail.parameters(), *network.permit.parameters()]
    inner = [p for p in network.parameters() if all(p is not end for end in ends)]
    muon = Muon(inner, settings.muon_rate)
    adamw = torch.optim.AdamW(ends, settings.adamw_rate, betas=(0.9, 0.98), fused=True)
    return {muon: settings.muon_rate, adamw: settings.adamw_rate}


def _rate(progress: Progress, settings: Settings) -> float:
    """Share of the full learning rates: a hundred steps of warm-up, then half a cosine."""
    warm_up = min(1.0, (progress.step + 1) / 100)
    cosine = 0.5 * (1 + math.cos(math.pi * progress.share(settings)))
    return warm_up * (cosine + 0.005)


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
