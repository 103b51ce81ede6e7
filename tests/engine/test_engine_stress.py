"""Many threads do all that requests can do, at random, on caches that are too small for it."""

from __future__ import annotations

import asyncio
import contextlib
import gc
import os
import random
import threading
import time
from array import array
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np
import pytest
from fresh_runs import EXACT, count_free_cells

from llama_crab import Llama, SamplerChain, _core
from llama_crab.errors import RequestTimeoutError, StateError

SECONDS = float(os.environ.get("LLAMA_CRAB_STRESS_SEC", "5"))
N_THREADS = 5
# No request takes that long, however many wait with it.
PATIENCE_SEC = 60

SAMPLERS = {
    "greedy": SamplerChain().greedy(),
    "drawn": SamplerChain().penalties(32, 1.3, 0.1).top_k(10).temp(1.0),
    "words": SamplerChain().grammar('root ::= ([a-z]+ " ")+').top_k(10).temp(0.9),
}
SHAPES: dict[str, dict[str, Any]] = {
    "unified": {"n_ctx": 512, "n_seq_max": 6, "kv_unified": True, "cache_ram_mib": 0},
    "unified with host memory": {"n_ctx": 512, "n_seq_max": 6, "kv_unified": True},
    "split": {"n_ctx": 4 * 512, "n_seq_max": 4, "kv_unified": False, "cache_ram_mib": 0},
    "split with host memory": {"n_ctx": 4 * 512, "n_seq_max": 4, "kv_unified": False},
}
FIELDS: dict[str, Any] = {
    "n_ubatch": 32, "n_batch": 64, "n_threads": 1, "cache_ram_mib": 1, **EXACT
}  # fmt: skip


def words(n: int, seed: int) -> list[int]:
    return [int(token) for token in np.random.default_rng(seed).integers(260, 700, n)]


@dataclass(frozen=True)
class Job:
    """What decides an answer; all else is up to chance."""

    prompt: tuple[int, ...]
    max_tokens: int
    sampler: str
    seed: int
    lora: int
    stop: str = ""

    def options(self, adapters: list[_core.LoraAdapter]) -> dict[str, Any]:
        return {
            "max_tokens": self.max_tokens, "sampler": SAMPLERS[self.sampler], "seed": self.seed,
            "ignore_eos": self.sampler != "words", "stop": self.stop or (),
            "lora": {adapters[self.lora - 1]: 1.0} if self.lora else None,
        }  # fmt: skip


def any_job(rng: random.Random) -> Job:
    stem = words(rng.choice([10, 40, 70, 110]), rng.randrange(5))
    tail = words(rng.choice([0, 1, 5, 30]), 100 + rng.randrange(5))
    return Job(
        prompt=(*stem[: rng.choice([len(stem), len(stem) // 2])], *tail),
        max_tokens=rng.choice([1, 3, 10, 40, 120]),
        sampler=rng.choice(["greedy", "greedy", "drawn", "words"]),
        seed=rng.randrange(2),
        lora=rng.choice([0, 0, 1, 2]),
        stop=rng.choice(["", "", "e"]),
    )


@dataclass
class Outcome:
    """What came out: of a request that ended early, the beginning of an answer."""

    job: Job
    index: int
    tokens: tuple[int, ...]
    text: str
    ended: bool
    logprobs: tuple[float, ...] = ()


@dataclass
class Stress:
    """One run: threads that work until the time is over, and what they have seen."""

    llama: Llama
    adapters: list[_core.LoraAdapter]
    seed: int
    folder: Path
    outcomes: list[Outcome] = field(default_factory=list)
    handles: list[Any] = field(default_factory=list)
    counts: dict[str, int] = field(default_factory=dict)
    failures: list[BaseException] = field(default_factory=list)
    over: threading.Event = field(default_factory=threading.Event)

    def run(self, seconds: float) -> None:
        threads = [
            threading.Thread(target=self._work, args=(n,), daemon=True) for n in range(N_THREADS)
        ]
        for thread in threads:
            thread.start()
        self.over.wait(seconds)
        self.over.set()
        for thread in threads:
            thread.join(2 * PATIENCE_SEC)
        assert not any(thread.is_alive() for thread in threads)
        if self.failures:
            raise self.failures[0]

    def _work(self, n: int) -> None:
        rng = random.Random(1000 * self.seed + n)
        ways: list[Callable[[random.Random], None]] = [
            self.wait, self.wait, self.call, self.read, self.read_slowly, self.cancel, self.drop,
            self.hurry, self.fail, self.talk, self.many_in_a_loop,
        ]  # fmt: skip
        try:
            while not self.over.is_set():
                way = rng.choice(ways)
                way(rng)
                self.counts[way.__name__] = self.counts.get(way.__name__, 0) + 1
        except BaseException as error:
            self.failures.append(error)
            self.over.set()

    def submit(self, rng: random.Random, job: Job, *, stream: bool = False, **more: Any) -> Any:
        n = rng.choice([1, 1, 1, 2, 3])
        options = {
            "n": n, "priority": rng.choice([0, 0, 0, -1, 1, 2]),
            "logprobs": rng.choice([None, None, 1]) if job.sampler == "greedy" else 1,
            "cache_prompt": rng.random() < 0.9, **more,
        }  # fmt: skip
        handle = self.llama.submit(
            list(job.prompt), stream=stream, **job.options(self.adapters), **options
        )
        self.handles.append(handle._request)
        return handle

    def note(self, job: Job, completion: Any) -> None:
        for index, choice in enumerate(completion.choices):
            ended = choice.finish_reason != "cancelled"
            entries = choice.logprobs.tokens if choice.logprobs is not None else ()
            logprobs = tuple(entry.logprob for entry in entries)
            self.outcomes.append(Outcome(job, index, choice.tokens, choice.text, ended, logprobs))

    def wait(self, rng: random.Random) -> None:
        jobs = [any_job(rng) for _ in range(rng.randrange(1, 4))]
        handles = [self.submit(rng, job) for job in jobs]
        for job, handle in zip(jobs, handles, strict=True):
            self.note(job, handle.result(PATIENCE_SEC))

    def call(self, rng: random.Random) -> None:
        job = any_job(rng)
        options = job.options(self.adapters)
        self.note(job, self.llama.create_completion(list(job.prompt), logprobs=1, **options))

    def read(self, rng: random.Random) -> None:
        job = any_job(rng)
        handle = self.submit(rng, job, stream=True)
        texts: dict[int, str] = {}
        tokens: dict[int, list[int]] = {}
        for chunk in handle:
            texts[chunk.index] = texts.get(chunk.index, "") + chunk.text
            tokens.setdefault(chunk.index, []).extend(chunk.tokens)
        for index, text in texts.items():
            self.outcomes.append(Outcome(job, index, tuple(tokens[index]), text, True))

    def read_slowly(self, rng: random.Random) -> None:
        job = any_job(rng)
        with self.submit(rng, job, stream=True) as handle:
            for n, _ in enumerate(handle):
                if n % 20 == 0:
                    self.over.wait(rng.choice([0.0, 0.005, 0.03]))
                if n > 90:
                    break
        self.note(job, handle.result(PATIENCE_SEC))

    def cancel(self, rng: random.Random) -> None:
        job = any_job(rng)
        handle = self.submit(rng, job, stream=rng.random() < 0.5)
        self.over.wait(rng.choice([0.0, 0.0, 0.002, 0.02]))
        if rng.random() < 0.5:
            handle.cancel()
        else:
            handle._engine.cancel_soon(handle._request)
        self.note(job, handle.result(PATIENCE_SEC))

    def drop(self, rng: random.Random) -> None:
        job = any_job(rng)
        handle = self.submit(rng, job, stream=rng.random() < 0.5)
        self.over.wait(rng.choice([0.0, 0.0, 0.002, 0.02]))
        del handle

    def hurry(self, rng: random.Random) -> None:
        job = any_job(rng)
        handle = self.submit(rng, job, timeout=rng.choice([0.001, 0.01, 0.1]))
        try:
            self.note(job, handle.result(PATIENCE_SEC))
        except RequestTimeoutError:
            for sequence in handle._request.sequences:
                tokens, text = tuple(sequence.tokens), sequence.text
                self.outcomes.append(Outcome(job, sequence.index, tokens, text, False))

    def fail(self, rng: random.Random) -> None:
        job = any_job(rng)
        at = len(job.prompt) + rng.randrange(8)

        def fails(tokens: Any, logits: Any) -> None:
            if len(tokens) >= at:
                raise LookupError("told so")

        handle = self.submit(rng, job, logits_processors=[fails])
        with contextlib.suppress(LookupError):
            self.note(job, handle.result(PATIENCE_SEC))

    def talk(self, rng: random.Random) -> None:
        """Take some turns of a conversation, fork it, save it, and leave it to the collector."""
        session = self.llama.session()
        for turn in range(rng.randrange(1, 4)):
            past = session.tokens
            job = Job((*past, *words(12, 200 + rng.randrange(5))), 8, "greedy", 0, 0)
            handle = self.llama.submit(
                list(job.prompt[len(past) :]), session=session, **job.options(self.adapters)
            )
            self.handles.append(handle._request)
            self.note(job, handle.result(PATIENCE_SEC))
            if turn and rng.random() < 0.3:
                session = session.fork()
            if rng.random() < 0.2:
                path = self.folder / f"{threading.get_ident()}.session"
                # Others may take the slot again and again before it is saved.
                with contextlib.suppress(StateError):
                    session.save(path)
                    session = self.llama.load_session(path)
        if rng.random() < 0.5:
            session.close()

    def many_in_a_loop(self, rng: random.Random) -> None:
        jobs = [any_job(rng) for _ in range(6)]

        async def one(job: Job) -> None:
            handle = self.submit(rng, job, stream=rng.random() < 0.5)
            self.note(job, await handle)

        async def main() -> None:
            async with asyncio.timeout(PATIENCE_SEC):
                tasks = [asyncio.create_task(one(job)) for job in jobs]
                await asyncio.sleep(0.001)
                tasks[rng.randrange(6)].cancel()
                ends = await asyncio.gather(*tasks, return_exceptions=True)
            for end in ends:
                if end is not None and not isinstance(end, asyncio.CancelledError):
                    raise end

        asyncio.run(main())


class Judge:
    """Compares outcomes with what a context of its own gives."""

    def __init__(self, alone: Llama, lora_paths: list[Path]) -> None:
        self._alone = alone
        self._adapters = [alone.load_lora(path) for path in lora_paths]
        self.n_whole = self.n_close_calls = 0

    def check(self, job: Job, index: int, outcomes: list[Outcome]) -> None:
        options = job.options(self._adapters) | {"seed": job.seed + index, "cache_prompt": False}
        expected = self._alone.create_completion(list(job.prompt), **options)
        for found in outcomes:
            pairs = zip(found.tokens, expected.tokens, strict=False)
            parted = next((at for at, (a, b) in enumerate(pairs) if a != b), None)
            if parted is not None:
                assert self._is_close_call(found, parted, options["lora"]), (found, expected.tokens)
                self.n_close_calls += 1
            elif found.ended:
                assert (found.tokens, found.text) == (expected.tokens, expected.text), job
                self.n_whole += 1
            else:
                assert len(found.tokens) <= len(expected.tokens), job
                assert expected.text.startswith(found.text.rstrip("\ufffd")), job

    def _is_close_call(self, found: Outcome, at: int, lora: Any) -> bool:
        """Whether the token had, when it was chosen, the logit that it has here.

        Then it was rounding that made a draw or a tie fall elsewhere, in a batch of another size.
        """
        prompt = [*found.job.prompt, *found.tokens[:at]]
        options = {"sampler": SAMPLERS["greedy"], "lora": lora, "cache_prompt": False}
        n_vocab = self._alone.model.vocab.n_tokens
        same = self._alone.create_completion(
            prompt, 1, logprobs=n_vocab, ignore_eos=True, **options
        )
        here = {top.token_id: top.logprob for top in same.choices[0].logprobs.tokens[0].top}
        if found.job.sampler == "greedy":
            return bool(max(here.values()) - here[found.tokens[at]] < 1e-3)
        return not found.logprobs or abs(found.logprobs[at] - here[found.tokens[at]]) < 1e-3


def check_outcomes(
    outcomes: list[Outcome], tiny_path: Path, lora_paths: list[Path], rng: random.Random, n: int
) -> None:
    """Compare those of up to `n` jobs."""
    by_job: dict[tuple[Job, int], list[Outcome]] = {}
    for outcome in outcomes:
        by_job.setdefault((outcome.job, outcome.index), []).append(outcome)
    keys = list(by_job)
    rng.shuffle(keys)
    with Llama(tiny_path, n_ctx=512, n_seq_max=1, **FIELDS) as alone:
        judge = Judge(alone, lora_paths)
        for job, index in keys[:n]:
            judge.check(job, index, by_job[job, index])
    assert judge.n_whole > 20
    assert judge.n_close_calls <= 1 + judge.n_whole // 50


def check_at_rest(llama: Llama, requests: list[Any]) -> None:
    """Nothing is left but what idle slots hold, and that is what llama.cpp's memory holds."""
    limit = time.monotonic() + PATIENCE_SEC
    while not all(request.done for request in requests) and time.monotonic() < limit:
        time.sleep(0.01)  # those that were dropped are ended by the engine's thread
    assert all(request.done for request in requests)
    requests.clear()  # they know their sessions, which have claims
    scheduler = llama._engine.scheduler
    while any(map(len, scheduler.cache._claims.values())) and time.monotonic() < limit:
        gc.collect()
        llama.create_completion([300], 1)  # the next step does what was put off until then
    llama.create_completion([300], 1)
    stats = llama.stats()
    assert (stats["n_running"], stats["n_waiting"]) == (0, 0)
    for left in ("_held", "_parked", "_running", "_priorities", "_deadlines", "told"):
        assert not getattr(scheduler, left), left
    assert scheduler._swap.n_bytes_left == 1 << 30
    assert not any(map(len, scheduler.cache._claims.values()))
    store = scheduler.cache._store
    if store is not None:
        assert not any(snapshot.pins for snapshot in store._ram.held)
        assert store.ram_used == sum(len(s.data or b"") for s in store._ram.held) <= 1 << 20
    stepper, memory = scheduler.stepper, llama.context.memory
    held = [stepper.progress(slot)[2] for slot in range(stepper.n_slots)]
    assert [memory.seq_pos_max(slot) + 1 for slot in range(stepper.n_slots)] == held
    for slot, n in enumerate(held):
        known = scheduler.cache._keys[slot]
        assert (known is None) == (n == 0)
        if known is not None:
            assert known[1] == array("i", stepper.tokens(slot)[:n]).tobytes()
    if llama.context.kv_unified:
        assert stats["n_cells_used"] == llama.context.n_ctx - count_free_cells(scheduler)
    else:
        assert stats["n_cells_used"] == sum(held)


@pytest.fixture(scope="module")
def lora_paths(tiny_gguf: ModuleType, tmp_path_factory: pytest.TempPathFactory) -> list[Path]:
    folder = tmp_path_factory.mktemp("lora")
    return [tiny_gguf.write_lora(folder / f"{seed}.gguf", seed=seed) for seed in (11, 12)]


@pytest.fixture
def nothing_else_lives() -> Iterator[None]:
    gc.collect()
    before = _core.live_handles()
    yield
    gc.collect()
    # The fixtures' objects hold the weights and the adapters.
    for kind in ("contexts", "steppers", "samplers"):
        assert _core.live_handles()[kind] == before[kind]
    assert not [t for t in threading.enumerate() if t.name == "llama_crab engine"]


def stress(
    shape: str, seconds: float, seed: int, tiny_path: Path, lora_paths: list[Path], folder: Path
) -> Stress:
    with Llama(tiny_path, **{**FIELDS, **SHAPES[shape]}) as llama:
        # Whether it does depends on time, and on so small a model it does not.
        llama._engine.scheduler.cache._saving_pays = lambda: True  # type: ignore[method-assign]
        work = Stress(llama, [llama.load_lora(path) for path in lora_paths], seed, folder)
        work.run(seconds)
        check_at_rest(llama, work.handles)
        n_suspended = llama.stats()["n_suspended"]
    check_outcomes(work.outcomes, tiny_path, lora_paths, random.Random(seed), 150)
    assert n_suspended > 0
    return work


@pytest.mark.usefixtures("nothing_else_lives")
@pytest.mark.parametrize("shape", SHAPES)
def test_everything_at_once_ends_and_leaves_nothing(
    shape: str, tiny_path: Path, lora_paths: list[Path], tmp_path: Path
) -> None:
    stress(shape, SECONDS / len(SHAPES), 1, tiny_path, lora_paths, tmp_path)


@pytest.mark.full
@pytest.mark.usefixtures("nothing_else_lives")
@pytest.mark.parametrize("shape", SHAPES)
def test_ten_minutes_of_everything_at_once(
    shape: str, tiny_path: Path, lora_paths: list[Path], tmp_path: Path
) -> None:
    end = time.monotonic() + 600 / len(SHAPES)
    seed = 100
    while time.monotonic() < end:
        work = stress(shape, 15, seed, tiny_path, lora_paths, tmp_path)
        assert len(work.counts) >= 9
        seed += 1
