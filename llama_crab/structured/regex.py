r"""Regular expressions: a parser of the subset that has one meaning in Python and ECMAScript.

Literals, ``.``, classes, ``\d \w \s`` and their negations, escapes, groups, alternation,
quantifiers (greedy or lazy, which is the same language), and anchors at the ends. ``\d \w \s`` are
ASCII; ``\D \W \S`` hold none of Unicode's digits, letters and blanks either, so that what is
generated matches in both dialects. All else raises `RegexError`.
"""

from __future__ import annotations

from typing import NamedTuple

from ..errors import RegexError
from .charset import (
    DIGITS,
    EVERY,
    LINE_ENDS,
    SPACE,
    WORD,
    CharSet,
    by_unicode,
    complement,
    union,
)
from .gbnf import MOST_REPEATS, Item, Rules
from .json_text import Speller


class Chars(NamedTuple):
    """One character of a set."""

    chars: CharSet


class Seq(NamedTuple):
    """One part after the other."""

    parts: tuple[Node, ...]


class Alt(NamedTuple):
    """One of several."""

    options: tuple[Node, ...]


class Repeat(NamedTuple):
    """A part, `least` to `most` times; None for any number."""

    node: Node
    least: int
    most: int | None


class Anchor(NamedTuple):
    """The beginning or the end of the text."""

    at_start: bool
    position: int


Node = Chars | Seq | Alt | Repeat | Anchor

EMPTY = Seq(())
ANYTHING = Repeat(Chars(EVERY), 0, None)

_ASCII = {"d": DIGITS, "w": WORD, "s": SPACE}
_CONTROLS = {"t": 9, "n": 10, "v": 11, "f": 12, "r": 13}
_HEX = {"x": 2, "u": 4}
_DEEPEST = 100
_LOOKAROUNDS = {
    "?=": "a lookahead",
    "?!": "a negative lookahead",
    "?<=": "a lookbehind",
    "?<!": "a negative lookbehind",
    "?>": "an atomic group",
    "?P=": "a back reference",
    "?#": "a comment",
    "?(": "a conditional group",
}


def parse_regex(pattern: str, *, whole: bool) -> Node:
    """Return what a pattern matches, without anchors.

    `whole` is for patterns that must match all of a text, as `re.fullmatch`; otherwise they may
    match anywhere in it, as `re.search`. Raises `RegexError`.
    """
    return _settle(_Parser(pattern).parse(), pattern, (whole, whole))


def emit(node: Node, rules: Rules, spell: Speller) -> tuple[Item, ...]:
    """Return items that match what `node` does, its characters written by `spell`."""
    if isinstance(node, Chars):
        return spell(rules, node.chars) if node.chars else (rules.add(()),)
    if isinstance(node, Seq):
        return tuple([item for part in node.parts for item in emit(part, rules, spell)])
    if isinstance(node, Alt):
        return rules.either([emit(option, rules, spell) for option in node.options])
    assert isinstance(node, Repeat)
    return rules.repeat(emit(node.node, rules, spell), node.least, node.most)


def lengths(node: Node) -> tuple[int, int | None]:
    """Return the least and the most characters of a match; None for no bound."""
    if isinstance(node, Chars):
        return 1, 1
    if isinstance(node, Repeat):
        least, most = lengths(node.node)
        none = most is None or node.most is None
        return least * node.least, None if none else (most or 0) * (node.most or 0)
    if isinstance(node, Anchor):
        return 0, 0
    parts = [lengths(part) for part in (node.parts if isinstance(node, Seq) else node.options)]
    if isinstance(node, Seq):
        open_ended = any(most is None for _, most in parts)
        return sum(p[0] for p in parts), None if open_ended else sum(p[1] or 0 for p in parts)
    open_ended = any(most is None for _, most in parts)
    return min(p[0] for p in parts), None if open_ended else max(p[1] or 0 for p in parts)


class _Parser:
    def __init__(self, pattern: str) -> None:
        self._pattern = pattern
        self._at = 0
        self._depth = 0

    def parse(self) -> Node:
        node = self._alternation()
        if self._at < len(self._pattern):
            raise self._error("an unmatched ')'", self._at)
        return node

    def _error(self, construct: str, position: int) -> RegexError:
        return RegexError.at(self._pattern, construct, position)

    def _peek(self) -> str:
        return self._pattern[self._at : self._at + 1]

    def _takes(self, text: str) -> bool:
        if self._pattern.startswith(text, self._at):
            self._at += len(text)
            return True
        return False

    def _alternation(self) -> Node:
        options = [self._sequence()]
        while self._takes("|"):
            options.append(self._sequence())
        return options[0] if len(options) == 1 else Alt(tuple(options))

    def _sequence(self) -> Node:
        parts: list[Node] = []
        while self._peek() not in ("", "|", ")"):
            parts.append(self._quantified())
        return parts[0] if len(parts) == 1 else Seq(tuple(parts))

    def _quantified(self) -> Node:
        start = self._at
        node = self._atom()
        begin = self._at
        bounds = self._quantifier()
        if bounds is None:
            return node
        if isinstance(node, Anchor):
            raise self._error("a quantified anchor", start)
        least, most = bounds
        if max(least, most or 0) > MOST_REPEATS:
            raise self._error(f"more than {MOST_REPEATS} repetitions", begin)
        if most is not None and most < least:
            raise self._error("a maximum below its minimum", begin)
        if self._peek() == "+":
            raise self._error("a possessive quantifier", begin)
        self._takes("?")  # lazy: which match is found first changes no language
        if self._peek() and self._peek() in "*+?":
            raise self._error("a quantifier after a quantifier", self._at)
        return Repeat(node, least, most)

    def _quantifier(self) -> tuple[int, int | None] | None:
        for char, bounds in (("*", (0, None)), ("+", (1, None)), ("?", (0, 1))):
            if self._takes(char):
                return bounds
        if self._peek() != "{":
            return None
        begin = self._at
        end = self._pattern.find("}", begin)
        inside = self._pattern[begin + 1 : end] if end > 0 else ""
        least, comma, most = inside.partition(",")
        if not least and comma and (not most or _is_number(most)):
            raise self._error("a quantifier without a minimum, which ECMAScript lacks", begin)
        if not _is_number(least) or (most and not _is_number(most)):
            raise self._error("a '{' that begins no quantifier; write \\{", begin)
        self._at = end + 1
        if not comma:
            return int(least), int(least)
        return int(least), int(most) if most else None

    def _atom(self) -> Node:
        begin = self._at
        char = self._peek()
        self._at += 1
        if char == "(":
            return self._group(begin)
        if char == "[":
            return Chars(self._class(begin))
        if char == "\\":
            code, chars, wide = self._escape(begin, in_class=False)
            del wide
            return Chars(((code, code),) if code is not None else chars)
        if char == ".":
            return Chars(complement(LINE_ENDS))
        if char in "^$":
            return Anchor(char == "^", begin)
        if char in "*+?":
            raise self._error("a quantifier with nothing to repeat", begin)
        if char == "{":
            raise self._error("a '{' that begins no quantifier; write \\{", begin)
        return Chars(((self._code(char, begin),) * 2,))

    def _code(self, char: str, position: int) -> int:
        code = ord(char)
        if 0xD800 <= code <= 0xDFFF:
            raise self._error("a lone surrogate", position)
        return code

    def _group(self, begin: int) -> Node:
        self._depth += 1
        if self._depth > _DEEPEST:
            raise self._error(f"more than {_DEEPEST} nested groups", begin)
        if self._peek() == "?" and not self._takes("?:"):
            for mark, construct in _LOOKAROUNDS.items():
                if self._pattern.startswith(mark, self._at):
                    raise self._error(construct, begin)
            end = self._pattern.find(">", self._at)
            name = self._pattern[self._at : end] if end > 0 else ""
            prefix = "?P<" if name.startswith("?P<") else "?<"
            if not name.startswith(prefix) or not name[len(prefix) :].isidentifier():
                raise self._error("inline flags", begin)
            self._at = end + 1
        node = self._alternation()
        if not self._takes(")"):
            raise self._error("a group that does not end", begin)
        self._depth -= 1
        # Kept apart from its neighbours: what follows may repeat all of it.
        return node

    def _class(self, begin: int) -> CharSet:
        negated = self._takes("^")
        if self._peek() == "]":
            raise self._error("a ']' first in a class; write \\]", self._at)
        found: list[CharSet] = []
        while not self._takes("]"):
            if self._at >= len(self._pattern):
                raise self._error("a class that does not end", begin)
            if self._pattern.startswith(("[:", "[.", "[="), self._at):
                raise self._error("a POSIX class", self._at)
            start = self._at
            low, chars, wide = self._class_atom()
            if self._peek() == "-" and self._pattern[self._at + 1 : self._at + 2] not in ("]", ""):
                self._at += 1
                high, _, _ = self._class_atom()
                if low is None or high is None:
                    raise self._error("a range of classes", start)
                if high < low:
                    raise self._error("a range that is the wrong way round", start)
                found.append(((low, high),))
            elif low is not None:
                found.append(((low, low),))
            else:
                found.append(wide if negated else chars)
        chars = union(*found)
        # Also takes the surrogates out of a range that spans them.
        return complement(chars) if negated else complement(complement(chars))

    def _class_atom(self) -> tuple[int | None, CharSet, CharSet]:
        begin = self._at
        char = self._peek()
        if not char:
            raise self._error("a class that does not end", begin)
        self._at += 1
        if char == "\\":
            return self._escape(begin, in_class=True)
        return self._code(char, begin), (), ()

    def _escape(self, begin: int, *, in_class: bool) -> tuple[int | None, CharSet, CharSet]:
        """Return a code point; or a set that is in every dialect's, and one that holds them all."""
        char = self._peek()
        self._at += 1
        if not char:
            raise self._error("a backslash at the end", begin)
        if char in _ASCII:
            return None, _ASCII[char], by_unicode(char)
        if char.lower() in _ASCII:
            return None, complement(by_unicode(char.lower())), complement(_ASCII[char.lower()])
        if char in _CONTROLS:
            return _CONTROLS[char], (), ()
        if char in _HEX:
            digits = self._pattern[self._at : self._at + _HEX[char]]
            if len(digits) < _HEX[char] or not all(c in "0123456789abcdefABCDEF" for c in digits):
                raise self._error(f"the escape \\{char} without {_HEX[char]} hex digits", begin)
            self._at += _HEX[char]
            return self._code(chr(int(digits, 16)), begin), (), ()
        if char == "b" and in_class:
            return 8, (), ()
        if char in "bB":
            raise self._error("a word boundary", begin)
        if char == "k" or (char.isdigit() and char != "0"):
            raise self._error("a back reference", begin)
        if char == "0" and not self._peek().isdigit():
            return 0, (), ()
        if char in "pP":
            raise self._error("a Unicode property", begin)
        if char.isalnum() or char == "_" or not char.isascii():
            raise self._error(f"the escape \\{char}", begin)
        return ord(char), (), ()


def _is_number(text: str) -> bool:
    return text.isascii() and text.isdigit() and len(text) < 10


def _settle(node: Node, pattern: str, whole: tuple[bool, bool]) -> Node:
    """Take the anchors at the ends off; where there is none, anything may come before or behind."""
    if isinstance(node, Alt):
        return Alt(tuple([_settle(option, pattern, whole) for option in node.options]))
    parts = list(node.parts) if isinstance(node, Seq) else [node]
    before = after = False
    while parts and isinstance(parts[0], Anchor) and parts[0].at_start:
        del parts[0]
        before = True
    while parts and isinstance(parts[-1], Anchor) and not parts[-1].at_start:
        del parts[-1]
        after = True
    whole = (whole[0] or before, whole[1] or after)
    if len(parts) == 1 and isinstance(parts[0], (Alt, Seq)):
        return _settle(parts[0], pattern, whole)
    for part in parts:
        _refuse_anchors(part, pattern)
    if not whole[0]:
        parts.insert(0, ANYTHING)
    if not whole[1]:
        parts.append(ANYTHING)
    return Seq(tuple(parts))


def _refuse_anchors(node: Node, pattern: str) -> None:
    if isinstance(node, Anchor):
        construct = "an anchor that is not at an end of the pattern"
        raise RegexError.at(pattern, construct, node.position)
    if isinstance(node, Repeat):
        _refuse_anchors(node.node, pattern)
    elif isinstance(node, (Seq, Alt)):
        for part in node.parts if isinstance(node, Seq) else node.options:
            _refuse_anchors(part, pattern)
