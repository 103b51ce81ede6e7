"""LoraAdapter and control vectors: their effect equals changed weights; ownership; refusals."""

from __future__ import annotations

import pickle
from pathlib import Path
from typing import Any

import gguf
import numpy as np
import pytest

from llama_crab import _core, errors

ONE: Any = {"n_ctx": 64, "n_batch": 16, "n_threads": 1, "n_threads_batch": 1}
TOKENS = [1, 300, 301, 302]


def logits(context: _core.Context) -> np.ndarray:
    context.memory.clear()
    with _core.Batch(16) as batch:
        batch.extend(TOKENS, 0, 0, "last")
        context.decode(batch)
    return np.array(context.logits())


def merged(model: Path, lora: Path, scale: float, out: Path) -> Path:
    """Write the model with scale * B A added to each weight: what the adapter should compute."""
    deltas = {tensor.name: np.array(tensor.data) for tensor in gguf.GGUFReader(lora).tensors}
    data = bytearray(model.read_bytes())
    for tensor in gguf.GGUFReader(model).tensors:
        if f"{tensor.name}.lora_a" in deltas:
            a, b = deltas[f"{tensor.name}.lora_a"], deltas[f"{tensor.name}.lora_b"]
            weight = np.array(tensor.data) + np.float32(scale) * (b @ a)
            start = int(tensor.data_offset)
            data[start : start + weight.nbytes] = weight.astype(np.float32).tobytes()
    out.write_bytes(data)
    return out


@pytest.mark.parametrize("scale", [1.0, -0.5])
def test_an_adapter_equals_the_merged_weights(
    tiny: _core.Model, tiny_path: Path, tiny_lora_path: Path, tmp_path: Path, scale: float
) -> None:
    path = merged(tiny_path, tiny_lora_path, scale, tmp_path / "merged.gguf")
    adapter = _core.LoraAdapter(tiny, tiny_lora_path)
    with (
        _core.Context(tiny, **ONE) as context,
        _core.Model(path) as changed,
        _core.Context(changed, **ONE) as reference,
    ):
        plain = logits(context)
        context.set_adapters({adapter: scale})
        found = logits(context)
        np.testing.assert_allclose(found, logits(reference), atol=2e-2)
        assert np.abs(found - plain).max() > 0.1
        context.set_adapters({})
        np.testing.assert_array_equal(logits(context), plain)


def test_two_adapters_add_up(tiny: _core.Model, tiny_lora_path: Path) -> None:
    one, two = (_core.LoraAdapter(tiny, tiny_lora_path) for _ in range(2))
    with _core.Context(tiny, **ONE) as context:
        context.set_adapters({one: 0.75, two: 0.25})
        both = logits(context)
        context.set_adapters({one: 1.0})
        np.testing.assert_allclose(both, logits(context), atol=2e-2)


def test_a_closed_adapter_stays_where_it_is_applied(
    tiny: _core.Model, tiny_lora_path: Path
) -> None:
    adapter = _core.LoraAdapter(tiny, tiny_lora_path)
    with _core.Context(tiny, **ONE) as context:
        context.set_adapters({adapter: 1.0})
        expected = logits(context)
        adapter.close()
        adapter.close()
        assert adapter.closed
        np.testing.assert_array_equal(logits(context), expected)
        with pytest.raises(errors.ClosedError):
            context.set_adapters({adapter: 1.0})


def test_metadata_and_identity(tiny: _core.Model, tiny_lora_path: Path) -> None:
    adapter = _core.LoraAdapter(tiny, tiny_lora_path)
    assert adapter.metadata["general.name"] == "tiny adapter"
    assert float(adapter.metadata["adapter.lora.alpha"]) == 4.0
    assert adapter.invocation_tokens == ()
    assert adapter.model is tiny
    assert adapter.path == str(tiny_lora_path)
    with pytest.raises(TypeError, match="path"):
        pickle.dumps(adapter)


def test_wrong_files_models_and_scales(
    tiny: _core.Model,
    tiny_path: Path,
    tiny_lora_path: Path,
    tiny_swa_path: Path,
    tmp_path: Path,
) -> None:
    with pytest.raises(errors.ModelNotFoundError):
        _core.LoraAdapter(tiny, tmp_path / "absent.gguf")
    with pytest.raises(errors.AdapterError):
        _core.LoraAdapter(tiny, tiny_path)
    (tmp_path / "bad.gguf").write_bytes(tiny_lora_path.read_bytes()[:3000])
    with pytest.raises(errors.AdapterError):
        _core.LoraAdapter(tiny, tmp_path / "bad.gguf")
    with pytest.raises(errors.AdapterError):
        _core.LoraAdapter(tiny, tmp_path)
    adapter = _core.LoraAdapter(tiny, tiny_lora_path)
    with _core.Model(tiny_swa_path) as other:
        with pytest.raises(errors.AdapterError):
            _core.LoraAdapter(other, tiny_lora_path)
        with (
            _core.Context(other, **ONE) as context,
            pytest.raises(errors.AdapterError, match="another Model"),
        ):
            context.set_adapters({adapter: 1.0})
    with _core.Context(tiny, **ONE) as context:
        with pytest.raises(ValueError, match="finite"):
            context.set_adapters({adapter: float("nan")})
        with pytest.raises(TypeError):
            context.set_adapters({"adapter": 1.0})  # type: ignore[dict-item]
    assert _core.live_handles()["adapters"] >= 1


def test_a_control_vector_acts_and_goes(tiny: _core.Model) -> None:
    """The tiny model has 2 layers: the vector has one row, for layer 1."""
    rng = np.random.default_rng(0)
    vector = rng.standard_normal(64).astype(np.float32)
    with _core.Context(tiny, **ONE) as context:
        plain = logits(context)
        context.set_control_vector(vector)
        once = logits(context)
        assert np.abs(once - plain).max() > 0.1
        context.set_control_vector(np.zeros(64, np.float32))
        np.testing.assert_allclose(logits(context), plain, atol=1e-5)
        context.set_control_vector(vector)
        np.testing.assert_array_equal(logits(context), once)
        context.set_control_vector(None)
        np.testing.assert_array_equal(logits(context), plain)


def test_control_vectors_of_wrong_shape_or_layers(tiny: _core.Model) -> None:
    with _core.Context(tiny, **ONE) as context:
        for bad in (np.zeros(63, np.float32), np.zeros(64, np.float64), np.zeros(64, np.int32)):
            with pytest.raises(errors.AdapterError, match="float32 rows of 64"):
                context.set_control_vector(bad)
        for layers in ((0, 1), (1, 2), (2, 1)):
            with pytest.raises(errors.AdapterError, match=r"outside 1\.\.1"):
                context.set_control_vector(np.zeros(64, np.float32), *layers)
        logits(context)
