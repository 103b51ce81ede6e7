"""Texts to embeddings: tokenising, packing into batches, and the result in OpenAI's shape."""

from __future__ import annotations

import base64
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Literal

from . import _core
from .engine import EmbeddingRequest
from .errors import ContextLengthError
from .params import ParameterError, require_integer
from .request_builder import deadline_us, require_priority

if TYPE_CHECKING:
    import numpy as np
    import numpy.typing as npt

    Vectors = npt.NDArray[np.float32]

EncodingFormat = Literal["float", "base64"]


@dataclass(frozen=True, slots=True)
class EmbeddingUsage:
    """Token counts of one request. Thread-safety: immutable."""

    prompt_tokens: int

    def to_dict(self) -> dict[str, int]:
        """Return OpenAI's ``usage`` object."""
        return {"prompt_tokens": self.prompt_tokens, "total_tokens": self.prompt_tokens}


@dataclass(frozen=True, slots=True, eq=False, repr=False)
class Embeddings:
    """The embeddings of texts, one row each.

    ``vectors`` is float32 of shape (n_texts, n_dims); ``n_truncated`` is how many texts were cut.
    Thread-safety: immutable, as far as nobody writes to the array.
    """

    vectors: Vectors
    usage: EmbeddingUsage
    model: str
    n_truncated: int = 0

    def to_dict(self, encoding_format: EncodingFormat = "float") -> dict[str, Any]:
        """Return the answer of OpenAI's ``/v1/embeddings``.

        ``"base64"`` gives each embedding as the Base64 text of its little-endian float32 values.
        Raises `ParameterError` for another format.
        """
        rows: list[Any]
        if encoding_format == "float":
            rows = self.vectors.tolist()
        elif encoding_format == "base64":
            rows = [base64.b64encode(row).decode() for row in self.vectors.astype("<f4")]
        else:
            raise ParameterError(f"encoding_format: {encoding_format!r} is no float or base64")
        return {
            "object": "list",
            "data": [
                {"object": "embedding", "index": i, "embedding": row} for i, row in enumerate(rows)
            ],
            "model": self.model,
            "usage": self.usage.to_dict(),
        }

    def __len__(self) -> int:
        return len(self.vectors)

    def __repr__(self) -> str:
        shape = " x ".join(map(str, self.vectors.shape))
        return f"Embeddings({shape}, {self.usage!r}, model={self.model!r})"


def tokenize_texts(
    vocab: _core.Vocab,
    texts: Iterable[str | Sequence[int]],
    *,
    n_threads: int,
    max_tokens: int | None = None,
) -> tuple[_core.TokenizedTexts, int]:
    """Return the token ids of `texts` and how many of them were cut to `max_tokens`.

    All texts are strings, tokenised with the model's BOS, EOS or SEP and with special tokens
    written in the text, or all are token ids, taken as they are. A cut text keeps the EOS or SEP
    that the model puts at the end.

    Raises `ParameterError` for a mixture, `TokenizeError`, `InvalidTokenError`.
    """
    if isinstance(texts, str):
        raise ParameterError("texts: expected several, not one string")
    if not isinstance(texts, Iterable):
        raise ParameterError(f"texts: expected texts or lists of token ids, not {texts!r}")
    strings: list[str] = []
    lists: list[Sequence[int]] = []
    for text in texts:
        if isinstance(text, str):
            strings.append(text)
        elif isinstance(text, (bytes, bytearray)):
            raise ParameterError(f"texts: expected texts or lists of token ids, not {text!r}")
        else:
            lists.append(text)
    if strings and lists:
        raise ParameterError("texts: either strings or token ids, not both")
    if lists:
        try:
            ids = _core.TokenizedTexts.from_ids(lists)
        except TypeError as error:
            raise ParameterError(f"texts: expected texts or lists of token ids: {error}") from None
    else:
        ids = vocab.tokenize_many(
            strings, add_special=True, parse_special=True, n_threads=n_threads
        )
    if max_tokens is None:
        return ids, 0
    # Of all families WPM alone adds its SEP without being asked.
    keep_last = vocab.add_eos or vocab.type == "wpm"
    return ids, ids.truncate(max_tokens, keep_last)


def embedding_request(
    embedder: _core.Embedder,
    texts: _core.TokenizedTexts,
    *,
    dimensions: int | None = None,
    normalize: bool = True,
    priority: int = 0,
    timeout: float | None = None,
) -> EmbeddingRequest:
    """Return a checked request whose ``vectors`` the engine fills.

    They are float32 of shape (n_texts, `dimensions`), in the order of the texts; with pooling
    ``none`` there is a row for each token, text after text. `dimensions` keeps the leading values
    (default: all), `normalize` then scales each row to length 1.

    Raises `ParameterError` for a text without tokens and for `dimensions` that the model does not
    have, `ContextLengthError` for a text that is too long.
    """
    import numpy as np

    begin_us = _core.time_us()
    if dimensions is None:
        dimensions = embedder.n_values
    require_integer("dimensions", dimensions, (1, embedder.n_values))
    lengths = texts.lengths()
    for i, length in enumerate(lengths):
        if length == 0:
            raise ParameterError(f"texts: text {i} has no tokens")
        if length > embedder.n_text_tokens_max:
            raise ContextLengthError(
                f"text {i} has {length} tokens, a text can have {embedder.n_text_tokens_max}"
            )
    first_rows = list(range(len(lengths) + 1))
    if embedder.per_token:
        first_rows = [0, *np.cumsum(lengths, dtype=np.int64).tolist()]
    return EmbeddingRequest(
        texts=texts,
        vectors=np.empty((first_rows[-1], dimensions), np.float32),
        first_rows=first_rows,
        normalize=normalize,
        priority=require_priority(priority),
        deadline_us=deadline_us(begin_us, timeout),
        submit_us=begin_us,
    )
