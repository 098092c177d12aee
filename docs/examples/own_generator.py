"""A network of your own as a model package: python own_generator.py FOLDER

What is here is a sharpening filter, so that the example needs no training; put your network and
its trained weights in its place. Afterwards:

    refocus apply image.tif --out refocused --generator FOLDER
    refocus models use FOLDER
"""

import sys
from datetime import UTC, datetime
from pathlib import Path

import numpy as np
from torch import Tensor, nn

from engine.generators import Generator
from engine.package import Manifest, Training, write
from engine.packing import pack


class Sharpen(Generator):
    """Adds what a 3 x 3 mean takes away: (n, 1, y, x) to the same shape."""

    stride = 1  # any height and width will do

    def __init__(self, strength: float = 0.5) -> None:
        super().__init__()
        self.arguments = {"strength": strength}
        self.mean = nn.Conv2d(1, 1, 3, padding=1, bias=False)
        nn.init.constant_(self.mean.weight, 1 / 9)
        self.strength = strength

    def forward(self, x: Tensor) -> Tensor:
        return x + self.strength * (x - self.mean(x))

    def reach_px(self) -> int:
        return 1  # a pixel of the answer looks one pixel far


def main(folder: Path) -> None:
    """Write the package."""
    network = Sharpen()  # network.load_state_dict(torch.load(..., weights_only=True))
    manifest = Manifest(
        name="sharpen",
        version="1.0",
        architecture="sharpen",  # your name for it: only training looks it up
        arguments=network.arguments,
        stride=network.stride,
        halo_px=network.reach_px(),  # None: it looks at the whole plane and cannot be tiled
        modality="fluorescence",
        pixel_um=(0.05, 2.0),  # frames of other pixel sizes are rejected
        defocus_um=(0.0, 0.0),
        defocus_dof=(0.0, 0.0),
        training=Training(command="none: a fixed filter", files=()),
        created=datetime.now(UTC).isoformat(timespec="seconds"),
    )
    # Golden planes: yours are better. Every GPU has to answer them as PyTorch does here.
    planes = [np.random.default_rng(0).poisson(400, (128, 128)).astype(np.uint16)]
    package = write(folder, manifest, pack(network, planes))
    print(f"{package.manifest.name} {package.manifest.version} ({package.hash[:12]}) in {folder}")


if __name__ == "__main__":
    main(Path(sys.argv[1]))
