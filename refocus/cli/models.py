"""`refocus models`: which generators are here, and which one is the current one.

Exit codes: 0 ok, 1 a generator is damaged (list), 2 no such generator, or it is not sound.
"""

import argparse
from typing import TYPE_CHECKING, Any

from refocus.cli import options

if TYPE_CHECKING:
    from engine.model_store import Listed
    from engine.package import Manifest, Package


def register(subparsers: "argparse._SubParsersAction[argparse.ArgumentParser]") -> None:
    """Describe the commands."""
    parser = subparsers.add_parser(
        "models",
        help="list generators, choose the current one, go back",
        description='The current generator is what the setting generator = "current" means, the '
        "default. Recordings under way change over to a new one between two frames.",
    )
    commands = parser.add_subparsers(title="commands", metavar="COMMAND", required=True)
    listing = commands.add_parser("list", help="generators that ship or are installed")
    options.add_json(listing)
    listing.set_defaults(run=_list)
    using = commands.add_parser("use", help="make a generator the current one")
    using.add_argument(
        "generator",
        metavar="NAME|FOLDER",
        help="one of the list, or the folder of a model package, which is checked and installed",
    )
    using.set_defaults(run=_use)
    back = commands.add_parser("rollback", help="make the one before current again")
    back.set_defaults(run=_rollback)


def _list(arguments: argparse.Namespace) -> int:
    from engine.model_store import listed

    found, trouble = listed()
    if arguments.json:
        import msgspec

        print(msgspec.json.encode([_as_json(one) for one in found]).decode())
    else:
        for one in found:
            print(_line(one))
        if trouble:
            print(f"found: {trouble}")
    return 1 if trouble or any(one.problem for one in found) else 0


def _use(arguments: argparse.Namespace) -> int:
    from engine.model_store import use

    print(_said(use(arguments.generator)))
    return 0


def _rollback(_: argparse.Namespace) -> int:
    from engine.model_store import rollback

    print(_said(rollback()))
    return 0


def _said(package: "Package") -> str:
    manifest = package.manifest
    return f"current: {manifest.name} {manifest.version} ({package.hash[:12]}), {package.folder}"


def _as_json(one: "Listed") -> dict[str, Any]:
    told: dict[str, Any] = {
        "name": one.name,
        "shipped": one.shipped,
        "current": one.current,
        "problem": one.problem,
    }
    if one.package is not None:
        manifest = one.package.manifest
        told |= {
            "version": manifest.version,
            "hash": one.package.hash,
            "folder": str(one.package.folder),
            "modality": manifest.modality,
            "pixel_um": manifest.pixel_um,
            "created": manifest.created,
            "gain_db": _gains_db(manifest),
        }
    return told


def _line(one: "Listed") -> str:
    begin = f"{'*' if one.current else ' '} {one.name:32}"
    if one.package is None:
        return f"{begin}  {one.problem}"
    manifest = one.package.manifest
    lowest, highest = manifest.pixel_um
    parts = [
        f"{begin}  {manifest.version:8}",
        one.package.hash[:12],
        f"{manifest.modality:12} {lowest:g} to {highest:g} um/px",
        manifest.created[:10],
        "ships" if one.shipped else "installed",
        *(f"{name} {gain:+.2f} dB" for name, gain in _gains_db(manifest).items()),
    ]
    return "  ".join(parts)


def _gains_db(manifest: "Manifest") -> dict[str, float]:
    """What it gained over the raw planes, by the set of stacks that it was measured on."""
    gains = {}
    for name, measured in manifest.metrics.items():
        mean = measured.get("all") if isinstance(measured, dict) else None
        gain = mean.get("gain_db") if isinstance(mean, dict) else None
        if isinstance(gain, int | float):
            gains[name] = float(gain)
    return gains
