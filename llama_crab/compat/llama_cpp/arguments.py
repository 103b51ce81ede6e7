"""From llama-cpp-python's constructor arguments to `LlamaParams`."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from ... import _core
from ...params import LlamaParams, ParameterError
from ...speculative import MAX_DRAFT, MAX_NGRAM, PromptLookupDecoding
from .constants import LLAMA_DEFAULT_SEED, NAMES
from .llama_speculative import LlamaPromptLookupDecoding
from .notices import refuse, warn_once

# Values that ask for what happens anyway, so that nobody needs to hear of them.
_NEUTRAL: dict[str, tuple[Any, ...]] = {
    "logits_all": (False, None),
    "numa": (False, 0, None),
    "lora_base": (None,),
    "n_parts": (-1, None),
    "f16_kv": (True, None),
    "low_vram": (False, None),
    "mul_mat_q": (True, None),
    "n_gqa": (None,),
    "rms_norm_eps": (None,),
    "device": (None,),
}
_REASONS = {
    "logits_all": "not needed: log-probabilities are always there, and take no room when unused",
    "numa": "not set up here; start the program under numactl",
    "lora_base": "llama.cpp has no use for it any more",
    "n_parts": "llama.cpp has no use for it any more",
    "f16_kv": "not used; choose the cache's types with type_k and type_v",
    "low_vram": "llama.cpp has no use for it any more; see offload_kqv",
    "mul_mat_q": "llama.cpp has no use for it any more",
    "n_gqa": "read from the model file",
    "rms_norm_eps": "read from the model file; see kv_overrides",
    "device": "not used; see main_gpu and split_mode",
}
REMOVED = ("n_parts", "f16_kv", "low_vram", "mul_mat_q", "n_gqa", "rms_norm_eps", "device")
"""Arguments of older versions, which later ones and what is built on them still pass."""

# llama-cpp-python's defaults, which stand for llama.cpp's own or the model's.
_UNSET: dict[str, Any] = {
    "main_gpu": 0,
    "rope_freq_base": 0.0,
    "rope_freq_scale": 0.0,
    "yarn_ext_factor": -1.0,
    "yarn_attn_factor": 1.0,
    "yarn_beta_fast": 32.0,
    "yarn_beta_slow": 1.0,
    "yarn_orig_ctx": 0,
    "offload_kqv": True,
    "no_perf": False,
}
_SAME_NAME = (
    *_UNSET,
    *("kv_overrides", "op_offload", "swa_full", "n_threads", "n_threads_batch", "tensor_split"),
)
_MOST_EMBEDDED = 64


def warn_unused(given: Mapping[str, Any]) -> None:
    """Warn once for each argument in `given` that has no effect. Thread-safety: any thread."""
    for name, reason in _REASONS.items():
        if name in given and not any(given[name] is value for value in _NEUTRAL[name]):
            warn_once(name, reason)


def load_params(given: Mapping[str, Any], more: Mapping[str, Any] | None) -> LlamaParams:
    """Return the parameters that `given`, all of the constructor's arguments, ask for.

    `more` are fields of `LlamaParams`, which win. Raises `ParameterError` and `NotSupportedError`,
    which name the argument.
    """
    warn_unused(given)
    if given["tokenizer"] is not None:
        refuse("tokenizer", "the model file's own is used; convert the model with the other one")
    fields: dict[str, Any] = {
        "model": given["model_path"],
        "verbose": bool(given["verbose"]),
        "split_mode": _named("split_mode", given["split_mode"]),
        "load_mode": _load_mode(given["use_mmap"], given["use_mlock"]),
        "n_gpu_layers": _gpu_layers(given["n_gpu_layers"]),
        "rope_scaling_type": _named("rope_scaling_type", given["rope_scaling_type"]),
        "pooling_type": _named("pooling_type", given["pooling_type"]),
        "attention_type": _named("attention_type", given["attention_type"]),
        "flash_attn_type": given["flash_attn"],
        "type_k": _named("type_k", given["type_k"], "cache_type"),
        "type_v": _named("type_v", given["type_v"], "cache_type"),
        "speculative": _speculative(given["draft_model"]),
    }
    for name in _SAME_NAME:
        if given[name] != _UNSET.get(name):
            fields[name] = given[name]
    fields |= _sizes(given["n_ctx"], given["n_batch"], given["n_ubatch"])
    if given["embedding"]:
        n_batch = fields["n_batch"]
        fields["embeddings"] = True
        # llama.cpp asserts that the sequences divide the micro-batch; and it pools what it finds
        # in one, so that a text must fit.
        fields["n_ubatch"] = n_batch
        fields["n_seq_max"] = max(n for n in range(1, _MOST_EMBEDDED + 1) if n_batch % n == 0)
    return LlamaParams.from_dict({**fields, **(more or {})})


def random_seed(seed: int | None) -> int | None:
    """Return a seed as llama.cpp's 32 bits, None where it means a random one."""
    if seed is None or seed in (-1, LLAMA_DEFAULT_SEED):
        return None
    if isinstance(seed, bool) or not isinstance(seed, int):
        raise ParameterError(f"seed: expected an integer, not {seed!r}")
    return seed & 0xFFFFFFFF


def _sizes(n_ctx: int, n_batch: int, n_ubatch: int) -> dict[str, int]:
    most = min(n_ctx, n_batch) if n_ctx else n_batch
    return {"n_ctx": n_ctx, "n_batch": most, "n_ubatch": min(most, n_ubatch)}


def _named(name: str, value: Any, kind: str = "") -> Any:
    """Return our name of one of llama-cpp-python's numbers; names pass."""
    names = NAMES[kind or name]
    if value is None or value == -1:
        return None
    if isinstance(value, str):
        return value
    if isinstance(value, bool) or value not in names:
        listed = ", ".join(f"{number} ({text})" for number, text in names.items())
        raise ParameterError(f"{name}: {value!r} is not one of {listed}")
    return names[value]


def _speculative(draft_model: Any) -> Any:
    """Return what drafts come from: our own lookup, or the caller's model in our form."""
    if draft_model is None:
        return None
    if type(draft_model) is LlamaPromptLookupDecoding:
        return PromptLookupDecoding(
            max(1, min(draft_model.max_ngram_size, MAX_NGRAM)),
            max(1, min(draft_model.num_pred_tokens, MAX_DRAFT)),
        )
    if not callable(draft_model):
        raise ParameterError(f"draft_model: {draft_model!r} cannot be called")
    return lambda tokens, n_max: draft_model(tokens)[:n_max]


def _load_mode(use_mmap: bool, use_mlock: bool) -> str | None:
    if use_mmap and not use_mlock:
        return None
    if use_mlock:
        return "mmap_mlock" if use_mmap else "mlock"
    return "none"


def _gpu_layers(n_gpu_layers: int | None) -> int | None:
    if n_gpu_layers and not _core.supports_gpu_offload():
        # llama-cpp-python runs on the CPU then, and programs count on it.
        warn_once("n_gpu_layers", "no GPU backend with a device is compiled in; the CPU computes")
        return 0
    return n_gpu_layers
