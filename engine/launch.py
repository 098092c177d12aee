"""How a worker's process is started, and how soon again: by a recorder, or by `refocus worker`.

The worker's standard input is a pipe from the process that started it: when that dies, however it
dies, the pipe closes and the worker leaves.
"""

import os
import subprocess
import sys
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import IO

from refocus.settings import RuntimeChoice

FIRST_PAUSE_S = 0.5
LONGEST_PAUSE_S = 30.0
LIVED_S = 60.0
"""A worker that has lived for so long did not fail at its start."""


@dataclass(frozen=True, slots=True)
class Order:
    """What a worker is told on its command line."""

    address: str
    model: Path
    """Folder of the model package."""
    runtime: RuntimeChoice
    device: int
    threads: int
    beat_ms: int
    warm: tuple[int, int] | None
    """Frame shape (y, x) to compile for before it introduces itself."""
    key_file: Path | None = None
    """For a link on another host."""
    ready_ms: int = 0
    """How long it may compile before it ends itself; 0: somebody else watches that."""

    def arguments(self) -> list[str]:
        """Of `python -m engine.worker`."""
        arguments = [
            *("--address", self.address),
            *("--model", str(self.model)),
            *("--runtime", self.runtime),
            *("--device", str(self.device)),
            *("--threads", str(self.threads)),
            *("--beat-ms", str(self.beat_ms)),
            *("--ready-ms", str(self.ready_ms)),
        ]
        if self.warm is not None:
            arguments += ["--warm", f"{self.warm[0]}x{self.warm[1]}"]
        if self.key_file is not None:
            arguments += ["--keys", str(self.key_file)]
        return arguments


def start(
    order: Order,
    *,
    output: IO[bytes] | None = None,
    environment: Mapping[str, str] | None = None,
) -> "subprocess.Popen[bytes]":
    """A worker's process. *output*: for what it prints, None: where this process prints."""
    return subprocess.Popen(
        # -P: a folder called engine in the user's working directory must not be run instead.
        [sys.executable, "-P", "-m", "engine.worker", "--supervised", *order.arguments()],
        stdin=subprocess.PIPE,
        stdout=output,
        stderr=subprocess.STDOUT if output is not None else None,
        env=environment,
        # A Ctrl-C in the terminal is for this process alone; it ends the worker in order.
        start_new_session=os.name == "posix",
        creationflags=getattr(subprocess, "CREATE_NEW_PROCESS_GROUP", 0),
    )


class Pauses:
    """Before a worker is started again: 0.5 s to 30 s, anew once one has lived for a minute."""

    def __init__(self) -> None:
        self._next_s = FIRST_PAUSE_S

    def after(self, lived_s: float) -> float:
        """For how many seconds to wait after the death of a worker that has lived so long."""
        if lived_s > LIVED_S:
            self._next_s = FIRST_PAUSE_S
        pause_s, self._next_s = self._next_s, min(2 * self._next_s, LONGEST_PAUSE_S)
        return pause_s
