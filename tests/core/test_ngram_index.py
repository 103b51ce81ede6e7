"""NgramIndex: what a plain search of the whole sequence finds, whatever the text; bounded work."""

from __future__ import annotations

import copy
import pickle
from collections import Counter
from collections.abc import Sequence
from typing import Any

import numpy as np
import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st

from llama_crab import _core, errors

MAX_AGREEMENT = 32
MAX_WALK = 16


def agreement(tokens: Sequence[int], place: int) -> int:
    n = len(tokens)
    same = 0
    while same < min(place, MAX_AGREEMENT) and tokens[place - 1 - same] == tokens[n - 1 - same]:
        same += 1
    return same


def orders(low: int, high: int) -> list[int]:
    """Return the orders that are keys: the doubles of the lowest, and the highest."""
    found = []
    while low < high:
        found.append(low)
        low *= 2
    return [*found, high]


def search(tokens: Sequence[int], low: int, high: int, n_max: int) -> tuple[list[int], int]:
    """Do what `draft` promises by looking at every place."""
    n = len(tokens)
    for order in reversed(orders(low, high)):
        if n < order:
            continue
        end = list(tokens[n - order :])
        same_end = (
            place
            for place in range(n - 1, order - 1, -1)
            if list(tokens[place - order : place]) == end
        )
        latest = [place for _, place in zip(range(MAX_WALK), same_end, strict=False)]
        if not latest:
            continue
        longest = max(agreement(tokens, place) for place in latest)
        best = [place for place in latest if agreement(tokens, place) == longest]
        counts = Counter(tokens[place] for place in best)
        place = max(best, key=lambda place: (counts[tokens[place]], place))
        known = list(tokens)
        for i in range(n_max):
            known.append(known[place + i])
        return known[n:], longest
    return [], 0


@st.composite
def sequences(draw: st.DrawFn) -> list[int]:
    """Random tokens, in which pieces of what came before are repeated."""
    n_vocab = draw(st.integers(1, 5) | st.just(60_000))
    tokens = draw(st.lists(st.integers(0, n_vocab - 1), max_size=40))
    for _ in range(draw(st.integers(0, 6))):
        if tokens:
            begin = draw(st.integers(0, len(tokens) - 1))
            tokens += tokens[begin : begin + draw(st.integers(1, 50))]
        tokens += draw(st.lists(st.integers(0, n_vocab - 1), max_size=3))
    return tokens


@st.composite
def limits(draw: st.DrawFn) -> tuple[int, int]:
    low = draw(st.integers(1, 16))
    return low, draw(st.integers(low, 16))


@given(tokens=sequences(), limits=limits() | st.just((1, 2)), n_max=st.integers(1, 20))
@example(tokens=[7] * 100, limits=(1, 2), n_max=8)
@example(tokens=[1, 2, 3, 1, 2, 4, 1, 2, 4, 1, 2, 3, 1, 2], limits=(1, 2), n_max=1)
@settings(max_examples=400, deadline=None)
def test_draft_is_what_a_search_finds(
    tokens: list[int], limits: tuple[int, int], n_max: int
) -> None:
    """After every token, whether they came one at a time or together."""
    index = _core.NgramIndex(*limits)
    for n in range(1, len(tokens) + 1):
        index.extend(tokens[:n])
        assert index.draft(tokens[:n], n_max) == search(tokens[:n], *limits, n_max)
    at_once = _core.NgramIndex(*limits)
    at_once.extend(tokens)
    assert len(at_once) == len(tokens)
    assert at_once.draft(tokens, n_max) == search(tokens, *limits, n_max)


@given(tokens=sequences(), more=sequences(), other=sequences())
@settings(max_examples=100, deadline=None)
def test_a_copy_goes_on_by_itself(tokens: list[int], more: list[int], other: list[int]) -> None:
    index = _core.NgramIndex(1, 4)
    index.extend(tokens)
    copied = copy.copy(index)
    index.extend(tokens + other)
    copied.extend(tokens + more)
    assert copied.draft(tokens + more, 8) == search(tokens + more, 1, 4, 8)
    assert index.draft(tokens + other, 8) == search(tokens + other, 1, 4, 8)
    del index
    assert copied.draft(tokens + more, 8) == search(tokens + more, 1, 4, 8)


def test_the_most_frequent_continuation_then_the_latest() -> None:
    def first(tokens: list[int]) -> list[int]:
        index = _core.NgramIndex(2, 2)
        index.extend(tokens)
        return index.draft(tokens, 1)[0]

    assert first([9, 1, 2, 5, 8, 1, 2, 5, 7, 1, 2, 6, 4, 1, 2]) == [5]
    assert first([9, 1, 2, 5, 8, 1, 2, 6, 4, 1, 2]) == [6]
    # A longer agreement counts for more than any frequency.
    assert first([3, 9, 1, 2, 4, 8, 1, 2, 5, 7, 1, 2, 5, 6, 9, 1, 2]) == [4]


def test_a_draft_runs_over_the_end_into_itself() -> None:
    tokens = [1, 2, 3, 1, 2, 3, 1]
    index = _core.NgramIndex(1, 2)
    index.extend(tokens)
    assert index.draft(tokens, 7) == ([2, 3, 1, 2, 3, 1, 2], 4)


def test_ids_that_are_no_tokens_are_not_drafted() -> None:
    tokens = [1, 2, -1, 5, 1, 2]
    index = _core.NgramIndex(2, 2)
    index.extend(tokens)
    assert index.draft(tokens, 4) == ([], 0)
    tokens = [1, 2, 3, -1, 5, 1, 2]
    index = _core.NgramIndex(2, 2)
    index.extend(tokens)
    assert index.draft(tokens, 4) == ([3], 2)


def de_bruijn(n_symbols: int, order: int) -> list[int]:
    """Return a sequence in which each n-gram occurs once (Lyndon words)."""
    found: list[int] = []
    word = [-1]
    while word:
        word[-1] += 1
        if order % len(word) == 0:
            found += word
        word = (word * order)[:order]
        while word and word[-1] == n_symbols - 1:
            word.pop()
    return found


def fibonacci(n: int) -> list[int]:
    """Return the word with the most repetitions that are none of one period."""
    a, b = [0], [0, 1]
    while len(b) < n:
        a, b = b, b + a
    return b[:n]


ADVERSARIAL = {
    "one token": [5] * 100_000,
    "one token, then another": [5] * 50_000 + [6] + [5] * 50_000,
    "two tokens": [5, 6] * 50_000,
    "each n-gram once": de_bruijn(2, 16),
    "fibonacci": fibonacci(100_000),
    "all different": list(range(100_000)),
    "ever longer runs": [t for n in range(400) for t in [1] * n + [2]],
}


@pytest.mark.parametrize("kind", ADVERSARIAL)
def test_adversarial_texts_are_right_and_take_the_time_of_others(kind: str) -> None:
    """A walk that grew with the text would take minutes here, not half a second."""
    tokens = np.array(ADVERSARIAL[kind], np.int32)
    index = _core.NgramIndex(1, 16)
    times = _core.time_ngram_index(index, tokens, 32, 0)
    assert len(times) == len(index) == len(tokens)
    assert index.draft(tokens, 32) == search(tokens.tolist(), 1, 16, 32)
    # 4 bytes for each of 5 chains, with growth; a table at most half full, doubled when it is.
    assert index.n_bytes <= len(tokens) * 5 * (8 + 32) + 4096


def test_ids_chosen_to_collide_make_it_forget_and_not_slow() -> None:
    """The hash is public, so somebody may fill a run of the table; then n-grams are forgotten."""

    def slot(token: int) -> int:
        mask = (1 << 64) - 1
        value = (token * 0x9E3779B97F4A7C15) & mask
        value ^= value >> 29
        value = (value + 1) & mask
        value ^= value >> 32
        return ((value * 0xD6E8FEB86659FD93) & mask) >> 32

    colliding = [token for token in range(200_000) if slot(token) & 1023 < 2][:200]
    tokens = [*colliding, colliding[-1]]
    index = _core.NgramIndex(1, 1)
    index.extend(tokens)
    # The probes end after 32 entries, so the earliest of these are found, the last took its place.
    assert index.draft(tokens, 1) == ([colliding[-1]], 1)
    found = 0
    for token in colliding[:-1]:
        copied = copy.copy(index)
        copied.extend([*tokens, token])
        found += copied.draft([*tokens, token], 1)[1] > 0
    assert 20 < found < len(colliding) - 20


@pytest.mark.parametrize(
    ("low", "high", "error"),
    [
        (0, 2, ValueError),
        (-1, 2, ValueError),
        (3, 2, ValueError),
        (1, 17, ValueError),
        (17, 17, ValueError),
        (1 << 70, 2, ValueError),
        (1.5, 2, TypeError),
        (1, None, TypeError),
    ],
)
def test_impossible_orders_are_refused(low: Any, high: Any, error: type[Exception]) -> None:
    with pytest.raises(error):
        _core.NgramIndex(low, high)


def test_impossible_calls_are_refused() -> None:
    index = _core.NgramIndex(1, 2)
    assert index.draft([], 4) == ([], 0)
    index.extend([1, 2, 1])
    for n_max in (-1, 65_537, 1 << 40):
        with pytest.raises(ValueError, match="n_max"):
            index.draft([1, 2, 1], n_max)
    assert index.draft([1, 2, 1], 0) == ([], 0)
    assert len(index.draft([1, 2, 1], 65_536)[0]) == 65_536
    with pytest.raises(ValueError, match="only grows"):
        index.extend([1, 2])
    with pytest.raises(ValueError, match=r"2 tokens, but extend\(\) was given 3"):
        index.draft([1, 2], 4)
    with pytest.raises(errors.InvalidTokenError):
        index.extend([1, 2, 1, 1 << 31])
    with pytest.raises(TypeError):
        index.extend(["1"])
    assert len(index) == 3
    with pytest.raises(TypeError, match="pickled"):
        pickle.dumps(index)
    with pytest.raises(ValueError, match="evict_bytes"):
        _core.time_ngram_index(index, [1, 2, 1], 4, -1)


def test_other_tokens_than_those_taken_in_are_read_within_bounds() -> None:
    """Wrong use gives a poor draft at worst."""
    index = _core.NgramIndex(1, 4)
    index.extend([1, 2, 3] * 20)
    drafted, agreed = index.draft([9] * 60, 8)
    assert agreed in range(33)
    assert set(drafted) <= {9}
