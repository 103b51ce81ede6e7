"""Reranking: the prompts of query and document that rerankers score, and the sorted result."""

from __future__ import annotations

import math
import re
from collections.abc import Sequence
from dataclasses import dataclass

from . import _core
from .errors import ContextLengthError
from .params import INT32_MAX, ParameterError, require_integer


@dataclass(frozen=True, slots=True)
class RerankResult:
    """A document with its relevance; ``index`` is its place in the request. Immutable."""

    index: int
    score: float
    document: str


def rank_documents(
    scores: Sequence[float],
    documents: Sequence[str],
    *,
    top_n: int | None = None,
    sigmoid: bool = False,
) -> list[RerankResult]:
    """Return the documents, the most relevant first; those of one score keep their order.

    `sigmoid` maps scores, which are logits of most models, to 0..1; `top_n` keeps the best.
    Raises `ParameterError` for a negative `top_n`.
    """
    require_top_n(top_n)
    found = [
        RerankResult(i, _sigmoid(score) if sigmoid else float(score), document)
        for i, (score, document) in enumerate(zip(scores, documents, strict=True))
    ]
    return sorted(found, key=lambda result: -result.score)[:top_n]


def require_top_n(top_n: int | None) -> None:
    """Raise `ParameterError` for a number of documents that cannot be."""
    if top_n is not None:
        require_integer("top_n", top_n, (0, INT32_MAX))


def _sigmoid(x: float) -> float:
    # Written for either sign, so that exp() cannot overflow.
    return 1 / (1 + math.exp(-x)) if x >= 0 else math.exp(x) / (1 + math.exp(x))


def rerank_prompts(
    vocab: _core.Vocab,
    query: str,
    documents: Sequence[str],
    *,
    n_threads: int,
    template: str | None = None,
    max_tokens: int | None = None,
) -> tuple[_core.TokenizedTexts, int]:
    """Return one prompt for each document, and how many documents were cut to fit `max_tokens`.

    With a `template` (the GGUF's chat template ``"rerank"``), its ``{query}`` and ``{document}``
    are replaced and special tokens are read, also those written in query and document. Without
    one the prompt is BOS, query, EOS, SEP, document, EOS, of which the specials appear as far as
    the vocabulary asks for them; SEP stands in for a missing EOS. Both as llama-server does it.

    Raises `ParameterError` when the template has no placeholders, or when there is neither a
    template nor a token between query and document; `ContextLengthError` when the query alone fills
    `max_tokens`; `TokenizeError`.
    """
    if isinstance(documents, str):
        raise ParameterError("documents: expected several texts, not one string")
    if template is not None:
        return _from_template(vocab, template, query, documents, n_threads, max_tokens)
    head, tail = _around(vocab)
    head += vocab.tokenize(query, False, False)
    head += _between(vocab, tail)
    found = vocab.tokenize_many(
        documents, add_special=False, parse_special=False, n_threads=n_threads
    )
    n_cut = 0
    if max_tokens is not None:
        room = max_tokens - len(head) - len(tail)
        if room < 1:
            raise _query_too_long(len(head) + len(tail), max_tokens)
        n_cut = found.truncate(room, False)
    prompts = [[*head, *found.ids(i), *tail] for i in range(len(found))]
    return _core.TokenizedTexts.from_ids(prompts), n_cut


def _around(vocab: _core.Vocab) -> tuple[list[int], list[int]]:
    """Return what comes before the query and after the document."""
    head = [_required(vocab.bos, "BOS")] if vocab.add_bos else []
    end = vocab.sep if vocab.eos is None else vocab.eos
    return head, [_required(end, "EOS or SEP")] if vocab.add_eos else []


def _between(vocab: _core.Vocab, tail: list[int]) -> list[int]:
    found = [*tail, *([_required(vocab.sep, "SEP")] if vocab.add_sep else [])]
    if not found:
        raise ParameterError(
            "rerank: the model has no rerank template, and its vocabulary adds no EOS or SEP"
        )
    return found


def _required(token: int | None, name: str) -> int:
    if token is None:
        raise ParameterError(f"rerank: the vocabulary adds {name}, but has no such token")
    return token


def _from_template(
    vocab: _core.Vocab,
    template: str,
    query: str,
    documents: Sequence[str],
    n_threads: int,
    max_tokens: int | None,
) -> tuple[_core.TokenizedTexts, int]:
    for name in ("{query}", "{document}"):
        if name not in template:
            raise ParameterError(f"template: it has no {name}")
    prompts = vocab.tokenize_many(
        [_fill(template, query, document) for document in documents],
        add_special=False,
        parse_special=True,
        n_threads=n_threads,
    )
    if max_tokens is None or max(prompts.lengths(), default=0) <= max_tokens:
        return prompts, 0
    ids = [prompts.ids(i) for i in range(len(prompts))]
    n_cut = 0
    for i, document in enumerate(documents):
        if len(ids[i]) > max_tokens:
            ids[i] = _fill_to(vocab, template, query, document, max_tokens)
            n_cut += 1
    return _core.TokenizedTexts.from_ids(ids), n_cut


def _fill(template: str, query: str, document: str) -> str:
    # In one pass: a query that contains "{document}" stays as it is.
    values = {"{query}": query, "{document}": document}
    return re.sub(r"\{query\}|\{document\}", lambda found: values[found[0]], template)


def _fill_to(
    vocab: _core.Vocab, template: str, query: str, document: str, max_tokens: int
) -> list[int]:
    """Return the prompt with as much of the document as fits.

    Tokens at the document's borders may join the template's, so lengths are found by trying.
    """
    tokens = vocab.tokenize(document, False, True)
    keep = len(tokens)
    while keep > 0:
        text = vocab.detokenize(tokens[:keep], False, True).decode("utf-8", "ignore")
        ids = vocab.tokenize(_fill(template, query, text), False, True)
        if len(ids) <= max_tokens:
            return ids
        keep -= len(ids) - max_tokens
    raise _query_too_long(len(vocab.tokenize(_fill(template, query, ""), False, True)), max_tokens)


def _query_too_long(n_tokens: int, max_tokens: int) -> ContextLengthError:
    return ContextLengthError(
        f"the query and the tokens around it are {n_tokens}, a prompt can have {max_tokens}: no "
        "room is left for a document"
    )
