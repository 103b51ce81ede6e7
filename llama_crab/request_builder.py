"""From what a caller asks for to a checked `Request`."""

from __future__ import annotations

import operator
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any, TypedDict

from . import _core
from .engine.request import Request, new_seed
from .errors import ContextLengthError, InvalidTokenError
from .lora import LoraSets
from .params import INT32_MAX, RANDOM_SEED, LlamaParams, ParameterError, require_integer
from .sampling import SamplerChain
from .session import Session
from .speculative import Drafts, Speculative, n_draft_max

TYPE_CHECKING = False
if TYPE_CHECKING:
    from .completion import CompletionChunk
    from .engine.processors import BatchLogitsProcessor, LogitsProcessor
    from .lora import LoraChoice
    from .structured.lark import LarkGrammars

Prompt = str | Sequence[int]

# Far beyond any use, and far from where a rank would overflow.
_MOST_PRIORITY = 1_000_000
# A reader in the background that is so many chunks behind has its request held.
UNREAD_CHUNKS = 64
_LONGEST_SEC = 10 * 365 * 86400.0


class CompletionOptions(TypedDict, total=False):
    """Keyword arguments of `Llama.create_completion` beside ``stream`` and ``callback``."""

    sampler: SamplerChain | None
    seed: int | None
    stop: str | Iterable[str] | None
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
    priority: int
    timeout: float | None
    lora: LoraChoice | None
    session: Session | None
    speculative: Speculative
    response_format: Any
    grammar: str | None
    regex: str | None
    choices: Iterable[str] | None
    lark: str | None


class CallbackOptions(CompletionOptions, total=False):
    """The same with ``callback``, for calls that wait for the end."""

    callback: Callable[[CompletionChunk], object] | None


class RequestBuilder:
    """Checks options against a model and its context, and makes requests of them.

    Thread-safety: any thread.
    """

    def __init__(
        self,
        vocab: _core.Vocab,
        params: LlamaParams,
        n_ctx: int,
        lora: LoraSets,
        drafts: Drafts,
    ) -> None:
        self._drafts = drafts
        self._vocab = vocab
        self._params = params
        self._n_ctx = n_ctx
        self._lora = lora
        self._lark_grammars: LarkGrammars | None = None

    def completion(
        self,
        prompt: Prompt,
        max_tokens: int | None,
        *,
        stream: bool = False,
        n_news_max: int = 0,
        sampler: SamplerChain | None = None,
        seed: int | None = None,
        stop: str | Iterable[str] | None = (),
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
        priority: int = 0,
        timeout: float | None = None,
        lora: LoraChoice | None = None,
        session: Session | None = None,
        speculative: Speculative = "default",
        response_format: Any = None,
        grammar: str | None = None,
        regex: str | None = None,
        choices: Iterable[str] | None = None,
        lark: str | None = None,
    ) -> tuple[Request, str]:
        """Return the request and the text to echo; see `Llama.create_completion` for the options.

        Raises `ParameterError`, `InvalidTokenError`, `ContextLengthError`, `AdapterError`,
        `SchemaError`, `RegexError`.
        """
        begin_us = _core.time_us()
        tokens, text = self.prompt_tokens(prompt, suffix, session)
        stop = () if stop is None else stop
        if not isinstance(stop, Iterable):
            raise ParameterError(f"stop: expected strings, not {stop!r}")
        stops = (stop,) if isinstance(stop, str) else tuple(stop)
        stop_ids = self.token_ids("stop_tokens", stop_tokens)
        _check_counts(n, best_of, stream, logprobs, max_tokens, min_tokens)
        if not all(isinstance(item, str) and item for item in stops):
            raise ParameterError("stop: expected non-empty strings")
        if sampler is not None and not isinstance(sampler, SamplerChain):
            raise ParameterError(f"sampler: expected a SamplerChain, not {sampler!r}")
        if seed is not None:
            require_integer("seed", seed, (0, RANDOM_SEED - 1))
        if logit_bias is not None and not isinstance(logit_bias, Mapping):
            raise ParameterError(f"logit_bias: expected a mapping, not {logit_bias!r}")
        self.token_ids("logit_bias", logit_bias or ())
        require_priority(priority)
        if session is not None and (n != 1 or best_of not in (None, 1)):
            raise ParameterError("session: a conversation goes on with one answer, so n must be 1")
        chosen = sampler if sampler is not None else self._params.sampler
        chain = SamplerChain.default() if chosen is None else chosen
        output = None
        processors = _processors(logits_processors)
        if any(each is not None for each in (response_format, grammar, regex, choices, lark)):
            from .structured import structured_output

            output = structured_output(response_format, grammar, regex, choices, lark)
        if output is not None:
            chain = _constrained(chain, output.gbnf, ignore_eos)
        if output is not None and output.lark is not None:
            # Last: none of the others may allow again what it bans.
            processors = (*processors, self._lark(output.lark, len(tokens)))
        speculation, drafter = self._drafts.choose(speculative)
        if seed is None:
            seed = self._params.seed
        request = Request(
            prompt=tokens,
            sampler=chain,
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
            stream=stream,
            cache_prompt=cache_prompt,
            logits_processors=processors,
            speculation=speculation,
            drafter=drafter,
            n_draft_max=n_draft_max(drafter),
            priority=priority,
            deadline_us=deadline_us(begin_us, timeout),
            adapters=self._lora.index(lora),
            n_news_max=n_news_max if stream else 0,
            output=output,
            submit_us=begin_us,
        )
        if session is not None:
            session.begin(request)
        return request, text if echo else ""

    def _lark(self, grammar: str, n_prompt: int) -> Any:
        from .structured.lark import LarkGrammars

        if self._lark_grammars is None:
            self._lark_grammars = LarkGrammars(self._vocab)
        return self._lark_grammars.constraint(grammar, n_prompt)

    def prompt_tokens(
        self, prompt: Prompt, suffix: str | None = None, session: Session | None = None
    ) -> tuple[list[int], str]:
        """Return the ids, those of the session before them, and the text to echo."""
        before: list[int] = []
        if session is not None:
            if not isinstance(session, Session):
                raise ParameterError(f"session: expected a Session, not {session!r}")
            before = list(session.tokens)
        if isinstance(prompt, str):
            # BOS stands at the beginning of a conversation only.
            tokens, text = self._vocab.tokenize(prompt, not before, True), prompt
        else:
            tokens = list(self.token_ids("prompt", prompt))
            text = "" if not tokens else self._text(tokens)
        if suffix is not None:
            if not isinstance(suffix, str):
                raise ParameterError(f"suffix: expected text, not {suffix!r}")
            tokens = self._with_suffix(tokens, suffix)
        tokens = before + tokens
        if not tokens:
            # As llama.cpp's own programs do: something must be decoded.
            if self._vocab.bos is None:
                raise ParameterError("prompt: it has no tokens, and the model has no BOS token")
            tokens = [self._vocab.bos]
        if len(tokens) > self._n_ctx:
            raise ContextLengthError(
                f"the prompt has {len(tokens)} tokens, a request can use {self._n_ctx} (n_ctx)"
            )
        return tokens, text

    def token_ids(self, name: str, tokens: Iterable[int]) -> tuple[int, ...]:
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

    def _text(self, tokens: list[int]) -> str:
        return self._vocab.detokenize(tokens, False, True).decode("utf-8", "replace")

    def _with_suffix(self, tokens: list[int], suffix: str) -> list[int]:
        vocab = self._vocab
        if vocab.fim_pre is None or vocab.fim_suf is None or vocab.fim_mid is None:
            raise ParameterError("suffix: the model has no fill-in-the-middle tokens")
        after = vocab.tokenize(suffix, False, False)
        n_bos = int(tokens[:1] == [vocab.bos])
        return [
            *(*tokens[:n_bos], vocab.fim_pre, *tokens[n_bos:]),
            *(vocab.fim_suf, *after, vocab.fim_mid),
        ]


def _constrained(chain: SamplerChain, gbnf: str | None, ignore_eos: bool) -> SamplerChain:
    if chain.constraint is not None:
        raise ParameterError("sampler: it has a grammar of its own; only one can hold")
    if ignore_eos:
        raise ParameterError("ignore_eos: a structured answer ends where it is complete")
    return chain if gbnf is None else chain.grammar(gbnf)


def _processors(
    processors: Iterable[LogitsProcessor | BatchLogitsProcessor],
) -> tuple[Any, ...]:
    if not isinstance(processors, Iterable):
        raise ParameterError(f"logits_processors: expected callables, not {processors!r}")
    found = tuple(processors)
    for processor in found:
        if not callable(processor) and not hasattr(processor, "process_batch"):
            raise ParameterError(f"logits_processors: {processor!r} cannot be called")
    return found


def require_priority(priority: int) -> int:
    """Return a priority that a rank can hold. Raises `ParameterError`."""
    return require_integer("priority", priority, (-_MOST_PRIORITY, _MOST_PRIORITY))


def deadline_us(begin_us: int, timeout: float | None) -> int:
    """Return when a request ends that may take `timeout` seconds; 0 for never."""
    if timeout is None:
        return 0
    if isinstance(timeout, bool) or not isinstance(timeout, (int, float)) or not timeout > 0:
        raise ParameterError(f"timeout: expected seconds above 0, not {timeout!r}")
    return begin_us + int(min(timeout, _LONGEST_SEC) * 1e6)


def _check_counts(
    n: int,
    best_of: int | None,
    stream: bool,
    logprobs: int | None,
    max_tokens: int | None,
    min_tokens: int,
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
