"""Complete a prompt, streaming the text to stdout and the timings to stderr."""

from __future__ import annotations

import argparse
import json
import sys

from . import loading

TYPE_CHECKING = False
if TYPE_CHECKING:
    from ..llama import Llama
    from ..sampling import SamplerChain

NAME = "run"
_PRESETS = ("benchmark", "code", "chat", "creative")
# llama.cpp's defaults, for the stages that no option names.
_TOP_K, _TOP_P, _MIN_P, _TEMP = 40, 0.95, 0.05, 0.8


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the options; the short names are llama.cpp's."""
    parser.add_argument(
        "prompt", nargs="?", help="the text to continue; - or nothing reads it from stdin"
    )
    parser.add_argument("-n", "--max-tokens", type=int, default=128, help="default: 128")
    parser.add_argument(
        "--stop", action="append", default=[], metavar="TEXT", help="end there; may be repeated"
    )
    parser.add_argument("--json", action="store_true", help="print the whole result as JSON")
    parser.add_argument("--no-timings", action="store_true", help="print no timings")
    sampling = parser.add_argument_group("sampling (default: llama.cpp's chain)")
    sampling.add_argument("--preset", choices=_PRESETS, help="a ready chain")
    sampling.add_argument("--temp", type=float, help=f"0 is greedy (default: {_TEMP})")
    sampling.add_argument("--top-k", type=int, help=f"default: {_TOP_K}")
    sampling.add_argument("--top-p", type=float, help=f"default: {_TOP_P}")
    sampling.add_argument("--min-p", type=float, help=f"default: {_MIN_P}")
    sampling.add_argument("--seed", type=int, help="repeat an earlier run")
    loading.add_arguments(parser)


def main(args: argparse.Namespace) -> int:
    """Run the command."""
    prompt = _prompt(args)
    if prompt is None:
        raise argparse.ArgumentError(None, "no PROMPT, and nothing on stdin")
    params = loading.params_of(args, seed=args.seed)
    sampler = _sampler(args)

    from .. import Llama

    with Llama.load(params) as llama:
        if args.json:
            return _print_json(llama, prompt, sampler, args)
        return _stream(llama, prompt, sampler, args)


def _prompt(args: argparse.Namespace) -> str | None:
    if args.prompt is not None and args.prompt != "-":
        return str(args.prompt)
    if args.prompt is None and sys.stdin.isatty():
        return None
    # One newline ends the last line of a text file or of echo; it is not part of the prompt.
    return sys.stdin.read().removesuffix("\n") or None


def _sampler(args: argparse.Namespace) -> SamplerChain | None:
    from ..errors import SamplerError
    from ..sampling import SamplerChain

    given = [
        name for name in ("temp", "top_k", "top_p", "min_p") if getattr(args, name) is not None
    ]
    if args.preset:
        if given:
            option = f"--{given[0].replace('_', '-')}"
            raise argparse.ArgumentError(None, f"--preset and {option} exclude each other")
        chain: SamplerChain = getattr(SamplerChain, args.preset)()
        return chain
    if not given:
        return None
    top_k = _TOP_K if args.top_k is None else args.top_k
    top_p = _TOP_P if args.top_p is None else args.top_p
    min_p = _MIN_P if args.min_p is None else args.min_p
    temp = _TEMP if args.temp is None else args.temp
    try:
        return SamplerChain().top_k(top_k).top_p(top_p).min_p(min_p).temp(temp)
    except SamplerError as error:
        raise argparse.ArgumentError(None, str(error)) from error


def _print_json(
    llama: Llama, prompt: str, sampler: SamplerChain | None, args: argparse.Namespace
) -> int:
    completion = llama.create_completion(
        prompt, args.max_tokens, sampler=sampler, stop=tuple(args.stop)
    )
    print(json.dumps(completion.to_dict(), ensure_ascii=False, indent=2))
    return 0


def _stream(
    llama: Llama, prompt: str, sampler: SamplerChain | None, args: argparse.Namespace
) -> int:
    status = 0
    with llama.create_completion(
        prompt, args.max_tokens, sampler=sampler, stop=tuple(args.stop), stream=True
    ) as stream:
        try:
            for chunk in stream:
                _write(chunk.text)
        except KeyboardInterrupt:
            stream.close()
            for chunk in stream:  # generated before the interrupt, but not shown yet
                _write(chunk.text)
            status = 130
        _write("\n")
        if not args.no_timings:
            print(f"\n{stream.result().timings}", file=sys.stderr)
    return status


def _write(text: str) -> None:
    sys.stdout.write(text)
    sys.stdout.flush()
