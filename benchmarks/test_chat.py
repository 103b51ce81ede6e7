"""What chats add: a template rendered and tokenised, an answer parsed while it grows."""

from __future__ import annotations

import itertools
import json
import statistics
import time
from typing import Any

import fetch_models
import pytest
from pytest_benchmark.fixture import BenchmarkFixture
from side_by_side import ROOT

from llama_crab import Llama
from llama_crab.chat import check_messages
from llama_crab.chat_reader import ChatReader

TEMPLATES = ROOT / "third_party/llama.cpp/models/templates"
TURNS = 20
N_TOKENS = 2000


@pytest.fixture(scope="module")
def llama() -> Any:
    with Llama(fetch_models.fetch(fetch_models.DEMO_MODEL), n_ctx=8192) as found:
        yield found


def conversation(mark: str = "") -> list[dict[str, Any]]:
    """Return twenty messages of 60 words, which `mark` makes different ones."""
    messages = [
        {"role": ("user", "assistant")[i % 2], "content": f"{mark} {i}: " + "some words " * 30}
        for i in range(TURNS - 1)
    ]
    return [*messages, {"role": "user", "content": f"{mark} And now?"}]


@pytest.mark.benchmark(group="chat")
def test_request_of_a_long_conversation(
    benchmark: BenchmarkFixture, figures: dict[str, Any], llama: Llama
) -> None:
    """Check, render, tokenise, make the request and its reader."""
    messages = conversation()

    def prepare() -> ChatReader:
        request, plan = llama._chats.request(messages, 100, stream=True)
        assert len(request.prompt) > 1000
        return ChatReader(plan, request.id)

    benchmark(prepare)
    figure = {"ms": round(benchmark.stats["median"] * 1e3, 3)}
    benchmark.extra_info.update(figure)
    figures["chat/request"] = figure


@pytest.mark.benchmark(group="chat")
def test_render_and_tokenise_what_was_never_seen(
    benchmark: BenchmarkFixture, figures: dict[str, Any], llama: Llama
) -> None:
    """The same, of other words each time, and its two parts."""
    templates = llama._chats.templates(None)
    split: dict[str, list[float]] = {"template_ms": [], "tokenise_ms": []}
    marks = itertools.count()

    def fresh() -> tuple[tuple[Any], dict[str, Any]]:
        return (check_messages(conversation(f"Message {next(marks)}")),), {}

    def prepare(messages: Any) -> None:
        begin = time.perf_counter()
        prompt = templates.render(json.dumps(messages), now=0)
        rendered = time.perf_counter()
        assert len(templates.tokenize(prompt)) > 1000
        split["template_ms"].append((rendered - begin) * 1e3)
        split["tokenise_ms"].append((time.perf_counter() - rendered) * 1e3)

    benchmark.pedantic(prepare, setup=fresh, rounds=60)
    figure = {name: round(statistics.median(times), 3) for name, times in split.items()}
    benchmark.extra_info.update(figure)
    figures["chat/unseen"] = figure


@pytest.mark.parametrize("kind", ["plain", "thinking", "call"])
@pytest.mark.benchmark(group="chat")
def test_streamed_answer(
    benchmark: BenchmarkFixture, figures: dict[str, Any], llama: Llama, kind: str
) -> None:
    """An answer of 2,000 tokens, read one token at a time."""
    options: dict[str, Any] = {}
    pieces = [" word"] * N_TOKENS
    if kind != "plain":
        options["chat_template"] = TEMPLATES / "Qwen-Qwen3-0.6B.jinja"
        pieces[:2] = ["<think>", "\n"]
        pieces[N_TOKENS // 2] = "</think>"
    if kind == "call":
        tool = {"type": "function", "function": {"name": "note", "parameters": {"type": "object"}}}
        options["tools"] = [tool]
        call = '<tool_call>\n{"name": "note", "arguments": {"text": "'
        pieces[N_TOKENS // 2 + 1] = call
        pieces[-1] = '"}}\n</tool_call>'
    _, plan = llama._chats.request([{"role": "user", "content": "Hi"}], 1, stream=True, **options)

    ends: list[float] = []

    def read() -> ChatReader:
        reader = ChatReader(plan, "x")
        for piece in pieces[:-1]:
            reader.push(piece)
        begin = time.perf_counter()
        reader.finish("stop", pieces[-1])
        ends.append((time.perf_counter() - begin) * 1e6)
        return reader

    reader = benchmark(read)
    assert bool(reader.message().tool_calls) == (kind == "call")
    assert bool(reader.message().reasoning_content) == (kind != "plain")
    figure = {
        "us_per_token": round(benchmark.stats["mean"] * 1e6 / N_TOKENS, 2),
        "end_us": round(statistics.median(ends), 1),
    }
    benchmark.extra_info.update(figure)
    figures[f"chat/stream/{kind}"] = figure
