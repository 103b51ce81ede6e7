"""What the scheduler works on: a `Request` and its `Sequence`s, one per answer."""

from __future__ import annotations

import itertools
import os
from collections import deque
from collections.abc import Mapping
from dataclasses import dataclass, field

from ..completion import CompletionChoice, FinishReason, Logprobs, TokenLogprob, Usage
from ..sampling import SamplerChain
from ..timings import CompletionTimings
from .text import TextStream

_ids = itertools.count()

# What a unit of priority is worth in waiting time: so that a low priority is late, not never.
_PRIORITY_US = 10_000_000

# (log-probability, [(token id, log-probability), ...]) as the core reports it.
RawLogprobs = tuple[float, list[tuple[int, float]]]


def new_seed() -> int:
    """Return a random seed; never 0xFFFFFFFF, which means "random" to llama.cpp."""
    return int.from_bytes(os.urandom(4), "little") % 0xFFFFFFFF


def rank_of(submit_us: int, priority: int, deadline_us: int) -> int:
    """Return a place in the queue, smallest first."""
    rank = submit_us - priority * _PRIORITY_US
    return min(rank, deadline_us - _PRIORITY_US) if deadline_us else rank


@dataclass(slots=True, eq=False)
class Request:
    """One call's worth of work: a prompt and `best_of` answers to it, of which `n` are wanted.

    `deadline_us` is a reading of `time_us` after which it ends with an error; `adapters` is the
    index of its LoRA set; `drafter` is asked for drafts of at most `n_draft_max` tokens; a stream
    that is `n_news_max` pieces ahead of its reader is held (0: never); `listener` is called, by the
    thread that drives the loop, after it has got news or ended, `on_end` with each sequence that
    ends, and `on_done` once when all have; `output` is how its answers are read, `opening` what a
    grammar must know of the prompt's end (see `FusedSampler`).
    """

    prompt: list[int]
    sampler: SamplerChain
    seed: int
    max_tokens: int | None = 128
    min_tokens: int = 0
    n: int = 1
    best_of: int = 1
    stop: tuple[str, ...] = ()
    stop_tokens: tuple[int, ...] = ()
    include_stop: bool = False
    ignore_eos: bool = False
    special: bool = False
    logit_bias: Mapping[int, float] | None = None
    logprobs: int | None = None
    prompt_logprobs: bool = False
    stream: bool = False
    cache_prompt: bool = True
    logits_processors: tuple[Any, ...] = ()
    speculation: Speculation | None = None
    drafter: DraftModel | None = None
    n_draft_max: int = 0
    priority: int = 0
    deadline_us: int = 0
    adapters: int = 0
    n_news_max: int = 0
    listener: Callable[[], object] | None = None
    on_end: Callable[[Sequence], object] | None = None
    on_done: Callable[[Request], object] | None = None
    output: StructuredOutput | None = None
    opening: tuple[str, str, list[str]] | None = None
    id: str = field(default_factory=lambda: f"cmpl-{next(_ids)}-{os.urandom(6).hex()}")
    submit_us: int = 0
    end_us: int = 0
    error: BaseException | None = None
    sequences: list[Sequence] = field(default_factory=list)
    news: deque[News] = field(default_factory=deque)

    def __post_init__(self) -> None:
        self.sequences = [Sequence(self, index) for index in range(self.best_of)]

    @property
    def rank(self) -> int:
        """What the queue orders by, smallest first: arrival, priority, deadline."""
        return rank_of(self.submit_us, self.priority, self.deadline_us)

    @property
    def done(self) -> bool:
        """Whether nothing more will come."""
        return self.end_us != 0

    @property
    def emit(self) -> bool:
        """Whether every token must be looked at, not the finished text only."""
        return self.stream or bool(self.stop)

    @property
    def n_logprobs(self) -> int:
        """How many alternatives the core computes per token; -1 for no log-probabilities."""
        if self.logprobs is not None:
            return self.logprobs
        return 0 if self.best_of > self.n else -1

    def chosen(self) -> list[Sequence]:
        """Return the `n` answers that were asked for, the best of `best_of`."""
        if self.best_of == self.n:
            return self.sequences
        return sorted(self.sequences, key=lambda sequence: -sequence.mean_logprob)[: self.n]

    def usage(self) -> Usage:
        """Return the counts of tokens, over all answers."""
        n_generated = sum(len(sequence.tokens) for sequence in self.sequences)
        return Usage(
            prompt_tokens=len(self.prompt),
            completion_tokens=n_generated,
            total_tokens=len(self.prompt) + n_generated,
            cached_tokens=self.sequences[0].n_cached,
        )

    def timings(self, load_sec: float = 0.0) -> CompletionTimings:
        """Return how long it took, once it is done."""
        ran = [sequence for sequence in self.sequences if sequence.times[0]]
        firsts = [sequence.times[1] for sequence in ran if sequence.times[1]]
        first_us = min(firsts, default=0)
        last_us = max((sequence.times[2] for sequence in ran), default=0)
        start_us = min((sequence.times[0] for sequence in ran), default=0)
        return CompletionTimings(
            prompt_n=len(self.prompt),
            prompt_sec=((first_us or self.end_us) - start_us) / 1e6 if start_us else 0.0,
            predicted_n=sum(len(sequence.tokens) for sequence in self.sequences),
            predicted_sec=(last_us - first_us) / 1e6,
            total_sec=(self.end_us - self.submit_us) / 1e6,
            cached_n=self.sequences[0].n_cached,
            first_token_sec=(first_us - self.submit_us) / 1e6 if first_us else 0.0,
            sample_sec=sum(sequence.times[3] for sequence in ran) / 1e6,
            load_sec=load_sec,
            draft_n=sum(sequence.drafts[0] for sequence in self.sequences),
            draft_accepted_n=sum(sequence.drafts[1] for sequence in self.sequences),
        )

    def tell_done(self) -> None:
        """Call `on_done`, which must not raise, once."""
        told, self.on_done = self.on_done, None
        if told is not None:
            told(self)


@dataclass(slots=True)
class News:
    """Text of one sequence for a streaming reader; `last` on the sequence's final piece."""

    sequence: Sequence
    text: str
    tokens: tuple[int, ...]
    logprobs: list[RawLogprobs]
    last: bool


@dataclass(slots=True)
class Suspension:
    """What a sequence without a slot goes on from.

    `ids` are its tokens, of which the first `n_past` were in memory; `state` is that memory, or
    None when it is to be computed again.
    """

    slot: SuspendedSlot
    ids: array[int]
    n_past: int
    state: bytes | None


@dataclass(slots=True, eq=False)
class Sequence:
    """One answer in the making. `slot` is its sequence of the context while it runs."""

    request: Request
    index: int
    slot: int | None = None
    suspension: Suspension | None = None
    text_parts: list[str] = field(default_factory=list)
    n_bytes: int = 0
    n_tokens_told: int = 0
    n_bytes_told: int = 0
    tokens: list[int] = field(default_factory=list)
    logprobs: list[RawLogprobs] = field(default_factory=list)
    prompt_logprobs: list[RawLogprobs] = field(default_factory=list)
    finish_reason: FinishReason | None = None
    stop_reason: str | int | None = None
    error: Exception | None = None
    n_cached: int = 0
    times: tuple[int, int, int, int] = (0, 0, 0, 0)
    drafts: tuple[int, int] = (0, 0)
    stream: TextStream = field(init=False)

    def __post_init__(self) -> None:
        self.stream = TextStream(self.request.stop, self.request.include_stop)

    @property
    def text(self) -> str:
        """The answer so far, as far as it is certain."""
        return "".join(self.text_parts)

    @property
    def mean_logprob(self) -> float:
        """What `best_of` ranks by; an empty answer ranks last."""
        if not self.logprobs:
            return float("-inf")
        return sum(entry[0] for entry in self.logprobs) / len(self.logprobs)

    def compile_sampler(self, model: Model) -> Sampler | FusedSampler:
        """Return what chooses this answer's tokens. Raises as `SamplerChain.compile`."""
        request = self.request
        return request.sampler.compile(
            model,
            request.seed,
            request.logit_bias,
            choice=self.index,
            opening=request.opening,
        )

    def choice(self, index: int, echo: str, logprobs: Logprobs | None) -> CompletionChoice:
        """Return the public form."""
        text, output = self.text, self.request.output
        parsed, invalid, incomplete = None, None, output is not None
        if output is not None and self.finish_reason == "stop":
            parsed, invalid, incomplete = output.read(text, at_end=self.stop_reason is None)
        return CompletionChoice(
            index=index,
            text=echo + text,
            finish_reason=self.finish_reason or "cancelled",
            stop_reason=self.stop_reason,
            tokens=tuple(self.tokens),
            logprobs=logprobs,
            incomplete=incomplete,
            _parsed=parsed,
            _invalid=invalid,
        )


def token_logprobs(
    tokens: list[int] | tuple[int, ...], raw: list[RawLogprobs], piece: PieceOf
) -> list[TokenLogprob]:
    """Return the public form of the core's log-probabilities."""
    return [
        TokenLogprob.from_piece(
            token,
            piece(token),
            logprob,
            [TokenLogprob.from_piece(other, piece(other), value) for other, value in top],
        )
        for token, (logprob, top) in zip(tokens, raw, strict=True)
    ]


TYPE_CHECKING = False
if TYPE_CHECKING:
    from array import array
    from collections.abc import Callable
    from typing import Any

    from .._core import FusedSampler, Model, Sampler, Speculation, SuspendedSlot
    from ..speculative import DraftModel
    from ..structured import StructuredOutput

    PieceOf = Callable[[int], bytes]
