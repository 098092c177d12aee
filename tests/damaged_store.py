"""What happens to the generators on a disk: a bit flips, a network drive goes away."""

import errno
import os
from pathlib import Path
from typing import Any

import pytest


def flip_a_bit(path: Path, within: bytes) -> None:
    """The text is no UTF-8 any more."""
    content = bytearray(path.read_bytes())
    content[content.index(within)] |= 0x80
    path.write_bytes(content)


def go_away(monkeypatch: pytest.MonkeyPatch, folder: Path) -> None:
    """Until it is undone *folder* cannot be listed, as when the server of its drive restarts."""
    real = os.scandir

    def scandir(path: Any = ".") -> Any:
        if Path(path) == folder:
            raise OSError(errno.ESTALE, os.strerror(errno.ESTALE), str(path))
        return real(path)

    monkeypatch.setattr(os, "scandir", scandir)
