"""Tool calls for models whose chat template knows no tools, in Hermes' form.

The tools are told in the system message, past calls and results become plain messages, and a
grammar makes new calls well-formed: no template and no training has to do with it, though models
trained on Hermes' form do better.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping, Sequence
from functools import lru_cache
from typing import TYPE_CHECKING, Any

from ..params import ParameterError
from ..structured.gbnf import Item, Rules, literal
from .arguments import add_arguments
from .fallback_parser import CLOSE, OPEN, FallbackParser
from .tool import Tool, normalize_tool_choice

if TYPE_CHECKING:
    from ..sampling import SamplerChain

_N_KEPT = 32
# The last token may reach past the mark. Where it goes on as no call does, the mark was text, and
# the grammar, which would refuse it, does not begin.
_TRIGGER = rf'({OPEN}\n?(?:\{{"?)?)(?![\s\S])'
_INTRODUCTION = """You can call the functions listed between <tools> and </tools>, each given as a \
JSON object with the JSON schema of its arguments:
<tools>
{tools}
</tools>

To call a function, write a JSON object with its name and its arguments between <tool_call> and \
</tool_call>:
<tool_call>
{{"name": "the name of the function", "arguments": {{"the name of an argument": "its value"}}}}
</tool_call>
The result is given to you between <tool_response> and </tool_response>."""


class ToolFallback:
    """What a request with tools needs where the template has no place for them.

    ``system_text`` tells the model of the tools; `messages` makes a conversation of plain messages.
    ``gbnf`` is the grammar of the answer, "" for none; with ``lazy``, it holds from the first match
    of ``trigger`` on, an ECMAScript pattern of which the first group is what the grammar begins
    with. `constrain` adds it to a chain. `parser` reads the answer.

    With ``"auto"`` an answer is free until it begins a call, with ``"required"`` or a name it is a
    call. With `parallel` more calls may follow the first; behind the calls the answer ends.
    Arguments satisfy their tool's schema. Thread-safety: immutable.

    Raises `ParameterError` for a choice that is none, and `SchemaError`, which names tool, keyword
    and path, for a schema that cannot be guaranteed.
    """

    def __init__(
        self,
        tools: Sequence[Tool],
        tool_choice: str | Mapping[str, Any] | None = "auto",
        parallel: bool = False,
    ) -> None:
        mode, name = normalize_tool_choice(tool_choice, tools)
        self.tools = tuple(tools)
        self.lazy = mode == "auto" and bool(self.tools)
        self.trigger = _TRIGGER if self.lazy else None
        self.gbnf = ""
        # Whatever the choice: the prompts of a conversation have to begin alike, for the cache.
        self.system_text = _system_text(self.tools, parallel) if self.tools else ""
        if self.tools and mode != "none":
            allowed = [tool for tool in self.tools if name in (None, tool.name)]
            self.gbnf = _gbnf(
                tuple([(tool.name, json.dumps(tool.parameters)) for tool in allowed]),
                self.lazy,
                parallel,
            )

    def messages(self, messages: Iterable[Mapping[str, Any]]) -> list[dict[str, Any]]:
        """Return a conversation in OpenAI's form without tool calls and results.

        A call becomes part of its assistant message's text, as the grammar writes it; results
        become text of a user message. ``system_text`` is not added: see `with_system_text`.
        Raises `ParameterError` for a call without a name.
        """
        return plain_messages(messages)

    def with_system_text(self, messages: Iterable[Mapping[str, Any]]) -> list[dict[str, Any]]:
        """Return what `messages` does, with ``system_text`` at the end of the system message.

        Where the conversation begins with none, there is one in front.
        """
        found = plain_messages(messages)
        if not self.system_text:
            return found
        if found and found[0].get("role") in ("system", "developer"):
            content = _with_text(found[0].get("content"), self.system_text, "\n\n")
            return [{**found[0], "content": content}, *found[1:]]
        return [{"role": "system", "content": self.system_text}, *found]

    def constrain(self, chain: SamplerChain) -> SamplerChain:
        """Return a chain without a grammar with the one of the answer."""
        if not self.gbnf:
            return chain
        if self.trigger is not None:
            return chain.grammar_lazy(self.gbnf, trigger_patterns=[self.trigger])
        return chain.grammar(self.gbnf)

    def parser(self) -> FallbackParser:
        """Return a parser of one answer."""
        return FallbackParser()


def plain_messages(messages: Iterable[Mapping[str, Any]]) -> list[dict[str, Any]]:
    """Return a conversation with tool calls and results as text."""
    found: list[dict[str, Any]] = []
    names: dict[Any, Any] = {}
    # Some templates want user and assistant to take turns: results are one message, together with
    # what the user says behind them.
    in_results = False
    for i, message in enumerate(messages):
        role = message.get("role")
        if role == "tool":
            text = _result_text(message, names)
            if in_results:
                found[-1]["content"] = _with_text(found[-1]["content"], text, "\n")
            else:
                found.append({"role": "user", "content": text})
            in_results = True
            continue
        if role == "user" and in_results:
            results = found[-1]["content"]
            content = message.get("content")
            found[-1] = {**message, "content": _with_text(content, results, "\n", front=True)}
        elif role == "assistant" and message.get("tool_calls"):
            calls = message["tool_calls"]
            rest = {key: value for key, value in message.items() if key != "tool_calls"}
            try:
                names.update({call.get("id"): call["function"]["name"] for call in calls})
                text = "\n".join(map(_call_text, calls))
            except (TypeError, KeyError, AttributeError):
                raise ParameterError(
                    f"messages[{i}].tool_calls: expected calls with a 'function' of a 'name' and "
                    f"'arguments', not {calls!r:.80}"
                ) from None
            found.append({**rest, "content": _with_text(message.get("content"), text, "\n")})
        else:
            found.append(dict(message))
        in_results = False
    return found


def _call_text(call: Mapping[str, Any]) -> str:
    function = call["function"]
    arguments = function.get("arguments") or "{}"
    # As the model wrote them, so that the prefix cache knows them again.
    text = arguments if isinstance(arguments, str) else _dumps(arguments)
    return f'{OPEN}\n{{"name": {_dumps(function["name"])}, "arguments": {text}}}\n{CLOSE}'


def _result_text(message: Mapping[str, Any], names: Mapping[Any, Any]) -> str:
    content = message.get("content")
    if isinstance(content, list):
        content = "".join([part.get("text", "") for part in content])
    try:
        result = json.loads(content) if isinstance(content, str) else content
    except (ValueError, RecursionError):
        result = content
    name = message.get("name") or names.get(message.get("tool_call_id"))
    fields = {"content": result} if name is None else {"name": name, "content": result}
    # A result cannot end its own mark.
    text = _dumps(fields).replace("</", "<\\/")
    return f"<tool_response>\n{text}\n</tool_response>"


def _with_text(content: Any, text: str, between: str, *, front: bool = False) -> Any:
    """Return a message's content, text or parts, with a text behind or in front of it."""
    if not content:
        return text
    if isinstance(content, str):
        return f"{text}{between}{content}" if front else f"{content}{between}{text}"
    part = {"type": "text", "text": text + between if front else between + text}
    return [part, *content] if front else [*content, part]


def _system_text(tools: Sequence[Tool], parallel: bool) -> str:
    text = _INTRODUCTION.format(tools="\n".join([_dumps(tool.to_dict()) for tool in tools]))
    text += " If no function helps, answer without one."
    return text + (" You can make several calls, one after the other." if parallel else "")


@lru_cache(_N_KEPT)
def _gbnf(tools: tuple[tuple[str, str], ...], lazy: bool, parallel: bool) -> str:
    rules = Rules()
    calls: list[tuple[Item, ...]] = []
    for name, parameters in tools:
        arguments = add_arguments(name, json.loads(parameters), rules)
        head = f'{{"name": {json.dumps(name)}, "arguments": '
        calls.append((literal(head), arguments, literal(f"}}\n{CLOSE}")))
    call = rules.add(calls)
    # The trigger lets the line end be missing.
    begin: tuple[Item, ...] = (
        (literal(OPEN), f"{literal(chr(10))}?") if lazy else (literal(f"{OPEN}\n"),)
    )
    more: tuple[Item, ...] = ()
    if parallel:
        more = rules.repeat((literal(f"\n{OPEN}\n"), call), 0, None)
    return rules.to_gbnf(rules.add([(*begin, call, *more)]))


def _dumps(value: Any) -> str:
    return json.dumps(value, ensure_ascii=False)
