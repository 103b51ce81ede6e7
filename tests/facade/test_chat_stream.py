"""Chats that are streamed, submitted, awaited and cancelled give what the plain call gives."""

from __future__ import annotations

import asyncio
from collections.abc import Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest

from llama_crab import (
    AsyncLlama,
    ChatCompletionChunk,
    ChatMessage,
    Llama,
    ParameterError,
    SamplerChain,
)
from llama_crab.errors import RequestTimeoutError

TEMPLATES = Path(__file__).resolve().parents[2] / "third_party/llama.cpp/models/templates"
GREEDY = SamplerChain().greedy()
MESSAGES = [{"role": "user", "content": "Name three colours."}]
OPTIONS: dict[str, Any] = {"sampler": GREEDY, "seed": 1}
THINKING: dict[str, Any] = {
    "chat_template": TEMPLATES / "Qwen-QwQ-32B.jinja",
    "reasoning_budget": 4,
}


@pytest.fixture(scope="module")
def submitting_llama(smol_path: Path) -> Iterator[Llama]:
    """Return SmolLM2 of its own: what is submitted gives the engine a thread for good."""
    with Llama(smol_path, n_ctx=2048, n_ubatch=64, n_seq_max=2, flash_attn_type=True) as llama:
        yield llama


def joined(chunks: Iterable[ChatCompletionChunk], index: int = 0) -> ChatMessage:
    deltas = [chunk.delta for chunk in chunks if chunk.index == index]
    assert [delta.role for delta in deltas] == ["assistant"] + [None] * (len(deltas) - 1)
    reasoning = "".join([delta.reasoning_content or "" for delta in deltas])
    return ChatMessage(
        content="".join([delta.content or "" for delta in deltas]),
        reasoning_content=reasoning or None,
    )


@pytest.mark.parametrize("options", [{}, THINKING, {"logprobs": 1}, {"stop": ["r", "e"]}])
def test_a_stream_adds_up_to_the_whole(smol_llama: Llama, options: Any) -> None:
    whole = smol_llama.create_chat_completion(MESSAGES, 20, **OPTIONS, **options)
    stream = smol_llama.create_chat_completion(MESSAGES, 20, stream=True, **OPTIONS, **options)
    chunks = list(stream)
    assert joined(chunks) == whole.message
    assert [chunk.finish_reason for chunk in chunks[:-1]] == [None] * (len(chunks) - 1)
    assert chunks[-1].finish_reason == whole.finish_reason
    assert chunks[-1].usage is not None
    result = stream.result()
    assert result.choices == whole.choices
    assert {chunk.id for chunk in chunks} == {result.id}
    if "logprobs" in options:
        entries = [token for chunk in chunks if chunk.logprobs for token in chunk.logprobs.tokens]
        assert whole.choices[0].logprobs is not None
        assert tuple(entries) == whole.choices[0].logprobs.tokens
    shape = chunks[0].to_dict()
    assert shape["object"] == "chat.completion.chunk"
    assert shape["choices"][0]["delta"]["role"] == "assistant"


def test_two_answers_stream_side_by_side(smol_llama: Llama) -> None:
    options: dict[str, Any] = {"sampler": SamplerChain().temp(1.5), "seed": 3, "n": 2, **THINKING}
    whole = smol_llama.create_chat_completion(MESSAGES, 14, **options)
    chunks = list(smol_llama.create_chat_completion(MESSAGES, 14, stream=True, **options))
    for choice in whole.choices:
        assert joined(chunks, choice.index) == choice.message
    assert whole.choices[0].message != whole.choices[1].message


def test_a_result_may_be_asked_for_at_any_time(submitting_llama: Llama) -> None:
    whole = submitting_llama.create_chat_completion(MESSAGES, 14, **OPTIONS, **THINKING)
    for n_read in (0, 1, 5):
        handle = submitting_llama.submit_chat(MESSAGES, 14, stream=True, **OPTIONS, **THINKING)
        for _ in range(n_read):
            next(handle)
        assert handle.result(60).choices == whole.choices
        assert handle.done
    at_once = submitting_llama.submit_chat(MESSAGES, 14, **OPTIONS, **THINKING)
    assert joined(at_once) == whole.message


def test_threads_share_the_model(smol_llama: Llama) -> None:
    def ask(n: int) -> str:
        messages = [{"role": "user", "content": f"Count to {n}."}]
        return smol_llama.create_chat_completion(messages, 8, **OPTIONS).text

    alone = [ask(n) for n in range(4)]
    with ThreadPoolExecutor(4) as pool:
        assert list(pool.map(ask, range(4))) == alone


def test_a_cancelled_chat_keeps_what_it_has(smol_llama: Llama, submitting_llama: Llama) -> None:
    whole = smol_llama.create_chat_completion(MESSAGES, 40, ignore_eos=True, **OPTIONS)
    with smol_llama.create_chat_completion(
        MESSAGES, 400, stream=True, ignore_eos=True, **OPTIONS
    ) as stream:
        first = next(stream)
        stream.close()
        result = stream.result()
    assert result.finish_reason == "cancelled"
    assert result.text.startswith(first.text)
    assert whole.text.startswith(result.text[: len(whole.text)])
    handle = submitting_llama.submit_chat(MESSAGES, 400, ignore_eos=True, **OPTIONS)
    handle.cancel()
    assert handle.result(60).finish_reason == "cancelled"
    with pytest.raises(RequestTimeoutError):
        smol_llama.create_chat_completion(MESSAGES, 400, timeout=1e-6, **OPTIONS)


def test_async_chats(smol_llama: Llama, smol_path: Path) -> None:
    whole = smol_llama.create_chat_completion(MESSAGES, 10, **OPTIONS)

    async def main() -> None:
        llama = AsyncLlama(smol_path, n_ctx=2048, n_ubatch=64, n_seq_max=2, flash_attn_type=True)
        async with llama, asyncio.timeout(120):
            answers, chunks = await asyncio.gather(
                llama.create_chat_completion(MESSAGES, 10, **OPTIONS),
                read(llama.create_chat_completion(MESSAGES, 10, stream=True, **OPTIONS)),
            )
            assert answers.choices == whole.choices
            assert joined(chunks) == whole.message
            async with llama.create_chat_completion(MESSAGES, 400, ignore_eos=True) as handle:
                pass
            assert handle.done
            with pytest.raises(ParameterError):
                llama.create_chat_completion([], 1)

    async def read(handle: Any) -> list[ChatCompletionChunk]:
        return [chunk async for chunk in handle]

    asyncio.run(main())
