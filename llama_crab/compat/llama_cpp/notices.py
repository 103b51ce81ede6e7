"""What this face cannot do, told: once as a warning where the result is right all the same."""

from __future__ import annotations

import warnings
from typing import NoReturn

from ...errors import LlamaCrabError


class LlamaCppCompatWarning(UserWarning):
    """An argument of llama-cpp-python has no meaning here; the call goes on without it."""


class NotSupportedError(LlamaCrabError, NotImplementedError):
    """Something of llama-cpp-python that this face does not have; the message says what does."""


_told: set[str] = set()


def warn_once(name: str, reason: str) -> None:
    """Warn that the argument `name` is not used, once in this process.

    By ourselves, because Python's own "once" counts per text and forgets when filters change.
    """
    if name in _told:
        return
    _told.add(name)
    # The caller's line is of little use: libraries pass these arguments on.
    warnings.warn(f"{name}: {reason}", LlamaCppCompatWarning, stacklevel=3)


def refuse(name: str, reason: str) -> NoReturn:
    """Raise `NotSupportedError`."""
    raise NotSupportedError(f"{name}: {reason}")
