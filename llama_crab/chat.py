"""What a chat completion takes and returns: checked messages, typed results."""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal

from .completion import Logprobs, TokenLogprob, Usage, finite_logprob, preview
from .errors import StructuredOutputError
from .params import ParameterError
from .timings import CompletionTimings

ChatFinishReason = Literal["stop", "length", "tool_calls", "cancelled"]

ROLES = ("system", "developer", "user", "assistant", "tool")
# What OpenAI's clients send along and what says nothing to a model.
_WITHOUT_MEANING = frozenset({"refusal", "annotations", "audio", "function_call"})
_FIELDS = frozenset({"role", "content", "name", "tool_calls", "tool_call_id", "reasoning_content"})


@dataclass(frozen=True, slots=True)
class ToolCall:
    """A call that the model asks for. ``arguments`` is JSON text. Thread-safety: immutable."""

    id: str
    name: str
    arguments: str

    @property
    def parsed_arguments(self) -> Any:
        """The arguments as Python values. Raises ValueError when the answer was cut in them."""
        return json.loads(self.arguments)

    def to_dict(self) -> dict[str, Any]:
        """Return an element of OpenAI's ``tool_calls``."""
        return {
            "id": self.id,
            "type": "function",
            "function": {"name": self.name, "arguments": self.arguments},
        }


@dataclass(frozen=True, slots=True)
class ChatMessage:
    """The model's message. Thread-safety: immutable.

    ``content`` is None when it made tool calls and said nothing; ``reasoning_content`` is None
    when it did not think, or where the template has no place for it.
    """

    role: Literal["assistant"] = "assistant"
    content: str | None = None
    reasoning_content: str | None = None
    tool_calls: tuple[ToolCall, ...] = ()

    def to_dict(self) -> dict[str, Any]:
        """Return OpenAI's message, which can be appended to the conversation."""
        shape: dict[str, Any] = {"role": self.role, "content": self.content}
        if self.reasoning_content is not None:
            shape["reasoning_content"] = self.reasoning_content
        if self.tool_calls:
            shape["tool_calls"] = [call.to_dict() for call in self.tool_calls]
        return shape


@dataclass(frozen=True, slots=True)
class ChatChoice:
    """One of a request's answers. Thread-safety: immutable.

    ``finish_reason`` is "tool_calls" for a whole answer with calls. ``stop_reason`` is the stop
    string or stop token id that ended it. ``incomplete`` tells that an answer of a wanted form
    ended before it was whole.
    """

    index: int
    message: ChatMessage
    finish_reason: ChatFinishReason
    stop_reason: str | int | None = None
    tokens: tuple[int, ...] = ()
    logprobs: Logprobs | None = None
    incomplete: bool = False
    _parsed: Any = field(default=None, hash=False, repr=False)
    _invalid: StructuredOutputError | None = field(default=None, hash=False, repr=False)

    @property
    def parsed(self) -> Any:
        """The content as what ``response_format`` and the like asked for.

        See `CompletionChoice.parsed`. Raises `StructuredOutputError` when the class's own
        validators refuse the answer.
        """
        if self._invalid is not None:
            raise self._invalid.with_traceback(None)
        return self._parsed

    def to_dict(self) -> dict[str, Any]:
        """Return an element of OpenAI's ``choices``, plus ``stop_reason``."""
        return {
            "index": self.index,
            "message": self.message.to_dict(),
            "logprobs": _chat_logprobs(self.logprobs),
            "finish_reason": self.finish_reason,
            "stop_reason": self.stop_reason,
        }


@dataclass(frozen=True, slots=True, repr=False)
class ChatCompletion:
    """The result of a chat completion; ``message``, ``text``, ... are those of the first choice.

    ``created`` is in Unix seconds. Thread-safety: immutable.
    """

    id: str
    created: int
    model: str
    choices: tuple[ChatChoice, ...]
    usage: Usage
    timings: CompletionTimings
    seed: int

    @property
    def message(self) -> ChatMessage:
        """The first choice's message."""
        return self.choices[0].message

    @property
    def text(self) -> str:
        """The first choice's content, "" when it has none."""
        return self.message.content or ""

    @property
    def tool_calls(self) -> tuple[ToolCall, ...]:
        """The first choice's tool calls."""
        return self.message.tool_calls

    @property
    def finish_reason(self) -> ChatFinishReason:
        """Why the first choice ended: "stop", "length", "tool_calls" or "cancelled"."""
        return self.choices[0].finish_reason

    @property
    def parsed(self) -> Any:
        """The first choice's answer as an object; see `ChatChoice.parsed`."""
        return self.choices[0].parsed

    def to_dict(self) -> dict[str, Any]:
        """Return OpenAI's ``chat.completion`` object, plus ``timings`` and ``seed``."""
        return {
            "id": self.id,
            "object": "chat.completion",
            "created": self.created,
            "model": self.model,
            "choices": [choice.to_dict() for choice in self.choices],
            "usage": self.usage.to_dict(),
            "timings": self.timings.to_dict(),
            "seed": self.seed,
        }

    def __repr__(self) -> str:
        calls = "".join(f", {call.name}({preview(call.arguments)})" for call in self.tool_calls)
        return (
            f"ChatCompletion(text={preview(self.text)}{calls},"
            f" finish_reason={self.finish_reason!r}, n_choices={len(self.choices)})"
        )


@dataclass(frozen=True, slots=True)
class ToolCallDelta:
    """What a chunk adds to call `index`: ``id`` and ``name`` come once, ``arguments`` in pieces.

    Thread-safety: immutable.
    """

    index: int
    id: str | None = None
    name: str | None = None
    arguments: str = ""

    def to_dict(self) -> dict[str, Any]:
        """Return an element of OpenAI's ``delta.tool_calls``."""
        function: dict[str, Any] = {} if self.name is None else {"name": self.name}
        function["arguments"] = self.arguments
        shape: dict[str, Any] = {"index": self.index, "function": function}
        return shape if self.id is None else {**shape, "id": self.id, "type": "function"}


@dataclass(frozen=True, slots=True)
class ChatDelta:
    """What a chunk adds to a message; ``role`` is on a choice's first. Thread-safety: immutable."""

    role: str | None = None
    content: str | None = None
    reasoning_content: str | None = None
    tool_calls: tuple[ToolCallDelta, ...] = ()

    def to_dict(self) -> dict[str, Any]:
        """Return OpenAI's ``delta``."""
        shape: dict[str, Any] = {
            name: value
            for name, value in (
                ("role", self.role),
                ("content", self.content),
                ("reasoning_content", self.reasoning_content),
            )
            if value is not None
        }
        if self.tool_calls:
            shape["tool_calls"] = [call.to_dict() for call in self.tool_calls]
        return shape


@dataclass(frozen=True, slots=True)
class ChatCompletionChunk:
    """A piece of a streamed answer. Thread-safety: immutable.

    ``finish_reason`` is set on a choice's last chunk, ``usage`` and ``timings`` on the request's.
    """

    delta: ChatDelta
    index: int = 0
    finish_reason: ChatFinishReason | None = None
    usage: Usage | None = None
    timings: CompletionTimings | None = None
    logprobs: Logprobs | None = None
    id: str = ""
    created: int = 0
    model: str = ""

    @property
    def text(self) -> str:
        """The content that it adds."""
        return self.delta.content or ""

    def to_dict(self) -> dict[str, Any]:
        """Return OpenAI's ``chat.completion.chunk`` object, plus ``timings`` on the last."""
        shape: dict[str, Any] = {
            "id": self.id,
            "object": "chat.completion.chunk",
            "created": self.created,
            "model": self.model,
            "choices": [
                {
                    "index": self.index,
                    "delta": self.delta.to_dict(),
                    "logprobs": _chat_logprobs(self.logprobs),
                    "finish_reason": self.finish_reason,
                }
            ],
        }
        if self.usage is not None:
            shape["usage"] = self.usage.to_dict()
        if self.timings is not None:
            shape["timings"] = self.timings.to_dict()
        return shape


def _chat_logprobs(logprobs: Logprobs | None) -> dict[str, Any] | None:
    if logprobs is None:
        return None
    return {
        "content": [
            {**_entry(token), "top_logprobs": [_entry(other) for other in token.top]}
            for token in logprobs.tokens
        ]
    }


def _entry(token: TokenLogprob) -> dict[str, Any]:
    return {
        "token": token.token,
        "logprob": finite_logprob(token.logprob),
        "bytes": list(token.bytes),
    }


def check_messages(messages: Iterable[Mapping[str, Any] | ChatMessage]) -> list[dict[str, Any]]:
    """Return a conversation in OpenAI's form as plain dictionaries.

    Raises `ParameterError`, which names the message, for what is not in that form.
    """
    if isinstance(messages, (str, bytes, Mapping)) or not isinstance(messages, Iterable):
        raise ParameterError(f"messages: expected a list of messages, not {messages!r:.80}")
    checked = [_message(f"messages[{i}]", message) for i, message in enumerate(messages)]
    if not checked:
        raise ParameterError("messages: there is none")
    return checked


def _message(where: str, message: Mapping[str, Any] | ChatMessage) -> dict[str, Any]:
    if isinstance(message, ChatMessage):
        message = message.to_dict()
        if message["content"] is None and not message.get("tool_calls"):
            message["content"] = ""
    if not isinstance(message, Mapping):
        raise ParameterError(f"{where}: expected a mapping, not {message!r:.80}")
    role = message.get("role")
    if role not in ROLES:
        raise ParameterError(f"{where}: role {role!r:.80} is not one of {', '.join(ROLES)}")
    given = {name: value for name, value in message.items() if value is not None}
    for name in given.keys() - _FIELDS:
        if name not in _WITHOUT_MEANING or given[name]:
            raise ParameterError(f"{where}: {name!r:.80} is not supported")
    checked: dict[str, Any] = {"role": role}
    for name in ("name", "tool_call_id", "reasoning_content"):
        if name in given:
            checked[name] = _text(f"{where}: {name}", given[name])
    if "tool_calls" in given:
        if role != "assistant":
            raise ParameterError(f"{where}: only an assistant makes tool calls")
        calls = _tool_calls(where, given["tool_calls"])
        if calls:
            checked["tool_calls"] = calls
    if "content" in given:
        checked["content"] = _content(where, given["content"])
    elif "tool_calls" in checked or "reasoning_content" in checked:
        checked["content"] = None if "tool_calls" in checked else ""
    else:
        raise ParameterError(f"{where}: it has no content")
    return checked


def _content(where: str, content: Any) -> Any:
    if isinstance(content, str):
        return content
    if not isinstance(content, Sequence) or isinstance(content, (bytes, bytearray)):
        raise ParameterError(f"{where}: content must be text or parts, not {content!r:.80}")
    parts = []
    for part in content:
        if not isinstance(part, Mapping) or part.get("type") != "text":
            kind = part.get("type") if isinstance(part, Mapping) else part
            raise ParameterError(
                f"{where}: a part of type {kind!r:.80} is not supported, only text"
            )
        parts.append({"type": "text", "text": _text(f"{where}: text", part.get("text"))})
    return parts


def _tool_calls(where: str, calls: Any) -> list[dict[str, Any]]:
    if isinstance(calls, (str, Mapping)) or not isinstance(calls, Iterable):
        raise ParameterError(f"{where}: tool_calls must be a list, not {calls!r:.80}")
    checked = []
    for call in calls:
        if isinstance(call, ToolCall):
            call = call.to_dict()
        function = call.get("function") if isinstance(call, Mapping) else None
        if not isinstance(function, Mapping) or call.get("type", "function") != "function":
            raise ParameterError(f"{where}: {call!r:.80} is no tool call")
        arguments = function.get("arguments", "{}")
        try:
            if not isinstance(arguments, str):
                arguments = json.dumps(arguments, allow_nan=False, ensure_ascii=False)
            # Some models write nothing where there is nothing to say.
            arguments = arguments if arguments.strip() else "{}"
            json.loads(arguments)
        except (TypeError, ValueError, RecursionError) as error:
            raise ParameterError(
                f"{where}: the arguments of a tool call are not JSON: {error}"
            ) from None
        shape: dict[str, Any] = {
            "type": "function",
            "function": {
                "name": _text(f"{where}: a tool call's name", function.get("name")),
                "arguments": arguments,
            },
        }
        if call.get("id") is not None:
            shape["id"] = _text(f"{where}: a tool call's id", call["id"])
        checked.append(shape)
    return checked


def _text(where: str, value: Any) -> str:
    if not isinstance(value, str):
        raise ParameterError(f"{where} must be text, not {value!r:.80}")
    return value
