"""Complete a prompt, streaming the text to stdout and the timings to stderr."""

from __future__ import annotations

import argparse
import json
import sys

from . import loading, sampling

TYPE_CHECKING = False
if TYPE_CHECKING:
    from ..llama import Llama
    from ..sampling import SamplerChain

NAME = "run"


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
    sampling.add_arguments(parser)
    loading.add_arguments(parser)


def main(args: argparse.Namespace) -> int:
    """Run the command."""
    prompt = _prompt(args)
    if prompt is None:
        raise argparse.ArgumentError(None, "no PROMPT, and nothing on stdin")
    params = loading.params_of(args, seed=args.seed)
    sampler = sampling.sampler_of(args)

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
