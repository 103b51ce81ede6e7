"""An error as the one line that a user sees."""

from __future__ import annotations

from ..errors import DownloadError, LlamaCrabError


def one_line(error: Exception) -> str:
    """Return the message, with llama.cpp's reason where there is one."""
    message = (str(error) or type(error).__name__).splitlines()[0]
    # The first line that llama.cpp logged is nearest the cause; pip's is in the message already.
    if isinstance(error, LlamaCrabError) and error.log and not isinstance(error, DownloadError):
        cause = error.log[0].strip()
        return message if cause in message else f"{message}: {cause}"
    return message
