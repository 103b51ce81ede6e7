"""The loop of a conversation with tools: ask, run the calls, tell the results, ask again."""

from __future__ import annotations

import json
import logging
from collections.abc import Awaitable, Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Generic, Protocol, TypeVar

from .errors import ToolError
from .params import ParameterError
from .tools.tool import Tool, tool_result_text

_Messages = list[dict[str, Any]]
# What a model is told of an error, in characters: some errors quote all of their input.
_LONGEST_REASON = 2000
_logger = logging.getLogger("llama_crab.tools")


class _Call(Protocol):
    @property
    def id(self) -> str: ...
    @property
    def name(self) -> str: ...
    @property
    def arguments(self) -> str: ...


class _Message(Protocol):
    def to_dict(self) -> dict[str, Any]: ...


class _Answer(Protocol):
    """What the loop has to know of a `ChatCompletion`."""

    @property
    def message(self) -> _Message: ...
    @property
    def tool_calls(self) -> Sequence[_Call]: ...
    @property
    def finish_reason(self) -> str: ...


_Completion = TypeVar("_Completion", bound=_Answer)


@dataclass(frozen=True, slots=True)
class ToolRun(Generic[_Completion]):
    """How a conversation with tools ended. Thread-safety: immutable.

    ``completion`` is the last answer; its finish reason is ``"tool_calls"`` where the steps were
    used up before the model was done. ``messages`` is the whole conversation, the results of all
    calls included, and can be continued. ``n_steps`` counts the answers.
    """

    completion: _Completion
    messages: _Messages
    n_steps: int


def run_tool_loop(
    ask: Callable[[_Messages], _Completion],
    messages: Iterable[Mapping[str, Any]],
    tools: Sequence[Tool],
    max_steps: int = 8,
) -> ToolRun[_Completion]:
    """Ask until an answer calls no tool, or `max_steps` times.

    Calls run one after the other. What a tool raises, arguments that do not validate, and names of
    no tool are told to the model as the result of the call, ``{"error": "..."}``, and logged as
    warnings of ``llama_crab.tools``. An answer that is cut (finish reason ``"length"``) ends the
    loop, and its calls are not run. Only the first choice counts.

    Raises `ParameterError` for tools without a function or with an asynchronous one and for
    `max_steps` below 1, and whatever `ask` raises.
    """
    known = _checked(tools, max_steps)
    for i, tool in enumerate(tools):
        if tool.is_async:
            # No model can do anything about it.
            raise ParameterError(
                f"tools[{i}]: {tool.name!r} is asynchronous; use AsyncLlama, or arun_tool_loop"
            )
    history = [dict(message) for message in messages]
    n_steps = 0
    while n_steps < max_steps:
        n_steps += 1
        # A copy, that is not changed once it is somebody else's.
        completion = ask(list(history))
        calls = _told(completion, history)
        if not calls:
            break
        history += [_result(call, known) for call in calls]
    return ToolRun(completion, history, n_steps)


async def arun_tool_loop(
    ask: Callable[[_Messages], Awaitable[_Completion]],
    messages: Iterable[Mapping[str, Any]],
    tools: Sequence[Tool],
    max_steps: int = 8,
) -> ToolRun[_Completion]:
    """Do as `run_tool_loop`, with the calls of one answer at the same time.

    Tools may be asynchronous; others run in threads. When the loop is cancelled, so are its calls,
    except those in threads, which nobody waits for any more.
    """
    import asyncio

    known = _checked(tools, max_steps)
    history = [dict(message) for message in messages]
    n_steps = 0
    while n_steps < max_steps:
        n_steps += 1
        completion = await ask(list(history))
        calls = _told(completion, history)
        if not calls:
            break
        async with asyncio.TaskGroup() as group:
            tasks = [group.create_task(_aresult(call, known)) for call in calls]
        history += [task.result() for task in tasks]
    return ToolRun(completion, history, n_steps)


def _checked(tools: Sequence[Tool], max_steps: int) -> dict[str, Tool]:
    if isinstance(max_steps, bool) or not isinstance(max_steps, int) or max_steps < 1:
        raise ParameterError(f"max_steps: expected an integer above 0, not {max_steps!r:.80}")
    for i, tool in enumerate(tools):
        if tool.function is None:
            raise ParameterError(f"tools[{i}]: {tool.name!r} has no function to call")
    return {tool.name: tool for tool in tools}


def _told(completion: _Answer, history: _Messages) -> Sequence[_Call]:
    """Add an answer to the conversation and return its calls."""
    message = completion.message.to_dict()
    calls = completion.tool_calls if completion.finish_reason == "tool_calls" else ()
    if not calls:
        # Calls without results, perhaps half of one: no template takes them.
        message.pop("tool_calls", None)
        message["content"] = message.get("content") or ""
    history.append(message)
    return calls


def _result(call: _Call, known: Mapping[str, Tool]) -> dict[str, Any]:
    try:
        text = tool_result_text(_known(call, known).call(call.arguments))
    except Exception as error:  # of any kind: the model may know better
        text = _error_text(call, error)
    return _message(call, text)


async def _aresult(call: _Call, known: Mapping[str, Tool]) -> dict[str, Any]:
    try:
        text = tool_result_text(await _known(call, known).acall(call.arguments))
    except Exception as error:
        text = _error_text(call, error)
    return _message(call, text)


def _known(call: _Call, known: Mapping[str, Tool]) -> Tool:
    if call.name not in known:
        names = ", ".join(known) or "none"
        raise ToolError.of(call.name, f"there is no such tool, only: {names}")
    return known[call.name]


def _message(call: _Call, text: str) -> dict[str, Any]:
    return {"role": "tool", "tool_call_id": call.id, "name": call.name, "content": text}


def _error_text(call: _Call, error: Exception) -> str:
    # The log has the traceback; a model has no use for it.
    _logger.warning("tool %r failed", call.name, exc_info=error)
    reason = str(error) if isinstance(error, ToolError) else f"{type(error).__name__}: {error}"
    return json.dumps({"error": reason[:_LONGEST_REASON]}, ensure_ascii=False)
