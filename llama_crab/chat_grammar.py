"""Grammars of tool calls: llama-common's, with our rules of the arguments and of what is around."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

from . import _core
from .params import ParameterError

if TYPE_CHECKING:
    from .structured.gbnf import Rules
    from .tools import Tool

# Some of llama-common's grammars allow more than one call in any case; and where its grammar of a
# required call lets text come first, which may go on for ever.
_MORE_CALLS = re.compile(r"^(tool-calls ::= )\((tool-call space)\)\+$", re.MULTILINE)
_TEXT_BEFORE_CALL = re.compile(
    r"^(root ::= .*?)\buntil-\d+\??\s+((?:space )?[\w-]*tool-call)", re.M
)
# An optional id behind the arguments (Mistral Nemo), any string or number. The template takes back
# none but those of nine letters and digits.
_LATE_ID = (
    r'("\"id\"" space ":" space ("\"" '
    r'( [^"\\] | "\\" ( ["\\/ bfnrt] | "u" [0-9a-fA-F]{4} ) )* "\"" | json-number))? space "}"'
)
_NINE = r'"\"id\"" space ":" space "\"" [a-zA-Z0-9]{9} "\"" space "}"'
# What llama-common's grammars allow as a blank, and what its names of rules cannot have.
_SPACE = r"(?: |\n{1,2}[ \t]{0,20})?"
_NOT_IN_NAMES = re.compile(r"[^a-zA-Z0-9-]+")


def call_grammar(gbnf: str, tools: Sequence[Tool], *, parallel: bool) -> str:
    """Return llama-common's grammar of an answer with calls, with arguments that satisfy schemas.

    Its converter of schemas passes over keywords that it does not know; ours writes the rules of
    arguments instead. Where a format has the arguments one by one, those in JSON are ours.

    Raises `SchemaError`, which names tool, keyword and path.
    """
    if not parallel:
        gbnf = _MORE_CALLS.sub(r"\1\2", gbnf)
    gbnf = gbnf.replace(_LATE_ID, _NINE)
    known: dict[str, str] = {}
    for i, tool in enumerate(tools):
        name = _NOT_IN_NAMES.sub("-", tool.name)
        if name in known:
            raise ParameterError(
                f"tools: the template's grammar cannot tell {known[name]!r} from {tool.name!r}"
            )
        known[name] = tool.name
        gbnf = _with_arguments(gbnf, tool, name, f"own-{i}")
    return gbnf


def without_text_before(gbnf: str) -> str:
    """Return the grammar of a call that is asked for without text in front of it."""
    return _TEXT_BEFORE_CALL.sub(r"\1\2", gbnf)


def bare_call(gbnf: str, tools: Sequence[Tool]) -> tuple[str, str]:
    """Return the grammar of a call in plain JSON, and the pattern of how one begins.

    llama-common has none for such calls where they are not asked for: they have no mark (Llama 3),
    and what begins with a brace may be text. From the name of a tool on it is a call.
    """
    names = "|".join([re.escape(tool.name) for tool in tools])
    kind = rf'(?:"type"{_SPACE}:{_SPACE}"function"{_SPACE},{_SPACE})?'
    head = rf'\{{{_SPACE}{kind}"name"{_SPACE}:{_SPACE}"(?:{names})"'
    return re.sub(r"^root ::= .*$", "root ::= tool-call", gbnf, flags=re.MULTILINE), head


def bare_trigger(head: str) -> str:
    """Return the trigger of a call's beginning; the last token may reach past it."""
    return rf'({head}(?:{_SPACE},(?:{_SPACE}"?)?)?)(?![\s\S])'


def triggers(prompt: _core.ChatPrompt) -> tuple[list[str], list[int]]:
    """Return the patterns and tokens that wake a lazy grammar."""
    patterns, tokens = [], []
    for kind, value, token in prompt.grammar_triggers:
        if kind == "token" and token is not None:
            tokens.append(token)
        elif kind == "word":
            patterns.append(re.sub(r"([.^$|()*+?\[\]{}\\/])", r"\\\1", value))
        elif kind == "pattern_full":
            patterns.append(f"^{value.removeprefix('^').removesuffix('$')}$")
        else:
            patterns.append(value)
    return patterns, tokens


def _with_arguments(gbnf: str, tool: Tool, name: str, prefix: str) -> str:
    from .structured.gbnf import Rules
    from .tools.arguments import add_arguments, add_value

    rules = Rules()
    root = add_arguments(tool.name, tool.parameters, rules)
    found = _replaced(gbnf, f"tool-{name}-schema", rules, root, prefix)
    if found is not None:
        return found
    properties = tool.parameters.get("properties", {})
    definitions: dict[str, Any] = {
        key: tool.parameters[key] for key in ("$defs", "definitions") if key in tool.parameters
    }
    ends = [_NOT_IN_NAMES.sub("-", key) for key in properties]
    for i, (end, schema) in enumerate(zip(ends, properties.values(), strict=True)):
        if ends.count(end) > 1 or not isinstance(schema, Mapping):
            continue
        for start in (f"tool-{name}-arg", f"ling3-arg-{name}"):
            rules = Rules()
            root = add_value(tool.name, {**definitions, **schema}, rules)
            found = _replaced(gbnf, f"{start}-{end}-schema", rules, root, f"{prefix}-{i}")
            gbnf = gbnf if found is None else found
    return gbnf


def _replaced(gbnf: str, name: str, rules: Rules, root: int, prefix: str) -> str | None:
    """Return the grammar with another definition of a rule, None where it has no such rule."""
    at = re.search(rf"^{re.escape(name)} ::= .*\n?", gbnf, re.MULTILINE)
    if at is None:
        return None
    own = rules.to_gbnf(root, name=name, prefix=f"{prefix}-r")
    return f"{gbnf[: at.start()]}{own}{gbnf[at.end() :]}"
