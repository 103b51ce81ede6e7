"""Members of llama-cpp-python's objects that need no completion, or are not there."""

from __future__ import annotations

import json
import math

import numpy as np
import pytest

from llama_crab.compat.llama_cpp import Llama, LlamaGrammar, NotSupportedError
from llama_crab.compat.llama_cpp.llama_grammar import JSON_GBNF
from llama_crab.sampling import SamplerChain


def test_threads_are_those_of_the_context(tiny_cpp: Llama) -> None:
    assert (tiny_cpp.n_threads, tiny_cpp.n_threads_batch) == (
        tiny_cpp.crab.context.n_threads,
        tiny_cpp.crab.context.n_threads_batch,
    )
    assert tiny_cpp.n_threads == 1


def test_logits_to_logprobs() -> None:
    rows = [[1.0, 2.0, 3.0], [0.0, -math.inf, 1e4]]
    found = Llama.logits_to_logprobs(rows)
    assert found.dtype == np.single
    assert np.exp(found).sum(axis=-1) == pytest.approx([1.0, 1.0])
    assert found[0, 2] - found[0, 0] == pytest.approx(2.0)
    assert found[1].tolist() == [-1e4, -math.inf, 0.0]
    assert Llama.logits_to_logprobs(rows, axis=0)[:, 0] == pytest.approx([-0.3133, -1.3133], 1e-3)


def test_longest_token_prefix() -> None:
    pairs = (([], []), ([1], []), ([1, 2], [1, 2, 3]), ([1, 2, 3], [1, 4, 3]), ((5,), [6]))
    assert [Llama.longest_token_prefix(a, b) for a, b in pairs] == [0, 0, 2, 1, 0]


def test_tokens_are_kept_and_logits_are_not(tiny_cpp: Llama) -> None:
    tiny_cpp.eval([1, 2, 3])
    assert list(tiny_cpp.eval_tokens) == [1, 2, 3]
    for name in ("scores", "eval_logits"):
        assert not hasattr(tiny_cpp, name)
        with pytest.raises(NotSupportedError, match=f"^{name}: .*logits_processor"):
            getattr(tiny_cpp, name)
        with pytest.raises(NotImplementedError):
            getattr(tiny_cpp, name)


def test_the_grammar_of_json_is_that_of_objects(tiny_cpp: Llama) -> None:
    grammar = LlamaGrammar.from_string(JSON_GBNF)
    for seed in range(8):
        answer = tiny_cpp("", grammar=grammar, max_tokens=120, temperature=1.0, seed=seed)
        choice = answer["choices"][0]
        assert choice["text"].startswith("{")
        if choice["finish_reason"] == "stop":
            assert isinstance(json.loads(choice["text"]), dict)


def test_the_grammar_of_json_takes_what_json_has(smol_cpp: Llama) -> None:
    document = '{"a": [1, -2.5e+3, "\\u00e9\\"", true, {}], "b": {"c": null}}'
    n_prompt: list[int] = []

    def force(tokens: list[int], logits: np.ndarray) -> None:
        n_prompt.append(len(tokens))
        # A grammar decodes what it forces by itself, so that it is the text that counts.
        written = smol_cpp.detokenize(tokens[n_prompt[0] :]).decode()
        rest = smol_cpp.tokenize(document.removeprefix(written).encode(), False)
        logits[:] = -np.inf
        logits[rest[0] if rest else smol_cpp.token_eos()] = 0.0

    chain = SamplerChain().greedy().grammar(JSON_GBNF)
    found = smol_cpp.crab.create_completion("x", 100, sampler=chain, logits_processors=[force])
    assert found.text == document


def test_an_empty_stop_string_stops_nothing(tiny_cpp: Llama) -> None:
    options = {"max_tokens": 5, "temperature": 0}
    plain = tiny_cpp("x", **options)["choices"][0]["text"]
    for stop in ("", [""], ["", "\x00never"]):
        assert tiny_cpp("x", stop=stop, **options)["choices"][0]["text"] == plain
