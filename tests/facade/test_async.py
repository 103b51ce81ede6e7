"""Requests from event loops: nothing blocks a loop, nothing is lost, cancelling a task cancels."""

from __future__ import annotations

import asyncio
import gc
import threading
import time
from collections.abc import Callable, Coroutine, Iterator
from functools import partial
from pathlib import Path
from typing import Any, TypeVar

import numpy as np
import pytest

from llama_crab import AsyncLlama, Completion, Llama, LlamaParams, SamplerChain
from llama_crab.errors import ClosedError, RequestTimeoutError, SamplerError

GREEDY = SamplerChain().greedy()
DRAWN = SamplerChain().penalties(32, 1.3).top_k(10).temp(1.0)
# In F32 the sums of other batches differ by less than two logits of a random model do.
FIELDS: dict[str, Any] = {
    "n_ctx": 4096, "n_seq_max": 4, "n_ubatch": 32, "n_batch": 64, "n_threads": 1,
    "flash_attn_type": False, "type_k": "f32", "type_v": "f32",
}  # fmt: skip
LONG = 600
OPTIONS: dict[str, Any] = {"sampler": GREEDY, "ignore_eos": True, "seed": 1}

T = TypeVar("T")
Reference = Callable[..., Completion]


@pytest.fixture
def llama(tiny_path: Path) -> Iterator[AsyncLlama]:
    found = AsyncLlama(tiny_path, **FIELDS)
    yield found
    assert counts(found) == (0, 0)
    found.llama.close()


@pytest.fixture(scope="module")
def reference(tiny_path: Path) -> Iterator[Reference]:
    """Return a function that completes on a context of one sequence, without a thread."""
    with Llama(tiny_path, **{**FIELDS, "n_ctx": 1024, "n_seq_max": 1}) as alone:

        def complete(prompt: list[int], max_tokens: int = 20, **options: Any) -> Completion:
            options = {**OPTIONS, "cache_prompt": False, **options}
            result = alone.create_completion(prompt, max_tokens, **options)
            assert isinstance(result, Completion)
            return result

        yield complete


def submit(llama: AsyncLlama, prompt: Any, max_tokens: int | None = 20, **options: Any) -> Any:
    return llama.create_completion(prompt, max_tokens, **{**OPTIONS, **options})


def words(n: int, seed: int = 0) -> list[int]:
    return [int(token) for token in np.random.default_rng(seed).integers(260, 700, n)]


def counts(llama: AsyncLlama) -> tuple[int, int]:
    stats = llama.stats()
    return stats["n_running"], stats["n_waiting"]


def run(work: Coroutine[Any, Any, T]) -> T:
    """Run a coroutine in a loop of its own; one that waits for ever fails."""

    async def limited() -> T:
        async with asyncio.timeout(40):
            return await work

    return asyncio.run(limited())


def is_held(scheduler: Any, sequence: Any) -> bool:
    return sequence in scheduler._held or sequence in scheduler._parked


async def soon(condition: Callable[[], bool]) -> bool:
    limit = time.monotonic() + 30
    while not condition() and time.monotonic() < limit:
        await asyncio.sleep(0.001)
    return condition()


def test_twenty_at_once_are_answered_as_if_alone(llama: AsyncLlama, reference: Reference) -> None:
    async def main() -> list[Completion]:
        return await asyncio.gather(
            *(
                submit(llama, words(5 + n, n), 15, sampler=DRAWN, stream=n % 3 == 0)
                for n in range(20)
            )
        )

    results = run(main())
    for n, result in enumerate(results):
        expected = reference(words(5 + n, n), 15, sampler=DRAWN)
        assert (result.text, result.tokens) == (expected.text, expected.tokens)
    assert llama.stats()["n_steps"] < 20 * 15


def test_chunks_come_as_they_do_from_a_stream(llama: AsyncLlama, reference: Reference) -> None:
    async def read(seed: int) -> list[Any]:
        handle = submit(llama, words(20, seed), 100, stream=True, logprobs=1)
        return [chunk async for chunk in handle]

    async def main() -> list[list[Any]]:
        return await asyncio.gather(*(read(seed) for seed in range(6)))

    for seed, chunks in enumerate(run(main())):
        expected = reference(words(20, seed), 100, logprobs=1)
        assert len(chunks) > 10
        assert "".join(chunk.text for chunk in chunks) == expected.text
        assert tuple(t for chunk in chunks for t in chunk.tokens) == expected.tokens
        given = [entry.token_id for chunk in chunks for entry in chunk.logprobs.tokens]
        assert given == list(expected.tokens)
        assert chunks[-1].usage == expected.usage


def test_without_stream_iterating_gives_the_whole_answer(
    llama: AsyncLlama, reference: Reference
) -> None:
    async def main() -> tuple[list[Any], Completion]:
        handle = submit(llama, words(20))
        chunks = [chunk async for chunk in handle]
        return chunks, await handle

    (chunk,), result = run(main())
    assert chunk.text == result.text == reference(words(20)).text
    assert chunk.finish_reason == "length"


def test_a_cancelled_task_cancels_its_request_and_no_other(
    llama: AsyncLlama, reference: Reference
) -> None:
    async def read(handle: Any) -> None:
        async for _ in handle:
            pass

    async def wait(handle: Any) -> None:
        await handle

    async def main() -> list[Completion]:
        kept = [submit(llama, words(10, 1), LONG), submit(llama, words(10, 2), LONG, stream=True)]
        handles = [submit(llama, words(20, n), None, stream=n % 2 == 0) for n in range(4)]
        tasks = [
            asyncio.create_task((wait, read)[n % 3 == 0](handle))
            for n, handle in enumerate(handles)
        ]
        await asyncio.sleep(0)  # all have begun to wait
        assert await soon(lambda: llama.llama._engine.scheduler.n_running == 4)
        # Two of them run, two wait for a slot.
        for task in tasks:
            task.cancel()
        ends = await asyncio.gather(*tasks, return_exceptions=True)
        assert [type(end) for end in ends] == [asyncio.CancelledError] * 4
        for handle in handles:
            assert await soon(partial(getattr, handle, "done"))
            (sequence,) = handle._request.sequences
            assert sequence.finish_reason == "cancelled"
        return [await handle for handle in kept]

    for seed, result in enumerate(run(main()), 1):
        assert result.text == reference(words(10, seed), LONG).text


def test_a_task_that_is_cancelled_before_it_begins_cancels_too(llama: AsyncLlama) -> None:
    async def wait(handle: Any) -> None:
        await handle

    async def main() -> None:
        handle = submit(llama, words(20), None)
        request = handle._request
        task = asyncio.create_task(wait(handle))
        del handle
        task.cancel()
        with pytest.raises(asyncio.CancelledError):
            await task
        del task
        gc.collect()
        assert await soon(lambda: request.done)

    run(main())


def test_hundreds_of_tasks_that_are_cancelled_at_once_harm_nobody(
    llama: AsyncLlama, reference: Reference
) -> None:
    inside, go_on = threading.Event(), threading.Event()

    def gate(tokens: Any, logits: Any) -> None:
        inside.set()
        go_on.wait(30)

    async def wait(handle: Any) -> Any:
        return await handle

    async def main() -> Completion:
        tasks = [asyncio.create_task(wait(submit(llama, words(8, n), 50))) for n in range(700)]
        await asyncio.sleep(0)
        # The engine does not come to look before all have been cancelled, as in a long batch.
        kept = submit(llama, words(20), priority=1, logits_processors=[gate])
        assert await soon(inside.is_set)
        for task in tasks:
            task.cancel()
        for _ in range(5):
            await asyncio.sleep(0)
        go_on.set()
        ends = await asyncio.gather(*tasks, return_exceptions=True)
        assert {type(end) for end in ends} <= {asyncio.CancelledError, Completion}
        result: Completion = await kept
        return result

    assert run(main()).text == reference(words(20)).text


def test_leaving_the_block_cancels_and_waits_for_the_end(llama: AsyncLlama) -> None:
    async def main() -> None:
        async with submit(llama, words(20), None, stream=True) as handle:
            chunk = await anext(handle)
            assert chunk.tokens
        assert handle.done
        assert (await handle).finish_reason == "cancelled"
        async with submit(llama, words(20, 1), 3) as handle:
            assert (await handle).finish_reason == "length"
        with pytest.raises(KeyError):
            async with submit(llama, words(20), None) as handle:
                raise KeyError
        assert handle.done
        handle = submit(llama, words(20), None, stream=True)
        async for _ in handle:
            break
        await handle.aclose()
        await handle.aclose()
        assert handle.done

    run(main())


def test_errors_are_raised_by_the_await_and_by_the_reading(
    llama: AsyncLlama, reference: Reference
) -> None:
    dead_end = SamplerChain().grammar('root ::= "yes"').greedy()

    async def main() -> Completion:
        good = submit(llama, words(10, 1), 60)
        with pytest.raises(SamplerError, match="no candidate"):
            await submit(llama, words(10), sampler=dead_end)
        chunks: list[Any] = []

        async def read(**options: Any) -> None:
            handle = submit(llama, words(10), sampler=dead_end, **options)
            chunks.extend([chunk async for chunk in handle])

        with pytest.raises(SamplerError, match="no candidate"):
            await read(stream=True)
        with pytest.raises(SamplerError, match="no candidate"):
            await read()
        assert not chunks
        with pytest.raises(RequestTimeoutError):
            await submit(llama, words(10), None, timeout=0.05)
        with pytest.raises(ValueError, match="timeout"):
            submit(llama, words(10), timeout=-1)
        result: Completion = await good
        return result

    assert run(main()).text == reference(words(10, 1), 60).text


def test_a_reader_that_takes_nothing_holds_only_itself(
    llama: AsyncLlama, reference: Reference
) -> None:
    async def main() -> str:
        slow = [submit(llama, words(20), LONG, stream=True) for _ in range(5)]
        first = await anext(slow[0])
        scheduler = llama.llama._engine.scheduler
        for handle in slow:
            (sequence,) = handle._request.sequences
            assert await soon(partial(is_held, scheduler, sequence))
        for n in range(8):
            other = await submit(llama, words(15, n), 30)
            assert other.text == reference(words(15, n), 30).text
        assert not any(handle.done for handle in slow)
        text: str = first.text + "".join([chunk.text async for chunk in slow[0]])
        for handle in slow[1:]:
            assert (await handle).text == text
        return text

    assert run(main()) == reference(words(20), LONG).text


def test_a_blocking_look_in_between_does_not_stop_the_loop_s_reader(
    llama: AsyncLlama, reference: Reference
) -> None:
    async def main() -> str:
        handle = submit(llama, words(20), LONG, stream=True)
        text = (await anext(handle)).text
        with pytest.raises(TimeoutError):
            handle.result(timeout=0.0)
        result = await asyncio.wait_for(handle, 20)
        assert result.text.startswith(text)
        return str(result.text)

    assert run(main()) == reference(words(20), LONG).text


def test_two_event_loops_use_one_llama_at_once(llama: AsyncLlama, reference: Reference) -> None:
    gate = threading.Barrier(2)
    found: dict[int, list[str]] = {}

    async def main(me: int) -> list[str]:
        async def read(seed: int) -> str:
            handle = submit(llama, words(10, seed), 80, stream=True)
            return "".join([chunk.text async for chunk in handle])

        gate.wait()
        whole = [submit(llama, words(10, 100 * me + n), 80) for n in range(5)]
        texts = await asyncio.gather(*(read(100 * me + n) for n in range(5, 10)))
        return [*[(await handle).text for handle in whole], *texts]

    def work(me: int) -> None:
        found[me] = run(main(me))

    threads = [threading.Thread(target=work, args=(me,)) for me in range(2)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    for me in range(2):
        assert found[me] == [reference(words(10, 100 * me + n), 80).text for n in range(10)]


def test_a_handle_goes_on_in_another_loop(llama: AsyncLlama, reference: Reference) -> None:
    async def begin() -> tuple[Any, str]:
        handle = submit(llama, words(20), 200, stream=True)
        return handle, (await anext(handle)).text

    async def go_on(handle: Any) -> str:
        return "".join([chunk.text async for chunk in handle])

    handle, text = run(begin())
    assert text + run(go_on(handle)) == reference(words(20), 200).text


def test_calls_that_block_run_beside_those_that_are_awaited(
    llama: AsyncLlama, reference: Reference
) -> None:
    def blocking(seed: int) -> str:
        result = llama.llama.create_completion(words(10, seed), 100, **OPTIONS)
        assert isinstance(result, Completion)
        return result.text

    async def main() -> list[str]:
        handles = [submit(llama, words(10, n), 100) for n in range(5)]
        threads = [asyncio.to_thread(blocking, n) for n in range(5, 10)]
        texts = await asyncio.gather(*threads)
        return [*[(await handle).text for handle in handles], *texts]

    assert run(main()) == [reference(words(10, n), 100).text for n in range(10)]


@pytest.mark.parametrize("what", ["submit", "read", "read held", "cancel", "drop"])
def test_an_event_loop_does_not_wait_for_the_engine_s_turn(llama: AsyncLlama, what: str) -> None:
    """Somebody has the engine for as long as a batch takes: here, until the loop is done."""
    engine = llama.llama._engine
    done = threading.Event()

    async def main() -> None:
        handle = submit(llama, words(20), LONG, stream=True)
        request = handle._request
        at_least = 64 if what == "read held" else 10
        assert await soon(lambda: len(request.news) >= at_least)
        lock_is_mine, release = threading.Event(), threading.Event()

        def hold() -> None:
            with engine._lock:
                lock_is_mine.set()
                release.wait()

        holder = threading.Thread(target=hold)
        holder.start()
        await soon(lock_is_mine.is_set)
        # If the loop stops now, this lets it go on, and tells.
        stopped = threading.Timer(5, release.set)
        stopped.start()
        if what == "submit":
            submit(llama, words(20, 1), 5)
        elif what.startswith("read"):
            for _ in range(len(request.news)):
                await anext(handle)
        elif what == "cancel":
            task = asyncio.ensure_future(handle._result_async())
            await asyncio.sleep(0)
            task.cancel()
            with pytest.raises(asyncio.CancelledError):
                await task
        else:
            del handle
            gc.collect()
        if not release.is_set():
            done.set()
        stopped.cancel()
        release.set()
        holder.join()
        llama.llama._engine.cancel_soon(request)

    run(main())
    assert done.is_set()
    run(soon(lambda: counts(llama) == (0, 0)))


def test_closing_in_the_block_ends_what_runs(tiny_path: Path) -> None:
    async def main() -> None:
        async with AsyncLlama(tiny_path, **FIELDS) as llama:
            handles = [submit(llama, words(20, n), None, stream=n == 1) for n in range(3)]
            waiting = [asyncio.ensure_future(handle._result_async()) for handle in handles]
            assert await soon(lambda: llama.llama._engine.scheduler.n_running == 3)
        for result in await asyncio.gather(*waiting):
            assert result.finish_reason == "cancelled"
        with pytest.raises(ClosedError):
            submit(llama, words(5))
        assert "closed" in repr(llama)
        await llama.close()

    before = set(threading.enumerate())  # other tests' models are still loaded
    run(main())
    assert not [t for t in set(threading.enumerate()) - before if t.name == "llama_crab engine"]


def test_drain_lets_the_loop_go_on(tiny_path: Path, reference: Reference) -> None:
    async def main() -> str:
        params = LlamaParams(tiny_path, **FIELDS)
        llama = await asyncio.to_thread(AsyncLlama.load, params)
        handle = submit(llama, words(20), LONG, stream=True)

        async def read() -> str:
            return "".join([chunk.text async for chunk in handle])

        # Longer than what is kept for a reader: without the loop it would not end.
        reader = asyncio.create_task(read())
        assert await llama.drain() is True
        with pytest.raises(ClosedError):
            submit(llama, words(5))
        text = await reader
        await llama.close()
        return text

    assert run(main()) == reference(words(20), LONG).text


def test_cancelling_a_long_prompt_stops_the_batch_it_is_in(smol_path: Path) -> None:
    """One of its batches has run, the second is under way: that one does not count any more."""
    prompt = [(7 * n) % 4000 + 100 for n in range(3000)]
    fields: dict[str, Any] = {"n_ctx": 4096, "n_ubatch": 512, "n_batch": 512, "n_seq_max": 1}
    with Llama(smol_path, **fields) as llama:
        stepper = llama._engine.scheduler.stepper

        async def main() -> int:
            handle = llama.submit(prompt, 4, **OPTIONS)
            task = asyncio.ensure_future(handle._result_async())
            assert await soon(lambda: stepper.n_steps >= 1)
            assert await soon(lambda: stepper.n_in_batch(0) > 1)
            n_steps: int = stepper.n_steps
            assert n_steps < 5
            task.cancel()
            with pytest.raises(asyncio.CancelledError):
                await task
            assert await soon(lambda: handle.done)
            return n_steps

        n_steps = run(main())
        short = llama.create_completion("The capital of France is", 4, **OPTIONS)
        assert isinstance(short, Completion)
        # One batch for the prompt, three for what followed its first token.
        assert stepper.n_steps == n_steps + 4
        assert stepper.n_decoded == 512 * n_steps + short.usage.prompt_tokens + 3
        with Llama(smol_path, **fields) as fresh:
            expected = fresh.create_completion("The capital of France is", 4, **OPTIONS)
            assert isinstance(expected, Completion)
        assert short.text == expected.text
