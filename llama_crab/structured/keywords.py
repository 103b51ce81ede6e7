"""Which keywords of JSON Schema can be guaranteed, and the check that a schema has no other."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from decimal import Decimal
from typing import Any

from ..errors import RegexError, SchemaError
from .formats import NO_RESTRICTION, PATTERNS
from .gbnf import MOST_REPEATS
from .ranges import LONGEST_BOUND
from .regex import parse_regex

TYPES = ("null", "boolean", "integer", "number", "string", "array", "object")

ANNOTATIONS = frozenset(
    {"title", "description", "default", "examples", "example", "deprecated", "readOnly"}
    | {"writeOnly", "$comment", "$schema", "$id", "$anchor", "discriminator"}
)
# They hold schemas by name that only count where something refers to them.
DEFINITIONS = ("$defs", "definitions")
# They hold one schema, several, or several by name.
_ONE = ("additionalProperties", "propertyNames", "items", "additionalItems")
_LISTS = ("anyOf", "oneOf", "allOf", "prefixItems")

_NO_GUARANTEE = frozenset(
    {"not", "if", "then", "else", "patternProperties", "dependentRequired", "dependentSchemas"}
    | {"dependencies", "contains", "minContains", "maxContains", "unevaluatedProperties"}
    | {"unevaluatedItems", "$dynamicRef", "$dynamicAnchor", "$recursiveRef", "$recursiveAnchor"}
    | {"$vocabulary", "contentEncoding", "contentMediaType", "contentSchema", "nullable"}
)


def pointer(path: str, *parts: str | int) -> str:
    """Return the JSON pointer to a part of what `path` points to."""
    return "/".join([path, *[str(p).replace("~", "~0").replace("/", "~1") for p in parts]])


def check_keywords(schema: Any, path: str) -> None:
    """Check one schema without those inside it. Raises `SchemaError`."""
    if isinstance(schema, bool):
        return
    if not isinstance(schema, Mapping):
        raise SchemaError.at("schema", path, f"expected an object or a boolean, not {schema!r:.80}")
    for keyword, value in schema.items():
        check = _CHECKS.get(keyword)
        if check is not None:
            reason = check(value)
            if reason:
                raise SchemaError.at(keyword, path, reason)
        elif keyword in _NO_GUARANTEE:
            raise SchemaError.at(keyword, path, "not supported: no grammar can guarantee it here")
        elif keyword not in ANNOTATIONS and not keyword.startswith("x-"):
            raise SchemaError.at(keyword, path, "not a known keyword")
    if "$id" in schema and path != "#":
        raise SchemaError.at("$id", path, "only the whole schema can have one")


def children(schema: Any, path: str) -> dict[str, Any]:
    """Return the schemas inside of a checked one by their paths, definitions left out."""
    if isinstance(schema, bool):
        return {}
    found = {}
    for keyword in _ONE:
        value = schema.get(keyword)
        if isinstance(value, list):
            found.update({pointer(path, keyword, i): each for i, each in enumerate(value)})
        elif keyword in schema:
            found[pointer(path, keyword)] = value
    for keyword in _LISTS:
        for i, each in enumerate(schema.get(keyword, ())):
            found[pointer(path, keyword, i)] = each
    for name, each in schema.get("properties", {}).items():
        found[pointer(path, "properties", name)] = each
    return found


def _type(value: Any) -> str:
    names = [value] if isinstance(value, str) else value
    if isinstance(names, list) and names and all(name in TYPES for name in names):
        return ""
    return f"expected {', '.join(TYPES)} or a list of them, not {value!r:.80}"


def _values(value: Any) -> str:
    if not isinstance(value, list):
        return f"expected a list of values, not {value!r:.80}"
    return next(filter(None, map(_value, value)), "")


def _value(value: Any) -> str:
    if isinstance(value, float) and not math.isfinite(value):
        return "a number is not finite"
    if isinstance(value, str) and any("\ud800" <= char <= "\udfff" for char in value):
        return "a string has a lone surrogate, which UTF-8 cannot write"
    inside = [*value, *value.values()] if isinstance(value, dict) else value
    if isinstance(inside, list):
        return next(filter(None, map(_value, inside)), "")
    return ""


def _count(value: Any) -> str:
    number = isinstance(value, (int, float)) and not isinstance(value, bool)
    if not number or not 0 <= value < math.inf or value != int(value):
        return f"expected an integer that is not negative, not {value!r:.80}"
    return f"more than {MOST_REPEATS}" if value > MOST_REPEATS else ""


def _number(value: Any) -> str:
    if not isinstance(value, (int, float)) or isinstance(value, bool):
        return f"expected a number, not {value!r:.80}"
    too_long = abs(value) >= 10**LONGEST_BOUND or math.isnan(value)
    if too_long or len(f"{abs(Decimal(repr(value))):f}") > LONGEST_BOUND:
        return f"expected a number of at most {LONGEST_BOUND} digits"
    return ""


def _step(value: Any) -> str:
    if _number(value):
        return _number(value)
    if value <= 0:
        return "expected a number above 0"
    # 0.1 is no binary fraction: validators disagree on what it divides.
    return "" if value == int(value) else "only integers are supported"


def _schema(value: Any) -> str:
    return "" if isinstance(value, (dict, bool)) else f"expected a schema, not {value!r:.80}"


def _schemas(value: Any) -> str:
    if not isinstance(value, list) or not value:
        return f"expected a list of schemas, not {value!r:.80}"
    return next(filter(None, map(_schema, value)), "")


def _items(value: Any) -> str:
    # As drafts before 2020-12 write what is prefixItems now.
    return _schemas(value) if isinstance(value, list) else _schema(value)


def _named(value: Any) -> str:
    if not isinstance(value, dict):
        return f"expected schemas by name, not {value!r:.80}"
    return next(filter(None, map(_schema, value.values())), "") or _values(list(value))


def _definitions(value: Any) -> str:
    return "" if isinstance(value, dict) else f"expected schemas by name, not {value!r:.80}"


def _names(value: Any) -> str:
    if not isinstance(value, list) or not all(isinstance(name, str) for name in value):
        return f"expected a list of names, not {value!r:.80}"
    return _values(value)


def _text(value: Any) -> str:
    return "" if isinstance(value, str) else f"expected a string, not {value!r:.80}"


def _pattern(value: Any) -> str:
    if not isinstance(value, str):
        return _text(value)
    try:
        parse_regex(value, whole=False)
    except RegexError as error:
        return str(error)
    return ""


def _format(value: Any) -> str:
    if isinstance(value, str) and (value in PATTERNS or value in NO_RESTRICTION):
        return ""
    return f"{value!r:.80} is not supported, only {', '.join(PATTERNS)}"


def _false(value: Any) -> str:
    return "" if value is False else "not supported: no grammar can guarantee it here"


_CHECKS: dict[str, Callable[[Any], str]] = {
    "type": _type,
    "enum": _values,
    "const": _value,
    **dict.fromkeys(("minLength", "maxLength", "minItems", "maxItems"), _count),
    **dict.fromkeys(("minProperties", "maxProperties"), _count),
    **dict.fromkeys(("minimum", "maximum", "exclusiveMinimum", "exclusiveMaximum"), _number),
    "multipleOf": _step,
    "pattern": _pattern,
    "format": _format,
    "properties": _named,
    "required": _names,
    "additionalProperties": _schema,
    "propertyNames": _schema,
    "items": _items,
    "prefixItems": _schemas,
    "additionalItems": _schema,
    "uniqueItems": _false,
    **dict.fromkeys(("anyOf", "oneOf", "allOf"), _schemas),
    "$ref": _text,
    **dict.fromkeys(DEFINITIONS, _definitions),
}
