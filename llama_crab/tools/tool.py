"""What a tool is, and how a request names its tools."""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from ..errors import ToolError
from ..params import ParameterError

if TYPE_CHECKING:
    from .signature import Signature

# What OpenAI's API allows; templates and grammars hold such names without escapes.
_NAME = re.compile(r"[a-zA-Z0-9_-]{1,64}")
_NO_PARAMETERS: dict[str, Any] = {"type": "object", "properties": {}}
_TOOL_FIELDS = frozenset({"type", "function"})
_FUNCTION_FIELDS = frozenset({"name", "description", "parameters", "strict"})
_MODES = ("auto", "required", "none")


@dataclass(frozen=True, slots=True, eq=False)
class Tool:
    """A function that a model may call. Thread-safety: immutable.

    ``parameters`` is the JSON schema of its arguments, an object. ``function`` may be None, for
    calls that the program answers itself. Without a signature (see `function_tool`) the arguments
    are passed as keywords, and only their being an object is checked.

    Raises `ParameterError` for a name or a schema that cannot be a tool's.
    """

    name: str
    description: str = ""
    parameters: dict[str, Any] = field(default_factory=lambda: dict(_NO_PARAMETERS))
    function: Callable[..., Any] | None = None
    _signature: Signature | None = field(default=None, repr=False)

    def __post_init__(self) -> None:
        if not isinstance(self.name, str) or not _NAME.fullmatch(self.name):
            raise ParameterError(
                f"name: expected 1 to 64 letters, digits, '_' or '-', not {self.name!r:.80}"
            )
        if not isinstance(self.description, str):
            raise ParameterError(f"description: expected a string, not {self.description!r:.80}")
        if self.function is not None and not callable(self.function):
            raise ParameterError(f"function: {self.function!r:.80} cannot be called")
        object.__setattr__(self, "parameters", _checked_parameters(self.parameters))

    def to_dict(self) -> dict[str, Any]:
        """Return the tool in OpenAI's form."""
        function: dict[str, Any] = {"name": self.name}
        if self.description:
            function["description"] = self.description
        function["parameters"] = self.parameters
        return {"type": "function", "function": function}

    @property
    def is_async(self) -> bool:
        """Whether the function has to be awaited."""
        return self.function is not None and _is_async(self.function)

    def call(self, arguments: str) -> Any:
        """Call the function with arguments in JSON and return what it returns.

        Raises `ToolError` for arguments that do not validate, for a tool without a function and
        for an asynchronous one; and whatever the function raises.
        """
        function, args, kwargs = self._prepared(arguments)
        if self.is_async:
            raise ToolError.of(self.name, "it is asynchronous: await acall, or use AsyncLlama")
        return function(*args, **kwargs)

    async def acall(self, arguments: str) -> Any:
        """Call the function, asynchronous or not, and return what it returns.

        One that is not runs in a thread, so that the event loop goes on. Raises as `call`.
        """
        import asyncio
        import inspect

        function, args, kwargs = self._prepared(arguments)
        if _is_async(function):
            return await function(*args, **kwargs)
        result = await asyncio.to_thread(function, *args, **kwargs)
        return await result if inspect.isawaitable(result) else result

    def _prepared(self, arguments: str) -> tuple[Callable[..., Any], list[Any], dict[str, Any]]:
        if self.function is None:
            raise ToolError.of(self.name, "it has no function to call")
        values = self._read(arguments)
        if self._signature is None:
            return self.function, [], values
        return self.function, *self._signature.bind(self.name, values)

    def _read(self, arguments: str) -> dict[str, Any]:
        # Some models write nothing where there is nothing to say.
        text = arguments.strip() or "{}"
        try:
            values = json.loads(text, parse_constant=_refuse_constant)
        except (ValueError, RecursionError) as error:
            raise ToolError.of(self.name, f"the arguments are not JSON: {error}") from None
        if not isinstance(values, dict):
            raise ToolError.of(self.name, f"the arguments are no JSON object: {text:.80}")
        return values


def function_tool(
    function: Callable[..., Any], *, name: str | None = None, description: str | None = None
) -> Tool:
    """Return the tool of a Python function, made from its signature and docstring.

    Each parameter needs a type that pydantic knows. The docstring's text is the description; its
    section of parameters (numpy's, Google's or reST's style) describes those whose annotation does
    not. `name` and `description` replace the function's own.

    Raises `ParameterError`, which names function and parameter, for one without a type, of a type
    with no JSON schema, and for ``*args`` and ``**kwargs``; ImportError without pydantic.
    """
    from .signature import described

    found = described(function, name)
    try:
        return Tool(
            found.name,
            found.description if description is None else description,
            found.signature.parameters,
            function,
            found.signature,
        )
    except ParameterError as error:
        raise ParameterError(f"tool {found.name!r:.80}: {error}") from None


def normalize_tools(tools: Iterable[Mapping[str, Any] | Callable[..., Any] | Tool]) -> list[Tool]:
    """Return tools given as mappings in OpenAI's form, Python functions or `Tool`, in order.

    Raises `ParameterError`, which names index and field, for what is none of them and for a name
    that is given twice; ImportError for a function without pydantic.
    """
    if isinstance(tools, (str, bytes, Mapping)) or not isinstance(tools, Iterable):
        raise ParameterError(f"tools: expected a list of tools, not {tools!r:.80}")
    found: dict[str, tuple[int, Tool]] = {}
    for i, each in enumerate(tools):
        try:
            tool = _one_tool(each)
        except ParameterError as error:
            raise ParameterError(f"tools[{i}]: {error}") from error
        if tool.name in found:
            first = found[tool.name][0]
            raise ParameterError(f"tools[{i}]: tools[{first}] has the name {tool.name!r}, too")
        found[tool.name] = i, tool
    return [tool for _, tool in found.values()]


def normalize_tool_choice(
    tool_choice: str | Mapping[str, Any] | None, tools: Sequence[Tool]
) -> tuple[str, str | None]:
    """Return ``"auto"``, ``"required"`` or ``"none"``, and the name of the only tool wanted.

    A choice is one of the three, the name of a tool, or OpenAI's mapping with one. None is
    ``"auto"`` where there are tools, else ``"none"``, and so is ``"auto"``. Raises `ParameterError`
    for anything else, and for text that may be either because a tool has such a name.
    """
    names = [tool.name for tool in tools]
    if tool_choice is None or (tool_choice == "auto" and not tools):
        return ("auto" if tools else "none"), None
    name: Any = tool_choice
    if isinstance(tool_choice, Mapping):
        inner = tool_choice.get("function")
        if tool_choice.get("type") != "function" or not isinstance(inner, Mapping):
            raise ParameterError(
                "tool_choice: expected {'type': 'function', 'function': {'name': '...'}}, not "
                f"{tool_choice!r:.80}"
            )
        name = inner.get("name")
    elif tool_choice in _MODES:
        if tool_choice == "required" and not tools:
            raise ParameterError("tool_choice: a call is required, and there are no tools")
        if tool_choice in names:
            raise ParameterError(
                f"tool_choice: {tool_choice!r} is the name of a tool, too; write "
                "{'type': 'function', 'function': {'name': ...}} for it, None for 'auto'"
            )
        return tool_choice, None
    if name not in names:
        known = ", ".join([*_MODES, *names])
        raise ParameterError(f"tool_choice: {name!r:.80} is none of {known}")
    return "required", name


def tool_result_text(value: Any) -> str:
    """Return a result as text for the model: a string as it is, all else as JSON.

    Dataclasses, dates, sets and what else JSON has no form for go by pydantic's rules, where it is
    installed. Raises `ToolError` for a value that cannot be written.
    """
    if type(value) is str:
        return value
    try:
        return json.dumps(value, ensure_ascii=False, allow_nan=False)
    except (TypeError, ValueError, RecursionError) as error:
        reason = f"the result cannot be written as JSON: {error}"
    try:
        from pydantic_core import PydanticSerializationError, to_json
    except ImportError:
        raise ToolError(reason) from None
    try:
        plain = json.loads(to_json(value, inf_nan_mode="strings"))
    except (PydanticSerializationError, ValueError, RecursionError) as error:
        raise ToolError(f"the result cannot be written as JSON: {error}") from None
    return plain if isinstance(plain, str) else json.dumps(plain, ensure_ascii=False)


def _one_tool(given: Any) -> Tool:
    if isinstance(given, Tool):
        return given
    if isinstance(given, Mapping):
        return _of_mapping(given)
    if isinstance(given, type) or not callable(given):
        raise ParameterError(f"expected a function or a mapping, not {given!r:.80}")
    return function_tool(given)


def _of_mapping(given: Mapping[str, Any]) -> Tool:
    if given.get("type") != "function":
        raise ParameterError(f"type: expected 'function', not {given.get('type')!r:.80}")
    function = given.get("function")
    if not isinstance(function, Mapping):
        raise ParameterError(f"function: expected a mapping, not {function!r:.80}")
    for fields, known, where in (
        (given, _TOOL_FIELDS, ""),
        (function, _FUNCTION_FIELDS, "function."),
    ):
        unknown = sorted(map(str, fields.keys() - known))
        if unknown:
            raise ParameterError(f"{where}{unknown[0]:.80}: not a known field")
    if not isinstance(function.get("strict"), (bool, type(None))):
        raise ParameterError(f"function.strict: expected a boolean, not {function['strict']!r:.80}")
    parameters = function.get("parameters")
    description = function.get("description")
    try:
        return Tool(
            function.get("name", ""),
            "" if description is None else description,
            _NO_PARAMETERS if parameters is None else parameters,
        )
    except ParameterError as error:
        raise ParameterError(f"function.{error}") from None


def _checked_parameters(given: Any) -> dict[str, Any]:
    """Return a copy of the schema of an object."""
    if not isinstance(given, Mapping):
        raise ParameterError(f"parameters: expected a JSON schema, not {given!r:.80}")
    try:
        schema: dict[str, Any] = json.loads(json.dumps(dict(given), allow_nan=False))
    except (TypeError, ValueError, RecursionError) as error:
        raise ParameterError(f"parameters: the schema is not JSON: {error}") from None
    if schema.setdefault("type", "object") != "object":
        raise ParameterError(f"parameters.type: expected 'object', not {schema['type']!r:.80}")
    if schema == {"type": "object"}:
        # Without properties anything goes; a tool that declares none takes none.
        schema["properties"] = {}
    return schema


def _is_async(function: Callable[..., Any]) -> bool:
    import inspect

    return inspect.iscoroutinefunction(function) or inspect.iscoroutinefunction(
        getattr(function, "__call__", None)  # noqa: B004 - of an object, the method is what counts
    )


def _refuse_constant(name: str) -> Any:
    raise ValueError(f"{name} is no JSON")
