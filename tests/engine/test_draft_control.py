"""The lengths of drafts on simulated machines and texts: what is promised holds before any clock.

A machine is a curve (microseconds of a batch by its tokens) with noise; a text says how often a
token with some agreement before it holds. Three of the curves were measured: SmolLM2 in Q4_1 on two
cores, a model of 8B's shape and SmolLM2 on an H100.
"""

from __future__ import annotations

import math
import random
from collections.abc import Callable
from typing import Any

import pytest

from llama_crab import _core

CURVES: dict[str, dict[int, float]] = {
    "two-cores": {1: 12843, 2: 20165, 3: 29778, 4: 34428, 6: 51115, 8: 62962, 16: 121436},
    "h100-8b": {1: 4547, 2: 4935, 3: 5359, 4: 6130, 6: 7297, 8: 8581, 10: 8954, 32: 10816},
    "h100-small": {1: 3915, 2: 4638, 8: 4675, 10: 6138, 32: 6418},
    "stairs": {1: 6000, 2: 12000, 6: 12500, 7: 20000, 12: 21000, 13: 32000, 33: 60000},
}
TEXTS: dict[str, Callable[[int], float]] = {
    "copy": lambda agreed: 0.35 if agreed < 2 else 0.75 if agreed < 4 else 0.96,
    "lists": lambda agreed: 0.3 if agreed < 2 else 0.6 if agreed < 4 else 0.8,
    "creative": lambda agreed: 0.12 if agreed < 2 else 0.25 if agreed < 4 else 0.4,
}
LENGTHS = (1, 2, 3, 4, 6, 8, 12, 16, 24, 32)
N_WARM = 300


def cost(curve: dict[int, float], n: int) -> float:
    if n in curve:
        return curve[n]
    low = max(k for k in curve if k < n)
    if n > max(curve):
        return curve[low] * n / low
    high = min(k for k in curve if k > n)
    return curve[low] + (curve[high] - curve[low]) * (n - low) / (high - low)


def micro_batches(layout: list[int]) -> list[int]:
    """Return the sizes of llama.cpp's micro-batches when each sequence has a stream of its own."""
    left, sizes = list(layout), []
    while any(left):
        first = next(i for i, n in enumerate(left) if n)
        end = first
        while end < len(left) and left[end]:
            end += 1
        n = min(left[first:end])
        left[first:end] = [each - n for each in left[first:end]]
        sizes.append(n * (end - first))
    return sizes


def rate(
    curve: str, text: str, length: int | None, *, n_slots: int, split: bool, noise: float, seed: int
) -> float:
    """Return tokens per second; `length` of all drafts, None to have them chosen."""
    rng = random.Random(seed)
    holds = TEXTS[text]
    control = _core.DraftControl(n_slots, split=split)

    def restart() -> int:
        return rng.choices([0, 1, 2, 3], [0.3, 0.4, 0.2, 0.1])[0]

    agreed = [restart() for _ in range(n_slots)]
    n_tokens, n_counted, counted_us = 0, 0, 0.0
    while n_counted < 1500 * n_slots:
        offers: list[Any] = [
            (s, "lookup", agreed[s], 32, False) for s in range(n_slots) if agreed[s]
        ]
        lengths = [length] * len(offers)
        if length is None:
            lengths = control.choose([1] * n_slots, offers, 64)
        layout = [1] * n_slots
        for offer, n in zip(offers, lengths, strict=True):
            layout[offer[0]] += n
        sizes = micro_batches(layout) if split else [sum(layout)]
        us = sum(cost(CURVES[curve], n) for n in sizes) * math.exp(rng.gauss(0, noise))
        given = n_slots
        for s in range(n_slots):
            before, held = agreed[s], 0
            while held < layout[s] - 1 and rng.random() < holds(before + held):
                control.observe_token(s, "lookup", before + held, True)
                held += 1
            given += held
            if held < layout[s] - 1:
                control.observe_token(s, "lookup", before + held, False)
                agreed[s] = restart()
            else:
                goes_on = before > 0 and rng.random() < holds(before + held)
                if before > 0 and layout[s] == 1:
                    control.observe_token(s, "lookup", before, goes_on)
                agreed[s] = before + held + 1 if goes_on else restart()
        control.observe_batch(layout, sum(layout) - n_slots, n_slots, given, int(us))
        n_tokens += given
        if n_tokens > N_WARM * n_slots:
            n_counted += given
            counted_us += us
    return 1e6 * n_counted / counted_us


LOADS = [(1, False), (4, False), (4, True), (16, False)]


@pytest.mark.parametrize(("noise", "least"), [(0.03, 0.98), (0.25, 0.95)])
@pytest.mark.parametrize(("n_slots", "split"), LOADS)
@pytest.mark.parametrize("curve", CURVES)
def test_never_slower_than_plain(
    curve: str, n_slots: int, split: bool, noise: float, least: float
) -> None:
    for text in TEXTS:
        rates: dict[int | None, float] = {}
        for length in (None, 0):
            runs = [
                rate(curve, text, length, n_slots=n_slots, split=split, noise=noise, seed=seed)
                for seed in (1, 2)
            ]
            rates[length] = sum(runs) / 2
        assert rates[None] > least * rates[0], text


@pytest.mark.parametrize("curve", CURVES)
@pytest.mark.parametrize("text", ["copy", "lists"])
def test_as_good_as_the_best_length(curve: str, text: str) -> None:
    fixed: dict[str, Any] = {"n_slots": 1, "split": False, "noise": 0.05, "seed": 3}
    best = max(rate(curve, text, length, **fixed) for length in (0, *LENGTHS))
    assert rate(curve, text, None, **fixed) > 0.97 * best


def test_a_changed_text_is_noticed() -> None:
    """After a long copy, text that is never repeated: drafts end within a few batches."""
    control = _core.DraftControl(1)
    curve = CURVES["two-cores"]

    def batch(holds: bool) -> int:
        (n,) = control.choose([1], [(0, "lookup", 8, 32, False)], 64)
        for k in range(n if holds else min(n, 1)):
            control.observe_token(0, "lookup", 8 + k, holds)
        if n == 0:
            control.observe_token(0, "lookup", 8, holds)
        control.observe_batch([1 + n], n, 1, 1 + n * holds, int(cost(curve, 1 + n)))
        return n

    for _ in range(3):
        assert batch(False) == 0  # nothing is known of this machine yet
    copied = [batch(True) for _ in range(120)]
    assert sum(n > 0 for n in copied[60:]) > 50
    other = [batch(False) for _ in range(60)]
    assert not any(other[30:])


def test_trials_stay_within_their_allowance() -> None:
    """A machine where each token of a batch costs as much as a batch: nothing can be gained."""
    control = _core.DraftControl(1)
    spent = needed = 0.0
    for _ in range(2000):
        (n,) = control.choose([1], [(0, "lookup", 20, 32, False)], 64)
        for k in range(n):
            control.observe_token(0, "lookup", 20 + k, True)
        us = 1000 * (1 + n)
        control.observe_batch([1 + n], n, 1, 1 + n, us)
        spent += us
        needed += 1000 * (1 + n)
    assert spent == needed  # all were right, so this costs nothing
    expected, measured = control.gains
    assert 0.9 < measured < 1.1
    assert math.isfinite(expected)


def test_wrong_values_are_refused() -> None:
    with pytest.raises(ValueError, match="n_slots=0"):
        _core.DraftControl(0)
    control = _core.DraftControl(2)
    with pytest.raises(ValueError, match="3 slots instead of 2"):
        control.choose([1, 1, 1], [], 8)
    with pytest.raises(IndexError):
        control.choose([1, 1], [(2, "lookup", 1, 4, False)], 8)
    with pytest.raises(ValueError, match="origin 'oracle'"):
        control.choose([1, 1], [(0, "oracle", 1, 4, False)], 8)  # type: ignore[list-item]
    with pytest.raises(ValueError, match="n_max=0"):
        _core.Speculation(0)
    with pytest.raises(ValueError, match="max_ngram=17"):
        _core.Speculation(8, min_ngram=1, max_ngram=17)
