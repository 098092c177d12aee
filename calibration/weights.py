"""Checkpoints and weights on disk: safetensors only, so loading a file can run no code.

A checkpoint is one file, replaced atomically: network, its running average, the optimiser's
moments, and a JSON state (step, minutes trained) in the header.
"""

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor, nn

from refocus.errors import PackageError


def save_checkpoint(
    path: Path,
    network: nn.Module,
    average: nn.Module,
    optimisers: Sequence[torch.optim.Optimizer],
    state: dict[str, Any],
) -> None:
    """Write everything a training needs to go on; *state* must be JSON."""
    tensors: dict[str, Tensor] = {}
    tensors |= {f"network.{name}": t for name, t in network.state_dict().items()}
    tensors |= {f"average.{name}": t for name, t in average.state_dict().items()}
    for k, optimiser in enumerate(optimisers):
        for number, moments in optimiser.state_dict()["state"].items():
            tensors |= {f"optimiser{k}.{number}.{name}": t for name, t in moments.items()}
    plain = {name: t.detach().cpu().contiguous() for name, t in tensors.items()}
    part = path.with_suffix(".part")
    save_file(plain, part, metadata={"state": json.dumps(state)})
    part.replace(path)


def load_checkpoint(
    path: Path,
    network: nn.Module,
    average: nn.Module,
    optimisers: Sequence[torch.optim.Optimizer],
) -> dict[str, Any]:
    """Fill network, average and optimisers from *path*; returns the state saved with them."""
    tensors, state = _read(path)
    network.load_state_dict(_under(tensors, "network."))
    average.load_state_dict(_under(tensors, "average."))
    for k, optimiser in enumerate(optimisers):
        _load_moments(optimiser, _under(tensors, f"optimiser{k}."))
    return state


def load_average(path: Path) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """The averaged weights of a checkpoint, which are the ones to ship, and its state."""
    tensors, state = _read(path)
    return _under(tensors, "average."), state


def _load_moments(optimiser: torch.optim.Optimizer, tensors: dict[str, Tensor]) -> None:
    parameters = [p for group in optimiser.param_groups for p in group["params"]]
    moments: dict[int, dict[str, Tensor]] = {}
    for name, tensor in tensors.items():
        number, moment = name.split(".", 1)
        like = parameters[int(number)]
        if tensor.shape == like.shape:  # the fused optimiser wants moments in their weight's layout
            tensor = torch.empty_like(like).copy_(tensor)
        moments.setdefault(int(number), {})[moment] = tensor
    groups = optimiser.state_dict()["param_groups"]
    optimiser.load_state_dict({"state": moments, "param_groups": groups})


def _read(path: Path) -> tuple[dict[str, Tensor], dict[str, Any]]:
    try:
        with safe_open(path, framework="pt") as file:
            tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
            header = file.metadata() or {}
    except (OSError, SafetensorError) as error:
        raise PackageError(f"{path}: no checkpoint can be read from it: {error}") from error
    if "state" not in header:
        raise PackageError(
            f"{path}: weights without a training state; want a checkpoint of training"
        )
    return tensors, json.loads(header["state"])


def _under(tensors: dict[str, Tensor], prefix: str) -> dict[str, Tensor]:
    return {n.removeprefix(prefix): t for n, t in tensors.items() if n.startswith(prefix)}
