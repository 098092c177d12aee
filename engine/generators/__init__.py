"""The networks, in PyTorch. A model package names one of them and its arguments."""

from typing import Any

from engine.generators.base import Generator
from engine.generators.light import Light
from engine.generators.refocus_unet import RefocusUNet
from engine.generators.resnet9 import ResNet9
from refocus.errors import PackageError

__all__ = ["ARCHITECTURES", "Generator", "build"]

ARCHITECTURES: dict[str, type[Generator]] = {
    "light": Light,
    "resnet9": ResNet9,
    "refocus-unet": RefocusUNet,
}


def build(architecture: str, arguments: dict[str, Any]) -> Generator:
    """An untrained network of the *architecture* that a manifest names."""
    if architecture not in ARCHITECTURES:
        raise PackageError(
            f"architecture {architecture!r} is not known; this Refocus has "
            f"{', '.join(sorted(ARCHITECTURES))}: update Refocus or train the generator anew"
        )
    try:
        return ARCHITECTURES[architecture](**arguments)
    except TypeError as error:
        raise PackageError(
            f"architecture {architecture!r} cannot be built with {arguments}: {error}; "
            "update Refocus or train the generator anew"
        ) from error
