"""What many users ask at once, and how their answers are timed: the same for both sides."""

from __future__ import annotations

import math
import random
import statistics
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass

Tokenize = Callable[[str], list[int]]

_SUBJECTS = (
    *("the old captain", "a young doctor", "my neighbour", "the city council", "our teacher"),
    *("the night train", "a small company", "the museum", "every farmer", "the orchestra"),
    *("a lost traveller", "the engineer", "her brother", "the weather service", "a journalist"),
)
_VERBS = (
    *("describes", "repairs", "remembers", "carries", "measures", "sells", "paints", "follows"),
    *("explains", "builds", "watches", "questions", "translates", "loses", "discovers"),
)
_OBJECTS = (
    *("a wooden bridge", "the history of bread", "two heavy suitcases", "the last harvest"),
    *("a difficult question", "the map of the valley", "an unfinished letter", "new machines"),
    *("the price of copper", "a garden full of snow", "seven languages", "the lighthouse"),
)
_ENDINGS = (
    *("before the winter comes", "without a word", "in the middle of the night", "once a year"),
    *("because nobody else will", "near the river", "for the first time", "with great care"),
    *("while the children sleep", "on the way to the harbour", "as if nothing had happened"),
)


@dataclass(frozen=True, slots=True)
class LoadRequest:
    """One question, in token ids."""

    prompt: list[int]
    max_tokens: int


@dataclass(frozen=True, slots=True)
class Answer:
    """When a request left, when its pieces came (the first token, ..., the end), and its size."""

    submitted: float
    marks: tuple[float, ...]
    n_tokens: int

    @property
    def first_token_sec(self) -> float:
        return self.marks[0] - self.submitted

    @property
    def token_gap_sec(self) -> float:
        """Return the mean time between two tokens."""
        return (self.marks[-1] - self.marks[0]) / max(1, self.n_tokens - 1)


def sentences(n: int, seed: int) -> list[str]:
    """Return plain English sentences, the same for the same seed."""
    rng = random.Random(seed)
    found = []
    for _ in range(n):
        parts = [rng.choice(part) for part in (_SUBJECTS, _VERBS, _OBJECTS, _ENDINGS)]
        found.append(f"{' '.join(parts).capitalize()}.")
    return found


def prose(tokenize: Tokenize, n_tokens: int, seed: int) -> list[int]:
    """Return exactly `n_tokens` ids of running text."""
    # No sentence is shorter than five tokens.
    return tokenize(" ".join(sentences(n_tokens // 5 + 1, seed)))[:n_tokens]


def mixed_requests(tokenize: Tokenize, n: int, seed: int) -> list[LoadRequest]:
    """Return questions of 20 to 200 tokens that ask for 32 to 128 tokens."""
    rng = random.Random(seed)
    return [
        LoadRequest(
            prose(tokenize, rng.randint(20, 200), rng.getrandbits(32)), rng.randint(32, 128)
        )
        for _ in range(n)
    ]


def shared_prefix_requests(
    tokenize: Tokenize, n_users: int, seed: int, n_prefix: int = 1000, n_own: int = 20
) -> list[LoadRequest]:
    """Return short questions of `n_users` behind the same long text."""
    rng = random.Random(seed)
    prefix = prose(tokenize, n_prefix, rng.getrandbits(32))
    return [
        LoadRequest(prefix + prose(tokenize, n_own, rng.getrandbits(32)), max_tokens=16)
        for _ in range(n_users)
    ]


def closed_loop(
    ask: Callable[[LoadRequest], Answer], requests: Sequence[LoadRequest], n_clients: int
) -> list[Answer]:
    """Have clients ask, each its next question when it has its answer."""
    with ThreadPoolExecutor(n_clients) as clients:
        return list(clients.map(ask, requests))


def tokens_per_sec(answers: Sequence[Answer]) -> float:
    """Return all generated tokens over the time from the first question to the last answer."""
    begin = min(answer.submitted for answer in answers)
    end = max(answer.marks[-1] for answer in answers)
    return sum(answer.n_tokens for answer in answers) / (end - begin)


def latencies(answers: Sequence[Answer]) -> dict[str, float]:
    """Return milliseconds to the first token and between tokens, over all requests.

    The 95th percentile of the gaps is of single gaps where they were seen, else of each request's
    mean.
    """
    first = [answer.first_token_sec for answer in answers]
    gaps = [answer.token_gap_sec for answer in answers]
    seen = [
        later - earlier
        for answer in answers
        if len(answer.marks) > 2
        for earlier, later in zip(answer.marks, answer.marks[1:], strict=False)
    ]
    return {
        "ttft_ms": round(statistics.mean(first) * 1e3, 2),
        "ttft_p95_ms": round(_p95(first) * 1e3, 2),
        "itl_ms": round(statistics.mean(gaps) * 1e3, 3),
        "itl_p95_ms": round(_p95(seen or gaps) * 1e3, 3),
    }


def _p95(values: Sequence[float]) -> float:
    return sorted(values)[math.ceil(0.95 * len(values)) - 1]
