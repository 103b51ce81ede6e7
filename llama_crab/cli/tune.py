"""Search for the fastest settings of a model on this machine, and save them as a profile."""

from __future__ import annotations

import argparse
import json
import math
import re
import sys
from pathlib import Path

NAME = "tune"
EXIT_INTERRUPTED = 130
_UNITS = {"": 1.0, "s": 1.0, "m": 60.0, "h": 3600.0}


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the options."""
    parser.add_argument("model", help="a GGUF file or owner/name[:quant]")
    parser.add_argument(
        "--goal",
        choices=("latency", "throughput", "ttft"),
        default="latency",
        help="what to make fast: one generation (default), many together, or the first token",
    )
    parser.add_argument(
        "--budget",
        type=_seconds,
        default=60.0,
        metavar="TIME",
        help="time for all of it, e.g. 90, 60s or 5m (default: 60s)",
    )
    parser.add_argument(
        "--depth", type=_depth, metavar="N", help="measure behind N tokens of context"
    )
    parser.add_argument(
        "--allow-quantised-kv",
        action="store_true",
        help="also try q8_0 and q4_0 KV caches, which change what the model answers",
    )
    parser.add_argument("--report", metavar="FILE", help="write FILE.html or FILE.png (matplotlib)")
    parser.add_argument(
        "--output", type=Path, metavar="FILE", help="save the profile there as well"
    )
    parser.add_argument("--no-save", action="store_true", help="leave the saved profile as it is")
    parser.add_argument("--json", action="store_true", help="print JSON")


def main(args: argparse.Namespace) -> int:
    """Run the command."""
    from ..params import ParameterError
    from ..tuning import tune, tune_report

    try:
        if args.report is not None:
            # Before the work, not after it.
            tune_report.check_path(args.report)
            tune_report.require_matplotlib()
        if args.output is not None:
            _check_output(args.output)
        report = tune(
            args.model,
            goal=args.goal,
            budget_sec=args.budget,
            depth=args.depth,
            allow_quantised_kv=args.allow_quantised_kv,
            save=not args.no_save,
            progress=_progress if sys.stderr.isatty() else None,
        )
    except ParameterError as error:
        raise argparse.ArgumentError(None, _as_option(str(error))) from error
    # First what cannot fail: what was found is then seen whatever happens to the files.
    if args.json:
        print(json.dumps(tune_report.to_dict(report), ensure_ascii=False, indent=2), flush=True)
    else:
        print(tune_report.as_text(report), flush=True)
    if args.output is not None and (report.profile.params or report.ended != "interrupted"):
        report.profile.save(args.output)
    if args.report is not None:
        tune_report.write_report(report, args.report)
    return EXIT_INTERRUPTED if report.ended == "interrupted" else 0


def _check_output(path: Path) -> None:
    """Find out before the work what would lose the profile after it."""
    if not path.resolve().parent.is_dir():
        raise argparse.ArgumentError(None, f"--output: there is no folder {path.parent}")
    if path.is_dir():
        raise argparse.ArgumentError(None, f"--output: {path} is a folder")


def _progress(line: str) -> None:
    print(line, file=sys.stderr, flush=True)


def _as_option(message: str) -> str:
    """Return a field's error with the name that the option has."""
    return re.sub(r"^(depth|goal|report):", r"--\1:", message).replace("budget_sec:", "--budget:")


def _seconds(text: str) -> float:
    match = re.fullmatch(r"(\d+(?:\.\d+)?|\.\d+)\s*([smh]?)", text.strip())
    seconds = float(match[1]) * _UNITS[match[2]] if match else math.nan
    if not 0.0 < seconds <= 86400.0:
        raise argparse.ArgumentTypeError(f"{text!r} is no time such as 90, 60s or 5m, up to a day")
    return seconds


def _depth(text: str) -> int:
    if not text.isdecimal():
        raise argparse.ArgumentTypeError(f"{text!r} is not a number of tokens")
    return int(text)
