"""How long it takes to make a grammar of a JSON schema, and to parse what was made."""

from __future__ import annotations

from typing import Any

import pytest
from pytest_benchmark.fixture import BenchmarkFixture

from llama_crab.structured.json_grammar import schema_to_gbnf

_KINDS: tuple[dict[str, Any], ...] = (
    {"type": "string", "description": "free text"},
    {"type": "string", "maxLength": 80},
    {"type": "string", "format": "date-time"},
    {"type": "string", "pattern": "^[A-Z]{2}-[0-9]{4}$"},
    {"type": "integer", "minimum": 0, "maximum": 100_000},
    {"type": "number", "exclusiveMinimum": 0},
    {"enum": ["red", "green", "blue", None]},
    {"type": "array", "items": {"type": "string"}, "maxItems": 10},
    {"$ref": "#/$defs/place"},
    {"anyOf": [{"type": "integer"}, {"type": "null"}]},
)


def schema_of(n: int, *, optional: bool) -> dict[str, Any]:
    """Return an object of `n` properties, of all kinds in turn."""
    names = [f"property_{i}" for i in range(n)]
    return {
        "type": "object",
        "properties": {name: _KINDS[i % len(_KINDS)] for i, name in enumerate(names)},
        "required": names[:: 2 if optional else 1],
        "additionalProperties": False,
        "$defs": {
            "place": {
                "type": "object",
                "properties": {"city": {"type": "string"}, "inside": {"$ref": "#/$defs/place"}},
                "required": ["city"],
                "additionalProperties": False,
            }
        },
    }


@pytest.mark.parametrize("optional", [False, True], ids=["required", "half optional"])
@pytest.mark.parametrize("n", [5, 50, 500])
@pytest.mark.benchmark(group="schema conversion")
def test_schema_conversion(
    benchmark: BenchmarkFixture, figures: dict[str, Any], n: int, optional: bool
) -> None:
    schema = schema_of(n, optional=optional)
    gbnf = benchmark(schema_to_gbnf, schema)
    figure = {"ms": round(benchmark.stats["median"] * 1e3, 3), "gbnf_bytes": len(gbnf)}
    benchmark.extra_info.update(figure)
    figures[f"schema_conversion/{'half optional' if optional else 'required'}/{n}"] = figure
