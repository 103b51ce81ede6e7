"""The pytest plugin: fixture `llama_bench`.

Outside of the package, because pytest imports every plugin and the package's own import costs time.
"""

from __future__ import annotations

import pytest

TYPE_CHECKING = False
if TYPE_CHECKING:
    from llama_crab.pytest_plugin import LlamaBench


@pytest.fixture
def llama_bench(request: pytest.FixtureRequest) -> LlamaBench:
    """Benchmark a completion and check latency budgets; see `llama_crab.pytest_plugin`."""
    if not request.config.pluginmanager.hasplugin("benchmark"):
        pytest.fail(
            "llama_bench needs pytest-benchmark: pip install pytest-benchmark "
            "(and do not switch it off with -p no:benchmark)",
            pytrace=False,
        )
    from llama_crab.pytest_plugin import LlamaBench

    return LlamaBench(request.getfixturevalue("benchmark"))
