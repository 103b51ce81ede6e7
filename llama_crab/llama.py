"""The synchronous facade: `Llama`."""

from __future__ import annotations

import operator
import os
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from types import TracebackType
from typing import Any, Literal, TypedDict, Unpack, overload

from . import _core, logs
from .completion import Completion, CompletionChunk
from .engine import Engine, Request
from .engine.request import new_seed
from .errors import BackendUnavailableError, ContextLengthError, InvalidTokenError
from .params import INT32_MAX, RANDOM_SEED, LlamaParams, ParameterError, require_integer
from .sampling import SamplerChain
from .stream import CompletionStream

TYPE_CHECKING = False
if TYPE_CHECKING:
    from .engine.processors import BatchLogitsProcessor, LogitsProcessor

Prompt = str | Sequence[int]


class CompletionOptions(TypedDict, total=False):
    """Keyword arguments of `Llama.create_completion` beside ``stream``."""

    sampler: SamplerChain | None
    seed: int | None
    stop: str | Iterable[str]
    stop_tokens: Iterable[int]
    include_stop: bool
    min_tokens: int
    ignore_eos: bool
    n: int
    best_of: int | None
    logprobs: int | None
    logit_bias: Mapping[int, float] | None
    echo: bool
    suffix: str | None
    special: bool
    cache_prompt: bool
    logits_processors: Iterable[LogitsProcessor | BatchLogitsProcessor]
    callback: Callable[[CompletionChunk], object] | None


class Llama:
    """A model ready to complete text.

    ``Llama("model.gguf", n_ctx=2048)`` or ``Llama.load(LlamaParams("model.gguf", n_ctx=2048))``;
    without a model the small demo model is used. Keyword arguments are `LlamaParams` fields.

    Raises `ModelNotFoundError`, `ModelLoadError`, `ContextCreateError`, `ParameterError`.
    Thread-safety: any thread may call any method; calls that run at the same time share batches,
    up to ``n_seq_max`` sequences.
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
                raise ParameterError(f"model: {path} is not a text-generating decoder model")
            self.params = params.resolve(
                n_ctx_train=self._model.n_ctx_train, n_threads=default_n_threads()
            )
            self._context = _core.Context(self._model, **self.params.context_params())
            self._engine = Engine(self._context)
        finally:
            logs.flush()
        self._vocab = self._model.vocab
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

    def close(self) -> None:
        """Free the context and the model; running requests end as cancelled. Idempotent."""
        self._engine.close()
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
        **options: Unpack[CompletionOptions],
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
        sampler: SamplerChain | None = None,
        seed: int | None = None,
        stop: str | Iterable[str] = (),
        stop_tokens: Iterable[int] = (),
        include_stop: bool = False,
        min_tokens: int = 0,
        ignore_eos: bool = False,
        n: int = 1,
        best_of: int | None = None,
        logprobs: int | None = None,
        logit_bias: Mapping[int, float] | None = None,
        echo: bool = False,
        suffix: str | None = None,
        special: bool = False,
        cache_prompt: bool = True,
        logits_processors: Iterable[LogitsProcessor | BatchLogitsProcessor] = (),
        callback: Callable[[CompletionChunk], object] | None = None,
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
        callback
            Called with each chunk; return False to end the request as ``"cancelled"``. Not with
            `stream`.

        Raises `ContextLengthError` for a prompt that does not fit, `ParameterError` and
        `InvalidTokenError` for wrong values, `GrammarError`, `SamplerError`, `DecodeError`.
        ``KeyboardInterrupt`` ends the request within one step and leaves the object usable.
        """
        begin_us = _core.time_us()
        tokens, echo_text = self._prompt_tokens(prompt, suffix)
        if not isinstance(stop, Iterable):
            raise ParameterError(f"stop: expected strings, not {stop!r}")
        stops = (stop,) if isinstance(stop, str) else tuple(stop)
        stop_ids = self._token_ids("stop_tokens", stop_tokens)
        self._check(n, best_of, stream, logprobs, max_tokens, min_tokens, stops)
        if callback is not None and not callable(callback):
            raise ParameterError(f"callback: {callback!r} cannot be called")
        if stream and callback is not None:
            raise ParameterError("callback: not with stream=True, which gives the chunks itself")
        if sampler is not None and not isinstance(sampler, SamplerChain):
            raise ParameterError(f"sampler: expected a SamplerChain, not {sampler!r}")
        if seed is not None:
            require_integer("seed", seed, (0, RANDOM_SEED - 1))
        if logit_bias is not None and not isinstance(logit_bias, Mapping):
            raise ParameterError(f"logit_bias: expected a mapping, not {logit_bias!r}")
        self._token_ids("logit_bias", logit_bias or ())
        chosen = sampler if sampler is not None else self.params.sampler
        if seed is None:
            seed = self.params.seed
        request = Request(
            prompt=tokens,
            sampler=SamplerChain.default() if chosen is None else chosen,
            seed=new_seed() if seed is None else seed,
            max_tokens=max_tokens,
            min_tokens=min_tokens,
            n=n,
            best_of=n if best_of is None else best_of,
            stop=stops,
            stop_tokens=stop_ids,
            include_stop=include_stop,
            ignore_eos=ignore_eos,
            special=special,
            logit_bias=logit_bias,
            logprobs=logprobs,
            prompt_logprobs=echo and logprobs is not None,
            stream=stream or callback is not None,
            cache_prompt=cache_prompt,
            logits_processors=self._processors(logits_processors),
            submit_us=begin_us,
        )
        job = CompletionStream(
            self._engine, request, self._vocab, echo_text if echo else "", self._name, self.load_sec
        )
        if stream:
            return job
        with job:
            for chunk in job:
                if callback is not None and callback(chunk) is False:
                    job.close()
            return job.result()

    def _prompt_tokens(self, prompt: Prompt, suffix: str | None) -> tuple[list[int], str]:
        """Return the ids and the text to echo."""
        if isinstance(prompt, str):
            tokens, text = self.tokenize(prompt), prompt
        else:
            tokens = list(self._token_ids("prompt", prompt))
            text = "" if not tokens else self.detokenize(tokens, special=True)
        if suffix is not None:
            if not isinstance(suffix, str):
                raise ParameterError(f"suffix: expected text, not {suffix!r}")
            vocab = self._vocab
            if vocab.fim_pre is None or vocab.fim_suf is None or vocab.fim_mid is None:
                raise ParameterError("suffix: the model has no fill-in-the-middle tokens")
            after = self.tokenize(suffix, add_special=False, parse_special=False)
            n_bos = int(tokens[:1] == [vocab.bos])
            tokens = [
                *(*tokens[:n_bos], vocab.fim_pre, *tokens[n_bos:]),
                *(vocab.fim_suf, *after, vocab.fim_mid),
            ]
        if not tokens:
            # As llama.cpp's own programs do: something must be decoded.
            if self._vocab.bos is None:
                raise ParameterError("prompt: it has no tokens, and the model has no BOS token")
            tokens = [self._vocab.bos]
        if len(tokens) > self.n_ctx:
            raise ContextLengthError(
                f"the prompt has {len(tokens)} tokens, a request can use {self.n_ctx} (n_ctx)"
            )
        return tokens, text

    def _token_ids(self, name: str, tokens: Iterable[int]) -> tuple[int, ...]:
        """Return ids of the vocabulary as ints; `name` is the argument they came in."""
        if isinstance(tokens, (str, bytes, bytearray)) or not isinstance(tokens, Iterable):
            raise ParameterError(f"{name}: expected token ids, not {type(tokens).__name__}")
        try:
            ids = tuple([operator.index(token) for token in tokens])
        except TypeError as error:
            raise ParameterError(f"{name}: expected token ids: {error}") from None
        n_vocab = self._vocab.n_tokens
        for token in ids:
            if not 0 <= token < n_vocab:
                raise InvalidTokenError(
                    f"{name}: token {token} is outside the vocabulary (0..{n_vocab - 1})"
                )
        return ids

    @staticmethod
    def _processors(
        processors: Iterable[LogitsProcessor | BatchLogitsProcessor],
    ) -> tuple[LogitsProcessor | BatchLogitsProcessor, ...]:
        if not isinstance(processors, Iterable):
            raise ParameterError(f"logits_processors: expected callables, not {processors!r}")
        found = tuple(processors)
        for processor in found:
            if not callable(processor) and not hasattr(processor, "process_batch"):
                raise ParameterError(f"logits_processors: {processor!r} cannot be called")
        return found

    @staticmethod
    def _check(
        n: int,
        best_of: int | None,
        stream: bool,
        logprobs: int | None,
        max_tokens: int | None,
        min_tokens: int,
        stops: tuple[str, ...],
    ) -> None:
        require_integer("n", n, (1, INT32_MAX))
        if best_of is not None:
            require_integer("best_of", best_of, (n, INT32_MAX))
            if stream and best_of > n:
                raise ParameterError("best_of: cannot be streamed; the best is known at the end")
        if logprobs is not None:
            require_integer("logprobs", logprobs, (0, INT32_MAX))
        if max_tokens is not None:
            require_integer("max_tokens", max_tokens, (0, INT32_MAX))
        most = INT32_MAX if max_tokens is None else max_tokens
        require_integer("min_tokens", min_tokens, (0, most))
        if not all(isinstance(stop, str) and stop for stop in stops):
            raise ParameterError("stop: expected non-empty strings")
