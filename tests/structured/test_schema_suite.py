"""The required draft 2020-12 tests of the official JSON Schema Test Suite, by the grammars' rules.

Of each schema that converts: no instance that the suite calls invalid passes, every document that
a walk makes is valid for `jsonschema`, and every valid instance passes but those listed here with
the reason. A schema that does not convert has a keyword, or a use of one, that is listed too.
"""

from __future__ import annotations

import json
from collections import Counter
from pathlib import Path
from typing import Any

import jsonschema
import pytest
from walks import Walker

from llama_crab.errors import SchemaError
from llama_crab.structured.json_grammar import schema_to_gbnf

DATA = Path(__file__).resolve().parent.parent / "data" / "json_schema_suite.json"
SUITE: dict[str, list[dict[str, Any]]] = json.loads(DATA.read_text(encoding="utf-8"))

# Keywords that no schema with them may be converted: (where the suite has them) the errors name it.
UNSUPPORTED = (
    *("not", "if", "then", "else", "patternProperties", "dependentRequired", "dependentSchemas"),
    *("contains", "minContains", "maxContains", "unevaluatedProperties", "unevaluatedItems"),
    *("$dynamicRef", "$dynamicAnchor", "contentEncoding", "contentMediaType", "contentSchema"),
)
# Of keywords that are supported: what is refused all the same, by keyword, and how many schemas.
REFUSED = {
    "oneOf": "branches that overlap",
    "multipleOf": "no bounds, or fractions",
    "uniqueItems": "true",
    "format": "formats without a pattern",
    "$ref": "to another document, by name or by $id",
    "$id": "inside of the document",
    "schema": "nothing can satisfy it",
}
# Valid instances that do not pass, and why.
UNDECLARED = "undeclared keys are not written"
ORDER = "keys come in the order of the schema"
SPELLING = "a number has one spelling"
FORMAT = "the suite takes format for an annotation; here it holds"
MISSED = {
    ("additionalProperties", "additionalProperties are allowed by default"): (UNDECLARED, 1),
    ("allOf", "allOf"): (ORDER, 1),
    ("allOf", "allOf with base schema"): (UNDECLARED, 1),
    ("anyOf", "anyOf complex types"): (UNDECLARED, 1),
    ("const", "const with object"): (ORDER, 1),
    ("const", "const with 0 does not match other zero-like types"): (SPELLING, 1),
    ("const", "const with 1 does not match true"): (SPELLING, 1),
    ("const", "const with -2.0 matches integer and float types"): (SPELLING, 1),
    ("const", "float and integers are equal up to 64-bit representation limits"): (SPELLING, 1),
    ("enum", "enum with 0 does not match false"): (SPELLING, 1),
    ("enum", "enum with [0] does not match [false]"): (SPELLING, 1),
    ("enum", "enum with 1 does not match true"): (SPELLING, 1),
    ("enum", "enum with [1] does not match [true]"): (SPELLING, 1),
    ("properties", "object properties validation"): (UNDECLARED, 1),
    ("type", "integer type matches integers"): (SPELLING, 1),
    ("vocabulary", "schema that uses custom metaschema with with no validation vocabulary"): (
        "its metaschema turns the keywords off",
        1,
    ),
    **{
        ("format", f"{name} format"): (FORMAT, 1)
        for name in (
            *("email", "ipv4", "ipv6", "hostname", "date", "date-time", "time", "uri", "uuid"),
            "duration",
        )
    },
}


def _groups() -> list[tuple[str, dict[str, Any]]]:
    return [(name, group) for name, groups in SUITE.items() for group in groups]


def test_the_suite_by_the_grammars(walker: Walker) -> None:
    counts: Counter[str] = Counter()
    refused: Counter[str] = Counter()
    missed: Counter[tuple[str, str]] = Counter()
    for name, group in _groups():
        try:
            gbnf = schema_to_gbnf(group["schema"])
        except SchemaError as error:
            refused[error.keyword] += 1
            continue
        counts["converted"] += 1
        for data, valid in group["tests"]:
            passes = walker.accepts(gbnf, json.dumps(data, ensure_ascii=False))
            assert valid or not passes, (name, group["description"], data)
            counts["valid" if valid else "invalid"] += 1
            if valid and not passes:
                missed[name, group["description"]] += 1
    print(counts, refused, sum(missed.values()))
    assert set(refused) <= {*UNSUPPORTED, *REFUSED}
    assert missed == {at: n for at, (_, n) in MISSED.items()}
    assert counts["converted"] >= 150
    assert counts["valid"] >= 340
    assert counts["invalid"] >= 220


def test_walks_through_the_suite_make_valid_documents(walker: Walker) -> None:
    n = 0
    for name, group in _groups():
        schema = group["schema"]
        try:
            gbnf = schema_to_gbnf(schema)
        except SchemaError:
            continue
        if name == "vocabulary":
            continue  # its metaschema is on no disk
        validator = jsonschema.Draft202012Validator(
            schema, format_checker=jsonschema.Draft202012Validator.FORMAT_CHECKER
        )
        for seed in range(3):
            text = walker.text(gbnf, seed)
            document = json.loads(text)
            assert validator.is_valid(document), (name, group["description"], text)
            # Compact, or with single blanks: never more.
            compact = json.dumps(document, ensure_ascii=False, separators=(",", ":"))
            if "\\" not in text and "e" not in text.lower():
                assert len(text) <= 2 * len(compact) + 40
            n += 1
    assert n >= 450


@pytest.mark.parametrize("keyword", UNSUPPORTED)
def test_an_unsupported_keyword_is_refused_wherever_it_stands(keyword: str) -> None:
    value: Any = {"if": True}.get(keyword, {})
    inside = {"type": "array", "items": {"anyOf": [{"properties": {"a/b~c": {keyword: value}}}]}}
    for schema, path in (
        ({keyword: value}, "#"),
        (inside, "#/items/anyOf/0/properties/a~1b~0c"),
        ({"$defs": {"x": {"allOf": [{keyword: value}]}}, "$ref": "#/$defs/x"}, "#/$defs/x/allOf/0"),
    ):
        with pytest.raises(SchemaError) as caught:
            schema_to_gbnf(schema)
        assert (caught.value.keyword, caught.value.path) == (keyword, path)
        assert isinstance(caught.value, ValueError)


def test_every_schema_of_the_suite_with_an_unsupported_keyword_is_refused() -> None:
    n = 0
    for name, group in _groups():
        schema = group["schema"]
        if name in ("refRemote", "vocabulary", "ref") or not isinstance(schema, dict):
            continue
        if set(schema) & set(UNSUPPORTED):
            n += 1
            with pytest.raises(SchemaError):
                schema_to_gbnf(schema)
    assert n > 100
