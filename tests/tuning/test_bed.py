"""Raw decodes do what they claim: which tokens, behind which, in which batches."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from llama_crab import LlamaParams, ParameterError, _core
from llama_crab.errors import (
    ClosedError,
    ContextCreateError,
    ContextLengthError,
    ModelNotFoundError,
    OutOfMemoryError,
)
from llama_crab.param_rules import CHOICES
from llama_crab.tuning import bed as bed_module
from llama_crab.tuning.bed import Bed, kv_bytes
from llama_crab.tuning.workloads import Generate, Parallel, Prefill, PrefillGenerate

Batches = list[list[tuple[int, int]]]


@pytest.fixture(scope="module")
def bed(tiny_path: Path) -> Iterator[Bed]:
    params = LlamaParams(tiny_path, n_ctx=1024, n_seq_max=4, n_batch=64, n_ubatch=32, n_threads=1)
    with Bed(params) as bed:
        yield bed


@pytest.fixture
def decodes(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """Return the number of tokens of each decode that follows."""
    sizes: list[int] = []

    class Recorded:
        """A context that notes what it decodes; the core's class has no writable attributes."""

        def __init__(self, context: _core.Context) -> None:
            self._context = context

        def decode(self, batch: _core.Batch) -> None:
            sizes.append(len(batch))
            self._context.decode(batch)

        def __getattr__(self, name: str) -> Any:
            return getattr(self._context, name)

    open_context = Bed._open_context
    monkeypatch.setattr(Bed, "_open_context", lambda self: Recorded(open_context(self)))
    return sizes


def lengths(bed: Bed, n_seq: int = 4) -> list[int]:
    return [bed.context.memory.seq_pos_max(i) + 1 for i in range(n_seq)]


def test_a_prefill_is_full_batches(bed: Bed, decodes: list[int]) -> None:
    assert bed.prefill(150) > 0.0
    assert decodes == [64, 64, 22]
    assert lengths(bed) == [150, 0, 0, 0]


def test_a_generation_is_single_tokens(bed: Bed, decodes: list[int]) -> None:
    assert bed.generate(5) > 0.0
    assert decodes == [1] * 5
    assert lengths(bed) == [5, 0, 0, 0]


def test_both_in_one(bed: Bed, decodes: list[int]) -> None:
    bed.prefill_generate(70, 3)
    assert decodes == [64, 6, 1, 1, 1]
    assert lengths(bed) == [73, 0, 0, 0]


def test_parallel_steps_hold_a_token_of_each(bed: Bed, decodes: list[int]) -> None:
    bed.parallel(3, 4, depth=10)
    assert decodes == [10, 10, 10, 3, 3, 3, 3]
    assert lengths(bed) == [14, 14, 14, 0]


def test_the_depth_is_computed_once(bed: Bed, decodes: list[int]) -> None:
    bed.generate(2, depth=100)
    bed.generate(2, depth=100)
    bed.prefill(5, depth=100)
    assert decodes == [64, 36, 1, 1, 1, 1, 5]
    assert lengths(bed) == [105, 0, 0, 0]
    bed.generate(2, depth=20)
    assert lengths(bed) == [22, 0, 0, 0]


@pytest.mark.parametrize("fixture", ["tiny_swa_path", "tiny_recurrent_path", "tiny_hybrid_path"])
def test_memories_that_cannot_be_cut_are_put_back(
    fixture: str, request: pytest.FixtureRequest, decodes: list[int]
) -> None:
    path = request.getfixturevalue(fixture)
    params = LlamaParams(path, n_ctx=512, n_threads=1, n_ubatch=32, swa_full=False)
    with Bed(params) as bed:
        for _ in range(3):
            bed.generate(3, depth=90)
            assert lengths(bed, 1) == [93]
    assert decodes == [90] + [1] * 9


def test_weights_are_shared_where_the_model_fields_agree(tiny_path: Path) -> None:
    with Bed(LlamaParams(tiny_path, n_ctx=256, n_threads=1)) as first:
        live = _core.live_handles()["models"]
        second = Bed(LlamaParams(tiny_path, n_ctx=512, n_threads=1), weights_of=first)
        assert second.model is first.model
        assert _core.live_handles()["models"] == live
        other = Bed(LlamaParams(tiny_path, n_ctx=256, use_extra_bufts=False), weights_of=first)
        assert other.model is not first.model
        assert _core.live_handles()["models"] == live + 1
        other.close()
    assert second.generate(2) > 0.0, "the weights stay while a bed uses them"
    second.close()
    assert _core.live_handles()["models"] == live - 1


def test_the_facade_uses_the_same_weights(tiny_path: Path) -> None:
    with Bed(LlamaParams(tiny_path, n_ctx=256, n_threads=1)) as bed:
        live = _core.live_handles()
        assert bed.llama.create_completion("a", 3, ignore_eos=True).usage.completion_tokens == 3
        assert bed.llama is bed.llama
        now = _core.live_handles()
        assert (now["models"], now["contexts"]) == (live["models"], live["contexts"])
        assert bed.generate(2) > 0.0
        assert _core.live_handles()["contexts"] == live["contexts"]


def test_parameters_are_resolved(bed: Bed) -> None:
    assert bed.params.n_threads_batch == 1
    assert bed.params.n_outputs_max == 4


@pytest.mark.parametrize(
    ("call", "error", "named"),
    [
        (lambda bed: bed.prefill(0), ParameterError, "n_tokens"),
        (lambda bed: bed.generate(1, depth=-1), ParameterError, "depth"),
        (lambda bed: bed.generate("many"), ParameterError, "n_tokens"),
        (lambda bed: bed.parallel(5, 1), ParameterError, "n_seq"),
        (lambda bed: bed.parallel(0, 1), ParameterError, "n_seq"),
        (lambda bed: bed.prefill_generate(1, 0), ParameterError, "n_gen"),
        (lambda bed: bed.prefill(200, depth=100), ContextLengthError, "256"),
    ],
)
def test_wrong_counts_are_refused(
    bed: Bed, call: Callable[[Bed], float], error: type[Exception], named: str
) -> None:
    with pytest.raises(error, match=named):
        call(bed)


def test_a_model_that_cannot_be_measured(
    tmp_path: Path, tiny_path: Path, tiny_embedder_path: Path
) -> None:
    live = _core.live_handles()["models"]
    with pytest.raises(ModelNotFoundError):
        Bed(LlamaParams(tmp_path / "none.gguf"))
    with pytest.raises(ParameterError, match="embeds"):
        Bed(LlamaParams(tiny_embedder_path))
    with pytest.raises(ParameterError, match="embeds"):
        Bed(Prefill(8).fit(LlamaParams(tiny_embedder_path)))
    with pytest.raises(ContextCreateError):
        Bed(LlamaParams(tiny_path, n_ctx=2_000_000_000))
    assert _core.live_handles()["models"] == live


def test_a_cache_beyond_the_free_memory_is_refused(
    tiny_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(bed_module, "available_memory", lambda: 1 << 20)
    with pytest.raises(OutOfMemoryError, match="n_ctx=65536"):
        Bed(LlamaParams(tiny_path, n_ctx=65536))


def test_the_size_of_a_cache_is_known(smol: _core.Model) -> None:
    """SmolLM2: 30 layers, 3 heads of 64 for K and V."""
    f16 = LlamaParams(n_ctx=1024)
    assert kv_bytes(smol, f16) == 1024 * 30 * 3 * 64 * 2 * 2
    assert (
        kv_bytes(smol, f16.replace(type_k="q8_0", type_v="q8_0")) == kv_bytes(smol, f16) * 8.5 / 16
    )


@pytest.mark.parametrize("kind", [*CHOICES["type_k"]])
def test_the_size_of_a_cache_is_what_llama_cpp_would_allocate(
    smol: _core.Model, smol_path: Path, kind: str
) -> None:
    params = LlamaParams(n_ctx=1024, type_k=kind, type_v=kind)
    rows = _core.measure_memory(smol_path, {}, params.context_params())["rows"]
    assert kv_bytes(smol, params) == sum(row["context"] for row in rows)


def test_latent_attention_keeps_no_values() -> None:
    """The shape of DeepSeek-V2-Lite; llama.cpp allocates no V where `key_length_mla` is given."""
    lengths = {"key_length": 576, "value_length": 512, "key_length_mla": 192}
    metadata = {f"deepseek2.attention.{name}": str(n) for name, n in lengths.items()}
    shape = {"n_embd": 2048, "n_head": 16, "n_head_kv": 1, "n_layer": 27, "n_swa": 0}
    kinds = {"is_recurrent": False, "is_hybrid": False}
    metadata["general.architecture"] = "deepseek2"
    model: Any = SimpleNamespace(metadata=metadata, **shape, **kinds)
    assert kv_bytes(model, LlamaParams(n_ctx=1024)) == 1024 * 27 * 576 * 2


def test_a_closed_bed_says_so(tiny_path: Path) -> None:
    bed = Bed(LlamaParams(tiny_path, n_ctx=256))
    bed.close()
    bed.close()
    with pytest.raises(ClosedError):
        bed.generate(1)
    assert "closed" in repr(bed)


@pytest.mark.parametrize(
    ("workload", "name", "n_tokens", "n_decoded"),
    [
        (Prefill(70), "pp70", 70, [64, 6]),
        (Prefill(5, 7), "pp5 @ d7", 5, [7, 5]),
        (Generate(3), "tg3", 3, [1, 1, 1]),
        (Generate(2, 65), "tg2 @ d65", 2, [64, 1, 1, 1]),
        (PrefillGenerate(4, 2), "pp4+tg2", 6, [4, 1, 1]),
        (Parallel(3, 2), "tg2 x 3", 6, [3, 3]),
        (Parallel(2, 1, 5), "tg1 x 2 @ d5", 2, [5, 5, 2]),
    ],
)
def test_workloads_fit_their_context_and_run(
    tiny_path: Path,
    decodes: list[int],
    workload: Any,
    name: str,
    n_tokens: int,
    n_decoded: list[int],
) -> None:
    assert (workload.name, workload.n_tokens, workload.unit) == (name, n_tokens, "tok/s")
    params = workload.fit(LlamaParams(tiny_path, n_batch=64, n_ubatch=64, n_threads=1))
    with Bed(params) as bed:
        assert workload.run(bed) > 0.0
    assert decodes == n_decoded


def test_fitting_keeps_what_is_larger(tiny_path: Path) -> None:
    params = LlamaParams(tiny_path, n_ctx=5000, n_seq_max=8, n_outputs_max=8)
    assert Prefill(100).fit(params) == params
    assert Prefill(1000).fit(params).n_ctx == 8000
    grown = Parallel(16, 10, 90).fit(params)
    assert (grown.n_seq_max, grown.n_outputs_max, grown.n_ctx) == (16, 16, 5000)
    assert Parallel(16, 10, 990).fit(params).n_ctx == 16000


@pytest.mark.parametrize(
    "wrong", [lambda: Prefill(0), lambda: Generate(1, -1), lambda: Parallel(257, 1)]
)
def test_workloads_refuse_counts(wrong: Callable[[], object]) -> None:
    with pytest.raises(ParameterError):
        wrong()
