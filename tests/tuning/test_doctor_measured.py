"""What the doctor measures: a difference counts when it is there twice, outside the spread."""

from __future__ import annotations

import random
from collections.abc import Callable
from pathlib import Path
from types import TracebackType
from typing import Any

import pytest

from llama_crab import LlamaParams
from llama_crab.tuning import checks_measured, examine
from llama_crab.tuning.checks_measured import alternatives, measured
from llama_crab.tuning.finding import Finding
from llama_crab.tuning.subject import Build, Machine, Subject

Speed = Callable[[LlamaParams, str], float]


def subject_of(**given: Any) -> Subject:
    return Subject(Machine.read("/"), Build("cpu", frozenset()), LlamaParams(**given))


@pytest.fixture
def race(monkeypatch: pytest.MonkeyPatch) -> Callable[..., dict[str, Finding]]:
    """Return a function that measures on beds of given speeds (tokens per second)."""

    def run(speed: Speed, noise: float = 0.02, **given: Any) -> dict[str, Finding]:
        rng = random.Random(7)

        class FakeBed:
            def __init__(self, params: LlamaParams, *, weights_of: object = None) -> None:
                self.params = params

            def prefill(self, n: int, depth: int = 0) -> float:
                return n / speed(self.params, "prompts") * rng.uniform(1 - noise, 1 + noise)

            def generate(self, n: int, depth: int = 0) -> float:
                return n / speed(self.params, "answers") * rng.uniform(1 - noise, 1 + noise)

            def close(self) -> None:
                pass

            def __enter__(self) -> FakeBed:
                return self

            def __exit__(
                self,
                kind: type[BaseException] | None,
                error: BaseException | None,
                trace: TracebackType | None,
            ) -> None:
                self.close()

        monkeypatch.setattr(checks_measured, "Bed", FakeBed)
        subject = subject_of(**given)
        found = measured(subject, alternatives(subject), lambda line: None)
        return {finding.name: finding for finding in found}

    return run


def test_flash_attention_that_slows_answers(race: Any) -> None:
    def speed(params: LlamaParams, workload: str) -> float:
        off = params.flash_attn_type == "disabled"
        return 120.0 if off and workload == "answers" else 100.0

    finding = race(speed)["flash-attention"]
    assert finding.severity == "advice"
    assert finding.symptom == "answers are slower than they could be"
    assert "answers 1.1" in finding.evidence or "answers 1.2" in finding.evidence
    assert "disabled" in finding.fix


def test_flash_attention_turned_off_where_it_wins(race: Any) -> None:
    finding = race(
        lambda params, workload: 70.0 if params.flash_attn_type == "disabled" else 100.0,
        flash_attn_type="disabled",
    )["flash-attention"]
    assert finding.severity == "problem"
    assert finding.symptom.startswith("prompts and answers")


def test_an_alternative_that_also_loses_is_told(race: Any) -> None:
    def speed(params: LlamaParams, workload: str) -> float:
        on = params.flash_attn_type == "enabled"
        return 100.0 if not on else {"prompts": 150.0, "answers": 70.0}[workload]

    finding = race(speed, flash_attn_type="disabled")["flash-attention"]
    assert finding.severity == "advice"
    assert "at the cost" in finding.symptom


@pytest.mark.parametrize("noise", [0.0, 0.05, 0.4])
def test_equal_settings_are_never_told_apart(race: Any, noise: float) -> None:
    found = race(lambda params, workload: 100.0, noise, n_ubatch=16, type_k="q8_0")
    assert {finding.severity for finding in found.values()} == {"ok"}
    assert set(found) == {"flash-attention", "micro-batch", "cache-type"}


def test_a_difference_inside_the_spread_is_none(race: Any) -> None:
    found = race(
        lambda params, workload: 110.0 if params.flash_attn_type == "disabled" else 100.0, 0.4
    )
    assert found["flash-attention"].severity == "ok"


def test_a_quantised_cache_is_never_more_than_advice(race: Any) -> None:
    found = race(
        lambda params, workload: 50.0 if params.type_k else 100.0, type_k="q8_0", type_v="q8_0"
    )
    assert found["cache-type"].severity == "advice"
    # V could not be quantised without it.
    assert "flash-attention" not in found


def test_a_micro_batch_that_costs_is_a_problem(race: Any) -> None:
    found = race(lambda params, workload: 40.0 if params.n_ubatch else 100.0, n_ubatch=8)
    assert found["micro-batch"].severity == "problem"


def test_a_model_that_is_too_slow_is_not_waited_for(race: Any) -> None:
    assert race(lambda params, workload: 0.1) == {}


def test_the_number_of_threads_has_the_default_as_alternative() -> None:
    machine = Machine.read("/")
    default = machine.threads.n_threads
    names = [option.name for option in alternatives(subject_of(n_threads=default))]
    assert "threads" not in names
    names = [option.name for option in alternatives(subject_of(n_threads=default + 1))]
    assert "threads" in names


def test_measured_on_a_model(tiny_path: Path) -> None:
    lines: list[str] = []
    params = LlamaParams(n_ubatch=16, type_k="bf16", flash_attn_type="enabled")
    found = examine(tiny_path, params, progress=lines.append).findings
    shown = {item.name: item.evidence for item in found}
    assert "tokens deep: prompts" in shown["flash-attention"]
    assert "tokens deep: prompts" in shown["micro-batch"]
    assert "tokens deep: prompts" in shown["cache-type"]
    assert "load" not in shown
    assert any("round 5 of 5" in line for line in lines)


def test_more_threads_than_cores_are_not_measured(tiny_path: Path) -> None:
    found = {item.name: item for item in examine(tiny_path, LlamaParams(n_threads=500)).findings}
    assert found["threads"].severity == "problem"
    assert "tokens deep" not in found["threads"].evidence
    assert "flash-attention" in found


def test_a_configuration_that_does_not_load_is_a_problem(tiny_path: Path) -> None:
    # 16 values a head are no whole block of the cache type.
    found = {i.name: i for i in examine(tiny_path, LlamaParams(type_k="q8_0")).findings}
    assert found["load"].severity == "problem"
    assert "block size 32" in found["load"].evidence
