"""How JSON spells characters: terminals for sets of characters inside and outside of a string."""

from __future__ import annotations

from collections.abc import Callable
from functools import lru_cache

from .charset import CharSet, holds, intersection, union
from .gbnf import Item, Rules, char_class, literal

# Between a comma or a colon and what follows it.
SPACE = '" "?'

_SHORT = {0x22: '"', 0x5C: "\\", 0x08: "b", 0x0C: "f", 0x0A: "n", 0x0D: "r", 0x09: "t"}
# What a string holds as it is.
_RAW: CharSet = ((0x20, 0x21), (0x23, 0x5B), (0x5D, 0xD7FF), (0xE000, 0x10FFFF))

# Writes one character of a set.
Speller = Callable[[Rules, CharSet], tuple[Item, ...]]


def plain(rules: Rules, chars: CharSet) -> tuple[Item, ...]:
    """Write a character of the set as it is; there is no way to write NUL."""
    writable = intersection(chars, ((1, 0x10FFFF),))
    return (_terminal(writable),) if writable else (rules.add(()),)


def in_string(rules: Rules, chars: CharSet) -> tuple[Item, ...]:
    """Write a character of the set inside a JSON string, escaped where it must be."""
    return rules.either(_ways(chars))


@lru_cache(1024)
def _ways(chars: CharSet) -> tuple[tuple[Item, ...], ...]:
    raw = intersection(chars, _RAW)
    alternatives: list[tuple[Item, ...]] = [(_terminal(raw),)] if raw else []
    short = [letter for code, letter in _SHORT.items() if holds(chars, code)]
    if short:
        alternatives.append((literal("\\"), char_class(union([(ord(c), ord(c)) for c in short]))))
    for row in (0x00, 0x10):
        codes = [code for code in range(row, row + 0x10) if holds(chars, code)]
        digits = {ord(case(f"{code & 15:x}")) for code in codes for case in (str.lower, str.upper)}
        if digits:
            hexadecimal = char_class(union([(digit, digit) for digit in digits]))
            alternatives.append((literal(f"\\u00{row >> 4}"), hexadecimal))
    return tuple(alternatives)


def any_char(rules: Rules) -> tuple[Item, ...]:
    """Write any character inside a JSON string, by any escape that JSON has."""
    digit = "[0-9a-fA-F]"
    unit: list[tuple[Item, ...]] = [
        ("[0-9a-cefA-CEF]", f"{digit}{{3}}"),
        ("[dD]", "[0-7]", f"{digit}{{2}}"),
        # A character beyond U+FFFF: both halves, or neither.
        ("[dD]", "[89abAB]", f"{digit}{{2}}", literal("\\u"), "[dD]", "[c-fC-F]", f"{digit}{{2}}"),
    ]
    escape: list[tuple[Item, ...]] = [('["\\\\/bfnrt]',), ('"u"', *rules.either(unit))]
    return rules.either([(char_class(_RAW),), (literal("\\"), *rules.either(escape))])


def _terminal(chars: CharSet) -> str:
    if len(chars) == 1 and chars[0][0] == chars[0][1]:
        return literal(chr(chars[0][0]))
    return char_class(chars)
