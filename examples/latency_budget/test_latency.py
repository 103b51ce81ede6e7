"""A latency budget as a test; needs the extra `bench`: pytest examples/latency_budget

LLAMA_MODEL names a GGUF file, else the demo model is used. Choose budgets for your machine.
"""

import os

import pytest

from llama_crab import Llama, SamplerChain

MAX_TTFT_MS = float(os.environ.get("MAX_TTFT_MS", "3000"))
MIN_TOKENS_PER_SEC = float(os.environ.get("MIN_TOKENS_PER_SEC", "2"))


@pytest.fixture(scope="module")
def llama():
    with Llama(os.environ.get("LLAMA_MODEL"), n_ctx=1024) as found:
        yield found


def test_an_answer_comes_in_time(llama, llama_bench):
    llama_bench(
        llama,
        "The capital of France is",
        max_tokens=16,
        rounds=3,
        sampler=SamplerChain.benchmark(),
        max_ttft_ms=MAX_TTFT_MS,
        min_tokens_per_sec=MIN_TOKENS_PER_SEC,
    )


def test_a_chat_behind_a_known_system_prompt(llama, llama_bench):
    messages = [
        {"role": "system", "content": "You are terse. " * 8},
        {"role": "user", "content": "Name a sea."},
    ]
    result = llama_bench(llama, messages, 8, rounds=3, cache_prompt=True, max_ttft_ms=MAX_TTFT_MS)
    assert result.cached_n > 40  # the warm-up computed it
