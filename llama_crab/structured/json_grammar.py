"""From the shapes of values to a grammar of the JSON documents that have them.

Documents are compact or have one blank after commas and colons, as `json.dumps` writes them. Keys
come in the order of the schema. Where a schema has ``properties`` and does not speak of others
(``additionalProperties``), no others are written.
"""

from __future__ import annotations

import json
from collections.abc import Iterable
from typing import Any

from ..errors import SchemaError
from .automaton import TooLargeError, both, emit, of_others
from .formats import format_node
from .gbnf import Alternative, Item, Rules, literal
from .json_text import SPACE, any_char, in_string, plain
from .ranges import integers, numbers
from .regex import Node as Pattern
from .regex import emit as emit_node
from .regex import lengths, parse_regex
from .resolve import NOTHING, Resolver, text_automaton
from .shapes import Items, Literal, Members, Node, Number, Shape, Text

_MOST_MULTIPLES = 10_000

_QUOTE = literal('"')
_COMMA: Alternative = (literal(","), SPACE)


def schema_to_gbnf(schema: Any) -> str:
    """Return the grammar of the documents that satisfy a JSON schema, written as above.

    Raises `SchemaError` for a keyword that cannot be guaranteed, and where nothing satisfies it.
    """
    rules = Rules()
    return rules.to_gbnf(add_schema(schema, rules))


def add_schema(schema: Any, rules: Rules) -> int:
    """Add the documents that satisfy a schema to a grammar; return their rule.

    Raises as `schema_to_gbnf`.
    """
    try:
        root = _JsonGrammar(Resolver(schema), rules).root()
    except RecursionError:
        raise SchemaError.at("schema", "#", "it is nested too deeply") from None
    if not rules.is_possible(root):
        raise SchemaError.at("schema", "#", "no document can satisfy it")
    return root


class _JsonGrammar:
    def __init__(self, resolver: Resolver, rules: Rules) -> None:
        self._resolver = resolver
        self._rules = rules
        self._values: dict[tuple[Shape, ...], int] = {}

    def root(self) -> int:
        return self._value(self._resolver.root)

    def _value(self, node: Node) -> int:
        """Return the rule of the values of a node."""
        shapes = self._resolver.alternatives(node)
        rule = self._values.get(shapes)
        if rule is None:
            rule = self._values[shapes] = self._rules.reserve()
            self._rules.define(rule, self._alternatives(shapes, node))
        return rule

    def _alternatives(self, shapes: tuple[Shape, ...], node: Node) -> list[Alternative]:
        path = node[0] if node else "#"
        scalars: list[str] = []
        found: list[Alternative] = []
        for shape in shapes:
            if isinstance(shape, Literal):
                if isinstance(shape.value, (list, dict)):
                    found.append(tuple(_literal_items(shape.value)))
                else:
                    scalars.append(_dumps(shape.value))
            elif isinstance(shape, Number):
                found += self._number(shape, path)
            elif isinstance(shape, Text):
                found.append((_QUOTE, *self._text(shape, path), _QUOTE))
            elif isinstance(shape, Items):
                found.append((literal("["), *self._items(shape), literal("]")))
            else:
                found.append((literal("{"), *self._members(shape, path), literal("}")))
        return [*self._rules.texts(scalars), *found]

    def _number(self, shape: Number, path: str) -> list[Alternative]:
        if shape.step > 1:
            return self._multiples(shape, path)
        if shape.integer or shape.step:
            node = integers(*shape.integers()) if _has_integers(shape) else None
        else:
            node = numbers(shape.low, shape.low_excluded, shape.high, shape.high_excluded)
        if node is None:
            return []
        return [emit_node(node, self._rules, plain)]

    def _multiples(self, shape: Number, path: str) -> list[Alternative]:
        low, high = shape.integers()
        if low is None or high is None or (high - low) // shape.step > _MOST_MULTIPLES:
            reason = f"needs bounds with at most {_MOST_MULTIPLES} multiples between them"
            raise SchemaError.at("multipleOf", path, reason)
        first = -(-low // shape.step) * shape.step
        return self._rules.texts([str(n) for n in range(first, high + 1, shape.step)])

    def _text(self, shape: Text, path: str) -> tuple[Item, ...]:
        """Return what stands between the quotes of a string."""
        rules = self._rules
        nodes = [parse_regex(pattern, whole=False) for pattern in shape.patterns]
        nodes += [format_node(name) for name in shape.formats]
        if not nodes:
            return rules.repeat(any_char(rules), shape.least, shape.most)
        if len(nodes) == 1 and _fits(nodes[0], shape):
            return emit_node(nodes[0], rules, in_string)
        try:
            return emit(text_automaton(shape), rules, in_string)
        except TooLargeError as error:
            keyword = "pattern" if shape.patterns else "format"
            raise SchemaError.at(keyword, path, f"too large beside other limits: {error}") from None

    def _items(self, shape: Items) -> tuple[Item, ...]:
        rules, n, most = self._rules, len(shape.prefix), shape.most
        rest = self._value(shape.rest)
        tail = rules.add(())
        for i in range(n, -1, -1):
            # What follows i items.
            body: list[Alternative] = [()] if i >= shape.least else []
            if i < n:
                if most is None or i < most:
                    body.append((*_comma(i), self._value(shape.prefix[i]), tail))
            elif most is None or n < most:
                least = max(shape.least - n, 1)
                more = rules.repeat(
                    (*_COMMA, rest), least - 1, None if most is None else most - n - 1
                )
                body.append((*_comma(i), rest, *more))
            tail = rules.add(body)
        return (tail,)

    def _members(self, shape: Members, path: str) -> tuple[Item, ...]:
        declared = dict(shape.properties)
        for name in shape.required:
            declared.setdefault(name, shape.rest)
        is_free = shape.says_rest or not shape.properties
        is_free = is_free and bool(self._resolver.alternatives(shape.rest))
        n, least, most = len(declared), shape.least, shape.most
        if least > n + is_free:
            reason = "equal keys cannot be ruled out" if is_free else "there are fewer properties"
            raise SchemaError.at("minProperties", path, f"above {n + is_free}: {reason}")
        members = [
            (name in shape.required, self._member(name, node, shape.keys))
            for name, node in declared.items()
        ]
        other = self._other_member(shape, list(declared)) if is_free else None
        # How many are written so far, as far as it matters: whether any, whether enough, how many.
        top = max(1, least) if most is None else n + 1
        fewest = [0]
        for is_required, _ in members:
            fewest.append(fewest[-1] + is_required)
        after = {
            k: self._others(other, k, least, most)
            for k in range(min(fewest[n], top), min(n, top) + 1)
        }
        for i in range(n - 1, -1, -1):
            is_required, member = members[i]
            here = {}
            for k in range(min(fewest[i], top), min(i, top) + 1):
                body: list[Alternative] = []
                if most is None or k < most:
                    body.append((*_comma(k), *member, *after[min(k + 1, top)]))
                if not is_required:
                    body.append(after[k])
                here[k] = self._rules.either(body) if body else (self._rules.add(()),)
            after = here
        return after[0]

    def _member(self, name: str, node: Node, keys: Node) -> Alternative:
        value = self._value(node if self._resolver.allows(keys, name) else NOTHING)
        return (literal(f"{_dumps(name)}:"), SPACE, value)

    def _others(
        self, other: Alternative | None, n_before: int, least: int, most: int | None
    ) -> Alternative:
        """Return what follows the declared members."""
        body: list[Alternative] = [()] if n_before >= least else []
        if other is not None and (most is None or n_before < most) and n_before + 1 >= least:
            # Of several, all may have the same key: they count as one.
            n_more = None if most is None else most - n_before - 1
            more = self._rules.repeat((*_COMMA, *other), 0, n_more)
            body.append((*_comma(n_before), *other, *more))
        return self._rules.either(body) if body else (self._rules.add(()),)

    def _other_member(self, shape: Members, declared: list[str]) -> Alternative:
        """Return a member with a key that is not declared."""
        rules = self._rules
        bodies: list[Alternative] = []
        for key in self._resolver.alternatives(shape.keys):
            if isinstance(key, Literal):
                if isinstance(key.value, str) and key.value not in declared:
                    bodies.append((literal(_dumps(key.value)),))
            elif isinstance(key, Text):
                if not declared:
                    inside = self._text(key, "#")
                elif key == Text():
                    inside = emit(of_others(declared), rules, in_string)
                else:
                    try:
                        inside = emit(
                            both(of_others(declared), text_automaton(key)), rules, in_string
                        )
                    except TooLargeError as error:
                        path = shape.keys[0]
                        raise SchemaError.at("propertyNames", path, f"too large: {error}") from None
                bodies.append((_QUOTE, *inside, _QUOTE))
        return (rules.add(bodies), literal(":"), SPACE, self._value(shape.rest))


def _has_integers(shape: Number) -> bool:
    low, high = shape.integers()
    return low is None or high is None or low <= high


def _fits(node: Pattern, shape: Text) -> bool:
    least, most = lengths(node)
    if least < shape.least:
        return False
    return shape.most is None or (most is not None and most <= shape.most)


def _comma(n_before: int) -> Alternative:
    return _COMMA if n_before else ()


def _dumps(value: Any) -> str:
    return json.dumps(value, ensure_ascii=False)


def _literal_items(value: Any) -> Iterable[Item]:
    """Yield the terminals of one value, blanks as everywhere."""
    if isinstance(value, list):
        yield literal("[")
        for i, item in enumerate(value):
            yield from _comma(i)
            yield from _literal_items(item)
        yield literal("]")
    elif isinstance(value, dict):
        yield literal("{")
        for i, (name, item) in enumerate(value.items()):
            yield from _comma(i)
            yield literal(f"{_dumps(name)}:")
            yield SPACE
            yield from _literal_items(item)
        yield literal("}")
    else:
        yield literal(_dumps(value))
