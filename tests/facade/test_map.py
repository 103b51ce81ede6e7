"""Many prompts: their order, how many are pulled and run, what an error and an early end leave."""

from __future__ import annotations

import asyncio
import gc
import io
import itertools
import re
import signal
import sys
import threading
import time
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import Any

import pytest

from llama_crab import AsyncLlama, Completion, Llama, ParameterError, SamplerChain
from llama_crab.errors import ClosedError, ContextLengthError, GrammarError, InvalidTokenError
from llama_crab.mapping import ProgressBar, Window, n_in_flight

GREEDY = SamplerChain().greedy()
N_SEQ_MAX = 3
IN_FLIGHT = n_in_flight(N_SEQ_MAX)
AHEAD = 4 * IN_FLIGHT
FIELDS: dict[str, Any] = {"n_ctx": 768, "n_ubatch": 16, "n_batch": 64, "n_threads": 1}
TOO_LONG = [300] * 257


@pytest.fixture(scope="module")
def llama(tiny_path: Path) -> Iterator[Llama]:
    with Llama(tiny_path, n_seq_max=N_SEQ_MAX, **FIELDS) as found:
        yield found


@pytest.fixture(autouse=True)
def _nothing_left(llama: Llama) -> Iterator[None]:
    yield
    assert counts(llama) == (0, 0)


def counts(llama: Llama) -> tuple[int, int]:
    stats = llama.stats()
    return stats["n_running"], stats["n_waiting"]


def soon(condition: Callable[[], bool]) -> bool:
    limit = time.monotonic() + 10
    while not condition() and time.monotonic() < limit:
        time.sleep(0.002)
    return condition()


class Pulled(Iterator[Any]):
    """The given prompts, counting those that were asked for."""

    def __init__(self, prompts: Iterable[Any]) -> None:
        self.prompts = iter(prompts)
        self.n = 0

    def __next__(self) -> Any:
        self.n += 1
        return next(self.prompts)


def prompt(i: int, n_tokens: int = 6) -> dict[str, Any]:
    """Return a prompt whose result shows by its length which one it was."""
    return {"prompt": [300 + i % 100], "max_tokens": n_tokens, "ignore_eos": True}


def lengths(results: Iterable[Completion]) -> list[int]:
    return [len(result.tokens) for result in results]


def test_results_come_in_the_order_of_the_prompts(llama: Llama) -> None:
    wanted = [(37 * i) % 60 for i in range(60)]  # short ones overtake long ones
    found = llama.map([prompt(i, n) for i, n in enumerate(wanted)], sampler=GREEDY)
    assert lengths(found) == wanted


def test_a_result_is_what_a_call_gives(llama: Llama) -> None:
    prompts = [[300, 301 + i] for i in range(5)]
    found = list(llama.map(prompts, 5, seed=3, echo=True, ignore_eos=True, logprobs=1))
    for one, ids in zip(found, prompts, strict=True):
        alone = llama.create_completion(ids, 5, seed=3, echo=True, ignore_eos=True, logprobs=1)
        assert isinstance(alone, Completion)
        assert (one.text, one.tokens, one.seed) == (alone.text, alone.tokens, 3)
        assert one.usage.total_tokens == alone.usage.total_tokens


def test_text_prompts_and_empty_input(llama: Llama) -> None:
    assert [c.text[:3] for c in llama.map(("one", "two"), 1, echo=True)] == ["one", "two"]
    assert list(llama.map([])) == []


def test_a_mapping_wins_over_the_common_options(llama: Llama) -> None:
    own = {"prompt": [301], "max_tokens": 3, "seed": 9}
    found = list(llama.map([[300], own, [302]], 5, seed=4, ignore_eos=True))
    assert [(len(c.tokens), c.seed) for c in found] == [(5, 4), (3, 9), (5, 4)]


def test_prompts_are_pulled_as_needed(llama: Llama) -> None:
    prompts = Pulled(prompt(i) for i in itertools.count())
    with llama.map(prompts) as results:
        assert prompts.n == 0
        for n_taken, _ in enumerate(itertools.islice(results, 200), 1):
            assert n_taken <= prompts.n <= n_taken + AHEAD


def test_what_is_in_flight_is_bounded_and_fills_the_sequences(llama: Llama) -> None:
    with llama.map(prompt(i, 20) for i in itertools.count()) as results:
        seen = [counts(llama) for _ in itertools.islice(results, 60)]
    assert max(running + waiting for running, waiting in seen) <= IN_FLIGHT
    assert max(running for running, _ in seen) == N_SEQ_MAX


class Fake:
    """A request that ends when it is told to."""

    def __init__(self, ids: Any, listener: Callable[[], object]) -> None:
        self.ids = ids
        self.listener = listener
        self.done = False

    def result(self) -> Any:
        return self.ids

    def end(self) -> None:
        self.done = True
        self.listener()


def test_a_long_answer_holds_the_others_up_only_when_many_wait_for_it() -> None:
    started: list[Fake] = []

    def submit(ids: Any, max_tokens: Any, listener: Any, options: Any) -> Any:
        started.append(Fake(ids, listener))
        return started[-1]

    prompts = Pulled([i] for i in itertools.count())
    window = Window(submit, prompts, None, {}, 5)
    n_woken = 0

    def wake() -> None:
        nonlocal n_woken
        n_woken += 1

    window.wake = wake
    for n_ended in range(16):
        assert window.take() is None
        assert prompts.n == len(started) == 5 + n_ended
        started[1 + n_ended].end()
    for request in started[17:]:
        request.end()
    assert window.take() is None
    assert prompts.n == 20  # no more, however long the first one takes
    assert n_woken == 19
    started[0].end()
    assert [window.take() for _ in range(20)] == [[i] for i in range(20)]
    assert [request.ids for request in window.clear()] == [[i] for i in range(24, 19, -1)]
    with pytest.raises(StopIteration):
        window.take()


@pytest.mark.parametrize("n_taken", [0, 1, 7])
def test_closing_cancels_what_is_in_flight(llama: Llama, n_taken: int) -> None:
    prompts = Pulled(prompt(i, 20 if i < 7 else 200) for i in itertools.count())
    results = llama.map(prompts)
    for _ in range(n_taken):
        next(results)
    results.close()
    assert counts(llama) == (0, 0)
    n_pulled = prompts.n
    assert list(results) == []
    assert prompts.n == n_pulled
    results.close()


def test_a_loop_that_is_left_cancels(llama: Llama) -> None:
    for _ in llama.map(prompt(i, 200) for i in itertools.count()):
        break
    gc.collect()
    assert soon(lambda: counts(llama) == (0, 0))


def test_ctrl_c_cancels(llama: Llama) -> None:
    stepper = llama._engine.scheduler.stepper
    begin = stepper.n_steps

    def interrupt() -> None:
        soon(lambda: stepper.n_steps >= begin + 20)
        signal.raise_signal(signal.SIGINT)

    thread = threading.Thread(target=interrupt)
    results = llama.map((prompt(i, 200) for i in itertools.count()), seed=1)
    thread.start()
    with pytest.raises(KeyboardInterrupt):
        for _ in results:
            pass
    thread.join()
    assert counts(llama) == (0, 0)
    assert list(results) == []


def fails(tokens: Any, logits: Any) -> None:
    raise ZeroDivisionError("of the processor")


BROKEN = [
    ({"prompt": TOO_LONG}, ContextLengthError),
    ({"prompt": [10**6]}, InvalidTokenError),
    ({"prompt": [300], "max_tokens": -1}, ParameterError),
    ({"prompt": [300], "no_such_option": 1}, TypeError),
    ({"prompt": [300], "stream": True}, TypeError),
    ({"max_tokens": 3}, ParameterError),
    (5, ParameterError),
    ({"prompt": [300], "sampler": SamplerChain().grammar("root ::= [")}, GrammarError),
    ({"prompt": [300], "logits_processors": [fails]}, ZeroDivisionError),
]


@pytest.mark.parametrize(("broken", "error"), BROKEN, ids=lambda value: str(value)[:30])
def test_an_error_comes_when_its_turn_does_and_ends_the_rest(
    llama: Llama, broken: Any, error: type[Exception]
) -> None:
    prompts = itertools.chain([prompt(0, 30), prompt(1, 3), broken], map(prompt, itertools.count()))
    results = llama.map(prompts)
    assert lengths(itertools.islice(results, 2)) == [30, 3]
    with pytest.raises(error):
        next(results)
    assert counts(llama) == (0, 0)
    assert list(results) == []


def test_errors_may_be_given_in_the_results_place(llama: Llama) -> None:
    prompts = [item for i, (broken, _) in enumerate(BROKEN) for item in (prompt(i, i), broken)]
    found = list(llama.map(prompts, return_exceptions=True))
    assert lengths(c for c in found[::2] if isinstance(c, Completion)) == list(range(len(BROKEN)))
    assert [type(error) for error in found[1::2]] == [error for _, error in BROKEN]


def test_many_errors_are_not_pulled_ahead_without_end(llama: Llama) -> None:
    prompts = Pulled(itertools.repeat(TOO_LONG))
    with llama.map(prompts, return_exceptions=True) as results:
        assert isinstance(next(results), ContextLengthError)
        assert prompts.n <= AHEAD


def test_an_error_of_the_iterable_comes_after_what_it_gave(llama: Llama) -> None:
    def prompts() -> Iterator[dict[str, Any]]:
        yield prompt(0, 4)
        yield prompt(1, 2)
        raise OSError("the file has gone")

    for return_exceptions in (False, True):
        results = llama.map(prompts(), return_exceptions=return_exceptions)
        assert lengths(itertools.islice(results, 2)) == [4, 2]
        with pytest.raises(OSError, match="the file has gone"):
            next(results)


@pytest.mark.parametrize("prompts", ["text", b"bytes", {"prompt": "x"}, 5, None])
def test_one_prompt_is_not_several(llama: Llama, prompts: Any) -> None:
    with pytest.raises(ParameterError, match=r"^prompts: expected several"):
        llama.map(prompts)


@pytest.mark.parametrize("return_exceptions", [False, True])
def test_closing_the_llama_ends_the_map(tiny_path: Path, return_exceptions: bool) -> None:
    llama = Llama(tiny_path, n_seq_max=2, **FIELDS)
    results: Any = llama.map(
        (prompt(i, 100) for i in itertools.count()), return_exceptions=return_exceptions
    )
    assert next(results).finish_reason == "length"
    llama.close()
    with pytest.raises(ClosedError):
        list(results)
    with pytest.raises(ClosedError):
        next(iter(llama.map(["x"])))


# asyncio


@pytest.fixture
def run(llama: Llama) -> Callable[[Any], Any]:
    """Return a function that runs a coroutine function with an AsyncLlama of the same engine."""
    found = AsyncLlama.__new__(AsyncLlama)
    found._llama = llama
    return lambda work: asyncio.run(work(found))


def test_async_results_come_in_order(run: Any) -> None:
    wanted = [(37 * i) % 60 for i in range(40)]

    async def work(llama: AsyncLlama) -> list[int]:
        prompts = (prompt(i, n) for i, n in enumerate(wanted))
        return [len(c.tokens) async for c in llama.map(prompts, sampler=GREEDY)]

    assert run(work) == wanted


def test_async_maps_and_calls_share_the_engine(run: Any) -> None:
    async def one(llama: AsyncLlama) -> int:
        return len([c async for c in llama.map(map(prompt, range(20)))])

    async def work(llama: AsyncLlama) -> list[int]:
        return await asyncio.gather(*[one(llama) for _ in range(3)])

    assert run(work) == [20, 20, 20]


def test_an_async_map_is_lazy_and_closes(run: Any) -> None:
    prompts = Pulled(prompt(i, 20 if i < 7 else 200) for i in itertools.count())

    async def work(llama: AsyncLlama) -> list[int]:
        async with llama.map(prompts) as results:
            assert prompts.n == 0
            found = [len((await anext(results)).tokens) for _ in range(5)]
            assert prompts.n <= 5 + AHEAD
        assert counts(llama.llama) == (0, 0)
        assert [c async for c in results] == []
        await results.aclose()
        return found

    assert run(work) == [20] * 5


def test_an_async_error_is_raised_or_given(run: Any) -> None:
    async def work(llama: AsyncLlama) -> None:
        prompts = [prompt(0, 9), {"prompt": TOO_LONG}, prompt(1, 200), prompt(2, 200)]
        results = llama.map(prompts)
        assert len((await anext(results)).tokens) == 9
        with pytest.raises(ContextLengthError):
            await anext(results)
        assert counts(llama.llama) == (0, 0)
        assert [c async for c in results] == []
        found = [c async for c in llama.map(prompts, return_exceptions=True)]
        kinds = [type(c) for c in found]
        assert kinds == [Completion, ContextLengthError, Completion, Completion]

    run(work)


def test_cancelling_the_task_cancels_the_requests(run: Any) -> None:
    async def work(llama: AsyncLlama) -> None:
        results = llama.map(prompt(i, 200) for i in itertools.count())
        with pytest.raises(TimeoutError):
            await asyncio.wait_for(anext(results), 0.001)
        assert await asyncio.to_thread(soon, lambda: counts(llama.llama) == (0, 0))
        assert [c async for c in results] == []

    run(work)


def test_an_async_loop_that_is_left_cancels(run: Any) -> None:
    async def work(llama: AsyncLlama) -> None:
        async for _ in llama.map(prompt(i, 200) for i in itertools.count()):
            break
        gc.collect()
        assert await asyncio.to_thread(soon, lambda: counts(llama.llama) == (0, 0))

    run(work)


# The bar


class Terminal(io.StringIO):
    def isatty(self) -> bool:
        return True


@pytest.fixture
def terminal(monkeypatch: pytest.MonkeyPatch) -> Callable[[bool], Terminal]:
    """Return what makes stderr a terminal: pytest puts its own there before each test."""

    def replace(rich: bool = False) -> Terminal:
        found = Terminal()
        monkeypatch.setattr(sys, "stderr", found)
        if not rich:
            monkeypatch.setitem(sys.modules, "rich.console", None)
        return found

    return replace


def test_the_plain_bar_is_one_line(llama: Llama, terminal: Any) -> None:
    stderr = terminal()
    assert len(list(llama.map([prompt(i) for i in range(9)], progress=True))) == 9
    assert stderr.getvalue().endswith("\n")
    assert stderr.getvalue().count("\n") == 1
    assert re.fullmatch(r"9/9  [\d.]+/s *\n", stderr.getvalue().split("\r")[-1])


def test_the_bar_of_an_iterator_has_no_total(llama: Llama, terminal: Any) -> None:
    stderr = terminal()
    with llama.map((prompt(i) for i in itertools.count()), progress=True) as results:
        next(results)
    assert re.fullmatch(r"\r1  [\d.]+/s\n", stderr.getvalue())


def test_the_time_left_counts_only_what_is_new(
    terminal: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    stderr = terminal()
    now = 100.0
    monkeypatch.setattr(time, "monotonic", lambda: now)
    bar = ProgressBar(1000, 400)
    for _ in range(10):
        now += 1.0
        bar.advance()
    assert stderr.getvalue().split("\r")[-1].rstrip() == "410/1000  1.00/s  0:09:50 left"
    bar.close()
    bar.close()
    assert stderr.getvalue().count("\n") == 1


def test_no_bar_where_stderr_is_no_terminal(
    llama: Llama, capsys: pytest.CaptureFixture[str]
) -> None:
    assert len(list(llama.map(map(prompt, range(3)), progress=True))) == 3
    assert capsys.readouterr().err == ""


def test_rich_draws_the_bar_and_lets_the_cursor_go(llama: Llama, terminal: Any) -> None:
    pytest.importorskip("rich")
    stderr = terminal(rich=True)
    assert len(list(llama.map([prompt(i) for i in range(9)], progress=True))) == 9
    assert "9/9" in stderr.getvalue()
    assert stderr.getvalue().rfind("\x1b[?25h") > stderr.getvalue().rfind("\x1b[?25l")
