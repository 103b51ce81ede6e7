"""Completions through llama-cpp-python's face: its dictionaries, with our texts in them."""

from __future__ import annotations

import inspect
import json
import pickle
from pathlib import Path

import numpy as np
import pytest
from golden import EMBEDDINGS, check_chunks, check_completion

from llama_crab import SamplerChain
from llama_crab.compat.llama_cpp import (
    Llama,
    LlamaCppCompatWarning,
    LlamaGrammar,
    LlamaRAMCache,
    LogitsProcessorList,
    MinTokensLogitsProcessor,
    NotSupportedError,
    StoppingCriteriaList,
)
from llama_crab.compat.llama_cpp.generation import Sampling
from llama_crab.errors import ContextLengthError, SchemaError, StateError

PROMPT = "The capital of France is"


def test_a_completion_has_the_same_keys_and_our_text(smol_cpp: Llama) -> None:
    answer = smol_cpp(PROMPT, max_tokens=8, temperature=0)
    check_completion(answer)
    expected = smol_cpp.crab.create_completion(PROMPT, 8, sampler=SamplerChain().greedy())
    assert answer["choices"][0]["text"] == expected.text
    assert answer["choices"][0]["finish_reason"] == "length"
    assert answer["model"] == smol_cpp.model_path
    assert answer["usage"]["completion_tokens"] == 8
    json.dumps(answer)


def test_a_stream_gives_the_same_text_in_pieces(smol_cpp: Llama) -> None:
    whole = smol_cpp(PROMPT, max_tokens=8, temperature=0)["choices"][0]["text"]
    chunks = list(smol_cpp(PROMPT, max_tokens=8, temperature=0, stream=True, model="m"))
    assert check_chunks(chunks) == whole
    assert len(chunks) > 4
    assert {chunk["model"] for chunk in chunks} == {"m"}


def test_logprobs_are_lists_from_the_prompts_beginning_on(smol_cpp: Llama) -> None:
    options = {"max_tokens": 3, "temperature": 0, "logprobs": 2}
    answer = smol_cpp(PROMPT, **options)
    check_completion(answer, logprobs=True)
    found = answer["choices"][0]["logprobs"]
    assert found["text_offset"][0] == len(PROMPT)
    for token, value, top in zip(
        found["tokens"], found["token_logprobs"], found["top_logprobs"], strict=True
    ):
        assert top[token] == value == max(top.values())
    streamed = list(smol_cpp(PROMPT, stream=True, **options))
    check_chunks(streamed, logprobs=True)
    pieces = [chunk["choices"][0]["logprobs"] for chunk in streamed[:-1]]
    offsets = [offset for piece in pieces for offset in piece["text_offset"]]
    assert offsets == found["text_offset"]
    echoed = smol_cpp(PROMPT, echo=True, **options)["choices"][0]
    assert echoed["text"] == PROMPT + answer["choices"][0]["text"]
    assert echoed["logprobs"]["token_logprobs"][0] is None
    assert echoed["logprobs"]["top_logprobs"][0] is None
    assert echoed["logprobs"]["tokens"][-3:] == found["tokens"]
    assert echoed["logprobs"]["text_offset"][-3:] == found["text_offset"]


def test_no_limit_means_until_the_context_is_full(tiny_cpp: Llama) -> None:
    n_prompt = len(tiny_cpp.tokenize(b"a b"))
    for limit in (None, 0, -1):
        answer = tiny_cpp("a b", max_tokens=limit, temperature=0, logit_bias={"2": -100})
        assert answer["usage"]["total_tokens"] >= tiny_cpp.n_ctx() - 1
        assert answer["usage"]["prompt_tokens"] == n_prompt
    assert tiny_cpp("a b", seed=1)["usage"]["completion_tokens"] <= 16
    with pytest.raises(ContextLengthError, match="exceed context window of 256"):
        tiny_cpp([5] * 256)


def test_stop_strings_end_the_answer(smol_cpp: Llama) -> None:
    for stop in (".", ["zzz", "."]):
        answer = smol_cpp(PROMPT, max_tokens=20, temperature=0, stop=stop)["choices"][0]
        assert (answer["text"], answer["finish_reason"]) == (" Paris", "stop")


def test_the_chain_is_llama_cpp_pythons() -> None:
    def names(**given: object) -> list[str]:
        return [stage.name for stage in Sampling.of(given).chain(64).stages]

    assert names() == ["top_k", "top_p", "min_p", "temp", "dist"]
    assert names(repeat_penalty=1.1, typical_p=0.5) == [
        *("penalties", "top_k", "typical", "top_p", "min_p", "temp", "dist"),
    ]
    assert names(temperature=0) == ["greedy"]
    assert names(temperature=-1) == ["dist"]
    assert names(mirostat_mode=1) == ["mirostat"]
    assert names(mirostat_mode=2) == ["mirostat_v2"]
    assert Sampling.of({"top_k": -1}).chain(64).stages[0].name == "top_p"
    with pytest.raises(ValueError, match="mirostat_mode"):
        names(mirostat_mode=3)


def test_seeds_repeat_answers(smol_path: Path, smol_cpp: Llama) -> None:
    def text(llama: Llama, **options: object) -> str:
        return llama(PROMPT, max_tokens=6, temperature=2.0, **options)["choices"][0]["text"]

    assert text(smol_cpp, seed=5) == text(smol_cpp, seed=5)
    assert text(smol_cpp) != text(smol_cpp)
    smol_cpp.set_seed(7)
    first = [text(smol_cpp), text(smol_cpp)]
    smol_cpp.set_seed(7)
    assert [text(smol_cpp), text(smol_cpp)] == first
    assert first[0] != first[1]
    smol_cpp.set_seed(-1)


def test_processors_may_return_a_new_row_or_change_it(tiny_cpp: Llama) -> None:
    seen: list[int] = []

    def only_seven(ids: np.ndarray, scores: np.ndarray) -> np.ndarray:
        seen.append(len(ids))
        changed = np.full_like(scores, -np.inf)
        changed[7] = 0
        return changed

    bans = MinTokensLogitsProcessor(2, tiny_cpp.token_eos())
    tiny_cpp([5, 6], max_tokens=3, logits_processor=LogitsProcessorList([bans, only_seven]))
    assert tiny_cpp.input_ids == [5, 6, 7, 7, 7]
    assert seen == [2, 3, 4]


def test_a_stopping_criterion_ends_before_the_token_it_saw_the_logits_of(tiny_cpp: Llama) -> None:
    criteria = StoppingCriteriaList([lambda ids, logits: len(ids) >= 5])
    answer = tiny_cpp([5, 6], max_tokens=9, logit_bias={2: -100}, stopping_criteria=criteria)
    assert answer["usage"]["completion_tokens"] == 3
    assert answer["choices"][0]["finish_reason"] == "stop"
    with pytest.raises(NotSupportedError, match="stopping_criteria"):
        tiny_cpp("a", stopping_criteria=criteria, grammar=LlamaGrammar.from_string('root ::= "a"'))


def test_grammars_from_text_file_and_schema(smol_cpp: Llama, tmp_path: Path) -> None:
    file = tmp_path / "answer.gbnf"
    file.write_text('root ::= "yes" | "no"', encoding="utf-8")
    for grammar in (LlamaGrammar.from_file(file), LlamaGrammar.from_string(file.read_text())):
        assert smol_cpp("Is it?", grammar=grammar)["choices"][0]["text"] in ("yes", "no")
    schema = json.dumps({"type": "object", "properties": {"n": {"type": "integer", "maximum": 9}}})
    grammar = LlamaGrammar.from_json_schema(schema)
    assert "root ::=" in grammar._grammar
    assert isinstance(smol_cpp("1+1", grammar=LlamaGrammar.from_json_schema('{"const": 2}')), dict)
    with pytest.raises(SchemaError):
        LlamaGrammar.from_json_schema('{"type": "array", "uniqueItems": true}')
    with pytest.raises(ValueError, match="not JSON"):
        LlamaGrammar.from_json_schema("{")


def test_suffixes_fill_gaps_in_both_orders(tiny_fim_path: Path) -> None:
    llama = Llama(str(tiny_fim_path), n_ctx=128, n_threads=1, verbose=False)
    vocab = llama.crab.model.vocab
    after = [vocab.fim_suf, *vocab.tokenize("b", False, False)]
    llama([5], suffix="b", max_tokens=1, temperature=0)
    ids = [vocab.fim_pre, 5, *after, vocab.fim_mid]
    assert llama.input_ids[: len(ids)] == ids
    llama.spm_infill = True
    llama([5], suffix="b", max_tokens=1, temperature=0)
    ids = [*after, vocab.fim_pre, 5, vocab.fim_mid]
    assert llama.input_ids[: len(ids)] == ids
    llama.close()


def test_tokens_there_and_back(smol_cpp: Llama, tiny_cpp: Llama) -> None:
    text = "Grüße, 世界 <|im_start|>"
    ids = smol_cpp.tokenize(text.encode())
    assert smol_cpp.detokenize(ids) == text.encode()
    special = smol_cpp.tokenize(text.encode(), special=True)
    assert len(special) < len(ids)
    assert smol_cpp.detokenize(special) != text.encode()
    assert smol_cpp.detokenize(special, special=True) == text.encode()
    ids = tiny_cpp.tokenize(b"hello")
    assert ids[0] == tiny_cpp.token_bos()
    assert tiny_cpp.detokenize(ids) == b"hello"
    assert tiny_cpp.tokenize(b"hello", add_bos=False) == ids[1:]
    assert tiny_cpp.tokenizer().decode(ids) == "hello"
    assert (smol_cpp.n_ctx(), smol_cpp.n_embd(), smol_cpp.n_vocab()) == (512, 576, 49152)
    assert smol_cpp.metadata["general.architecture"] == "llama"
    assert smol_cpp.context_params.n_ctx == 512
    assert smol_cpp.pooling_type() in (-1, 0)


def test_vocabularies_alone(smol_path: Path, smol_cpp: Llama) -> None:
    llama = Llama(str(smol_path), vocab_only=True, verbose=False)
    assert llama.tokenize(b"some text") == smol_cpp.tokenize(b"some text")
    with pytest.raises(NotSupportedError, match="vocab_only"):
        llama("x")
    llama.close()


def test_embeddings(tiny_embedder_path: Path) -> None:
    llama = Llama(str(tiny_embedder_path), embedding=True, n_ctx=64, n_batch=64, verbose=False)
    answer = llama.create_embedding(["a b", "c"])
    assert set(answer) == EMBEDDINGS
    assert [set(item) for item in answer["data"]] == [{"object", "embedding", "index"}] * 2
    assert set(answer["usage"]) == {"prompt_tokens", "total_tokens"}
    one, n_tokens = llama.embed("a b", return_count=True)
    assert one == pytest.approx(answer["data"][0]["embedding"], abs=1e-5)
    assert n_tokens == len(llama.tokenize(b"a b"))
    assert np.linalg.norm(llama.embed("a b", normalize=True)) == pytest.approx(1)
    assert len(llama.embed("a " * 500)) == llama.n_embd()
    with pytest.raises(ContextLengthError):
        llama.embed("a " * 500, truncate=False)
    llama.close()
    rows = Llama(
        str(tiny_embedder_path), embedding=True, pooling_type=0, n_ctx=64, n_batch=64, verbose=False
    )
    found = rows.embed(["a b", "c"])
    assert [len(each) for each in found] == [len(rows.tokenize(t)) for t in (b"a b", b"c")]
    rows.close()


def test_states_move_to_another_object(smol_path: Path, smol_cpp: Llama) -> None:
    llama = Llama(str(smol_path), n_ctx=512, verbose=False)
    with pytest.raises(StateError, match="no tokens"):
        llama.save_state()
    smol_cpp.reset()
    smol_cpp.eval(smol_cpp.tokenize(PROMPT.encode()))
    state = pickle.loads(pickle.dumps(smol_cpp.save_state()))
    llama.load_state(state)
    assert llama.n_tokens == smol_cpp.n_tokens == len(smol_cpp.tokenize(PROMPT.encode()))
    answer = llama.crab.create_completion(PROMPT, 1)
    assert answer.usage.cached_tokens >= llama.n_tokens - 1
    llama.close()


def test_generate_yields_tokens_and_the_end(smol_cpp: Llama) -> None:
    ids = smol_cpp.tokenize(PROMPT.encode())
    expected = smol_cpp(PROMPT, max_tokens=5, temperature=0)["choices"][0]["text"]
    found = []
    for token in smol_cpp.generate(ids, temp=0):
        found.append(token)
        if len(found) == 5:
            break
    assert smol_cpp.detokenize(found).decode() == expected
    grammar = LlamaGrammar.from_string('root ::= "x"')
    tokens = list(smol_cpp.generate(ids, grammar=grammar))
    assert tokens[-1] == smol_cpp.token_eos()
    assert smol_cpp.detokenize(tokens) == b"x"


def test_it_says_what_it_cannot(smol_cpp: Llama) -> None:
    with pytest.raises(TypeError, match="pickled"):
        pickle.dumps(smol_cpp)
    with pytest.raises(NotSupportedError, match="generate"):
        smol_cpp.sample()
    with pytest.warns(LlamaCppCompatWarning, match="tfs_z"):
        smol_cpp("a", max_tokens=1, tfs_z=0.9)
    with pytest.warns(LlamaCppCompatWarning, match="set_cache"):
        smol_cpp.set_cache(LlamaRAMCache(1 << 20))
    assert isinstance(smol_cpp.cache, LlamaRAMCache)
    smol_cpp.set_cache(None)


def test_calling_is_completing() -> None:
    assert Llama.__call__ is Llama.create_completion
    defaults = inspect.signature(Llama.create_completion).parameters
    assert defaults["max_tokens"].default == 16
    assert defaults["temperature"].default == 0.8
    assert inspect.signature(Llama.create_chat_completion).parameters["temperature"].default == 0.2
