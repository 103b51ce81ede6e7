"""Random schemas: what a walk through their grammar gives validates with `jsonschema`."""

from __future__ import annotations

import json
import random
from collections import Counter
from typing import Any

import jsonschema
import pytest
from hypothesis import HealthCheck, Phase, given, settings
from hypothesis import strategies as st
from walks import Walker

from llama_crab.errors import SchemaError
from llama_crab.structured.json_grammar import schema_to_gbnf
from llama_crab.structured.keywords import children

CHECKER = jsonschema.Draft202012Validator.FORMAT_CHECKER
PATTERNS = ("^[a-z]{2,5}$", "[0-9]", "^(foo|ba[rz])-\\d{2}$", "^[^x]*$", "é+", "^\\S+@\\S+$", "\\.")
FORMATS = ("date", "time", "date-time", "uuid", "ipv4", "ipv6", "email", "duration")
NAMES = ("a", "b", "name", 'quo"te', "back\\slash", "line\nend", "ü", "日本", "😀", "a/b~c", "")
# None of them may satisfy a schema of which we say that nothing does.
ORDINARY = (
    *(None, True, 0, 1, 7, -20, 0.5, "", "a", "abc", "foo-12", "5", [], [1, 2], [[]], {}),
    *({"a": 1}, {"a": "x", "b": None}, {"name": []}),
)
texts = st.one_of(st.sampled_from(NAMES), st.text(max_size=5))
scalars = st.one_of(
    st.none(), st.booleans(), st.integers(-1000, 1000), texts,
    st.floats(-1e6, 1e6, allow_nan=False), st.sampled_from([0.0, 1.0, 1e22, -1e-7]),
)  # fmt: skip
values = st.recursive(
    scalars,
    lambda inner: st.one_of(st.lists(inner, max_size=3), st.dictionaries(texts, inner, max_size=3)),
    max_leaves=5,
)


def _with(**optional: st.SearchStrategy[Any]) -> st.SearchStrategy[dict[str, Any]]:
    return st.fixed_dictionaries({}, optional=optional)


# Bounds of more than 40 digits are refused.
bounds = st.one_of(
    st.integers(-300, 300),
    st.floats(-300, 300, allow_nan=False).map(lambda bound: round(bound, 14)),
)
numbers = st.builds(
    lambda kind, limits: {"type": kind, **limits},
    st.sampled_from(["integer", "number"]),
    _with(minimum=bounds, maximum=bounds, exclusiveMinimum=bounds, exclusiveMaximum=bounds),
)
multiples = st.builds(
    lambda step, low: {
        "type": "integer", "multipleOf": step, "minimum": low, "maximum": low + 9 * step,
    },
    st.integers(1, 12),
    st.integers(-50, 50),
)  # fmt: skip
strings = st.one_of(
    st.builds(
        lambda low, extra: {"type": "string", "minLength": low, "maxLength": low + extra},
        st.integers(0, 4),
        st.integers(0, 600),
    ),
    st.builds(lambda pattern: {"type": "string", "pattern": pattern}, st.sampled_from(PATTERNS)),
    st.builds(
        lambda pattern, low: {"pattern": pattern, "minLength": low, "maxLength": low + 8},
        st.sampled_from(PATTERNS),
        st.integers(0, 4),
    ),
    st.builds(lambda name: {"type": "string", "format": name}, st.sampled_from(FORMATS)),
)


def arrays(inner: st.SearchStrategy[Any]) -> st.SearchStrategy[dict[str, Any]]:
    return st.builds(
        lambda fields, low, extra: {
            "type": "array", **fields, "minItems": low,
            **({} if extra is None else {"maxItems": low + extra}),
        },
        _with(items=inner, prefixItems=st.lists(inner, min_size=1, max_size=3)),
        st.integers(0, 3),
        st.one_of(st.none(), st.integers(0, 4)),
    )  # fmt: skip


def objects(inner: st.SearchStrategy[Any]) -> st.SearchStrategy[dict[str, Any]]:
    def build(properties: dict[str, Any], required: int, fields: dict[str, Any]) -> dict[str, Any]:
        names = [name for i, name in enumerate(properties) if required >> i & 1]
        return {"type": "object", "properties": properties, "required": names, **fields}

    return st.builds(
        build,
        st.dictionaries(st.sampled_from(NAMES), inner, max_size=5),
        st.integers(0, 31),
        _with(
            additionalProperties=inner,
            propertyNames=st.sampled_from([{"maxLength": 6}, {"pattern": "^[a-z]+$"}]),
            minProperties=st.integers(0, 2),
            maxProperties=st.integers(1, 6),
        ),
    )


leaves = st.one_of(
    st.booleans(),
    st.just({}),
    st.builds(lambda kind: {"type": kind}, st.sampled_from(["null", "boolean", "string"])),
    st.builds(lambda kinds: {"type": kinds}, st.just(["string", "null"])),
    st.builds(lambda allowed: {"enum": allowed}, st.lists(values, min_size=1, max_size=4)),
    st.builds(lambda value: {"const": value}, values),
    *(numbers, multiples, strings),
)
schemas = st.recursive(
    leaves,
    lambda inner: st.one_of(
        arrays(inner),
        objects(inner),
        st.builds(
            lambda keyword, branches: {keyword: branches},
            st.sampled_from(["anyOf", "oneOf", "allOf"]),
            st.lists(inner, min_size=1, max_size=3),
        ),
        st.builds(
            lambda one, others: {"$defs": {"it": one}, "allOf": [{"$ref": "#/$defs/it"}, *others]},
            inner.filter(lambda schema: "$ref" not in json.dumps(schema)),
            st.lists(inner.filter(lambda s: "$ref" not in json.dumps(s)), max_size=1),
        ),
    ),
    max_leaves=8,
)


def _moved(schema: Any) -> Any:
    """Return the schema with all definitions inlined, for they were written at any depth."""
    if isinstance(schema, dict) and "$defs" in schema:
        return {"allOf": [schema["$defs"]["it"], *map(_moved, schema["allOf"][1:])]}
    if isinstance(schema, dict):
        return {name: _moved(value) for name, value in schema.items()}
    return [_moved(value) for value in schema] if isinstance(schema, list) else schema


@pytest.mark.filterwarnings("ignore:Generating overly large repr")
def test_documents_of_random_schemas_are_valid(walker: Walker) -> None:
    counts: Counter[str] = Counter()
    refusals: Counter[str] = Counter()
    keywords: Counter[str] = Counter()

    @settings(
        max_examples=400,
        database=None,
        deadline=None,
        derandomize=True,
        phases=[Phase.generate, Phase.shrink],
        suppress_health_check=list(HealthCheck),
    )
    @given(schemas.map(_moved))
    def check(schema: Any) -> None:
        validator = jsonschema.Draft202012Validator(schema, format_checker=CHECKER)
        jsonschema.Draft202012Validator.check_schema(schema)
        try:
            gbnf = schema_to_gbnf(schema)
        except SchemaError as error:
            refusals[error.keyword] += 1
            if error.keyword == "schema":
                assert not any(map(validator.is_valid, ORDINARY))
            return
        counts["schemas"] += 1
        todo = [schema]
        for each in todo:
            if isinstance(each, dict):
                keywords.update(list(each))
            todo += children(each, "#").values()
        for seed in range(3):
            text = walker.text(gbnf, seed, n_free=25)
            document = json.loads(text)
            assert validator.is_valid(document), text
            counts["documents"] += 1
            rewritten = json.dumps(document, ensure_ascii=False)
            # Equal keys and other spellings of numbers are lost when a document is read.
            counts["passed again"] += walker.accepts(gbnf, rewritten)

    check()
    print(counts, refusals, keywords)
    assert set(refusals) <= {"schema", "oneOf", "minProperties"}
    assert counts["schemas"] >= 200
    assert counts["documents"] == 3 * counts["schemas"]
    assert counts["passed again"] >= 0.9 * counts["documents"]
    assert set(keywords) >= {
        *("type", "enum", "const", "properties", "required", "additionalProperties", "items"),
        *("prefixItems", "minItems", "maxItems", "minLength", "maxLength", "pattern", "format"),
        *("minimum", "maximum", "exclusiveMinimum", "exclusiveMaximum", "multipleOf", "anyOf"),
        *("oneOf", "allOf", "propertyNames", "minProperties", "maxProperties"),
    }


PERSON = {
    "type": "object",
    "properties": {
        "name": {"type": "string", "minLength": 1},
        "age": {"type": ["integer", "null"], "minimum": 0, "maximum": 150},
        "role": {"enum": ["admin", "user", None, 3]},
        "tags": {"type": "array", "items": {"type": "string"}, "maxItems": 4},
        "home": {"$ref": "#/$defs/place"},
    },
    "required": ["name", "role"],
    "additionalProperties": False,
    "$defs": {
        "place": {
            "type": "object",
            "properties": {
                "zip": {"type": "string", "pattern": "^[0-9]{5}$"},
                "city": {"type": "string", "maxLength": 20},
                "near": {"type": "array", "items": {"$ref": "#/$defs/place"}},
            },
            "required": ["zip"],
            "additionalProperties": False,
        }
    },
}
REALISTIC: dict[str, Any] = {
    "person": PERSON,
    "map": {"type": "object", "additionalProperties": {"type": "integer"}, "minProperties": 1},
    "keys": {"type": "object", "propertyNames": {"enum": ["x", "y", "é"]}, "maxProperties": 2},
    "pair": {
        "type": "array", "prefixItems": [{"type": "string"}, {"type": "boolean"}],
        "items": False, "minItems": 1,
    },
    "union": {"oneOf": [{"type": "string", "format": "uuid"}, {"type": "array", "maxItems": 0}]},
    "tagged": {
        "oneOf": [
            {
                "type": "object", "properties": {"kind": {"const": kind}, "value": {"type": own}},
                "required": ["kind", "value"], "additionalProperties": False,
            }
            for kind, own in (("s", "string"), ("b", "boolean"), ("i", "integer"))
        ]
    },
    "merged": {
        "allOf": [
            {"properties": {"a": {"type": "integer"}}, "required": ["a"]},
            {"type": "object", "properties": {"a": {"minimum": 5}, "b": {"type": "string"}}},
        ]
    },
    "dates": {"type": "array", "items": {"type": "string", "format": "date"}},
    "wide integers": {"type": "integer", "minimum": -123456, "maximum": 98765432},
}  # fmt: skip


def _in_order(schema: Any, value: Any, root: Any) -> Any:
    """Return the value with its keys as the schema has them, without undeclared ones."""
    while isinstance(schema, dict) and "$ref" in schema:
        schema = root["$defs"][schema["$ref"].rpartition("/")[2]]
    if not isinstance(schema, dict):
        return value
    if isinstance(value, list):
        prefix = schema.get("prefixItems", [])
        inner = [*prefix, *[schema.get("items", {})] * len(value)]
        return [_in_order(s, v, root) for s, v in zip(inner, value, strict=False)]
    parts = [*schema.get("allOf", ()), *schema.get("oneOf", ()), schema]
    properties = {k: v for part in parts for k, v in part.get("properties", {}).items()}
    if not isinstance(value, dict) or not properties:
        return value
    return {k: _in_order(properties[k], value[k], root) for k in properties if k in value}


def _mutated(value: Any, rng: random.Random) -> Any:
    """Return the value with one part of it changed."""
    if isinstance(value, dict) and value and rng.random() < 0.8:
        key = rng.choice(list(value))
        rest = {name: v for name, v in value.items() if name != key}
        return rest if rng.random() < 0.3 else value | {key: _mutated(value[key], rng)}
    if isinstance(value, list) and value and rng.random() < 0.8:
        i = rng.randrange(len(value))
        new = rng.choice([[], [_mutated(value[i], rng)], [value[i], value[i]]])
        return [*value[:i], *new, *value[i + 1 :]]
    if isinstance(value, str) and rng.random() < 0.5:
        i = rng.randrange(len(value) + 1)
        return value[:i] + rng.choice(["", "a", "7", '"', "\\", "\n", "é", "😀"]) + value[i + 1 :]
    if isinstance(value, int) and not isinstance(value, bool) and rng.random() < 0.7:
        return value + rng.choice([-(10**9), -100, -1, 1, 100, 10**9])
    return rng.choice(ORDINARY)


@pytest.mark.parametrize("name", REALISTIC)
def test_a_grammar_and_a_validator_agree(walker: Walker, name: str) -> None:
    """On documents of the grammar and on their mutants, as compact and as spaced JSON."""
    schema = REALISTIC[name]
    gbnf = schema_to_gbnf(schema)
    validator = jsonschema.Draft202012Validator(schema, format_checker=CHECKER)
    rng = random.Random(0)
    counts: Counter[bool] = Counter()
    for seed in range(60):
        value = json.loads(walker.text(gbnf, seed, n_free=rng.choice([5, 30])))
        for _ in range(6):
            value = _in_order(schema, value, schema)
            valid = validator.is_valid(value)
            for separators in ((", ", ": "), (",", ":")):
                text = json.dumps(value, ensure_ascii=False, separators=separators)
                assert walker.accepts(gbnf, text) == valid, text
            counts[valid] += 1
            value = _mutated(value, rng)
    assert min(counts[True], counts[False]) >= 60, counts
