"""Where a chat shows answers and notes: plain text, or markdown where `chat_markdown` can draw."""

from __future__ import annotations

import os
import sys
from typing import Protocol

TYPE_CHECKING = False
if TYPE_CHECKING:
    from typing import TextIO

_DIM, _RESET = "\x1b[2m", "\x1b[0m"
# What a model writes must not move the cursor or change the terminal: all of C0 and C1 but for the
# tab and the newline.
_UNSAFE = dict.fromkeys([*range(9), *range(11, 32), *range(127, 160)])


class Screen(Protocol):
    """What a chat needs of the place it writes to. Between `begin` and `end` there is an answer."""

    def begin(self) -> None:
        """Be ready for an answer."""

    def content(self, text: str) -> None:
        """Show a piece of the answer."""

    def reasoning(self, text: str) -> None:
        """Show a piece of what the model thinks before it answers."""

    def end(self) -> None:
        """Show what was held back, and go to a new line. May be called without an answer."""

    def note(self, text: str) -> None:
        """Tell something about the chat."""


class PlainScreen:
    """Text as it comes. Notes stand beside the answers on a terminal, else on stderr.

    `is_chat` is whether a person types; a program that reads the answers gets nothing else.
    """

    def __init__(self, *, is_chat: bool) -> None:
        self._safe = sys.stdout.isatty()
        self._shows_reasoning = is_chat and self._safe
        self._notes: TextIO = sys.stdout if self._shows_reasoning else sys.stderr
        self._dims = self._notes.isatty() and not (
            os.environ.get("NO_COLOR") or os.environ.get("TERM") == "dumb"
        )
        self._answers = False
        self._reasons = False

    def begin(self) -> None:
        """Be ready for an answer."""
        self._answers = True

    def content(self, text: str) -> None:
        """Show a piece of the answer."""
        if self._reasons:
            self._end_reasoning("\n\n")
        self._write(safe_text(text) if self._safe else text)

    def reasoning(self, text: str) -> None:
        """Show a piece of reasoning, dim, if a person reads it."""
        if not self._shows_reasoning:
            return
        if not self._reasons:
            self._reasons = True
            self._write(_DIM if self._dims else "")
        self._write(safe_text(text))

    def end(self) -> None:
        """Go to a new line."""
        if self._answers:
            self._answers = False
            self._end_reasoning("")
            self._write("\n")

    def note(self, text: str) -> None:
        """Tell something, dim on a terminal."""
        text = safe_text(text)
        print(f"{_DIM}{text}{_RESET}" if self._dims else text, file=self._notes, flush=True)

    def _end_reasoning(self, after: str) -> None:
        if self._reasons:
            self._reasons = False
            self._write((_RESET if self._dims else "") + after)

    def _write(self, text: str) -> None:
        sys.stdout.write(text)
        sys.stdout.flush()


def safe_text(text: str) -> str:
    """Return the text without what would act on a terminal."""
    return text.translate(_UNSAFE)


def open_screen(*, is_chat: bool, markdown: bool) -> Screen:
    """Return where to write. Markdown is drawn for a person at a terminal."""
    if is_chat and markdown and sys.stdout.isatty() and os.environ.get("TERM") != "dumb":
        try:
            from .chat_markdown import MarkdownScreen
        except ImportError:
            screen = PlainScreen(is_chat=True)
            screen.note(
                'Answers are shown as plain text; for markdown: pip install "llama-crab[cli]"'
            )
            return screen
        return MarkdownScreen()
    return PlainScreen(is_chat=is_chat)
