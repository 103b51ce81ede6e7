"""A maker of schedulers; puts this folder on the path for `engine_requests`."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from llama_crab import _core
from llama_crab.engine import Scheduler

sys.path.insert(0, str(Path(__file__).resolve().parent))

from engine_requests import MakeScheduler
from fresh_runs import Bench, Known


@pytest.fixture
def make(tiny: _core.Model) -> Iterator[MakeScheduler]:
    """Return a maker of schedulers over fresh contexts of the tiny model."""
    contexts = []

    def scheduler(**fields: Any) -> Scheduler:
        fields = {
            "n_ctx": 512, "n_batch": 64, "n_ubatch": 32, "n_seq_max": 1,
            "n_threads": 1, "n_threads_batch": 1, **fields,
        }  # fmt: skip
        contexts.append(_core.Context(tiny, **fields))
        return Scheduler(contexts[-1])

    yield scheduler
    for context in contexts:
        context.close()


@pytest.fixture(scope="session")
def known_answers() -> Known:
    return {}


@pytest.fixture
def bench(tiny: _core.Model, known_answers: Known) -> Iterator[Bench]:
    """Return a maker of schedulers over the tiny model that knows what requests give alone."""
    found = Bench(tiny, known_answers)
    yield found
    found.close()
