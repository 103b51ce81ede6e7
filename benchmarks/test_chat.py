"""What chats add: a template rendered and tokenised, an answer parsed while it grows."""

from __future__ import annotations

from typing import Any

import fetch_models
import pytest
from pytest_benchmark.fixture import BenchmarkFixture
from side_by_side import ROOT

from llama_crab import Llama
from llama_crab.chat_reader import ChatReader

TEMPLATES = ROOT / "third_party/llama.cpp/models/templates"
TURNS = 20
N_TOKENS = 2000


@pytest.fixture(scope="module")
def llama() -> Any:
    with Llama(fetch_models.fetch(fetch_models.DEMO_MODEL), n_ctx=8192) as found:
        yield found


@pytest.mark.benchmark(group="chat")
def test_request_of_a_long_conversation(
    benchmark: BenchmarkFixture, figures: dict[str, Any], llama: Llama
) -> None:
    """Twenty messages of 60 words: check, render, tokenise, make the request and its reader."""
    messages = [
        {"role": ("user", "assistant")[i % 2], "content": f"Message {i}: " + "some words " * 30}
        for i in range(TURNS - 1)
    ]
    messages.append({"role": "user", "content": "And now?"})

    def prepare() -> ChatReader:
        request, plan = llama._chats.request(messages, 100, stream=True)
        assert len(request.prompt) > 1000
        return ChatReader(plan, request.id)

    benchmark(prepare)
    figure = {"ms": round(benchmark.stats["median"] * 1e3, 3)}
    benchmark.extra_info.update(figure)
    figures["chat/request"] = figure


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

    def read() -> ChatReader:
        reader = ChatReader(plan, "x")
        for piece in pieces[:-1]:
            reader.push(piece)
        reader.finish("stop", pieces[-1])
        return reader

    reader = benchmark(read)
    assert bool(reader.message().tool_calls) == (kind == "call")
    assert bool(reader.message().reasoning_content) == (kind != "plain")
    figure = {"us_per_token": round(benchmark.stats["mean"] * 1e6 / N_TOKENS, 2)}
    benchmark.extra_info.update(figure)
    figures[f"chat/stream/{kind}"] = figure
