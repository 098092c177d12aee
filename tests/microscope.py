"""Runs functions of a test module against a real Micro-Manager core, each in its own process.

Micro-Manager's acquisition engine is a singleton that survives in its process, and when it hangs,
its threads cannot be ended; so every function gets a fresh interpreter, a deadline with all
tracebacks, and a look at what it leaves behind. `run_in_core(function, *args)` returns what the
function returned (through JSON) or fails with the child's own output.

In the child warnings are errors, an exception on any thread fails the test, no thread may be left
at the end, and the interpreter must come down by itself with exit code 0.
"""

import faulthandler
import importlib
import inspect
import json
import os
import subprocess
import sys
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from acquire.sources.demo import start_core, stop_core

REPOSITORY = Path(__file__).parents[1]
SEQUENCE_TESTER = Path(__file__).with_name("sequence_tester.cfg")


def run_in_core(function: Callable[..., Any], *args: Any, timeout_s: float = 60.0) -> Any:
    """Result of *function(*args)* in a fresh process; arguments and result go through JSON."""
    module = Path(inspect.getfile(function))
    command = [sys.executable, "-W", "error", __file__, str(timeout_s), function.__name__]
    done = subprocess.run(
        [*command, module.stem, json.dumps(args)],
        cwd=REPOSITORY,
        env=os.environ | {"PYTHONPATH": os.pathsep.join(sys.path)},
        capture_output=True,
        text=True,
        timeout=timeout_s + 10,
        check=False,
    )
    lines = done.stdout.splitlines()
    assert done.returncode == 0, (
        f"{function.__name__} ended with exit code {done.returncode}\n"
        f"--- stdout\n{done.stdout[-4000:]}\n--- stderr\n{done.stderr[-8000:]}"
    )
    return json.loads(lines[-1])


@contextmanager
def sequence_tester() -> Iterator[Any]:
    """Micro-Manager's core with the camera that writes all devices' states into its pixels."""
    core = start_core(SEQUENCE_TESTER, buffer_mib=16)
    try:
        yield core
    finally:
        stop_core()


def _child(timeout_s: str, name: str, module: str, args: str) -> None:
    faulthandler.dump_traceback_later(float(timeout_s), exit=True)
    raised: list[str] = []
    threading.excepthook = lambda hook: raised.append(f"{hook.thread}: {hook.exc_value!r}")
    result = getattr(importlib.import_module(module), name)(*json.loads(args))
    left = [t.name for t in threading.enumerate() if t is not threading.main_thread()]
    assert not left, f"threads left behind: {left}"
    assert not raised, f"exceptions on other threads: {raised}"
    print("\n" + json.dumps(result))


if __name__ == "__main__":
    _child(*sys.argv[1:])
