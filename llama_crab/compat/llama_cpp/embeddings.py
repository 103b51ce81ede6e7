"""The part of the compat `Llama` that embeds."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from ... import _core

if TYPE_CHECKING:
    from ...llama import Llama as CrabLlama
    from .llama_types import CreateEmbeddingResponse


class EmbeddingMethods:
    """Methods of a model that was loaded with ``embedding=True``."""

    model_path: str
    n_batch: int
    _vocab: _core.Vocab

    if TYPE_CHECKING:

        @property
        def crab(self) -> CrabLlama:
            """The `llama_crab.Llama` that does the work."""

    def create_embedding(
        self, input: str | Sequence[str], model: str | None = None
    ) -> CreateEmbeddingResponse:
        """Return OpenAI's list of embeddings, as `embed` gives them."""
        texts = [input] if isinstance(input, str) else list(input)
        vectors, n_tokens = self.embed(texts, return_count=True)
        return {
            "object": "list",
            "data": [
                {"object": "embedding", "embedding": vector, "index": index}
                for index, vector in enumerate(vectors)
            ],
            "model": self.model_path if model is None else model,
            "usage": {"prompt_tokens": n_tokens, "total_tokens": n_tokens},
        }

    def embed(
        self,
        input: str | Sequence[str],
        normalize: bool = False,
        truncate: bool = True,
        return_count: bool = False,
    ) -> Any:
        """Return a list of floats per text, or of one list per token with pooling ``none``.

        A single text gives its list alone. `truncate` cuts at ``n_batch`` tokens; otherwise a
        longer text is a `ContextLengthError`. With `return_count` a pair with the number of tokens.
        Raises as `llama_crab.Llama.embed`.
        """
        texts = [input] if isinstance(input, str) else list(input)
        ids = [self._vocab.tokenize(text, True, False) for text in texts]
        if truncate:
            ids = [tokens[: self.n_batch] for tokens in ids]
        rows = self.crab.create_embedding(ids, normalize=normalize).vectors.tolist()
        if self.crab.context.pooling_type == "none":
            ends = [sum(map(len, ids[: i + 1])) for i in range(len(ids))]
            rows = [rows[end - len(tokens) : end] for end, tokens in zip(ends, ids, strict=True)]
        found = rows[0] if isinstance(input, str) else rows
        return (found, sum(map(len, ids))) if return_count else found
