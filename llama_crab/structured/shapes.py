"""What a schema allows, as shapes: sets of values of one JSON type each."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from decimal import Decimal
from typing import Any

from .automaton import matches
from .formats import format_node
from .regex import parse_regex

# The places of the schemas that a value must satisfy, all of them; () for any value.
Node = tuple[str, ...]


@dataclass(frozen=True, slots=True)
class Literal:
    """One value."""

    value: Any

    def __hash__(self) -> int:
        return hash(repr(self.value))


@dataclass(frozen=True, slots=True)
class Number:
    """Numbers between bounds; `step` divides them all (0: no step)."""

    integer: bool = False
    low: Decimal | None = None
    low_excluded: bool = False
    high: Decimal | None = None
    high_excluded: bool = False
    step: int = 0

    def integers(self) -> tuple[int | None, int | None]:
        """Return the least and the greatest integer in the range."""
        low, high = self.low, self.high
        least = None if low is None else math.ceil(low) + (self.low_excluded and low == int(low))
        most = (
            None if high is None else math.floor(high) - (self.high_excluded and high == int(high))
        )
        return least, most

    @property
    def is_empty(self) -> bool:
        """Whether no number is in the range."""
        if self.low is None or self.high is None:
            return False
        if self.low == self.high:
            return self.low_excluded or self.high_excluded
        return self.low > self.high


@dataclass(frozen=True, slots=True)
class Text:
    """Strings; lengths in characters. `patterns` match anywhere, `formats` all of it."""

    least: int = 0
    most: int | None = None
    patterns: tuple[str, ...] = ()
    formats: tuple[str, ...] = ()


@dataclass(frozen=True, slots=True)
class Items:
    """Arrays: `prefix` for the first ones, `rest` for those behind."""

    prefix: tuple[Node, ...] = ()
    rest: Node = ()
    least: int = 0
    most: int | None = None


@dataclass(frozen=True, slots=True)
class Members:
    """Objects.

    `rest` holds for the values of undeclared keys and `keys` for all keys. `says_rest` is whether
    the schema speaks of undeclared keys at all.
    """

    properties: tuple[tuple[str, Node], ...] = ()
    required: tuple[str, ...] = ()
    rest: Node = ()
    keys: Node = ()
    says_rest: bool = False
    least: int = 0
    most: int | None = None

    def node_of(self, name: str) -> Node:
        """Return what holds for the value of a key."""
        for own, node in self.properties:
            if own == name:
                return node
        return self.rest


Shape = Literal | Number | Text | Items | Members

ANY: tuple[Shape, ...] = (
    *(Literal(None), Literal(False), Literal(True)),
    *(Number(), Text(), Items(), Members()),
)


def same_json(one: Any, other: Any) -> bool:
    """Compare as JSON Schema does: 1 is 1.0, and neither is true."""
    if isinstance(one, bool) or isinstance(other, bool):
        return one is other
    if isinstance(one, Mapping) and isinstance(other, Mapping):
        return one.keys() == other.keys() and all(same_json(one[k], other[k]) for k in one)
    if isinstance(one, (list, tuple)) and isinstance(other, (list, tuple)):
        return len(one) == len(other) and all(map(same_json, one, other))
    return bool(one == other)


def number_has(shape: Number, value: int | float) -> bool:
    """Tell whether a number is in the shape."""
    exact = Decimal(repr(value))
    if (shape.integer or shape.step) and exact != int(exact):
        return False
    if shape.step and int(exact) % shape.step:
        return False
    low, high = shape.low, shape.high
    above = low is None or exact > low or (exact == low and not shape.low_excluded)
    return above and (high is None or exact < high or (exact == high and not shape.high_excluded))


def text_has(shape: Text, value: str) -> bool:
    """Tell whether a string is in the shape."""
    return (
        shape.least <= len(value)
        and (shape.most is None or len(value) <= shape.most)
        and all(matches(parse_regex(each, whole=False), value) for each in shape.patterns)
        and all(matches(format_node(name), value) for name in shape.formats)
    )


def narrowed(one: Shape, other: Shape) -> Shape | None:
    """Return what both shapes hold, None where that is nothing. Not for literals."""
    if isinstance(one, Number) and isinstance(other, Number):
        return _narrowed_numbers(one, other)
    if isinstance(one, Text) and isinstance(other, Text):
        most = _less(one.most, other.most)
        least = max(one.least, other.least)
        if most is not None and most < least:
            return None
        patterns = unique((*one.patterns, *other.patterns))
        return Text(least, most, patterns, unique((*one.formats, *other.formats)))
    if isinstance(one, Items) and isinstance(other, Items):
        n = max(len(one.prefix), len(other.prefix))
        prefix = [unique((*_item_node(one, i), *_item_node(other, i))) for i in range(n)]
        most = _less(one.most, other.most)
        rest = unique((*one.rest, *other.rest))
        return Items(tuple(prefix), rest, max(one.least, other.least), most)
    if isinstance(one, Members) and isinstance(other, Members):
        names = unique([name for name, _ in (*one.properties, *other.properties)])
        return Members(
            tuple([(name, unique((*one.node_of(name), *other.node_of(name)))) for name in names]),
            unique((*one.required, *other.required)),
            unique((*one.rest, *other.rest)),
            unique((*one.keys, *other.keys)),
            one.says_rest or other.says_rest,
            max(one.least, other.least),
            _less(one.most, other.most),
        )
    return None


def _narrowed_numbers(one: Number, other: Number) -> Number | None:
    lows = [(n.low, n.low_excluded) for n in (one, other) if n.low is not None]
    highs = [(-n.high, n.high_excluded) for n in (one, other) if n.high is not None]
    low, low_excluded = max(lows, default=(None, False))
    high, high_excluded = max(highs, default=(None, False))
    step = math.lcm(one.step, other.step) if one.step and other.step else one.step or other.step
    found = Number(
        one.integer or other.integer,
        low,
        low_excluded,
        None if high is None else -high,
        high_excluded,
        step,
    )
    return None if found.is_empty else found


def _item_node(shape: Items, i: int) -> Node:
    return shape.prefix[i] if i < len(shape.prefix) else shape.rest


def _less(one: int | None, other: int | None) -> int | None:
    return other if one is None else one if other is None else min(one, other)


def unique(names: Iterable[str]) -> tuple[str, ...]:
    """Return each name once, in the order of their first appearance."""
    return tuple(dict.fromkeys(names))
