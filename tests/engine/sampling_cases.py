"""Chains, rows and recorded logits for the sampler tests, each made from an integer seed."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import cache
from typing import Any

import numpy as np
import numpy.typing as npt
from sampling_oracle import Oracle

from llama_crab import _core
from llama_crab.sampling import SamplerChain
from llama_crab.sampling_stages import Stage

Row = npt.NDArray[np.float32]
Random = np.random.Generator

TRUNCATIONS = ("top_k", "top_p", "min_p", "typical", "top_n_sigma")
SELECTORS = ("dist", "greedy", "mirostat", "mirostat_v2", "adaptive_p")
EXTRAS = ("temp", "temp_ext", "penalties", "dry", "xtc", "logit_bias")
# Every ordered selection of up to three truncations with every selector.
SKELETONS = tuple(
    (chosen, selector)
    for n in range(4)
    for chosen in itertools.permutations(TRUNCATIONS, n)
    for selector in SELECTORS
)
BREAKERS = ((), (), (), ("e",), ("\n", ":"))

PARAGRAPH = (
    "The lighthouse keeper counted seven ships before noon. Each carried salt, cloth and letters, "
    "and each captain asked the same question: was the harbour still open? He wrote the answers in "
    "a long book, page after page, as his father had done. In the evening the wind turned north, "
    "the waves grew tall, and the lamp burned until morning. Nobody remembers his name, but the "
    "book is kept in the town library, where children learn to read from it. \"Salt, cloth and "
    "letters,\" it begins, and it ends with the year 1893."
)  # fmt: skip


@dataclass(frozen=True)
class Case:
    """One sequence of draws: the chain, what was accepted before, and a row for every draw."""

    stages: tuple[Stage, ...]
    rows: tuple[Row, ...]
    history: tuple[int, ...]
    seed: int
    kind: str

    @property
    def n(self) -> int:
        return int(self.rows[0].size)

    def __repr__(self) -> str:
        chain = "SamplerChain()" if not self.stages else repr(SamplerChain(self.stages))
        return f"<Case {self.kind} n={self.n} seed={self.seed} {chain}>"


def started(case: Case, executor: Any, model: _core.Model) -> Any:
    """Return the case's chain, compiled, with its history accepted."""
    sampler = SamplerChain(case.stages, executor).compile(model, case.seed)
    for token in case.history:
        sampler.accept(token)
    return sampler


def oracle_for(case: Case, model: _core.Model) -> Oracle:
    """Return the case's definition in double precision, with its history accepted."""
    stages = SamplerChain(case.stages).stages
    oracle = Oracle(stages, model.vocab.n_tokens, case.seed, breaker_ids(model.vocab))
    for token in case.history:
        oracle.accept(token)
    return oracle


@cache
def breaker_ids(vocab: _core.Vocab) -> dict[tuple[str, ...], frozenset[int]]:
    """Return the tokens that contain one of the strings, for all that dry stages here name."""
    pieces = [vocab.detokenize([token], False, True) for token in range(vocab.n_tokens)]
    return {
        texts: frozenset(
            token
            for token, piece in enumerate(pieces)
            if any(text.encode() in piece for text in texts)
        )
        for texts in set(BREAKERS)
    }


# Rows.


def untied(row: Row) -> Row:
    """Return the row with equal finite values moved up to the next free float32."""
    order = np.argsort(row)
    values = row[order]
    start = int(np.searchsorted(values, -np.inf, side="right"))
    finite = values[start:]
    while (equal := np.flatnonzero(finite[1:] <= finite[:-1])).size:
        finite[equal + 1] = np.nextafter(finite[equal], np.float32(np.inf))
    row = row.copy()
    row[order[start:]] = finite
    return row


def _language(rng: Random, n: int) -> npt.NDArray[Any]:
    """Return a few peaks that fall off like Zipf's law over a Gaussian bulk."""
    row = rng.normal(0.0, rng.uniform(1.0, 2.5), n)
    peaks = rng.integers(n, size=int(rng.integers(1, 40)))
    height, slope = rng.uniform(6.0, 14.0), rng.uniform(0.7, 3.0)
    row[peaks] = height - slope * np.log(np.arange(1, peaks.size + 1))
    row[peaks] += rng.normal(0.0, 0.2, peaks.size)
    return row


ROW_KINDS: dict[str, tuple[float, Callable[[Random, int], npt.NDArray[Any]]]] = {
    "normal": (0.30, lambda rng, n: rng.normal(0.0, rng.uniform(1.0, 8.0), n)),
    "language": (0.34, _language),
    "uniform": (0.10, lambda rng, n: rng.uniform(-1.0, 1.0, n) * rng.uniform(0.5, 12.0)),
    "exponential": (0.12, lambda rng, n: rng.laplace(0.0, rng.uniform(0.5, 4.0), n)),
    "tiny": (0.02, lambda rng, n: rng.normal(0.0, 1e-30, n)),
    "large": (0.03, lambda rng, n: rng.normal(0.0, 1e6, n)),
    "huge": (0.02, lambda rng, n: rng.normal(0.0, 1e30, n)),
    "ties": (0.05, lambda rng, n: np.round(rng.normal(0.0, 3.0, n) * 4.0) / 4.0),
    "flat": (0.02, lambda rng, n: np.full(n, rng.normal())),
}
BIG = (131_072, 262_144)


def _size(rng: Random, big: float) -> int:
    where = rng.random()
    if where < big:
        return int(rng.choice(BIG))
    low, high = (4_097, 65_536) if where < big * 2.5 else (1, 4_096)
    return int(np.exp(rng.uniform(np.log(low), np.log(high + 1))))


def make_rows(rng: Random, kind: str, n: int, n_rows: int) -> tuple[Row, ...]:
    """Return rows of one kind; some with up to half of the candidates -inf."""
    masked = rng.uniform(0.0, 0.5) if rng.random() < 0.3 else 0.0
    rows: list[Row] = []
    for _ in range(n_rows):
        if rows and n in BIG:  # to make another is slower than to sample from it
            rows.append(np.roll(rows[0], int(rng.integers(n))))
            continue
        row = ROW_KINDS[kind][1](rng, n).astype(np.float32)
        if kind not in ("ties", "flat"):
            row = untied(row)
        if masked:
            mask = rng.random(n) < masked
            mask[rng.integers(n)] = False
            row[mask] = -np.inf
        rows.append(row)
    return tuple(rows)


# Chains.


def _min_keep(rng: Random) -> int:
    return int(rng.choice([0, 1, 1, 1, 1, 2, 3, 7]))


def _odd(rng: Random, share: float, odd: float, usual: float) -> float:
    return odd if rng.random() < share else usual


def _biases(rng: Random, n: int) -> dict[int, float]:
    tokens = rng.integers(0, min(n + 2, 32_000), int(rng.integers(1, 6)))
    ban = rng.random() < 0.3
    return {
        int(token): float("-inf") if ban and rng.random() < 0.3 else float(rng.normal(0.0, 3.0))
        for token in tokens
    }


def _log_uniform(rng: Random, low: float, high: float) -> float:
    return float(np.exp(rng.uniform(np.log(low), np.log(high))))


def _cumulative(rng: Random) -> float:
    usual = rng.uniform(0.05, 0.999) if rng.random() < 0.7 else 1.0 - 10 ** rng.uniform(-3, -1)
    return _odd(rng, 0.03, 1.0, float(usual))


# A maker of random parameters for a row of n candidates; sometimes the values that turn it off.
PARAMS: dict[str, Callable[[Random, int], dict[str, Any]]] = {
    "top_k": lambda rng, n: {"k": int(_odd(rng, 0.03, 0, _log_uniform(rng, 1, n + 2)))},
    "top_p": lambda rng, n: {
        "p": _odd(rng, 0.02, 0.0, _cumulative(rng)),
        "min_keep": _min_keep(rng),
    },
    "min_p": lambda rng, n: {
        "p": _odd(rng, 0.03, float(rng.choice([0.0, 1.0])), 10 ** rng.uniform(-4.0, 0.0)),
        "min_keep": _min_keep(rng),
    },
    "typical": lambda rng, n: {"p": _cumulative(rng), "min_keep": _min_keep(rng)},
    "top_n_sigma": lambda rng, n: {"n": _odd(rng, 0.03, 0.0, rng.uniform(0.1, 4.0))},
    "temp": lambda rng, n: {
        "t": _odd(rng, 0.05, float(rng.choice([0.0, 1.0])), _log_uniform(rng, 0.2, 3.0))
    },
    "temp_ext": lambda rng, n: {
        "t": rng.uniform(0.2, 2.0),
        "delta": _odd(rng, 0.1, 0.0, rng.uniform(0.0, 1.2)),
        "exponent": _odd(rng, 0.5, 1.0, rng.uniform(0.3, 3.0)),
    },
    "penalties": lambda rng, n: {
        "penalty_last_n": int(_odd(rng, 0.03, 0, float(rng.integers(1, 80)))),
        "penalty_repeat": _odd(rng, 0.1, 1.0, rng.uniform(0.8, 1.8)),
        "penalty_freq": _odd(rng, 0.3, 0.0, rng.uniform(-0.5, 1.0)),
        "penalty_present": _odd(rng, 0.3, 0.0, rng.uniform(-0.5, 1.5)),
    },
    "dry": lambda rng, n: {
        "dry_multiplier": _odd(rng, 0.03, 0.0, rng.uniform(0.1, 3.0)),
        "dry_base": _odd(rng, 0.1, 1.0, rng.uniform(1.0, 2.5)),
        "dry_allowed_length": int(rng.integers(0, 4)),
        "dry_penalty_last_n": int(rng.integers(1, 64)),
        "seq_breakers": BREAKERS[int(rng.integers(len(BREAKERS)))],
    },
    "xtc": lambda rng, n: {
        "p": _odd(rng, 0.3, 1.0, rng.uniform(0.0, 1.0)),
        "t": _odd(rng, 0.03, 0.0, _log_uniform(rng, 0.003, 0.52)),
        "min_keep": _min_keep(rng),
        "seed": None if rng.random() < 0.7 else int(rng.integers(1 << 32 - 1)),
    },
    "logit_bias": lambda rng, n: {"logit_bias": _biases(rng, n)},
    "dist": lambda rng, n: {"seed": None if rng.random() < 0.8 else int(rng.integers(1 << 31))},
    "greedy": lambda rng, n: {},
    "mirostat": lambda rng, n: {
        "seed": None,
        "tau": _odd(rng, 0.2, 5.0, rng.uniform(0.3, 9.0)),
        "eta": _odd(rng, 0.2, 0.1, rng.uniform(0.0, 0.6)),
        "m": int(_odd(rng, 0.6, 100, float(rng.integers(2, 200)))),
    },
    "mirostat_v2": lambda rng, n: {
        "seed": None,
        "tau": _odd(rng, 0.2, 5.0, rng.uniform(0.3, 9.0)),
        "eta": _odd(rng, 0.2, 0.1, rng.uniform(0.0, 0.6)),
    },
    "adaptive_p": lambda rng, n: {
        "target": _odd(rng, 0.1, -1.0, rng.uniform(0.0, 1.0)),
        "decay": _odd(rng, 0.3, 0.9, rng.uniform(0.0, 0.99)),
        "seed": None,
    },
}


def make_stages(rng: Random, skeleton: int, n: int) -> tuple[Stage, ...]:
    """Return a chain over `SKELETONS[skeleton]` with other stages mixed in."""
    chosen, selector = SKELETONS[skeleton % len(SKELETONS)]
    names = list(chosen)
    for extra in rng.permutation(EXTRAS)[: int(rng.choice([0, 0, 1, 1, 2, 3]))]:
        names.insert(int(rng.integers(len(names) + 1)), str(extra))
    return tuple(Stage(name, **PARAMS[name](rng, n)) for name in (*names, selector))


def _history(rng: Random, n: int) -> tuple[int, ...]:
    """Return earlier tokens with repetitions, low ids more often."""
    if rng.random() < 0.2:
        return ()
    piece = (n * rng.random(int(rng.integers(1, 12))) ** 2).astype(int)
    between = rng.integers(n, size=4)
    text = np.concatenate([[other, *piece[: int(rng.integers(1, 13))]] for other in between])
    return tuple(int(token) for token in text)


def make_case(seed: int, *, big: float = 0.02, rows: Sequence[Row] | None = None) -> Case:
    """Return case number `seed`; consecutive seeds go through all skeletons.

    `big` is the share of rows of 131,072 and more. With `rows` the draws are on some of them.
    """
    rng = np.random.default_rng(seed)
    n = _size(rng, big) if rows is None else int(rows[0].size)
    stages = make_stages(rng, seed, n)
    n_rows = int(rng.integers(3, 9)) if n <= 4_096 else 3
    if rows is None:
        kinds = list(ROW_KINDS)
        kind = kinds[int(rng.choice(len(kinds), p=[ROW_KINDS[name][0] for name in kinds]))]
        made = make_rows(rng, kind, n, n_rows)
    else:
        kind = "recorded"
        start = int(rng.integers(max(len(rows) - n_rows, 0) + 1))
        made = tuple(rows[start : start + n_rows])
    return Case(stages, made, _history(rng, n), int(rng.integers((1 << 32) - 1)), kind)


def comparable_cases(
    start: int, count: int, *, big: float = 0.02, rows: Sequence[Row] | None = None
) -> Iterator[Case]:
    """Yield `count` cases with numbers from `start` on that are comparable with llama.cpp."""
    found = 0
    for seed in itertools.count(start):
        case = make_case(seed, big=big, rows=rows)
        if comparable(case.stages, case.rows, ties_allowed=rows is not None):
            yield case
            found += 1
        if found == count:
            return


# What token identity with llama.cpp cannot be asked of.

# Beyond this gap expf gives 0, where the definition has a probability.
_UNDERFLOW = 80.0
# llama.cpp's bucket sort casts 6.4 * logit + 64 to int; float sums of squares overflow later.
_LARGEST = 1e8


def comparable(stages: Sequence[Stage], rows: Sequence[Row], *, ties_allowed: bool = False) -> bool:
    """Whether llama.cpp has one defined answer, so that tokens may be compared.

    False for: rows that are flat or have ties (recorded rows have some in the bulk: allow them) or
    values that its bucket sort cannot order; typical on candidates that are -inf or may underflow
    (NaN scores) and before top_n_sigma; logit_bias where the list may be sorted (a stale order);
    mirostat on underflow (infinite steps); bans that may leave no candidate; a dynamic temperature
    near 0 that may overflow; xtc with t = 0 on -inf (it keeps only the worst).
    """
    finite = [row[row > -np.inf] for row in rows]
    gap = max(float(row.max()) - float(row.min()) for row in finite)
    dead = any(some.size < row.size for some, row in zip(finite, rows, strict=True))
    for row in finite:
        if float(np.abs(row).max()) > _LARGEST:
            return False
        if row.size > 1 and float(row.max()) - float(row.min()) < 1e-3:
            return False
        if not ties_allowed and not (np.diff(np.sort(row)) > 0).all():
            return False
    may_be_sorted = False
    after_typical = False
    truncated = False
    for stage in stages:
        name, p = stage.name, stage.params
        if stage.is_noop:
            continue
        if name == "typical":
            if dead or gap > _UNDERFLOW:
                return False
            after_typical, may_be_sorted = True, False
        elif name == "top_n_sigma":
            if after_typical:
                return False
            dead = True
        elif name == "logit_bias":
            if may_be_sorted:
                return False
            n_banned = sum(bias == -np.inf for _, bias in p["logit_bias"])
            if n_banned and (truncated or n_banned >= min(row.size for row in finite)):
                return False
            dead = dead or n_banned > 0
            gap += 10.0
        elif name == "temp" or (name == "temp_ext" and p["delta"] == 0.0):
            dead = dead or p["t"] == 0.0
            gap /= p["t"] or 1.0
        elif name == "temp_ext":
            low = p["t"] - p["delta"]
            if low < 0.01 and gap > _UNDERFLOW:
                return False
            gap /= max(low, 1e-6)
            may_be_sorted = True
        elif name == "xtc":
            if p["t"] == 0.0 and dead:
                return False
            may_be_sorted = True
        elif name == "penalties":
            gap = gap * max(p["penalty_repeat"], 1.0 / p["penalty_repeat"]) + 4.0
            may_be_sorted = False
        elif name == "dry":
            # Repeats in the histories are shorter, unless there are hardly any tokens to choose.
            longest = min(p["dry_penalty_last_n"], 16 if rows[0].size > 64 else 64)
            gap += p["dry_multiplier"] * p["dry_base"] ** (longest - p["dry_allowed_length"])
        elif name in ("top_k", "top_p"):
            may_be_sorted = True
        elif name == "min_p":
            may_be_sorted = may_be_sorted or p["min_keep"] > 1
        elif name == "mirostat" and gap > _UNDERFLOW:
            return False
        truncated = truncated or name in TRUNCATIONS or name == "xtc" or stage.is_zero_temp
    return True


def recorded_rows(model: _core.Model, n: int) -> list[Row]:
    """Return the logits after each of the first `n` tokens of an English paragraph."""
    tokens = model.vocab.tokenize(PARAGRAPH, True, True)[:n]
    rows: list[Row] = []
    with (
        _core.Context(
            model, n_ctx=512, n_batch=64, n_ubatch=64, n_outputs_max=64,
            n_threads=1, n_threads_batch=1,
        ) as context,
        _core.Batch(64) as batch,
    ):  # fmt: skip
        for start in range(0, len(tokens), 64):
            part = tokens[start : start + 64]
            batch.clear()
            batch.extend(part, start, 0, "all")
            context.decode(batch)
            rows += [np.array(context.logits(i), np.float32) for i in range(len(part))]
    return rows
