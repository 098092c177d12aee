"""The real worker with a runtime of the benchmark's: python worker.py KIND WORKER-ARGUMENTS."""

import argparse
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[2]))

from benchmarks.wire import Echo
from engine import worker
from engine.runtimes import Runtime


def open_runtime(kind: str) -> Runtime:
    """What stands under that name in benchmarks/on_gpu/wire.py."""
    if kind == "echo":
        return Echo()
    if kind == "tensorrt":
        from engine.runtimes import open_runtime

        return open_runtime("tensorrt")
    from benchmarks.on_gpu.standin import StandIn

    return StandIn(kind == "seam")


if __name__ == "__main__":

    def given(arguments: argparse.Namespace) -> Runtime:
        """Whatever runtime the worker was asked for, it gets ours."""
        return open_runtime(sys.argv[1])

    sys.exit(worker.main(sys.argv[2:], given))
