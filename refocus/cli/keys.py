"""`refocus keys`: which workers on other hosts a recorder lets in.

Exit codes: 0 ok, 2 the keys are there already, missing, damaged, or open to other users.
"""

import argparse
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    Subparsers = argparse._SubParsersAction[argparse.ArgumentParser]

DESCRIPTION = """\
Keys with which a recorder and its workers on other hosts know each other. All that travels between
them is encrypted, and neither takes the other's word without its key.

On the recorder's computer:
  1. refocus keys new FOLDER gpu-pc        a key set with one worker
  2. in its config.toml:                   [link]
                                           address = "tcp://0.0.0.0:5577"
                                           keys = "FOLDER"
  3. move FOLDER/worker-gpu-pc.key, and nothing else, to the worker's computer

On the worker's computer, where it has to stay readable for you alone (mode 0600):
  4. refocus worker --connect tcp://RECORDER:5577 --keys worker-gpu-pc.key

To take a worker's right away, on the recorder's computer:
     refocus keys remove FOLDER gpu-pc
A recorder that runs drops this worker within a second; its frames are refocused by others, or
later. Whoever has got hold of recorder.key can pose as the recorder: make a new set then.
"""


def register(subparsers: "Subparsers") -> None:
    """Describe the commands."""
    parser = subparsers.add_parser(
        "keys",
        help="let workers on other computers in, or take their right away",
        description=DESCRIPTION,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    verbs = parser.add_subparsers(title="commands", metavar="VERB", required=True)
    new = _verb(verbs, "new", "make a key set in a folder, for one recorder", _new)
    new.add_argument("names", metavar="NAME", nargs="*", help="a worker to add at once")
    add = _verb(verbs, "add", "let one more worker in", _add)
    add.add_argument("name", metavar="NAME", help="a name for it, as its host's")
    _verb(verbs, "list", "who is let in", _list)
    remove = _verb(verbs, "remove", "take a worker's right away", _remove)
    remove.add_argument("name", metavar="NAME", help="the worker")


def _verb(verbs: "Subparsers", name: str, what: str, run: object) -> argparse.ArgumentParser:
    parser = verbs.add_parser(name, help=what, description=f"{what[0].upper()}{what[1:]}.")
    parser.add_argument("folder", metavar="FOLDER", type=Path, help="where the key set is")
    parser.set_defaults(run=run)
    return parser


def _new(arguments: argparse.Namespace) -> int:
    from refocus import keys

    for name in arguments.names:
        keys.check_name(name)  # before anything is written
    keys.new(arguments.folder)
    print(
        f"{arguments.folder}: a new key set; {keys.RECORDER} stays here. "
        f'In config.toml: [link] keys = "{arguments.folder.resolve().as_posix()}"'
    )
    for name in arguments.names:
        _say_added(keys.add(arguments.folder, name), name)
    return 0


def _add(arguments: argparse.Namespace) -> int:
    from refocus import keys

    _say_added(keys.add(arguments.folder, arguments.name), arguments.name)
    return 0


def _say_added(file: Path, name: str) -> None:
    print(f"{name} may connect now; move {file} to its computer, which needs nothing else")


def _list(arguments: argparse.Namespace) -> int:
    from refocus import keys

    keys.read_recorder(arguments.folder)
    names = keys.names(arguments.folder)
    for name in names:
        waiting = (arguments.folder / f"worker-{name}.key").exists()
        print(f"{name}{'  (its secret is still here: move it to its computer)' * waiting}")
    if not names:
        print(f"nobody is let in; refocus keys add {arguments.folder} NAME lets a worker in")
    return 0


def _remove(arguments: argparse.Namespace) -> int:
    from refocus import keys

    keys.remove(arguments.folder, arguments.name)
    print(f"{arguments.name} may not connect any more")
    return 0
