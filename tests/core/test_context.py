"""Context: every parameter, decoding against independent arithmetic, checks before asserts."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import gguf
import numpy as np
import pytest

from llama_crab import _core, errors

# Tiny graphs: more threads would wait for each other most of the time.
ONE: Any = {"n_threads": 1, "n_threads_batch": 1}

PARAMETERS: dict[str, list[Any]] = {
    "n_ctx": [0, 32, 4096],
    "n_batch": [1, 64],
    "n_ubatch": [1, 64],
    "n_seq_max": [1, 4],
    "n_rs_seq": [0, 1],
    "n_outputs_max": [0, 8],
    "n_outputs_max_per_seq": [0, 1],
    "n_threads": [1, 2],
    "n_threads_batch": [1, 3],
    "ctx_type": ["default"],
    "rope_scaling_type": ["unspecified", "none", "linear", "yarn", "longrope"],
    "pooling_type": ["unspecified", "none", "mean", "cls", "last"],
    "attention_type": ["unspecified", "causal", "non_causal"],
    "flash_attn_type": ["auto", "disabled", "enabled", True, False],
    "type_k": ["f32", "f16", "bf16"],
    "type_v": ["f32", "f16", "bf16"],
    "rope_freq_base": [0.0, 5000.0],
    "rope_freq_scale": [0.0, 0.5],
    "yarn_ext_factor": [-1.0, 0.5],
    "yarn_attn_factor": [1.0, 0.5],
    "yarn_beta_fast": [32.0, 16.0],
    "yarn_beta_slow": [1.0, 2.0],
    "yarn_orig_ctx": [0, 128],
    "embeddings": [False, True],
    "offload_kqv": [False, True],
    "no_perf": [False, True],
    "op_offload": [False, True],
    "swa_full": [False, True],
    "kv_unified": [False, True],
}
CALLBACKS = {
    "cb_eval",
    "cb_eval_user_data",
    "abort_callback",
    "abort_callback_data",
}
# Samplers inside the graph, a sibling context, and a field that llama.cpp no longer reads.
HIDDEN = {"samplers", "n_samplers", "ctx_other", "defrag_thold"}


def test_every_field_of_the_c_struct_is_covered(llama_cpp_tree: Path) -> None:
    header = (llama_cpp_tree / "include" / "llama.h").read_text(encoding="utf-8")
    body = header.split("struct llama_context_params {")[1].split("};")[0]
    names = {
        line.split(";")[0].split()[-1].lstrip("*")
        for line in body.splitlines()
        if ";" in line and not line.strip().startswith("//")
    }
    assert names - CALLBACKS - HIDDEN == set(PARAMETERS)


@pytest.mark.parametrize("name", PARAMETERS)
def test_each_parameter_is_accepted_and_the_context_decodes(tiny: _core.Model, name: str) -> None:
    for value in PARAMETERS[name]:
        fields: Any = {"n_ctx": 64, "n_threads": 1, "n_threads_batch": 1, name: value}
        with _core.Context(tiny, **fields) as context, _core.Batch(4) as batch:
            batch.extend([1, 2, 3][: context.n_batch], 0, 0, "last")
            context.decode(batch)
            if context.pooling_type in ("none", "unspecified"):
                assert np.isfinite(np.asarray(context.logits())).all()


def test_unknown_parameters_and_values_are_refused(tiny: _core.Model) -> None:
    for fields, says in (
        ({"n_context": 1}, "n_context"),
        ({"flash_attn_type": "yes"}, "'auto'"),
        ({"type_k": "q2_k"}, "q8_0"),
        ({"n_ctx": -1}, "n_ctx"),
        ({"n_batch": 0}, "n_batch"),
        ({"n_threads": 0}, "n_threads"),
        ({"rope_freq_base": float("inf")}, "finite"),
        ({"n_seq_max": 1 << 20}, "n_seq_max"),
    ):
        anything: Any = fields
        with pytest.raises((TypeError, ValueError), match=says):
            _core.Context(tiny, **anything)


def test_what_llama_cpp_would_assert_is_refused_first(tiny: _core.Model) -> None:
    for fields, says in (
        ({"n_seq_max": 8, "n_batch": 4}, "n_seq_max"),
        ({"n_seq_max": 8, "n_outputs_max": 4}, "n_outputs_max"),
        ({"type_v": "q8_0", "flash_attn_type": "disabled"}, "flash attention"),
    ):
        anything: Any = fields
        with pytest.raises(errors.ContextCreateError, match=says):
            _core.Context(tiny, n_ctx=64, **anything)


def test_quantized_kv_decodes_close_to_f32(smol: _core.Model, n_threads: int) -> None:
    tokens = smol.vocab.tokenize("The capital of France is", True, False)
    rows = {}
    for kind in ("f32", "q8_0", "q4_0"):
        anything: Any = {"type_k": kind, "type_v": kind, "flash_attn_type": "enabled"}
        with (
            _core.Context(
                smol, n_ctx=128, n_threads=n_threads, n_threads_batch=n_threads, **anything
            ) as context,
            _core.Batch(32) as batch,
        ):
            batch.extend(tokens, 0, 0, "last")
            context.decode(batch)
            rows[kind] = np.array(context.logits())
    spread = rows["f32"].std()
    assert 0 < np.abs(rows["q8_0"] - rows["f32"]).max() < 0.5 * spread
    assert np.argmax(rows["q8_0"]) == np.argmax(rows["f32"])
    assert np.abs(rows["q4_0"] - rows["f32"]).mean() > np.abs(rows["q8_0"] - rows["f32"]).mean()


def reference_logits(path: Path, tokens: list[int]) -> np.ndarray:
    """Return the last token's logits of the tiny Llama, computed with numpy in double precision."""
    w = {t.name: np.array(t.data, np.float64) for t in gguf.GGUFReader(path).tensors}
    n_head, n_kv, head = 4, 2, 16
    n = len(tokens)

    def norm(x: np.ndarray, weight: np.ndarray) -> np.ndarray:
        scaled: np.ndarray = x / np.sqrt((x * x).mean(-1, keepdims=True) + 1e-5) * weight
        return scaled

    angle = np.arange(n)[:, None] / 10000.0 ** (np.arange(0, head, 2) / head)
    cos, sin = np.cos(angle)[:, None], np.sin(angle)[:, None]

    def rope(x: np.ndarray) -> np.ndarray:
        even, odd = x[..., 0::2], x[..., 1::2]
        out = np.empty_like(x)
        out[..., 0::2], out[..., 1::2] = even * cos - odd * sin, even * sin + odd * cos
        return out

    x = w["token_embd.weight"][tokens]
    for layer in range(2):
        p = f"blk.{layer}."
        h = norm(x, w[p + "attn_norm.weight"])
        q = rope((h @ w[p + "attn_q.weight"].T).reshape(n, n_head, head))
        k = rope((h @ w[p + "attn_k.weight"].T).reshape(n, n_kv, head))
        v = (h @ w[p + "attn_v.weight"].T).reshape(n, n_kv, head)
        k, v = np.repeat(k, n_head // n_kv, 1), np.repeat(v, n_head // n_kv, 1)
        scores = np.einsum("ihd,jhd->hij", q, k) / np.sqrt(head)
        scores[:, np.triu(np.ones((n, n), bool), 1)] = -np.inf
        scores = np.exp(scores - scores.max(-1, keepdims=True))
        scores /= scores.sum(-1, keepdims=True)
        attended = np.einsum("hij,jhd->ihd", scores, v).reshape(n, -1)
        x = x + attended @ w[p + "attn_output.weight"].T
        h = norm(x, w[p + "ffn_norm.weight"])
        gate, up = h @ w[p + "ffn_gate.weight"].T, h @ w[p + "ffn_up.weight"].T
        x = x + (gate / (1 + np.exp(-gate)) * up) @ w[p + "ffn_down.weight"].T
    logits: np.ndarray = norm(x, w["output_norm.weight"])[-1] @ w["output.weight"].T
    return logits


def test_logits_equal_a_transformer_written_in_numpy(tiny: _core.Model, tiny_path: Path) -> None:
    tokens = tiny.vocab.tokenize("the quick brown fox jumps", True, False)
    with (
        _core.Context(
            tiny, n_ctx=64, type_k="f32", type_v="f32", flash_attn_type="disabled", **ONE
        ) as context,
        _core.Batch(64) as batch,
    ):
        batch.extend(tokens, 0, 0, "last")
        context.decode(batch)
        found = np.array(context.logits())
    np.testing.assert_allclose(found, reference_logits(tiny_path, tokens), atol=1e-3)


def test_chunks_of_a_prompt_give_the_logits_of_the_whole(tiny: _core.Model) -> None:
    tokens = list(range(3, 43))
    rows = []
    for chunk in (40, 7, 1):
        with _core.Context(tiny, n_ctx=64, n_batch=40, **ONE) as context, _core.Batch(40) as batch:
            for start in range(0, 40, chunk):
                batch.clear()
                batch.extend(tokens[start : start + chunk], start, 0, "last")
                context.decode(batch)
            rows.append(np.array(context.logits()))
    np.testing.assert_allclose(rows[1], rows[0], atol=5e-3)
    np.testing.assert_allclose(rows[2], rows[0], atol=5e-3)


def test_sizes_are_those_asked_for(tiny: _core.Model) -> None:
    with _core.Context(
        tiny, n_ctx=256, n_batch=64, n_ubatch=32, n_seq_max=2, n_outputs_max=5, n_threads=1
    ) as context:
        assert (context.n_ctx, context.n_ctx_seq) == (512, 256)
        assert (context.n_batch, context.n_ubatch, context.n_seq_max) == (64, 32, 2)
        assert context.n_outputs_max == 5
        assert not context.kv_unified
        assert "n_seq_max=2" in repr(context)
        assert context.model is tiny


def test_batches_that_do_not_fit_are_refused_and_change_nothing(tiny: _core.Model) -> None:
    with (
        _core.Context(tiny, n_ctx=64, n_batch=8, n_outputs_max=2, n_seq_max=2, **ONE) as context,
        _core.Batch(64, 2) as batch,
    ):

        def refused(kind: type[Exception], says: str) -> None:
            with pytest.raises(kind, match=says):
                context.decode(batch)
            assert context.memory.seq_pos_max(0) == -1
            batch.clear()

        refused(errors.InvalidBatchError, "empty")
        batch.extend(range(9), 0, 0, "last")
        refused(errors.InvalidBatchError, "n_batch=8")
        batch.extend(range(3), 0, 0, "all")
        refused(errors.InvalidBatchError, "n_outputs_max=2")
        batch.extend([1], 0, 2, "last")
        refused(errors.InvalidBatchError, "seq_id 2")
        batch.extend([1, tiny.vocab.n_tokens], 0, 0, "last")
        refused(errors.InvalidTokenError, "759")
        batch.extend([1], 5, 0, "last")
        batch.extend([1], 0, 0, "last")
        refused(errors.InvalidBatchError, "refused")
        batch.extend([1], 0, 0, "last")
        context.decode(batch)
        assert context.memory.seq_pos_max(0) == 0


def test_a_full_memory_is_its_own_error_and_removing_helps(tiny: _core.Model) -> None:
    with _core.Context(tiny, n_ctx=256, n_batch=256, **ONE) as context, _core.Batch(256) as batch:
        batch.extend([5] * 256, 0, 0, "last")
        context.decode(batch)
        batch.clear()
        batch.extend([6], 256, 0, "last")
        with pytest.raises(errors.KVCacheFullError) as caught:
            context.decode(batch)
        assert caught.value.code == 1
        context.memory.seq_rm(0, 100, -1)
        batch.clear()
        batch.extend([6], 100, 0, "last")
        context.decode(batch)


def test_perf_counts_tokens_when_asked(tiny: _core.Model) -> None:
    with _core.Context(tiny, n_ctx=64, no_perf=False, **ONE) as context, _core.Batch(8) as batch:
        batch.extend([1, 2, 3], 0, 0, "last")
        context.decode(batch)
        context.synchronize()
        batch.clear()
        batch.extend([4], 3, 0, "last")
        context.decode(batch)
        context.synchronize()
        perf = context.perf()
        assert (perf["n_p_eval"], perf["n_eval"]) == (3, 1)
        assert perf["t_p_eval_ms"] > 0
        context.perf_reset()
        assert context.perf()["t_p_eval_ms"] == 0


def test_non_causal_attention_sees_later_tokens(tiny: _core.Model) -> None:
    rows = {}
    for causal in (True, False):
        with _core.Context(tiny, n_ctx=64, **ONE) as context, _core.Batch(8) as batch:
            context.causal_attn = causal
            assert context.causal_attn is causal
            for last in (10, 20):
                context.memory.clear()
                batch.clear()
                batch.extend([1, 2, last], 0, 0, "all")
                context.decode(batch)
                rows[causal, last] = np.array(context.logits(0))
    assert np.array_equal(rows[True, 10], rows[True, 20])
    assert not np.allclose(rows[False, 10], rows[False, 20], atol=1e-3)


def test_non_causal_batches_are_limited_to_n_ubatch(tiny: _core.Model) -> None:
    with (
        _core.Context(tiny, n_ctx=64, n_batch=32, n_ubatch=8, **ONE) as context,
        _core.Batch(32) as batch,
    ):
        context.causal_attn = False
        batch.extend(range(9), 0, 0, "last")
        with pytest.raises(errors.InvalidBatchError, match="n_ubatch=8"):
            context.decode(batch)


def test_encode_is_refused_by_a_model_without_encoder(tiny: _core.Model) -> None:
    with _core.Context(tiny, n_ctx=64, **ONE) as context, _core.Batch(8) as batch:
        batch.extend([1, 2, 3], 0, 0, "all")
        with pytest.raises(errors.InvalidBatchError, match="no encoder"):
            context.encode(batch)
        context.decode(batch)
