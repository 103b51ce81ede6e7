"""What the core counts per token and per batch, against sums made beside it."""

from __future__ import annotations

import time

import numpy as np
import pytest
from engine_requests import MakeScheduler, ask, finish, run

from llama_crab import _core
from llama_crab.perf import Latencies, PerfMeter

# Half a bucket of 1/32 of its lower end.
BOUND = 1 / 64
QS = (0, 1, 50, 90, 99, 99.9, 100)


@pytest.mark.parametrize("kind", ["lognormal", "bimodal", "short", "one", "equal"])
def test_percentiles_agree_with_numpy_within_half_a_bucket(kind: str) -> None:
    rng = np.random.default_rng(7)
    times = {
        "lognormal": rng.lognormal(9.0, 2.0, 20_011),
        "bimodal": np.concatenate([rng.normal(3e3, 50, 9_007), rng.normal(4e6, 9e5, 1_000)]),
        "short": rng.uniform(0, 70, 5_003),
        "one": np.array([12_345.0]),
        "equal": np.full(1_003, 777.0),
    }[kind].astype(np.int64)
    histogram = _core.LatencyHistogram()
    for us in times.tolist():
        histogram.record(us)
    found = Latencies.from_counts(histogram.counts())
    assert found.n == len(times)
    for q in QS:
        expected = float(np.percentile(times, q, method="inverted_cdf")) / 1e6
        assert found.percentile(q) == pytest.approx(expected, rel=BOUND, abs=0.5e-6), q
    assert found.max == pytest.approx(times.max() / 1e6, rel=BOUND)
    assert found.mean == pytest.approx(times.mean() / 1e6, rel=BOUND)


def test_every_bucket_is_where_its_middle_says() -> None:
    """No value, from none to beyond the last bucket, is off by more than the bound."""
    values = [0, 1, 63, 64, 65, 127, 128, *(2**k + d for k in range(7, 40) for d in (-1, 0, 1))]
    for us in values:
        histogram = _core.LatencyHistogram()
        histogram.record(us)
        assert Latencies.from_counts(histogram.counts()).p50 == pytest.approx(
            us / 1e6, rel=BOUND, abs=0.1e-9
        )
    histogram = _core.LatencyHistogram()
    for us in (-5, 2**62):
        histogram.record(us)
    counts = histogram.counts()
    assert (counts[0], counts[-1], sum(counts), len(counts)) == (1, 1, 2, 1152)


def test_counters_stay_readable_behind_their_stepper(make: MakeScheduler) -> None:
    scheduler = make()
    run(scheduler, ask(20, 5))
    counters = scheduler.stepper.counters
    before = counters.read()
    scheduler.close()
    assert counters.read() == before
    assert before[3] == 5
    assert Latencies.from_counts(counters.inter_token.counts()).n == 4
    assert set(_core.StepCounters().read()) == {0}  # one of its own


def test_no_times_give_zeros_and_a_wrong_percentage_an_error() -> None:
    assert set(Latencies().to_dict().values()) == {0}
    with pytest.raises(ValueError, match="q: 101"):
        Latencies().percentile(101)


def test_counters_are_the_sums_over_requests(make: MakeScheduler) -> None:
    scheduler = make(n_seq_max=4, n_ctx=2048, kv_unified=True)
    counters, stepper = scheduler.stepper.counters, scheduler.stepper
    first, second = ask(40, 9), ask(33, 7, seed=1, n=2, best_of=3)
    run(scheduler, first, second)
    n_steps, n_decoded, n_prefilled, n_generated, decode_us, prefill_us, *_ = counters.read()
    assert (n_steps, n_decoded, decode_us) == (
        stepper.n_steps,
        stepper.n_decoded,
        stepper.decode_us,
    )
    assert n_prefilled == 40 + 33
    assert n_generated == 9 + 3 * 7
    assert n_decoded == n_prefilled + 8 + 3 * 6
    assert 0 < prefill_us < decode_us
    assert Latencies.from_counts(counters.first_token.counts()).n == 2
    assert Latencies.from_counts(counters.inter_token.counts()).n == 8 + 3 * 6


def test_the_times_of_a_sequence_add_up_to_its_decode_loop(make: MakeScheduler) -> None:
    """Its gaps sum up to last minus first token; what it waited for the first is one time."""
    scheduler = make()
    request = ask(40, 40)
    request.submit_us = _core.time_us() - 3_000_000
    run(scheduler, request)
    perf = PerfMeter(scheduler.stepper.counters, scheduler.tally)
    assert perf.perf.inter_token.n == 0  # it began behind them
    counters, timings = scheduler.stepper.counters, request.timings()
    gaps = Latencies.from_counts(counters.inter_token.counts())
    assert gaps.mean * gaps.n == pytest.approx(timings.predicted_sec, rel=BOUND)
    waited = Latencies.from_counts(counters.first_token.counts())
    assert waited.p50 == pytest.approx(timings.first_token_sec, rel=BOUND)
    assert waited.p50 > 3.0 * (1 - BOUND)


def test_a_pause_for_a_slow_reader_is_no_time_between_tokens(make: MakeScheduler) -> None:
    scheduler = make()
    request = ask(20, 12, stream=True, n_news_max=4)
    scheduler.submit(request)
    while not request.done:
        scheduler.step()
        if request.sequences[0] in scheduler._held:
            time.sleep(0.3)
            request.news.clear()
            scheduler.unhold(request)
    gaps = Latencies.from_counts(scheduler.stepper.counters.inter_token.counts())
    n_held = (12 - 1) // 4
    assert gaps.n == 11 - n_held
    assert request.timings().predicted_sec > 0.3 * n_held
    assert gaps.mean * gaps.n < request.timings().predicted_sec - 0.3 * n_held + 0.01


def test_tokens_of_a_stop_string_are_generated_and_left_out(make: MakeScheduler) -> None:
    scheduler = make()
    whole = ask(20, 30)
    run(scheduler, whole)
    text = whole.sequences[0].text
    meter = PerfMeter(scheduler.stepper.counters, scheduler.tally)
    cut = ask(20, 30, stop=(text[10:20],))
    run(scheduler, cut)
    perf = meter.perf
    assert cut.sequences[0].finish_reason == "stop"
    assert scheduler.tally.n_cut > 0
    assert perf.predicted_n == len(cut.sequences[0].tokens) == cut.usage().completion_tokens


def test_what_was_suspended_is_counted_once_as_generated(make: MakeScheduler) -> None:
    scheduler = make()
    low, high = ask(30, 20), ask(25, 10, seed=1, priority=1)
    scheduler.submit(low)
    for _ in range(6):
        scheduler.step()
    scheduler.submit(high)
    finish(scheduler, low, high)
    assert scheduler.n_suspended == 1
    assert scheduler.stepper.counters.read()[3] == 30
    assert Latencies.from_counts(scheduler.stepper.counters.inter_token.counts()).n == 19 + 9
