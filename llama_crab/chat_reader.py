"""From an answer's text to its message, piece by piece: `ChatReader`."""

from __future__ import annotations

import hashlib
import json
import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any, Protocol

from . import _core
from .chat import (
    ChatChoice,
    ChatDelta,
    ChatFinishReason,
    ChatMessage,
    ToolCall,
    ToolCallDelta,
)
from .completion import CompletionChoice
from .errors import ChatParseError

TYPE_CHECKING = False
if TYPE_CHECKING:
    from .structured import StructuredOutput


class Parser(Protocol):
    """What makes deltas of an answer that grows: `_core.ChatParser` and the fallback's."""

    def push(self, data: str, /) -> list[Any]:
        """Take the next text."""

    def finish(self) -> list[Any]:
        """Take the end."""


@dataclass(frozen=True, slots=True)
class ChatPlan:
    """How the answers of one request are read. Thread-safety: immutable.

    ``format`` is the prompt whose parser reads them, None where they are plain text; ``fallback``
    makes a parser of the tool calls in their content. With ``must_call`` a whole answer is a call;
    ``bare_call`` is a pattern of how calls begin where they have no mark. ``hidden_stops`` are stop
    strings and tokens of the format, no business of the caller. ``before`` is the part of the
    content that the prompt has.
    """

    format: _core.ChatPrompt | None = None
    fallback: Callable[[], Parser] | None = None
    parallel_tool_calls: bool = False
    output: StructuredOutput | None = None
    hidden_stops: frozenset[str | int] = frozenset()
    before: str = ""
    bare_call: str | None = None
    must_call: bool = False

    @property
    def is_plain(self) -> bool:
        """Whether an answer's text is its content."""
        return self.format is None and self.fallback is None


_TEXTS = ("content", "reasoning_content", "name", "arguments")


@dataclass(slots=True)
class _Call:
    id: str
    name: str = ""
    arguments: list[str] = field(default_factory=list)


class ChatReader:
    """Reads one choice. Thread-safety: none; one thread at a time."""

    __slots__ = (
        *("_calls", "_content", "_error", "_fallback", "_id", "_is_finished", "_parser", "_plan"),
        *("_raw", "_reasoning", "_told", "n_read"),
    )

    def __init__(self, plan: ChatPlan, id: str) -> None:
        self._plan = plan
        self._id = id
        self._parser: Parser | None = None
        if plan.format is not None:
            self._parser = _core.ChatParser(plan.format)
        self._fallback = None if plan.fallback is None else plan.fallback()
        self._content: list[str] = []
        self._reasoning: list[str] = []
        self._calls: list[_Call] = []
        self._error: ChatParseError | None = None
        self._is_finished = False
        self._raw: list[str] = []
        self._told: list[str] = []
        self.n_read = 0

    def push(self, text: str) -> ChatDelta:
        """Take the next piece of the answer and return what it adds to the message."""
        self.n_read += len(text)
        if self._plan.is_plain:
            self._content.append(text)
            return ChatDelta(content=text)
        return self._delta(self._deltas(text))

    def finish(self, finish_reason: str | None, text: str = "") -> ChatDelta:
        """Take the last piece, and the end.

        What does not fit the format is content, as the model wrote it. Raises `ChatParseError`,
        which has the ``text``, where that would be half a call, or where a call was asked for.
        """
        if self._error is not None:
            raise self._error
        if self._is_finished:
            return ChatDelta()
        self._is_finished = True
        if self._plan.is_plain:
            return self.push(text)
        self.n_read += len(text)
        deltas = self._deltas(text)
        error: ChatParseError | None = None
        try:
            if self._parser is not None:
                deltas += self._content_read(self._parser.finish())
            if self._fallback is not None:
                deltas += self._fallback.finish()
        except ChatParseError as reason:
            error = reason
        delta = self._delta(deltas)
        bare = self._plan.bare_call
        if error is None and (bare is None or self._calls):
            return delta
        # A call that was cut is told as far as it got.
        is_open = bool(self._calls) and not self._calls_are_whole()
        if error is not None and finish_reason == "stop" and (is_open or self._plan.must_call):
            error.text = "".join(self._raw)
            self._error = error
            raise error
        rest = "" if is_open else self._untold()
        last = self._delta(self._rest_read(rest, bare) if rest.strip() else [])
        return ChatDelta(
            None,
            (delta.content or "") + (last.content or "") or None,
            delta.reasoning_content,
            delta.tool_calls or last.tool_calls,
        )

    def _rest_read(self, rest: str, bare: str | None) -> list[Mapping[str, Any]]:
        """Return text that does not fit the format as content, up to a call without a mark."""
        call = re.search(bare, rest) if bare is not None and not self._calls else None
        if call is not None and self._plan.format is not None:
            try:
                found = self._plan.format.parse(rest[call.start() :])["tool_calls"]
            except ChatParseError:
                found = []
            if found:
                before = [{"content": rest[: call.start()]}] if call.start() else []
                return [*before, {"index": 0, **found[0]}]
        return [{"content": rest}]

    def finish_reason(self, reason: str | None) -> ChatFinishReason:
        """Return the public reason for the engine's."""
        if reason == "stop" and self._calls and self._calls_are_whole():
            return "tool_calls"
        if reason == "stop":
            return "stop"
        return "length" if reason == "length" else "cancelled"

    def _calls_are_whole(self) -> bool:
        """Tell whether no stop string has cut the last call."""
        try:
            json.loads("".join(self._calls[-1].arguments).strip() or "{}")
        except (ValueError, RecursionError):
            return False
        return True

    def message(self) -> ChatMessage:
        """Return everything read so far."""
        content = "".join(self._content)
        return ChatMessage(
            content=None if self._calls and not content else content,
            reasoning_content="".join(self._reasoning) or None,
            tool_calls=tuple(
                [ToolCall(call.id, call.name, "".join(call.arguments)) for call in self._calls]
            ),
        )

    def choice(self, index: int, choice: CompletionChoice) -> ChatChoice:
        """Return the public form of a choice that was read to its end."""
        output = self._plan.output
        message = self.message()
        parsed, invalid, incomplete = None, None, output is not None
        if output is not None and choice.finish_reason == "stop":
            text = self._plan.before + (message.content or "")
            parsed, invalid, incomplete = self._read(output, text, choice.stop_reason is None)
        is_hidden = choice.stop_reason in self._plan.hidden_stops
        return ChatChoice(
            index=index,
            message=message,
            finish_reason=self.finish_reason(choice.finish_reason),
            stop_reason=None if is_hidden else choice.stop_reason,
            tokens=choice.tokens,
            logprobs=choice.logprobs,
            incomplete=incomplete,
            _parsed=parsed,
            _invalid=invalid,
        )

    def _read(self, output: StructuredOutput, text: str, at_end: bool) -> Any:
        """Return what an answer of a form says, and whether it was cut."""
        if not self._plan.before and self._has_thought():
            # White space between thinking and the answer is not the answer's, unless it has to be.
            stripped = text.lstrip()
            for n in range(len(text) - len(stripped), -1, -1):
                parsed, invalid, incomplete = output.read(text[n:])
                if not incomplete:
                    return parsed, invalid, incomplete
            return output.read(stripped, at_end=at_end)
        return output.read(text, at_end=at_end)

    def _has_thought(self) -> bool:
        if self._plan.format is None:
            return False
        raw = "".join(self._raw)
        return any(tag in raw for tag in self._plan.format.thinking_end_tags)

    def _deltas(self, text: str) -> list[Mapping[str, Any]]:
        self._raw.append(text)
        if self._parser is None:
            return [] if self._fallback is None else self._fallback.push(text)
        try:
            return self._content_read(self._parser.push(text))
        except ChatParseError as error:
            error.text = "".join(self._raw)
            raise

    def _content_read(self, deltas: list[Mapping[str, Any]]) -> list[Mapping[str, Any]]:
        """Return a parser's deltas with the calls that the fallback finds in their content."""
        if self._fallback is None:
            return deltas
        found: list[Mapping[str, Any]] = []
        for delta in deltas:
            found += self._fallback.push(delta["content"]) if "content" in delta else [delta]
        return found

    def _delta(self, deltas: list[Mapping[str, Any]]) -> ChatDelta:
        content, reasoning = "", ""
        calls: dict[int, ToolCallDelta] = {}
        for delta in deltas:
            self._told += [text for text in map(delta.get, _TEXTS) if text]
            if "content" in delta:
                content += delta["content"]
            elif "reasoning_content" in delta:
                reasoning += delta["reasoning_content"]
            elif delta["index"] == 0 or self._plan.parallel_tool_calls:
                # Some grammars allow a second call all the same.
                self._add_call(delta, calls)
        if content:
            self._content.append(content)
        if reasoning:
            self._reasoning.append(reasoning)
        return ChatDelta(None, content or None, reasoning or None, tuple(calls.values()))

    def _untold(self) -> str:
        """Return the answer behind the last text of it that is in the message."""
        raw = "".join(self._raw)
        n_told = 0
        for text in self._told:
            # The first may begin in the prompt.
            for each in (text, text.strip()):
                at = raw.find(each, n_told) if each else -1
                if at >= 0:
                    n_told = at + len(each)
                    break
        return raw[n_told:]

    def _add_call(self, delta: Mapping[str, Any], told: dict[int, ToolCallDelta]) -> None:
        index = delta["index"]
        is_new = index == len(self._calls)
        if is_new:
            self._calls.append(_Call(delta["id"] or self._made_id(index)))
        call = self._calls[index]
        call.name += delta["name"]
        call.arguments.append(delta["arguments"])
        before = told.get(index, ToolCallDelta(index, call.id if is_new else None))
        told[index] = ToolCallDelta(
            index,
            before.id,
            (before.name or "") + delta["name"] or None,
            before.arguments + delta["arguments"],
        )

    def _made_id(self, index: int) -> str:
        # Nine letters and digits: some templates take no others back.
        return hashlib.blake2b(f"{self._id} {index}".encode(), digest_size=5).hexdigest()[:9]
