"""What the fields of `LlamaParams` may hold: choices, ranges, and the check of each kind.

The checks take a field's name, its value and a detail of the rule; they return the value in its
normal form or raise ParameterError.
"""

from __future__ import annotations

import difflib
import math
import operator
from collections.abc import Iterable, Mapping

from .errors import LlamaCrabError

# Not imported from typing: that module alone costs a tenth of the package's import budget.
TYPE_CHECKING = False
if TYPE_CHECKING:
    from typing import Any

INT32_MAX = 2**31 - 1
_FLOAT32_MAX = 3.4028234e38
MAX_SEQUENCES = 256
# Beyond it ggml's thread pool has no affinity slots; creating threads without end aborts.
MAX_THREADS = 512
RANDOM_SEED = 0xFFFFFFFF

# The types llama.cpp's own tools offer; the other ggml types crash or abort as a cache.
_CACHE_TYPES = ("f32", "f16", "bf16", "q8_0", "q5_1", "q5_0", "q4_1", "q4_0", "iq4_nl")
FLOAT_CACHE_TYPES = ("f32", "f16", "bf16")
_ROPE_SCALING_TYPES = ("none", "linear", "yarn", "longrope")
CHOICES: dict[str, tuple[str, ...]] = {
    "split_mode": ("none", "layer", "row", "tensor"),
    "load_mode": ("auto", "none", "mmap", "mlock", "mmap_mlock", "direct_io"),
    "lazy_mode": ("off", "auto", "on"),
    "rope_scaling_type": ("unspecified", *_ROPE_SCALING_TYPES),
    "pooling_type": ("unspecified", "none", "mean", "cls", "last", "rank"),
    "attention_type": ("unspecified", "causal", "non_causal"),
    "flash_attn_type": ("auto", "disabled", "enabled"),
    "type_k": _CACHE_TYPES,
    "type_v": _CACHE_TYPES,
}

INT_RANGES: dict[str, tuple[int, int]] = {
    "main_gpu": (-1, INT32_MAX),
    "n_ctx": (0, INT32_MAX),
    "n_batch": (1, INT32_MAX),
    "n_ubatch": (1, INT32_MAX),
    "n_seq_max": (1, MAX_SEQUENCES),
    "n_rs_seq": (0, 1024),
    "n_outputs_max": (0, INT32_MAX),
    "n_outputs_max_per_seq": (0, INT32_MAX),
    "n_threads": (1, MAX_THREADS),
    "n_threads_batch": (1, MAX_THREADS),
    "yarn_orig_ctx": (0, INT32_MAX),
    "seed": (0, RANDOM_SEED - 1),
    "cache_ram_mib": (0, INT32_MAX),
    "cache_disk_mib": (0, INT32_MAX),
    "fit_margin_mib": (0, INT32_MAX),
}
FLOAT_MINIMA: dict[str, float] = {
    "rope_freq_base": 0.0,
    "rope_freq_scale": 0.0,
    "yarn_ext_factor": -math.inf,
    "yarn_attn_factor": -math.inf,
    "yarn_beta_fast": -math.inf,
    "yarn_beta_slow": -math.inf,
    "max_itl_ms": 0.001,
}
BOOLS = (
    *("check_tensors", "use_extra_bufts", "no_host", "load_mtp"),
    *("embeddings", "offload_kqv", "no_perf", "op_offload", "swa_full", "kv_unified"),
)
# llama_model_kv_override holds keys and string values in char[128].
_OVERRIDE_BYTES = 127


class ParameterError(LlamaCrabError, ValueError):
    """A parameter has a value that llama.cpp cannot use; the message names the field."""


def suggest(given: str, allowed: Iterable[str]) -> str:
    """Return a hint at the allowed name that is most like the `given` one, or nothing."""
    close = difflib.get_close_matches(given, list(allowed), n=1)
    return f"; did you mean {close[0]!r}?" if close else ""


def choice(name: str, value: Any, choices: tuple[str, ...]) -> str:
    """Return the name of a choice in its normal form."""
    if name == "flash_attn_type" and isinstance(value, bool):
        return "enabled" if value else "disabled"
    text = (
        value.strip().lower().replace("-", "_").replace("+", "_") if isinstance(value, str) else ""
    )
    if text not in choices:
        hint = suggest(text, choices)
        raise ParameterError(f"{name}: {value!r} is not one of {', '.join(choices)}{hint}")
    return text


def require_integer(name: str, value: Any, bounds: tuple[int, int]) -> int:
    """Return `value` as an int within `bounds`, both included; else raise ParameterError."""
    low, high = bounds
    try:
        number = operator.index(value)
    except TypeError:
        number = None
    if number is None or isinstance(value, bool):
        raise ParameterError(f"{name}: expected an integer, not {value!r}")
    if name == "seed" and number == RANDOM_SEED:
        raise ParameterError("seed: 0xFFFFFFFF means 'random' to llama.cpp; leave the seed unset")
    if number < low:
        raise ParameterError(f"{name}: {number} is less than {low}")
    if number > high:
        raise ParameterError(f"{name}: {number} is more than {high}")
    return number


def gpu_layers(name: str, value: Any, _: None) -> int | None:
    """Return a number of layers, or None for "auto"."""
    if isinstance(value, str):
        if value.strip().lower() == "auto":
            return None
        raise ParameterError(f'{name}: expected a number of layers or "auto", not {value!r}')
    return require_integer(name, value, (-(2**31), INT32_MAX))


def real(name: str, value: Any, minimum: float) -> float:
    """Return `value` as a finite float of at least `minimum`."""
    try:
        number = float(value)
    except (TypeError, ValueError, OverflowError):
        number = math.nan
    if isinstance(value, (bool, str)) or not math.isfinite(number):
        raise ParameterError(f"{name}: expected a finite number, not {value!r}")
    if number < minimum:
        raise ParameterError(f"{name}: {number} is less than {minimum:g}")
    return number


def boolean(name: str, value: Any, _: None) -> bool:
    """Return `value`, which must be True or False."""
    if not isinstance(value, bool):
        raise ParameterError(f"{name}: expected True or False, not {value!r}")
    return value


def devices(name: str, value: Any, _: None) -> tuple[str, ...]:
    """Return device names as a tuple; one may be given alone."""
    several = isinstance(value, Iterable) and not isinstance(value, (str, bytes))
    names = tuple(value) if several else (value,)
    if not all(isinstance(device, str) and device for device in names):
        raise ParameterError(f"{name}: expected device names, not {value!r}")
    return names


def tensor_split(name: str, value: Any, _: None) -> tuple[float, ...]:
    """Return one proportion per device, not all of them 0."""
    if isinstance(value, (str, bytes)) or not isinstance(value, Iterable):
        raise ParameterError(f"{name}: expected one proportion per device, not {value!r}")
    parts = tuple(real(name, part, 0.0) for part in value)
    if not any(parts):
        raise ParameterError(f"{name}: at least one proportion must be above 0")
    if sum(parts) > _FLOAT32_MAX:
        raise ParameterError(f"{name}: {max(parts):g} is beyond what a 32-bit float adds up")
    return parts


def buffer_overrides(name: str, value: Any, _: None) -> dict[str, str]:
    """Return a copy of a mapping of tensor patterns to device names."""
    if not isinstance(value, Mapping) or not all(
        isinstance(item, str) and item for pair in value.items() for item in pair
    ):
        raise ParameterError(f"{name}: expected tensor patterns with device names, not {value!r}")
    return dict(value)


def overrides(name: str, value: Any, _: None) -> dict[str, int | float | bool | str]:
    """Return a copy of a mapping of metadata keys to values that llama.cpp can hold."""
    if not isinstance(value, Mapping):
        raise ParameterError(f"{name}: expected a mapping of metadata keys, not {value!r}")
    for key, item in value.items():
        if not isinstance(key, str) or not 0 < len(key.encode()) <= _OVERRIDE_BYTES:
            raise ParameterError(f"{name}: key {key!r} is not 1 to {_OVERRIDE_BYTES} bytes of text")
        _check_override(f"{name}[{key!r}]", key, item)
    return dict(value)


def _check_override(label: str, key: str, item: Any) -> None:
    if isinstance(item, str):
        if len(item.encode()) > _OVERRIDE_BYTES:
            raise ParameterError(f"{label}: longer than {_OVERRIDE_BYTES} bytes")
    elif isinstance(item, bool):
        pass
    elif isinstance(item, int):
        if not -(2**63) <= item < 2**63:
            raise ParameterError(f"{label}: {item} does not fit in 64 bits")
    elif not isinstance(item, float) or not math.isfinite(item):
        raise ParameterError(f"{label}: expected a bool, int, finite float or str, not {item!r}")
    # Both reach an assertion, the first inside a worker thread, where nothing can catch it.
    if key.endswith("_epsilon") and not (isinstance(item, float) and item >= 0):
        raise ParameterError(f"{label}: {item!r} is not a float of 0 or more")
    if key.endswith(".rope.scaling.type") and item not in _ROPE_SCALING_TYPES:
        raise ParameterError(f"{label}: {item!r} is not one of {', '.join(_ROPE_SCALING_TYPES)}")
