"""From a JSON schema to the shapes of the values that it allows."""

from __future__ import annotations

from collections.abc import Iterable
from decimal import Decimal
from typing import Any
from urllib.parse import unquote

from ..errors import SchemaError
from .automaton import Automaton, TooLargeError, both, is_empty, of_lengths, of_node
from .formats import NO_RESTRICTION, format_node
from .keywords import ANNOTATIONS, DEFINITIONS, check_keywords, children, pointer
from .regex import parse_regex
from .shapes import (
    ANY,
    Items,
    Literal,
    Members,
    Node,
    Number,
    Shape,
    Text,
    narrowed,
    number_has,
    same_json,
    text_has,
    unique,
)

# The place of a schema that nothing satisfies.
_NOWHERE = "#false"
NOTHING: Node = (_NOWHERE,)
_MOST_SHAPES = 1000
_DEEPEST = 8


class Resolver:
    """The schemas of a document, and what they allow.

    All of the document that counts is checked first. Raises `SchemaError`. Thread-safety: none.
    """

    def __init__(self, schema: Any) -> None:
        self._schemas: dict[str, Any] = {"#": schema, _NOWHERE: False}
        self._known: dict[Node, tuple[Shape, ...]] = {(): ANY}
        self._open: set[Node] = set()
        self._check()
        self.root = self._node("#")

    def alternatives(self, node: Node) -> tuple[Shape, ...]:
        """Return shapes of which a value that satisfies `node` has one."""
        found = self._known.get(node)
        if found is None:
            if node in self._open:
                raise SchemaError.at("$ref", node[0], "refers to itself with no value in between")
            self._open.add(node)
            if len(node) == 1:
                found = self._shapes(node[0])
            else:
                found = ANY
                for path in node:
                    found = self._meet(found, self.alternatives((path,)), path)
            self._open.discard(node)
            self._known[node] = found
        return found

    def allows(self, node: Node, value: Any) -> bool:
        """Tell whether a value satisfies a node."""
        return any(self._has(shape, value) for shape in self.alternatives(node))

    def _check(self) -> None:
        todo = ["#"]
        seen = set(todo)
        for path in todo:
            schema = self._schemas[path]
            check_keywords(schema, path)
            inside = children(schema, path)
            self._schemas.update(inside)
            found = list(inside)
            if isinstance(schema, dict) and "$ref" in schema:
                found.append(self._target(path))
            todo += [each for each in dict.fromkeys(found) if each not in seen]
            seen.update(found)

    def _target(self, path: str) -> str:
        """Return the place that the ``$ref`` of a schema points to."""
        reference = self._schemas[path]["$ref"]
        own = self._schemas["#"].get("$id") if isinstance(self._schemas["#"], dict) else None
        if own and reference.startswith(own):
            reference = reference[len(own) :] or "#"
        if not reference.startswith("#"):
            raise SchemaError.at("$ref", path, f"{reference!r:.80} is not in this schema")
        steps = unquote(reference[1:]).split("/")
        at: Any = self._schemas["#"]
        if steps[0]:
            return self._anchor(steps, path)
        target = "#"
        for step in steps[1:]:
            name = step.replace("~1", "/").replace("~0", "~")
            try:
                at = at[int(name)] if isinstance(at, list) else at[name]
            except (KeyError, IndexError, ValueError, TypeError):
                raise SchemaError.at("$ref", path, f"there is no {reference!r:.80}") from None
            target = pointer(target, name)
        self._schemas[target] = at
        return target

    def _anchor(self, steps: list[str], path: str) -> str:
        todo: list[tuple[str, Any]] = [("#", self._schemas["#"])]
        for place, schema in todo:
            if isinstance(schema, dict):
                if schema.get("$anchor") == steps[0] and len(steps) == 1:
                    self._schemas[place] = schema
                    return place
                for name in DEFINITIONS:
                    definitions = schema.get(name, {})
                    if isinstance(definitions, dict):
                        todo += [(pointer(place, name, n), s) for n, s in definitions.items()]
        raise SchemaError.at("$ref", path, f"there is no anchor {steps[0]!r:.80}")

    def _node(self, path: str) -> Node:
        """Return the node of a schema; the same for all that say the same by reference."""
        seen = set()
        while True:
            schema = self._schemas[path]
            if schema is False:
                return NOTHING
            said = [] if schema is True else [k for k in schema if k not in ANNOTATIONS]
            said = [k for k in said if k not in DEFINITIONS and not k.startswith("x-")]
            if not said:
                return ()
            if said != ["$ref"]:
                return (path,)
            if path in seen:
                raise SchemaError.at("$ref", path, "refers to itself with no value in between")
            seen.add(path)
            path = self._target(path)

    def _shapes(self, path: str) -> tuple[Shape, ...]:
        schema = self._schemas[path]
        if isinstance(schema, bool):
            return ANY if schema else ()
        found = tuple(self._typed(schema, path))
        if "enum" in schema:
            found = self._among(schema["enum"], found)
        if "const" in schema:
            found = self._among([schema["const"]], found)
        if "$ref" in schema:
            found = self._meet(found, self.alternatives(self._node(self._target(path))), path)
        for i in range(len(schema.get("allOf", ()))):
            found = self._meet(found, self._branch(path, "allOf", i), path)
        if "anyOf" in schema:
            branches = [self._branch(path, "anyOf", i) for i in range(len(schema["anyOf"]))]
            every = tuple(dict.fromkeys([shape for branch in branches for shape in branch]))
            found = self._meet(found, every, path)
        if "oneOf" in schema:
            found = self._one_of(found, path, len(schema["oneOf"]))
        return found

    def _branch(self, path: str, keyword: str, i: int) -> tuple[Shape, ...]:
        return self.alternatives(self._node(pointer(path, keyword, i)))

    def _one_of(self, found: tuple[Shape, ...], path: str, n: int) -> tuple[Shape, ...]:
        branches = [self._meet(found, self._branch(path, "oneOf", i), path) for i in range(n)]
        for j, later in enumerate(branches):
            for i, earlier in enumerate(branches[:j]):
                for one in earlier:
                    for other in later:
                        shared = self._shared(one, other)
                        if shared is not None and not self._is_empty(shared, 0):
                            raise SchemaError.at(
                                "oneOf",
                                path,
                                f"a value may match both branch {i} and branch {j}; say what tells "
                                "them apart, or use anyOf",
                            )
        return tuple([shape for branch in branches for shape in branch])

    def _typed(self, schema: dict[str, Any], path: str) -> Iterable[Shape]:
        """Yield a shape of each type, with the keywords for it."""
        types = schema.get("type")
        wanted = {types} if isinstance(types, str) else None if types is None else set(types)

        def wants(name: str) -> bool:
            return wanted is None or name in wanted

        if wants("null"):
            yield Literal(None)
        if wants("boolean"):
            yield Literal(False)
            yield Literal(True)
        if wants("number") or wants("integer"):
            number = self._number(schema, integer=not wants("number"))
            if not number.is_empty:
                yield number
        if wants("string"):
            name = schema.get("format")
            text = Text(
                int(schema.get("minLength", 0)),
                _whole(schema.get("maxLength")),
                (schema["pattern"],) if "pattern" in schema else (),
                () if name is None or name in NO_RESTRICTION else (name,),
            )
            if text.most is None or text.least <= text.most:
                yield text
        if wants("array"):
            yield self._items(schema, path)
        if wants("object"):
            yield self._members(schema, path)

    def _number(self, schema: dict[str, Any], *, integer: bool) -> Number:
        found = Number(integer, step=int(schema.get("multipleOf", 0)))
        for keyword, excluded in (("minimum", False), ("exclusiveMinimum", True)):
            if keyword in schema:
                bound = Number(low=Decimal(repr(schema[keyword])), low_excluded=excluded)
                found = _narrowed_number(found, bound)
        for keyword, excluded in (("maximum", False), ("exclusiveMaximum", True)):
            if keyword in schema:
                bound = Number(high=Decimal(repr(schema[keyword])), high_excluded=excluded)
                found = _narrowed_number(found, bound)
        return found

    def _items(self, schema: dict[str, Any], path: str) -> Items:
        items = schema.get("items")
        first = "prefixItems" if "prefixItems" in schema else "items"
        n = len(schema.get("prefixItems", items if isinstance(items, list) else ()))
        rest: Node = ()
        if isinstance(items, list):
            if "additionalItems" in schema:
                rest = self._node(pointer(path, "additionalItems"))
        elif items is not None:
            rest = self._node(pointer(path, "items"))
        return Items(
            tuple([self._node(pointer(path, first, i)) for i in range(n)]),
            rest,
            int(schema.get("minItems", 0)),
            _whole(schema.get("maxItems")),
        )

    def _members(self, schema: dict[str, Any], path: str) -> Members:
        says_rest = "additionalProperties" in schema
        return Members(
            tuple(
                [
                    (name, self._node(pointer(path, "properties", name)))
                    for name in schema.get("properties", ())
                ]
            ),
            unique(schema.get("required", ())),
            self._node(pointer(path, "additionalProperties")) if says_rest else (),
            self._node(pointer(path, "propertyNames")) if "propertyNames" in schema else (),
            says_rest,
            int(schema.get("minProperties", 0)),
            _whole(schema.get("maxProperties")),
        )

    def _among(self, values: list[Any], shapes: tuple[Shape, ...]) -> tuple[Shape, ...]:
        literals = [Literal(value) for value in values]
        return tuple(
            [each for each in literals if any(self._has(shape, each.value) for shape in shapes)]
        )

    def _meet(
        self, some: tuple[Shape, ...], others: tuple[Shape, ...], path: str
    ) -> tuple[Shape, ...]:
        if some is ANY or others is ANY:
            return others if some is ANY else some
        pairs = [self._shared(one, other) for one in some for other in others]
        found = tuple(dict.fromkeys([shape for shape in pairs if shape is not None]))
        if len(found) > _MOST_SHAPES:
            raise SchemaError.at("anyOf", path, f"more than {_MOST_SHAPES} combinations")
        return found

    def _shared(self, one: Shape, other: Shape) -> Shape | None:
        if isinstance(one, Literal):
            return one if self._has(other, one.value) else None
        if isinstance(other, Literal):
            return other if self._has(one, other.value) else None
        return narrowed(one, other)

    def _has(self, shape: Shape, value: Any) -> bool:
        if isinstance(shape, Literal):
            return same_json(shape.value, value)
        if isinstance(value, str):
            return isinstance(shape, Text) and text_has(shape, value)
        if isinstance(value, list):
            if not isinstance(shape, Items):
                return False
            nodes = [*shape.prefix, *[shape.rest] * (len(value) - len(shape.prefix))]
            return (
                shape.least <= len(value)
                and (shape.most is None or len(value) <= shape.most)
                and all(self.allows(node, v) for node, v in zip(nodes, value, strict=False))
            )
        if isinstance(value, dict):
            return (
                isinstance(shape, Members)
                and shape.least <= len(value)
                and (shape.most is None or len(value) <= shape.most)
                and all(name in value for name in shape.required)
                and all(self.allows(shape.node_of(name), v) for name, v in value.items())
                and all(self.allows(shape.keys, name) for name in value)
            )
        is_number = isinstance(value, (int, float)) and not isinstance(value, bool)
        return is_number and isinstance(shape, Number) and number_has(shape, value)

    def _is_empty(self, shape: Shape, depth: int) -> bool:
        """Tell whether a shape certainly holds nothing."""
        if isinstance(shape, Number) and shape.integer:
            least, most = shape.integers()
            return least is not None and most is not None and least > most
        if isinstance(shape, Text) and (shape.patterns or shape.formats):
            try:
                return is_empty(text_automaton(shape))
            except TooLargeError:
                return False
        if isinstance(shape, Items):
            if shape.most is not None and shape.least > shape.most:
                return True
            nodes = shape.prefix[: shape.least]
            if shape.least > len(shape.prefix):
                nodes = (*nodes, shape.rest)
            return any(self._is_nothing(node, depth + 1) for node in nodes)
        if isinstance(shape, Members):
            return any(self._is_nothing(shape.node_of(n), depth + 1) for n in shape.required)
        return False

    def _is_nothing(self, node: Node, depth: int) -> bool:
        if depth > _DEEPEST or node in self._open:
            return False
        return all(self._is_empty(shape, depth) for shape in self.alternatives(node))


def text_automaton(shape: Text) -> Automaton:
    """Return the automaton of all strings of a shape. Raises `TooLargeError`."""
    nodes = [parse_regex(pattern, whole=False) for pattern in shape.patterns]
    nodes += [format_node(name) for name in shape.formats]
    found = of_lengths(shape.least, shape.most)
    for node in nodes:
        found = both(found, of_node(node))
    return found


def _narrowed_number(one: Number, other: Number) -> Number:
    shape = narrowed(one, other)
    # Bounds that exclude each other: any empty range will do.
    empty = Number(low=Decimal(0), low_excluded=True, high=Decimal(0))
    return shape if isinstance(shape, Number) else empty


def _whole(value: Any) -> int | None:
    return None if value is None else int(value)
