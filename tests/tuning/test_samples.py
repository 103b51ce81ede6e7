"""Medians, spreads, and when two measurements count as different."""

from __future__ import annotations

import math
import random
import statistics

import pytest

from llama_crab.tuning.samples import Samples, compare


def test_the_median_and_the_robust_spread() -> None:
    samples = Samples((10.0, 11.0, 12.0, 13.0, 14.0, 15.0, 1000.0))
    assert samples.n == 7
    assert samples.median == 13.0
    # |x - 13| = 3 2 1 0 1 2 987: their median is 2.
    assert samples.spread == pytest.approx(1.4826 * 2.0)


def test_the_spread_of_few_values_is_half_their_range() -> None:
    assert Samples((10.0, 10.1, 14.0)).spread == pytest.approx(2.0)
    assert Samples((10.0,)).spread == 0.0


@pytest.mark.parametrize("values", [(), (0.0,), (-1.0,), (math.nan,), (1.0, math.inf)])
def test_what_was_not_measured_is_refused(values: tuple[float, ...]) -> None:
    with pytest.raises(ValueError, match="values"):
        Samples(values)


def test_a_clear_difference_is_told_with_its_direction() -> None:
    slow, fast = (
        Samples((100.0, 101.0, 99.0, 100.5, 99.5)),
        Samples((120.0, 121.0, 119.0, 122.0, 118.0)),
    )
    assert compare(slow, fast).verdict == "faster"
    assert compare(slow, fast).ratio == pytest.approx(1.2, rel=0.02)
    assert compare(fast, slow).verdict == "slower"
    seconds = Samples((2.0, 2.02, 1.98), "seconds"), Samples((1.0, 1.01, 0.99), "seconds")
    assert compare(*seconds).verdict == "faster"
    assert compare(*seconds).ratio == pytest.approx(2.0)


def test_what_slows_a_whole_round_cancels_out() -> None:
    """The machine halves its speed in some rounds: unpaired that hides 10 %, paired it does not."""
    weather = (1.0, 0.5, 0.9, 0.55, 1.0, 0.6)
    before = Samples(tuple(100.0 * w for w in weather))
    after = Samples(
        tuple(110.0 * w * jitter for w, jitter in zip(weather, (1, 1.01, 0.99) * 2, strict=True))
    )
    assert compare(before, after).verdict == "faster"
    assert compare(before, after, paired=False).verdict == "same"


def test_a_difference_within_the_spread_is_none() -> None:
    before, after = Samples((100.0, 90.0, 110.0, 95.0)), Samples((103.0, 95.0, 104.0, 105.0))
    assert compare(before, after).verdict == "same"
    assert "same" in str(compare(before, after))


@pytest.mark.parametrize("n", [1, 2])
def test_one_or_two_rounds_cannot_tell(n: int) -> None:
    comparison = compare(Samples((1.0,) * n), Samples((9.0,) * n))
    assert comparison.ratio == pytest.approx(9.0)
    assert comparison.verdict == "same"
    assert "?" in str(comparison)


def test_kinds_do_not_mix() -> None:
    with pytest.raises(ValueError, match="kind"):
        compare(Samples((1.0,)), Samples((1.0,), "seconds"))


NOISES = {
    "normal": lambda draw: draw.lognormvariate(0.0, 0.05),
    "bursts": lambda draw: draw.lognormvariate(0.0, 0.03) / draw.choice((*(1.0,) * 9, 1.6)),
    # A machine that is slow for a while: two peaks, between which a median jumps.
    "two speeds": lambda draw: draw.choice((1.0, 0.8)) * draw.lognormvariate(0.0, 0.01),
    "mostly one speed": lambda draw: draw.choice((1.0, 1.0, 0.8)) * draw.lognormvariate(0.0, 0.01),
}


@pytest.mark.parametrize("n", [3, 4, 5, 6, 7, 9, 12, 20])
@pytest.mark.parametrize("paired", [True, False])
@pytest.mark.parametrize("noise", NOISES)
def test_equal_things_are_seldom_called_different(n: int, paired: bool, noise: str) -> None:
    draw = random.Random(n)
    n_wrong = 0
    for _ in range(2000):
        one, two = (Samples(tuple(NOISES[noise](draw) for _ in range(n))) for _ in range(2))
        n_wrong += compare(one, two, paired=paired).verdict != "same"
    assert n_wrong / 2000 < (0.11 if n < 5 else 0.05)


def test_many_rounds_have_an_interval_too() -> None:
    draw = random.Random(0)
    one = Samples(tuple(draw.lognormvariate(0.0, 0.05) for _ in range(20_000)))
    assert compare(one, one, paired=False).verdict == "same"
    assert 0.07 < compare(one, one, paired=False).uncertainty < 0.15


def test_a_difference_of_twice_the_noise_is_mostly_found() -> None:
    draw = random.Random(1)
    found = []
    for _ in range(1000):
        one = Samples(tuple(100.0 * draw.lognormvariate(0.0, 0.02) for _ in range(7)))
        two = Samples(tuple(108.0 * draw.lognormvariate(0.0, 0.02) for _ in range(7)))
        found.append(compare(one, two).verdict == "faster")
    assert statistics.mean(found) > 0.8
