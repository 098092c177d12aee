"""Where TensorRT refuses the GPU: PyTorch in its place, in the very same slots.

The way around the network is the product's own, engine/runtimes/slot.py over engine/gpu: pinned
buffers, uploads, kernels, one captured graph a plane, downloads, two slots. Only the network is
PyTorch's, FP16, channels_last, captured with the rest. What is measured with it says what seam,
slots and wire can do, and nothing about TensorRT; every line that it makes says so.

With *nothing* as its network it shows the seam alone: the plane comes back as it went.
"""

from collections import deque
from collections.abc import Callable
from typing import Any

import torch
from safetensors.torch import load_file
from torch import Tensor, nn

from engine import generators
from engine.gpu import open_gpu
from engine.package import WEIGHTS, Package
from engine.runtimes import Answer, Refocused
from engine.runtimes.slot import Slot
from engine.scaling import Scaling
from refocus.errors import EngineError
from refocus.frame import Pixels

SLOTS = 2


class StandIn:
    """The runtime protocol of engine/runtimes, for a benchmark alone."""

    slots = SLOTS

    def __init__(self, nothing: bool = False) -> None:
        self._nothing = nothing
        self._gpu = open_gpu()
        self._loaded: tuple[str, tuple[int, int]] | None = None
        self._slots: deque[Slot] = deque()

    @property
    def name(self) -> str:
        network = "no network" if self._nothing else "torch fp16 channels_last (stand-in)"
        return f"{network}, {self._gpu.device.name}, {self._gpu.seam}"

    def load(self, package: Package, shape: tuple[int, int]) -> None:
        if self._loaded == (package.hash, shape):
            return
        self._drop()
        networks = _Networks(None if self._nothing else network_of(package))
        stride = package.manifest.stride
        padded = (-(-shape[0] // stride) * stride, -(-shape[1] // stride) * stride)
        for _ in range(SLOTS):
            self._slots.append(Slot(self._gpu, networks, shape, padded))
            self._slots[-1].allocate()
        self._loaded = (package.hash, shape)

    def start(self, pixels: Pixels, scaling: Scaling) -> Answer:
        if not self._slots:
            raise EngineError("call load first")
        slot = self._slots[0]
        self._slots.rotate(-1)
        slot.start(pixels, scaling)
        return slot.finish

    def refocus(self, pixels: Pixels, scaling: Scaling) -> Refocused:
        return self.start(pixels, scaling)()

    def bare(self, package: Package, shape: tuple[int, int]) -> Callable[[], None]:
        self.load(package, shape)
        return self._slots[0].run_network

    def close(self) -> None:
        self._drop()
        self._gpu.close()

    def _drop(self) -> None:
        while self._slots:
            self._slots.pop().close()


def network_of(package: Package) -> nn.Module:
    """The package's generator on the GPU, FP16, channels_last."""
    manifest = package.manifest
    network = generators.build(manifest.architecture, manifest.arguments)
    network.load_state_dict(load_file(package.folder / WEIGHTS))
    torch.backends.cudnn.benchmark = True  # the first run of a shape tries what is fastest
    network.half().eval().cuda()
    for parameter in network.parameters():
        if parameter.ndim == 4:
            parameter.data = parameter.data.contiguous(memory_format=torch.channels_last)
    return network


class _Networks:
    """Makes contexts as engine/runtimes/executable.py does."""

    def __init__(self, network: nn.Module | None) -> None:
        self._network = network

    def context(self, padded: tuple[int, int], stream: int) -> "_Context":
        return _Context(self._network, padded)


class _Context:
    """One network on one pair of buffers."""

    memory_bytes = 0  # PyTorch takes its own, while it runs for the first time

    def __init__(self, network: nn.Module | None, padded: tuple[int, int]) -> None:
        self._network = network
        self._padded = padded

    def bind(self, network: int, answer: int, memory: int) -> None:
        self._input, self._output = (_tensor(at, self._padded) for at in (network, answer))

    def enqueue(self, stream: int) -> None:
        ours = torch.cuda.ExternalStream(stream)  # type: ignore[no-untyped-call]
        with torch.inference_mode(), torch.cuda.stream(ours):
            if self._network is None:
                self._output.copy_(self._input)
                return
            half = self._input.half().contiguous(memory_format=torch.channels_last)
            self._output.copy_(self._network(half))

    def is_capturable(self, stream: int) -> bool:
        return True

    def close(self) -> None:
        self._network = None


def _tensor(address: int, shape: tuple[int, int]) -> Tensor:
    """float32 at an address on the GPU as (1, 1, y, x)."""

    class Memory:
        __cuda_array_interface__: dict[str, Any] = {  # noqa: RUF012 - the protocol's own name
            "shape": (1, 1, *shape),
            "typestr": "<f4",
            "data": (address, False),
            "version": 3,
        }

    return torch.as_tensor(Memory(), device="cuda")
