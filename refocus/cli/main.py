"""`refocus`: parse, run one command, turn what it raises into one line and an exit code.

Exit codes: 0 ok, 1 findings or lost frames, 2 usage or settings, 3 the disk is too full,
4 locked by another writer, 130 interrupted, 141 nobody reads the output any more (`| head`).

Python waits at its end for every thread. Where Micro-Manager has left one that never ends
(`StuckError`), the process leaves without waiting; all files are closed by then.
"""

import argparse
import logging
import os
import sys
import threading
from collections.abc import Sequence
from importlib.metadata import version

from refocus.cli import (
    apply,
    bench,
    build,
    convert,
    demo,
    doctor,
    fill,
    keys,
    models,
    options,
    runs,
    train,
    worker,
)
from refocus.errors import RefocusError, StuckError
from refocus.settings import user_config_path

NOBODY_READS = 141
"""What a shell says of a program that SIGPIPE ended."""
DESCRIPTION = "Refocuses microscope frames while the acquisition runs, beside Micro-Manager."
EPILOG = f"""\
Settings are read from --config FILE, ./config.toml, or {user_config_path()}, whichever comes first.
Exit codes: 0 ok, 1 something is wrong or not done, 2 usage or settings, 3 the disk is too full,
4 the run has another writer, 130 interrupted, 141 nobody reads the output any more.
"""


def main(argv: Sequence[str] | None = None) -> int:
    """Runs the command line; returns the exit code."""
    logging.basicConfig(format="refocus: %(message)s", level=logging.WARNING)
    parser = argparse.ArgumentParser(prog="refocus", description=DESCRIPTION, epilog=EPILOG)
    parser.add_argument("--version", action="version", version=f"refocus {version('refocus')}")
    subparsers = parser.add_subparsers(title="commands", metavar="COMMAND", required=True)
    for group in (
        demo,
        runs,
        fill,
        convert,
        apply,
        bench,
        models,
        keys,
        worker,
        doctor,
        build,
        train,
    ):
        group.register(subparsers)
    arguments = parser.parse_args(argv)
    try:
        code = int(arguments.run(arguments))
        sys.stdout.flush()  # here, where it can still be told that nobody reads it
        return code
    except RefocusError as error:
        print(f"refocus: {error}", file=sys.stderr)
        if isinstance(error, StuckError) and _threads_left():
            sys.stdout.flush()
            sys.stderr.flush()
            os._exit(error.exit_code)
        return error.exit_code
    except KeyboardInterrupt:
        print("refocus: interrupted", file=sys.stderr)
        return options.INTERRUPTED
    except BrokenPipeError:
        # What is left in the buffer would be tried again, and complained of, when Python ends.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return NOBODY_READS


def _threads_left() -> bool:
    main_thread = threading.main_thread()
    return any(t is not main_thread and not t.daemon for t in threading.enumerate())


if __name__ == "__main__":
    sys.exit(main())
