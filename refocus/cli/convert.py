"""Commands that convert a run: `refocus export`, `refocus finish`.

Exit codes of export: 0 all of it, 1 damaged planes were left out or nothing could be made, 2 usage,
3 the disk is too full. Of finish: 0 finished, 1 not (never closed, a damaged plane, a disk that is
read-only), 2 usage, 3 the disk is too full, 4 the run has a writer.
"""

import argparse
from pathlib import Path
from typing import TYPE_CHECKING

from refocus.cli import options
from refocus.words import counted, few

if TYPE_CHECKING:
    from store.export import Export, Exported
    from store.export_images import What
    from store.finish import Finish

WHAT: "dict[str, tuple[What, ...]]" = {
    "raw": ("raw",),
    "refocused": ("refocused",),
    "both": ("raw", "refocused"),
}


def register(subparsers: "argparse._SubParsersAction[argparse.ArgumentParser]") -> None:
    """Add the commands of this file."""
    export = subparsers.add_parser(
        "export",
        help="copy a run for Fiji, QuPath and others",
        description="Copy a run, live, killed or sealed, into a format that Fiji and QuPath open. "
        "The run stays as it is. Planes that it does not have are zeros in the copy, and listed.",
    )
    options.add_run(export)
    export.add_argument(
        "--to",
        required=True,
        choices=("ome-tiff", "ome-zarr-0.4"),
        help="ome-tiff: a folder with one file an image; ome-zarr-0.4: one folder",
    )
    export.add_argument(
        "--out",
        required=True,
        metavar="PATH",
        type=Path,
        help="a new folder for the copy; of an OME-Zarr its name must end in .zarr",
    )
    export.add_argument(
        "--what",
        choices=tuple(WHAT),
        default="both",
        help="raw and refocused planes are separate images (default: %(default)s)",
    )
    export.add_argument(
        "--compression",
        choices=("none", "zlib"),
        default="none",
        help="zlib is smaller and several times slower; nothing is lost (default: %(default)s)",
    )
    options.add_json(export)
    export.set_defaults(run=_export)

    finish = subparsers.add_parser(
        "finish",
        help="build the pyramids of a run, and compress it if asked",
        description="Add smaller copies of every plane to a closed run, so that viewers open it "
        "fast; with --compress also compress its planes, each checked before the old one goes. "
        "May be stopped and repeated at any time. Refocus what is missing first (refocus fill).",
    )
    options.add_run(finish)
    finish.add_argument(
        "--compress",
        action="store_true",
        help="compress the planes in place; nothing is lost",
    )
    options.add_json(finish)
    finish.set_defaults(run=_finish)


def _export(arguments: argparse.Namespace) -> int:
    from store.export import export

    options.run_at(arguments.path)
    with options.planes_bar("exporting") as progress:
        done = export(
            arguments.path,
            arguments.out,
            arguments.to,
            what=WHAT[arguments.what],
            compression=arguments.compression,
            progress=progress,
        )
    if arguments.json:
        import msgspec

        print(msgspec.json.encode(done).decode())
    else:
        print(_summary(done))
    return 1 if done.damage else 0


def _finish(arguments: argparse.Namespace) -> int:
    from store.finish import finish

    options.run_at(arguments.path)
    with options.planes_bar("finishing") as progress:
        done = finish(arguments.path, compress=arguments.compress, progress=progress)
    if arguments.json:
        import msgspec

        print(msgspec.json.encode(done).decode())
    else:
        print(_finished(arguments.path, done))
    return 0


def _finished(path: Path, done: "Finish") -> str:
    new = any(image.built or image.packed for image in done.images)
    lines = [f"{path}: {'finished' if new else 'nothing to do'}"]
    for image in done.images:
        sizes = ", ".join(f"{x}x{y}" for y, x in image.levels) or "none, its planes are small"
        line = f"  {image.image}: {counted(image.planes, 'plane')}; smaller copies: {sizes}"
        if image.compressed:
            before, after = image.plane_bytes / 2**20, image.stored_bytes / 2**20
            line += f"; compressed from {before:.1f} to {after:.1f} MiB"
        lines.append(line)
    if done.fillable:
        lines.append(
            f"  note: {counted(done.fillable, 'plane')} without a twin yet; after refocus fill, "
            "finish again"
        )
    return "\n".join(lines)


def _summary(done: "Export") -> str:
    lines = [f"{done.out}: {done.format}"]
    for image in done.images:
        lines.append(f"  {Path(image.path).name}: {image.image}, {_extent(image)}")
        if image.absent:
            absent = counted(len(image.absent), "plane")
            lines.append(f"    {absent} absent, zeros: {_slots(image.absent)}")
        if image.damaged:
            damaged = counted(len(image.damaged), "plane")
            lines.append(f"    {damaged} damaged, zeros: {_slots(image.damaged)}")
    lines += [f"  found: {reason}" for reason in few(done.damage)]
    if done.damage:
        lines.append("  found: run `refocus recover`, which books the planes that are lost")
    lines += [f"  note: {note}" for note in done.notes]
    return "\n".join(lines)


def _extent(image: "Exported") -> str:
    t, c, z, y, x = image.shape
    return f"{counted(image.planes, 'plane')} of {x}x{y} px (t {t}, c {c}, z {z})"


def _slots(slots: tuple[tuple[int, int, int], ...]) -> str:
    shown = ", ".join(f"t{t}/c{c}/z{z}" for t, c, z in slots[:3])
    return shown if len(slots) <= 3 else f"{shown}, ... (all of them with --json)"
