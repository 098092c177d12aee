"""Keeps one worker process alive beside the recorder, and stops trying when that is hopeless.

A worker may die at any time; it is started again after a pause that grows from 0.5 s to 30 s, and
back to 0.5 s once one has lived for a minute. Five deaths within a minute mean that something is
wrong which a restart does not mend, and so does exit code 2 (a setting, a model package): recording
goes on raw only, and that is said.

The worker's standard input is a pipe from here: when this process dies, however it dies, the pipe
closes and the worker leaves. Its output goes to a log file, whose last lines explain a death.
"""

import contextlib
import logging
import os
import subprocess
import sys
import threading
import time
from collections import deque
from collections.abc import Callable
from pathlib import Path

from refocus import wire
from refocus.settings import Settings

log = logging.getLogger(__name__)

FIRST_PAUSE_S = 0.5
LONGEST_PAUSE_S = 30.0
LIVED_S = 60.0
MOST_DEATHS = 5
CANNOT_START = 2
"""Exit code of a worker that would fail again: wrong settings, unusable model package."""
STOP_S = 1.5
"""How long a worker that was asked to stop may take before it is killed."""


class Supervisor:
    """Starts `python -m engine.worker` and restarts it; *on_event(kind, fields)* hears of it."""

    def __init__(
        self,
        arguments: list[str],
        secret: str,
        log_path: Path,
        on_event: Callable[[str, dict[str, object]], None],
    ) -> None:
        self._command = [sys.executable, "-P", "-m", "engine.worker", *arguments]
        # -P: a folder called engine in the user's working directory must not be run instead
        # Through the environment, because a command line can be read by every user of the machine.
        self._environment = {**os.environ, wire.SECRET_VARIABLE: secret}
        self._log_path = log_path
        self._on_event = on_event
        self._stopping = threading.Event()
        self._lock = threading.Lock()
        self._process: subprocess.Popen[bytes] | None = None
        self.gave_up = threading.Event()
        self._thread = threading.Thread(target=self._run, name="refocus-supervisor")
        self._thread.start()

    @property
    def pid(self) -> int | None:
        """Process id of the worker, None while there is none."""
        process = self._process
        return process.pid if process is not None and process.poll() is None else None

    def kill(self, pid: int, reason: str) -> None:
        """Kills the worker if *pid* is still ours (a stopped process dies of it too)."""
        with self._lock:
            if self._process is not None and self._process.pid == pid:
                log.warning("killing worker %d: %s", pid, reason)
                self._process.kill()

    def close(self) -> None:
        """Stops the worker: end of its input, then a short wait, then kill. No process is left."""
        self._stopping.set()
        with self._lock:
            if self._process is not None and self._process.stdin is not None:
                with contextlib.suppress(OSError):
                    self._process.stdin.close()
        self._thread.join()

    def _run(self) -> None:
        deaths: deque[float] = deque(maxlen=MOST_DEATHS)
        pause_s = FIRST_PAUSE_S
        while not self._stopping.is_set():
            started = time.monotonic()
            code = self._one_life()
            if self._stopping.is_set():
                return
            now = time.monotonic()
            deaths.append(now)
            self._on_event("worker_died", {"exit_code": code, "last_words": self._last_words()})
            hopeless = len(deaths) == MOST_DEATHS and now - deaths[0] < LIVED_S
            if hopeless or code == CANNOT_START:
                self.gave_up.set()
                self._on_event("worker_given_up", {"last_words": self._last_words()})
                return
            if now - started > LIVED_S:
                pause_s = FIRST_PAUSE_S
            self._stopping.wait(pause_s)
            pause_s = min(2 * pause_s, LONGEST_PAUSE_S)

    def _one_life(self) -> int:
        """Runs one worker to its end; returns its exit code (negative: the signal)."""
        with self._log_path.open("ab") as output:
            process = subprocess.Popen(
                self._command,
                stdin=subprocess.PIPE,
                stdout=output,
                stderr=subprocess.STDOUT,
                env=self._environment,
                # A Ctrl-C in the terminal is for the recorder alone; it ends the worker in order.
                start_new_session=os.name == "posix",
                creationflags=getattr(subprocess, "CREATE_NEW_PROCESS_GROUP", 0),
            )
        with self._lock:
            self._process = process
        self._on_event("worker_started", {"pid": process.pid})
        while process.poll() is None and not self._stopping.wait(0.05):
            pass
        if process.poll() is None:
            with contextlib.suppress(OSError):
                process.stdin.close()  # type: ignore[union-attr]
            try:
                process.wait(STOP_S)
            except subprocess.TimeoutExpired:
                process.kill()
        code = process.wait()
        with self._lock:
            self._process = None
        with contextlib.suppress(OSError):
            process.stdin.close()  # type: ignore[union-attr]
        return code

    def _last_words(self) -> str:
        with contextlib.suppress(OSError):
            lines = self._log_path.read_text(errors="replace").strip().splitlines()
            return " | ".join(lines[-3:])[-500:]
        return ""


def worker_arguments(
    address: str, model: Path, settings: Settings, warm: tuple[int, int] | None
) -> list[str]:
    """Command line of `python -m engine.worker`; *warm*: a shape (y, x) to compile before HELLO."""
    arguments = [
        *("--address", address),
        *("--model", str(model)),
        *("--runtime", settings.engine.runtime),
        *("--threads", str(settings.engine.threads)),
        *("--beat-ms", str(settings.link.beat_ms)),
    ]
    if warm is not None:
        arguments += ["--warm", f"{warm[0]}x{warm[1]}"]
    return arguments
