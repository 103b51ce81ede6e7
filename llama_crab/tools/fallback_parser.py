"""Reads tool calls in Hermes' form out of an answer while it grows."""

from __future__ import annotations

import json
import os
import re
from typing import Any

OPEN = "<tool_call>"
CLOSE = "</tool_call>"

_SPACE = re.compile(r"\s*")
_STRING = re.compile(r'"(?:[^"\\]|\\.)*"', re.DOTALL)
_OF_ARGUMENTS = re.compile(r'[{}\[\]"]|[^{}\[\]"]+')
_IN_STRING = re.compile(r'["\\]')
# A head is no call where it takes longer than this, in characters.
_LONGEST_HEAD = 1000
# None stands for a string of any text: the name.
_HEAD = ("{", '"name"', ":", None, ",", '"arguments"', ":")
_TAIL = ("}", CLOSE)


class FallbackParser:
    """Parses an answer with calls ``<tool_call> {"name": ..., "arguments": {...}} </tool_call>``.

    `push` and `finish` return deltas in the shape of `_core.ChatParser`: dicts with ``content``, or
    with ``index``, ``id``, ``name`` and ``arguments`` of a call. However the answer is cut, they
    add up to the same message. Arguments are passed on while they grow, as they are written.

    White space around calls is not content; other text before, between and behind them is, and so
    is what begins like a call and is none. Thread-safety: none; one thread at a time.
    """

    def __init__(self) -> None:
        self._text = ""  # what is not decided yet
        self._before = ""  # white space in front of the mark of a call
        self._advance = self._in_content
        self._deltas: list[dict[str, Any]] = []
        self._after_call = False
        self._depth = 0
        self._in_string = False
        self._n_tail = 0
        self._message: dict[str, Any] = {"content": "", "reasoning_content": "", "tool_calls": []}

    @property
    def message(self) -> dict[str, Any]:
        """The message so far: ``content``, ``reasoning_content`` (empty) and ``tool_calls``."""
        calls = [dict(call) for call in self._message["tool_calls"]]
        return {**self._message, "tool_calls": calls}

    @property
    def incomplete(self) -> bool:
        """Whether the text so far ends inside of a call."""
        return self._advance in (self._in_head, self._in_arguments)

    def push(self, text: str) -> list[dict[str, Any]]:
        """Take the next piece of the answer and return what it adds to the message."""
        self._text += text
        while self._text and self._advance():
            pass
        return self._taken()

    def finish(self) -> list[dict[str, Any]]:
        """Return what was held back, at the end of the answer.

        A call that is cut within its arguments stays as it is; one that is cut before them is left
        out.
        """
        if self._advance == self._in_content and not (self._after_call and self._text.isspace()):
            self._add_content(self._text)
        if not self.incomplete:
            self._text = ""
        return self._taken()

    def _taken(self) -> list[dict[str, Any]]:
        deltas, self._deltas = self._deltas, []
        return deltas

    def _add_content(self, text: str) -> None:
        if text:
            self._after_call = False
            self._message["content"] += text
            self._deltas.append({"content": text})

    def _add_arguments(self, text: str) -> None:
        calls = self._message["tool_calls"]
        calls[-1]["arguments"] += text
        last = self._deltas[-1] if self._deltas else {}
        if last.get("index") == len(calls) - 1:
            last["arguments"] += text
            return
        self._deltas.append({"index": len(calls) - 1, "id": "", "name": "", "arguments": text})

    # Each takes what it can decide from the text, and tells whether to go on.

    def _in_content(self) -> bool:
        at = self._text.find(OPEN)
        if at >= 0:
            content = self._text[:at].rstrip()
            self._add_content(content)
            self._before = self._text[len(content) : at]
            self._text = self._text[at:]
            self._advance = self._in_head
            return True
        most = min(len(OPEN) - 1, len(self._text))
        n_held = next((n for n in range(most, 0, -1) if self._text.endswith(OPEN[:n])), 0)
        n_content = len(self._text[: len(self._text) - n_held].rstrip())
        self._add_content(self._text[:n_content])
        self._text = self._text[n_content:]
        return False

    def _in_head(self) -> bool:
        name, at = _head(self._text)
        if at == 0:
            return False
        if name is None:
            # No call: the mark was text.
            self._add_content(self._before + OPEN)
            self._text = self._text[len(OPEN) :]
            self._advance = self._in_content
            return True
        call = {"id": f"call_{os.urandom(12).hex()}", "name": name, "arguments": ""}
        self._message["tool_calls"].append(call)
        self._deltas.append({"index": len(self._message["tool_calls"]) - 1, **call})
        self._text = self._text[at:]
        self._depth, self._in_string, self._n_tail = 0, False, 0
        self._advance = self._in_arguments
        return True

    def _in_arguments(self) -> bool:
        at = 0
        text = self._text
        while at < len(text):
            if self._in_string:
                mark = _IN_STRING.search(text, at)
                if mark is None:
                    at = len(text)
                elif mark[0] == '"':
                    self._in_string = False
                    at = mark.end()
                elif mark.end() == len(text):
                    at = mark.start()
                    break  # an escape without what it escapes
                else:
                    at = mark.end() + 1
                continue
            found = _OF_ARGUMENTS.match(text, at)
            assert found
            at = found.end()
            if found[0] in "{[":
                self._depth += 1
            elif found[0] in "}]":
                self._depth -= 1
                if self._depth == 0:
                    self._advance = self._in_tail
                    break
            elif found[0] == '"':
                self._in_string = True
        if at:
            self._add_arguments(text[:at])
        self._text = text[at:]
        return self._advance == self._in_tail

    def _in_tail(self) -> bool:
        # A close that is missing or cut is no reason to lose the call.
        while self._n_tail < len(_TAIL):
            begin = _end_of_space(self._text, 0)
            wanted = _TAIL[self._n_tail]
            rest = self._text[begin : begin + len(wanted)]
            if rest != wanted:
                if wanted.startswith(rest):
                    return False
                break
            self._text = self._text[begin + len(wanted) :]
            self._n_tail += 1
        self._after_call = True
        self._advance = self._in_content
        return True


def _head(text: str) -> tuple[str | None, int]:
    """Return the name of a call and where its arguments begin; 0 where that is not decided yet."""
    name = None
    at = len(OPEN)
    for wanted in (*_HEAD, "{"):
        at = _end_of_space(text, at)
        if wanted is None:
            string = _STRING.match(text, at)
            if string is None:
                is_open = text.startswith('"', at) or at == len(text)
                return None, 0 if is_open and len(text) <= _LONGEST_HEAD else 1
            try:
                name = json.loads(string[0])
            except ValueError:
                return None, 1
            at = string.end()
            continue
        rest = text[at : at + len(wanted)]
        if rest != wanted:
            is_open = wanted.startswith(rest) and len(text) <= _LONGEST_HEAD
            return None, 0 if is_open else 1
        at += len(wanted)
    return (name, at - 1) if at <= _LONGEST_HEAD else (None, 1)


def _end_of_space(text: str, at: int) -> int:
    found = _SPACE.match(text, at)
    assert found
    return found.end()
