"""llama.cpp's log, handed to `logging` under the name ``llama_crab.native``."""

from __future__ import annotations

import logging

from . import _core

logger = logging.getLogger("llama_crab.native")

# ggml_log_level -> logging level
_LEVELS = {1: logging.DEBUG, 2: logging.INFO, 3: logging.WARNING, 4: logging.ERROR}


def set_verbose(verbose: bool) -> None:
    """Let llama.cpp's messages below warning through to `logging` (process-wide), or not."""
    _core.set_log_level(1 if verbose else 3)


def flush() -> None:
    """Hand the lines that llama.cpp has logged so far to `logging`."""
    if _core.log_pending():
        for level, text in _core.drain_log():
            logger.log(_LEVELS.get(level, logging.INFO), text)
