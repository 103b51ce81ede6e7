"""Sampler: every constructor against its formula in numpy; chains; grammars; refusals."""

from __future__ import annotations

import pickle
from collections import Counter
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest

from llama_crab import _core, errors

S = _core.Sampler
LOGITS = np.array([1.0, 3.0, -2.0, 0.5, 2.5, 2.4, -1.0, 0.0], np.float32)


def softmax(x: np.ndarray) -> np.ndarray:
    e = np.exp(x.astype(np.float64) - x.max())
    probabilities: np.ndarray = e / e.sum()
    return probabilities


def kept(sampler: _core.Sampler, logits: np.ndarray = LOGITS) -> dict[int, float]:
    """Return the candidates that survive `sampler`, with their logits."""
    ids, values, _, _ = sampler.apply(logits)
    return dict(zip(ids, values, strict=True))


def test_greedy_selects_the_argmax() -> None:
    assert S.greedy().apply(LOGITS)[3] == np.argmax(LOGITS)


def test_dist_draws_with_the_softmax_probabilities() -> None:
    sampler, n = S.dist(1), 20_000
    counts = Counter(sampler.apply(LOGITS)[3] for _ in range(n))
    for token, p in enumerate(softmax(LOGITS)):
        assert abs(counts[token] - n * p) < 5 * np.sqrt(n * p * (1 - p)) + 1


def test_a_seed_repeats_and_another_differs() -> None:
    def draw(seed: int) -> list[int | None]:
        sampler = S.dist(seed)
        return [sampler.apply(LOGITS)[3] for _ in range(50)]

    assert draw(5) == draw(5)
    assert draw(5) != draw(6)
    assert S.dist(5).seed == 5
    assert S.greedy().seed is None


@pytest.mark.parametrize("k", [1, 3, 8, 100])
def test_top_k(k: int) -> None:
    assert set(kept(S.top_k(k))) == set(np.argsort(-LOGITS)[:k].tolist())


@pytest.mark.parametrize("k", [0, -1])
def test_top_k_without_a_limit_keeps_all(k: int) -> None:
    assert len(kept(S.top_k(k))) == len(LOGITS)


@pytest.mark.parametrize(("p", "min_keep"), [(0.3, 0), (0.7, 1), (0.9, 1), (0.1, 4)])
def test_top_p(p: float, min_keep: int) -> None:
    order = np.argsort(-LOGITS)
    n = int(np.searchsorted(np.cumsum(softmax(LOGITS)[order]), p)) + 1
    assert set(kept(S.top_p(p, min_keep))) == set(order[: max(n, min_keep)].tolist())


@pytest.mark.parametrize("p", [0.05, 0.3, 0.9])
def test_min_p(p: float) -> None:
    probabilities = softmax(LOGITS)
    expected = {i for i in range(8) if probabilities[i] >= p * probabilities.max()}
    assert set(kept(S.min_p(p, 1))) == expected


@pytest.mark.parametrize("p", [0.3, 0.8])
def test_typical(p: float) -> None:
    probabilities = softmax(LOGITS)
    entropy = -(probabilities * np.log(probabilities)).sum()
    order = np.argsort(np.abs(-np.log(probabilities) - entropy))
    n = int(np.searchsorted(np.cumsum(probabilities[order]), p)) + 1
    assert set(kept(S.typical(p, 1))) == set(order[:n].tolist())


def test_temp_divides_and_zero_leaves_the_best() -> None:
    found = kept(S.temp(0.5))
    np.testing.assert_allclose([found[i] for i in range(8)], LOGITS / 0.5, rtol=1e-6)
    cold = kept(S.temp(0.0))
    assert [i for i, value in cold.items() if np.isfinite(value)] == [1]


def test_temp_ext_follows_the_entropy() -> None:
    t, delta, exponent = 1.0, 0.5, 1.5
    probabilities = softmax(LOGITS)
    share = -(probabilities * np.log(probabilities)).sum() / np.log(8)
    expected = LOGITS / (t - delta + 2 * delta * share**exponent)
    found = kept(S.temp_ext(t, delta, exponent))
    np.testing.assert_allclose([found[i] for i in range(8)], expected, rtol=1e-4)


def test_xtc_takes_out_all_but_the_least_of_the_top_choices() -> None:
    threshold = 0.15
    above = [i for i in np.argsort(-softmax(LOGITS)) if softmax(LOGITS)[i] >= threshold]
    assert len(above) == 3
    assert set(kept(S.xtc(1.0, threshold, 0, 1))) == set(range(8)) - {int(i) for i in above[:-1]}
    assert set(kept(S.xtc(0.0, threshold, 0, 1))) == set(range(8))


@pytest.mark.parametrize("n", [0.5, 1.0, 2.0])
def test_top_n_sigma(n: float) -> None:
    bound = LOGITS.max() - n * LOGITS.std()
    found = {i for i, value in kept(S.top_n_sigma(n)).items() if np.isfinite(value)}
    assert found == {i for i in range(8) if LOGITS[i] >= bound}


def test_logit_bias_adds_and_bans() -> None:
    found = kept(S.logit_bias(8, {2: 5.0, 1: float("-inf")}))
    expected = LOGITS.copy()
    expected[2] += 5
    expected[1] = -np.inf
    np.testing.assert_allclose([found[i] for i in range(8)], expected)


def test_penalties_follow_the_counts_in_the_window() -> None:
    repeat, frequency, presence = 1.5, 0.25, 0.125
    sampler = S.penalties(8, 3, repeat, frequency, presence)
    for token in (7, 1, 1, 2):  # 7 has left the window of 3
        sampler.accept(token)
    expected = LOGITS.astype(np.float64)
    for token, count in ((1, 2), (2, 1)):
        value = expected[token]
        expected[token] = value / repeat if value > 0 else value * repeat
        expected[token] -= count * frequency + presence
    found = kept(sampler)
    np.testing.assert_allclose([found[i] for i in range(8)], expected, rtol=1e-5)
    sampler.reset()
    found = kept(sampler)
    np.testing.assert_allclose([found[i] for i in range(8)], LOGITS)


def test_dry_penalises_what_would_continue_a_repetition(tiny: _core.Model) -> None:
    multiplier, base, allowed = 0.8, 1.75, 2
    sampler = S.dry(tiny.vocab, multiplier, base, allowed, 64, [])
    for token in (300, 301, 302, 303, 300, 301, 302):
        sampler.accept(token)
    logits = np.zeros(tiny.vocab.n_tokens, np.float32)
    changed = {i: v for i, v in kept(sampler, logits).items() if v != 0}
    assert set(changed) == {303}
    assert changed[303] == pytest.approx(-multiplier * base ** (3 - allowed), rel=1e-5)


def test_dry_breakers_end_a_repetition(tiny: _core.Model) -> None:
    (comma,) = tiny.vocab.tokenize(",", False, False)[-1:]
    sampler = S.dry(tiny.vocab, 0.8, 1.75, 2, 64, [","])
    for token in (300, comma, 302, 303, 300, comma, 302):
        sampler.accept(token)
    logits = np.zeros(tiny.vocab.n_tokens, np.float32)
    assert all(value == 0 for value in kept(sampler, logits).values())


def test_mirostat_keeps_the_surprise_near_its_target() -> None:
    rng = np.random.default_rng(3)
    logits = (3 * rng.standard_normal(1000)).astype(np.float32)
    surprise = -np.log2(softmax(logits))
    for sampler in (S.mirostat_v2(1, 3.0, 0.1), S.mirostat(1000, 1, 3.0, 0.1, 100)):
        found = []
        for _ in range(400):
            token = sampler.apply(logits)[3]
            assert token is not None
            sampler.accept(token)
            found.append(surprise[token])
        assert np.mean(found[100:]) < np.dot(softmax(logits), surprise) + 0.5
        assert np.std(found[100:]) > 0


def test_adaptive_p_prefers_tokens_near_its_target() -> None:
    probabilities = np.array([0.6, 0.25, 0.1, 0.04, 0.01])
    logits = np.log(probabilities).astype(np.float32)

    def mean_probability(target: float) -> float:
        sampler = S.adaptive_p(target, 0.5, 1)
        found = []
        for _ in range(500):
            token = sampler.apply(logits)[3]
            assert token is not None
            sampler.accept(token)
            found.append(probabilities[token])
        return float(np.mean(found))

    assert mean_probability(0.9) > mean_probability(0.25) > mean_probability(0.02)


def test_infill_keeps_candidates_of_the_vocabulary(tiny: _core.Model) -> None:
    logits = np.array(np.random.default_rng(1).standard_normal(759), np.float32)
    found = kept(S.infill(tiny.vocab), logits)
    assert 0 < len(found) <= 759


def make_all(vocab: _core.Vocab) -> dict[str, Callable[[], _core.Sampler]]:
    n = vocab.n_tokens
    return {
        "greedy": S.greedy,
        "dist": lambda: S.dist(1),
        "top-k": lambda: S.top_k(40),
        "top-p": lambda: S.top_p(0.9, 1),
        "min-p": lambda: S.min_p(0.1, 1),
        "typical": lambda: S.typical(0.9, 1),
        "temp": lambda: S.temp(0.8),
        "temp-ext": lambda: S.temp_ext(0.8, 0.1, 1.0),
        "xtc": lambda: S.xtc(0.5, 0.1, 1, 1),
        "top-n-sigma": lambda: S.top_n_sigma(1.0),
        "mirostat": lambda: S.mirostat(n, 1, 5.0, 0.1, 100),
        "mirostat-v2": lambda: S.mirostat_v2(1, 5.0, 0.1),
        "grammar": lambda: S.grammar(vocab, 'root ::= "a"', "root"),
        "penalties": lambda: S.penalties(n, 64, 1.1, 0.0, 0.0),
        "dry": lambda: S.dry(vocab, 0.8, 1.75, 2, 64, ["\n"]),
        "adaptive-p": lambda: S.adaptive_p(0.5, 0.9, 1),
        "logit-bias": lambda: S.logit_bias(n, {1: 1.0}),
        "infill": lambda: S.infill(vocab),
    }


def test_every_sampler_of_the_c_library_has_a_constructor(tiny: _core.Model) -> None:
    made = make_all(tiny.vocab)
    static = {name for name, value in vars(S).items() if isinstance(value, staticmethod)}
    named = {name.replace("-", "_") for name in made} | {"chain", "grammar_lazy_patterns"}
    assert static == named
    for name, make in made.items():
        with make() as sampler:
            assert sampler.name.removeprefix("+").replace("_", "-") == name
            assert name in repr(sampler).replace("_", "-")


def test_every_sampler_clones_resets_and_survives_odd_rows(tiny: _core.Model) -> None:
    rows = [
        np.zeros(1, np.float32),
        np.array([1, -np.inf], np.float32),
        np.full(5, -1e30, np.float32),
        np.array(np.random.default_rng(0).standard_normal(759), np.float32),
        np.zeros(759, np.float32),
    ]
    for make in make_all(tiny.vocab).values():
        with make() as sampler, sampler.clone() as copy:
            assert copy.name == sampler.name
            for row in rows:
                assert kept(sampler, row).keys() == kept(copy, row).keys()
            sampler.reset()


def test_clones_are_independent_and_have_the_state() -> None:
    first = S.penalties(8, 8, 2.0, 0.0, 0.0)
    first.accept(1)
    second = first.clone()
    assert kept(second)[1] == kept(first)[1] == pytest.approx(1.5)
    second.accept(4)
    assert kept(second)[4] == pytest.approx(1.25)
    assert kept(first)[4] == pytest.approx(2.5)


def test_a_chain_runs_its_stages_in_order() -> None:
    with S.chain() as chain:
        for stage in (S.top_k(2), S.temp(0.5), S.greedy()):
            chain.add(stage)
        ids, values, _, selected = chain.apply(LOGITS)
        assert (ids, selected) == ([1, 4], 1)
        np.testing.assert_allclose(values, [6.0, 5.0])
        assert len(chain) == 3
        assert [chain[i].name for i in range(3)] == ["top-k", "temp", "greedy"]
        assert repr(chain) == "<Sampler chain [top-k, temp, greedy]>"
        with pytest.raises(IndexError):
            chain[3]


def test_a_chain_owns_its_stages_until_they_are_removed() -> None:
    before = _core.live_handles()["samplers"]
    chain, stage = S.chain(), S.top_k(2)
    chain.add(stage)
    assert _core.live_handles()["samplers"] == before + 1
    assert stage.name == "top-k"
    for refused in (stage.close, lambda: S.chain().add(stage), lambda: chain.add(S.chain())):
        with pytest.raises(errors.SamplerError):
            refused()
    with pytest.raises(errors.SamplerError, match="only a chain"):
        S.greedy().add(S.greedy())
    assert chain.remove(0) is stage
    assert (len(chain), len(kept(stage))) == (0, 2)
    stage.close()
    for index in (0, -1, 5):
        with pytest.raises(IndexError):
            chain.remove(index)
    kept_stage = S.greedy()
    chain.add(kept_stage)
    chain.close()
    assert kept_stage.closed
    with pytest.raises(errors.ClosedError, match="chain"):
        kept_stage.apply(LOGITS)
    assert _core.live_handles()["samplers"] == before


def test_a_cloned_chain_has_stages_of_its_own() -> None:
    chain = S.chain()
    chain.add(S.top_k(2))
    chain.add(S.greedy())
    copy = chain.clone()
    chain.close()
    assert [copy[i].name for i in range(len(copy))] == ["top-k", "greedy"]
    assert copy.apply(LOGITS)[3] == 1
    copy.remove(0).close()
    assert len(copy) == 1


def test_sampling_a_decoded_row_equals_numpy(tiny_context: _core.Context) -> None:
    with _core.Batch(4) as batch:
        batch.extend([1, 300, 301, 302], 0, 0, "all")
        tiny_context.decode(batch)
    for i in range(4):
        row = np.array(tiny_context.logits(i))
        assert S.greedy().sample(tiny_context, i) == row.argmax()
        chain = S.chain()
        chain.add(S.logit_bias(759, {int(row.argmax()): float("-inf")}))
        chain.add(S.greedy())
        assert chain.sample(tiny_context, i) == np.argsort(-row)[1]
    with pytest.raises(IndexError):
        S.greedy().sample(tiny_context, 4)


def test_sample_accepts_the_token_once(tiny_context: _core.Context) -> None:
    with _core.Batch(1) as batch:
        batch.extend([1], 0, 0, "last")
        tiny_context.decode(batch)
    row = np.array(tiny_context.logits())
    chain = S.chain()
    penalties = S.penalties(759, 8, 1.0, 1.0, 0.0)
    chain.add(penalties)
    chain.add(S.greedy())
    token = chain.sample(tiny_context)
    assert kept(penalties, row)[token] == pytest.approx(row[token] - 1.0, abs=1e-5)


def test_sampling_without_a_final_stage_is_an_error(tiny_context: _core.Context) -> None:
    with _core.Batch(1) as batch:
        batch.extend([1], 0, 0, "last")
        tiny_context.decode(batch)
    with pytest.raises(errors.SamplerError, match="final stage"):
        S.top_k(5).sample(tiny_context)
    with pytest.raises(errors.SamplerError, match="final stage"):
        S.chain().sample(tiny_context)


YES_NO = 'root ::= "yes" | "no"'


def test_a_grammar_allows_exactly_the_prefixes_of_its_language(smol: _core.Model) -> None:
    vocab = smol.vocab
    grammar = S.grammar(vocab, YES_NO, "root")
    logits = np.zeros(vocab.n_tokens, np.float32)
    allowed = {i for i, value in kept(grammar, logits).items() if np.isfinite(value)}
    expected = set()
    for token in range(vocab.n_tokens):
        piece = vocab.piece(token, False)
        if piece and (b"yes".startswith(piece) or b"no".startswith(piece)):
            expected.add(token)
    assert allowed == expected
    (yes,) = vocab.tokenize("yes", False, False)
    grammar.accept(yes)
    after = {i for i, value in kept(grammar, logits).items() if np.isfinite(value)}
    assert after == set(vocab.eog_tokens)
    with pytest.raises(errors.SamplerError, match="refused"):
        grammar.accept(yes)


def test_a_lazy_grammar_waits_for_its_trigger(smol: _core.Model) -> None:
    vocab = smol.vocab
    (start,) = vocab.tokenize("<|im_start|>", False, True)
    lazy = S.grammar_lazy_patterns(vocab, 'root ::= "<|im_start|>" "a"', "root", [], [start])
    logits = np.zeros(vocab.n_tokens, np.float32)
    assert np.isfinite(list(kept(lazy, logits).values())).all()


@pytest.mark.parametrize(
    ("text", "root"),
    [
        ("", "root"),
        ("   ", "root"),
        ("root ::= ", "other"),
        ("root ::= (", "root"),
        ('root ::= "unclosed', "root"),
        ("root ::= missing", "root"),
        ("root ::= root", "root"),
        ("no rule at all", "root"),
        ("root ::= [a-", "root"),
        ('root ::= "a"{5,1}', "root"),
        ('root ::= "a"{99999999999}', "root"),
        ('root ::= "a"{ 5 ,\n 1 }', "root"),
        ('root ::= "a"{99999999999999999999999}', "root"),
        ("root ::= " + "(" * 100_000, "root"),
        ("root ::= " + "(" * 300 + '"a"' + ")" * 300, "root"),
    ],
)
def test_a_bad_grammar_is_an_error_and_never_an_abort(
    tiny: _core.Model, text: str, root: str
) -> None:
    before = _core.live_handles()["samplers"]
    with pytest.raises(errors.GrammarError):
        S.grammar(tiny.vocab, text, root)
    assert _core.live_handles()["samplers"] == before


def test_a_bad_trigger_pattern_is_an_error(tiny: _core.Model) -> None:
    with pytest.raises(errors.GrammarError):
        S.grammar_lazy_patterns(tiny.vocab, YES_NO, "root", ["("], [])
    with pytest.raises(errors.InvalidTokenError):
        S.grammar_lazy_patterns(tiny.vocab, YES_NO, "root", [], [759])


def test_arguments_that_llama_cpp_would_assert_are_refused(tiny: _core.Model) -> None:
    vocab = tiny.vocab
    calls: list[Callable[[], object]] = [
        lambda: S.penalties(8, 8, 0.0, 0.0, 0.0),
        lambda: S.penalties(8, 8, float("nan"), 0.0, 0.0),
        lambda: S.penalties(0, 8, 1.0, 0.0, 0.0),
        lambda: S.penalties(8, -1, 1.0, 0.0, 0.0),
        lambda: S.dist(0xFFFFFFFF),
        lambda: S.dist(-1),
        lambda: S.dist(1 << 32),
        lambda: S.temp(float("inf")),
        lambda: S.top_p(float("nan"), 1),
        lambda: S.top_p(0.5, -1),
        lambda: S.top_k(-2),
        lambda: S.mirostat(0, 1, 5.0, 0.1, 100),
        lambda: S.mirostat(8, 1, 5.0, 0.1, 1),
        lambda: S.logit_bias(8, {8: 1.0}),
        lambda: S.logit_bias(8, {1: float("nan")}),
        lambda: S.logit_bias(8, {1: float("inf")}),
        lambda: S.dry(vocab, 0.8, 1.75, -1, 64, []),
    ]
    for call in calls:
        with pytest.raises(ValueError, match=r"\w"):
            call()


def test_apply_checks_its_input_and_leaves_it_alone() -> None:
    anything: Any
    for anything in (LOGITS.astype(np.float64), np.empty(0, np.float32), LOGITS.view(np.int32)):
        with pytest.raises(errors.SamplerError, match="float32"):
            S.greedy().apply(anything)
    before = LOGITS.copy()
    S.temp(0.1).apply(LOGITS)
    np.testing.assert_array_equal(LOGITS, before)


def test_accept_takes_ids_of_32_bits() -> None:
    sampler = S.penalties(8, 8, 1.1, 0.0, 0.0)
    for bad in (-1, 1 << 31):
        with pytest.raises(ValueError, match="token"):
            sampler.accept(bad)


def test_samplers_are_neither_built_by_hand_nor_pickled() -> None:
    with pytest.raises(TypeError, match="static method"):
        S()
    with pytest.raises(errors.ClosedError):
        S.__new__(S).apply(LOGITS)
    with pytest.raises(TypeError, match="SamplerChain"):
        pickle.dumps(S.greedy())
