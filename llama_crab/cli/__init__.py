"""The command ``llama-crab``: stdlib only, and the core is loaded when a command needs it."""

from __future__ import annotations

import argparse
import io
import logging
import os
import sys
from collections.abc import Sequence

from .._version import __version__
from ..errors import LlamaCrabError
from . import batch, bench, chat, doctor, fit, info, run, tune
from .error_line import one_line

EXIT_ERROR = 1
EXIT_USAGE = 2
# What a shell reports for a program ended by SIGINT and by SIGPIPE.
EXIT_INTERRUPTED = 130
EXIT_CLOSED_PIPE = 141


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command line and return the exit status.

    0 success, 1 an error in one line on stderr, 2 wrong usage, 3 some lines of a batch or rows of
    a benchmark have errors, 4 the doctor found problems, 130 interrupted by Ctrl-C, 141 the reader
    of stdout went away.
    """
    try:
        args = _parser().parse_args(argv)
    except SystemExit as end:  # argparse: 0 after --help and --version, 2 for wrong usage
        return end.code if isinstance(end.code, int) else EXIT_USAGE
    if isinstance(sys.stdout, io.TextIOWrapper):
        # A terminal that cannot show a character must not end the answer.
        sys.stdout.reconfigure(errors="replace")
    # Errors reach the user in one line of ours; without a handler, logging would add its own.
    logging.getLogger("llama_crab").addHandler(logging.NullHandler())
    try:
        status: int = args.command(args)
        sys.stdout.flush()
        return status
    except argparse.ArgumentError as error:  # what a command finds beyond the parser's own checks
        args.parser.print_usage(sys.stderr)
        print(f"{args.parser.prog}: error: {error}", file=sys.stderr)
        return EXIT_USAGE
    except KeyboardInterrupt:
        return EXIT_INTERRUPTED
    except BrokenPipeError:
        _discard_stdout()
        return EXIT_CLOSED_PIPE
    except (LlamaCrabError, ImportError, OSError, ValueError) as error:
        print(f"llama-crab: {one_line(error)}", file=sys.stderr)
        return EXIT_ERROR


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="llama-crab", description="Run a local language model with llama.cpp."
    )
    parser.add_argument("--version", action="version", version=f"llama-crab {__version__}")
    commands = parser.add_subparsers(required=True, metavar="COMMAND")
    for module in (run, chat, batch, info, bench, doctor, fit, tune):
        summary = (module.__doc__ or "").partition("\n")[0]
        command = commands.add_parser(module.NAME, help=summary, description=summary)
        module.add_arguments(command)
        command.set_defaults(command=module.main, parser=command)
    return parser


def _discard_stdout() -> None:
    # Python flushes stdout once more at exit, which would fail and say so.
    devnull = os.open(os.devnull, os.O_WRONLY)
    os.dup2(devnull, sys.stdout.fileno())
    os.close(devnull)
