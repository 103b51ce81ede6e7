"""The fixture `llama_bench` in test suites of a user, each run by a pytest of its own."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
HEAD = """
import os, pytest
from llama_crab import Llama

@pytest.fixture(scope="module")
def llama():
    with Llama(os.environ["LLAMA_MODEL"], n_ctx=512, n_threads=1) as found:
        yield found
"""
Run = Callable[..., "subprocess.CompletedProcess[str]"]


@pytest.fixture
def run(tmp_path: Path, tiny_path: Path) -> Run:
    """Return a function that runs a body of tests, after `HEAD`, with pytest's flags."""

    def found(body: str, *flags: str) -> subprocess.CompletedProcess[str]:
        (tmp_path / "test_user.py").write_text(HEAD + body, encoding="utf-8")
        return run_pytest(tmp_path, tmp_path, tiny_path, *flags)

    return found


def run_pytest(
    suite: Path, folder: Path, model: Path, *flags: str
) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-P", "-m", "pytest", "-p", "no:cacheprovider", str(suite), *flags]
    return subprocess.run(
        command,
        check=False,
        capture_output=True,
        text=True,
        cwd=folder,
        env={**os.environ, "LLAMA_MODEL": str(model), "PYTEST_ADDOPTS": ""},
    )


def extra_info(file: Path) -> dict[str, float]:
    (row,) = json.loads(file.read_text(encoding="utf-8"))["benchmarks"]
    assert row["stats"]["rounds"] == 3
    info: dict[str, float] = row["extra_info"]
    return info


def test_the_medians_are_the_extra_info(run: Run, tmp_path: Path) -> None:
    body = """
def test_it(llama, llama_bench):
    result = llama_bench(llama, [300] * 20, 12, rounds=3, ignore_eos=True)
    assert result.predicted_n == 12
    assert result.tokens_per_sec > 0
    assert llama.perf.n_requests == 4  # with the warm-up
    with pytest.raises(AttributeError):
        result.ttft_ms = 0
"""
    done = run(body, "--benchmark-json=out.json")
    assert done.returncode == 0, done.stdout
    info = extra_info(tmp_path / "out.json")
    assert {name for name, value in info.items() if value > 0} == {
        "ttft_ms", "itl_p50_ms", "itl_p99_ms", "tokens_per_sec", "prompt_tokens_per_sec",
        "prompt_n", "predicted_n",
    }  # fmt: skip
    assert (info["prompt_n"], info["cached_n"], info["predicted_n"]) == (20, 0, 12)
    assert info["itl_p50_ms"] <= info["itl_p99_ms"]


def test_each_round_does_the_same_work_with_the_cache_and_without(run: Run, tmp_path: Path) -> None:
    body = """
@pytest.mark.parametrize("cached", [False, True])
def test_it(llama, llama_bench, cached):
    texts = []
    create = llama.create_completion
    def spy(*args, **options):
        texts.append(create(*args, **options))
        return texts[-1]
    llama.create_completion = spy
    result = llama_bench(llama, (300 for _ in range(20)), 8, rounds=3, cache_prompt=cached)
    assert len({found.text for found in texts}) == 1
    assert {found.usage.cached_tokens for found in texts[1:]} == {19 if cached else 0}
    assert result.cached_n == 19 * cached
    llama.create_completion = create
"""
    done = run(body)
    assert done.returncode == 0, done.stdout


def test_a_missed_budget_fails_the_test_and_says_how(run: Run) -> None:
    body = """
def test_slow(llama, llama_bench):
    llama_bench(llama, [300] * 20, 8, rounds=3, ignore_eos=True,
                max_ttft_ms=1e-6, max_itl_p99_ms=1e9, min_tokens_per_sec=1e12)

def test_fine(llama, llama_bench):
    llama_bench(llama, [300] * 20, 8, rounds=3, ignore_eos=True,
                max_ttft_ms=1e9, max_itl_p50_ms=1e9, max_itl_p99_ms=1e9,
                min_tokens_per_sec=1e-9, min_prompt_tokens_per_sec=1e-9)
"""
    done = run(body)
    assert done.returncode == 1
    assert "1 failed, 1 passed" in done.stdout
    number = r"[\d.e+]+"
    assert re.search(
        rf"time to the first token: {number} ms, but max_ttft_ms=1e-06 "
        rf"\(median of 3 rounds: {number}, {number}, {number}\)",
        done.stdout,
    )
    assert re.search(rf"generation: {number} tokens/s, but min_tokens_per_sec=1e\+12", done.stdout)
    assert "max_itl_p99_ms" not in done.stdout.partition("over budget")[2]
    assert "pytest_plugin.py" not in done.stdout  # no traceback of ours


def test_a_disabled_benchmark_runs_once_and_looks_at_no_budget(run: Run) -> None:
    body = """
def test_it(llama, llama_bench):
    llama_bench(llama, [300] * 20, 4, max_ttft_ms=1e-6)
    assert llama.perf.n_requests == 1
"""
    done = run(body, "--benchmark-disable")
    assert done.returncode == 0, done.stdout


def test_wrong_arguments_are_refused(run: Run) -> None:
    body = """
@pytest.mark.parametrize("options", [{"rounds": 0}, {"rounds": 2.5}, {"rounds": True},
                                     {"stream": True}, {"callback": print}, {"temprature": 1},
                                     {"max_ttft_ms": float("nan")}, {"max_itl_p50_ms": "200"},
                                     {"min_tokens_per_sec": -1}])
def test_it(llama, llama_bench, options):
    with pytest.raises((ValueError, TypeError), match=next(iter(options))):
        llama_bench(llama, "a", 4, **options)

def test_another_object(llama, llama_bench):
    with pytest.raises(ValueError, match="llama: expected a Llama, not Model"):
        llama_bench(llama.model, "a", 4)
"""
    done = run(body)
    assert "10 passed" in done.stdout, done.stdout


def test_a_budget_of_what_was_not_measured_fails(run: Run) -> None:
    """An answer of one token has no time between tokens, one of none no first token."""
    body = """
def test_one(llama, llama_bench):
    llama_bench(llama, [300] * 20, 1, rounds=2, max_itl_p99_ms=1e9, min_tokens_per_sec=1e-9)

def test_none(llama, llama_bench):
    llama_bench(llama, [300] * 20, 0, rounds=2, max_ttft_ms=1e9)

def test_ttft_of_one_token(llama, llama_bench):
    llama_bench(llama, [300] * 20, 1, rounds=2, max_ttft_ms=1e9)
"""
    done = run(body)
    assert "2 failed, 1 passed" in done.stdout, done.stdout
    assert "99th percentile of the time between tokens: nothing to measure" in done.stdout
    assert "generation: nothing to measure in an answer of 1 tokens" in done.stdout
    assert "time to the first token: nothing to measure in an answer of 0 tokens" in done.stdout


def test_ids_of_an_array_are_a_prompt(run: Run) -> None:
    body = """
import numpy

def test_it(llama, llama_bench):
    assert llama_bench(llama, numpy.full(20, 300), 4, rounds=2).prompt_n == 20
"""
    done = run(body)
    assert done.returncode == 0, done.stdout


def test_without_pytest_benchmark_only_its_users_fail(run: Run) -> None:
    body = """
def test_user(llama_bench):
    pass

def test_other():
    pass
"""
    done = run(body, "-p", "no:benchmark")
    assert done.returncode == 1
    assert "1 passed, 1 error" in done.stdout
    assert "llama_bench needs pytest-benchmark" in done.stdout


def test_the_plugin_imports_nothing_until_it_is_used(tmp_path: Path, tiny_path: Path) -> None:
    (tmp_path / "test_user.py").write_text(
        "import sys\ndef test_it(pytestconfig):\n"
        "    assert pytestconfig.pluginmanager.hasplugin('llama_crab')\n"
        "    assert not [name for name in sys.modules if name.split('.')[0] == 'llama_crab']\n",
        encoding="utf-8",
    )
    done = run_pytest(tmp_path, tmp_path, tiny_path)
    assert done.returncode == 0, done.stdout


def test_the_example_runs(tmp_path: Path, smol_path: Path) -> None:
    """With the budgets out of reach of a slow machine, which the test is not about."""
    example = ROOT / "examples" / "latency_budget"
    os_flags = ("--import-mode=importlib", "-c", os.devnull, "--benchmark-json=out.json")
    environment = {"MAX_TTFT_MS": "1e9", "MIN_TOKENS_PER_SEC": "1e-9"}
    with pytest.MonkeyPatch.context() as patch:
        for name, value in environment.items():
            patch.setenv(name, value)
        done = run_pytest(example, tmp_path, smol_path, *os_flags)
    assert done.returncode == 0, done.stdout
    rows = json.loads((tmp_path / "out.json").read_text(encoding="utf-8"))["benchmarks"]
    assert [row["extra_info"]["predicted_n"] > 0 for row in rows] == [True, True]
