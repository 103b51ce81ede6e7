"""The grammar of a tool's arguments."""

from __future__ import annotations

from typing import Any

from ..errors import SchemaError
from ..structured.gbnf import Rules
from ..structured.json_grammar import add_schema


def add_arguments(name: str, parameters: dict[str, Any], rules: Rules) -> int:
    """Add the JSON objects that are arguments of a tool to a grammar; return their rule.

    Raises `SchemaError`, which names tool, keyword and path.
    """
    return add_value(name, _closed(parameters), rules)


def add_value(name: str, schema: dict[str, Any], rules: Rules) -> int:
    """Add the values of a schema of a tool to a grammar; return their rule. Raises as above."""
    try:
        return add_schema(schema, rules)
    except SchemaError as error:
        named = SchemaError(f"tool {name!r}: {error.args[0]}")
        named.keyword, named.path = error.keyword, error.path
        raise named from None


def _closed(schema: dict[str, Any]) -> dict[str, Any]:
    """Return the schema of a tool without parameters as one that allows none."""
    # To JSON Schema, an object without declared properties is any object.
    says_more = schema.keys() - {"type", "properties", "required", "title", "description"}
    if says_more or schema.get("properties") or schema.get("required"):
        return schema
    return {**schema, "additionalProperties": False}
