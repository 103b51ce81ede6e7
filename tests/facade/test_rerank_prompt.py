"""Prompts of rerankers are llama-server's; results are sorted."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from llama_crab import ParameterError, _core, errors
from llama_crab.rerank import RerankResult, rank_documents, rerank_prompts

DOCUMENTS = ["the way of war", "x", "", "the world and the people of the world"]
QUERY = "the world"
TEMPLATE = "<s>Query: {query}\nDocument: {document}</s> relevant?"


def vocabulary(folder: Path, name: str, **overrides: Any) -> _core.Model:
    values = {f"tokenizer.ggml.{key}": value for key, value in overrides.items()}
    return _core.Model(folder / f"ggml-vocab-{name}.gguf", vocab_only=True, kv_overrides=values)


@pytest.fixture
def bert(vocab_folder: Path) -> Iterator[_core.Vocab]:
    """Return a WordPiece vocabulary: it adds BOS ([CLS]) and SEP, and has no EOS."""
    with vocabulary(vocab_folder, "bert-bge") as model:
        yield model.vocab


@pytest.fixture
def spm(vocab_folder: Path) -> Iterator[_core.Vocab]:
    with vocabulary(vocab_folder, "llama-spm") as model:
        yield model.vocab


def prompts(vocab: _core.Vocab, **options: Any) -> tuple[list[list[int]], int]:
    found, n_cut = rerank_prompts(vocab, QUERY, DOCUMENTS, n_threads=2, **options)
    return [found.ids(i) for i in range(len(found))], n_cut


def plain(vocab: _core.Vocab, text: str) -> list[int]:
    return vocab.tokenize(text, False, False)


@pytest.mark.parametrize("add_bos", [False, True])
@pytest.mark.parametrize("add_eos", [False, True])
@pytest.mark.parametrize("add_sep", [False, True])
@pytest.mark.parametrize("name", ["bert-bge", "nomic-bert-moe"])
def test_specials_are_where_the_vocabulary_asks_for_them(
    vocab_folder: Path, name: str, add_bos: bool, add_eos: bool, add_sep: bool
) -> None:
    asked = {"add_bos_token": add_bos, "add_eos_token": add_eos, "add_sep_token": add_sep}
    with vocabulary(vocab_folder, name, **asked) as model:
        vocab = model.vocab
        assert (vocab.add_bos, vocab.add_eos, vocab.add_sep) == (add_bos, add_eos, add_sep)
        if not add_eos and not add_sep:
            with pytest.raises(ParameterError, match="no rerank template"):
                prompts(vocab)
            return
        eos = vocab.eos if vocab.eos is not None else vocab.sep
        found, n_cut = prompts(vocab)
        for ids, document in zip(found, DOCUMENTS, strict=True):
            expected = [vocab.bos] if add_bos else []
            expected += plain(vocab, QUERY)
            expected += [eos] if add_eos else []
            expected += [vocab.sep] if add_sep else []
            expected += plain(vocab, document)
            expected += [eos] if add_eos else []
            assert ids == expected
        assert n_cut == 0


def test_special_tokens_in_texts_are_not_read(bert: _core.Vocab) -> None:
    found, _ = rerank_prompts(bert, "[SEP]", ["[CLS]"], n_threads=1)
    assert found.ids(0).count(bert.sep) == 1
    assert found.ids(0).count(bert.bos) == 1


def test_a_token_that_the_vocabulary_lacks_is_named(vocab_folder: Path) -> None:
    asked = {"add_sep_token": True}
    with (
        vocabulary(vocab_folder, "llama-spm", **asked) as model,
        pytest.raises(ParameterError, match="SEP"),
    ):
        prompts(model.vocab)
    with (
        vocabulary(vocab_folder, "nomic-bert-moe", bos_token_id=2**31 - 1) as model,
        pytest.raises(ParameterError, match="BOS"),
    ):
        prompts(model.vocab)


def test_a_template_is_filled_in_and_tokenised_as_a_whole(spm: _core.Vocab) -> None:
    found, n_cut = prompts(spm, template=TEMPLATE)
    for ids, document in zip(found, DOCUMENTS, strict=True):
        text = f"<s>Query: {QUERY}\nDocument: {document}</s> relevant?"
        assert ids == spm.tokenize(text, False, True)
        assert (ids[0], ids.count(2)) == (spm.bos, 1)
    assert n_cut == 0


def test_placeholders_in_texts_stay(spm: _core.Vocab) -> None:
    found, _ = rerank_prompts(spm, "{document}", ["{query}"], template=TEMPLATE, n_threads=1)
    text = "<s>Query: {document}\nDocument: {query}</s> relevant?"
    assert found.ids(0) == spm.tokenize(text, False, True)


@pytest.mark.parametrize("template", ["", "{query}", "{document} only"])
def test_a_template_without_placeholders_is_refused(spm: _core.Vocab, template: str) -> None:
    with pytest.raises(ParameterError, match="template: it has no"):
        prompts(spm, template=template)


def test_one_string_is_no_list_of_documents(spm: _core.Vocab) -> None:
    with pytest.raises(ParameterError, match="documents"):
        rerank_prompts(spm, QUERY, "document", n_threads=1)


def test_documents_are_cut_and_the_rest_stays(bert: _core.Vocab) -> None:
    whole, _ = prompts(bert)
    found, n_cut = prompts(bert, max_tokens=8)
    assert n_cut == sum(len(ids) > 8 for ids in whole) > 0
    assert found == [ids[:8] for ids in whole]
    n_query = len(plain(bert, QUERY)) + 2
    with pytest.raises(errors.ContextLengthError, match="no room is left"):
        prompts(bert, max_tokens=n_query)
    assert all(len(ids) <= n_query + 1 for ids in prompts(bert, max_tokens=n_query + 1)[0])


def test_the_end_of_a_cut_prompt_stays(vocab_folder: Path) -> None:
    with vocabulary(vocab_folder, "nomic-bert-moe") as model:
        whole, _ = prompts(model.vocab)
        found, n_cut = prompts(model.vocab, max_tokens=10)
    assert n_cut > 0
    for ids, before in zip(found, whole, strict=True):
        assert ids == (before if len(before) <= 10 else [*before[:9], before[-1]])


def test_documents_in_a_template_are_cut(spm: _core.Vocab) -> None:
    whole, _ = prompts(spm, template=TEMPLATE)
    longest = max(map(len, whole))
    shortest = min(map(len, whole))
    end = spm.tokenize("</s> relevant?", False, True)
    for most in range(shortest + 1, longest + 1):
        found, n_cut = prompts(spm, template=TEMPLATE, max_tokens=most)
        assert n_cut == sum(len(ids) > most for ids in whole)
        for ids, before in zip(found, whole, strict=True):
            assert len(ids) <= most
            if len(before) <= most:
                assert ids == before
            else:
                assert most - len(ids) <= 2
                assert ids[-len(end) :] == end
    with pytest.raises(errors.ContextLengthError, match="no room is left"):
        prompts(spm, template=TEMPLATE, max_tokens=5)


def test_documents_are_sorted_by_score() -> None:
    found = rank_documents([0.5, -2.0, 3.0, 0.5], ["a", "b", "c", "d"])
    assert found == [
        RerankResult(2, 3.0, "c"),
        RerankResult(0, 0.5, "a"),
        RerankResult(3, 0.5, "d"),
        RerankResult(1, -2.0, "b"),
    ]
    assert [result.index for result in rank_documents([1, 2, 3], ["a", "b", "c"], top_n=2)] == [
        2,
        1,
    ]
    assert rank_documents([], []) == []
    assert rank_documents([1.0], ["a"], top_n=0) == []
    with pytest.raises(ParameterError, match="top_n"):
        rank_documents([1.0], ["a"], top_n=-1)
    with pytest.raises(ValueError, match="zip"):
        rank_documents([1.0], ["a", "b"])


def test_sigmoid_maps_scores_to_probabilities() -> None:
    found = rank_documents([0.0, 1000.0, -1000.0, 1.0], ["a", "b", "c", "d"], sigmoid=True)
    assert [result.document for result in found] == ["b", "d", "a", "c"]
    assert [result.score for result in found] == pytest.approx([1, 0.7310585786, 0.5, 0])
