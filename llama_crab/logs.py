"""llama.cpp's log, handed to `logging` under the name ``llama_crab.native``."""

from __future__ import annotations

from . import _core

# ggml_log_level -> logging level
_LEVELS = {1: 10, 2: 20, 3: 30, 4: 40}


def set_verbose(verbose: bool) -> None:
    """Let llama.cpp's informative messages through to `logging` (process-wide), or not."""
    _core.set_log_level(2 if verbose else 3)


def flush(*, expected: bool = False) -> None:
    """Hand the lines that llama.cpp has logged so far to `logging`.

    As debug messages when what they complain of was `expected` and dealt with.
    """
    if not _core.log_pending():
        return
    import logging  # not at import time: most programs never get here

    logger = logging.getLogger("llama_crab.native")
    for level, text in _core.drain_log():
        logger.log(logging.DEBUG if expected else _LEVELS.get(level, logging.INFO), text)
