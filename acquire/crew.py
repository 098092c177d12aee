"""The workers of one generator on this computer: one process a GPU, each kept alive by itself.

They share the frames over the link, and which of them made a plane makes no difference to the run.
A crew is ready once each of its workers has introduced itself or was given up, and one is there;
it is hopeless once all were given up. Without a seat it is always ready: then all workers are on
other hosts.
"""

import functools
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import NamedTuple

from acquire.supervisor import Supervisor
from engine.launch import Order
from engine.package import Package
from refocus.settings import RuntimeChoice, Settings

OnEvent = Callable[["Crew", str, dict[str, object]], None]
"""Called from any thread with what the journal keeps: a kind of event and its fields."""


class Seat(NamedTuple):
    """Where a worker computes, and with which runtime."""

    device: int
    runtime: RuntimeChoice


def seats(settings: Settings) -> list[Seat]:
    """One a GPU; one in all where the runtime is the CPU's.

    With several GPUs and runtime auto the first worker may fall back on the CPU. The others may
    not: they would only take its cores from it.
    """
    runtime, devices = settings.engine.runtime, settings.engine.devices
    if runtime == "openvino":
        return [Seat(device, runtime) for device in devices[:1]]
    return [
        Seat(device, "tensorrt" if number else runtime) for number, device in enumerate(devices)
    ]


class Crew:
    """Workers that run *package*, one a seat, and find their link at *address* with *secret*.

    *warm*: a frame shape (y, x) that they compile for before they introduce themselves.
    *logs*: folder for what they print. `start` starts them, `close` ends them.
    """

    def __init__(
        self,
        package: Package,
        settings: Settings,
        where: Sequence[Seat],
        *,
        address: str,
        secret: str,
        warm: tuple[int, int] | None,
        logs: Path,
        on_event: OnEvent,
    ) -> None:
        self.package = package
        self._on_event = on_event
        self.given_up: dict[int, str] = {}
        """Why there is no worker on a device, of those that were given up."""
        self._workers = [
            Supervisor(
                Order(
                    address=address,
                    model=package.folder,
                    runtime=seat.runtime,
                    device=seat.device,
                    threads=settings.engine.threads,
                    beat_ms=settings.link.beat_ms,
                    warm=warm,
                ),
                secret,
                logs / f"worker-{package.hash[:8]}-{seat.device}.log",
                settings.engine.warmup_timeout_ms / 1000,
                functools.partial(self._heard, seat.device),
            )
            for seat in where
        ]

    def start(self) -> None:
        """Starts the workers."""
        for worker in self._workers:
            worker.start()

    @property
    def pids(self) -> list[int]:
        """Process ids of the workers that run now."""
        return [pid for worker in self._workers if (pid := worker.pid) is not None]

    @property
    def ready(self) -> bool:
        """Nothing more is gained by waiting: who can has introduced itself."""
        left = [worker for worker in self._workers if not worker.gave_up.is_set()]
        return not self.hopeless and all(worker.is_introduced for worker in left)

    @property
    def hopeless(self) -> bool:
        """It had workers; none runs and none will be started any more."""
        return bool(self._workers) and all(worker.gave_up.is_set() for worker in self._workers)

    def introduced(self, pid: int) -> None:
        """The worker has said HELLO to the link, which watches it from now on."""
        for worker in self._workers:
            worker.introduced(pid)

    def kill(self, pid: int, reason: str) -> None:
        """Kills that worker if it is one of the crew."""
        for worker in self._workers:
            worker.kill(pid, reason)

    def retire(self) -> None:
        """Workers that leave from now on are not replaced."""
        for worker in self._workers:
            worker.retire()

    def close(self) -> None:
        """Ends the workers: those that were told to leave may, the others are killed."""
        for worker in self._workers:
            worker.stop()
        for worker in self._workers:
            worker.close()

    def _heard(self, device: int, kind: str, fields: dict[str, object]) -> None:
        if kind == "worker_given_up":
            self.given_up[device] = str(fields["reason"])
        self._on_event(self, kind, {"device": device, **fields})
