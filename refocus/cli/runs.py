"""Commands about runs on disk: `refocus check`, `refocus recover`.

Exit codes: 0 everything acknowledged is there, 1 something is wrong or recovering was not possible,
2 no run at this path, 3 the disk is too full to recover, 4 the run has a writer (recover).
"""

import argparse
import json
from pathlib import Path
from typing import TYPE_CHECKING

from refocus.cli import options
from refocus.words import counted

if TYPE_CHECKING:
    from store.check import Report


def register(subparsers: "argparse._SubParsersAction[argparse.ArgumentParser]") -> None:
    """Add the commands of this file."""
    check = subparsers.add_parser(
        "check",
        help="read a run back and hold every plane against the journal's checksums",
        description="Read a run back, live, killed or sealed. Nothing is written.",
    )
    options.add_run(check)
    options.add_json(check)
    check.set_defaults(run=_check)
    recover = subparsers.add_parser(
        "recover",
        help="make a run whole after its writer was killed, or after a power cut",
        description="Make a run valid and complete as far as it was acknowledged, whatever ended "
        "its writer. Planes that are gone or damaged become absent. A second time changes nothing.",
    )
    options.add_run(recover)
    recover.add_argument(
        "--no-verify",
        dest="verify",
        action="store_false",
        help="read only those planes back that a power cut could have touched",
    )
    options.add_json(recover)
    recover.set_defaults(run=_recover)


def _check(arguments: argparse.Namespace) -> int:
    from store.check import check

    path = options.run_at(arguments.path)
    with options.planes_bar("reading") as progress:
        report = check(path, progress)
    print(json.dumps(report.as_json()) if arguments.json else _summary(path, report))
    return 1 if report.findings else 0


def _recover(arguments: argparse.Namespace) -> int:
    from store.recover import recover

    path = options.run_at(arguments.path)
    with options.planes_bar("reading") as progress:
        recovery = recover(path, verify=arguments.verify, progress=progress)
    if arguments.json:
        print(json.dumps(recovery.as_json()))
        return 1 if recovery.lost else 0
    counts = recovery.counts
    print(
        f"{path}: {recovery.state}; there are {counted(counts.saved, 'raw plane')} and "
        f"{counted(counts.refocused, 'refocused plane')}; of those acknowledged, lost: "
        f"{recovery.lost}"
    )
    for done in recovery.done or ["nothing had to be done"]:
        print(f"  {done}")
    return 1 if recovery.lost else 0


def _not_checked(report: "Report") -> str:
    return f"not checked ({'yaozarrs is not installed' if report.counts.saved else 'no plane'})"


def _summary(path: Path, report: "Report") -> str:
    raw, counts = report.raw, report.counts
    valid = {True: "yes", False: "no", None: _not_checked(report)}[report.valid_ome_zarr]
    lines = [
        f"{path}: {report.state}",
        f"  raw        {raw.acknowledged} saved, {raw.readable} read back unchanged, "
        f"{raw.damaged} damaged or not readable; {counts.failed} failed",
        f"  refocused  {counts.refocused}; skipped {counts.skipped}, late {counts.late}, "
        f"lost {counts.lost}, rejected {counts.rejected}, failed {counts.refocus_failed}",
        f"  generator  {report.generator or 'none'}",
        f"  valid OME-Zarr: {valid}",
    ]
    lines += [f"  found: {finding}" for finding in report.findings]
    lines += [f"  note: {remark}" for remark in report.remarks]
    return "\n".join(lines)
