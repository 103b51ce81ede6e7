"""What a request asks of its answer's form, as a grammar and as the way to read the answer."""

from __future__ import annotations

import dataclasses
import json
import typing
from collections.abc import Callable, Iterable, Mapping
from functools import lru_cache
from typing import Any

from ..errors import StructuredOutputError
from ..params import ParameterError
from .automaton import matches
from .gbnf import Rules
from .json_grammar import schema_to_gbnf
from .json_text import plain
from .keywords import TYPES
from .regex import emit, parse_regex
from .resolve import Resolver

_JSON_OBJECT = '{"type": "object"}'
_SCHEMA_FIELDS = frozenset({"name", "schema", "strict", "description"})
# What gives away a JSON schema that was passed as it is.
_OF_SCHEMAS = frozenset({"$ref", "$defs", "properties", "items", "anyOf", "oneOf", "allOf", "enum"})
_N_KEPT = 128


@dataclasses.dataclass(frozen=True, slots=True)
class StructuredOutput:
    """The grammar of an answer, and how it is read. Thread-safety: immutable.

    `parse` returns the value of a text and of whether the grammar let it end there; it raises
    `StructuredOutputError` for a whole answer that does not validate, and ValueError for one that
    stops before its end. The grammar is GBNF, or else `lark`.
    """

    gbnf: str | None
    parse: Callable[[str, bool], Any]
    lark: str | None = None

    def read(
        self, text: str, *, at_end: bool = False
    ) -> tuple[Any, StructuredOutputError | None, bool]:
        """Return an answer's value, or why it has none, and whether it was cut short.

        `at_end` is for answers that the model ended, which it can only where they are whole.
        """
        try:
            return self.parse(text, at_end), None, False
        except StructuredOutputError as error:
            return None, error, False
        except (ValueError, RecursionError):
            return None, None, True


def structured_output(
    response_format: Any = None,
    grammar: str | None = None,
    regex: str | None = None,
    choices: Iterable[str] | None = None,
    lark: str | None = None,
) -> StructuredOutput | None:
    """Return what the one of the five that is given asks for; None for free text.

    Raises `ParameterError`, `SchemaError`, `RegexError`; ImportError, which names the extra, when a
    class is given and pydantic is missing.
    """
    options = {
        "response_format": response_format,
        "grammar": grammar,
        "regex": regex,
        "choices": choices,
        "lark": lark,
    }
    given = [name for name, value in options.items() if value is not None]
    if len(given) > 1:
        raise ParameterError(
            f"{' and '.join(given)}: only one of them can decide the answer's form"
        )
    if lark is not None:
        if not isinstance(lark, str):
            raise ParameterError(f"lark: expected the text of a grammar, not {lark!r:.80}")
        return StructuredOutput(None, _whole_grammar, lark)
    if grammar is not None:
        if not isinstance(grammar, str):
            raise ParameterError(f"grammar: expected GBNF text, not {grammar!r:.80}")
        return StructuredOutput(grammar, _whole_grammar)
    if regex is not None:
        if not isinstance(regex, str):
            raise ParameterError(f"regex: expected a pattern, not {regex!r:.80}")
        return _of_regex(regex)
    if choices is not None:
        return _of_choices(choices)
    if response_format is None:
        return None
    if isinstance(response_format, Mapping):
        return _of_mapping(response_format)
    return _of_type(response_format)


def _whole_grammar(text: str, at_end: bool) -> str:
    if not at_end:
        raise ValueError(text)
    return text


@lru_cache(_N_KEPT)
def _of_regex(pattern: str) -> StructuredOutput:
    rules = Rules()
    node = parse_regex(pattern, whole=True)
    root = rules.add([emit(node, rules, plain)])
    if not rules.is_possible(root):
        raise ParameterError(f"regex: nothing can match {pattern!r:.80}")

    def parse(text: str, at_end: bool) -> str:
        if not at_end and not matches(node, text):
            raise ValueError(text)
        return text

    return StructuredOutput(rules.to_gbnf(root), parse)


def _of_choices(choices: Iterable[str]) -> StructuredOutput:
    if isinstance(choices, (str, bytes)) or not isinstance(choices, Iterable):
        raise ParameterError(f"choices: expected several strings, not {choices!r:.80}")
    texts = tuple(choices)
    if not texts:
        raise ParameterError("choices: there is none")
    for text in texts:
        if not isinstance(text, str):
            raise ParameterError(f"choices: expected strings, not {text!r:.80}")
        if "\0" in text or any("\ud800" <= char <= "\udfff" for char in text):
            raise ParameterError(f"choices: {text!r:.80} has a NUL or a lone surrogate")
    return _of_texts(frozenset(texts))


@lru_cache(_N_KEPT)
def _of_texts(texts: frozenset[str]) -> StructuredOutput:
    rules = Rules()
    root = rules.add(rules.texts(texts))

    def parse(text: str, at_end: bool) -> str:
        del at_end
        if text not in texts:
            raise ValueError(text)
        return text

    return StructuredOutput(rules.to_gbnf(root), parse)


def _of_mapping(wanted: Mapping[str, Any]) -> StructuredOutput | None:
    kind = wanted.get("type")
    if kind == "text":
        _require_fields(wanted, {"type"}, "response_format")
        return None
    if kind == "json_object":
        _require_fields(wanted, {"type", "schema"}, "response_format")
        return _of_schema(_JSON_OBJECT if "schema" not in wanted else _dumps(wanted["schema"]))
    if kind == "json_schema":
        _require_fields(wanted, {"type", "json_schema"}, "response_format")
        inner = wanted.get("json_schema")
        if not isinstance(inner, Mapping) or "schema" not in inner:
            raise ParameterError(
                "response_format: json_schema must be an object with the schema under 'schema'"
            )
        _require_fields(inner, _SCHEMA_FIELDS, "response_format: json_schema")
        for field, kinds in (("name", str), ("strict", bool), ("description", str)):
            if not isinstance(inner.get(field), (kinds, type(None))):
                raise ParameterError(f"response_format: {field} is {inner[field]!r:.80}")
        return _of_schema(_dumps(inner["schema"]))
    if _OF_SCHEMAS & wanted.keys() or kind in TYPES or isinstance(kind, list):
        raise ParameterError(
            "response_format: this is a bare JSON schema. Write {'type': 'json_schema', "
            "'json_schema': {'name': '...', 'schema': <the schema>}}"
        )
    raise ParameterError(
        "response_format: expected 'type' to be 'text', 'json_object' or 'json_schema', not "
        f"{kind!r:.80}"
    )


def _require_fields(fields: Mapping[str, Any], known: Iterable[str], where: str) -> None:
    unknown = fields.keys() - set(known)
    if unknown:
        raise ParameterError(f"{where}: unknown field {sorted(map(str, unknown))[0]!r:.80}")


def _dumps(schema: Any) -> str:
    try:
        return json.dumps(schema, allow_nan=False)
    except (TypeError, ValueError, RecursionError) as error:
        raise ParameterError(f"response_format: the schema is not JSON: {error}") from None


@lru_cache(_N_KEPT)
def _of_schema(text: str) -> StructuredOutput:
    schema = json.loads(text)

    def parse(text: str, at_end: bool) -> Any:
        return _document(schema, text, at_end)

    return StructuredOutput(schema_to_gbnf(schema), parse)


def _document(schema: Any, text: str, at_end: bool) -> Any:
    """Return the document, which may stop within a number: 12 of 123. Raises ValueError."""
    value = json.loads(text)
    if not at_end:
        resolver = Resolver(schema)
        if not resolver.allows(resolver.root, value):
            raise ValueError(text)
    return value


def _of_type(wanted: Any) -> StructuredOutput:
    is_class = isinstance(wanted, type)
    if not (
        (is_class and hasattr(wanted, "model_json_schema"))
        or (is_class and dataclasses.is_dataclass(wanted))
        or typing.is_typeddict(wanted)
        or type(wanted).__name__ == "TypeAdapter"
        or _is_typeddict_of_extensions(wanted)
    ):
        raise ParameterError(
            "response_format: expected a mapping, a pydantic model, a dataclass, a TypedDict or a "
            f"pydantic TypeAdapter, not {wanted!r:.80}"
        )
    return _of_class(wanted)


def _is_typeddict_of_extensions(wanted: Any) -> bool:
    return isinstance(wanted, type) and hasattr(wanted, "__total__")


@lru_cache(_N_KEPT)
def _of_class(wanted: Any) -> StructuredOutput:
    try:
        import pydantic
    except ImportError as error:
        message = (
            "response_format: a class as the form of an answer needs: "
            'pip install "llama-crab[chat]"'
        )
        raise ImportError(message, name="pydantic") from error
    name = getattr(wanted, "__name__", repr(wanted))
    try:
        adapter: Any = (
            wanted if isinstance(wanted, pydantic.TypeAdapter) else pydantic.TypeAdapter(wanted)
        )
        schema = adapter.json_schema()
    except pydantic.errors.PydanticUserError as error:
        raise ParameterError(f"response_format: {name}: {error}") from error

    def parse(text: str, at_end: bool) -> Any:
        _document(schema, text, at_end)
        try:
            return adapter.validate_json(text)
        except pydantic.ValidationError as error:
            message = f"the answer does not validate as {name}: {error}"
            invalid = StructuredOutputError(message)
            invalid.text = text
            raise invalid from error

    schema = json.loads(_dumps(schema))
    return StructuredOutput(schema_to_gbnf(schema), parse)
