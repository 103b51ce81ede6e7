"""From a function's signature to the schema of its arguments, and from arguments to its types."""

from __future__ import annotations

import contextlib
import functools
import inspect
import json
import types
import typing
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, NamedTuple

from ..errors import ToolError
from ..params import ParameterError
from .docstring import parse_docstring

_MISSING = inspect.Parameter.empty


class Described(NamedTuple):
    """What a function tells about itself."""

    name: str
    description: str
    signature: Signature


@dataclass(frozen=True, slots=True)
class _Parameter:
    """A parameter; `adapter` is pydantic's TypeAdapter of its type."""

    name: str
    adapter: Any
    required: bool
    positional: bool
    # Passed where there is no argument.
    default: Any = _MISSING
    # What the schema says of it.
    shown: Any = _MISSING


class Signature:
    """The parameters of a function. Thread-safety: immutable."""

    def __init__(self, parameters: list[_Parameter], schema: dict[str, Any]) -> None:
        self._known = {each.name: each for each in parameters}
        self.parameters = schema

    def bind(self, tool: str, values: dict[str, Any]) -> tuple[list[Any], dict[str, Any]]:
        """Return what to call the function with. Raises `ToolError`, which says all that is wrong.

        `values` is a JSON object.
        """
        from pydantic import ValidationError

        wrong = [f"{name:.80}: there is no such parameter" for name in values.keys() - self._known]
        args: list[Any] = []
        kwargs: dict[str, Any] = {}
        for name, each in self._known.items():
            if name in values:
                try:
                    # As JSON, in which strict types take what they do not take as a Python object.
                    value = each.adapter.validate_json(json.dumps(values[name]))
                except ValidationError as error:
                    wrong += _reasons(name, error)
                    continue
            elif each.required:
                wrong.append(f"{name}: missing")
                continue
            elif each.default is not _MISSING:
                value = each.default
            else:
                continue
            if each.positional:
                args.append(value)
            else:
                kwargs[name] = value
        if wrong:
            raise ToolError.of(tool, "; ".join(sorted(wrong)))
        return args, kwargs


def described(function: Callable[..., Any], name: str | None) -> Described:
    """Return what a function tells about itself; `name` is used where it is given.

    Raises as `function_tool`.
    """
    try:
        import pydantic.errors
        import pydantic.fields
    except ImportError as error:
        message = 'tools: a Python function as a tool needs: pip install "llama-crab[chat]"'
        raise ImportError(message, name="pydantic") from error
    if isinstance(function, type) or not callable(function):
        raise ParameterError(f"expected a function, not {function!r:.80}")
    inner: Any = function
    while isinstance(inner, functools.partial):
        inner = inner.func
    if not inspect.isroutine(inner):
        own = type(inner).__name__
        docstring = inspect.getdoc(type(inner).__call__) or inspect.getdoc(type(inner))
        inner = type(inner).__call__
    else:
        own = inner.__name__
        docstring = inspect.getdoc(inner)
    name = own if name is None else name
    text, texts = parse_docstring(docstring)
    try:
        signature = inspect.signature(function)
    except (TypeError, ValueError) as error:
        raise ParameterError(f"tool {name!r:.80}: it tells no signature: {error}") from None
    parameters = []
    for each in signature.parameters.values():
        where = f"tool {name!r:.80}: parameter {each.name!r}"
        parameters.append(_parameter(each, inspect.unwrap(inner), where, pydantic))
    return Described(name, text, Signature(parameters, _schema(parameters, texts, name, pydantic)))


def _parameter(given: inspect.Parameter, function: Any, where: str, pydantic: Any) -> _Parameter:
    if given.kind in (given.VAR_POSITIONAL, given.VAR_KEYWORD):
        raise ParameterError(f"{where}: a model has to know the names of all parameters")
    if given.annotation is _MISSING:
        raise ParameterError(f"{where}: has no type")
    wanted = _evaluated(given.annotation, function, where)
    default = given.default
    if isinstance(default, pydantic.fields.FieldInfo):
        # Written as in a pydantic model: f(days: int = Field(1, ge=1)).
        wanted, default = typing.Annotated[wanted, default], _MISSING
    try:
        adapter = pydantic.TypeAdapter(wanted)
        own = adapter.get_default_value()
    except (pydantic.errors.PydanticUserError, TypeError) as error:
        raise ParameterError(f"{where}: no tool can have this type: {error}") from error
    positional = given.kind is given.POSITIONAL_ONLY
    if default is not _MISSING:
        # What is passed by place cannot be left out before others.
        passed = default if positional else _MISSING
        return _Parameter(given.name, adapter, False, positional, passed, default)
    if own is None:
        return _Parameter(given.name, adapter, True, positional)
    return _Parameter(given.name, adapter, False, positional, own.value)


def _evaluated(annotation: Any, function: Any, where: str) -> Any:
    """Return an annotation with what is written as text in it looked up."""
    holder = types.SimpleNamespace(__annotations__={"it": annotation})
    try:
        hints = typing.get_type_hints(
            holder, getattr(function, "__globals__", {}), include_extras=True
        )
    except (NameError, SyntaxError, TypeError, AttributeError) as error:
        raise ParameterError(f"{where}: its type {annotation!r:.80} is unknown: {error}") from None
    return hints["it"]


def _schema(
    parameters: list[_Parameter], texts: dict[str, str], name: str, pydantic: Any
) -> dict[str, Any]:
    from pydantic_core import to_jsonable_python

    properties: dict[str, Any] = {}
    inputs = []
    for each in parameters:
        try:
            each.adapter.json_schema()  # alone first, to name the one that has none
        except pydantic.errors.PydanticUserError as error:
            where = f"tool {name!r:.80}: parameter {each.name!r}"
            raise ParameterError(f"{where}: its type has no JSON schema: {error}") from error
        inputs.append((each.name, "validation", each.adapter))
    found, shared = pydantic.TypeAdapter.json_schemas(inputs)
    for each in parameters:
        own = dict(found[each.name, "validation"])
        if texts.get(each.name):
            own.setdefault("description", texts[each.name])
        if each.shown is not _MISSING:
            # A default that JSON cannot write is the function's own affair.
            with contextlib.suppress(ValueError, RecursionError):
                own["default"] = to_jsonable_python(each.shown)
        properties[each.name] = own
    schema: dict[str, Any] = {"type": "object", "properties": properties}
    required = [each.name for each in parameters if each.required]
    if required:
        schema["required"] = required
    schema["additionalProperties"] = False
    if "$defs" in shared:
        schema["$defs"] = shared["$defs"]
    return schema


def _reasons(name: str, error: Any) -> list[str]:
    return [
        ".".join([name, *map(str, each["loc"])]) + f": {each['msg']}"
        for each in error.errors(include_url=False, include_context=False, include_input=False)
    ]
