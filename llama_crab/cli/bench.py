"""Measure speed as llama-bench does, and end to end; compare two runs."""

from __future__ import annotations

import argparse
import re
import sys
from collections.abc import Callable, Sequence
from pathlib import Path

from .loading import speculative

TYPE_CHECKING = False
if TYPE_CHECKING:
    from typing import Any

    from ..tuning.bench_report import BenchReport
    from ..tuning.bench_run import Progress
    from ..tuning.workloads import Workload

NAME = "bench"
EXIT_SOME_FAILED = 3
_OUTPUTS = ("table", "json", "csv", "md")
# llama-bench's: one number, or first-last with a step that is added or multiplied.
_RANGE = re.compile(r"(-?\d+)(?:-(\d+)(?:([+*])(\d+))?)?")
_MAX_VALUES = 1000
_MAX_ROUNDS = 100_000
_TOKENIZE_CHARS = 100_000
_FLASH_ATTN = {
    **dict.fromkeys(("1", "on", "true", "enabled"), "enabled"),
    **dict.fromkeys(("0", "off", "false", "disabled"), "disabled"),
    **dict.fromkeys(("-1", "auto"), "auto"),
}
_CACHE_TYPES = ("f32", "f16", "bf16", "q8_0", "q5_1", "q5_0", "q4_1", "q4_0", "iq4_nl")
_PRESETS = ("default", "benchmark", "code", "chat", "creative", "structured")
_TEXTS = ("copy", "free")
_INT32_MAX = 2**31 - 1


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the options; those of the matrix are llama-bench's."""
    parser.usage = "llama-crab bench [MODEL ...] [options] | bench compare BEFORE.json AFTER.json"
    parser.description = (
        "Measure all combinations of the given values, taking turns round by round. Several values "
        "are separated by commas or given by repeating the option; ranges are first-last, "
        "first-last+step, first-last*factor. The exit status is 3 when some rows failed."
    )
    parser.add_argument(
        "models",
        nargs="*",
        metavar="MODEL",
        help="GGUF files or owner/name[:quant] (default: a small demo model)",
    )
    parser.add_argument("-m", "--model", action="append", default=[], help="one more MODEL")
    parser.add_argument("-v", "--verbose", action="store_true", help="show llama.cpp's messages")
    tests = parser.add_argument_group("what to measure")
    _list(tests, "-p", "--n-prompt", _ints(0), "tokens of a prompt, pp (default: 512; 0: none)")
    _list(tests, "-n", "--n-gen", _ints(0), "tokens to generate, tg (default: 128; 0: none)")
    _list(tests, "-pg", "--n-pg", _pair, "PP,TG: a prompt and what follows, as one")
    _list(tests, "-d", "--n-depth", _ints(0), "tokens in the cache before (default: 0)")
    _list(tests, "-np", "--n-seq", _ints(1, 256), "sequences that generate at once")
    tests.add_argument(
        "--answers", action="store_true", help="whole answers with what their time went into"
    )
    _list(tests, "--presets", None, _names(_PRESETS, "all"), "answers by these sampler chains")
    help_ = "answers that copy or are free, for --speculative (its default: all)"
    _list(tests, "--texts", None, _names(_TEXTS, "all"), help_)
    tests.add_argument("--reuse", action="store_true", help="prompts that are in memory already")
    tests.add_argument("--tokenize", action="store_true", help="the tokenizer alone")
    axes = parser.add_argument_group("settings to combine")
    _list(axes, "-t", "--threads", _ints(1, 512), "threads (default: the performance cores)")
    _list(axes, "-b", "--batch-size", _ints(1), "tokens per call at most (default: 2048)")
    _list(axes, "-ub", "--ubatch-size", _ints(1), "tokens per graph at most (default: 512)")
    _list(axes, "-fa", "--flash-attn", _flash_attn, "on, off, auto (default: auto)")
    _list(axes, "-ctk", "--cache-type-k", _names(_CACHE_TYPES), "K cache type (default: f16)")
    _list(axes, "-ctv", "--cache-type-v", _names(_CACHE_TYPES), "V cache type (default: f16)")
    _list(axes, "-ngl", "--n-gpu-layers", _ints(-1), "layers on the GPU (-1: all)")
    _list(axes, "--speculative", None, _speculative, "drafts of answers, as --speculative of run")
    how = parser.add_argument_group("how")
    how.add_argument("-r", "--repetitions", type=_count, default=5, help="rounds (default: 5)")
    how.add_argument("--no-warmup", action="store_true", help="measure the first run as well")
    how.add_argument(
        "-o", "--output", choices=_OUTPUTS, default="table", help="what to print (default: table)"
    )
    how.add_argument("--save", type=Path, metavar="FILE.json", help="keep it for bench compare")
    how.add_argument("--plot", type=Path, metavar="FILE.png", help="draw it")


def main(args: argparse.Namespace) -> int:
    """Run the command."""
    if args.models[:1] == ["compare"]:
        return _compare(args)
    workloads = _workloads(args)
    _check_files(args)
    if args.verbose:
        import logging

        logging.basicConfig(level=logging.DEBUG, format="%(message)s")
    from ..params import LlamaParams
    from ..tuning.bench_run import bench

    bar = _Bar()
    try:
        report = bench(
            [*args.models, *args.model] or None,
            workloads,
            params=LlamaParams(verbose=args.verbose),
            axes=_axes(args),
            rounds=args.repetitions,
            warmup=not args.no_warmup,
            progress=bar,
        )
    finally:
        bar.clear()
    # First what cannot fail: what was measured is then seen whatever happens to the files.
    _print(report, args.output)
    _write(report, args)
    if report.interrupted:
        return 130
    if not report.failed:
        return 0
    return EXIT_SOME_FAILED if len(report.failed) < len(report.rows) else 1


def _print(report: BenchReport, output: str) -> None:
    from .tables import print_table

    if output == "json":
        print(report.to_json())
    elif output == "csv":
        sys.stdout.write(report.to_csv())
    elif output == "md":
        print(report.to_markdown())
    else:
        print_table(*report.table())
    if output != "md":
        for line in report.notes():
            print(line, file=sys.stdout if output == "table" else sys.stderr)
    sys.stdout.flush()


def _write(report: BenchReport, args: argparse.Namespace) -> None:
    if args.save is not None:
        args.save.write_text(report.to_json() + "\n", encoding="utf-8")
    if args.plot is not None:
        from ..tuning.bench_plot import plot

        if any(row.seconds for row in report.rows):
            plot(report, args.plot)
        else:
            print(f"{args.plot} is not written: nothing was measured", file=sys.stderr)


def _compare(args: argparse.Namespace) -> int:
    if len(args.models) != 3:
        raise argparse.ArgumentError(None, "compare: give two files, BEFORE.json AFTER.json")
    from ..tuning.bench_compare import compare_reports, difference_table
    from ..tuning.bench_report import BenchReport
    from .tables import print_table

    before, after = (BenchReport.load(path) for path in args.models[1:])
    difference = compare_reports(before, after)
    if difference.pairs:
        print_table(*difference_table(difference))
    else:
        print("no test of a model is in both files")
    for name, report, rows in (
        ("before", before, difference.only_before),
        ("after", after, difference.only_after),
    ):
        for row in rows:
            print(f"only {name}: {report.label(row)}")
    return 0


def _workloads(args: argparse.Namespace) -> list[Workload]:
    from ..tuning import workloads as all_of

    n_prompt = [n for n in _flat(args.n_prompt, [512]) if n]
    n_gen = [n for n in _flat(args.n_gen, [128]) if n]
    found: list[Workload] = []
    for depth in _flat(args.n_depth, [0]):
        found += [all_of.Prefill(n, depth) for n in n_prompt]
        found += [all_of.Generate(n, depth) for n in n_gen]
        for prompt, gen in _flat(args.n_pg, []):
            if prompt and gen:
                found.append(all_of.PrefillGenerate(prompt, gen, depth))
            elif prompt or gen:
                single = all_of.Prefill(prompt, depth) if prompt else all_of.Generate(gen, depth)
                found.append(single)
        found += [all_of.Parallel(s, n, depth) for n in n_gen for s in _flat(args.n_seq, [])]
    presets = _flat(args.presets, ["benchmark"] if args.answers else [])
    found += [all_of.Complete(p, n, name) for p in n_prompt for n in n_gen for name in presets]
    if presets and not (n_prompt and n_gen):
        raise argparse.ArgumentError(None, "--answers, --presets: need -p and -n above 0")
    texts = _flat(args.texts, list(_TEXTS) if args.speculative and not presets else [])
    found += [all_of.Answer(text) for text in texts]
    if args.reuse:
        if not n_prompt:
            raise argparse.ArgumentError(None, "--reuse: needs -p above 0")
        found += [all_of.Reuse(n) for n in n_prompt]
    if args.tokenize:
        found.append(all_of.Tokenize(_TOKENIZE_CHARS))
    if not found:
        raise argparse.ArgumentError(None, "nothing to measure: -p and -n are 0")
    return list(dict.fromkeys(found))


def _axes(args: argparse.Namespace) -> dict[str, list[Any]]:
    """Return the settings that were given, in llama-bench's order of nesting."""
    given = {
        "n_gpu_layers": args.n_gpu_layers,
        "n_batch": args.batch_size,
        "n_ubatch": args.ubatch_size,
        "type_k": args.cache_type_k,
        "type_v": args.cache_type_v,
        "flash_attn_type": args.flash_attn,
        "n_threads": args.threads,
        "speculative": args.speculative,
    }
    return {name: list(dict.fromkeys(_flat(v, []))) for name, v in given.items() if v}


def _check_files(args: argparse.Namespace) -> None:
    """Find out before the run what would lose its result after it."""
    for option, path in (("--save", args.save), ("--plot", args.plot)):
        if path is not None and not path.resolve().parent.is_dir():
            raise argparse.ArgumentError(None, f"{option}: there is no folder {path.parent}")
        if path is not None and path.is_dir():
            raise argparse.ArgumentError(None, f"{option}: {path} is a folder")
    if args.plot is not None:
        if args.plot.suffix.lower() not in (".png", ".svg", ".pdf"):
            raise argparse.ArgumentError(None, f"--plot: {args.plot} is no .png, .svg or .pdf")
        from ..tuning.bench_plot import require_matplotlib

        require_matplotlib()


def _list(
    group: argparse._ArgumentGroup,
    short: str,
    long: str | None,
    read: Callable[[str], list[Any]],
    help_: str,
) -> None:
    names = [short] if long is None else [short, long]
    group.add_argument(*names, action="append", type=read, help=help_, metavar="LIST")


def _flat(lists: Sequence[Sequence[Any]] | None, default: list[Any]) -> list[Any]:
    return default if lists is None else [value for values in lists for value in values]


def _ints(low: int, high: int = _INT32_MAX) -> Callable[[str], list[int]]:
    def read(text: str) -> list[int]:
        values: list[int] = []
        for part in text.split(","):
            values.extend(_range(part))
            if len(values) > _MAX_VALUES:
                raise argparse.ArgumentTypeError(f"{text!r} has more than {_MAX_VALUES} values")
        for value in values:
            if not low <= value <= high:
                limit = f"less than {low}" if value < low else f"more than {high}"
                raise argparse.ArgumentTypeError(f"{value} is {limit}")
        return values

    return read


def _range(text: str) -> list[int]:
    match = _RANGE.fullmatch(text)
    if match is None:
        raise argparse.ArgumentTypeError(f"{text!r} is no number or range (1-8, 1-8+2, 1-8*2)")
    value = int(match[1])
    last = value if match[2] is None else int(match[2])
    step = int(match[4] or 1)
    if last < value:
        raise argparse.ArgumentTypeError(f"{text!r} ends before it begins")
    values: list[int] = []
    while value <= last and len(values) <= _MAX_VALUES:
        values.append(value)
        following = value * step if match[3] == "*" else value + step
        if following <= value and last > value:
            raise argparse.ArgumentTypeError(f"{text!r} does not get on from {value}")
        value = max(following, value + 1)
    return values


def _pair(text: str) -> list[tuple[int, int]]:
    parts = text.split(",")
    if len(parts) != 2 or not all(part.isascii() and part.isdigit() for part in parts):
        raise argparse.ArgumentTypeError(f"{text!r} is not PP,TG, two numbers")
    one, two = int(parts[0]), int(parts[1])
    if max(one, two) > _INT32_MAX or one == two == 0:
        raise argparse.ArgumentTypeError(f"{text!r} is nothing to measure")
    return [(one, two)]


def _names(allowed: Sequence[str], every: str | None = None) -> Callable[[str], list[str]]:
    def read(text: str) -> list[str]:
        if text == every:
            return list(allowed)
        for name in text.split(","):
            if name not in allowed:
                raise argparse.ArgumentTypeError(f"{name!r} is not one of {', '.join(allowed)}")
        return text.split(",")

    return read


def _speculative(text: str) -> list[Any]:
    return [speculative(part) for part in text.split(",")]


def _flash_attn(text: str) -> list[str]:
    names = [part.strip().lower() for part in text.split(",")]
    for name in names:
        if name not in _FLASH_ATTN:
            raise argparse.ArgumentTypeError(f"{name!r} is not one of on, off, auto")
    return [_FLASH_ATTN[name] for name in names]


def _count(text: str) -> int:
    value = int(text) if text.isascii() and text.isdigit() else 0
    if not 1 <= value <= _MAX_ROUNDS:
        raise argparse.ArgumentTypeError(f"{text!r} is not a number of rounds")
    return value


class _Bar:
    """One line on stderr that is written again, if that is a terminal."""

    _WIDTH = 24

    def __init__(self) -> None:
        self._shows = sys.stderr is not None and sys.stderr.isatty()
        self._length = 0

    def __call__(self, progress: Progress) -> None:
        if not self._shows:
            return
        filled = self._WIDTH * progress.done // max(1, progress.total)
        text = f"[{'#' * filled}{'.' * (self._WIDTH - filled)}] {progress.done}/{progress.total}"
        if progress.seconds_left is not None:
            minutes, seconds = divmod(round(progress.seconds_left), 60)
            text += f"  {minutes}:{seconds:02d} left"
        self._write(f"{text}  {progress.name}")

    def clear(self) -> None:
        """Leave no trace of it."""
        if self._shows and self._length:
            self._write("")
            sys.stderr.write("\r")
            sys.stderr.flush()

    def _write(self, text: str) -> None:
        sys.stderr.write("\r" + text.ljust(self._length))
        sys.stderr.flush()
        self._length = len(text)
