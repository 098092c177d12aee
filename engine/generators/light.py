"""`light`: the generator for a machine without a large GPU, under a million parameters.

A U-Net on a picture folded 2 × 2, so that its first level already works on a quarter of the pixels,
with one residual block a level and side. What it leaves out is on purpose:

- no normalisation layer: a plane's answer must not depend on what else is in the plane, or tiles
  would differ from wholes and a bright cell would change its neighbours;
- no bias: f(a x) = a f(x) for a > 0, so the answer scales with the exposure and noise levels never
  trained on are handled like those that were (Mohan et al. 2020). Nearly so: SMALLEST is absolute,
  which shows only in corrections that are hardly larger than it;
- the network adds to its input, and its last layer starts at zero: untrained, it changes nothing;
- what it adds is bounded by a permit p that it gives itself, c p / (p + |c|). Where the permit is
  zero a pixel passes as it came, exactly: a sum that must cancel to nothing is never quite nothing,
  and sharp pictures without noise lost 9 dB to that. For the same reason a hundredth of the local
  brightness is taken off every correction: planes in focus gain 5 dB by that, others lose 0.05.

Planes enter in the network's range (`engine.scaling`), background near 0.
"""

from collections.abc import Sequence
from itertools import pairwise

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from engine.generators.base import Generator
from engine.tiles import round_up

FOLD = 2
SLOPE = 0.1
IGNORED = 0.01
"""Share of the brightest neighbour by which every correction is shortened."""
SMALLEST = 1e-4
"""In the network's range: keeps 0 / 0 out, in FP16 too, and lies far below any structure."""


class Block(nn.Module):
    """Two 3 × 3 convolutions around a leaky rectifier, added to the input."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.first = nn.Conv2d(width, width, 3, padding=1, bias=False)
        self.second = nn.Conv2d(width, width, 3, padding=1, bias=False)
        with torch.no_grad():
            self.second.weight *= 0.3  # near identity: without norms a deep stack would blow up

    def forward(self, x: Tensor) -> Tensor:
        y: Tensor = self.second(F.leaky_relu(self.first(x), SLOPE))
        return x + y


class Light(Generator):
    """*widths*: channels of each level; *bottom_blocks*: residual blocks on the last."""

    def __init__(self, widths: Sequence[int] = (16, 40, 80, 120), bottom_blocks: int = 2) -> None:
        super().__init__()
        self.arguments = {"widths": list(widths), "bottom_blocks": bottom_blocks}
        self.bottom_blocks = bottom_blocks
        pairs = list(pairwise(widths))
        self.stride = FOLD << len(pairs)
        self.head = nn.Conv2d(FOLD**2, widths[0], 3, padding=1, bias=False)
        self.encode = nn.ModuleList(Block(w) for w in widths[:-1])
        self.down = nn.ModuleList(nn.Conv2d(a, b, 2, stride=2, bias=False) for a, b in pairs)
        self.bottom = nn.Sequential(*(Block(widths[-1]) for _ in range(bottom_blocks)))
        self.up = nn.ModuleList(nn.Conv2d(b, 4 * a, 1, bias=False) for a, b in pairs)
        self.decode = nn.ModuleList(Block(w) for w in widths[:-1])
        self.tail = nn.Conv2d(widths[0], FOLD**2, 3, padding=1, bias=False)
        self.permit = nn.Conv2d(widths[0], FOLD**2, 3, padding=1, bias=False)
        nn.init.zeros_(self.tail.weight)
        nn.init.constant_(self.permit.weight, 1 / widths[0])  # at first all is permitted

    def forward(self, x: Tensor) -> Tensor:
        h = self.head(F.pixel_unshuffle(x, FOLD))  # (n, 16, y/2, x/2)
        skips = []
        for encode, down in zip(self.encode, self.down, strict=True):
            skips.append(encode(h))  # (n, 16, y/2, x/2), (n, 40, y/4, x/4), (n, 80, y/8, x/8)
            h = down(skips[-1])
        h = self.bottom(h)  # (n, 120, y/16, x/16)
        for up, decode in zip(reversed(self.up), reversed(self.decode), strict=True):
            h = decode(skips.pop() + F.pixel_shuffle(up(h), 2))
        wish, permit = self.tail(h), F.relu(self.permit(h.abs()))  # (n, 4, y/2, x/2) each
        correction = wish * (permit / (permit + wish.abs() + SMALLEST))  # ratio first: fits FP16
        correction = F.pixel_shuffle(correction, FOLD)  # (n, 1, y, x)
        ignored = IGNORED * F.max_pool2d(x.abs(), 3, stride=1, padding=1)
        # Detached: the gradient must see small corrections, or none would ever grow from zero.
        return x + correction - torch.clamp(correction, -ignored, ignored).detach()

    def reach_px(self) -> int:
        """Walks the 3 × 3 convolutions: each looks one sample of its level further.

        A level's sample is twice the side of the one above. Folding, the 2 × 2 steps down and the
        way up add the side of one bottom sample at most.
        """
        sides_px = [FOLD << level for level in range(len(self.encode))]
        both_blocks = sum(2 * 2 * side for side in sides_px)
        head_and_tail = 2 * FOLD
        bottom = 2 * self.bottom_blocks * self.stride
        reach = head_and_tail + both_blocks + bottom + self.stride
        return round_up(reach, self.stride)
