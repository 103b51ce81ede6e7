"""Python functions and mappings as tools: schemas, arguments, errors."""

from __future__ import annotations

import asyncio
import enum
import functools
import json
import subprocess
import sys
import threading
from collections.abc import Callable
from dataclasses import dataclass
from datetime import date
from typing import Annotated, Any, Literal

import jsonschema
import pydantic
import pytest
from pydantic import Field
from typing_extensions import TypedDict

from llama_crab.errors import ToolError
from llama_crab.params import ParameterError
from llama_crab.tools import (
    Tool,
    function_tool,
    normalize_tool_choice,
    normalize_tools,
    tool_result_text,
)


class Unit(enum.Enum):
    CELSIUS = "celsius"
    KELVIN = "kelvin"


@dataclass
class Place:
    name: str
    height: float = 0.0


class Guest(pydantic.BaseModel):
    name: str = Field(max_length=10)
    age: int = Field(ge=0, description="In years.")


class Options(TypedDict, total=False):
    loud: bool


def weather(
    place: str,
    days: int = 1,
    unit: Unit = Unit.CELSIUS,
    kind: Literal["short", "long"] | None = None,
) -> str:
    """Tell the weather.

    It may be wrong.

    Parameters
    ----------
    place : str
        A town, or
        a mountain.
    days, unknown : int, optional
        How many days.
    kind
        How much to say.

    Returns
    -------
    str
        place : not a parameter
    """
    return f"{place} {days} {unit} {kind}"


def invite(
    guests: list[Guest],
    where: Place,
    on: date,
    extras: dict[str, int] = {},  # noqa: B006
    options: Options | None = None,
    pair: tuple[int, str] = (1, "a"),
) -> Any:
    """Invite guests.

    Args:
        guests (list): Who comes: all
            of them.
        where: The place.
        on (date, optional): The day.

    Raises:
        ValueError: never.
    """  # noqa: D406, D407 - Google's style is what is tested
    return guests, where, on, extras, options, pair


def test_the_schema_of_a_function() -> None:
    tool = function_tool(weather)
    assert tool.name == "weather"
    assert tool.description == "Tell the weather.\n\nIt may be wrong."
    properties = tool.parameters["properties"]
    assert list(properties) == ["place", "days", "unit", "kind"]
    assert properties["place"] == {"type": "string", "description": "A town, or a mountain."}
    assert properties["days"] == {"type": "integer", "description": "How many days.", "default": 1}
    assert properties["unit"] == {"$ref": "#/$defs/Unit", "default": "celsius"}
    assert properties["kind"]["description"] == "How much to say."
    assert properties["kind"]["default"] is None
    assert tool.parameters["required"] == ["place"]
    assert tool.parameters["additionalProperties"] is False
    assert tool.to_dict() == {
        "type": "function",
        "function": {
            "name": "weather",
            "description": tool.description,
            "parameters": tool.parameters,
        },
    }
    jsonschema.Draft202012Validator.check_schema(tool.parameters)
    jsonschema.validate({"place": "Bern", "unit": "kelvin"}, tool.parameters)
    with pytest.raises(jsonschema.ValidationError):
        jsonschema.validate({"place": "Bern", "unit": "fahrenheit"}, tool.parameters)


def test_arguments_become_the_types_of_the_parameters() -> None:
    assert function_tool(weather).call('{"place": "Bern"}') == "Bern 1 Unit.CELSIUS None"
    assert function_tool(weather).call('{"unit": "kelvin", "place": "x", "kind": "long"}') == (
        "x 1 Unit.KELVIN long"
    )
    tool = function_tool(invite)
    assert tool.description == "Invite guests."
    assert tool.parameters["properties"]["guests"]["description"] == "Who comes: all of them."
    assert tool.parameters["properties"]["on"]["description"] == "The day."
    given = {
        "guests": [{"name": "Ann", "age": 3}],
        "where": {"name": "Alp"},
        "on": "2024-02-29",
        "extras": {"cake": 2},
        "options": {"loud": True},
        "pair": [2, "b"],
    }
    jsonschema.validate(given, tool.parameters)
    guests, where, on, extras, options, pair = tool.call(json.dumps(given))
    assert guests == [Guest(name="Ann", age=3)]
    assert where == Place("Alp")
    assert on == date(2024, 2, 29)
    assert (extras, options, pair) == ({"cake": 2}, {"loud": True}, (2, "b"))


def test_fields_in_annotations_and_defaults() -> None:
    def f(
        a: Annotated[int, Field(ge=1, description="From the field.")],
        b: int = Field(7, le=9),
        c: Annotated[str, Field(default="x")] = "y",
    ) -> Any:
        """Do.

        :func:`g` does, too.

        :param a: From the docstring.
        :param int b: Second
            line.
        :returns: nothing
        """
        return a, b, c

    tool = function_tool(f)
    properties = tool.parameters["properties"]
    assert tool.description == "Do.\n\n:func:`g` does, too."
    assert properties["a"]["description"] == "From the field."
    assert properties["b"]["description"] == "Second line."
    assert properties["b"]["default"] == 7
    assert properties["c"]["default"] == "y"
    assert tool.parameters["required"] == ["a"]
    assert tool.call('{"a": 1}') == (1, 7, "y")
    with pytest.raises(ToolError, match=r"tool 'f': a: .*greater.*; b: .*less"):
        tool.call('{"a": 0, "b": 10}')


def test_parameters_by_place_methods_partials_and_objects() -> None:
    def f(a: int, b: int = 2, /, c: int = 3, *, d: int) -> Any:
        return a, b, c, d

    class Counter:
        """Count."""

        def __init__(self) -> None:
            self.n = 0

        def add(self, n: int) -> int:
            """Add to it."""
            self.n += n
            return self.n

        def __call__(self, by: int) -> int:
            return self.add(by)

    assert function_tool(f).call('{"a": 1, "d": 4}') == (1, 2, 3, 4)
    assert function_tool(f).call('{"a": 1, "b": 5, "c": 6, "d": 4}') == (1, 5, 6, 4)
    counter = Counter()
    method = function_tool(counter.add)
    assert (method.name, method.description) == ("add", "Add to it.")
    assert list(method.parameters["properties"]) == ["n"]
    assert method.call('{"n": 3}') == 3
    partial = function_tool(functools.partial(f, 1, d=9))
    assert partial.name == "f"
    assert partial.call('{"c": 0}') == (1, 2, 0, 9)
    called = function_tool(counter, name="count")
    assert called.name == "count"
    assert called.call('{"by": 1}') == 4


def test_a_function_without_parameters_takes_none() -> None:
    def now() -> str:
        return "noon"

    tool = function_tool(now, description="Tell the time.")
    assert tool.description == "Tell the time."
    assert tool.parameters == {"type": "object", "properties": {}, "additionalProperties": False}
    assert tool.call("{}") == tool.call("") == "noon"
    with pytest.raises(ToolError, match="zone: there is no such parameter"):
        tool.call('{"zone": 1}')


def no_type(a, b: int) -> None: ...  # type: ignore[no-untyped-def]
def stars(a: int, *rest: int) -> None: ...
def double_stars(**rest: int) -> None: ...
def no_schema(a: int, b: threading.Lock) -> None: ...
def no_json(a: int, b: Callable[[], int]) -> None: ...
def unknown_type(a: int, b: Nowhere) -> None: ...  # type: ignore[name-defined]  # noqa: F821


@pytest.mark.parametrize(
    ("function", "parameter"),
    [
        (no_type, "a"),
        (stars, "rest"),
        (double_stars, "rest"),
        (no_schema, "b"),
        (no_json, "b"),
        (unknown_type, "b"),
    ],
)
def test_what_cannot_be_a_tool_is_named(function: Any, parameter: str) -> None:
    with pytest.raises(ParameterError, match=rf"tool '{function.__name__}'.*'{parameter}'"):
        function_tool(function)
    with pytest.raises(ParameterError, match=rf"tools\[1\]: tool '{function.__name__}'"):
        normalize_tools([weather, function])


def test_a_lambda_needs_a_name() -> None:
    with pytest.raises(ParameterError, match="tool '<lambda>': name: expected"):
        function_tool(lambda: 1)
    assert function_tool(lambda: 1, name="one").call("{}") == 1
    with pytest.raises(ParameterError, match="expected a function"):
        function_tool(int)


@pytest.mark.parametrize(
    ("arguments", "reason"),
    [
        ("{", "not JSON"),
        ('{"place": NaN}', "NaN is no JSON"),
        ("[1]", "no JSON object: \\[1\\]"),
        ("[" * 100_000, "not JSON"),
        ("{}", "place: missing"),
        ('{"place": 1, "days": "x"}', "days: .*integer.*; place: .*string"),
        ('{"place": "x", "town": 1}', "town: there is no such parameter"),
    ],
)
def test_arguments_that_do_not_validate(arguments: str, reason: str) -> None:
    with pytest.raises(ToolError, match=reason) as caught:
        function_tool(weather).call(arguments)
    assert caught.value.tool == "weather"
    assert isinstance(caught.value, ValueError)


def test_what_a_function_raises_is_not_wrapped() -> None:
    def fail() -> None:
        raise KeyError("x")

    with pytest.raises(KeyError):
        function_tool(fail).call("{}")


def test_asynchronous_functions() -> None:
    async def double(n: int) -> int:
        await asyncio.sleep(0)
        return 2 * n

    class Doubler:
        async def __call__(self, n: int) -> int:
            return 2 * n

    for function in (double, Doubler(), functools.partial(double)):
        tool = function_tool(function)
        assert asyncio.run(tool.acall('{"n": 4}')) == 8
        with pytest.raises(ToolError, match="asynchronous"):
            tool.call('{"n": 4}')
    main = threading.get_ident()
    assert asyncio.run(function_tool(lambda: threading.get_ident(), name="f").acall("{}")) != main


def mapping(name: Any = "get", **fields: Any) -> dict[str, Any]:
    return {"type": "function", "function": {"name": name, **fields}}


def test_mappings_of_openai() -> None:
    schema = {"properties": {"key": {"type": "string"}}, "required": ["key"]}
    tools = normalize_tools(
        [mapping(parameters=schema, description="Get.", strict=True), mapping("none"), weather]
    )
    assert [tool.name for tool in tools] == ["get", "none", "weather"]
    assert tools[0].parameters == {"type": "object", **schema}
    assert "type" not in schema
    assert tools[1].to_dict()["function"] == {
        "name": "none",
        "parameters": {"type": "object", "properties": {}},
    }
    assert normalize_tools(tools) == tools
    with pytest.raises(ToolError, match="no function"):
        tools[0].call("{}")


def test_a_schema_of_ones_own_with_a_function() -> None:
    tool = Tool("add", "", {"properties": {"a": {"type": "integer"}}}, lambda a, b=1: a + b)
    assert tool.call('{"a": 2, "b": 3}') == 5


@pytest.mark.parametrize(
    ("tool", "reason"),
    [
        ("get", "expected a function or a mapping"),
        (int, "expected a function or a mapping"),
        ({"name": "get"}, "type: expected 'function', not None"),
        ({"type": "function", "name": "get"}, "function: expected a mapping"),
        ({**mapping(), "x": 1}, "x: not a known field"),
        (mapping(x=1), r"function\.x: not a known field"),
        (mapping(""), r"function\.name: expected"),
        (mapping(None), r"function\.name: expected"),
        (mapping("a b"), r"function\.name: expected"),
        (mapping("a" * 65), r"function\.name: expected"),
        (mapping("grüezi"), r"function\.name: expected"),
        (mapping(description=1), r"function\.description: expected a string"),
        (mapping(strict=1), r"function\.strict: expected a boolean"),
        (mapping(parameters=[]), r"function\.parameters: expected"),
        (mapping(parameters={"type": "array"}), r"function\.parameters\.type: expected 'object'"),
        (mapping(parameters={"enum": {1}}), r"function\.parameters: the schema is not JSON"),
        (mapping("weather"), r"tools\[0\] has the name 'weather', too"),
    ],
)
def test_mappings_that_are_no_tools(tool: Any, reason: str) -> None:
    with pytest.raises(ParameterError, match=rf"tools\[1\]: {reason}"):
        normalize_tools([weather, tool])


@pytest.mark.parametrize("tools", ["get", mapping(), 1, b"x"])
def test_tools_are_a_list(tools: Any) -> None:
    with pytest.raises(ParameterError, match="tools: expected a list"):
        normalize_tools(tools)


def test_choices() -> None:
    tools = normalize_tools([mapping(), mapping("put"), mapping("auto")])
    assert normalize_tool_choice(None, tools) == ("auto", None)
    assert normalize_tool_choice(None, []) == ("none", None)
    assert normalize_tool_choice("auto", []) == ("none", None)
    for mode in ("none", "required"):
        assert normalize_tool_choice(mode, tools) == (mode, None)
    assert normalize_tool_choice("auto", tools[:2]) == ("auto", None)
    with pytest.raises(ParameterError, match="'auto' is the name of a tool, too"):
        normalize_tool_choice("auto", tools)
    assert normalize_tool_choice("put", tools) == ("required", "put")
    for name in ("put", "auto"):
        choice = {"type": "function", "function": {"name": name}}
        assert normalize_tool_choice(choice, tools) == ("required", name)
    wrong: tuple[Any, ...] = ("gut", 1, {"type": "function"}, {"function": {"name": "put"}})
    for choice in (*wrong, {"type": "function", "function": {}}):
        with pytest.raises(ParameterError, match="tool_choice: "):
            normalize_tool_choice(choice, tools)
    with pytest.raises(ParameterError, match="no tools"):
        normalize_tool_choice("required", [])


@pytest.mark.parametrize(
    ("value", "text"),
    [
        ("text", "text"),
        ("", ""),
        (None, "null"),
        (1.5, "1.5"),
        ({"ü": [1, True]}, '{"ü": [1, true]}'),
        (Place("Alp"), '{"name": "Alp", "height": 0.0}'),
        (Guest(name="A", age=1), '{"name": "A", "age": 1}'),
        ([date(2024, 1, 2)], '["2024-01-02"]'),
        (date(2024, 1, 2), "2024-01-02"),
        (Unit.KELVIN, "kelvin"),
        ({1}, "[1]"),
        ([float("inf")], '["Infinity"]'),
    ],
)
def test_results_as_text(value: Any, text: str) -> None:
    assert tool_result_text(value) == text


def test_results_that_cannot_be_told() -> None:
    circle: list[Any] = []
    circle.append(circle)
    for value in (object(), circle, threading.Lock()):
        with pytest.raises(ToolError, match="the result cannot be written as JSON"):
            tool_result_text(value)


def test_functions_need_pydantic_and_mappings_do_not() -> None:
    code = (
        "import sys; sys.modules['pydantic'] = sys.modules['pydantic_core'] = None\n"
        "from llama_crab.tools import *\n"
        "tool = {'type': 'function', 'function': {'name': 'f'}}\n"
        "print(normalize_tools([tool])[0].name, ToolFallback(normalize_tools([tool])).lazy)\n"
        "print(tool_result_text([1]))\n"
        "try: tool_result_text(object())\n"
        "except Exception as error: print(type(error).__name__)\n"
        "try: normalize_tools([print])\n"
        "except ImportError as error: print(error)\n"
    )
    done = subprocess.run([sys.executable, "-c", code], check=True, capture_output=True, text=True)
    first, second, third, last = done.stdout.splitlines()
    assert (first, second, third) == ("f True", "[1]", "ToolError")
    assert 'pip install "llama-crab[chat]"' in last
