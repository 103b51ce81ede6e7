"""What the suites share: the models, native llama.cpp, and the record of a run.

Every speed here is a ratio taken in one run: the machine is shared and its absolute speed drifts.
"""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

import pytest

HERE = Path(__file__).resolve().parent
sys.path[:0] = [str(HERE), str(HERE.parent / "tests")]

import fetch_models  # noqa: E402
from side_by_side import ROOT, Native, machine  # noqa: E402

MODELS = {"smollm2": fetch_models.DEMO_MODEL, "gemma": fetch_models.GEMMA}


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption(
        "--record", metavar="NAME", help="write the figures to benchmarks/results/NAME.json"
    )


@pytest.fixture(scope="session")
def native() -> Native:
    return Native()


@pytest.fixture(scope="session", params=["smollm2", "gemma"])
def model_path(request: pytest.FixtureRequest) -> Path:
    """Return the real models of the suite, by name."""
    return fetch_models.fetch(MODELS[request.param])


@pytest.fixture(scope="session")
def smollm2() -> Path:
    return fetch_models.fetch(MODELS["smollm2"])


FIGURES = pytest.StashKey[dict[str, Any]]()


def pytest_configure(config: pytest.Config) -> None:
    config.stash[FIGURES] = {}


@pytest.fixture(scope="session")
def figures(request: pytest.FixtureRequest) -> dict[str, Any]:
    """Where a benchmark puts what it found; printed at the end, kept with --record."""
    return request.config.stash[FIGURES]


def pytest_terminal_summary(
    terminalreporter: pytest.TerminalReporter, config: pytest.Config
) -> None:
    collected = config.stash[FIGURES]
    for name, figure in sorted(collected.items()):
        terminalreporter.write_line(f"{name}: {json.dumps(figure)}")
    name = config.getoption("--record")
    if name:
        path = ROOT / "benchmarks" / "results" / f"{name}.json"
        path.parent.mkdir(exist_ok=True)
        path.write_text(json.dumps({**machine(), "figures": collected}, indent=1) + "\n")
