"""Keeps one worker process alive beside the recorder, and stops trying when that is hopeless.

A worker may die at any time; it is started again after a pause that grows from 0.5 s to 30 s, and
back to 0.5 s once one has lived for a minute. Five deaths within a minute mean that something is
wrong which a restart does not mend, and so does exit code 2 (a setting, a model package): recording
goes on raw only, and that is said.

How it is started, and how soon again, is engine/launch.py. Its output goes to a log file, whose
last lines explain a death.
"""

import contextlib
import logging
import os
import subprocess
import threading
import time
from collections import deque
from collections.abc import Callable
from pathlib import Path
from typing import IO

from engine import launch
from engine.launch import LIVED_S, Order, Pauses
from refocus import wire

log = logging.getLogger(__name__)

MOST_DEATHS = 5
POLL_S = 0.05
CANNOT_BE_KILLED = -1000
CANNOT_START = 2
"""Exit code of a worker that would fail again: wrong settings, unusable model package."""
LEAVE_S = 0.5
"""How long a worker that the link has told to leave may take before its input is closed."""
STOP_S = 1.5
"""How long a worker whose input was closed may take before it is killed."""


class Supervisor:
    """Keeps a worker running as *order* says, between `start` and `close`.

    *on_event(kind, fields)* hears of it, from the supervisor's thread. *hello_within_s*: how long
    the worker may compile before it introduces itself. What it prints is added to *log_path*.
    """

    def __init__(
        self,
        order: Order,
        secret: str,
        log_path: Path,
        hello_within_s: float,
        on_event: Callable[[str, dict[str, object]], None],
    ) -> None:
        self._order = order
        # Through the environment, because a command line can be read by every user of the machine.
        self._environment = {**os.environ, wire.SECRET_VARIABLE: secret}
        self._log_path = log_path
        self._hello_within_s = hello_within_s
        self._on_event = on_event
        self._stopping = threading.Event()
        self._retired = False
        self._lock = threading.Lock()
        self._process: subprocess.Popen[bytes] | None = None
        self._introduced = 0
        self._log_from = 0
        self.gave_up = threading.Event()
        """No worker runs and none will be started any more."""
        self._thread = threading.Thread(target=self._run, name="refocus-supervisor")

    def start(self) -> None:
        """Starts the worker; to be called once, before anything else."""
        self._thread.start()

    @property
    def pid(self) -> int | None:
        """Process id of the worker, None while there is none."""
        process = self._process
        return process.pid if process is not None and process.poll() is None else None

    @property
    def is_introduced(self) -> bool:
        """The worker that runs now has said HELLO."""
        return self._introduced != 0 and self.pid == self._introduced

    def introduced(self, pid: int) -> None:
        """If *pid* is ours: it has said HELLO to the link, which watches it from now on."""
        if self.pid == pid:
            self._introduced = pid

    def kill(self, pid: int, reason: str) -> None:
        """Kills the worker if *pid* is still ours (a stopped process dies of it too)."""
        with self._lock:
            if self._process is not None and self._process.pid == pid:
                log.warning("killing worker %d: %s", pid, reason)
                self._process.kill()

    def retire(self) -> None:
        """From now on a worker that ends is not started again, and its end is no death."""
        self._retired = True

    def stop(self) -> None:
        """Begins to end the worker, and returns at once."""
        self._stopping.set()

    def close(self) -> None:
        """Ends the worker: its input is closed, then it is killed. Returns within seconds."""
        self.stop()
        self._thread.join()

    def _run(self) -> None:
        try:
            self._keep_alive()
        except Exception as error:  # noqa: BLE001 - no process, no log: recording must go on
            self._give_up(f"it cannot be started: {error}")

    def _keep_alive(self) -> None:
        deaths: deque[float] = deque(maxlen=MOST_DEATHS)
        pauses = Pauses()
        while not (self._stopping.is_set() or self._retired):
            started = time.monotonic()
            code = self._one_life()
            if self._stopping.is_set() or self._retired:
                return
            now = time.monotonic()
            deaths.append(now)
            self._on_event("worker_died", {"exit_code": code, "last_words": self._last_words()})
            hopeless = len(deaths) == MOST_DEATHS and now - deaths[0] < LIVED_S
            if hopeless or code in (CANNOT_START, CANNOT_BE_KILLED):
                self._give_up(self._last_words())
                return
            self._stopping.wait(pauses.after(now - started))

    def _give_up(self, reason: str) -> None:
        self.gave_up.set()
        self._on_event("worker_given_up", {"reason": reason or "it left without a word"})

    def _one_life(self) -> int:
        """Runs one worker to its end; returns its exit code (negative: the signal)."""
        with self._log_path.open("ab") as output:
            self._log_from = output.tell()
            process = launch.start(self._order, output=output, environment=self._environment)
        assert process.stdin is not None
        with self._lock:
            self._process = process
        self._on_event("worker_started", {"pid": process.pid})
        started = time.monotonic()
        while process.poll() is None and not self._stopping.wait(POLL_S):
            mute = self._introduced != process.pid
            if mute and time.monotonic() - started > self._hello_within_s:
                self.kill(process.pid, f"no word of it within {self._hello_within_s:g} s")
                break
        code = self._end(process, process.stdin)
        with self._lock:
            self._process = None
        return code

    def _end(self, process: "subprocess.Popen[bytes]", its_input: IO[bytes]) -> int:
        with contextlib.suppress(subprocess.TimeoutExpired):
            process.wait(LEAVE_S if self.is_introduced else 0)
        with contextlib.suppress(OSError):
            its_input.close()
        try:
            return process.wait(STOP_S)
        except subprocess.TimeoutExpired:
            process.kill()
        try:
            return process.wait(STOP_S)
        except subprocess.TimeoutExpired:  # deep in a driver: it dies when the driver lets go
            log.warning("worker %d cannot be killed; it is left to the system", process.pid)
            return CANNOT_BE_KILLED

    def _last_words(self) -> str:
        with contextlib.suppress(OSError):
            said = self._log_path.read_bytes()[self._log_from :].decode(errors="replace")
            return " | ".join(said.strip().splitlines()[-3:])[-500:]
        return ""
