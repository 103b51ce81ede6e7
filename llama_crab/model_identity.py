"""What saved states depend on: the model's file, the context's shape, the adapters, llama.cpp."""

from __future__ import annotations

import os
from collections.abc import Iterable

from . import _core
from .params import LlamaParams

TYPE_CHECKING = False
if TYPE_CHECKING:
    from typing import Any

# Enough for a GGUF's metadata or most of it, and for some weights: two fine-tunes differ there.
_SAMPLE_BYTES = 1 << 20

# Fields whose change makes the same tokens give another state, or another layout of it.
_STATE_FIELDS = (
    *("rope_scaling_type", "rope_freq_base", "rope_freq_scale", "yarn_ext_factor"),
    *("yarn_attn_factor", "yarn_beta_fast", "yarn_beta_slow", "yarn_orig_ctx"),
    *("type_k", "type_v", "flash_attn_type", "swa_full", "attention_type", "kv_overrides"),
)


def file_identity(paths: Iterable[str | os.PathLike[str]]) -> str:
    """Return a hash of the files' sizes, beginnings and ends: equal for copies of a file."""
    import hashlib  # not at import time: it costs as much as all of our own modules

    digest = hashlib.blake2b(digest_size=16)
    for path in paths:
        with open(path, "rb") as file:
            size = file.seek(0, os.SEEK_END)
            for at in (0, size // 2, max(0, size - _SAMPLE_BYTES)):
                file.seek(at)
                digest.update(file.read(_SAMPLE_BYTES))
            digest.update(str(size).encode())
    return digest.hexdigest()


def state_key(model: _core.Model, params: LlamaParams) -> dict[str, Any]:
    """Return what a saved state must agree with to be used again, as JSON values."""
    paths = (model.path,) if isinstance(model.path, str) else model.path
    # Drafts change no state, and a drafter of the user's own could not be written down.
    fields = params.replace(speculative=None).to_dict()
    n_streams = 1 if params.kv_unified else params.n_seq_max or 1
    return {
        "model": file_identity(paths),
        "context": {name: fields[name] for name in _STATE_FIELDS if name in fields},
        "n_streams": n_streams,
        "llama_cpp": _core.build_commit(),
    }
