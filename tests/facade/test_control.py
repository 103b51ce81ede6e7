"""Who may call when, how a request ends early, and what wrong arguments give."""

from __future__ import annotations

import gc
import os
import signal
import threading
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest

from llama_crab import Completion, CompletionStream, Llama, ParameterError, SamplerChain
from llama_crab.errors import (
    BackendUnavailableError,
    ClosedError,
    ContextLengthError,
    GrammarError,
    InvalidTokenError,
    LlamaCrabError,
    ModelLoadError,
    ModelNotFoundError,
    SamplerError,
)

GREEDY = SamplerChain().greedy()
PROMPTS = [
    "The capital of France is",
    "def fibonacci(n):\n",
    "Once upon a time",
    "Water boils at",
    "The largest planet is",
    "Mary had a little",
]


def complete(llama: Llama, prompt: Any, max_tokens: int = 12, **options: Any) -> Completion:
    result = llama.create_completion(prompt, max_tokens, **{"sampler": GREEDY, **options})
    assert isinstance(result, Completion)
    return result


def stream(llama: Llama, prompt: Any, max_tokens: int = 12, **options: Any) -> CompletionStream:
    options = {"sampler": GREEDY, **options}
    result = llama.create_completion(prompt, max_tokens, stream=True, **options)
    assert isinstance(result, CompletionStream)
    return result


def test_streams_on_one_llama_interleave(smol_llama: Llama) -> None:
    expected = [complete(smol_llama, prompt).text for prompt in PROMPTS[:3]]
    streams = [stream(smol_llama, prompt) for prompt in PROMPTS[:3]]
    texts = ["", "", ""]
    for _ in range(12):
        for i, job in enumerate(streams):
            texts[i] += next(job).text
    assert texts == expected
    assert [list(job) for job in streams] == [[], [], []]


def test_an_abandoned_stream_gives_its_slot_back(smol_llama: Llama) -> None:
    expected = complete(smol_llama, PROMPTS[1]).text
    for _ in range(6):  # more than there are slots
        job = stream(smol_llama, PROMPTS[0], 500)
        next(job)
        assert smol_llama._engine.scheduler.n_running == 1
        del job
        gc.collect()
        assert complete(smol_llama, PROMPTS[1]).text == expected
        assert smol_llama._engine.scheduler.n_running == 0


def test_a_closed_stream_ends_as_cancelled(smol_llama: Llama) -> None:
    whole = complete(smol_llama, PROMPTS[0])
    with stream(smol_llama, PROMPTS[0]) as job:
        first = next(job)
    assert smol_llama._engine.scheduler.n_running == 0
    result = job.result()
    assert result.finish_reason == "cancelled"
    assert result.text == first.text
    assert whole.text.startswith(result.text)
    early = stream(smol_llama, PROMPTS[0], echo=True, logprobs=1)
    early.close()
    assert early.result().tokens == ()


def test_threads_share_one_llama(smol_llama: Llama) -> None:
    expected = [complete(smol_llama, prompt).text for prompt in PROMPTS]
    before = smol_llama._engine.scheduler.stepper.n_steps
    start = threading.Barrier(len(PROMPTS))

    def ask(prompt: str) -> str:
        start.wait()
        return complete(smol_llama, prompt, cache_prompt=False).text

    with ThreadPoolExecutor(len(PROMPTS)) as pool:
        assert list(pool.map(ask, PROMPTS)) == expected
    # They ran in common batches: one after the other takes 12 steps each.
    assert smol_llama._engine.scheduler.stepper.n_steps - before < 12 * len(PROMPTS)


def test_an_error_reaches_the_thread_that_asked(smol_llama: Llama) -> None:
    expected = complete(smol_llama, PROMPTS[0]).text
    dead_end = SamplerChain().grammar('root ::= "yes"').greedy()

    def ask(i: int) -> str:
        if i % 2:
            with pytest.raises(SamplerError, match="no candidate"):
                complete(smol_llama, PROMPTS[1], sampler=dead_end, ignore_eos=True)
            return expected
        return complete(smol_llama, PROMPTS[0]).text

    with ThreadPoolExecutor(4) as pool:
        assert list(pool.map(ask, range(8))) == [expected] * 8


@contextmanager
def interrupted_when(ready: Callable[[], bool]) -> Iterator[None]:
    """Raise SIGINT in this process, from another thread, as soon as `ready` says so."""
    over = threading.Event()

    def wait() -> None:
        while not over.is_set():
            if ready():
                os.kill(os.getpid(), signal.SIGINT)  # to the main thread, as of a terminal
                return
            over.wait(0.0005)

    thread = threading.Thread(target=wait)
    thread.start()
    try:
        with pytest.raises(KeyboardInterrupt):
            yield
    finally:
        over.set()
        thread.join()


@pytest.mark.parametrize("streamed", [False, True])
def test_ctrl_c_ends_a_generation_within_a_step(smol_llama: Llama, streamed: bool) -> None:
    expected = complete(smol_llama, PROMPTS[0]).text
    stepper = smol_llama._engine.scheduler.stepper
    begin = stepper.n_steps
    at_signal = 0

    def ready() -> bool:
        nonlocal at_signal
        at_signal = stepper.n_steps
        return at_signal >= begin + 5

    with interrupted_when(ready):
        if streamed:
            list(stream(smol_llama, PROMPTS[0], 900, ignore_eos=True))
        else:
            complete(smol_llama, PROMPTS[0], 900, ignore_eos=True)
    # The step that was running, and one that may have begun while the thread looked.
    assert stepper.n_steps <= at_signal + 2
    assert (smol_llama._engine.scheduler.n_running, smol_llama._engine.scheduler.n_waiting) == (
        0,
        0,
    )
    assert complete(smol_llama, PROMPTS[0]).text == expected


def test_ctrl_c_ends_a_long_prefill_within_a_step(smol_llama: Llama) -> None:
    expected = complete(smol_llama, PROMPTS[2]).text
    stepper = smol_llama._engine.scheduler.stepper
    long_prompt = [(7 * i) % 4000 + 100 for i in range(1000)]  # 16 steps of 64 tokens
    begin, begin_tokens = stepper.n_steps, stepper.n_decoded
    with interrupted_when(lambda: stepper.n_steps >= begin + 2):
        complete(smol_llama, long_prompt)
    assert 128 <= stepper.n_decoded - begin_tokens < 1000
    assert smol_llama._engine.scheduler.n_running == 0
    assert complete(smol_llama, PROMPTS[2]).text == expected
    # What was prefilled before the signal stays and is used.
    again = complete(smol_llama, long_prompt, 1)
    assert again.timings.cached_n >= 128


def test_ctrl_c_of_one_caller_leaves_the_others_alone(smol_llama: Llama) -> None:
    expected = complete(smol_llama, PROMPTS[3], 60).text
    stepper = smol_llama._engine.scheduler.stepper
    answer: list[str] = []
    other = threading.Thread(
        target=lambda: answer.append(complete(smol_llama, PROMPTS[3], 60).text)
    )
    begin = stepper.n_steps
    other.start()
    with interrupted_when(lambda: stepper.n_steps >= begin + 10):
        complete(smol_llama, PROMPTS[0], 900, ignore_eos=True)
    other.join()
    assert answer == [expected]


def test_closing_ends_what_runs(tiny_path: Path) -> None:
    llama = Llama(tiny_path, n_ctx=256, n_threads=1)
    job = stream(llama, [300, 301], 100, ignore_eos=True)
    chunks = [next(job), next(job)]
    llama.close()
    chunks += list(job)
    assert chunks[-1].finish_reason == "cancelled"
    assert job.result().text == "".join(chunk.text for chunk in chunks)
    assert "closed" in repr(llama)
    for use in (
        lambda: llama.create_completion("a"),
        lambda: llama.create_completion("a", stream=True),
        lambda: llama.n_ctx,
    ):
        with pytest.raises(ClosedError):
            use()
    llama.close()


def test_close_is_refused_while_a_view_of_the_logits_lives(tiny_path: Path) -> None:
    llama = Llama(tiny_path, n_ctx=256, n_threads=1)
    complete(llama, [300, 301], 1)
    with llama.context.logits(), pytest.raises(BufferError):
        llama.close()
    assert complete(llama, [300, 301], 2, ignore_eos=True).usage.completion_tokens == 2
    llama.close()
    with pytest.raises(ClosedError):
        complete(llama, [300, 301], 1)


@pytest.mark.parametrize(
    ("options", "error", "words"),
    [
        ({"prompt": b"bytes"}, ParameterError, "prompt"),
        ({"prompt": 5}, ParameterError, "prompt"),
        ({"prompt": None}, ParameterError, "prompt"),
        ({"prompt": ["a", "b"]}, ParameterError, "prompt"),
        ({"prompt": [1.5]}, ParameterError, "prompt"),
        ({"prompt": [10**6]}, InvalidTokenError, "prompt"),
        ({"prompt": [-1]}, InvalidTokenError, "prompt"),
        ({"prompt": [300] * 257}, ContextLengthError, "257"),
        ({"max_tokens": -1}, ParameterError, "max_tokens"),
        ({"max_tokens": 1.5}, ParameterError, "max_tokens"),
        ({"min_tokens": -1}, ParameterError, "min_tokens"),
        ({"min_tokens": 9, "max_tokens": 8}, ParameterError, "min_tokens"),
        ({"n": 0}, ParameterError, "n: 0"),
        ({"n": "2"}, ParameterError, "n: "),
        ({"n": 3, "best_of": 2}, ParameterError, "best_of"),
        ({"best_of": 2, "stream": True}, ParameterError, "best_of"),
        ({"logprobs": -1}, ParameterError, "logprobs"),
        ({"logprobs": True}, ParameterError, "logprobs"),
        ({"stop": ""}, ParameterError, "stop"),
        ({"stop": ["a", 5]}, ParameterError, "stop"),
        ({"stop": 5}, ParameterError, "stop"),
        ({"stop_tokens": [759]}, InvalidTokenError, "stop_tokens"),
        ({"stop_tokens": ["a"]}, ParameterError, "stop_tokens"),
        ({"stop_tokens": 2}, ParameterError, "stop_tokens"),
        ({"logit_bias": {759: 1.0}}, InvalidTokenError, "logit_bias"),
        ({"logit_bias": [1]}, ParameterError, "logit_bias"),
        ({"logit_bias": {5: float("nan")}}, SamplerError, "logit_bias"),
        ({"seed": -1}, ParameterError, "seed"),
        ({"seed": 0xFFFFFFFF}, ParameterError, "seed"),
        ({"sampler": "greedy"}, ParameterError, "sampler"),
        ({"sampler": SamplerChain().grammar("root ::= [")}, GrammarError, "grammar"),
        ({"suffix": "x"}, ParameterError, "suffix"),
        ({"callback": print, "stream": True}, ParameterError, "callback"),
        ({"callback": 5}, ParameterError, "callback"),
    ],
    ids=lambda value: str(value)[:40] if isinstance(value, dict) else "",
)
def test_a_wrong_argument_gives_a_typed_error_that_names_it(
    tiny_llama: Llama, options: dict[str, Any], error: type[LlamaCrabError], words: str
) -> None:
    with pytest.raises(error, match=words):
        tiny_llama.create_completion(**{"prompt": [300, 301], **options})
    assert tiny_llama._engine.scheduler.n_running == tiny_llama._engine.scheduler.n_waiting == 0
    assert complete(tiny_llama, [300], 2, ignore_eos=True).usage.completion_tokens == 2


def test_a_model_that_cannot_be_opened(tmp_path: Path, vocab_folder: Path, tiny_path: Path) -> None:
    with pytest.raises(ModelNotFoundError):
        Llama(tmp_path / "none.gguf")
    other = tmp_path / "other.gguf"
    other.write_bytes(b"GGUF but not really")
    with pytest.raises(ModelLoadError) as failed:
        Llama(other)
    assert failed.value.log
    with pytest.raises(ModelLoadError):
        Llama(vocab_folder / "ggml-vocab-gpt-2.gguf")
    with pytest.raises(ParameterError, match="n_ctxx"):
        Llama(tiny_path, n_ctxx=5)
    with pytest.raises((BackendUnavailableError, ModelLoadError)):
        Llama(tiny_path, devices=("no such device",))
