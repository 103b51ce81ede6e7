"""Settings of speculative decoding that take turns on the same prompts, in one run."""

from __future__ import annotations

import itertools
import os
import time
from collections.abc import Callable, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from native_lookup import NativeLookup, NativeSetting
from pytest_benchmark.fixture import BenchmarkFixture
from side_by_side import GPU_LAYERS, N_THREADS, spread
from speculation_workloads import sampler

from llama_crab import Llama, PromptLookupDecoding, SamplerChain

Tokens = Sequence[int]
# Longest prompt and answer of the workloads, rounded up to what llama.cpp pads a cache to.
N_CTX_SEQ = 1024
N_DRAFT_MAX = 32
GREEDY = SamplerChain().greedy()


def setting(name: str, default: str) -> str:
    return os.environ.get(f"LLAMA_CRAB_BENCH_{name}") or default


def numbers(name: str, default: str) -> list[int]:
    return [int(n) for n in setting(name, default).split(",")]


@dataclass(frozen=True, slots=True)
class Prompt:
    """A text of a workload, its tokens, and its seed."""

    text: str
    tokens: list[int]
    seed: int


@dataclass(slots=True)
class Sums:
    """What a setting has done in one round over all prompts.

    `sec` is from the requests to the last answer; `decode_sec` is without each answer's first
    token, as llama.cpp's programs count, and is of use for one sequence only.
    """

    n_tokens: int = 0
    sec: float = 0.0
    decode_sec: float = 0.0
    n_drafted: int = 0
    n_accepted: int = 0
    answers: list[tuple[int, ...]] = field(default_factory=list)

    @property
    def tokens_per_sec(self) -> float:
        return self.n_tokens / self.sec

    @property
    def decoded_per_sec(self) -> float:
        return self.n_tokens / self.decode_sec

    def add(self, other: Sums) -> None:
        self.n_tokens += other.n_tokens
        self.sec += other.sec
        self.decode_sec += other.decode_sec
        self.n_drafted += other.n_drafted
        self.n_accepted += other.n_accepted
        self.answers += other.answers


# Answers a group of prompts at once.
Turn = Callable[[Sequence[Prompt]], Sums]


class Bench:
    """Three contexts over one model file: plain, adaptive, and for what requests fix.

    What the adaptive one knows of the machine it has to find out in its own turns.
    """

    def __init__(
        self, stack: ExitStack, path: Path, workload: str, n_seq: int, n_tokens: int
    ) -> None:
        self._sampler = sampler(workload)
        self._n_tokens = n_tokens
        self._awake = ""
        # No fixed length may lack output rows.
        rows = {"n_outputs_max": n_seq * (1 + N_DRAFT_MAX)}
        places: dict[str, dict[str, Any]] = {
            "plain": {"speculative": None},
            "auto": {"speculative": "auto"},
            "fixed": {"speculative": PromptLookupDecoding(adaptive=False), **rows},
        }
        self._llamas: dict[str, Llama] = {}
        for place, fields in places.items():
            llama = Llama(
                path,
                n_ctx=n_seq * N_CTX_SEQ,
                n_seq_max=n_seq,
                flash_attn_type=True,
                n_threads=N_THREADS,
                n_gpu_layers=GPU_LAYERS or None,
                **fields,
            )
            self._llamas[place] = stack.enter_context(llama)

    @property
    def plain(self) -> Llama:
        return self._llamas["plain"]

    @property
    def auto(self) -> Llama:
        return self._llamas["auto"]

    def modes(self) -> dict[str, Turn]:
        """Return plain decoding, and what is to be measured against it."""
        return {"plain": self._turn("plain", {}), "auto": self._turn("auto", {})}

    def fixed(self, max_ngram: int, length: int) -> Turn:
        """Return lookup that drafts `length` tokens wherever something agrees."""
        lookup = PromptLookupDecoding(max_ngram, length, adaptive=False)
        return self._turn("fixed", {"speculative": lookup})

    def native(self, programs: NativeLookup, native: NativeSetting) -> Turn:
        """Return one of llama.cpp's own programs."""

        def turn(group: Sequence[Prompt]) -> Sums:
            sums = Sums()
            self._wake(native.program)
            for prompt in group:
                answer = programs.answer(prompt.text, native)
                sums.n_tokens += answer.n_tokens
                sums.decode_sec += answer.sec
                sums.n_drafted += answer.n_drafted
                sums.n_accepted += answer.n_accepted
            return sums

        return turn

    def _turn(self, place: str, options: Mapping[str, Any]) -> Turn:
        llama = self._llamas[place]

        def turn(group: Sequence[Prompt]) -> Sums:
            self._wake(place)
            for handle in [llama.submit(p.tokens, 1, sampler=GREEDY) for p in group]:
                handle.result()  # its prompt is in memory now
            began = time.perf_counter()
            handles = [
                llama.submit(
                    p.tokens, self._n_tokens, sampler=self._sampler, seed=p.seed, **options
                )
                for p in group
            ]
            results = [handle.result() for handle in handles]
            sums = Sums(sec=time.perf_counter() - began)
            for result in results:
                timings = result.timings
                assert timings.cached_n >= timings.prompt_n - 1
                sums.n_tokens += timings.predicted_n
                sums.decode_sec += timings.predicted_sec
                sums.n_drafted += timings.draft_n
                sums.n_accepted += timings.draft_accepted_n
                sums.answers.append(result.tokens)
            return sums

        return turn

    def _wake(self, place: str) -> None:
        """Wait until the threads of a context that has just computed no longer look for work."""
        if place == self._awake:
            return
        self._awake = place
        end = time.monotonic() + 1.0
        while time.monotonic() < end:
            began, used = time.monotonic(), time.process_time()
            time.sleep(0.02)
            if time.process_time() - used < 0.2 * (time.monotonic() - began):
                return


def take_turns(
    modes: Mapping[str, Turn],
    asked: Sequence[Prompt],
    n_seq: int,
    rounds: int,
    benchmark: BenchmarkFixture | None = None,
) -> dict[str, list[Sums]]:
    """Let modes take turns on each group of `n_seq` prompts; return each mode's sums by round."""
    sums = {name: [Sums() for _ in range(rounds)] for name in modes}
    names = list(modes)
    groups = [asked[start : start + n_seq] for start in range(0, len(asked), n_seq)]
    schedule = itertools.product(range(len(groups)), range(rounds))

    def once() -> None:
        group, turn = next(schedule)
        # Nobody always follows the same one.
        first = (group + turn) % len(names)
        for name in (*names[first:], *names[:first]):
            sums[name][turn].add(modes[name](groups[group]))

    if benchmark is None:
        for _ in range(len(groups) * rounds):
            once()
    else:
        benchmark.pedantic(once, rounds=len(groups) * rounds)
    return sums


def ratio(
    ours: Sequence[Sums], theirs: Sequence[Sums], rate: str = "tokens_per_sec"
) -> dict[str, float]:
    """Return the spread over the rounds of one mode's speed to another's."""
    pairs = zip(ours, theirs, strict=True)
    return spread([getattr(mine, rate) / getattr(other, rate) for mine, other in pairs])


def speed(sums: Sequence[Sums], rate: str = "tokens_per_sec") -> dict[str, float]:
    return spread([getattr(s, rate) for s in sums])


def acceptance(sums: Sequence[Sums]) -> dict[str, float]:
    drafted, accepted = sum(s.n_drafted for s in sums), sum(s.n_accepted for s in sums)
    return {
        "drafted": drafted,
        "accepted": accepted,
        "acceptance": round(accepted / drafted, 4) if drafted else 0.0,
    }


def margins(
    llama: Llama, asked: Sequence[Prompt], plain: Sequence[Tokens], other: Sequence[Tokens]
) -> list[float | None]:
    """Return by how many logits plain decoding preferred its token, where answers first differ.

    A difference by rounding has a small margin. None: the other's token is not among the best ten,
    or one answer ends where the other goes on.
    """
    found: list[float | None] = []
    for prompt, mine, theirs in zip(asked, plain, other, strict=True):
        if mine == theirs:
            continue
        pairs = enumerate(zip(mine, theirs, strict=False))
        at = next((i for i, (a, b) in pairs if a != b), None)
        if at is None:
            found.append(None)
            continue
        result = llama.create_completion(
            [*prompt.tokens, *mine[:at]], 1, sampler=GREEDY, logprobs=10
        )
        assert result.logprobs is not None
        top = {entry.token_id: entry.logprob for entry in result.logprobs.tokens[0].top}
        preferred, chosen = top.get(mine[at]), top.get(theirs[at])
        both = preferred is not None and chosen is not None
        found.append(round(preferred - chosen, 4) if both else None)
    return found
