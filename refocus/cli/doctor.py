"""`refocus doctor`: what this computer can refocus with, and what to install.

Exit codes: 0 something here can refocus, 1 nothing can.
"""

import argparse
from typing import Any

from refocus.cli import options


def register(subparsers: Any) -> None:
    """Describe the command."""
    parser: argparse.ArgumentParser = subparsers.add_parser(
        "doctor",
        help="what this computer can refocus with, and what to install",
        description="Look for an NVIDIA GPU, its driver, TensorRT and what reaches it; say which "
        "runtime is picked and what is missing. Exit code 1 where nothing can refocus.",
    )
    options.add_json(parser)
    parser.set_defaults(run=run)


def run(arguments: argparse.Namespace) -> int:
    """Examine, print one line a part."""
    import msgspec

    from engine import doctor

    report = doctor.examine()
    if arguments.json:
        print(msgspec.json.encode(report).decode())
    else:
        lines = [(part, finding.text) for part, finding in report.findings.items()]
        picks = "auto picks" if report.auto.found else "auto picks nothing"
        lines.append((picks, report.auto.text))
        lines += [("to do", line) for line in report.advice]
        width = max(len(part) for part, _ in lines)
        for part, text in lines:
            print(f"{part:<{width}}  {text}")
    return 0 if report.can_refocus else 1
