"""The sampling options of every command that generates; the names are llama.cpp's."""

from __future__ import annotations

import argparse

TYPE_CHECKING = False
if TYPE_CHECKING:
    from ..sampling import SamplerChain

_PRESETS = ("benchmark", "code", "chat", "creative")
# llama.cpp's defaults, for the stages that no option names.
_TOP_K, _TOP_P, _MIN_P, _TEMP = 40, 0.95, 0.05, 0.8


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the options."""
    group = parser.add_argument_group("sampling (default: llama.cpp's chain)")
    group.add_argument("--preset", choices=_PRESETS, help="a ready chain")
    group.add_argument("--temp", type=float, help=f"0 is greedy (default: {_TEMP})")
    group.add_argument("--top-k", type=int, help=f"default: {_TOP_K}")
    group.add_argument("--top-p", type=float, help=f"default: {_TOP_P}")
    group.add_argument("--min-p", type=float, help=f"default: {_MIN_P}")
    group.add_argument("--seed", type=int, help="repeat an earlier run")


def sampler_of(args: argparse.Namespace) -> SamplerChain | None:
    """Return the chain that the options describe; None where they name none.

    Raises argparse.ArgumentError.
    """
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
