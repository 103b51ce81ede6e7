"""Check machine, build and settings for what costs speed, and with MODEL a model."""

from __future__ import annotations

import argparse
import json
import sys

from . import loading, sampling

TYPE_CHECKING = False
if TYPE_CHECKING:
    from ..tuning.finding import Diagnosis, Finding

NAME = "doctor"
EXIT_PROBLEMS = 4
_INDENT = "  "


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the options."""
    parser.epilog = f"exit status: 0 nothing or advice only, {EXIT_PROBLEMS} problems found"
    parser.add_argument("path", nargs="?", metavar="MODEL", help="the same as -m MODEL")
    parser.add_argument(
        "--quick", action="store_true", help="measure nothing: neither speed nor disk"
    )
    parser.add_argument("--json", action="store_true", help="print JSON")
    sampling.add_arguments(parser)
    loading.add_arguments(
        parser,
        model="a GGUF file or owner/name[:quant] (default: no model is looked at)",
        verbose="show the checks that passed too",
    )


def main(args: argparse.Namespace) -> int:
    """Run the command."""
    if args.path is not None and args.model is not None:
        raise argparse.ArgumentError(None, "MODEL and -m name a model each")
    sampler = sampling.sampler_of(args)
    # Here -v is about the checks, not about llama.cpp's messages.
    plain = {**vars(args), "model": args.model or args.path, "verbose": False}
    params = loading.params_of(argparse.Namespace(**plain), sampler=sampler)

    from ..tuning import examine

    shown = _Progress()
    try:
        diagnosis = examine(params=params, quick=args.quick, progress=shown)
    finally:
        shown.clear()
    if args.json:
        print(json.dumps(diagnosis.to_dict(), ensure_ascii=False, indent=2))
    else:
        print("\n".join(_lines(diagnosis, args.verbose)))
    return EXIT_PROBLEMS if diagnosis.problems else 0


def _lines(diagnosis: Diagnosis, verbose: bool) -> list[str]:
    lines = []
    for finding in (*diagnosis.problems, *diagnosis.advice):
        lines += [*_block(finding), ""]
    if verbose and diagnosis.passed:
        lines += [f"ok       {finding.name}: {finding.evidence}" for finding in diagnosis.passed]
        lines.append("")
    counts = (
        _count(len(diagnosis.findings), "check", "checks"),
        _count(len(diagnosis.problems), "problem", "problems"),
        _count(len(diagnosis.advice), "piece of advice", "pieces of advice"),
    )
    return [*lines, ", ".join(counts)]


def _count(number: int, one: str, many: str) -> str:
    return f"{number or 'no'} {one if number == 1 else many}"


def _block(finding: Finding) -> list[str]:
    return [
        f"{finding.severity:<8} {finding.name}: {finding.symptom}",
        f"{_INDENT}seen   {finding.evidence}",
        f"{_INDENT}fix    {finding.fix}",
    ]


class _Progress:
    """A line on a terminal's stderr that is replaced by the next one."""

    def __init__(self) -> None:
        self._width = 0

    def __call__(self, line: str) -> None:
        if sys.stderr.isatty():
            sys.stderr.write(f"\r{line:<{self._width}}")
            sys.stderr.flush()
            self._width = len(line)

    def clear(self) -> None:
        if self._width:
            sys.stderr.write(f"\r{'':<{self._width}}\r")
            sys.stderr.flush()
