"""OpenAI's completions API in our terms: a request's fields, the response's body, errors."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any, cast

from .completion import Completion, Usage
from .errors import (
    ContextLengthError,
    InvalidTokenError,
    RegexError,
    SamplerError,
    SchemaError,
    TokenizeError,
)
from .params import INT32_MAX, RANDOM_SEED, ParameterError, require_integer
from .request_builder import CompletionOptions, Prompt
from .sampling import SamplerChain
from .sampling_stages import SELECTORS, STAGES, Stage

_MAX_TOKENS = 16
# OpenAI's own bound; without one, a single number could ask for all of the memory.
_MOST_ANSWERS = 128

# Which parameter of which stage a field sets.
_SAMPLING = {
    "temperature": ("temp", "t"),
    "top_p": ("top_p", "p"),
    "top_k": ("top_k", "k"),
    "min_p": ("min_p", "p"),
    "repeat_penalty": ("penalties", "penalty_repeat"),
    "frequency_penalty": ("penalties", "penalty_freq"),
    "presence_penalty": ("penalties", "penalty_present"),
}

_OF_THE_REQUEST = (
    *(ParameterError, InvalidTokenError, SamplerError, TokenizeError),
    *(SchemaError, RegexError),
)


def completion_options(
    body: Mapping[str, Any],
) -> tuple[tuple[Prompt, ...], int, CompletionOptions]:
    """Return prompts, ``max_tokens`` and options of a ``/v1/completions`` body.

    Each prompt is a request of its own with the same options; `completion_body` puts their results
    together. A field that is null counts as left out, and ``max_tokens`` is 16 then, as OpenAI has
    it. Without any sampler field the model's default chain runs; with some, the others keep
    llama.cpp's values, in llama.cpp's order. ``temperature`` 0 is greedy.

    ``model``, ``stream``, ``stream_options`` and ``user`` are checked to be of their types; what
    they ask for is up to the caller.

    Raises `ParameterError`, which names the field, for wrong values and unknown fields.
    Thread-safety: any thread.
    """
    if not isinstance(body, Mapping):
        raise ParameterError(f"body: expected an object, not {_shown(body)}")
    given = {name: value for name, value in body.items() if value is not None}
    for name in given:
        if name not in _KNOWN:
            raise ParameterError(f"{name}: not supported")
    if "prompt" not in given:
        raise ParameterError("prompt: missing")
    checked = {name: rule(name, given[name]) for name, rule in _RULES.items() if name in given}
    options = {name: checked[name] for name in _OPTIONS if name in checked}
    if options.get("best_of", _MOST_ANSWERS) < options.get("n", 1):
        raise ParameterError(f"best_of: {options['best_of']} is less than n {options['n']}")
    sampler = _sampler(given)
    if sampler is not None:
        options["sampler"] = sampler
    max_tokens = checked.get("max_tokens", _MAX_TOKENS)
    return checked["prompt"], max_tokens, cast(CompletionOptions, options)


def completion_body(completions: Sequence[Completion], model: str | None = None) -> dict[str, Any]:
    """Return the response's body: the results of a request's prompts as one ``text_completion``.

    `model` is the name that was asked for, by default the file's. The body of several prompts has
    no ``timings`` and no ``seed``: they ran beside each other, each with its own.
    """
    body = completions[0].to_dict()
    if model is not None:
        body["model"] = model
    if len(completions) == 1:
        return body
    choices = [choice.to_dict() for completion in completions for choice in completion.choices]
    usages = [completion.usage for completion in completions]
    body["choices"] = [{**choice, "index": index} for index, choice in enumerate(choices)]
    body["usage"] = Usage(
        prompt_tokens=sum(usage.prompt_tokens for usage in usages),
        completion_tokens=sum(usage.completion_tokens for usage in usages),
        total_tokens=sum(usage.total_tokens for usage in usages),
        cached_tokens=sum(usage.cached_tokens for usage in usages),
    ).to_dict()
    del body["timings"], body["seed"]
    return body


def error_status(error: BaseException) -> tuple[int, str]:
    """Return the HTTP status and the error code: 400 for what the request got wrong, else 500."""
    if isinstance(error, ContextLengthError):
        return 400, "context_length_exceeded"
    if isinstance(error, _OF_THE_REQUEST):
        return 400, "invalid_request"
    return 500, "server_error"


def _sampler(given: Mapping[str, Any]) -> SamplerChain | None:
    changes: dict[str, dict[str, Any]] = {}
    for field, (stage, parameter) in _SAMPLING.items():
        if field in given:
            check = STAGES[stage][parameter]
            changes.setdefault(stage, {})[parameter] = _within(field, given[field], check)
    if not changes:
        return None
    # What cuts candidates leaves the best one, which is all that temperature 0 looks at.
    greedy = changes.get("temp", {}).get("t") == 0.0
    chain = [
        Stage(stage.name, **{**stage.params, **changes.get(stage.name, {})})
        for stage in (*SamplerChain().penalties().stages, *SamplerChain.default().stages)
        if stage.name not in SELECTORS and not (greedy and stage.name not in ("penalties", "temp"))
    ]
    return SamplerChain(stage for stage in chain if not stage.is_noop)


def _within(name: str, value: Any, check: Callable[[Any], Any]) -> Any:
    try:
        return check(value)
    except (TypeError, ValueError, OverflowError) as error:
        reason = str(error) if type(error) is ValueError else "has the wrong type"
        raise ParameterError(f"{name}: {reason}, not {_shown(value)}") from None


def _prompts(name: str, value: Any) -> tuple[Prompt, ...]:
    if isinstance(value, str):
        return (value,)
    if isinstance(value, list) and value:
        if _are_ids(value):
            return (value,)
        if all(isinstance(item, str) or _are_ids(item) for item in value):
            return tuple(value)
    raise ParameterError(f"{name}: expected text, token ids or a list of them, not {_shown(value)}")


def _are_ids(value: Any) -> bool:
    return isinstance(value, list) and bool(value) and all(type(item) is int for item in value)


def _max_tokens(name: str, value: Any) -> int:
    return require_integer(name, value, (0, INT32_MAX))


def _answers(name: str, value: Any) -> int:
    return require_integer(name, value, (1, _MOST_ANSWERS))


def _logprobs(name: str, value: Any) -> int:
    return require_integer(name, value, (0, INT32_MAX))


def _seed(name: str, value: Any) -> int:
    return require_integer(name, value, (0, RANDOM_SEED - 1))


def _stop(name: str, value: Any) -> tuple[str, ...]:
    stops = [value] if isinstance(value, str) else value
    if not isinstance(stops, list) or not all(isinstance(item, str) and item for item in stops):
        raise ParameterError(f"{name}: expected non-empty strings, not {_shown(value)}")
    return tuple(stops)


def _flag(name: str, value: Any) -> bool:
    if not isinstance(value, bool):
        raise ParameterError(f"{name}: expected true or false, not {_shown(value)}")
    return value


def _text(name: str, value: Any) -> str:
    if not isinstance(value, str):
        raise ParameterError(f"{name}: expected text, not {_shown(value)}")
    return value


def _object(name: str, value: Any) -> Mapping[str, Any]:
    if not isinstance(value, Mapping):
        raise ParameterError(f"{name}: expected an object, not {_shown(value)}")
    return value


def _logit_bias(name: str, value: Any) -> dict[int, float]:
    biases: dict[int, float] = {}
    for key, bias in _object(name, value).items():
        # Not int() alone, which also reads " 1" and "1_000".
        token = int(key) if key.isascii() and key.isdigit() else -1
        if not 0 <= token <= INT32_MAX:
            raise ParameterError(f"{name}: {_shown(key)} is no token id")
        if isinstance(bias, bool) or not isinstance(bias, (int, float)) or not math.isfinite(bias):
            raise ParameterError(f"{name}[{token}]: expected a finite number, not {_shown(bias)}")
        biases[token] = float(bias)
    return biases


def _shown(value: Any) -> str:
    return f"{value!r:.80}"


_RULES: dict[str, Callable[[str, Any], Any]] = {
    "prompt": _prompts,
    "max_tokens": _max_tokens,
    "n": _answers,
    "best_of": _answers,
    "stop": _stop,
    "seed": _seed,
    "logprobs": _logprobs,
    "echo": _flag,
    "suffix": _text,
    "logit_bias": _logit_bias,
    "model": _text,
    "user": _text,
    "stream": _flag,
    "stream_options": _object,
}
# Those that become options of the same name.
_OPTIONS = ("n", "best_of", "stop", "seed", "logprobs", "echo", "suffix", "logit_bias")
_KNOWN = {*_RULES, *_SAMPLING}
