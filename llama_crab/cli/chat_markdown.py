"""Answers drawn as markdown while they grow; needs rich."""

from __future__ import annotations

import time
from functools import lru_cache

from markdown_it import MarkdownIt
from rich.console import Console, ConsoleOptions, Group, RenderableType, RenderResult
from rich.live import Live
from rich.markdown import Markdown
from rich.segment import Segment
from rich.text import Text

from .chat_screen import safe_text

_LEAST_REDRAW_SEC, _MOST_REDRAW_SEC = 0.1, 1.0
# Of the time at most so much goes into drawing, since the model waits meanwhile; but what nobody
# sees growing looks as if it had stopped, so that a block of any length is drawn once a second.
_DRAWING_SHARE = 0.05


class MarkdownScreen:
    """A terminal on which blocks that are whole are printed for good.

    Only the last block, which may still change, is drawn again: the cost does not grow with the
    answer, and what has scrolled away is right. Thread-safety: none.
    """

    def __init__(self, console: Console | None = None) -> None:
        self._console = Console(highlight=False) if console is None else console
        self._live: Live | None = None
        self._text = ""  # not yet printed
        self._is_reasoning = False
        self._is_first = True
        self._next_draw = 0.0

    def begin(self) -> None:
        """Be ready for an answer."""
        self._text, self._is_reasoning, self._is_first = "", False, True
        self._next_draw = 0.0
        self._live = Live(
            console=self._console,
            auto_refresh=False,
            transient=True,
            redirect_stdout=False,
            redirect_stderr=False,
        )
        self._live.start()

    def content(self, text: str) -> None:
        """Show a piece of the answer."""
        self._push(text, False)

    def reasoning(self, text: str) -> None:
        """Show a piece of reasoning, dim and as it is."""
        self._push(text, True)

    def end(self) -> None:
        """Print the last block."""
        if self._live is not None:
            live, self._live = self._live, None
            try:
                live.update(Group())
                self._print(live, self._text)
            finally:
                live.stop()

    def note(self, text: str) -> None:
        """Tell something, dim."""
        self._console.print(Text(safe_text(text), style="dim"))

    def _push(self, text: str, is_reasoning: bool) -> None:
        assert self._live is not None
        if is_reasoning != self._is_reasoning:
            self._live.update(Group())
            self._print(self._live, self._text)
            self._text, self._is_reasoning = "", is_reasoning
        self._text += safe_text(text)
        if time.perf_counter() >= self._next_draw:
            # Work, not the time in which a terminal took nothing, as one that is held with Ctrl-S.
            before = time.thread_time()
            self._draw(self._live)
            pause = (time.thread_time() - before) / _DRAWING_SHARE
            pause = max(_LEAST_REDRAW_SEC, min(pause, _MOST_REDRAW_SEC))
            self._next_draw = time.perf_counter() + pause

    def _draw(self, live: Live) -> None:
        cut = _whole_lines(self._text) if self._is_reasoning else _whole_blocks(self._text)
        whole, self._text = self._text[:cut], self._text[cut:]
        is_first = self._is_first and not whole.strip()
        rest = self._block(self._text, is_first) if self._text.strip() else Group()
        # One write of both: the new block below what is printed above it.
        live.update(_Bottom(rest), refresh=not whole.strip())
        self._print(live, whole)

    def _print(self, live: Live, text: str) -> None:
        if text.strip():
            live.console.print(self._block(text, self._is_first))
            self._is_first = False

    def _block(self, text: str, is_first: bool) -> RenderableType:
        if self._is_reasoning:
            shown = text.rstrip("\n")
            return Text(shown.lstrip("\n") if is_first else shown, style="dim")
        return _Blocks(text, is_first)


class _Blocks:
    """Markdown, one line between two blocks, so that it does not matter where it is cut."""

    def __init__(self, text: str, is_first: bool) -> None:
        self._text = text
        self._is_first = is_first

    def __rich_console__(self, console: Console, options: ConsoleOptions) -> RenderResult:
        lines = self._text.split("\n")
        begins = _begins(self._text)
        is_first = self._is_first
        for begin, end in zip(begins, [*begins[1:], len(lines)], strict=True):
            block = _Markdown("\n".join(lines[begin:end]))
            if not is_first:
                yield Segment.line()
            is_first = False
            for line in _trimmed(console.render_lines(block, options, pad=False)):
                yield from line
                yield Segment.line()


class _Markdown(Markdown):
    """Markdown in which HTML is shown as it is written, and links with where they lead."""

    def __init__(self, text: str) -> None:
        super().__init__("", code_theme="ansi_dark", hyperlinks=False)
        self.markup = text
        self.parsed = _parser().parse(text)


class _Bottom:
    """The last lines of what may be higher than the screen."""

    def __init__(self, block: RenderableType) -> None:
        self._block = block

    def __rich_console__(self, console: Console, options: ConsoleOptions) -> RenderResult:
        lines = console.render_lines(self._block, options, pad=False)
        for line in lines[-max(1, console.height - 1) :]:
            yield from line
            yield Segment.line()


@lru_cache
def _parser() -> MarkdownIt:
    # References are shown as they are written: what they lead to may come after they are printed.
    parser = MarkdownIt("commonmark", {"html": False}).enable(["strikethrough", "table"])
    return parser.disable("reference")


def _trimmed(lines: list[list[Segment]]) -> list[list[Segment]]:
    """Return the lines without blank ones at either end, which rich puts around some blocks."""
    full = [i for i, line in enumerate(lines) if any(part.text.strip() for part in line)]
    return lines[full[0] : full[-1] + 1] if full else []


def _whole_lines(text: str) -> int:
    """Return where the lines of reasoning end that are whole; blank ones belong to the next."""
    head = text[: text.rfind("\n") + 1].rstrip("\n")
    return len(head) + 1 if head.strip() else 0


def _whole_blocks(text: str) -> int:
    """Return where the last block begins: nothing that follows can change those before it."""
    # Without the line that is being written: what begins as "2" may go on with a list, as "2.".
    lines = text.split("\n")[:-1]
    begins = _begins("\n".join(lines))
    return len("\n".join(lines[: begins[-1]])) + 1 if begins and begins[-1] else 0


def _begins(text: str) -> list[int]:
    """Return the lines at which blocks begin."""
    return [token.map[0] for token in _parser().parse(text) if token.map and not token.level]
