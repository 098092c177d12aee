"""Tests that need an NVIDIA GPU: `pytest -m gpu`. Without one, each is skipped and says why."""

from collections.abc import Iterator

import pytest

from benchmarks.on_gpu.nvml import Nvml
from engine.gpu import Device, NoGpuError, open_gpu
from engine.plan import open_toolkit, rtx_capability
from engine.runtimes.tensorrt import TensorRt
from refocus.errors import SettingsError


@pytest.fixture(scope="session")
def device() -> Device:
    """The first GPU."""
    try:
        with open_gpu() as gpu:
            return gpu.device
    except NoGpuError as error:
        pytest.skip(str(error))


@pytest.fixture(scope="session")
def takes_plans(device: Device) -> None:
    """The installed TensorRT takes this GPU."""
    try:
        toolkit = open_toolkit()
        if toolkit.is_rtx:
            rtx_capability(toolkit, device.capability)
    except SettingsError as error:
        pytest.skip(str(error))


@pytest.fixture
def nvml(device: Device) -> Nvml:
    """What the driver counts for that GPU."""
    return Nvml(device.uuid)


@pytest.fixture
def runtime(takes_plans: None) -> Iterator[TensorRt]:
    """The real runtime on the real GPU."""
    opened = TensorRt()
    yield opened
    opened.close()
