"""Requests with a wanted form: what is generated, read back, refused, and told when it is cut."""

from __future__ import annotations

import asyncio
import dataclasses
import datetime
import enum
import ipaddress
import json
import pathlib
import pickle
import re
import subprocess
import sys
import uuid
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Annotated, Any, Literal

import pydantic
import pytest
from typing_extensions import TypedDict

from llama_crab import AsyncLlama, Llama, SamplerChain
from llama_crab.errors import GrammarError, LlamaCrabError, SchemaError, StructuredOutputError
from llama_crab.params import ParameterError
from llama_crab.structured import structured_output
from llama_crab.structured.json_grammar import schema_to_gbnf

TEXT = "Anna Berg is 34 years old and lives in Oslo."
PROMPT = (
    "<|im_start|>user\nExtract name, age and city of this person as JSON: "
    f"{TEXT}<|im_end|>\n<|im_start|>assistant\n"
)
GREEDY = SamplerChain.benchmark()


class Person(pydantic.BaseModel):
    name: str = pydantic.Field(min_length=1, max_length=40)
    age: int = pydantic.Field(ge=0, le=150)
    city: Annotated[str, pydantic.StringConstraints(max_length=40)]


@dataclasses.dataclass
class PersonData:
    name: Annotated[str, pydantic.Field(max_length=40)]
    age: int
    kind: Literal["adult", "child"] = "adult"


class PersonDict(TypedDict):
    name: Annotated[str, pydantic.Field(max_length=40)]
    age: int


class Even(pydantic.BaseModel):
    number: int = pydantic.Field(ge=1, le=9)

    @pydantic.field_validator("number")
    @classmethod
    def is_even(cls, value: int) -> int:
        if value % 2:
            raise ValueError("odd")
        return value


SCHEMA = {
    "type": "json_schema",
    "json_schema": {"name": "person", "strict": True, "schema": Person.model_json_schema()},
}


class Colour(enum.Enum):
    RED = "red"
    TWO = 2


class Tree(pydantic.BaseModel):
    value: float
    children: list[Tree] = []
    label: str | None = None


class Cat(pydantic.BaseModel):
    kind: Literal["cat"]
    lives: int = pydantic.Field(alias="nine lives", lt=10)


class Dog(pydantic.BaseModel):
    kind: Literal["dog"]
    name: str


TYPES: tuple[Any, ...] = (
    *(int, float, bool, str, None | int, list[str], tuple[int, str], tuple[bool, ...]),
    *(dict[str, float], dict[Literal["a", "b"], int], dict[str, list[Tree]], Any, bytes),
    *(datetime.datetime, datetime.date, datetime.time, datetime.timedelta, uuid.UUID),
    *(Colour, Tree, Cat | Dog, list[PersonData], PersonDict, pathlib.Path, pydantic.HttpUrl),
    *(ipaddress.IPv4Address, ipaddress.IPv6Address, pydantic.PositiveFloat, pydantic.SecretStr),
    Annotated[Cat | Dog, pydantic.Field(discriminator="kind")],
    Annotated[int, pydantic.Field(multiple_of=5, ge=-20, lt=100)],
    Annotated[float, pydantic.Field(gt=-0.5, le=1e-3)],
    Annotated[str, pydantic.StringConstraints(pattern=r"^[^\s@]+@[a-z]+$", max_length=12)],
    Annotated[list[int], pydantic.Field(min_length=2, max_length=3)],
)


@pytest.mark.parametrize("kind", TYPES, ids=lambda kind: str(kind)[:40])
def test_documents_of_pydantic_types_validate(walker: Any, kind: Any) -> None:
    adapter: Any = pydantic.TypeAdapter(kind)
    output = structured_output(adapter)
    assert output is not None
    for seed in range(25):
        text = walker.text(output.gbnf, seed, n_free=30)
        assert output.read(text) == (adapter.validate_json(text), None, False)


def test_a_set_is_refused() -> None:
    with pytest.raises(SchemaError, match="uniqueItems"):
        structured_output(pydantic.TypeAdapter(set[int]))


@pytest.fixture
def tiny_llama(tiny_path: Path) -> Iterator[Llama]:
    with Llama(tiny_path, n_ctx=512, n_ubatch=16, n_batch=64, n_threads=1) as llama:
        yield llama


def test_smollm2_extracts_into_a_model(smol_llama: Llama) -> None:
    result = smol_llama.create_completion(PROMPT, response_format=Person, sampler=GREEDY)
    assert result.parsed == Person(name="Anna Berg", age=34, city="Oslo")
    assert not result.incomplete
    assert result.parsed is result.choices[0].parsed
    assert result.finish_reason == "stop"
    assert json.loads(result.text) == result.parsed.model_dump()
    assert "parsed" not in json.dumps(result.to_dict())
    as_schema = smol_llama.create_completion(PROMPT, response_format=SCHEMA, sampler=GREEDY)
    assert as_schema.text == result.text
    assert as_schema.parsed == result.parsed.model_dump()
    assert pickle.loads(pickle.dumps(as_schema)).parsed == as_schema.parsed


def test_a_cut_answer_is_incomplete_and_not_parsed(smol_llama: Llama) -> None:
    whole = smol_llama.create_completion(PROMPT, response_format=Person, sampler=GREEDY)
    for n in range(0, len(whole.tokens), 4):
        result = smol_llama.create_completion(PROMPT, n, response_format=Person, sampler=GREEDY)
        assert (result.finish_reason, result.parsed, result.incomplete) == ("length", None, True)
        assert whole.text.startswith(result.text)
        assert "incomplete" in repr(result)
        assert "incomplete" in repr(result.choices[0])
    at_stop = smol_llama.create_completion(
        PROMPT, response_format=Person, sampler=GREEDY, stop=["age"]
    )
    assert (at_stop.finish_reason, at_stop.parsed, at_stop.incomplete) == ("stop", None, True)
    free = smol_llama.create_completion(PROMPT, 4)
    assert (free.parsed, free.incomplete) == (None, False)


def test_dataclass_typed_dict_adapter_and_object(smol_llama: Llama) -> None:
    data = smol_llama.create_completion(PROMPT, response_format=PersonData, sampler=GREEDY).parsed
    assert isinstance(data, PersonData)
    assert (data.name, data.age) == ("Anna Berg", 34)
    found = smol_llama.create_completion(PROMPT, response_format=PersonDict, sampler=GREEDY).parsed
    assert found == {"name": "Anna Berg", "age": 34}
    adapter: Any = pydantic.TypeAdapter(Literal["Oslo", "Rome"] | None)
    assert smol_llama.create_completion(
        "Anna lives in the city of", response_format=adapter, sampler=GREEDY
    ).parsed in ("Oslo", "Rome", None)
    anything = smol_llama.create_completion(
        PROMPT, response_format={"type": "json_object"}, sampler=GREEDY
    )
    assert isinstance(anything.parsed, dict)
    assert smol_llama.create_completion(PROMPT, 4, response_format={"type": "text"}).parsed is None


def test_grammar_regex_and_choices(smol_llama: Llama) -> None:
    for options in (
        {"grammar": 'root ::= "yes" | "no"'},
        {"choices": ["yes", "no"]},
        {"regex": "yes|no"},
    ):
        result: Any = smol_llama.create_completion("Is snow cold? Answer:", 8, **options)
        assert result.parsed == result.text
        assert result.text in ("yes", "no")
        assert result.finish_reason == "stop"
    stopped: Any = smol_llama.create_completion("x", 8, regex="[ab]{2}c[ab]*", stop=["c"])
    assert (stopped.finish_reason, stopped.parsed, stopped.incomplete) == ("stop", None, True)
    stopped = smol_llama.create_completion("x", 8, regex="[ab]{2}c?", stop=["c"])
    assert stopped.parsed == stopped.text
    cut: Any = smol_llama.create_completion("Pi is", 3, regex=r"3\.\d{20}")
    assert (cut.parsed, cut.incomplete) == (None, True)


def test_every_way_to_ask(smol_llama: Llama) -> None:
    """Streams, handles, maps and asyncio give what a plain call gives."""
    plain = smol_llama.create_completion(PROMPT, response_format=Person, sampler=GREEDY)
    stream = smol_llama.create_completion(
        PROMPT, response_format=Person, sampler=GREEDY, stream=True
    )
    assert "".join(chunk.text for chunk in stream) == plain.text
    assert stream.result().parsed == plain.parsed
    assert smol_llama.submit(PROMPT, response_format=Person, sampler=GREEDY).result() is not None
    results = list(smol_llama.map([PROMPT] * 3, response_format=Person, sampler=GREEDY))
    assert [result.parsed for result in results] == [plain.parsed] * 3
    two = smol_llama.create_completion(PROMPT, response_format=Person, n=2, seed=1)
    assert all(isinstance(choice.parsed, Person) for choice in two.choices)
    echo = smol_llama.create_completion(PROMPT, response_format=Person, sampler=GREEDY, echo=True)
    assert echo.text == PROMPT + plain.text
    assert echo.parsed == plain.parsed


def test_asyncio(tiny_path: Path) -> None:
    async def ask() -> None:
        async with AsyncLlama(tiny_path, n_ctx=256, n_threads=1) as llama:
            result = await llama.create_completion("x", choices=["left", "right"])
            assert result.parsed in ("left", "right")

    asyncio.run(ask())


def test_a_cancelled_answer_is_not_parsed(tiny_llama: Llama) -> None:
    handle = tiny_llama.submit("x", 400, stream=True, regex="[a-z]{300,}")
    next(handle)
    handle.cancel()
    result = handle.result()
    assert (result.finish_reason, result.parsed, result.incomplete) == ("cancelled", None, True)


def test_what_only_a_validator_knows_is_raised_when_it_is_read(tiny_llama: Llama) -> None:
    kinds = set()
    for seed in range(12):
        result = tiny_llama.create_completion("x", 60, response_format=Even, seed=seed)
        number = json.loads(result.text)["number"]
        kinds.add(number % 2)
        if number % 2:
            for _ in range(2):
                with pytest.raises(StructuredOutputError, match=r"Even.*\n.*number.*\n.*odd") as it:
                    _ = result.parsed
            assert it.value.text == result.text
            assert isinstance(it.value, (LlamaCrabError, ValueError))
            assert not result.incomplete
        else:
            assert result.parsed == Even(number=number)
    assert kinds == {0, 1}


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"regex": "a", "choices": ["a"]}, "regex and choices"),
        ({"response_format": {"type": "json_object"}, "grammar": "root ::= [a]"}, "only one"),
        (
            {"response_format": {"type": "object", "properties": {}}},
            "bare JSON schema.*json_schema",
        ),
        ({"response_format": {"type": ["object", "null"]}}, "bare JSON schema"),
        ({"response_format": {"$ref": "#/x"}}, "bare JSON schema"),
        ({"response_format": {"type": "xml"}}, "'json_object'"),
        ({"response_format": {"type": "json_schema"}}, "under 'schema'"),
        ({"response_format": {"type": "json_schema", "schema": {}}}, "unknown field 'schema'"),
        ({"response_format": {"type": "json_schema", "json_schema": {"name": "x"}}}, "'schema'"),
        (
            {"response_format": {"type": "json_schema", "json_schema": {"schema": {}, "name": 3}}},
            "name is 3",
        ),
        (
            {"response_format": {"type": "json_schema", "json_schema": {"schema": {1, 2}}}},
            "is not JSON",
        ),
        ({"response_format": int}, "expected a mapping"),
        ({"response_format": "json_object"}, "expected a mapping"),
        ({"grammar": 7}, "GBNF"),
        ({"regex": b"a"}, "a pattern"),
        ({"choices": ["a"], "ignore_eos": True}, "ignore_eos"),
        ({"choices": ["a"], "sampler": SamplerChain.structured("root ::= [a]")}, "of its own"),
    ],
)
def test_wrong_requests_are_refused_before_generation(
    tiny_llama: Llama, options: dict[str, Any], message: str
) -> None:
    with pytest.raises(ParameterError, match=message):
        tiny_llama.create_completion("x", **options)
    with pytest.raises(ParameterError):
        tiny_llama.submit("x", **options)
    assert tiny_llama.create_completion("x", 2, choices=["a"]).text == "a"


def test_grammar_errors_keep_their_type(tiny_llama: Llama) -> None:
    for wrong in ("root ::= [", "nothing", "root ::= missing"):
        with pytest.raises(GrammarError):
            tiny_llama.create_completion("x", grammar=wrong)


@pytest.mark.parametrize(
    ("schema", "keyword", "path"),
    [
        ({"type": "float"}, "type", "#"),
        (
            {"properties": {"a": {"items": {"uniqueItems": True}}}},
            "uniqueItems",
            "#/properties/a/items",
        ),
        ({"items": {"format": "regex"}}, "format", "#/items"),
        ({"prefixItems": [{}, {"multipleOf": 0.1}]}, "multipleOf", "#/prefixItems/1"),
        ({"type": "integer", "multipleOf": 7}, "multipleOf", "#"),
        ({"minLength": -1}, "minLength", "#"),
        ({"maxItems": True}, "maxItems", "#"),
        ({"maximum": "3"}, "maximum", "#"),
        *(({"maximum": n}, "maximum", "#") for n in (10**400, 1e300, 1e-300, -(10**40))),
        ({"enum": "abc"}, "enum", "#"),
        ({"required": "a"}, "required", "#"),
        ({"anyOf": []}, "anyOf", "#"),
        ({"foo": 1}, "foo", "#"),
        ({"additionalProperties": {"not": {}}}, "not", "#/additionalProperties"),
        ({"$ref": "#/$defs/x"}, "$ref", "#"),
        ({"$ref": "other.json"}, "$ref", "#"),
        ({"$ref": "#"}, "$ref", "#"),
        ({"anyOf": [{"$ref": "#"}, {"type": "null"}]}, "$ref", "#"),
        ({"oneOf": [{"type": "integer"}, {"minimum": 2}]}, "oneOf", "#"),
        ({"type": "object", "minProperties": 3, "additionalProperties": {}}, "minProperties", "#"),
        ({"allOf": [{"type": "string"}, {"type": "null"}]}, "schema", "#"),
        ({"type": "integer", "minimum": 3, "maximum": 2}, "schema", "#"),
        ({"const": "abc", "maxLength": 2}, "schema", "#"),
        (
            {"type": "object", "properties": {"next": {"$ref": "#"}}, "required": ["next"]},
            "schema",
            "#",
        ),
        ({"type": "string", "pattern": "(?=a)"}, "pattern", "#"),
        (False, "schema", "#"),
        (7, "schema", "#"),
    ],
)
def test_schema_errors_name_keyword_and_path(schema: Any, keyword: str, path: str) -> None:
    with pytest.raises(SchemaError) as caught:
        structured_output({"type": "json_schema", "json_schema": {"name": "x", "schema": schema}})
    assert (caught.value.keyword, caught.value.path) == (keyword, path)
    assert isinstance(caught.value, (LlamaCrabError, ValueError))
    assert pickle.loads(pickle.dumps(caught.value)).path == path


def test_hostile_schemas_end_in_an_error() -> None:
    """Nesting, wide unions and products of patterns; none of them hangs."""
    deep: Any = {}
    for _ in range(5000):
        deep = {"items": deep}
    branching = {
        "allOf": [
            {"anyOf": [{"properties": {f"{i} {j}": {}}} for i in range(40)]} for j in range(40)
        ]
    }
    explosive = {"allOf": [{"pattern": "a.{40}b"}, {"pattern": "b.{40}a"}]}
    for schema in (deep, branching, explosive):
        with pytest.raises((SchemaError, ParameterError)):
            structured_output({"type": "json_schema", "json_schema": {"schema": schema}})


def test_adversarial_strings_pass(walker: Any) -> None:
    """As values of a plain string, an enum, a const, keys; raw control characters do not."""
    cases = [
        "", '"', "\\", "\\\\\"", "\n\t\r\b\f", "\x00\x01\x1f", "\x7f", "\u2028\u2029", "é", "日本",
        "😀", "\U0010ffff", "\ufeff", "</script>", "{}[],:", 'a"}],"b":1', "\\u0041", "x" * 20000,
        "root ::= \"x\" # [^a]", "\u202e", "e\u0301",
    ]  # fmt: skip
    plain = schema_to_gbnf({"type": "string"})
    for case in cases:
        for ascii_only in (False, True):
            text = json.dumps(case, ensure_ascii=ascii_only)
            assert walker.accepts(plain, text)
        document = json.dumps(case, ensure_ascii=False)
        for schema in ({"enum": [case, 1]}, {"const": case}):
            gbnf = schema_to_gbnf(schema)
            assert walker.accepts(gbnf, document)
            assert not walker.accepts(gbnf, document[:-1])
        if len(case) < 100:
            gbnf = schema_to_gbnf({
                "type": "object", "properties": {case: {"const": 1}}, "required": [case],
                "additionalProperties": {"const": 2},
            })  # fmt: skip
            assert walker.accepts(gbnf, f"{{{document}: 1}}")
            assert walker.accepts(gbnf, f'{{{document}: 1, "other": 2}}')
            # No spelling of a declared key may stand for another one.
            for spelling in (document, json.dumps(case)):
                assert not walker.accepts(gbnf, f"{{{document}: 1, {spelling}: 2}}")
    for wrong in ('"\n"', '"\x00"', '"\x1f"', '"\\x41"', '"\\ud800"', '"\\udc00\\ud800"', '"\\u12"',
                  "'a'", '"a', '"\\"', '"\\ud83dx"', " \"a\"", '"a" '):  # fmt: skip
        assert not walker.accepts(plain, wrong), wrong
    assert walker.accepts(plain, '"\\ud83d\\ude00\\/"')


def test_blanks_are_bounded(walker: Any) -> None:
    gbnf = schema_to_gbnf({"type": "object"})
    for text in ('{"a":1}', '{"a": 1}', '{"a":[1, 2],"b": {}}'):
        assert walker.accepts(gbnf, text)
    for text in ('{"a":  1}', '{ "a":1}', '{"a":\n1}', '{"a" :1}', ' {"a":1}', '{"a":1} ', "{ }"):
        assert not walker.accepts(gbnf, text), text


def test_long_repetitions_are_exact(walker: Any) -> None:
    for least, most in ((0, 499), (0, 501), (0, 1000), (3, 1234), (700, 700), (999, None)):
        limits = {"minLength": least} | ({} if most is None else {"maxLength": most})
        gbnf = schema_to_gbnf({"type": "string", **limits})
        for n in {
            least - 1,
            least,
            least + 1,
            (most or 2000) - 1,
            most or 2000,
            (most or 2000) + 1,
        }:
            fits = least <= n and (most is None or n <= most)
            if n >= 0:
                assert walker.accepts(gbnf, json.dumps("y" * n)) == fits, (least, most, n)


def test_pydantic_is_imported_only_for_classes(tmp_path: Path) -> None:
    """And its absence is told with the extra's name."""
    code = """
import sys
from llama_crab.structured import structured_output
structured_output({"type": "json_schema", "json_schema": {"schema": {"type": "string"}}})
assert not {"pydantic", "jsonschema", "numpy"} & set(sys.modules)
sys.modules["pydantic"] = None
import dataclasses
@dataclasses.dataclass
class Point:
    x: int
try:
    structured_output(Point)
except ImportError as error:
    print(error)
"""
    done = subprocess.run(
        [sys.executable, "-c", code], check=True, capture_output=True, text=True, cwd=tmp_path
    )
    assert 'pip install "llama-crab[chat]"' in done.stdout


def test_the_examples_of_the_docs_run(smol_path: Path, run_page: Callable[..., list[str]]) -> None:
    lines = run_page("structured-output.md", 4, "Llama()", f"Llama({str(smol_path)!r}, n_ctx=512)")
    assert lines[0] == "name='Anna Berg' age=34"
    assert lines[1] in ("capital", "town", "None")
    assert lines[2] in ("hot", "cold")
    assert re.fullmatch(r"\+47 \d{2} \d{2} \d{2} \d{2}", lines[3])
    assert re.fullmatch("[24], [6-9]", lines[4])
    assert lines[5:] == ["length True None", "uniqueItems #/items"]
