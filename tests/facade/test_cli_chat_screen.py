"""What a terminal shows of an answer that was drawn as markdown while it grew."""

from __future__ import annotations

import io
import re
from typing import Any

import pytest
from rich.console import Console

from llama_crab.cli import chat_markdown
from llama_crab.cli.chat_markdown import MarkdownScreen
from llama_crab.cli.chat_screen import PlainScreen, safe_text

WIDTH, HEIGHT = 60, 12
CODE = "\n".join(f"x = {i}" for i in range(20))
TEXT = f"""# Title

Some *text* with `code`, <b>HTML</b>, [a link](http://example.org) and [1].
It goes on.

[1]: http://example.org/1

1. one
2. two

   more of two
3. three

- a
  - b

| a | b |
|---|---|
| 1 | 2 |

```python
{CODE}
```

> quote

A last paragraph which is long enough to go on in the next line, and in one more after that one.
"""


class Terminal:
    """Lines of text that a program writes to with a cursor."""

    def __init__(self) -> None:
        self.lines = [""]
        self.n_bytes_max = 0

    def write(self, data: str) -> None:
        row, column = len(self.lines) - 1, 0
        for match in re.finditer(r"\x1b\[([?\d;]*)([A-Za-z])|\r|\n|[^\x1b\r\n]+", data):
            text, command = match[0], match[2]
            if text == "\r":
                column = 0
            elif text == "\n":
                row, column = row + 1, 0
                if row == len(self.lines):
                    self.lines.append("")
            elif command == "A":
                row -= int(match[1] or 1)
                assert row >= max(0, len(self.lines) - HEIGHT), "above what is on the screen"
            elif command == "K":
                self.lines[row] = ""
            elif command is None:
                line = self.lines[row].ljust(column)
                self.lines[row] = line[:column] + text + line[column + len(text) :]
                column += len(text)
            else:
                assert command in "mhl"

    def text(self) -> str:
        return "\n".join(line.rstrip() for line in self.lines).rstrip("\n")


def console_on(output: io.StringIO) -> Console:
    return Console(
        file=output,
        force_terminal=True,
        width=WIDTH,
        height=HEIGHT,
        highlight=False,
        legacy_windows=False,
        _environ={},
    )


def draw(
    monkeypatch: pytest.MonkeyPatch, text: str, n: int, reasoning: str = "", pause: float = 0.0
) -> tuple[str, str]:
    """Return what is on the screen, and all that was written, for pieces of `n` characters."""
    monkeypatch.setattr(chat_markdown, "_LEAST_REDRAW_SEC", pause)
    monkeypatch.setattr(chat_markdown, "_DRAWING_SHARE", 1e9)
    output = io.StringIO()
    screen = MarkdownScreen(console_on(output))
    screen.begin()
    for i in range(0, len(reasoning), n):
        screen.reasoning(reasoning[i : i + n])
    for i in range(0, len(text), n):
        screen.content(text[i : i + n])
    screen.end()
    screen.note("END")
    terminal = Terminal()
    terminal.write(output.getvalue())
    return terminal.text(), output.getvalue()


def test_it_is_shown_the_same_however_it_comes(monkeypatch: pytest.MonkeyPatch) -> None:
    whole, _ = draw(monkeypatch, TEXT, len(TEXT))
    assert whole.splitlines()[-3:] == [
        "A last paragraph which is long enough to go on in the next",
        "line, and in one more after that one.",
        "END",
    ]
    for line in ("<b>HTML</b>", "a link (http://example.org)", "[1]: http://example.org/1"):
        assert line in " ".join(whole.split())
    assert [line.strip() for line in whole.splitlines() if "x =" in line] == CODE.splitlines()
    assert "\n\n\n" not in whole
    for n in (1, 2, 7, 50, 300):
        assert draw(monkeypatch, TEXT, n)[0] == whole


def test_the_cost_does_not_grow_with_the_answer(monkeypatch: pytest.MonkeyPatch) -> None:
    paragraph = "Some words that fill a line or two of the terminal, no more.\n\n"
    short = len(draw(monkeypatch, paragraph * 5, 5)[1])
    long = len(draw(monkeypatch, paragraph * 50, 5)[1])
    assert long < 13 * short
    assert len(draw(monkeypatch, paragraph * 50, 5, pause=60.0)[1]) < 20_000


class Clock:
    """Time that passes only as told."""

    def __init__(self) -> None:
        self.now = 100.0
        self.worked = 0.0

    def perf_counter(self) -> float:
        return self.now

    def thread_time(self) -> float:
        return self.worked


def test_a_terminal_that_stood_still_does_not_stop_the_drawing(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    class Held(io.StringIO):
        held, worked = 0.0, 0.0

        def write(self, text: str) -> int:
            clock.now += self.held
            clock.worked += self.worked
            return super().write(text)

    clock = Clock()
    monkeypatch.setattr(chat_markdown, "time", clock)
    output = Held()
    screen = MarkdownScreen(console_on(output))

    def shows(word: str, after: float) -> bool:
        clock.now += after
        screen.content(f"{word} ")
        return word in output.getvalue()

    screen.begin()
    output.held = 1.0
    assert shows("one", 0.0)
    output.held = 0.0
    assert not shows("two", 0.05)
    assert shows("three", 0.06)
    # What takes long to draw is drawn less often, but each second.
    output.worked = 0.01
    assert shows("four", 0.11)
    assert not shows("five", 0.15)
    output.worked = 100.0
    assert shows("six", 0.9)
    assert not shows("seven", 0.9)
    screen.end()
    output.worked = 0.0
    screen.begin()
    assert shows("eight", 0.0)
    screen.end()


def test_reasoning_stands_before_the_answer_as_it_is(monkeypatch: pytest.MonkeyPatch) -> None:
    thought = "\nHmm, *let* me\nsee.\n\nSo:\n\n"
    for n in (1, 4, 100):
        shown, written = draw(monkeypatch, "The *answer*.\n\nIs 4.", n, thought)
        assert shown == "Hmm, *let* me\nsee.\n\nSo:\n\nThe answer.\n\nIs 4.\nEND"
        assert "\x1b[2mSo:" in written


@pytest.mark.parametrize("text", ["", "\n", "x", "```", "- ", "|", "\\", "&", "[", "<", "***"])
def test_any_beginning_can_be_drawn(monkeypatch: pytest.MonkeyPatch, text: str) -> None:
    assert draw(monkeypatch, text, 1)[0].endswith("END")


def test_a_model_cannot_act_on_the_terminal(monkeypatch: pytest.MonkeyPatch) -> None:
    evil = "a\x1b[2J\x1b]0;title\x07b\x9bc\r\x7f\tü"
    assert safe_text(evil) == "a[2J]0;titlebc\tü"
    shown, written = draw(monkeypatch, evil, 3)
    assert "a[2J]0;titlebc" in shown
    assert "\x1b]" not in written
    assert "\x1b[2J" not in written


def test_without_a_terminal_only_answers_are_printed(capsys: pytest.CaptureFixture[str]) -> None:
    screen = PlainScreen(is_chat=False)
    screen.end()
    screen.begin()
    screen.reasoning("hm")
    for text in ("a\x1b", "b\n"):
        screen.content(text)
    screen.end()
    screen.end()
    screen.note("note")
    told: Any = capsys.readouterr()
    assert (told.out, told.err) == ("a\x1bb\n\n", "note\n")
