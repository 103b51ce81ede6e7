"""Chat completions: our `ChatCompletion` as llama-cpp-python's dictionaries."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import TYPE_CHECKING, Any

from ...chat import ROLES
from ...chat_formats import FORMATS
from ...params import ParameterError
from .generation import response_schema, token_limit
from .llama_chat_format import template_of
from .notices import refuse, warn_once
from .rendered import complete_rendered
from .shapes import chat_chunk, chat_logprobs_dict, logprobs_dict, usage_dict

if TYPE_CHECKING:
    from ...chat import ChatChoice, ChatCompletion, ChatCompletionChunk, ToolCallDelta
    from .llama import Llama


# What a conversation may hold here. Templates there see all keys, and hardly one looks at another.
_FIELDS = ("role", "content", "name", "tool_calls", "tool_call_id", "reasoning_content")


def complete_chat(llama: Llama, given: Mapping[str, Any], **more: Any) -> Any:
    """Return what ``create_chat_completion`` of llama-cpp-python returns for its arguments.

    `more` are options of our own method, which win over those derived from `given`.
    """
    options = llama._request_options(given)
    tools, tool_choice = _tools(given)
    wanted = response_schema(given.get("response_format"))
    if tools and isinstance(tool_choice, Mapping):
        # There, too, the tool's form takes the place of any other, and a format that of a grammar.
        wanted = None
        options.pop("grammar", None)
    if wanted is not None:
        options["response_format"] = wanted
        options.pop("grammar", None)
    has_form = wanted is not None or "grammar" in options
    if tools:
        options["tools"] = tools
        if has_form and tool_choice in (None, "auto"):
            tool_choice = "none"
        if tool_choice is not None:
            options["tool_choice"] = tool_choice
    n_top = _n_top_logprobs(given.get("logprobs"), given.get("top_logprobs"))
    if n_top is not None:
        options["logprobs"] = n_top
    if "chat_template" not in more:
        options["chat_template"] = template_of(llama, llama.chat_format)
    # Programs that come from there expect a model's thoughts where the model wrote them; but an
    # answer of a form is that form and nothing else.
    options["reasoning_format"] = "auto" if has_form else "none"
    options |= more
    messages = [_message_in(message) for message in given["messages"]]
    n_most = token_limit(given.get("max_tokens"))
    name = llama.model_path if given.get("model") is None else given["model"]
    is_stream = bool(given.get("stream"))
    strange = [message["role"] for message in messages if message.get("role") not in ROLES]
    if strange and options["chat_template"] in FORMATS:
        warn_once("messages", f"the format has no place for role {strange[0]!r:.80}; left out")
        messages = [message for message in messages if message.get("role") in ROLES]
    elif strange:
        if tools:
            refuse("messages", f"role {strange[0]!r:.80} is not to be had together with tools")
        return complete_rendered(llama, messages, n_most, options, name, is_stream)
    if is_stream:
        return _stream(llama, messages, n_most, options, name, isinstance(tool_choice, Mapping))
    completion = llama.crab.create_chat_completion(messages, n_most, **options)
    return chat_dict(completion, name)


def chat_dict(completion: ChatCompletion, model: str) -> dict[str, Any]:
    """Return a ``chat.completion``."""
    choice = completion.choices[0]
    return {
        "id": completion.id,
        "object": "chat.completion",
        "created": completion.created,
        "model": model,
        "choices": [
            {
                "index": 0,
                "message": _message(choice),
                "logprobs": chat_logprobs_dict(logprobs_dict(choice.logprobs, 0, None)),
                "finish_reason": choice.finish_reason,
            }
        ],
        "usage": usage_dict(completion.usage),
    }


def chat_chunk_dicts(
    chunks: Iterable[ChatCompletionChunk], model: str, *, forced: bool
) -> Iterator[dict[str, Any]]:
    """Yield ``chat.completion.chunk`` objects; `forced` tells that the answer is a tool's call.

    The first has the role alone, the last the reason alone. A call's name comes once, so that
    readers may join the pieces of each field.
    """
    started = False
    called = forced
    for chunk in chunks:
        head = {"id": chunk.id, "model": model, "created": chunk.created}
        if not started:
            started = True
            role = {"role": "assistant"}
            yield chat_chunk(head, {**_no_call(), **role, "content": None} if forced else role)
        logprobs = chat_logprobs_dict(logprobs_dict(chunk.logprobs, 0, None))
        if chunk.delta.content:
            yield chat_chunk(head, {"content": chunk.delta.content}, logprobs)
            logprobs = None
        for call in chunk.delta.tool_calls:
            called = True
            yield chat_chunk(head, _call_delta(call), logprobs)
            logprobs = None
        if chunk.finish_reason is not None:
            yield chat_chunk(head, _no_call() if called else {}, None, chunk.finish_reason)


def _stream(
    llama: Llama,
    messages: list[dict[str, Any]],
    max_tokens: int | None,
    options: dict[str, Any],
    model: str,
    forced: bool,
) -> Iterator[dict[str, Any]]:
    with llama.crab.create_chat_completion(messages, max_tokens, stream=True, **options) as chunks:
        yield from chat_chunk_dicts(chunks, model, forced=forced)


def _message(choice: ChatChoice) -> dict[str, Any]:
    message = choice.message
    if not message.tool_calls:
        return {"role": "assistant", "content": message.content or ""}
    first = message.tool_calls[0]
    return {
        "role": "assistant",
        "content": message.content or None,
        # The older form, which knows one call.
        "function_call": {"name": first.name, "arguments": first.arguments},
        "tool_calls": [
            {
                "id": call.id,
                "type": "function",
                "function": {"name": call.name, "arguments": call.arguments},
            }
            for call in message.tool_calls
        ],
    }


def _message_in(message: Mapping[str, Any]) -> dict[str, Any]:
    """Return a message of the request, the older form of calls and results as the newer one."""
    if not isinstance(message, Mapping) or not isinstance(message.get("role"), str):
        raise ParameterError(f"messages: expected mappings with a role, not {message!r:.80}")
    found = {name: message[name] for name in _FIELDS if message.get(name) is not None}
    called = message.get("function_call")
    if called is not None and not found.get("tool_calls"):
        call = {"id": f"call_{called['name']}", "type": "function", "function": dict(called)}
        found["tool_calls"] = [call]
    if found["role"] == "function":
        found |= {"role": "tool", "tool_call_id": f"call_{found.get('name', '')}"}
    if "content" in message and not found.get("tool_calls"):
        found.setdefault("content", "")
    left_out = [name for name in message if name not in (*_FIELDS, "function_call")]
    if any(message[name] for name in left_out):
        warn_once("messages", f"{', '.join(map(str, left_out)):.80} of a message is not used")
    return found


def _call_delta(call: ToolCallDelta) -> dict[str, Any]:
    function = {"name": call.name, "arguments": call.arguments}
    return {
        "role": None,
        "content": None,
        "function_call": {"name": call.name or "", "arguments": call.arguments},
        "tool_calls": [
            {"index": call.index, "id": call.id, "type": "function", "function": function}
        ],
    }


def _no_call() -> dict[str, Any]:
    return {"role": None, "content": None, "function_call": None, "tool_calls": None}


def _tools(given: Mapping[str, Any]) -> tuple[Sequence[Any] | None, Any]:
    """Return tools and choice, those of the older form (``functions``) as the newer one."""
    tools, choice = given.get("tools"), given.get("tool_choice")
    if given.get("functions") is not None:
        tools = [{"type": "function", "function": function} for function in given["functions"]]
    called = given.get("function_call")
    if called is not None:
        is_named = isinstance(called, Mapping)
        choice = {"type": "function", "function": {"name": called["name"]}} if is_named else called
    if isinstance(choice, Mapping):
        # LangChain gives the whole tool.
        name = choice.get("function", {}).get("name")
        if name not in [tool["function"]["name"] for tool in tools or ()]:
            raise ParameterError(f"tool_choice: there is no tool {name!r}")
        choice = {"type": "function", "function": {"name": name}}
    return tools, choice


def _n_top_logprobs(logprobs: Any, top_logprobs: int | None) -> int | None:
    if not logprobs:
        return None
    if top_logprobs is None and not isinstance(logprobs, bool):
        # LangChain gives the number here.
        return int(logprobs)
    return top_logprobs or 0
