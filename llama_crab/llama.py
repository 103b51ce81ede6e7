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
from .perf import Measurement, Perf, PerfMeter
from .request_builder import RequestBuilder
from .speculative import Drafts
from .vector_methods import VectorMethods, cannot_generate

TYPE_CHECKING = False
if TYPE_CHECKING:
    from .draft_sources import DraftSources
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

    @classmethod
    def _load_on(cls, model: _core.Model, params: LlamaParams) -> Llama:
        """Return an object on weights that the caller has loaded, and closes after it.

        `params` are resolved: they say what the weights were loaded with.
        """
        llama = cls.__new__(cls)
        llama._open(params, model)
        return llama

    def _open(self, params: LlamaParams, model: _core.Model | None = None) -> None:
        started = time.perf_counter()
        self._owns_model = model is None
        if model is None and params.profile is not None:
            from .tuning.profile import apply_profile

            params = apply_profile(params)
        try:
            if model is None:
                self._model, params = open_model(params)
                self.params = resolve_params(params, self._model)
            else:
                self._model, self.params = model, params
            self._context = _core.Context(self._model, **self.params.context_params())
            self._vocab = self._model.vocab
            if self.params.embeddings:
                self._engine: Engine[Any] = Engine(EmbeddingScheduler(self._context))
            else:
                self._state_key = state_key(self._model, self.params)
                store = self._snapshots()
                scheduler = Scheduler(self._context, store, self.params.max_itl_ms)
                self._engine = Engine(scheduler)
                self._meter = PerfMeter(scheduler.stepper.counters, scheduler.tally)
                self._lora = LoraSets(self._model, self._engine)
                self._draft_sources = self._open_draft_sources(scheduler.stepper)
                drafts = self._drafts(scheduler.stepper)
                self._builder = RequestBuilder(
                    self._vocab, self.params, self.n_ctx, self._lora, drafts
                )
                self._chats = ChatRequests(self._model, self._vocab, self.params, self._builder)
        finally:
            logs.flush()
        path = self._model.path
        self._name = os.path.basename(path if isinstance(path, str) else path[0])
        self.load_sec = time.perf_counter() - started
        """Seconds that loading the model and creating the context took."""

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

    @property
    def perf(self) -> Perf:
        """Counts, seconds and latencies over all requests since the load or `reset_perf`.

        Reading it waits for nothing, and works after `close`, too. llama.cpp's own counters are at
        ``llama.context``. Raises `ParameterError` for a model that embeds.
        """
        self._require_text()
        return self._meter.perf

    def reset_perf(self) -> None:
        """Let `perf` count from here on; measurements are not touched."""
        self._require_text()
        self._meter.reset()

    def measure(self) -> Measurement:
        """Measure a block: ``with llama.measure() as m: ...``, then ``m.perf``.

        All requests of this model count with what they do in the block, whoever asked for them.
        """
        self._require_text()
        return Measurement(self._meter)

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
            if self._draft_sources is not None:
                self._draft_sources.close()
            self._lora.close()
            self._chats.close()
        if self._owns_model:
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

    def _drafts(self, stepper: _core.Stepper) -> Drafts:
        """Return what makes drafts of the kinds that requests may ask for."""
        return Drafts(
            self.params.speculative,
            can_draft=stepper.can_draft,
            n_rows=self._context.n_outputs_max - self._context.n_seq_max,
            cache=None if self._draft_sources is None else self._draft_sources.cache,
        )

    def _open_draft_sources(self, stepper: _core.Stepper) -> DraftSources | None:
        if self.params.speculative is None:
            return None
        from .draft_sources import DraftSources

        return DraftSources(self.params, stepper)

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


def open_model(params: LlamaParams) -> tuple[_core.Model, LlamaParams]:
    """Load the weights that `params` describes; return `params` fitted to the devices as well.

    Raises `ModelNotFoundError`, `ModelLoadError`, `BackendUnavailableError`, `ParameterError`.
    """
    # Not at import time: a program that only looks at names does not pay for them.
    from .hub import resolve_model

    logs.set_verbose(params.verbose)
    path = resolve_model(params.model)
    try:
        params = _place(path, params)
        model = _core.Model(path, **params.model_params())
        if not model.has_decoder or model.has_encoder:
            raise ParameterError(f"model: {path} is an encoder-decoder model")
        return model, params
    finally:
        logs.flush()


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
    if n_gpu_layers is not None:
        return params
    from .tuning.fit import fit_params

    return fit_params(path, params)


def resolve_params(params: LlamaParams, model: _core.Model) -> LlamaParams:
    """Return `params` with our defaults for this model and machine filled in."""
    from .tuning.probe import default_n_threads

    if params.embeddings is None and cannot_generate(model):
        params = params.replace(embeddings=True)
    return params.resolve(
        n_ctx_train=model.n_ctx_train,
        n_threads=default_n_threads(),
        offloaded=offloads(params),
    )


def offloads(params: LlamaParams) -> bool:
    """Return whether a GPU computes layers."""
    return _core.supports_gpu_offload() and params.n_gpu_layers != 0
