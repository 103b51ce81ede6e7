"""Requests in the background: how they are read, held, ended, and what they leave."""

from __future__ import annotations

import gc
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from llama_crab import Completion, Llama, ParameterError, SamplerChain, _core
from llama_crab.errors import ClosedError, RequestTimeoutError, SamplerError

GREEDY = SamplerChain().greedy()
DRAWN = SamplerChain().penalties(32, 1.3).top_k(10).temp(1.0)
# In F32 the sums of other batches differ by less than two logits of a random model do.
FIELDS: dict[str, Any] = {
    "n_ctx": 2048, "n_seq_max": 2, "n_ubatch": 32, "n_batch": 64, "n_threads": 1,
    "flash_attn_type": False, "type_k": "f32", "type_v": "f32",
}  # fmt: skip
N_UNREAD = 64
LONG = 600


@pytest.fixture
def llama(tiny_path: Path) -> Iterator[Llama]:
    with Llama(tiny_path, **FIELDS) as found:
        yield found


@pytest.fixture(scope="module")
def reference(tiny_path: Path) -> Iterator[Callable[..., Completion]]:
    """Return a function that completes on a context of one sequence, without a thread."""
    with Llama(tiny_path, **{**FIELDS, "n_ctx": 1024, "n_seq_max": 1}) as alone:

        def complete(prompt: list[int], max_tokens: int = 20, **options: Any) -> Completion:
            return as_usual(
                alone.create_completion, prompt, max_tokens, cache_prompt=False, **options
            )

        yield complete


Reference = Callable[..., Completion]


def as_usual(
    call: Callable[..., Any], prompt: Any, max_tokens: int | None = 20, **options: Any
) -> Any:
    return call(prompt, max_tokens, **{"sampler": GREEDY, "ignore_eos": True, "seed": 1, **options})


def submit(llama: Llama, prompt: Any, max_tokens: int | None = 20, **options: Any) -> Any:
    return as_usual(llama.submit, prompt, max_tokens, **options)


def words(n: int, seed: int = 0) -> list[int]:
    return [int(token) for token in np.random.default_rng(seed).integers(260, 700, n)]


def soon(condition: Callable[[], bool]) -> bool:
    limit = time.monotonic() + 30
    while not condition() and time.monotonic() < limit:
        time.sleep(0.001)
    return condition()


OTHERS: set[threading.Thread] = set()


@pytest.fixture(autouse=True)
def others() -> None:
    """Note the threads of models that other tests keep loaded."""
    OTHERS.clear()
    OTHERS.update(threading.enumerate())


def engine_threads() -> list[threading.Thread]:
    found = [thread for thread in threading.enumerate() if thread.name == "llama_crab engine"]
    return [thread for thread in found if thread not in OTHERS]


def live_handles() -> dict[str, int]:
    gc.collect()
    return _core.live_handles()


def is_held(llama: Llama, handle: Any) -> bool:
    scheduler = llama._engine.scheduler
    return any(s in scheduler._held or s in scheduler._parked for s in handle._request.sequences)


def is_held_or_done(llama: Llama, handle: Any) -> bool:
    return handle.done or is_held(llama, handle)


def is_running(handle: Any) -> bool:
    return handle._request.sequences[0].slot is not None


def counts(llama: Llama) -> tuple[int, int]:
    stats = llama.stats()
    return stats["n_running"], stats["n_waiting"]


def test_a_handle_gives_its_result_to_all_ways_of_asking(
    llama: Llama, reference: Reference
) -> None:
    expected = reference(words(30), 20, logprobs=2)
    by_result = submit(llama, words(30), logprobs=2)
    assert by_result.result() == by_result.result()
    assert by_result.done
    by_chunks = submit(llama, words(30), logprobs=2, stream=True)
    chunks = list(by_chunks)
    assert len(chunks) > 10
    assert [chunk.finish_reason for chunk in chunks] == [None] * (len(chunks) - 1) + ["length"]
    at_once = submit(llama, words(30), logprobs=2)
    (whole,) = list(at_once)
    assert list(at_once) == []
    part = submit(llama, words(30), logprobs=2, stream=True)
    first = next(part)
    for handle in (by_result, by_chunks, at_once, part):
        result = handle.result()
        assert (result.text, result.tokens) == (expected.text, expected.tokens)
        assert result.usage.completion_tokens == 20
        logprobs = [entry.logprob for entry in result.choices[0].logprobs.tokens]
        same = [entry.logprob for entry in expected.choices[0].logprobs.tokens]
        np.testing.assert_allclose(logprobs, same, atol=1e-4)
    for pieces in (chunks, [whole]):
        assert "".join(chunk.text for chunk in pieces) == expected.text
        assert [t for chunk in pieces for t in chunk.tokens] == list(expected.tokens)
    assert expected.text.startswith(first.text)


def test_many_requests_share_batches_and_answer_as_if_alone(
    llama: Llama, reference: Reference
) -> None:
    handles = [
        submit(llama, words(5 + 3 * n, n), 10 + n, sampler=DRAWN, stream=n % 2 == 0)
        for n in range(20)
    ]
    for n, handle in enumerate(handles):
        expected = reference(words(5 + 3 * n, n), 10 + n, sampler=DRAWN)
        assert handle.result().text == expected.text
    n_alone = sum(10 + n for n in range(20))
    assert llama.stats()["n_steps"] < n_alone


def test_the_best_of_several_are_what_iterating_gives_too(
    tiny_path: Path, reference: Reference
) -> None:
    with Llama(tiny_path, **{**FIELDS, "n_seq_max": 4}) as llama:
        for n, best_of in ((1, 3), (2, 3), (2, 2)):
            options: dict[str, Any] = {"n": n, "best_of": best_of, "sampler": DRAWN}
            expected = reference(words(20), 8, **options)
            result = submit(llama, words(20), 8, **options).result()
            assert [choice.text for choice in result.choices] == [
                choice.text for choice in expected.choices
            ]
            chunks = list(submit(llama, words(20), 8, **options))
            assert {chunk.text for chunk in chunks} == {c.text for c in expected.choices}
            assert len(chunks) == n


def test_result_with_a_timeout_does_not_cancel(llama: Llama, reference: Reference) -> None:
    handle = submit(llama, words(20), LONG)
    with pytest.raises(TimeoutError) as failed:
        handle.result(timeout=0)
    assert not isinstance(failed.value, RequestTimeoutError)
    with pytest.raises(TimeoutError):
        handle.result(timeout=0.001)
    assert not handle.done
    assert handle.result(timeout=60).text == reference(words(20), LONG).text
    assert handle.result(timeout=0).finish_reason == "length"


def test_cancel_from_another_thread_wakes_the_reader(llama: Llama, reference: Reference) -> None:
    whole = reference(words(20), LONG)
    for stream in (False, True):
        handle = submit(llama, words(20), LONG, stream=stream)
        assert soon(lambda: llama.stats()["n_running"] == 1)
        canceller = threading.Thread(target=handle.cancel)
        reader = ThreadPoolExecutor(1).submit(handle.result)
        canceller.start()
        result = reader.result(timeout=30)
        canceller.join()
        assert handle.done
        assert result.finish_reason == "cancelled"
        assert whole.tokens[: len(result.tokens)] == result.tokens
        assert len(result.tokens) < LONG
        handle.cancel()
        assert counts(llama) == (0, 0)


def test_a_with_block_that_is_left_cancels(llama: Llama) -> None:
    with submit(llama, words(20), LONG, stream=True) as handle:
        next(handle)
    assert handle.done
    assert handle.result().finish_reason == "cancelled"


@pytest.mark.parametrize("n", [1, 2])
def test_a_reader_that_takes_nothing_holds_only_itself_and_loses_nothing(
    llama: Llama, reference: Reference, n: int
) -> None:
    expected = reference(words(20), LONG, n=n, sampler=DRAWN, logprobs=0)
    slow = submit(llama, words(20), LONG, n=n, sampler=DRAWN, logprobs=0, stream=True)
    assert soon(lambda: is_held(llama, slow))
    others = [submit(llama, words(30, 1 + k), 40) for k in range(6)]
    for k, other in enumerate(others):
        assert other.result().text == reference(words(30, 1 + k), 40).text
    assert not slow.done
    assert is_held(llama, slow)
    # What it may run ahead of its reader, and a piece of each of its answers.
    assert N_UNREAD <= len(slow._request.news) <= N_UNREAD + n
    # It is suspended, not in a slot: all of the slots served the others at once.
    stats = llama.stats()
    assert stats["n_suspended"] > 0
    n_steps = stats["n_steps"]
    assert llama.stats()["n_steps"] == n_steps
    chunks = []
    while len(chunks) < 200:
        chunks.append(next(slow))
    # Again, in the middle.
    assert soon(lambda: is_held(llama, slow))
    chunks += list(slow)
    for index, choice in enumerate(expected.choices):
        mine = [chunk for chunk in chunks if chunk.index == index]
        assert "".join(chunk.text for chunk in mine) == choice.text
        assert tuple(t for chunk in mine for t in chunk.tokens) == choice.tokens
        given = [entry.logprob for chunk in mine for entry in chunk.logprobs.tokens]
        same = [entry.logprob for entry in choice.logprobs.tokens]
        np.testing.assert_allclose(given, same, atol=1e-4)
        assert [chunk.finish_reason for chunk in mine if chunk.finish_reason] == ["length"]


def test_held_requests_end_by_cancel_timeout_and_result(llama: Llama, reference: Reference) -> None:
    expected = reference(words(20), LONG)
    handles = [
        submit(llama, words(20), LONG, stream=True, timeout=timeout)
        for timeout in (None, None, 1.0)
    ]
    for handle in handles:
        assert soon(partial(is_held_or_done, llama, handle))
    to_cancel, to_skip, late = handles
    to_cancel.cancel()
    result = to_cancel.result()
    assert result.finish_reason == "cancelled"
    assert result.tokens == expected.tokens[: len(result.tokens)]
    assert to_skip.result().text == expected.text
    assert soon(lambda: late.done)
    chunks: list[Any] = []
    with pytest.raises(RequestTimeoutError, match="not done within 1 s"):
        chunks.extend(late)
    assert chunks
    assert expected.text.startswith("".join(chunk.text for chunk in chunks))
    with pytest.raises(RequestTimeoutError):
        late.result()


def test_a_dropped_handle_cancels_its_request(llama: Llama, reference: Reference) -> None:
    kept = submit(llama, words(10, 1), LONG)
    for stream in (False, True):
        handle = submit(llama, words(20), None, stream=stream)
        assert soon(partial(is_running, handle))
        request = handle._request
        del handle
        gc.collect()
        assert soon(partial(getattr, request, "done"))
        assert request.sequences[0].finish_reason == "cancelled"
    assert kept.result().text == reference(words(10, 1), LONG).text
    assert counts(llama) == (0, 0)


def test_an_error_of_one_request_does_not_touch_the_others(
    llama: Llama, reference: Reference
) -> None:
    def fail(tokens: Any, logits: Any) -> None:
        if len(tokens) >= 25:
            raise RuntimeError("told so")

    dead_end = SamplerChain().grammar('root ::= "yes"').greedy()
    good = [submit(llama, words(20, n), 40, stream=n == 1) for n in range(3)]
    bad = submit(llama, words(20, 9), 40, logits_processors=[fail])
    stuck = submit(llama, words(20, 8), 40, sampler=dead_end, stream=True)
    with pytest.raises(RuntimeError, match="told so"):
        bad.result()
    with pytest.raises(RuntimeError, match="told so"):
        next(bad)
    chunks: list[Any] = []
    with pytest.raises(SamplerError, match="no candidate"):
        chunks.extend(stuck)
    assert "".join(chunk.text for chunk in chunks) == "yes"
    for n, handle in enumerate(good):
        assert handle.result().text == reference(words(20, n), 40).text
    with pytest.raises(SamplerError):
        submit(llama, words(5), logit_bias={5: float("nan")}).result()


@pytest.mark.parametrize(
    ("options", "words_"),
    [
        ({"timeout": 0}, "timeout"),
        ({"timeout": -1.0}, "timeout"),
        ({"timeout": float("nan")}, "timeout"),
        ({"timeout": True}, "timeout"),
        ({"timeout": "1"}, "timeout"),
        ({"priority": 1.5}, "priority"),
        ({"priority": None}, "priority"),
        ({"priority": 10**7}, "priority"),
        ({"lora": "adapter.gguf"}, "lora"),
        ({"session": []}, "session"),
        ({"best_of": 2, "stream": True}, "best_of"),
    ],
)
def test_wrong_values_are_raised_where_they_are_given(
    llama: Llama, options: dict[str, Any], words_: str
) -> None:
    for call in (llama.submit, llama.create_completion):
        with pytest.raises(ParameterError, match=words_):
            as_usual(call, words(5), 5, **options)
    assert counts(llama) == (0, 0)


def test_calls_that_wait_run_beside_those_in_the_background(
    llama: Llama, reference: Reference
) -> None:
    """Some begin before there is an engine thread, which then takes over from them."""
    expected = {n: reference(words(20, n), 150).text for n in range(10)}
    begun = threading.Event()

    def wait(n: int) -> str:
        def seen(chunk: Any) -> None:
            begun.set()

        result: Completion = as_usual(
            llama.create_completion, words(20, n), 150, **({"callback": seen} if n % 2 else {})
        )
        return result.text

    with ThreadPoolExecutor(5) as pool:
        waiting = [pool.submit(wait, n) for n in range(5)]
        assert begun.wait(30)
        assert not engine_threads()
        handles = [submit(llama, words(20, n), 150, stream=n == 7) for n in range(5, 10)]
        assert len(engine_threads()) == 1
        waiting += [pool.submit(wait, n) for n in range(5)]
        assert [call.result() for call in waiting] == [expected[n] for n in range(5)] * 2
    assert [handle.result().text for handle in handles] == [expected[n] for n in range(5, 10)]


def test_streams_and_handles_are_read_by_many_threads(llama: Llama, reference: Reference) -> None:
    def read(n: int) -> str:
        if n % 3 == 0:
            return "".join(chunk.text for chunk in submit(llama, words(9, n), 60, stream=True))
        if n % 3 == 1:
            job = as_usual(llama.create_completion, words(9, n), 60, stream=True)
            return "".join(chunk.text for chunk in job)
        return str(submit(llama, words(9, n), 60).result().text)

    with ThreadPoolExecutor(8) as pool:
        texts = list(pool.map(read, range(24)))
    assert texts == [reference(words(9, n), 60).text for n in range(24)]


def test_ctrl_c_ends_the_request_that_waits_for_the_engine_thread(
    llama: Llama, reference: Reference
) -> None:
    other = submit(llama, words(10, 1), LONG)
    main = threading.get_ident()
    scheduler = llama._engine.scheduler

    def interrupt() -> None:
        soon(lambda: scheduler.n_running == 2)
        signal.pthread_kill(main, signal.SIGINT)

    thread = threading.Thread(target=interrupt)
    thread.start()
    with pytest.raises(KeyboardInterrupt):
        as_usual(llama.create_completion, words(10, 2), 900)
    thread.join()
    assert scheduler.n_running == 1
    assert other.result().text == reference(words(10, 1), LONG).text


def test_hundreds_that_are_cancelled_between_two_batches_harm_nobody(
    llama: Llama, reference: Reference
) -> None:
    handles = [submit(llama, words(10, n), 50) for n in range(700)]
    kept = submit(llama, words(20), LONG, priority=1)

    def cancel_all() -> None:
        for handle in handles:
            handle._engine.cancel_soon(handle._request)

    # The engine is kept from looking in between, as by a long batch.
    llama._engine.exclusively(cancel_all)
    for handle in handles:
        assert handle.result(timeout=60).finish_reason in ("cancelled", "length")
    assert kept.result().text == reference(words(20), LONG).text


def test_drain_waits_for_what_is_there_and_refuses_the_rest(
    llama: Llama, reference: Reference
) -> None:
    held = submit(llama, words(20), LONG, stream=True)
    handles = [submit(llama, words(20, n), 50) for n in range(1, 5)]
    assert soon(lambda: is_held(llama, held))
    assert llama.drain(timeout=0.01) is False
    for call in (llama.submit, llama.create_completion):
        with pytest.raises(ClosedError, match="draining"):
            as_usual(call, words(5))
    reader = ThreadPoolExecutor(1).submit(lambda: "".join(chunk.text for chunk in held))
    assert llama.drain() is True
    assert all(handle.done for handle in handles)
    assert reader.result() == reference(words(20), LONG).text
    for n, handle in enumerate(handles, 1):
        assert handle.result().text == reference(words(20, n), 50).text
    assert llama.drain(0) is True


def test_drain_without_a_thread_finishes_what_nobody_reads(
    llama: Llama, reference: Reference
) -> None:
    job = as_usual(llama.create_completion, words(20), 30, stream=True)
    first = next(job)
    assert llama.drain() is True
    assert not engine_threads()
    text = first.text + "".join(chunk.text for chunk in job)
    assert text == reference(words(20), 30).text


def close_all(llama: Llama) -> None:
    """Close a Llama with one request held, two that threads wait for, and four in the queue."""
    held = submit(llama, words(20), LONG, stream=True)
    assert soon(lambda: is_held(llama, held))
    handles = [submit(llama, words(20, n), 900) for n in range(6)]
    with ThreadPoolExecutor(2) as pool:
        waiting = [pool.submit(handle.result) for handle in handles[:2]]
        assert soon(lambda: llama._engine.scheduler.n_running == 2)
        llama.close()
        assert not engine_threads()
        results = [call.result(timeout=30) for call in waiting]
    results += [handle.result() for handle in handles[2:]]
    assert [result.finish_reason for result in results] == ["cancelled"] * 6
    chunks = list(held)
    assert chunks[-1].finish_reason == "cancelled"
    assert held.result().tokens == tuple(t for chunk in chunks for t in chunk.tokens)
    assert len(held.result().tokens) >= N_UNREAD
    for call in (llama.submit, llama.create_completion):
        with pytest.raises(ClosedError):
            as_usual(call, words(5))
    llama.close()


def test_closing_ends_everything_as_cancelled_and_leaves_no_thread(tiny_path: Path) -> None:
    before = live_handles()
    close_all(Llama(tiny_path, **FIELDS))
    assert live_handles() == before


@pytest.mark.parametrize("background", [False, True])
def test_close_frees_the_context_without_the_collector(tiny_path: Path, background: bool) -> None:
    before = live_handles()
    gc.disable()
    try:
        llama = Llama(tiny_path, **FIELDS)
        as_usual(llama.create_completion, words(20))
        if background:
            submit(llama, words(20)).result()
        llama.close()
        # The weights go with the object: its vocabulary can still be asked.
        for kind in ("contexts", "steppers", "samplers", "embedders"):
            assert _core.live_handles()[kind] == before[kind]
    finally:
        gc.enable()


def test_close_by_several_threads_at_once_while_others_submit(tiny_path: Path) -> None:
    for turn in range(10):
        llama = Llama(tiny_path, **FIELDS)
        gate = threading.Barrier(4)
        ends: list[str] = []

        def work(
            turn: int = turn, llama: Llama = llama, gate: threading.Barrier = gate,
            ends: list[str] = ends,
        ) -> None:  # fmt: skip
            gate.wait()
            for n in range(50):
                try:
                    ends.append(submit(llama, words(5, n), 4).result(30).finish_reason)
                except ClosedError:
                    ends.append("refused")
                    return

        def close(llama: Llama = llama, gate: threading.Barrier = gate) -> None:
            gate.wait()
            submitted = soon(lambda: llama._engine.started)
            assert submitted
            llama.close()

        threads = [threading.Thread(target=target) for target in (work, work, close, close)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join(60)
            assert not thread.is_alive()
        assert set(ends) <= {"length", "cancelled", "refused"}
        assert not engine_threads()


def thread_of(tiny_path: Path, *, idle: bool) -> threading.Thread:
    """Return the engine thread of a Llama that was used and dropped."""
    llama = Llama(tiny_path, **FIELDS)
    handle = submit(llama, words(20), None)
    assert soon(lambda: llama._engine.scheduler.n_running == 1)
    if idle:
        handle.cancel()
        handle.result()
    (thread,) = engine_threads()
    return thread


@pytest.mark.parametrize("idle", [True, False], ids=["idle", "in flight"])
def test_the_thread_ends_with_a_llama_that_was_never_closed(tiny_path: Path, idle: bool) -> None:
    before = live_handles()
    thread = thread_of(tiny_path, idle=idle)
    gc.collect()
    thread.join(30)
    assert not thread.is_alive()
    assert live_handles() == before


def test_a_handle_keeps_the_engine_of_a_dropped_llama_going(
    tiny_path: Path, reference: Reference
) -> None:
    handle = submit(Llama(tiny_path, **FIELDS), words(20), 200, stream=True)
    gc.collect()
    text = "".join(chunk.text for chunk in handle)
    assert text == reference(words(20), 200).text
    del handle
    gc.collect()
    assert soon(lambda: not engine_threads())


EXITS = {
    "requests run": "handles = [submit(n) for n in range(4)]; started()",
    "a stream is held": "handle = submit(0, stream=True); started(); next(handle)",
    "threads wait": """
handles = [submit(n) for n in range(4)]
for handle in handles:
    threading.Thread(target=handle.result, daemon=True).start()
started()
""",
    "threads wait that are joined": """
for n in range(3):
    threading.Thread(target=lambda: submit(n, 100).result()).start()
""",
    "a prompt is long": """
handle = llama.submit([300 + n % 50 for n in range(500)], None)
started()
""",
    "processors run": """
def slow(tokens, logits):
    logits[300] += 1.0
    time.sleep(0.001)
handles = [submit(n, logits_processors=[slow]) for n in range(3)]
started()
""",
    "an event loop was left": """
async def main():
    return [submit(n, stream=True) for n in range(3)]
async def read(handle):
    async for chunk in handle:
        return
handles = asyncio.run(main())
asyncio.run(read(handles[0]))
""",
    "an error ends it": """
handle = submit(0)
started()
sys.excepthook = lambda *_: None
raise RuntimeError("the program's own")
""",
    "sessions and forks live": """
session = llama.session()
llama.create_completion([300] * 40, 4, session=session)
fork = session.fork()
handle = submit(0, session=fork)
started()
""",
}
PRELUDE = """
import asyncio, sys, threading, time
from llama_crab import Llama, SamplerChain
llama = Llama(sys.argv[1], n_ctx=1024, n_seq_max=2, n_ubatch=32, n_batch=64, n_threads=1)
def submit(n, max_tokens=None, **options):
    return llama.submit(
        [300 + n, 301], max_tokens, sampler=SamplerChain().greedy(), ignore_eos=True, **options)
def started():
    while not llama.stats()["n_decoded"]:
        time.sleep(0.001)
"""


@pytest.mark.parametrize("when", EXITS)
def test_the_interpreter_ends_cleanly_while(tiny_path: Path, when: str) -> None:
    command = [sys.executable, "-X", "faulthandler", "-c", PRELUDE + EXITS[when], str(tiny_path)]
    done = subprocess.run(command, check=False, capture_output=True, text=True, timeout=120)
    assert (done.returncode, done.stderr) == (int(when == "an error ends it"), "")
