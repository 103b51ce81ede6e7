"""The options of every command that loads a model; the short names are llama.cpp's."""

from __future__ import annotations

import argparse
import logging

TYPE_CHECKING = False
if TYPE_CHECKING:
    from typing import Any

    from ..params import LlamaParams

_FIELDS = (
    *("n_ctx", "n_threads", "n_gpu_layers", "n_batch", "n_ubatch", "flash_attn_type"),
    *("type_k", "type_v", "verbose", "profile", "speculative"),
)


def add_arguments(
    parser: argparse.ArgumentParser,
    *,
    model: str = "a GGUF file or owner/name[:quant] (default: a small demo model)",
    verbose: str = "show llama.cpp's messages on stderr",
) -> argparse._ArgumentGroup:
    """Declare the options; return the group of those about the context, for a command's own.

    ``model`` and ``verbose`` are the help where a command means something else by them.
    """
    parser.add_argument("-m", "--model", help=model)
    parser.add_argument("-v", "--verbose", action="store_true", help=verbose)
    return add_fields(parser)


def add_fields(parser: argparse.ArgumentParser) -> argparse._ArgumentGroup:
    """Declare the options that are fields of `LlamaParams`; return their group."""
    group = parser.add_argument_group("loading")
    group.add_argument("--profile", help="what `llama-crab tune` saved: auto, a goal or a file")
    group.add_argument(
        *("-c", "--n-ctx", "--ctx"), type=int, help="context in tokens (0: as trained)"
    )
    group.add_argument("-t", "--n-threads", type=int, help="default: the performance cores")
    group.add_argument(
        *("-ngl", "--n-gpu-layers"),
        type=_gpu_layers,
        metavar="N",
        help="layers on the GPU (-1: all; default: auto, as many as its free memory holds)",
    )
    group.add_argument("-b", "--n-batch", type=int, help="tokens per call at most")
    group.add_argument("-ub", "--n-ubatch", type=int, help="tokens per graph at most")
    group.add_argument("-fa", "--flash-attn-type", metavar="{auto,enabled,disabled}")
    group.add_argument("-ctk", "--type-k", metavar="TYPE", help="K cache type, e.g. q8_0")
    group.add_argument("-ctv", "--type-v", metavar="TYPE", help="V cache type, e.g. q8_0")
    group.add_argument(
        "--speculative",
        type=speculative,
        metavar="HOW",
        help="drafts: auto, none, lookup[:MAX_NGRAM[:N]] or a draft model's FILE.gguf "
        "(default: none)",
    )
    return group


def speculative(text: str) -> Any:
    """Return where drafts come from. Raises argparse.ArgumentTypeError."""
    from ..params import ParameterError
    from ..speculative import from_text

    try:
        return from_text(text)
    except ParameterError as error:
        message = str(error).removeprefix("speculative")
        raise argparse.ArgumentTypeError(message.lstrip(":. ")) from error


def _gpu_layers(text: str) -> int | str:
    return text if text == "auto" else int(text)


_gpu_layers.__name__ = "number of layers"  # argparse: "invalid number of layers value: 'x'"


def params_of(args: argparse.Namespace, **more: Any) -> LlamaParams:
    """Return the parameters that the options and `more` describe.

    With ``-v``, llama.cpp's messages go to stderr from here on. Raises argparse.ArgumentError.
    """
    from ..params import LlamaParams, ParameterError

    try:
        params = LlamaParams(args.model, **{name: getattr(args, name) for name in _FIELDS}, **more)
    except ParameterError as error:
        raise argparse.ArgumentError(None, str(error)) from error
    if args.verbose:
        logging.basicConfig(level=logging.DEBUG, format="%(message)s")
    return params
