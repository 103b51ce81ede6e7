"""`SamplerChain.compile`: both executors get the right stages in order, arguments and seeds."""

from __future__ import annotations

import os
from array import array
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from llama_crab import _core, sampling_compile
from llama_crab.errors import GrammarError, SamplerError
from llama_crab.sampling import SamplerChain

ROOT = Path(__file__).parents[2]
LLAMA_CPP = Path(os.environ.get("LLAMA_CPP_DIR") or ROOT / "third_party" / "llama.cpp")
GBNF = 'root ::= "yes" | "no"'


@pytest.fixture(scope="module")
def model() -> Iterator[_core.Model]:
    # A vocabulary is all that samplers need.
    path = LLAMA_CPP / "models" / "ggml-vocab-llama-spm.gguf"
    with _core.Model(str(path), vocab_only=True) as loaded:
        yield loaded


def reference(chain: SamplerChain, model: _core.Model, seed: int, **options: Any) -> _core.Sampler:
    native = chain.with_executor("reference").compile(model, seed, **options)
    assert isinstance(native, _core.Sampler)
    return native


def fused(chain: SamplerChain, model: _core.Model, seed: int, **options: Any) -> _core.FusedSampler:
    native = chain.compile(model, seed, **options)
    assert isinstance(native, _core.FusedSampler)
    return native


def names(native: _core.Sampler) -> list[str]:
    return [native[index].name for index in range(len(native))]


@pytest.mark.parametrize(
    ("chain", "expected"),
    [
        (SamplerChain(), ["dist"]),
        (SamplerChain.benchmark(), ["temp", "greedy"]),
        (SamplerChain.default(), ["top-k", "top-p", "min-p", "temp", "dist"]),
        (SamplerChain.chat(), ["penalties", "temp", "top-p", "min-p", "dist"]),
        (SamplerChain.structured(GBNF), ["grammar", "temp", "top-p", "dist"]),
        (SamplerChain().dist().grammar(GBNF), ["grammar", "dist"]),
        (SamplerChain().temp_ext(0.8, 0.2).mirostat(), ["temp-ext", "mirostat"]),
        (SamplerChain().typical(0.5).mirostat_v2(), ["typical", "mirostat-v2"]),
        (SamplerChain().xtc(0.5).adaptive_p(0.4), ["xtc", "adaptive-p"]),
        (SamplerChain().dry(0.8, seq_breakers=["\n"]), ["dry", "dist"]),
        (SamplerChain().top_n_sigma(1.0).infill(), ["top-n-sigma", "infill", "dist"]),
        (SamplerChain().logit_bias({3: -1.0}).greedy(), ["logit-bias", "greedy"]),
        (SamplerChain().grammar_lazy(GBNF, trigger_patterns=["(y)"]), ["grammar", "dist"]),
        (SamplerChain().grammar_lazy(GBNF, trigger_tokens=[5]), ["grammar", "dist"]),
    ],
    ids=str,
)
def test_llama_cpp_gets_the_stages_in_order(
    model: _core.Model, chain: SamplerChain, expected: list[str]
) -> None:
    assert names(reference(chain, model, 1)) == expected
    ours = [name for name, _ in fused(chain, model, 1).stages]
    assert ours == [stage.name for stage in chain.stages]


def test_the_requests_bias_comes_after_the_grammar_and_before_the_stages(
    model: _core.Model,
) -> None:
    chain = SamplerChain().temp(0.5).grammar(GBNF)
    banned = {3: float("-inf")}
    native = reference(chain, model, 1, logit_bias=banned)
    assert names(native) == ["grammar", "logit-bias", "temp", "dist"]
    ours = [name for name, _ in fused(chain, model, 1, logit_bias=banned).stages]
    assert ours == ["grammar", "logit_bias", "temp", "dist"]
    native = reference(SamplerChain(), model, 1, logit_bias={3: 1.0})
    assert names(native) == ["logit-bias", "dist"]
    assert names(reference(SamplerChain(), model, 1, logit_bias={})) == ["dist"]


@pytest.mark.parametrize(
    ("chain", "seed", "choice", "used"),
    [
        (SamplerChain(), 5, 0, 5),
        (SamplerChain(), 5, 2, 7),
        (SamplerChain().dist(seed=7), 5, 0, 7),
        (SamplerChain().dist(seed=7), 5, 2, 9),
        # 0xFFFFFFFF would mean "random" to llama.cpp.
        (SamplerChain(), 0xFFFFFFFE, 1, 0),
    ],
)
def test_a_stages_own_seed_wins_and_choices_count_up(
    model: _core.Model, chain: SamplerChain, seed: int, choice: int, used: int
) -> None:
    assert reference(chain, model, seed, choice=choice)[0].seed == used
    assert fused(chain, model, seed, choice=choice).stages == (("dist", {"seed": used}),)


@pytest.mark.parametrize("seed", [-1, 0xFFFFFFFF, 1.0, True, None])
def test_a_bad_request_seed_is_refused(model: _core.Model, seed: Any) -> None:
    with pytest.raises(SamplerError, match="seed"):
        SamplerChain().compile(model, seed)


def test_tokens_outside_the_vocabulary_are_refused(model: _core.Model) -> None:
    n = model.vocab.n_tokens
    SamplerChain().logit_bias({n - 1: 1.0}).compile(model, seed=1)
    with pytest.raises(SamplerError, match=f"^logit_bias: token {n} "):
        SamplerChain().logit_bias({n: 1.0}).compile(model, seed=1)
    with pytest.raises(SamplerError, match=f"^logit_bias: token {n} "):
        SamplerChain().compile(model, seed=1, logit_bias={n: 1.0})
    with pytest.raises(SamplerError, match=f"^grammar_lazy: token {n} "):
        SamplerChain().grammar_lazy(GBNF, trigger_tokens=[n]).compile(model, seed=1)


@pytest.mark.parametrize(
    "gbnf", ["root ::= (", "root ::= nowhere", 'yes ::= "yes"', "root ::= root"]
)
def test_a_grammar_that_does_not_parse_is_an_error(model: _core.Model, gbnf: str) -> None:
    with pytest.raises(GrammarError):
        SamplerChain().grammar(gbnf).compile(model, seed=1)


ROW = array("f", [0.0, 3.0, 2.0, 1.0])


@pytest.mark.parametrize("executor", ["fused", "reference"])
def test_the_compiled_chain_does_what_it_says(model: _core.Model, executor: Any) -> None:
    chain = SamplerChain(executor=executor)
    cut = chain.top_k(2).temp(0.5).greedy().compile(model, 1)
    ids, logits, _, selected = cut.apply(ROW)
    assert (ids, logits, selected) == ([1, 2], [6.0, 4.0], 1)
    banned = chain.greedy().compile(model, 1, logit_bias={1: float("-inf")})
    assert banned.apply(ROW)[3] == 2
    absent = chain.penalties(8, penalty_present=10.0).greedy().compile(model, 1)
    assert absent.apply(ROW)[3] == 1
    absent.accept(1)
    assert absent.apply(ROW)[3] == 2
    assert [absent.select(ROW) for _ in range(3)] == [2, 3, 0]
    assert list(ROW) == [0.0, 3.0, 2.0, 1.0]


@pytest.mark.parametrize("executor", ["fused", "reference"])
def test_the_seed_decides_the_draw(model: _core.Model, executor: Any) -> None:
    flat = array("f", [0.0] * 1000)

    def draws() -> list[int]:
        chain = SamplerChain(executor=executor)
        return [chain.compile(model, seed).select(flat) for seed in range(32)]

    assert draws() == draws()
    assert len(set(draws())) > 16


class Recorder:
    """Stands in for `Sampler` to see the arguments of every constructor."""

    def __init__(self) -> None:
        self.calls: list[tuple[Any, ...]] = []

    def __getattr__(self, name: str) -> Any:
        return lambda *args: (name, *args)

    def chain(self) -> Recorder:
        return self

    def add(self, call: tuple[Any, ...]) -> None:
        self.calls.append(call)


@pytest.mark.parametrize(
    ("chain", "call"),
    [
        (SamplerChain().top_p(0.9, 2).greedy(), ("top_p", 0.9, 2)),
        (SamplerChain().temp_ext(0.8, 0.2, 1.5).greedy(), ("temp_ext", 0.8, 0.2, 1.5)),
        (SamplerChain().xtc(0.5, 0.1, 3).greedy(), ("xtc", 0.5, 0.1, 3, 42)),
        (SamplerChain().xtc(0.5, seed=6).greedy(), ("xtc", 0.5, 0.1, 1, 6)),
        (SamplerChain().mirostat(tau=4.0, eta=0.2, m=50), ("mirostat", 100, 42, 4.0, 0.2, 50)),
        (SamplerChain().mirostat_v2(9, 4.0, 0.2), ("mirostat_v2", 9, 4.0, 0.2)),
        (SamplerChain().adaptive_p(0.4, 0.8), ("adaptive_p", 0.4, 0.8, 42)),
        (SamplerChain().penalties(8, 1.1, 0.2, 0.3), ("penalties", 100, 8, 1.1, 0.2, 0.3)),
        (SamplerChain().logit_bias({7: 1.0, 2: 3.0}), ("logit_bias", 100, {2: 3.0, 7: 1.0})),
        (SamplerChain().dry(0.8, 1.5, 3, 9, ["x"]), ("dry", "vocab", 0.8, 1.5, 3, 9, ("x",))),
        (SamplerChain().infill(), ("infill", "vocab")),
        (SamplerChain().grammar(GBNF, "r"), ("grammar", "vocab", GBNF, "r")),
        (
            SamplerChain().grammar_lazy(GBNF, "r", ["p"], [4]),
            ("grammar_lazy_patterns", "vocab", GBNF, "r", ("p",), (4,)),
        ),
    ],
    ids=lambda value: value[0] if isinstance(value, tuple) else "",
)
def test_arguments_arrive_in_the_order_of_llama_h(
    monkeypatch: pytest.MonkeyPatch, chain: SamplerChain, call: tuple[Any, ...]
) -> None:
    monkeypatch.setattr(sampling_compile, "Sampler", Recorder())
    vocab = SimpleNamespace(n_tokens=100, eot=None, eos=2)
    model: Any = SimpleNamespace(vocab=vocab)
    recorded: Any = chain.with_executor("reference").compile(model, seed=42)
    seen = tuple("vocab" if argument is vocab else argument for argument in recorded.calls[0])
    assert seen == call


def test_infill_needs_an_end_token(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sampling_compile, "Sampler", Recorder())
    bare: Any = SimpleNamespace(vocab=SimpleNamespace(n_tokens=100, eot=None, eos=None))
    with pytest.raises(SamplerError, match=r"^infill: "):
        SamplerChain().infill().compile(bare, seed=1)
