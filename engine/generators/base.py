"""What the rest of Refocus may know of a network."""

from abc import ABC, abstractmethod
from typing import Any

from torch import Tensor, nn


class Generator(nn.Module, ABC):
    """(n, 1, y, x) in the network's range to the same shape; y and x multiples of `stride`."""

    arguments: dict[str, Any]
    """What it was constructed with, as JSON: `engine.generators.build` makes it anew from them."""
    stride: int
    """Height and width of its input are multiples of it, in pixels."""

    @abstractmethod
    def forward(self, x: Tensor) -> Tensor: ...

    @abstractmethod
    def reach_px(self) -> int | None:
        """How far a pixel of the answer looks, rounded up to `stride`: the halo of an exact tile.

        None: it looks at the whole plane, so no tile gives what the plane gives. Normalisation
        whose statistics were frozen in training does not count, it is a factor and a summand.
        """
