"""The synchronous facade: `Llama`."""

from __future__ import annotations

import os
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from functools import partial
from types import TracebackType
from typing import Any, Literal, Unpack, overload

from . import _core, logs
from .completion import Completion, CompletionChunk
from .engine import EmbeddingScheduler, Engine, Scheduler
from .errors import BackendUnavailableError
from .lora import LoraSets
from .model_identity import state_key
from .params import LlamaParams, ParameterError
from .request_builder import CallbackOptions, CompletionOptions, Prompt, RequestBuilder
from .session import Session
from .stream import CompletionStream
from .vector_methods import VectorMethods, cannot_generate

TYPE_CHECKING = False
if TYPE_CHECKING:
    from .engine.snapshots import SnapshotStore
    from .handle import CompletionHandle
    from .lora import LoraChoice
    from .mapping import CompletionMap

# A reader that is so many chunks behind has its request held.
_UNREAD_CHUNKS = 64


class Llama(VectorMethods):
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
            if (params.n_gpu_layers or 0) > 0 and not _core.supports_gpu_offload():
                raise BackendUnavailableError(
                    f"n_gpu_layers={params.n_gpu_layers}, but no GPU backend with a device is "
                    "compiled in (see `llama-crab info`)"
                )
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
        finally:
            logs.flush()
        self._name = path.name
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

    @overload
    def create_completion(
        self,
        prompt: Prompt,
        max_tokens: int | None = ...,
        *,
        stream: Literal[False] = ...,
        **options: Unpack[CallbackOptions],
    ) -> Completion: ...

    @overload
    def create_completion(
        self,
        prompt: Prompt,
        max_tokens: int | None = ...,
        *,
        stream: Literal[True],
        **options: Unpack[CompletionOptions],
    ) -> CompletionStream: ...

    def create_completion(
        self,
        prompt: Prompt,
        max_tokens: int | None = 128,
        *,
        stream: bool = False,
        callback: Callable[[CompletionChunk], object] | None = None,
        **options: Any,
    ) -> Completion | CompletionStream:
        """Continue `prompt` (text, or token ids) by up to `max_tokens` tokens.

        Parameters
        ----------
        prompt
            Text is tokenised with BOS and special tokens as the model asks; ids are taken as is.
        max_tokens
            None goes on until the model ends or the context is full; 0 evaluates the prompt only.
        stream
            Return a `CompletionStream` of `CompletionChunk` instead of a `Completion`.
        callback
            Called with each chunk; return False to end the request as ``"cancelled"``. Not with
            `stream`.
        sampler
            How tokens are chosen; default: the params' sampler, else llama.cpp's default chain.
        seed
            Random seed in [0, 2**32 - 2]; default: a new one, reported as ``completion.seed``.
            A stage's own seed wins; choice i uses seed + i.
        stop, stop_tokens, include_stop
            Strings (also across token borders) and token ids that end the answer. The stop string
            is left out of the text unless `include_stop`.
        min_tokens
            Tokens before which neither the model nor a stop token may end the answer.
        ignore_eos
            Never sample a token that ends the generation.
        n, best_of
            Answers to return, and to generate; the best by mean log-probability are returned. All
            share one prefill.
        logprobs
            Report each token's log-probability under the model (before any sampler stage), and
            those of the `logprobs` most probable tokens.
        logit_bias
            Added to the logits of these token ids; ``-inf`` bans one.
        echo
            Put the prompt in front of the text; with `logprobs`, its log-probabilities too.
        suffix
            Text after the gap (fill in the middle); needs a model with FIM tokens.
        special
            Render control tokens in the text.
        cache_prompt
            Reuse what an earlier request with the same beginning left in memory.
        logits_processors
            Called in order before each token is sampled, as ``f(tokens, logits)``: the ids so far
            (int32, read-only) and a copy of the logits (float32, shape (n_vocab,)) to be changed in
            place; by whichever thread drives the loop. An object with ``process_batch(tokens,
            logits)`` gets the rows of all running sequences that use it at once, as a list of id
            arrays and logits of shape (n_rows, n_vocab). The arrays are for the call: keep copies.
            An exception ends the request and is raised here.
        priority
            A higher one is served first, also by suspending running requests of lower priority; a
            unit counts as 10 s of waiting, so a low one is late and not never.
        timeout
            Seconds after which the request ends with `RequestTimeoutError`, waiting included.
        lora
            A `LoraAdapter` of `load_lora`, or a mapping of several to their scales.
        session
            A `Session` that the prompt and the answer are appended to.
        response_format, grammar, regex, choices, lark
            One of them, the answer's form, read as ``completion.parsed``: OpenAI's mapping, a
            pydantic model, dataclass or TypedDict; GBNF; a pattern; texts of which it is one; a
            Lark grammar.

        Raises `ContextLengthError` for a prompt that does not fit, `ParameterError` and
        `InvalidTokenError` for wrong values, `SchemaError`, `RegexError`, `GrammarError`,
        `SamplerError`, `DecodeError`, `AdapterError`, `RequestTimeoutError`, and `ContextBusyError`
        for a session in use. ``KeyboardInterrupt`` ends the request within one step and leaves the
        object usable.
        """
        if callback is not None and not callable(callback):
            raise ParameterError(f"callback: {callback!r} cannot be called")
        if stream and callback is not None:
            raise ParameterError("callback: not with stream=True, which gives the chunks itself")
        self._require_text()
        wants_chunks = stream or callback is not None
        request, echo = self._builder.completion(prompt, max_tokens, stream=wants_chunks, **options)
        job = CompletionStream(self._engine, request, self._vocab, echo, self._name, self.load_sec)
        if stream:
            return job
        with job:
            for chunk in job:
                if callback is not None and callback(chunk) is False:
                    job.close()
            return job.result()

    def submit(
        self,
        prompt: Prompt,
        max_tokens: int | None = 128,
        *,
        stream: bool = False,
        **options: Unpack[CompletionOptions],
    ) -> CompletionHandle:
        """Start a completion in the background and return a handle to read, await or cancel it.

        The options are those of `create_completion`; with `stream` the handle gives chunks as they
        come. The first call starts the engine's thread, which serves all calls from then on.
        """
        return self._submit(stream, prompt, max_tokens, None, options)

    def _submit(
        self,
        stream: bool,
        prompt: Prompt,
        max_tokens: int | None,
        listener: Callable[[], object] | None,
        options: Mapping[str, Any],
    ) -> CompletionHandle:
        from .handle import CompletionHandle  # with asyncio

        self._require_text()
        request, echo = self._builder.completion(
            prompt, max_tokens, stream=stream, n_news_max=_UNREAD_CHUNKS, **options
        )
        request.listener = listener
        self._engine.start()
        return CompletionHandle(self._engine, request, self._vocab, echo, self._name, self.load_sec)

    @overload
    def map(
        self,
        prompts: Iterable[Prompt | Mapping[str, Any]],
        max_tokens: int | None = ...,
        *,
        progress: bool = ...,
        return_exceptions: Literal[False] = ...,
        **options: Unpack[CompletionOptions],
    ) -> CompletionMap[Completion]: ...

    @overload
    def map(
        self,
        prompts: Iterable[Prompt | Mapping[str, Any]],
        max_tokens: int | None = ...,
        *,
        progress: bool = ...,
        return_exceptions: bool,
        **options: Unpack[CompletionOptions],
    ) -> CompletionMap[Completion | Exception]: ...

    def map(
        self,
        prompts: Iterable[Prompt | Mapping[str, Any]],
        max_tokens: int | None = 128,
        *,
        progress: bool = False,
        return_exceptions: bool = False,
        **options: Unpack[CompletionOptions],
    ) -> CompletionMap[Any]:
        """Complete many prompts; iterate over the results, which come in the order of the prompts.

        `prompts` is pulled as needed, so it may be endless. A prompt may be a mapping, ``{"prompt":
        ..., "max_tokens": ..., **options}``, whose entries win over those given here. `progress`
        shows a bar on stderr.

        A prompt's error is raised when its turn comes and cancels the rest; with
        `return_exceptions` it is given in the result's place. Closing the iterator cancels, too.
        Runs in the engine's thread, as `submit`.
        """
        from .mapping import CompletionMap, ProgressBar, Window, n_in_flight

        submit = partial(self._submit, False)
        n_running_max = n_in_flight(self._context.n_seq_max)
        window = Window(submit, prompts, max_tokens, options, n_running_max)
        bar = ProgressBar.over(prompts) if progress else None
        return CompletionMap(window, return_exceptions=return_exceptions, bar=bar)

    def load_lora(self, path: str | os.PathLike[str]) -> _core.LoraAdapter:
        """Load a LoRA adapter, to be named by requests (``lora=``) with or without a scale.

        Raises `ModelNotFoundError`, `AdapterError`. Wraps ``llama_adapter_lora_init``.
        """
        self._require_text()
        return self._lora.load(path)

    def session(self) -> Session:
        """Return an empty conversation that keeps its place in the KV cache."""
        self._require_text()
        return Session(self._engine, self._state_key)

    def load_session(
        self, path: str | os.PathLike[str], *, lora: LoraChoice | None = None
    ) -> Session:
        """Return the conversation that `Session.save` wrote, without computing it again.

        `lora` must be what it was computed with. Raises `StateError` for a damaged file or one of
        another model, naming what differs; FileNotFoundError.
        """
        self._require_text()
        return Session.load(path, self._engine, self._state_key, self._lora.index(lora))

    def complete_infill(
        self,
        prefix: str | Sequence[int],
        suffix: str | Sequence[int],
        max_tokens: int | None = 128,
        *,
        prompt: str = "",
        extra: Iterable[tuple[str, str]] = (),
        repository: str = "myproject",
        filename: str = "filename",
        spm_infill: bool = False,
        **options: Any,
    ) -> Completion:
        """Fill the gap between `prefix` and `suffix` (texts or token ids) of a file.

        Parameters
        ----------
        prompt
            The beginning of what is to be filled in.
        extra
            Other files as (filename, text), for models that know several.
        repository, filename
            Names for the model, where its vocabulary has tokens for them.
        spm_infill
            The suffix first, for models that were trained so.

        Long texts are cut to what fits, around the gap. The other arguments are those of
        `create_completion`. Raises `ParameterError` when the model has no FIM tokens.
        """
        from .infill import infill_prompt

        self._require_text()
        n_predict = 0 if max_tokens is None else max_tokens
        ids = infill_prompt(
            self._vocab,
            prefix,
            suffix,
            n_ctx=self.n_ctx,
            n_batch=max(4, min(self._context.n_batch, self.n_ctx - n_predict)),
            prompt=prompt,
            extra=extra,
            n_predict=n_predict,
            spm_infill=spm_infill,
            repository=repository,
            filename=filename,
        )
        completion: Completion = self.create_completion(ids, max_tokens, **options)
        return completion

    def _require_text(self) -> None:
        if self.params.embeddings:
            raise ParameterError("embeddings: the model was loaded to embed; it cannot complete")

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
