"""The part of the facade that completes text."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterable, Mapping, Sequence
from functools import partial
from typing import Any, Literal, Unpack, overload

from . import _core
from .completion import Completion, CompletionChunk
from .engine import Engine
from .lora import LoraSets
from .params import LlamaParams, ParameterError
from .request_builder import (
    UNREAD_CHUNKS,
    CallbackOptions,
    CompletionOptions,
    Prompt,
    RequestBuilder,
)
from .session import Session
from .stream import CompletionStream

TYPE_CHECKING = False
if TYPE_CHECKING:
    from .handle import CompletionHandle
    from .lora import LoraChoice
    from .mapping import CompletionMap


class CompletionMethods:
    """Methods of `Llama` for a model that generates."""

    params: LlamaParams
    load_sec: float
    _engine: Engine[Any]
    _context: _core.Context
    _vocab: _core.Vocab
    _lora: LoraSets
    _builder: RequestBuilder
    _state_key: Mapping[str, Any]
    _name: str

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
        speculative
            What drafts come from: ``"auto"``, `PromptLookupDecoding`, a `DraftModel` of your own,
            None for no drafts; default: the params' choice. Without effect on requests with
            `logits_processors`.
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
                    break
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
            prompt, max_tokens, stream=stream, n_news_max=UNREAD_CHUNKS, **options
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
            n_ctx=self._context.n_ctx_seq,
            n_batch=max(4, min(self._context.n_batch, self._context.n_ctx_seq - n_predict)),
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
