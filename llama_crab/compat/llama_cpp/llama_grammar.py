"""`LlamaGrammar`: GBNF as llama-cpp-python passes it around."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any

from ...params import ParameterError
from ...structured import structured_output

LLAMA_GRAMMAR_DEFAULT_ROOT = "root"
JSON_GBNF = r"""root ::= object
object ::= "{" blank (member ("," blank member)*)? "}" blank
member ::= string ":" blank value
array ::= "[" blank (value ("," blank value)*)? "]" blank
value ::= object | array | string | number | ("true" | "false" | "null") blank
string ::= "\"" (plain | "\\" escape)* "\"" blank
plain ::= [^"\\\x00-\x1F\x7F]
escape ::= ["\\/bfnrt] | "u" [0-9a-fA-F]{4}
number ::= "-"? ("0" | [1-9] [0-9]{0,15}) ("." [0-9]{1,15})? ([eE] [-+]? [0-9]{1,3})? blank
blank ::= (" " | "\n" [ \t]{0,20})?
"""
"""GBNF of any JSON object."""


class LlamaGrammar:
    """A GBNF grammar with the rule ``root``. Thread-safety: immutable."""

    def __init__(self, *, _grammar: str) -> None:
        self._grammar = _grammar
        self._root = LLAMA_GRAMMAR_DEFAULT_ROOT

    @classmethod
    def from_string(cls, grammar: str, verbose: bool = True) -> LlamaGrammar:
        """Return the grammar of a GBNF text, which is parsed when it is used (`GrammarError`)."""
        if not isinstance(grammar, str) or not grammar.strip():
            raise ParameterError(f"grammar: expected GBNF text, not {grammar!r}")
        return cls(_grammar=grammar)

    @classmethod
    def from_file(cls, file: str | os.PathLike[str], verbose: bool = True) -> LlamaGrammar:
        """Return the grammar in a UTF-8 file. Raises OSError, `ParameterError` for an empty one."""
        return cls.from_string(Path(file).read_text(encoding="utf-8"), verbose)

    @classmethod
    def from_json_schema(cls, json_schema: str, verbose: bool = True) -> LlamaGrammar:
        """Return a grammar of the documents of a JSON schema, given as JSON text (or parsed).

        Raises `SchemaError` for what cannot be guaranteed.
        """
        return cls(_grammar=json_schema_to_gbnf(json_schema))

    def __repr__(self) -> str:
        return f"<LlamaGrammar of {len(self._grammar)} characters>"


def json_schema_to_gbnf(schema: str, prop_order: list[str] | None = None) -> str:
    """Return the GBNF of a JSON schema; `prop_order` puts properties of these names first.

    Raises `SchemaError`, `ParameterError` for text that is no JSON.
    """
    try:
        parsed: Any = json.loads(schema) if isinstance(schema, str) else schema
    except ValueError as error:
        raise ParameterError(f"json_schema: not JSON: {error}") from None
    if prop_order and isinstance(parsed, dict) and isinstance(parsed.get("properties"), dict):
        ranks = {name: rank for rank, name in enumerate(prop_order)}
        names = sorted(parsed["properties"], key=lambda name: ranks.get(name, len(ranks)))
        parsed = {**parsed, "properties": {name: parsed["properties"][name] for name in names}}
    wanted = {"type": "json_schema", "json_schema": {"name": "answer", "schema": parsed}}
    output = structured_output(wanted)
    if output is None or output.gbnf is None:
        raise ParameterError("json_schema: it asks for nothing")
    return output.gbnf


def grammar_text(grammar: Any) -> str | None:
    """Return the GBNF of what is given as ``grammar``: a `LlamaGrammar`, text, or None."""
    if grammar is None or isinstance(grammar, str):
        return grammar
    if isinstance(grammar, LlamaGrammar):
        return grammar._grammar
    raise ParameterError(f"grammar: expected a LlamaGrammar, not {grammar!r}")
