"""Words that several commands share: numbers of things, long lists told in few words."""

from collections.abc import Sequence

TOLD = 8
"""Things of one kind that are told one by one."""


def counted(number: int, thing: str) -> str:
    """ "1 plane", "2 planes"."""
    return f"{number} {thing}" if number == 1 else f"{number} {thing}s"


def few(words: Sequence[str]) -> list[str]:
    """At most TOLD of them, and how many more there are."""
    more = len(words) - TOLD
    return [*words[:TOLD], f"and {more} more"] if more > 0 else list(words)


def frames(seqs: Sequence[int]) -> str:
    """ "frame 3", "frames 3, 4", "frames 0, 1, 2, 3, 4, 5, 6, 7 and 92 more"."""
    names = ", ".join(map(str, seqs[:TOLD]))
    more = f" and {len(seqs) - TOLD} more" if len(seqs) > TOLD else ""
    return f"{'frame' if len(seqs) == 1 else 'frames'} {names}{more}"


def install(extra: str) -> str:
    """What to type for one of the extras in pyproject.toml.

    By the folder, not by name: on the public package index the name belongs to another project.
    """
    return f'pip install -e ".[{extra}]" in the folder of Refocus'
