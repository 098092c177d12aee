"""Files of ours that appear whole and durable, or not at all.

Content is written beside its place, synced, and moved there. A kill leaves a hidden file whose name
ends in PARTIAL, which nothing reads and whoever owns the folder sweeps.
"""

import os
import sys
import tempfile
from pathlib import Path

PARTIAL = ".partial"


def write_whole(path: Path, content: bytes) -> None:
    """Put *content* at *path*, in place of what is there; readable by us alone. Raises OSError."""
    partial = write_partial(path, content)
    try:
        partial.replace(path)
    except OSError:
        partial.unlink(missing_ok=True)
        raise
    sync_folder(path.parent)


def write_partial(path: Path, content: bytes) -> Path:
    """A durable file with *content* beside *path*, to be moved there; readable by us alone."""
    descriptor, name = tempfile.mkstemp(PARTIAL, f".{path.name}.", path.parent)
    try:
        with os.fdopen(descriptor, "wb") as file:
            file.write(content)
            file.flush()
            os.fsync(descriptor)
    except BaseException:
        Path(name).unlink(missing_ok=True)
        raise
    return Path(name)


def sync_folder(folder: Path) -> None:
    """What was moved into *folder* survives a power cut. Windows has no such call."""
    if sys.platform != "win32":
        descriptor = os.open(folder, os.O_RDONLY)
        try:
            os.fsync(descriptor)
        finally:
            os.close(descriptor)
