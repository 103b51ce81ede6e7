"""What the fixture `llama_bench` gives: latency budgets in a user's own tests."""

from __future__ import annotations

import statistics
from collections.abc import Collection, Iterable, Iterator, Mapping
from dataclasses import asdict, dataclass, fields
from typing import Any, cast

import pytest

from .chat_request import Messages
from .llama import Llama
from .param_rules import real
from .params import INT32_MAX, ParameterError, require_integer
from .perf import Perf
from .timings import CompletionTimings

TYPE_CHECKING = False
if TYPE_CHECKING:
    from pytest_benchmark.fixture import BenchmarkFixture

    from .request_builder import Prompt


@dataclass(frozen=True, slots=True)
class BenchResult:
    """The medians over the rounds of a `llama_bench`; also its ``extra_info``.

    Attributes
    ----------
    ttft_ms
        Milliseconds from the call to the first token.
    itl_p50_ms, itl_p99_ms
        Milliseconds between two tokens, percentiles within a round.
    tokens_per_sec
        Generated tokens per second, as ``timings.predicted_per_sec``: high for a few tokens.
    prompt_tokens_per_sec
        Prompt tokens computed per second.
    prompt_n, cached_n, predicted_n
        Prompt tokens, those of them taken from the prefix cache, and tokens generated.

    Thread-safety: immutable.
    """

    ttft_ms: float
    itl_p50_ms: float
    itl_p99_ms: float
    tokens_per_sec: float
    prompt_tokens_per_sec: float
    prompt_n: float
    cached_n: float
    predicted_n: float


# (argument, the field it bounds, whether it is an upper bound, what to call it)
_BUDGETS = (
    ("max_ttft_ms", "ttft_ms", True, "time to the first token", "ms"),
    ("max_itl_p50_ms", "itl_p50_ms", True, "median time between tokens", "ms"),
    ("max_itl_p99_ms", "itl_p99_ms", True, "99th percentile of the time between tokens", "ms"),
    ("min_tokens_per_sec", "tokens_per_sec", False, "generation", "tokens/s"),
    ("min_prompt_tokens_per_sec", "prompt_tokens_per_sec", False, "prompt", "tokens/s"),
)


class LlamaBench:
    """The fixture `llama_bench`; calling it benchmarks one completion.

    Thread-safety: none.
    """

    def __init__(self, benchmark: BenchmarkFixture) -> None:
        self._benchmark: Any = benchmark  # its methods have no types

    def __call__(
        self,
        llama: Llama,
        prompt: Prompt | Messages,
        max_tokens: int = 64,
        *,
        rounds: int = 5,
        max_ttft_ms: float | None = None,
        max_itl_p50_ms: float | None = None,
        max_itl_p99_ms: float | None = None,
        min_tokens_per_sec: float | None = None,
        min_prompt_tokens_per_sec: float | None = None,
        **options: Any,
    ) -> BenchResult:
        """Run a completion `rounds` times behind one warm-up; return medians, check budgets.

        `prompt` is text, token ids, or the messages of a chat. All rounds do the same work: the
        seed is fixed (0), nothing else may use `llama` meanwhile, and the prompt is computed each
        time (``cache_prompt=False``). With ``cache_prompt=True`` the warm-up leaves it in the
        cache, and every round finds it there. The other options are the completion's.

        A budget that the median misses fails the test, and so does one that an answer was too short
        to measure. With ``--benchmark-disable`` there is one round, and no budget is looked at.
        Raises `ParameterError` for another `llama` than a `Llama`, `rounds` < 1, a budget that is
        no number, ``stream`` and ``callback``, and what the completion raises.
        """
        if not isinstance(llama, Llama):
            raise ParameterError(f"llama: expected a Llama, not {type(llama).__name__}")
        given = {
            "max_ttft_ms": max_ttft_ms,
            "max_itl_p50_ms": max_itl_p50_ms,
            "max_itl_p99_ms": max_itl_p99_ms,
            "min_tokens_per_sec": min_tokens_per_sec,
            "min_prompt_tokens_per_sec": min_prompt_tokens_per_sec,
        }
        budgets = {name: real(name, v, 0.0) for name, v in given.items() if v is not None}
        require_integer("rounds", rounds, (1, INT32_MAX))
        if refused := options.keys() & {"stream", "callback"}:
            raise ParameterError(f"{min(refused)}: not in a benchmark")
        options = {"seed": 0, "cache_prompt": False, **options}
        samples: list[BenchResult] = []
        unmeasured: set[str] = set()

        def run() -> None:
            with llama.measure() as m:
                timings = _complete(llama, prompt, max_tokens, options)
            samples.append(_sample(timings, m.perf))
            unmeasured.update(_unmeasured(m.perf))

        if not isinstance(prompt, str):
            prompt = cast("Prompt", list(prompt))  # it is read once a round
        self._benchmark.pedantic(run, rounds=rounds, warmup_rounds=1)
        # Switched off, it ran once and not even to warm up.
        samples = samples[-rounds:]
        result = _medians(samples)
        self._benchmark.extra_info.update(asdict(result))
        if not self._benchmark.disabled:
            _check(result, samples, budgets, unmeasured)
        return result


def _complete(llama: Llama, prompt: Any, max_tokens: int, options: Any) -> CompletionTimings:
    is_chat = not isinstance(prompt, str) and prompt and not hasattr(prompt[0], "__index__")
    create: Any = llama.create_chat_completion if is_chat else llama.create_completion
    timings: CompletionTimings = create(prompt, max_tokens, **options).timings
    return timings


def _sample(timings: CompletionTimings, perf: Perf) -> BenchResult:
    return BenchResult(
        ttft_ms=1e3 * timings.first_token_sec,
        itl_p50_ms=1e3 * perf.inter_token.p50,
        itl_p99_ms=1e3 * perf.inter_token.p99,
        tokens_per_sec=timings.predicted_per_sec,
        prompt_tokens_per_sec=timings.prompt_per_sec,
        prompt_n=timings.prompt_n,
        cached_n=timings.cached_n,
        predicted_n=timings.predicted_n,
    )


def _unmeasured(perf: Perf) -> Iterator[str]:
    """Yield the fields that an answer of so few tokens says nothing about."""
    if perf.first_token.n == 0:
        yield "ttft_ms"
    if perf.inter_token.n == 0:
        yield from ("itl_p50_ms", "itl_p99_ms", "tokens_per_sec")


def _medians(samples: Iterable[BenchResult]) -> BenchResult:
    rows = list(samples)
    names = [item.name for item in fields(BenchResult)]
    return BenchResult(**{n: statistics.median(getattr(row, n) for row in rows) for n in names})


def _check(
    result: BenchResult,
    samples: list[BenchResult],
    budgets: Mapping[str, float],
    unmeasured: Collection[str],
) -> None:
    """Fail the test when a median is beyond its budget, or says nothing."""
    missed = []
    for name, value, is_maximum, what, unit in _BUDGETS:
        bound, found = budgets.get(name), getattr(result, value)
        if bound is None:
            continue
        if value in unmeasured:
            n = min(sample.predicted_n for sample in samples)
            missed.append(f"{what}: nothing to measure in an answer of {n:g} tokens ({name})")
        elif found > bound if is_maximum else found < bound:
            each = ", ".join(f"{getattr(sample, value):.4g}" for sample in samples)
            missed.append(
                f"{what}: {found:.4g} {unit}, but {name}={bound:g}"
                f" (median of {len(samples)} rounds: {each})"
            )
    if missed:
        pytest.fail("llama_bench: over budget\n  " + "\n  ".join(missed), pytrace=False)
