"""Sets of code points, as ascending ranges that are apart."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from functools import lru_cache

# Inclusive bounds.
CharSet = tuple[tuple[int, int], ...]

# UTF-8 has no surrogates.
EVERY: CharSet = ((0, 0xD7FF), (0xE000, 0x10FFFF))
DIGITS: CharSet = ((0x30, 0x39),)
WORD: CharSet = ((0x30, 0x39), (0x41, 0x5A), (0x5F, 0x5F), (0x61, 0x7A))
SPACE: CharSet = ((0x09, 0x0D), (0x20, 0x20))
LINE_ENDS: CharSet = ((0x0A, 0x0A), (0x0D, 0x0D), (0x2028, 0x2029))


def union(*sets: Iterable[tuple[int, int]]) -> CharSet:
    """Return what any of the sets holds."""
    found: list[tuple[int, int]] = []
    for low, high in sorted(bounds for each in sets for bounds in each):
        if found and low <= found[-1][1] + 1:
            found[-1] = (found[-1][0], max(high, found[-1][1]))
        else:
            found.append((low, high))
    return tuple(found)


def intersection(one: CharSet, other: CharSet) -> CharSet:
    """Return what both sets hold."""
    found = []
    i = j = 0
    while i < len(one) and j < len(other):
        low, high = max(one[i][0], other[j][0]), min(one[i][1], other[j][1])
        if low <= high:
            found.append((low, high))
        if one[i][1] < other[j][1]:
            i += 1
        else:
            j += 1
    return tuple(found)


def complement(chars: CharSet) -> CharSet:
    """Return all other characters."""
    gaps, low = [], 0
    for first, last in chars:
        if low < first:
            gaps.append((low, first - 1))
        low = last + 1
    gaps.append((low, 0x10FFFF))
    return intersection(tuple(gap for gap in gaps if gap[0] <= gap[1]), EVERY)


def of_text(text: str) -> CharSet:
    """Return the set of a text's characters."""
    return union([(ord(char), ord(char)) for char in text])


def holds(chars: CharSet, code_point: int) -> bool:
    """Tell whether the code point is in the set."""
    return any(low <= code_point <= high for low, high in chars)


@lru_cache(maxsize=8)
def by_unicode(escape: str) -> CharSet:
    r"""Return what Python's ``\d``, ``\w`` or ``\s`` holds, and ECMAScript's with it."""
    if escape == "s":
        return union(
            SPACE,
            ((0x1C, 0x1F), (0x85, 0x85), (0xA0, 0xA0), (0x1680, 0x1680), (0x2000, 0x200A)),
            ((0x2028, 0x2029), (0x202F, 0x202F), (0x205F, 0x205F), (0x3000, 0x3000)),
            ((0xFEFF, 0xFEFF),),
        )
    test: Callable[[str], bool] = str.isdecimal if escape == "d" else str.isalnum
    found = [(code, code) for code in range(0x110000) if test(chr(code))]
    return union(found, WORD if escape == "w" else DIGITS)
