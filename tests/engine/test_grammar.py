"""Our grammar engine: the masks of llama.cpp, then the chain exactly, then the tokens it forces."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from engine_requests import answer, answers, ask, run
from grammars import (
    CHAINS,
    COMPARABLE,
    DRAWS,
    EXECUTORS,
    FORCED,
    HOSTILE,
    LAZY,
    LITERALS,
    NOT_GRAMMARS,
    OBJECT,
    OWN,
    TEXTS,
    TOKENS,
    WALKS,
    allowed,
    both,
    by_both,
    check_lazy,
    check_obeys,
    check_walks,
    count_different,
    forced_tokens,
    fused,
    random_rows,
    scheduler_of,
    with_piece,
    zeros,
)

from llama_crab import _core
from llama_crab.errors import GrammarError, SamplerError
from llama_crab.sampling import SamplerChain

Load = Callable[[str], _core.Model]


@pytest.fixture(scope="module")
def swa(tiny_swa_path: Path) -> Iterator[_core.Model]:
    """Return a model of 558 tokens: every byte, 300 merges."""
    with _core.Model(tiny_swa_path) as model:
        yield model


@pytest.fixture
def load(vocab_folder: Path, request: pytest.FixtureRequest) -> Iterator[Load]:
    """Return a loader of vocabularies by name."""
    with ExitStack() as stack:

        def model_of(name: str) -> _core.Model:
            if name in ("tiny", "swa", "smol", "gemma"):
                model: _core.Model = request.getfixturevalue(name)
                return model
            path = str(vocab_folder / f"ggml-vocab-{name}.gguf")
            return stack.enter_context(_core.Model(path, vocab_only=True))

        yield model_of


# Masks.


@pytest.mark.parametrize(("name", "n_steps", "stride"), WALKS)
def test_masks_are_those_of_llama_cpp(
    load: Load, llama_cpp_tree: Path, name: str, n_steps: int, stride: int
) -> None:
    """Along random walks through many grammars, by set equality, ends of generation included."""
    check_walks(load(name), llama_cpp_tree, n_steps, stride)


def test_masks_survive_that_the_tables_are_rebuilt(tiny: _core.Model) -> None:
    """A state per depth, and a row of 2,000 kinds of characters per state: soon 32 MiB."""
    many = " | ".join(f"[\\u{0x4E00 + 2 * n:04x}]" for n in range(2000))
    text = f'root ::= nest | "!" many\nnest ::= [a-z] nest ")" | [a-z]\nmany ::= {many}'
    pair, held = both(SamplerChain().grammar(text), tiny), []
    rng, row = np.random.default_rng(0), zeros(tiny)
    for step in range(2400):
        ids = allowed(pair[0], row)
        if step % 100 == 0:
            assert ids == allowed(pair[1], row)
            held.append([sampler.clone() for sampler in pair])
        deeper = [i for i in ids if tiny.vocab.piece(i, True) != b")"]
        token = deeper[int(rng.integers(len(deeper)))]
        for sampler in pair:
            sampler.accept(token)
    for ours, theirs in held:
        assert allowed(ours, row) == allowed(theirs, row)


def test_a_token_terminal_inside_a_token_does_not_match(tiny: _core.Model) -> None:
    """llama.cpp's mask lets such a token through, and its accept fails; ours refuses it."""
    whole = with_piece(tiny.vocab, b"in")
    ours, theirs = both(SamplerChain().grammar(f'root ::= "i" <[{whole}]>'), tiny)
    before = allowed(ours, zeros(tiny))
    assert {tiny.vocab.piece(i, True) for i in before} == {b"i"}
    assert whole in set(allowed(theirs, zeros(tiny))) - set(before)
    for sampler in (ours, theirs):
        with pytest.raises(SamplerError):
            sampler.accept(whole)
    assert allowed(ours, zeros(tiny)) == before
    ours.accept(before[0])
    assert allowed(ours, zeros(tiny)) == [whole]


def test_a_nul_is_never_allowed(swa: _core.Model) -> None:
    nul = with_piece(swa.vocab, b"\0")
    sampler = fused("root ::= [^a]+ [\\x00]", swa)
    assert nul not in allowed(sampler, zeros(swa))
    with pytest.raises(SamplerError, match=f"does not allow token {nul}"):
        sampler.accept(nul)
    with pytest.raises(SamplerError, match="no candidate is left"):
        fused("root ::= [\\x00]", swa).select(zeros(swa))


# Mask, then chain.


@pytest.mark.parametrize("text", TEXTS)
@pytest.mark.parametrize("name", CHAINS)
def test_a_grammar_is_a_mask_before_the_chain(tiny: _core.Model, name: str, text: str) -> None:
    """The chain alone, on the row that llama.cpp's grammar leaves: same candidates, p and draw."""
    constrained: Any = CHAINS[name].grammar(TEXTS[text]).compile(tiny, 7)
    alone: Any = CHAINS[name].compile(tiny, 7)
    mask = _core.Sampler.grammar(tiny.vocab, TEXTS[text], "root")
    for row in random_rows(25, tiny.vocab.n_tokens, 1):
        masked = np.full_like(row, -np.inf)
        ids = allowed(mask, row)
        masked[ids] = row[ids]
        got, expected = constrained.apply(row), alone.apply(masked)
        assert got[3] == expected[3] is not None
        p, p_alone = np.full((2, row.size), -1.0)  # stays where a token is no candidate
        p[got[0]], p_alone[expected[0]] = got[2], expected[2]
        np.testing.assert_allclose(p, p_alone, rtol=1e-5, atol=1e-12)
        assert p[p >= 0.0].sum() == pytest.approx(1.0, rel=1e-5)
        assert set(got[0]) <= set(ids)
        for sampler in (constrained, alone, mask):
            sampler.accept(got[3])
            if tiny.vocab.is_eog(got[3]):
                sampler.reset()


@pytest.mark.parametrize(("name", "n"), DRAWS)
@pytest.mark.parametrize("text", TEXTS)
def test_tokens_are_those_of_llama_cpp(load: Load, name: str, n: int, text: str) -> None:
    """At least 99.9 % of the draws, by every chain with the same seed."""
    model = load(name)
    different = {}
    for seed, chain in enumerate(COMPARABLE):
        rows = random_rows(n, model.vocab.n_tokens, seed)
        different[chain] = count_different(CHAINS[chain].grammar(TEXTS[text]), model, rows, seed)
    assert sum(different.values()) <= n * len(COMPARABLE) // 1000, different


# States.


def test_a_row_without_an_allowed_token_is_an_error(tiny: _core.Model) -> None:
    """All that the grammar allows is -inf; the next good row is sampled as if nothing had been."""
    for text in TEXTS.values():
        for chain in (SamplerChain().greedy(), SamplerChain().temp(0.8), CHAINS["chat"]):
            sampler = chain.grammar(text).compile(tiny, 3)
            ids = allowed(sampler, zeros(tiny))
            (row,) = random_rows(1, 759, 0)
            bad = row.copy()
            bad[allowed(fused(text, tiny), row)] = -np.inf
            assert np.isfinite(bad).any()
            for call in (sampler.apply, sampler.select):
                with pytest.raises(SamplerError, match="no candidate is left"):
                    call(bad)
            assert sampler.select(row) in allowed(fused(text, tiny), row)
            sampler.reset()
            assert allowed(sampler, zeros(tiny)) == ids


@pytest.mark.parametrize("name", ["tiny", "swa", "smol"])
def test_a_refused_token_changes_nothing(load: Load, name: str) -> None:
    model = load(name)
    sampler = fused('root ::= "é" [a-c]{2} "!"', model)
    for piece in (b"\xc3", b"\xa9", b"a", b"b"):
        ids = allowed(sampler, zeros(model))
        refused = sorted(set(range(model.vocab.n_tokens)) - set(ids))
        for token in (*refused[:20], *refused[::97], *model.vocab.eog_tokens):
            with pytest.raises(SamplerError, match=f"does not allow token {token} "):
                sampler.accept(token)
            assert allowed(sampler, zeros(model)) == ids
        with pytest.raises(SamplerError):
            sampler.accept(model.vocab.n_tokens)
        sampler.accept(next(i for i in ids if model.vocab.piece(i, True) == piece))
    assert {model.vocab.piece(i, True) for i in allowed(sampler, zeros(model))} == {b"!"}


@pytest.mark.parametrize("name", ["tiny", "swa", "smol"])
def test_a_complete_text_may_end_and_only_then(load: Load, name: str) -> None:
    model = load(name)
    ends = set(model.vocab.eog_tokens)
    sampler = fused('root ::= "x" "y"*', model)
    assert ends.isdisjoint(allowed(sampler, zeros(model)))
    x, y = (with_piece(model.vocab, piece) for piece in (b"x", b"y"))
    sampler.accept(x)
    assert set(allowed(sampler, zeros(model))) >= ends | {y}
    closed = fused('root ::= "x"', model)
    closed.accept(x)
    for end in ends:
        closed.accept(end)
        assert set(allowed(closed, zeros(model))) == ends
    assert set(allowed(fused('root ::= ""', model), zeros(model))) == ends


def test_a_clone_goes_its_own_way(swa: _core.Model) -> None:
    """Inside a character too; the clone has the random state of the original."""
    chain = SamplerChain().temp(0.9).grammar('root ::= "é" [a-z]+ "." | "è" [0-9]+')
    first = chain.compile(swa, 5)
    first.accept(with_piece(swa.vocab, b"\xc3"))
    second = first.clone()
    first.accept(with_piece(swa.vocab, b"\xa9"))
    second.accept(with_piece(swa.vocab, b"\xa8"))
    third = first.clone()
    rows = random_rows(12, swa.vocab.n_tokens, 2)
    texts = []
    for sampler in (first, second, third):
        tokens = [sampler.select(row) for row in rows[:6]]
        texts.append(b"".join(swa.vocab.piece(token, True) for token in tokens))
    assert texts[0].rstrip(b".").isalpha()
    assert texts[1].isdigit()
    assert texts[2] == texts[0]


def test_reset_starts_over(tiny: _core.Model) -> None:
    sampler = SamplerChain().temp(0.9).grammar(TEXTS["mixed"]).compile(tiny, 5)
    rows = random_rows(10, 759, 3)
    first = [sampler.select(row) for row in rows]
    assert allowed(sampler, zeros(tiny)) != allowed(fused(TEXTS["mixed"], tiny), zeros(tiny))
    sampler.reset()
    assert [sampler.select(row) for row in rows] == first


def test_samplers_of_one_grammar_do_not_influence_each_other(tiny: _core.Model) -> None:
    """Ten share what was learned, each with its own text; others come and crowd it out."""
    chain = SamplerChain().temp(1.2).grammar(TEXTS["mixed"])
    rows = random_rows(30, 759, 4)
    alone = []
    for seed in range(10):
        with chain.compile(tiny, seed) as sampler:
            alone.append([sampler.select(row) for row in rows])
    together = [chain.compile(tiny, seed) for seed in range(10)]
    got: list[list[int]] = [[] for _ in together]
    for number, row in enumerate(rows):
        fused(f'root ::= "crowd{number}"', tiny).close()
        for tokens, sampler in zip(got, together, strict=True):
            tokens.append(sampler.select(row))
    assert got == alone
    assert len(set(map(tuple, alone))) == 10
    late = chain.compile(tiny, 3)
    assert [late.select(row) for row in rows] == alone[3]


# Lazy grammars.


@pytest.mark.parametrize("name", LAZY)
@pytest.mark.parametrize("vocab_name", ["tiny", "swa"])
def test_a_lazy_grammar_waits_for_a_pattern(load: Load, vocab_name: str, name: str) -> None:
    """All is allowed before the match; then llama.cpp's sets, the replayed text included."""
    model = load(vocab_name)
    patterns, said, text = LAZY[name]
    samplers = both(SamplerChain().grammar_lazy(text, trigger_patterns=patterns), model)
    check_lazy(model, samplers, model.vocab.tokenize(said, False, False))


@pytest.mark.parametrize("vocab_name", ["tiny", "smol"])
def test_a_lazy_grammar_waits_for_a_token(load: Load, vocab_name: str) -> None:
    model = load(vocab_name)
    trigger = with_piece(model.vocab, b"if")
    text = r'root ::= "if" [a-z]{2} "(" [0-9é]+'
    chain = SamplerChain().grammar_lazy(text, trigger_tokens=[5, trigger])
    check_lazy(model, both(chain, model), [301, 302, trigger])


def test_a_trigger_that_its_grammar_refuses_is_an_error(tiny: _core.Model) -> None:
    """The token that would wake it is refused by both, and ours goes on waiting."""
    chain = SamplerChain().grammar_lazy('root ::= "no"', trigger_patterns=[r"[\s\S]*(<)"])
    ours, theirs = both(chain, tiny)
    letter, trigger = with_piece(tiny.vocab, b"a"), with_piece(tiny.vocab, b"<")
    for sampler in (ours, theirs):
        sampler.accept(letter)
        with pytest.raises(SamplerError, match=r"refused|does not allow"):
            sampler.accept(trigger)
    assert len(allowed(ours, zeros(tiny))) == 759
    ours.accept(letter)


# Errors.


@pytest.mark.parametrize("executor", EXECUTORS)
@pytest.mark.parametrize(("chain", "match"), NOT_GRAMMARS)
def test_what_is_no_grammar_is_a_grammar_error(
    tiny: _core.Model, chain: SamplerChain, match: str, executor: Any, capfd: Any
) -> None:
    """At compile, with the reason in the exception and nothing on stderr."""
    with pytest.raises(GrammarError, match=match):
        chain.with_executor(executor).compile(tiny, 1)
    assert capfd.readouterr() == ("", "")


def test_hostile_grammars_end_in_an_error_or_work(tiny_path: Path) -> None:
    """In a process of little memory, which must not crash, hang or print on stderr."""
    script = Path(__file__).with_name("grammars.py")
    done = subprocess.run(
        [sys.executable, str(script), str(tiny_path)],
        env={**os.environ, "PYTHONPATH": str(script.parent)},
        capture_output=True, text=True, timeout=300, check=False,
    )  # fmt: skip
    assert (done.returncode, done.stderr) == (0, "")
    results = dict(line.split(": ") for line in done.stdout.splitlines())
    assert list(results) == list(HOSTILE)
    assert set(results.values()) == {"GrammarError", "SamplerError", "works"}, results


# Through the engine.


@pytest.mark.parametrize("case", FORCED)
@pytest.mark.parametrize("name", LITERALS)
def test_forced_tokens_need_no_step(load: Load, name: str, case: str) -> None:
    """The tokens, text and end of the reference executor, which decodes one token per step."""
    model, text = load(name), f"root ::= {LITERALS[name]}"
    whole = forced_tokens(model, text)
    assert len(whole) >= 24
    n, finish, jumps, fields = FORCED[case]
    if case.startswith("stop token"):
        fields = {**fields, "stop_tokens": (whole[9],)}
    ours, steps = by_both(model, SamplerChain().temp(0.8).grammar(text), **fields)
    assert ours.error is None
    for sequence in ours.sequences:
        assert (sequence.finish_reason, sequence.tokens) == (finish, whole[:n])
        assert sequence.logprobs == [] or len(sequence.logprobs) == len(whole)
    assert steps[0] < steps[1] if jumps else steps[0] == steps[1]
    if case == "plain":
        # The prompt, and at most 16 tokens in a step.
        assert steps == [1 + len(whole) // 16, 1 + len(whole)]


@pytest.mark.parametrize("fields", [{"ignore_eos": True}, {"min_tokens": 40}, {"ban": 20}])
def test_forced_tokens_that_are_forbidden_are_errors(
    tiny: _core.Model, fields: dict[str, Any]
) -> None:
    """An end that may not come, and a token that a bias bans: as the reference executor."""
    ban = fields.get("ban")
    fields = {"logit_bias": {TOKENS[ban]: -np.inf}} if ban else fields
    chain = SamplerChain().greedy().grammar(f"root ::= {LITERALS['tiny']}")
    ours, steps = by_both(tiny, chain, **fields)
    assert type(ours.error) is SamplerError
    assert ours.sequences[0].tokens == TOKENS[:ban]
    assert steps[0] < steps[1]


@pytest.mark.parametrize("name", COMPARABLE)
def test_forced_tokens_consume_their_draws(tiny: _core.Model, name: str) -> None:
    """Free text before and after them is the reference's, so every stage has moved on with them."""
    chain = CHAINS[name].grammar(f"root ::= .{{3}} {LITERALS['tiny']} .+")
    ours, steps = by_both(tiny, chain, min_tokens=50)
    assert len(answer(ours)) >= 50
    assert steps[0] <= steps[1] - 20


@pytest.mark.parametrize("stream", [False, True])
def test_text_stops_inside_forced_tokens(swa: _core.Model, stream: bool) -> None:
    """A stop string is met although the tokens after it came with it."""
    chain = SamplerChain().grammar(f"root ::= {LITERALS['swa']}")
    ours, _ = by_both(swa, chain, stop=("本🦀",), stream=stream)
    (sequence,) = ours.sequences
    assert (sequence.text, sequence.finish_reason) == ("QZ#é日", "stop")
    assert sequence.stop_reason == "本🦀"


def test_answers_follow_the_grammar(smol: _core.Model) -> None:
    """Objects of a fixed shape by SmolLM2, hot and cold, which parse and have that shape."""
    prompt = smol.vocab.tokenize("A person as JSON:\n", True, False)
    requests = [
        ask(0, 120, prompt=prompt, sampler=chain.grammar(OBJECT), ignore_eos=False)
        for chain in (SamplerChain().greedy(), SamplerChain.chat(), SamplerChain().temp(1.5))
    ]
    with scheduler_of(smol, n_seq_max=3, n_ctx=1024) as scheduler:
        run(scheduler, *requests)
    for request in requests:
        (sequence,) = request.sequences
        assert (request.error, sequence.finish_reason) == (None, "stop")
        check_obeys(smol, OBJECT, sequence)
        value = json.loads(sequence.text)
        assert list(value) == ["name", "age", "tags"]
        assert 1 <= len(value["name"]) <= 12
        assert 0 <= value["age"] <= 999
        assert set(value["tags"]) <= {"red", "green", "blue"}


# Threads.


def test_threads_share_a_grammar(tiny: _core.Model, swa: _core.Model) -> None:
    """Four contexts of two models at once, each with its own text, as they give it alone."""

    def texts(worker: int) -> list[list[list[int]]]:
        model = (tiny, swa)[worker % 2]
        todo = []
        for seed in range(6):
            chain = SamplerChain().grammar(TEXTS["mixed"]).temp(1.3).dist(10 * worker + seed)
            todo.append(ask(0, 40, prompt=[260], sampler=chain, ignore_eos=False, n=2, best_of=2))
        with scheduler_of(model, n_seq_max=2) as scheduler:
            run(scheduler, *todo)
        for request in todo:
            assert request.error is None
            for sequence in request.sequences:
                check_obeys(model, TEXTS["mixed"], sequence)
        return [answers(request) for request in todo]

    with ThreadPoolExecutor(4) as pool:
        together = list(pool.map(texts, range(4)))
    assert together == [texts(worker) for worker in range(4)]


def test_threads_share_masks(load: Load) -> None:
    """Samplers that learn one grammar at once, on a vocabulary where that takes long."""
    model = load("llama-spm")
    rows = random_rows(40, model.vocab.n_tokens, 6)

    def tokens(seed: int) -> list[int]:
        sampler = SamplerChain().temp(1.0).grammar(OWN["negated"]).compile(model, seed)
        return [sampler.select(row) for row in rows]

    with ThreadPoolExecutor(4) as pool:
        together = list(pool.map(tokens, range(4)))
    assert together == [tokens(seed) for seed in range(4)]
