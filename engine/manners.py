"""How a worker behaves as a process: it comes second, leaves with its parent, and never hangs."""

import contextlib
import ctypes
import os
import signal
import sys
import threading

import psutil


def step_back() -> None:
    """Below normal priority, for this process alone."""
    with contextlib.suppress(psutil.AccessDenied, OSError):
        nice = 10  # of POSIX; Windows has priority classes instead
        psutil.Process().nice(getattr(psutil, "BELOW_NORMAL_PRIORITY_CLASS", nice))


def leave_with_parent() -> None:
    """Ends this process when the one that started it is gone, even if our work thread hangs."""
    if sys.platform == "linux":
        pr_set_pdeathsig = 1
        ctypes.CDLL(None).prctl(pr_set_pdeathsig, signal.SIGKILL)

    def watch() -> None:
        while os.read(0, 1024):  # empty when the pipe closes
            pass
        os._exit(0)

    threading.Thread(target=watch, name="refocus-parent", daemon=True).start()


class Patience:
    """Ends this process where it gets ready for longer than *limit_s*; 0: it may take for ever."""

    def __init__(self, limit_s: float = 0) -> None:
        self._limit_s = limit_s
        self._timer: threading.Timer | None = None

    def begin(self) -> None:
        """From here it gets ready."""
        if self._limit_s:
            self._timer = threading.Timer(self._limit_s, self._lose)
            self._timer.daemon = True
            self._timer.start()

    def end(self) -> None:
        """It is ready."""
        if self._timer is not None:
            self._timer.cancel()

    def _lose(self) -> None:
        say(f"not ready within {self._limit_s:g} s ([engine] warmup_timeout_ms): it hangs")
        os._exit(1)


def say(line: str) -> None:
    print(f"worker: {line}", file=sys.stderr, flush=True)
