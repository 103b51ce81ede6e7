"""From llama-cpp-python's generation arguments to options of a request."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from ... import _core
from ...params import ParameterError
from ...sampling import SamplerChain
from ...sampling_stages import Stage
from .arguments import random_seed
from .llama_grammar import grammar_text
from .notices import refuse, warn_once

if TYPE_CHECKING:
    import numpy as np
    import numpy.typing as npt

    Ids = npt.NDArray[np.intc]
    Row = npt.NDArray[np.single]
    LogitsProcessor = Callable[[Ids, Row], Row]
    StoppingCriteria = Callable[[Ids, Row], bool]
    _Processors = list[LogitsProcessor]
    _Criteria = list[StoppingCriteria]
else:
    LogitsProcessor = StoppingCriteria = Callable
    _Processors = _Criteria = list


class LogitsProcessorList(_Processors):
    """Functions of (ids so far, logits) that return the logits to sample from."""

    def __call__(self, input_ids: Ids, scores: Row) -> Row:
        """Return what the functions, one after the other, make of `scores`."""
        for processor in self:
            scores = processor(input_ids, scores)
        return scores


class StoppingCriteriaList(_Criteria):
    """Functions of (ids so far, logits) that tell whether the answer ends here."""

    def __call__(self, input_ids: Ids, logits: Row) -> bool:
        """Return whether one of them says so."""
        return any(criterion(input_ids, logits) for criterion in self)


class MinTokensLogitsProcessor:
    """Bans `token_eos` until `min_tokens` tokens were generated. For one request only."""

    def __init__(self, min_tokens: int, token_eos: int) -> None:
        self.min_tokens = min_tokens
        self.token_eos = token_eos
        self.prompt_tokens: int | None = None

    def __call__(self, input_ids: Ids, scores: Row) -> Row:
        """Return the logits, changed in place."""
        if self.prompt_tokens is None:
            self.prompt_tokens = len(input_ids)
        if len(input_ids) - self.prompt_tokens < self.min_tokens:
            scores[self.token_eos] = float("-inf")
        return scores


@dataclass(frozen=True)
class Sampling:
    """llama-cpp-python's sampling arguments, by its names and with its defaults."""

    temperature: float = 0.8
    top_p: float = 0.95
    min_p: float = 0.05
    typical_p: float = 1.0
    top_k: int = 40
    frequency_penalty: float = 0.0
    presence_penalty: float = 0.0
    repeat_penalty: float = 1.0
    tfs_z: float = 1.0
    mirostat_mode: int = 0
    mirostat_tau: float = 5.0
    mirostat_eta: float = 0.1

    @classmethod
    def of(cls, given: Mapping[str, Any]) -> Sampling:
        """Return those of some arguments; None counts as left out."""
        names = cls.__dataclass_fields__
        return cls(**{name: given[name] for name in names if given.get(name) is not None})

    def chain(self, penalty_last_n: int) -> SamplerChain:
        """Return the chain that llama-cpp-python builds: penalties first, temperature last.

        A temperature below 0 draws from the model's own distribution, 0 is greedy; mirostat takes
        the place of all that cuts and of the temperature. Raises `ParameterError`, `SamplerError`.
        """
        if self.tfs_z != 1.0:
            warn_once("tfs_z", "tail-free sampling was removed from llama.cpp")
        stages = [
            Stage(
                "penalties",
                penalty_last_n=penalty_last_n,
                penalty_repeat=self.repeat_penalty,
                penalty_freq=self.frequency_penalty,
                penalty_present=self.presence_penalty,
            )
        ]
        if self.mirostat_mode not in (0, 1, 2):
            raise ParameterError(f"mirostat_mode: {self.mirostat_mode!r} is not 0, 1 or 2")
        if self.temperature < 0:
            stages.append(Stage("dist", seed=None))
        elif self.temperature == 0:
            stages.append(Stage("greedy"))
        elif self.mirostat_mode:
            values = {"seed": None, "tau": self.mirostat_tau, "eta": self.mirostat_eta}
            if self.mirostat_mode == 1:
                stages.append(Stage("mirostat", **values, m=100))
            else:
                stages.append(Stage("mirostat_v2", **values))
        else:
            stages += (
                Stage("top_k", k=max(0, self.top_k)),
                Stage("typical", p=self.typical_p, min_keep=1),
                Stage("top_p", p=self.top_p, min_keep=1),
                Stage("min_p", p=self.min_p, min_keep=1),
                Stage("temp", t=self.temperature),
            )
        return SamplerChain(stage for stage in stages if not stage.is_noop)


def token_limit(max_tokens: int | None) -> int | None:
    """Return our limit: None and what is not above 0 mean as many as the context holds."""
    return None if max_tokens is None or max_tokens <= 0 else max_tokens


def stop_strings(stop: str | Iterable[str] | None) -> tuple[str, ...]:
    """Return the stop strings; one, several, or None for none. Empty ones stop nothing."""
    if stop is None:
        return ()
    several = (stop,) if isinstance(stop, str) else stop
    return tuple(each for each in several if each != "")


def response_schema(wanted: Any) -> Any:
    """Return our ``response_format`` for llama-cpp-python's; None where it asks for nothing."""
    if not isinstance(wanted, Mapping):
        return wanted
    if wanted.get("type") == "text":
        return None
    if wanted.get("type") == "json_object" and wanted.get("schema") is not None:
        schema = {"name": "answer", "schema": wanted["schema"]}
        return {"type": "json_schema", "json_schema": schema}
    return wanted


def request_options(
    given: Mapping[str, Any],
    vocab: _core.Vocab,
    penalty_last_n: int,
    seed: int | None,
) -> dict[str, Any]:
    """Return what `create_completion` and `create_chat_completion` of ours take, of `given`.

    Sampler, seed (`seed` where none is given), stop strings, biases, processors and grammar.
    Raises `ParameterError`, `SamplerError`, `NotSupportedError`.
    """
    options: dict[str, Any] = {"sampler": Sampling.of(given).chain(penalty_last_n)}
    own = random_seed(given.get("seed"))
    if own is None:
        own = seed
    if own is not None:
        options["seed"] = min(own, 0xFFFFFFFE)
    stops = stop_strings(given.get("stop"))
    if stops:
        options["stop"] = stops
    if given.get("logit_bias"):
        options["logit_bias"] = _biases(given["logit_bias"])
    grammar = grammar_text(given.get("grammar"))
    if grammar is not None:
        options["grammar"] = grammar
    processors: list[Callable[[Any, Any], None]] = []
    criteria = given.get("stopping_criteria")
    if criteria:
        if grammar is not None:
            refuse("stopping_criteria", "not together with a grammar; use stop strings")
        # First, so that it sees the model's logits as they are.
        processors.append(_stopping(criteria, vocab))
    if given.get("logits_processor"):
        processors += _processors(given["logits_processor"])
    if processors:
        options["logits_processors"] = processors
    return options


def _biases(biases: Mapping[Any, Any]) -> dict[int, float]:
    try:
        # JSON has text keys only.
        return {int(token): float(bias) for token, bias in biases.items()}
    except (AttributeError, TypeError, ValueError):
        raise ParameterError(
            f"logit_bias: expected token ids with numbers, not {biases!r:.80}"
        ) from None


def _processors(processors: Any) -> list[Callable[[Any, Any], None]]:
    found = [processors] if not isinstance(processors, Iterable) else list(processors)
    for processor in found:
        if not callable(processor):
            raise ParameterError(f"logits_processor: {processor!r} cannot be called")
    return [_in_place(processor) for processor in found]


def _in_place(processor: LogitsProcessor) -> Callable[[Ids, Row], None]:
    """Return our form of a processor: theirs returns the row."""

    def run(tokens: Ids, logits: Row) -> None:
        changed = processor(tokens, logits)
        if changed is not logits:
            logits[:] = changed

    return run


def _stopping(criteria: Any, vocab: _core.Vocab) -> Callable[[Ids, Row], None]:
    """Return a processor that leaves only the end of the generation when a criterion holds.

    llama-cpp-python asks at the same place, and leaves out the token that it has just drawn.
    """
    if not callable(criteria):
        criteria = StoppingCriteriaList(criteria)
    ends = vocab.eog_tokens
    if not ends:
        refuse("stopping_criteria", "the model has no token that ends a generation")

    def run(tokens: Ids, logits: Row) -> None:
        if criteria(tokens, logits):
            logits[:] = float("-inf")
            logits[ends[0]] = 0.0

    return run
