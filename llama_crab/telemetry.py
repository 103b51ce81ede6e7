"""OpenTelemetry: a span for each request. Needs the extra ``otel``; off unless asked for."""

from __future__ import annotations

import logging
import time
from collections.abc import Mapping
from functools import partial
from typing import Any

from .async_llama import AsyncLlama
from .engine import Request
from .errors import LlamaCrabError
from .llama import Llama

TYPE_CHECKING = False
if TYPE_CHECKING:
    from opentelemetry.trace import Span, Tracer, TracerProvider

_PROVIDER = "llama_crab"
_STAGES = {
    "temp": ("temperature", "t"),
    "temp_ext": ("temperature", "t"),
    "top_k": ("top_k", "k"),
    "top_p": ("top_p", "p"),
}
_PENALTIES = {"frequency_penalty": "penalty_freq", "presence_penalty": "penalty_present"}


def instrument(llama: Llama | AsyncLlama, *, tracer_provider: TracerProvider | None = None) -> None:
    """Record a span for each request of `llama` from now on, until `uninstrument`.

    The span begins with the call, as a child of the span that is current in the thread or task that
    makes it, and ends with the answer. Its attributes are those of OpenTelemetry's conventions for
    generative AI, and ``llama_crab.*`` for our timings; an event ``first_token`` has that moment.
    Errors are recorded, texts of prompts and answers never are. A call whose arguments are refused
    makes no request, so no span.

    `tracer_provider` defaults to the global one. Raises ImportError without ``opentelemetry-api``,
    `ParameterError` for a model that embeds.
    """
    try:
        from opentelemetry import trace
    except ImportError as error:
        raise ImportError(
            "llama_crab.telemetry needs opentelemetry-api: pip install 'llama-crab[otel]'"
        ) from error
    from ._version import __version__

    llama = llama.llama if isinstance(llama, AsyncLlama) else llama
    llama._require_text()
    tracer = trace.get_tracer(__name__, __version__, tracer_provider)
    llama._engine.on_submit = partial(_try_begin, tracer, llama._name)


def uninstrument(llama: Llama | AsyncLlama) -> None:
    """Record no spans for further requests."""
    llama = llama.llama if isinstance(llama, AsyncLlama) else llama
    llama._engine.on_submit = None


def _try_begin(tracer: Tracer, model: str, request: Request) -> None:
    try:
        _begin(tracer, model, request)
    except Exception:  # of a sampler or a processor of spans: no reason to refuse the request
        logging.getLogger(__name__).exception("a span was lost")


def _begin(tracer: Tracer, model: str, request: Request) -> None:
    from opentelemetry.trace import SpanKind

    operation = "chat" if request.id.startswith("chat") else "text_completion"
    now_ns = time.time_ns()
    span = tracer.start_span(
        f"{operation} {model}",
        # The model runs in this process.
        kind=SpanKind.INTERNAL,
        # The ones that samplers of spans look at.
        attributes={
            "gen_ai.operation.name": operation,
            "gen_ai.provider.name": _PROVIDER,
            "gen_ai.system": _PROVIDER,  # what it was called before
            "gen_ai.request.model": model,
        },
        start_time=now_ns,
    )
    if span.is_recording():
        span.set_attributes(_asked(request))
    request.on_done = partial(_end, span, model, now_ns)


def _asked(request: Request) -> dict[str, Any]:
    """Return what the request asks for, where it says something."""
    asked: dict[str, Any] = {
        "max_tokens": request.max_tokens,
        "seed": request.seed,
        "choice.count": request.n if request.n > 1 else None,
        "stop_sequences": request.stop or None,
        "stream": True if request.stream else None,
        **_sampling(request.sampler.to_dict()["stages"]),
    }
    return {f"gen_ai.request.{name}": value for name, value in asked.items() if value is not None}


def _sampling(stages: list[Mapping[str, Any]]) -> dict[str, Any]:
    found: dict[str, Any] = {}
    for stage in stages:
        if stage["name"] in _STAGES:
            name, param = _STAGES[stage["name"]]
            found[name] = stage.get(param)
        elif stage["name"] == "penalties":
            found |= {name: stage.get(param) for name, param in _PENALTIES.items()}
        elif stage["name"] == "greedy":
            found["temperature"] = 0.0
    return found


def _end(span: Span, model: str, begin_ns: int, request: Request) -> None:
    try:
        if span.is_recording():
            _say_outcome(span, model, begin_ns, request)
        span.end(begin_ns + int(request.timings().total_sec * 1e9))
    except Exception:  # a processor of spans that fails must not end the engine's loop
        logging.getLogger(__name__).exception("a span was lost")


def _say_outcome(span: Span, model: str, begin_ns: int, request: Request) -> None:
    from opentelemetry.trace import Status, StatusCode

    usage, timings, error = request.usage(), request.timings(), request.error
    attributes: dict[str, Any] = {
        "gen_ai.response.id": request.id,
        "gen_ai.response.model": model,
        "gen_ai.usage.input_tokens": usage.prompt_tokens,
        "gen_ai.usage.output_tokens": usage.completion_tokens,
        "gen_ai.usage.cache_read.input_tokens": usage.cached_tokens,
        "llama_crab.prompt_sec": timings.prompt_sec,
        "llama_crab.predicted_sec": timings.predicted_sec,
        "llama_crab.sample_sec": timings.sample_sec,
    }
    if timings.first_token_sec > 0.0:
        attributes["gen_ai.response.time_to_first_chunk"] = timings.first_token_sec
        first_ns = begin_ns + int(timings.first_token_sec * 1e9)
        span.add_event("first_token", timestamp=first_ns)
    if error is None:
        attributes["gen_ai.response.finish_reasons"] = [
            sequence.finish_reason or "cancelled" for sequence in request.chosen()
        ]
    else:
        kind = type(error).__qualname__
        attributes["error.type"] = kind
        # What other code raises, a logits processor's, may quote the text it worked on.
        message = str(error) if isinstance(error, LlamaCrabError) else ""
        event = {"exception.type": kind} | ({"exception.message": message} if message else {})
        span.add_event("exception", event)
        span.set_status(Status(StatusCode.ERROR, message or kind))
    span.set_attributes(attributes)
