"""The networks, in PyTorch. A model package names one of them and its arguments."""

from typing import Any

from engine.generators.light import Light
from refocus.errors import PackageError

ARCHITECTURES = {"light": Light}


def build(architecture: str, arguments: dict[str, Any]) -> Light:
    """An untrained network of the *architecture* that a manifest names."""
    if architecture not in ARCHITECTURES:
        raise PackageError(
            f"architecture {architecture!r} is not known; this Refocus has "
            f"{', '.join(sorted(ARCHITECTURES))}: update Refocus or train the generator anew"
        )
    return ARCHITECTURES[architecture](**arguments)
