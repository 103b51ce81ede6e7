"""Patterns of the numbers in a range, as JSON writes them: no leading zeros, no plus sign."""

from __future__ import annotations

from decimal import Decimal

from .charset import DIGITS
from .regex import EMPTY, Alt, Chars, Node, Repeat, Seq

# What a number without bounds may have: more is noise, and a model could go on for ever.
_INTEGER_DIGITS = 19
_FRACTION_DIGITS = 17
# A double tells all numbers of so many digits apart, so that a bound holds after parsing too.
_EXACT_DIGITS = 15
LONGEST_BOUND = 40

_DIGIT = Chars(DIGITS)
_ZERO = Chars(((0x30, 0x30),))
_MINUS = Chars(((0x2D, 0x2D),))
_POINT = Chars(((0x2E, 0x2E),))
_NONZERO = Chars(((0x31, 0x39),))


def _digit(low: int, high: int) -> Chars:
    return Chars(((0x30 + low, 0x30 + high),))


def _either(options: list[Node]) -> Node:
    return options[0] if len(options) == 1 else Alt(tuple(options))


def _maybe(node: Node) -> Node:
    return Repeat(node, 0, 1)


_NATURAL = Alt((_ZERO, Seq((_NONZERO, Repeat(_DIGIT, 0, _INTEGER_DIGITS - 1)))))
_E = Chars(((0x45, 0x45), (0x65, 0x65)))
_SIGN = Chars(((0x2B, 0x2B), (0x2D, 0x2D)))

INTEGER: Node = Seq((_maybe(_MINUS), _NATURAL))
# Two digits of exponent keep it finite.
NUMBER: Node = Seq(
    (
        INTEGER,
        _maybe(Seq((_POINT, Repeat(_DIGIT, 1, _FRACTION_DIGITS)))),
        _maybe(Seq((_E, _maybe(_SIGN), Repeat(_DIGIT, 1, 2)))),
    )
)


def integers(low: int | None, high: int | None) -> Node | None:
    """Return the pattern of the integers from `low` to `high`; None where there are none."""
    if low is None and high is None:
        return INTEGER
    options: list[Node] = []
    if high is None or high >= 0:
        options += _naturals(max(low or 0, 0), high)
    if low is None or low < 0:
        first = 1 if high is None or high >= 0 else -high
        below = _naturals(first, None if low is None else -low)
        options += [Seq((_MINUS, _either(below)))] if below else []
    return _either(options) if options else None


def numbers(
    low: Decimal | None, low_excluded: bool, high: Decimal | None, high_excluded: bool
) -> Node | None:
    """Return the pattern of the numbers between two bounds, without exponents; None for none."""
    if low is None and high is None:
        return NUMBER
    options: list[Node] = []
    zero = Decimal(0)
    if high is None or high > 0 or (high == 0 and not high_excluded):
        bound = (low, low_excluded) if low is not None and low >= 0 else (zero, False)
        options += _decimals(*bound, high, high_excluded)
    if low is None or low < 0:
        bound = (-high, high_excluded) if high is not None and high < 0 else (zero, True)
        below = _decimals(*bound, None if low is None else -low, low_excluded)
        options += [Seq((_MINUS, _either(below)))] if below else []
    return _either(options) if options else None


def _naturals(low: int, high: int | None) -> list[Node]:
    """Return patterns of the integers from `low`, which is not negative, to `high`."""
    if high is None:
        high = 10 ** max(_INTEGER_DIGITS, len(str(low)) + 1) - 1
    options: list[Node] = []
    full: list[int] = []  # lengths of which all numbers are in the range
    for n in range(len(str(low)), len(str(high)) + 1):
        first = max(low, 10 ** (n - 1) if n > 1 else 0)
        last = min(high, 10**n - 1)
        if n > 1 and (first, last) == (10 ** (n - 1), 10**n - 1):
            full.append(n)
        elif first <= last:
            options.append(_same_length(str(first), str(last)))
    if full:
        options.append(Seq((_NONZERO, Repeat(_DIGIT, full[0] - 1, full[-1] - 1))))
    return options


def _same_length(low: str, high: str) -> Node:
    """Return the pattern of the digits from `low` to `high`."""
    n = len(low)
    if not n:
        return EMPTY
    if not low.strip("0") and not high.strip("9"):
        return Repeat(_DIGIT, n, n)
    first, last = int(low[0]), int(high[0])
    if first == last:
        return Seq((_digit(first, first), _same_length(low[1:], high[1:])))
    options: list[Node] = []
    if low[1:].strip("0"):
        options.append(Seq((_digit(first, first), _same_length(low[1:], "9" * (n - 1)))))
        first += 1
    if high[1:].strip("9"):
        options.append(Seq((_digit(last, last), _same_length("0" * (n - 1), high[1:]))))
        last -= 1
    if first <= last:
        options.append(Seq((_digit(first, last), Repeat(_DIGIT, n - 1, n - 1))))
    return _either(options)


def _decimals(
    low: Decimal, low_excluded: bool, high: Decimal | None, high_excluded: bool
) -> list[Node]:
    """Return patterns of the numbers from `low`, which is not negative, to `high`."""
    if high is not None and (low > high or (low == high and (low_excluded or high_excluded))):
        return []
    low_whole, low_rest = _split(low)
    high_whole, high_rest = (None, "") if high is None else _split(high)
    n_whole = len(str(low_whole if high_whole is None else high_whole))
    n = max(_EXACT_DIGITS - n_whole, len(low_rest), len(high_rest))
    if high_whole is not None and low_whole == high_whole:
        return _with_rest(
            integers(low_whole, low_whole), low_rest, low_excluded, high_rest, high_excluded, n
        )
    options = _with_rest(integers(low_whole, low_whole), low_rest, low_excluded, None, False, n)
    last = None if high_whole is None else high_whole - 1
    if last is None or low_whole < last:
        options += _with_rest(integers(low_whole + 1, last), None, False, None, False, n)
    if high_whole is not None:
        end = integers(high_whole, high_whole)
        options += _with_rest(end, None, False, high_rest, high_excluded, n)
    return options


def _split(value: Decimal) -> tuple[int, str]:
    whole, _, rest = f"{value:f}".partition(".")
    return int(whole), rest.rstrip("0")


def _with_rest(
    whole: Node | None,
    low: str | None,
    low_excluded: bool,
    high: str | None,
    high_excluded: bool,
    n: int,
) -> list[Node]:
    """Return a whole part and a fraction in the range, which may be missing where that is 0."""
    if whole is None:
        return []
    may_be_missing, digits = _fraction(low, low_excluded, high, high_excluded, n)
    if digits is None:
        return [whole] if may_be_missing else []
    rest = Seq((_POINT, digits))
    return [Seq((whole, _maybe(rest) if may_be_missing else rest))]


def _fraction(
    low: str | None, low_excluded: bool, high: str | None, high_excluded: bool, n: int
) -> tuple[bool, Node | None]:
    """Return whether no digits at all are in a range of fractions, and the pattern of some.

    Bounds are their digits without zeros at the end, or None; at most `n` digits are written.
    """
    if low == "" and not low_excluded:
        low = None
    empty = low is None and (high is None or high != "" or not high_excluded)
    if low is None and high is None:
        return True, Repeat(_DIGIT, 1, n) if n else None
    if not n:
        return empty, None
    first = -1 if low is None else int(low[:1] or 0)
    last = 10 if high is None else int(high[:1] or 0)
    options: list[Node] = []
    if first + 1 <= last - 1:
        options.append(Seq((_digit(first + 1, last - 1), Repeat(_DIGIT, 0, n - 1))))
    edges: list[tuple[int, tuple[bool, Node | None]]] = []
    if first == last:
        assert low is not None
        assert high is not None
        edges.append((first, _fraction(low[1:], low_excluded, high[1:], high_excluded, n - 1)))
    elif first < last:
        if low is not None:
            edges.append((first, _fraction(low[1:], low_excluded, None, False, n - 1)))
        if high is not None:
            edges.append((last, _fraction(None, False, high[1:], high_excluded, n - 1)))
    for digit, (may_be_missing, rest) in edges:
        head = _digit(digit, digit)
        if rest is not None:
            options.append(Seq((head, _maybe(rest) if may_be_missing else rest)))
        elif may_be_missing:
            options.append(head)
    return empty, _either(options) if options else None
