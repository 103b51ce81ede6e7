"""The part of the facade that turns texts into vectors and scores: `embed` and `rerank`."""

from __future__ import annotations

from collections.abc import Iterable, Sequence

from . import _core
from .engine import EmbeddingRequest, Engine
from .params import LlamaParams, ParameterError

TYPE_CHECKING = False
if TYPE_CHECKING:
    from typing import Any

    import numpy as np
    import numpy.typing as npt

    from .embedding import Embeddings
    from .rerank import RerankResult


def cannot_generate(model: _core.Model) -> bool:
    """Whether a model sees all of a text at once, as BERT and its like, and so only embeds."""
    metadata = model.metadata
    arch = metadata.get("general.architecture", "")
    return metadata.get(f"{arch}.attention.causal") == "false"


class VectorMethods:
    """Methods of `Llama` for a model that was loaded with ``embeddings=True``."""

    params: LlamaParams
    _engine: Engine[Any]
    _context: _core.Context
    _model: _core.Model
    _vocab: _core.Vocab
    _name: str

    def embed(
        self,
        texts: str | Iterable[str | Sequence[int]],
        *,
        dimensions: int | None = None,
        normalize: bool = True,
        truncate: bool = False,
        priority: int = 0,
        timeout: float | None = None,
    ) -> npt.NDArray[np.float32]:
        """Return the embeddings of `texts` as a float32 array of shape (n_texts, n_dims).

        Parameters
        ----------
        texts
            Several texts, or lists of token ids; a single text gives an array of shape (n_dims,).
        dimensions
            Keep only so many leading values (Matryoshka embeddings), before normalising.
        normalize
            Scale each row to length 1.
        truncate
            Cut texts that are too long, at their end; otherwise they are an error.
        priority, timeout
            As for `create_completion`.

        With ``pooling_type="none"`` there is a row for each token, text after text, also for a
        single text. Texts of calls that run at the same time share batches.

        Raises `ParameterError`, `InvalidTokenError`, `ContextLengthError`, `DecodeError`,
        `RequestTimeoutError`.
        Wraps ``llama_encode`` or ``llama_decode``, ``llama_get_embeddings_seq``.
        """
        many = [texts] if isinstance(texts, str) else texts
        per_token = self._context.pooling_type == "none"
        vectors = self.create_embedding(
            many,
            dimensions=dimensions,
            normalize=normalize,
            truncate=truncate,
            priority=priority,
            timeout=timeout,
        ).vectors
        return vectors[0] if isinstance(texts, str) and not per_token else vectors

    def create_embedding(
        self,
        texts: Iterable[str | Sequence[int]],
        *,
        dimensions: int | None = None,
        normalize: bool = True,
        truncate: bool = False,
        priority: int = 0,
        timeout: float | None = None,
    ) -> Embeddings:
        """Return the same with token counts and the number of cut texts, for OpenAI's shape."""
        from .embedding import Embeddings, EmbeddingUsage, embedding_request, tokenize_texts

        embedder = self._require_embedder()
        if embedder.context.pooling_type == "rank":
            raise ParameterError("embed: the model is a reranker: it gives scores, see rerank()")
        most = embedder.n_text_tokens_max if truncate else None
        n_threads = self.params.n_threads or 1
        ids, n_cut = tokenize_texts(self._vocab, texts, n_threads=n_threads, max_tokens=most)
        request = embedding_request(
            embedder,
            ids,
            dimensions=dimensions,
            normalize=normalize,
            priority=priority,
            timeout=timeout,
        )
        self._run(request)
        usage = EmbeddingUsage(sum(request.lengths))
        return Embeddings(request.vectors, usage, self._name, n_cut)

    def rerank(
        self,
        query: str,
        documents: Sequence[str],
        *,
        top_n: int | None = None,
        sigmoid: bool = False,
        truncate: bool = False,
        priority: int = 0,
        timeout: float | None = None,
    ) -> list[RerankResult]:
        """Return the documents with their relevance to `query`, the most relevant first.

        Parameters
        ----------
        top_n
            Return only so many.
        sigmoid
            Map the scores, which are logits of most models, to 0..1.
        truncate
            Cut documents that are too long, at their end; otherwise they are an error.
        priority, timeout
            As for `create_completion`.

        The prompt is the GGUF's ``rerank`` template, or query and document with the vocabulary's
        separators. Raises `ParameterError` when the model is no reranker; else as `embed`.
        """
        from .embedding import embedding_request
        from .rerank import rank_documents, require_top_n, rerank_prompts

        require_top_n(top_n)
        embedder = self._require_embedder()
        if embedder.context.pooling_type != "rank":
            raise ParameterError("rerank: the model is no reranker (pooling_type is not 'rank')")
        prompts, _ = rerank_prompts(
            self._vocab,
            query,
            documents,
            n_threads=self.params.n_threads or 1,
            template=self._model.chat_template("rerank"),
            max_tokens=embedder.n_text_tokens_max if truncate else None,
        )
        request = embedding_request(
            embedder, prompts, normalize=False, priority=priority, timeout=timeout
        )
        self._run(request)
        scores = request.vectors[:, 0].tolist()
        return rank_documents(scores, documents, top_n=top_n, sigmoid=sigmoid)

    def _require_embedder(self) -> _core.Embedder:
        if not self.params.embeddings:
            raise ParameterError("embeddings: the model was loaded without embeddings=True")
        embedder: _core.Embedder = self._engine.scheduler.embedder
        return embedder

    def _run(self, request: EmbeddingRequest) -> None:
        try:
            self._engine.submit(request)
            while not request.done:
                self._engine.advance(request)
        except BaseException:
            self._engine.cancel(request)
            raise
        if request.error is not None:
            raise request.error
