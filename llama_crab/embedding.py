"""Texts to embeddings: tokenising, packing into batches, and the result in OpenAI's shape."""

from __future__ import annotations

import base64
from collections import deque
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Literal

from . import _core
from .errors import ContextLengthError
from .params import ParameterError, require_integer

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
    strings: list[str] = []
    lists: list[Sequence[int]] = []
    for text in texts:
        if isinstance(text, str):
            strings.append(text)
        else:
            lists.append(text)
    if strings and lists:
        raise ParameterError("texts: either strings or token ids, not both")
    if lists:
        ids = _core.TokenizedTexts.from_ids(lists)
    else:
        ids = vocab.tokenize_many(
            strings, add_special=True, parse_special=True, n_threads=n_threads
        )
    if max_tokens is None:
        return ids, 0
    # Of all families WPM alone adds its SEP without being asked.
    keep_last = vocab.add_eos or vocab.type == "wpm"
    return ids, ids.truncate(max_tokens, keep_last)


def embed_texts(
    embedder: _core.Embedder,
    texts: _core.TokenizedTexts,
    *,
    dimensions: int | None = None,
    normalize: Literal["l2", "none"] = "l2",
    between: Callable[[], object] | None = None,
) -> Vectors:
    """Return the embeddings of all `texts`.

    The result is float32 of shape (n_texts, `dimensions`), in the order of the texts; with pooling
    ``none`` it has a row for each token, text after text. `dimensions` keeps the leading values
    (default: all), `normalize` then scales each row to length 1. `between` is called after each
    batch; what it raises ends the work and leaves the embedder usable.

    Raises `ParameterError` for a text without tokens and for `dimensions` that the model does not
    have, `ContextLengthError` for a text that is too long, both before anything is computed;
    `InvalidTokenError`, `DecodeError`. Thread-safety: one thread at a time.
    """
    import numpy as np

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
    vectors = np.empty((first_rows[-1], dimensions), np.float32)
    # The longest first, and the shortest into the room that is left.
    waiting = deque(sorted(range(len(lengths)), key=lengths.__getitem__, reverse=True))
    try:
        while waiting:
            while waiting and embedder.add(texts, waiting[0], vectors, first_rows[waiting[0]]):
                waiting.popleft()
            while waiting and embedder.add(texts, waiting[-1], vectors, first_rows[waiting[-1]]):
                waiting.pop()
            embedder.run(normalize)
            if between is not None:
                between()
    except BaseException:
        if not embedder.context.closed:
            embedder.clear()
        raise
    return vectors
