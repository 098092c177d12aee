"""`refocus worker`: refocus for a recorder on another host.

Exit codes: 130 ended by Ctrl-C, 2 what no recorder can mend: a runtime that cannot be had, a model
package or a key that is damaged.
"""

import argparse
import sys
import threading
from pathlib import Path

from refocus.cli import options


def register(subparsers: "argparse._SubParsersAction[argparse.ArgumentParser]") -> None:
    """Describe the command."""
    parser = subparsers.add_parser(
        "worker",
        help="refocus for a recorder on another computer",
        description="Refocus on this computer, on its GPU if it has one, for a recorder on another "
        "one. Stays until Ctrl-C: it waits where no recorder runs, and serves the next one. "
        "`refocus keys --help` says how the two computers get to know each other.",
    )
    parser.add_argument(
        "--connect",
        metavar="tcp://HOST:PORT",
        required=True,
        help="the recorder's computer, and the port of its [link] address",
    )
    parser.add_argument(
        "--keys",
        type=Path,
        metavar="FILE",
        required=True,
        help="this worker's key, worker-NAME.key",
    )
    parser.add_argument(
        "--device", type=int, metavar="N", help="which GPU of this computer (default: settings)"
    )
    parser.add_argument(
        "--shape",
        type=options.frame_size,
        metavar="YxX",
        help="frame size in pixels to get ready for, before the first frame comes",
    )
    options.add_generator(parser)
    options.add_engine(parser)
    options.add_config(parser)
    parser.set_defaults(run=run)


def run(arguments: argparse.Namespace) -> int:
    """Serve until Ctrl-C."""
    from acquire.sources.acquisition import signals_set
    from engine import remote

    settings = options.settings(arguments)
    device = (
        next(iter(settings.engine.devices), 0) if arguments.device is None else arguments.device
    )
    service = remote.Service(arguments.connect, arguments.keys, settings, device, arguments.shape)
    stop = threading.Event()
    with signals_set(stop):
        remote.serve(service, stop, _say)
    return options.INTERRUPTED


def _say(line: str) -> None:
    print(f"worker: {line}", file=sys.stderr, flush=True)
