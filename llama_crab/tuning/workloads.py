"""What is measured: llama-bench's tests, more sequences than one, and whole answers by `Llama`."""

from __future__ import annotations

import time
from abc import ABC, abstractmethod
from collections.abc import Mapping
from dataclasses import dataclass, field, fields

from ..params import INT32_MAX, MAX_SEQUENCES, LlamaParams, ParameterError, require_integer
from ..sampling import SamplerChain
from .texts import TEXTS, chain_of, n_prompt_max, prompt_of

TYPE_CHECKING = False
if TYPE_CHECKING:
    from typing import Any

    from .bed import Bed

_LEAST = {"depth": 0}
_MOST = {"n_seq": MAX_SEQUENCES}


@dataclass(frozen=True)
class Measured:
    """One run: its seconds, and where known what they went into (seconds or counts by name)."""

    seconds: float
    parts: Mapping[str, float] = field(default_factory=dict)


@dataclass(frozen=True)
class Workload(ABC):
    """Work that is the same on every configuration.

    ``name`` is llama-bench's where it has one, ``n_tokens`` how much work a run is, in what
    ``unit`` counts per second. Raises `ParameterError` for counts that are no integers or too
    small.
    Thread-safety: immutable.
    """

    # Without annotations, or they would be fields.
    unit = "tok/s"
    end_to_end = False
    """Whether it measures `Llama`, not raw decodes."""

    def __post_init__(self) -> None:
        for item in fields(self):
            value = getattr(self, item.name)
            if item.type == "int":
                bounds = (_LEAST.get(item.name, 1), _MOST.get(item.name, INT32_MAX))
                object.__setattr__(self, item.name, require_integer(item.name, value, bounds))

    @property
    @abstractmethod
    def name(self) -> str:
        """A short name, unique among the workloads of a run."""

    @property
    @abstractmethod
    def n_tokens(self) -> int:
        """How many tokens (or what `unit` counts) one run is."""

    @abstractmethod
    def fit(self, params: LlamaParams) -> LlamaParams:
        """Return `params` with the context that a run needs; other values stay."""

    @abstractmethod
    def run(self, bed: Bed) -> float:
        """Do it once and return the seconds."""

    def warm_up(self, bed: Bed) -> None:
        """Bring into the caches and into being what a run should not pay for."""
        self.run(bed)

    def measure(self, bed: Bed) -> Measured:
        """Do it once and return the seconds with what they went into."""
        return Measured(self.run(bed))


@dataclass(frozen=True)
class Prefill(Workload):
    """Decode `n_prompt` tokens in full batches behind `depth` others; llama-bench's ``pp``."""

    n_prompt: int
    depth: int = 0

    @property
    def name(self) -> str:  # noqa: D102
        return _at_depth(f"pp{self.n_prompt}", self.depth)

    @property
    def n_tokens(self) -> int:  # noqa: D102
        return self.n_prompt

    def fit(self, params: LlamaParams) -> LlamaParams:  # noqa: D102
        return fit_context(params, self.depth + self.n_prompt)

    def run(self, bed: Bed) -> float:  # noqa: D102
        return bed.prefill(self.n_prompt, self.depth)


@dataclass(frozen=True)
class Generate(Workload):
    """Decode `n_gen` tokens one after the other behind `depth` others; llama-bench's ``tg``."""

    n_gen: int
    depth: int = 0

    @property
    def name(self) -> str:  # noqa: D102
        return _at_depth(f"tg{self.n_gen}", self.depth)

    @property
    def n_tokens(self) -> int:  # noqa: D102
        return self.n_gen

    def fit(self, params: LlamaParams) -> LlamaParams:  # noqa: D102
        return fit_context(params, self.depth + self.n_gen)

    def run(self, bed: Bed) -> float:  # noqa: D102
        return bed.generate(self.n_gen, self.depth)

    def warm_up(self, bed: Bed) -> None:  # noqa: D102
        bed.generate(1, self.depth)


@dataclass(frozen=True)
class PrefillGenerate(Workload):
    """A prefill and the generation behind it, as one; llama-bench's ``-pg``."""

    n_prompt: int
    n_gen: int
    depth: int = 0

    @property
    def name(self) -> str:  # noqa: D102
        return _at_depth(f"pp{self.n_prompt}+tg{self.n_gen}", self.depth)

    @property
    def n_tokens(self) -> int:  # noqa: D102
        return self.n_prompt + self.n_gen

    def fit(self, params: LlamaParams) -> LlamaParams:  # noqa: D102
        return fit_context(params, self.depth + self.n_prompt + self.n_gen)

    def run(self, bed: Bed) -> float:  # noqa: D102
        return bed.prefill_generate(self.n_prompt, self.n_gen, self.depth)

    def warm_up(self, bed: Bed) -> None:  # noqa: D102
        bed.prefill_generate(self.n_prompt, 1, self.depth)


@dataclass(frozen=True)
class Parallel(Workload):
    """Decode `n_gen` tokens of each of `n_seq` sequences, a batch a step; the rate is of all."""

    n_seq: int
    n_gen: int
    depth: int = 0

    @property
    def name(self) -> str:  # noqa: D102
        return _at_depth(f"tg{self.n_gen} x {self.n_seq}", self.depth)

    @property
    def n_tokens(self) -> int:  # noqa: D102
        return self.n_seq * self.n_gen

    def fit(self, params: LlamaParams) -> LlamaParams:  # noqa: D102
        return fit_context(params, self.depth + self.n_gen, self.n_seq)

    def run(self, bed: Bed) -> float:  # noqa: D102
        return bed.parallel(self.n_seq, self.n_gen, self.depth)

    def warm_up(self, bed: Bed) -> None:  # noqa: D102
        bed.parallel(self.n_seq, 1, self.depth)


@dataclass(frozen=True)
class Complete(Workload):
    """A whole answer: `n_prompt` tokens of English, `n_gen` tokens by a preset sampler chain.

    The rate is of generated tokens over the whole call. Its parts, in seconds: ``prefill``,
    ``decode``, ``sample``, ``text`` (what is left: drafts, tokenising, text, Python), which add up
    to the call, and ``first_token``, which is among them. With ``speculative`` also ``drafted`` and
    ``accepted`` in tokens, and ``acceptance``, their share.
    """

    n_prompt: int
    n_gen: int
    preset: str = "benchmark"
    end_to_end = True

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.preset not in PRESETS:
            raise ParameterError(f"preset: {self.preset!r} is not one of {', '.join(PRESETS)}")

    @property
    def name(self) -> str:  # noqa: D102
        return f"answer {self.n_prompt}+{self.n_gen} {self.preset}"

    @property
    def n_tokens(self) -> int:  # noqa: D102
        return self.n_gen

    def fit(self, params: LlamaParams) -> LlamaParams:  # noqa: D102
        return fit_context(params, self.n_prompt + self.n_gen)

    def run(self, bed: Bed) -> float:  # noqa: D102
        return self.measure(bed).seconds

    def measure(self, bed: Bed) -> Measured:  # noqa: D102
        return _answer(bed, _prompt(bed, self.n_prompt), self.n_gen, _chain(self.preset))


@dataclass(frozen=True)
class Answer(Workload):
    """A whole answer of `n_gen` tokens to a text that shows what drafts are worth.

    ``"copy"`` repeats a program with one name changed, greedily; ``"free"`` goes on with a novel by
    llama.cpp's default chain and a fixed seed. The rate and its parts are as in `Complete`; a run
    before lets the lengths of drafts be learned.
    """

    text: str
    n_gen: int = 128
    end_to_end = True

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.text not in TEXTS:
            raise ParameterError(f"text: {self.text!r} is not one of {', '.join(TEXTS)}")

    @property
    def name(self) -> str:  # noqa: D102
        return f"{self.text} {self.n_gen}"

    @property
    def n_tokens(self) -> int:  # noqa: D102
        return self.n_gen

    def fit(self, params: LlamaParams) -> LlamaParams:  # noqa: D102
        return fit_context(params, n_prompt_max(self.text) + self.n_gen)

    def run(self, bed: Bed) -> float:  # noqa: D102
        return self.measure(bed).seconds

    def measure(self, bed: Bed) -> Measured:  # noqa: D102
        prompt = prompt_of(self.text, bed.model.vocab)
        return _answer(bed, prompt, self.n_gen, chain_of(self.text))


@dataclass(frozen=True)
class Reuse(Workload):
    """One token after a prompt of which all but the last token is in memory; a rate as ``pp``.

    Its parts: ``cached_n``, the tokens that were not computed.
    """

    n_prompt: int
    end_to_end = True

    @property
    def name(self) -> str:  # noqa: D102
        return f"reuse pp{self.n_prompt}"

    @property
    def n_tokens(self) -> int:  # noqa: D102
        return self.n_prompt

    def fit(self, params: LlamaParams) -> LlamaParams:  # noqa: D102
        return fit_context(params, self.n_prompt + 1)

    def run(self, bed: Bed) -> float:  # noqa: D102
        return self.measure(bed).seconds

    def measure(self, bed: Bed) -> Measured:  # noqa: D102
        llama, greedy = bed.llama, SamplerChain.benchmark()
        prompt = _prompt(bed, self.n_prompt)
        llama.create_completion(prompt, 1, sampler=greedy)
        other = [*prompt[:-1], (prompt[-1] + 1) % bed.model.vocab.n_tokens]
        timings = llama.create_completion(other, 1, sampler=greedy).timings
        return Measured(timings.total_sec, {"cached_n": float(timings.cached_n)})


@dataclass(frozen=True)
class Tokenize(Workload):
    """Tokenise `n_chars` characters of English; no model runs."""

    n_chars: int
    end_to_end = True
    unit = "char/s"

    @property
    def name(self) -> str:  # noqa: D102
        return f"tokenize {self.n_chars}"

    @property
    def n_tokens(self) -> int:  # noqa: D102
        return self.n_chars

    def fit(self, params: LlamaParams) -> LlamaParams:  # noqa: D102
        return fit_context(params, 1)

    def run(self, bed: Bed) -> float:  # noqa: D102
        llama = bed.llama
        text = (_TEXT * (self.n_chars // len(_TEXT) + 1))[: self.n_chars]
        began = time.perf_counter()
        llama.tokenize(text)
        return time.perf_counter() - began


PRESETS = ("default", "benchmark", "code", "chat", "creative", "structured")
"""Names of `SamplerChain`'s presets; ``structured`` under a grammar of JSON strings."""

# It never closes, so that an answer is as long as it should be.
_GRAMMAR = r"""root ::= "[" item+
item ::= "\"" [^"\\\x00-\x1f]+ "\", "
"""
_TEXT = (
    "The lighthouse keeper wrote down the weather every evening, although nobody read it. On the "
    "third of March the wind turned west, and 14 boats came back before dark. He counted them "
    "twice, lit the lamp, and thought of what his sister had said about the price of oil.\n"
)


def _answer(bed: Bed, prompt: list[int], n_gen: int, chain: SamplerChain) -> Measured:
    """Return the seconds of a call with a new prompt and a fixed number of tokens."""
    llama = bed.llama
    stepper = llama._engine.scheduler.stepper
    decoded_us = stepper.decode_us
    timings = llama.create_completion(
        prompt, n_gen, sampler=chain, seed=0, ignore_eos=True, cache_prompt=False
    ).timings
    decoded = (stepper.decode_us - decoded_us) / 1e6
    prefill = min(timings.prompt_sec, decoded)
    parts = {
        "prefill": prefill,
        "decode": decoded - prefill,
        "sample": timings.sample_sec,
        "text": max(0.0, timings.total_sec - decoded - timings.sample_sec),
        "first_token": timings.first_token_sec,
    }
    if bed.params.speculative is not None:
        drafted, accepted = float(timings.draft_n), float(timings.draft_accepted_n)
        parts |= {"drafted": drafted, "accepted": accepted}
        parts["acceptance"] = accepted / drafted if drafted else 0.0
    return Measured(timings.total_sec, parts)


def _chain(preset: str) -> SamplerChain:
    if preset == "structured":
        return SamplerChain.structured(_GRAMMAR)
    chain: SamplerChain = getattr(SamplerChain, preset)()
    return chain


def _prompt(bed: Bed, n_tokens: int) -> list[int]:
    """Return the same text for every configuration, cut to `n_tokens`."""
    tokens = bed.model.vocab.tokenize(_TEXT, True, False)
    more = bed.model.vocab.tokenize(_TEXT, False, False)
    while len(tokens) < n_tokens:
        tokens.extend(more)
    return tokens[:n_tokens]


def fit_context(params: LlamaParams, n_per_seq: int, n_seq: int = 1) -> LlamaParams:
    """Return `params` with room for `n_seq` sequences of `n_per_seq` tokens at least.

    An ``n_ctx`` that is not set becomes just that, as in llama-bench: both pad the cache alike.
    """
    n_seq = max(n_seq, params.n_seq_max or 1)
    changes: dict[str, Any] = {"n_ctx": max(params.n_ctx or 0, n_seq * n_per_seq)}
    if params.n_ctx == 0:  # as trained, in total; Bed refuses what that is too small for
        changes.clear()
    if n_seq > 1:
        changes["n_seq_max"] = n_seq
    if params.n_outputs_max is not None and params.n_outputs_max < n_seq:
        changes["n_outputs_max"] = n_seq
    return params.replace(**changes)


def _at_depth(name: str, depth: int) -> str:
    return f"{name} @ d{depth}" if depth else name
