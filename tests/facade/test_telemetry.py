"""Spans of requests, as OpenTelemetry's SDK gets them."""

from __future__ import annotations

import asyncio
import contextlib
import logging
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from opentelemetry import context as otel_context
from opentelemetry.sdk.trace import ReadableSpan, SpanProcessor, TracerProvider
from opentelemetry.sdk.trace.export import SimpleSpanProcessor
from opentelemetry.sdk.trace.export.in_memory_span_exporter import InMemorySpanExporter
from opentelemetry.sdk.trace.sampling import ALWAYS_OFF
from opentelemetry.trace import SpanKind, StatusCode

from llama_crab import AsyncLlama, Llama, LlamaParams, ParameterError, SamplerChain
from llama_crab.errors import ClosedError, RequestTimeoutError
from llama_crab.telemetry import instrument, uninstrument

FIELDS: dict[str, Any] = {"n_ctx": 1024, "n_seq_max": 2, "n_ubatch": 32, "n_threads": 1}
SECRET = "the secret of the crab"


@pytest.fixture
def exporter() -> InMemorySpanExporter:
    return InMemorySpanExporter()


@pytest.fixture
def provider(exporter: InMemorySpanExporter) -> TracerProvider:
    found = TracerProvider()
    found.add_span_processor(SimpleSpanProcessor(exporter))
    return found


@pytest.fixture
def llama(tiny_path: Path, provider: TracerProvider) -> Iterator[Llama]:
    with Llama(tiny_path, **FIELDS) as found:
        instrument(found, tracer_provider=provider)
        yield found


def only(exporter: InMemorySpanExporter) -> ReadableSpan:
    (span,) = exporter.get_finished_spans()
    exporter.clear()
    return span


def attributes(span: ReadableSpan) -> dict[str, Any]:
    assert span.attributes is not None
    return dict(span.attributes)


def test_a_span_says_what_was_asked_and_what_came(
    llama: Llama, exporter: InMemorySpanExporter
) -> None:
    chain = SamplerChain().penalties(64, 1.1, 0.5, 0.25).top_k(7).top_p(0.9).temp(0.6)
    result = llama.create_completion(SECRET, 9, sampler=chain, seed=5, n=2, stop=["~"])
    span = only(exporter)
    found = attributes(span)
    assert span.name == "text_completion tiny.gguf"
    assert span.kind is SpanKind.INTERNAL
    assert span.status.status_code is StatusCode.UNSET
    timings = {
        "llama_crab.prompt_sec": result.timings.prompt_sec,
        "llama_crab.predicted_sec": result.timings.predicted_sec,
        "llama_crab.sample_sec": result.timings.sample_sec,
        "gen_ai.response.time_to_first_chunk": result.timings.first_token_sec,
    }
    assert found == {
        "gen_ai.operation.name": "text_completion",
        "gen_ai.provider.name": "llama_crab",
        "gen_ai.system": "llama_crab",
        "gen_ai.request.model": "tiny.gguf",
        "gen_ai.request.max_tokens": 9,
        "gen_ai.request.seed": 5,
        "gen_ai.request.choice.count": 2,
        "gen_ai.request.stop_sequences": ("~",),
        "gen_ai.request.temperature": 0.6,
        "gen_ai.request.top_k": 7,
        "gen_ai.request.top_p": 0.9,
        "gen_ai.request.frequency_penalty": 0.5,
        "gen_ai.request.presence_penalty": 0.25,
        "gen_ai.response.id": result.id,
        "gen_ai.response.model": "tiny.gguf",
        "gen_ai.response.finish_reasons": tuple(c.finish_reason for c in result.choices),
        "gen_ai.usage.input_tokens": result.usage.prompt_tokens,
        "gen_ai.usage.output_tokens": result.usage.completion_tokens,
        "gen_ai.usage.cache_read.input_tokens": 0,
        **timings,
    }
    begin, end = span.start_time, span.end_time
    assert begin is not None
    assert end is not None
    (event,) = span.events
    assert event.name == "first_token"
    assert event.timestamp - begin == pytest.approx(result.timings.first_token_sec * 1e9, abs=1e3)
    assert end - begin == pytest.approx(result.timings.total_sec * 1e9, abs=1e3)
    assert SECRET not in span.to_json()
    assert result.text not in span.to_json()


def test_a_chat_is_named_so(smol_path: Path, provider: Any, exporter: Any) -> None:
    with Llama(smol_path, n_ctx=512) as llama:
        instrument(llama, tracer_provider=provider)
        with llama.create_chat_completion(
            [{"role": "user", "content": SECRET}], 3, stream=True, sampler=SamplerChain().greedy()
        ) as stream:
            result = stream.result()
    span = only(exporter)
    found = attributes(span)
    assert found["gen_ai.operation.name"] == "chat"
    assert found["gen_ai.request.stream"] is True
    assert found["gen_ai.request.temperature"] == 0.0
    assert found["gen_ai.response.id"] == result.id
    assert SECRET not in span.to_json()


def test_the_parent_is_the_span_of_whoever_asks(
    llama: Llama, provider: TracerProvider, exporter: InMemorySpanExporter
) -> None:
    """Also when the engine's thread ends the request, outside of any span."""
    tracer = provider.get_tracer("test")
    with tracer.start_as_current_span("direct") as direct:
        llama.create_completion("a", 3)
    with tracer.start_as_current_span("submitted") as submitted:
        handle = llama.submit("b", 30, ignore_eos=True)
    handle.result()
    llama.create_completion("c", 3)
    spans = [span for span in exporter.get_finished_spans() if "gen_ai.system" in attributes(span)]
    parents = [None if span.parent is None else span.parent.span_id for span in spans]
    ids = [parent.get_span_context().span_id for parent in (direct, submitted)]
    assert parents == [*ids, None]


def test_tasks_have_their_own_parents(
    tiny_path: Path, provider: TracerProvider, exporter: InMemorySpanExporter
) -> None:
    tracer = provider.get_tracer("test")

    async def ask(llama: AsyncLlama, i: int) -> tuple[str, int]:
        with tracer.start_as_current_span(f"task {i}") as span:
            await asyncio.sleep(0)
            result = await llama.create_completion([300 + i] * 5, 4, ignore_eos=True)
            return result.id, span.get_span_context().span_id

    async def main() -> dict[str, int]:
        async with AsyncLlama.load(LlamaParams(tiny_path, **FIELDS)) as llama:
            instrument(llama, tracer_provider=provider)
            return dict(await asyncio.gather(*(ask(llama, i) for i in range(6))))

    expected = asyncio.run(main())
    found = {
        attributes(span)["gen_ai.response.id"]: span.parent.span_id
        for span in exporter.get_finished_spans()
        if span.parent is not None
    }
    assert found == expected


def test_errors_are_recorded_and_do_not_quote_texts(
    llama: Llama, exporter: InMemorySpanExporter
) -> None:
    with pytest.raises(RequestTimeoutError):
        llama.create_completion("a", 900, ignore_eos=True, timeout=1e-5)
    span = only(exporter)
    assert span.status.status_code is StatusCode.ERROR
    assert span.status.description == "not done within 1e-05 s"
    assert attributes(span)["error.type"] == "RequestTimeoutError"
    assert "gen_ai.response.finish_reasons" not in attributes(span)
    event = span.events[-1]
    assert event.name == "exception"
    assert dict(event.attributes or {}) == {
        "exception.type": "RequestTimeoutError",
        "exception.message": "not done within 1e-05 s",
    }

    def fail(tokens: Any, logits: Any) -> None:
        raise ValueError(SECRET)

    with pytest.raises(ValueError, match=SECRET):
        llama.create_completion(SECRET, 4, logits_processors=[fail])
    span = only(exporter)
    assert attributes(span)["error.type"] == span.status.description == "ValueError"
    assert SECRET not in span.to_json()


def test_a_cancelled_request_and_a_refused_one_end_their_spans(
    llama: Llama, exporter: InMemorySpanExporter
) -> None:
    stream = llama.create_completion("a", 900, ignore_eos=True, stream=True)
    next(stream)
    stream.close()
    assert attributes(only(exporter))["gen_ai.response.finish_reasons"] == ("cancelled",)
    with pytest.raises(ParameterError):
        llama.create_completion("a", -3)
    assert not exporter.get_finished_spans()
    llama.drain()
    with pytest.raises(ClosedError):
        llama.create_completion("a", 3)
    assert attributes(only(exporter))["error.type"] == "ClosedError"


def test_a_span_that_is_not_sampled_costs_no_attributes(llama: Llama) -> None:
    instrument(llama, tracer_provider=TracerProvider(sampler=ALWAYS_OFF))
    assert llama.create_completion("a", 3, ignore_eos=True).usage.completion_tokens == 3


def test_a_processor_that_fails_does_not_end_the_loop(
    llama: Llama, caplog: pytest.LogCaptureFixture
) -> None:
    class Broken(SpanProcessor):
        def on_end(self, span: ReadableSpan) -> None:
            raise RuntimeError("broken")

    provider = TracerProvider()
    provider.add_span_processor(Broken())
    instrument(llama, tracer_provider=provider)
    with caplog.at_level(logging.ERROR):
        assert llama.submit("a", 3, ignore_eos=True).result().usage.completion_tokens == 3
    assert "a span was lost" in caplog.text


def test_without_it_there_are_no_spans(llama: Llama, exporter: InMemorySpanExporter) -> None:
    uninstrument(llama)
    llama.create_completion("a", 3)
    assert not exporter.get_finished_spans()
    assert llama._engine.on_submit is None


def test_what_is_off_imports_nothing(tiny_path: Path) -> None:
    code = (
        "import sys, llama_crab\n"
        f"with llama_crab.Llama({str(tiny_path)!r}, n_ctx=64) as llama:\n"
        "    llama.create_completion('a', 2)\n"
        "print([name for name in sys.modules if 'telemetry' in name or 'pytest' in name])"
    )
    done = subprocess.run([sys.executable, "-c", code], check=True, capture_output=True, text=True)
    assert done.stdout.strip() == "[]"


def test_without_the_package_the_error_names_the_extra(
    llama: Llama, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, "opentelemetry", None)
    with pytest.raises(ImportError, match=r"llama-crab\[otel\]"):
        instrument(llama)


def test_a_context_of_the_caller_stays_as_it_was(llama: Llama, provider: TracerProvider) -> None:
    before = otel_context.get_current()
    with contextlib.suppress(RequestTimeoutError):
        llama.create_completion("a", 3, timeout=1e-5)
    assert otel_context.get_current() is before


def test_a_processor_that_fails_at_the_beginning_refuses_no_request(
    tiny_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    class Broken(SpanProcessor):
        def on_start(self, span: Any, parent_context: Any = None) -> None:
            raise RuntimeError("no more")

    provider = TracerProvider()
    provider.add_span_processor(Broken())
    with Llama(tiny_path, **FIELDS) as llama:
        instrument(llama, tracer_provider=provider)
        assert llama.create_completion("a", 3, ignore_eos=True).usage.completion_tokens == 3
    assert "a span was lost" in caplog.text
