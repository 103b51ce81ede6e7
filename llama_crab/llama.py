"""The synchronous facade: `Llama`."""

from __future__ import annotations

import os
import time
from collections.abc import Mapping, Sequence
from types import TracebackType
from typing import Any

from . import _core, logs
from .chat_methods import ChatMethods
from .chat_request import ChatRequests
from .completion_methods import CompletionMethods
from .engine import EmbeddingScheduler, Engine, Scheduler
from .errors import BackendUnavailableError
from .lora import LoraSets
from .model_identity import state_key
from .params import LlamaParams, ParameterError
from .request_builder import RequestBuilder
from .vector_methods import VectorMethods, cannot_generate

TYPE_CHECKING = False
if TYPE_CHECKING:
    from .engine.snapshots import SnapshotStore


class Llama(ChatMethods, CompletionMethods, VectorMethods):
    """A model ready to complete text.

    ``Llama("model.gguf", n_ctx=2048)`` or ``Llama.load(LlamaParams("model.gguf", n_ctx=2048))``;
    without a model the small demo model is used. Keyword arguments are `LlamaParams` fields.

    Raises `ModelNotFoundError`, `ModelLoadError`, `ContextCreateError`, `ParameterError`.
    Thread-safety: any thread may call any method; calls that run at the same time share batches,
    up to ``n_seq_max`` sequences. There is no second thread unless `submit` is used.
    """

    def __init__(self, model: str | os.PathLike[str] | None = None, **fields: Any) -> None:
        self._open(LlamaParams.from_dict({**fields, "model": model}))

    @classmethod
    def load(cls, params: LlamaParams) -> Llama:
        """Load the model that `params` describes."""
        llama = cls.__new__(cls)
        llama._open(params)
        return llama

    def _open(self, params: LlamaParams) -> None:
        # Not at import time: a program that only looks at names does not pay for them.
        from .hub import resolve_model
        from .tuning.probe import default_n_threads

        started = time.perf_counter()
        logs.set_verbose(params.verbose)
        path = resolve_model(params.model)
        try:
            params = self._place(path, params)
            self._model = _core.Model(path, **params.model_params())
            if not self._model.has_decoder or self._model.has_encoder:
                raise ParameterError(f"model: {path} is an encoder-decoder model")
            if params.embeddings is None and cannot_generate(self._model):
                params = params.replace(embeddings=True)
            self.params = params.resolve(
                n_ctx_train=self._model.n_ctx_train,
                n_threads=default_n_threads(),
                offloaded=_core.supports_gpu_offload() and params.n_gpu_layers != 0,
            )
            self._context = _core.Context(self._model, **self.params.context_params())
            self._vocab = self._model.vocab
            if self.params.embeddings:
                self._engine: Engine[Any] = Engine(EmbeddingScheduler(self._context))
            else:
                self._state_key = state_key(self._model, self.params)
                store = self._snapshots()
                scheduler = Scheduler(self._context, store, self.params.max_itl_ms)
                self._engine = Engine(scheduler)
                self._lora = LoraSets(self._model, self._engine)
                self._builder = RequestBuilder(self._vocab, self.params, self.n_ctx, self._lora)
                self._chats = ChatRequests(self._model, self._vocab, self.params, self._builder)
        finally:
            logs.flush()
        self._name = path.name
        self.load_sec = time.perf_counter() - started
        """Seconds that loading the model and creating the context took."""

    @staticmethod
    def _place(path: os.PathLike[str], params: LlamaParams) -> LlamaParams:
        """Return `params` with the layers for the GPU; raise where one is asked for in vain."""
        n_gpu_layers = params.n_gpu_layers
        if not _core.supports_gpu_offload():
            if isinstance(n_gpu_layers, int) and n_gpu_layers > 0:
                raise BackendUnavailableError(
                    f"n_gpu_layers={n_gpu_layers}, but no GPU backend with a device is "
                    "compiled in (see `llama-crab info`)"
                )
            return params
        if isinstance(n_gpu_layers, int):
            return params
        from .tuning.fit import fit_params

        return fit_params(path, params)

    @property
    def model(self) -> _core.Model:
        """The core's model: metadata, sizes, vocabulary."""
        return self._model

    @property
    def context(self) -> _core.Context:
        """The core's context. Its memory belongs to the engine: read, do not change it."""
        return self._context

    @property
    def n_ctx(self) -> int:
        """Tokens that one request can use, prompt and answer together."""
        return self._context.n_ctx_seq

    def stats(self) -> Mapping[str, Any]:
        """Return counts of the engine.

        Sequences that run, wait and were suspended; steps and decoded tokens; cells of the KV
        cache, and bytes and entries of the prefix cache outside of it.
        """
        return self._engine.stats()

    def drain(self, timeout: float | None = None) -> bool:
        """Refuse new requests and wait for those that are there; return whether all have ended.

        `timeout` is in seconds; what has not ended then goes on until `close`.
        """
        return self._engine.drain(timeout)

    def close(self) -> None:
        """Free context, model and adapters; running requests end as cancelled. Idempotent.

        Answers can still be read, but for log-probabilities, which need the vocabulary.
        """
        self._engine.close()
        if not self.params.embeddings:
            self._lora.close()
            self._chats.close()
        self._vocab.close()
        self._model.close()

    def __enter__(self) -> Llama:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self.close()

    def __repr__(self) -> str:
        if self._engine.closed:
            return f"<Llama {self._name} closed>"
        return f"<Llama {self._name} {self._model.desc!r} n_ctx={self.n_ctx}>"

    def tokenize(
        self, text: str, *, add_special: bool = True, parse_special: bool = True
    ) -> list[int]:
        """Return the token ids of `text`.

        `add_special` adds BOS/EOS as the model asks; `parse_special` reads special tokens written
        in the text. Wraps ``llama_tokenize``.
        """
        return self._vocab.tokenize(text, add_special, parse_special)

    def detokenize(self, tokens: Sequence[int], *, special: bool = False) -> str:
        """Return the text of `tokens`; `special` renders special tokens.

        Bytes that are no UTF-8 become U+FFFD. Wraps ``llama_detokenize``.
        """
        return self._vocab.detokenize(tokens, False, special).decode("utf-8", "replace")

    def _snapshots(self) -> SnapshotStore | None:
        """Return the place for what has to leave the KV cache."""
        params = self.params
        if not params.cache_ram_mib and not params.cache_disk_mib:
            return None
        from pathlib import Path

        from .engine.snapshots import SnapshotStore

        folder = None if params.cache_dir is None else Path(params.cache_dir)
        return SnapshotStore(
            self._state_key, params.cache_ram_mib << 20, folder, params.cache_disk_mib << 20
        )
