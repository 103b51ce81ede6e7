"""Grammars in the making: rules that are shared, cut where nothing can come of them, and GBNF."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import NamedTuple

from .charset import CharSet

# llama.cpp's parser copies what it repeats, and refuses more than 2000 copies.
_BLOCK = 500
MOST_REPEATS = _BLOCK * _BLOCK
# From so many texts on, those that begin alike share their beginning.
_FLAT = 32
_DEEPEST = 100


class Rep(NamedTuple):
    """An item, `least` to `most` times; None for any number."""

    item: Item
    least: int
    most: int | None


# A terminal in GBNF, a rule, or a repetition of one.
Item = str | int | Rep
Alternative = tuple[Item, ...]


class Rules:
    """The rules of one grammar, each an identifier; equal rules are one.

    Thread-safety: none.
    """

    def __init__(self) -> None:
        self._rules: list[tuple[Alternative, ...]] = []
        self._known: dict[tuple[Alternative, ...], int] = {}

    def reserve(self) -> int:
        """Return a rule to be defined later, for rules that refer to themselves."""
        self._rules.append(())
        return len(self._rules) - 1

    def define(self, rule: int, alternatives: Iterable[Sequence[Item]]) -> None:
        """Say what a reserved rule stands for; without an alternative, for nothing."""
        self._rules[rule] = tuple(map(tuple, alternatives))

    def add(self, alternatives: Iterable[Sequence[Item]]) -> int:
        """Return the rule of these alternatives."""
        body = tuple(map(tuple, alternatives))
        rule = self._known.get(body)
        if rule is None:
            rule = self._known[body] = self.reserve()
            self._rules[rule] = body
        return rule

    def either(self, alternatives: Sequence[Sequence[Item]]) -> tuple[Item, ...]:
        """Return the alternatives as items to stand in another rule."""
        if len(alternatives) == 1:
            return tuple(alternatives[0])
        return (self.add(alternatives),)

    def repeat(self, items: Sequence[Item], least: int, most: int | None) -> tuple[Item, ...]:
        """Return the items `least` to `most` times, of which there may be `MOST_REPEATS`."""
        if (least, most) == (1, 1) or not items:
            return tuple(items)
        if most == 0:
            return ()
        item = items[0] if len(items) == 1 and not isinstance(items[0], Rep) else self.add([items])
        if max(least, most or 0) <= _BLOCK:
            return (Rep(item, least, most),)
        block = self.add([(Rep(item, _BLOCK, _BLOCK),)])
        begin = self._exactly(item, block, least)
        if most is None:
            return (*begin, Rep(item, 0, None))
        return (*begin, *self._up_to(item, block, most - least))

    def _exactly(self, item: Item, block: int, n: int) -> tuple[Item, ...]:
        n_blocks, rest = divmod(n, _BLOCK)
        found: list[Item] = []
        if n_blocks:
            found.append(Rep(block, n_blocks, n_blocks))
        if rest:
            found.append(Rep(item, rest, rest))
        return tuple(found)

    def _up_to(self, item: Item, block: int, n: int) -> tuple[Item, ...]:
        n_blocks, rest = divmod(n, _BLOCK)
        if not n_blocks:
            return (Rep(item, 0, rest),) if rest else ()
        # Each length in one way only: fewer blocks and less than one more, or all and the rest.
        fewer = (Rep(block, 0, n_blocks - 1), Rep(item, 0, _BLOCK - 1))
        whole: tuple[Item, ...] = (Rep(block, n_blocks, n_blocks),)
        if rest:
            whole = (*whole, Rep(item, 0, rest))
        return (self.add([fewer if n_blocks > 1 else fewer[1:], whole]),)

    def texts(self, texts: Iterable[str], depth: int = 0) -> list[Alternative]:
        """Return alternatives of which each text is one."""
        found = sorted(set(texts))
        if len(found) <= _FLAT or depth > _DEEPEST:
            return [(literal(text),) if text else () for text in found]
        alternatives: list[Alternative] = []
        begin = 0
        if found[0] == "":
            alternatives.append(())
            begin = 1
        while begin < len(found):
            end = begin + 1
            while end < len(found) and found[end][0] == found[begin][0]:
                end += 1
            first, last = found[begin], found[end - 1]
            n = 0
            while n < min(len(first), len(last)) and first[n] == last[n]:
                n += 1
            rest = [text[n:] for text in found[begin:end]]
            tail = () if rest == [""] else self.either(self.texts(rest, depth + 1))
            alternatives.append((literal(first[:n]), *tail))
            begin = end
        return alternatives

    def is_possible(self, rule: int) -> bool:
        """Tell whether some finite text matches the rule."""
        return self._possible()[rule]

    def to_gbnf(self, root: int, name: str = "root", prefix: str = "r") -> str:
        """Return the grammar, with `name` for the rule `root`, which must be possible.

        The others are called `prefix` and a number.
        """
        possible = self._possible()
        names = {root: name}
        todo = [root]
        lines = []

        def name_of(rule: int) -> str:
            if rule not in names:
                names[rule] = f"{prefix}{len(names)}"
                todo.append(rule)
            return names[rule]

        def written(item: Item) -> str:
            if isinstance(item, str):
                return item
            if isinstance(item, int):
                return name_of(item)
            if not _is_possible(item.item, possible):
                return ""
            return written(item.item) + _times(item.least, item.most)

        # Grows while it is read.
        for rule in todo:
            bodies = [
                " ".join(filter(None, map(written, alternative))) or '""'
                for alternative in self._rules[rule]
                if all(_is_possible(item, possible) for item in alternative)
            ]
            lines.append(f"{names[rule]} ::= {' | '.join(dict.fromkeys(bodies))}\n")
        return "".join(lines)

    def _possible(self) -> list[bool]:
        possible = [False] * len(self._rules)
        changed = True
        while changed:
            changed = False
            # Rules refer to younger ones most of the time.
            for rule in reversed(range(len(self._rules))):
                body = self._rules[rule]
                if not possible[rule] and any(
                    all(_is_possible(item, possible) for item in alternative)
                    for alternative in body
                ):
                    possible[rule] = changed = True
        return possible


def _is_possible(item: Item, possible: list[bool]) -> bool:
    if isinstance(item, str):
        return True
    if isinstance(item, int):
        return possible[item]
    return item.least == 0 or _is_possible(item.item, possible)


def _times(least: int, most: int | None) -> str:
    if most is None:
        return "*" if least == 0 else "+" if least == 1 else f"{{{least},}}"
    if (least, most) == (0, 1):
        return "?"
    return f"{{{least}}}" if least == most else f"{{{least},{most}}}"


def literal(text: str) -> str:
    """Return the terminal of a text."""
    plain = text.isascii() and text.isprintable() and '"' not in text and "\\" not in text
    return f'"{text}"' if plain else f'"{"".join([_spelled(ord(char)) for char in text])}"'


def char_class(chars: CharSet) -> str:
    """Return the terminal of a set of characters."""
    return "[{}]".format(
        "".join(
            [
                _in_class(low) if low == high else f"{_in_class(low)}-{_in_class(high)}"
                for low, high in chars
            ]
        )
    )


def _spelled(code: int) -> str:
    if 0x20 <= code < 0x7F:
        return f"\\{chr(code)}" if chr(code) in '"\\' else chr(code)
    return _escaped(code)


def _in_class(code: int) -> str:
    return chr(code) if code < 0x80 and chr(code).isalnum() else _escaped(code)


def _escaped(code: int) -> str:
    if code < 0x100:
        return f"\\x{code:02x}"
    return f"\\u{code:04x}" if code < 0x10000 else f"\\U{code:08x}"
