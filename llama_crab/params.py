"""How a model is loaded: `LlamaParams`, checked before anything native sees it.

Field names are llama.cpp's (``llama_model_params``, ``llama_context_params``). llama.cpp answers
several bad values with an assertion, which ends the process, so the rules that need no model are
checked here; those that need one are checked by the core.
"""

from __future__ import annotations

import os
from collections.abc import Iterable, Mapping
from dataclasses import KW_ONLY, dataclass, field, fields
from dataclasses import replace as _dataclass_replace

from . import param_rules
from .param_rules import INT32_MAX as INT32_MAX
from .param_rules import MAX_SEQUENCES as MAX_SEQUENCES
from .param_rules import RANDOM_SEED as RANDOM_SEED
from .param_rules import ParameterError as ParameterError
from .param_rules import require_integer as require_integer
from .sampling import SamplerChain
from .speculative import Speculative, check_speculative, n_draft_rows
from .speculative import to_dict as speculative_to_dict

# Not imported from typing: that module alone costs a tenth of the package's import budget.
TYPE_CHECKING = False
if TYPE_CHECKING:
    from typing import Any

DEFAULT_N_CTX = 4096
_NATIVE_N_BATCH = 2048
_EMBEDDING_TEXTS = 64
_LEAST_EMBEDDING_TOKENS, _MOST_EMBEDDING_TOKENS = 512, 2048
MODEL_FIELDS = (
    *("devices", "n_gpu_layers", "split_mode", "load_mode", "lazy_mode", "main_gpu"),
    "tensor_buft_overrides",
    *("tensor_split", "kv_overrides", "check_tensors", "use_extra_bufts", "no_host", "load_mtp"),
)
CONTEXT_FIELDS = (
    *("n_ctx", "n_batch", "n_ubatch", "n_seq_max", "n_rs_seq", "n_outputs_max"),
    *("n_outputs_max_per_seq", "n_threads", "n_threads_batch", "rope_scaling_type"),
    *("pooling_type", "attention_type", "flash_attn_type", "rope_freq_base", "rope_freq_scale"),
    *("yarn_ext_factor", "yarn_attn_factor", "yarn_beta_fast", "yarn_beta_slow", "yarn_orig_ctx"),
    *("type_k", "type_v", "embeddings", "offload_kqv", "no_perf", "op_offload", "swa_full"),
    "kv_unified",
)


@dataclass(frozen=True)
class LlamaParams:
    """Everything that decides how a model is loaded and its context made.

    ``model`` is a path, a Hugging Face repository ``owner/name[:quant]``, or None for the small
    demo model. Every other field is keyword only, and None means llama.cpp's default, except:

    - ``n_ctx``: min(trained length, 4096) per sequence; 0 means the trained length in total.
    - ``n_outputs_max``: ``n_seq_max`` and what drafts need (``speculative``), or every token of a
      batch when ``embeddings`` is set.
    - ``n_gpu_layers``: "auto", as many as the free memory of the devices holds, less
      ``fit_margin_mib`` MiB on each; an ``n_ctx`` that is not set may shrink for that, too.
    - ``n_threads``: the performance cores this process may use; ``n_threads_batch``: the same.

    Enumerations are given by name (``flash_attn_type="auto"``; True and False also mean "enabled"
    and "disabled"), cache types by their ggml name (``type_k="q8_0"``), ``devices`` by the names
    that `llama_crab.devices` lists. ``sampler`` and ``seed`` are the defaults of each request;
    ``verbose`` lets llama.cpp's own messages below warning through to `logging`.

    ``max_itl_ms`` bounds the time between two tokens of an answer while prompts are computed
    beside it, None for no bound. What has to leave the KV cache goes to ``cache_ram_mib`` MiB of
    host memory, and from there to ``cache_disk_mib`` MiB of files in ``cache_dir``; 0 for none.
    ``speculative`` says what drafts come from: None for no drafts, "auto" for prompt lookup with
    lengths of measured worth, or see `llama_crab.speculative`.
    ``profile`` takes what is not set from a saved result of `llama_crab.tuning.tune`: "auto", the
    name of a goal, or a file.

    Raises ParameterError, a ValueError that names the field, for values that llama.cpp would
    refuse or abort on. Thread-safety: immutable, share freely.
    """

    model: str | os.PathLike[str] | None = None
    _: KW_ONLY
    # llama_model_params
    devices: tuple[str, ...] | None = None
    n_gpu_layers: int | str | None = None  # "auto" is kept as None
    split_mode: str | None = None
    load_mode: str | None = None
    lazy_mode: str | None = None
    main_gpu: int | None = None
    tensor_split: tuple[float, ...] | None = None
    # Dicts do not hash; the other fields identify the parameters well enough for that.
    tensor_buft_overrides: Mapping[str, str] | None = field(default=None, hash=False)
    kv_overrides: Mapping[str, int | float | bool | str] | None = field(default=None, hash=False)
    check_tensors: bool | None = None
    use_extra_bufts: bool | None = None
    no_host: bool | None = None
    load_mtp: bool | None = None
    # llama_context_params
    n_ctx: int | None = None
    n_batch: int | None = None
    n_ubatch: int | None = None
    n_seq_max: int | None = None
    n_rs_seq: int | None = None
    n_outputs_max: int | None = None
    n_outputs_max_per_seq: int | None = None
    n_threads: int | None = None
    n_threads_batch: int | None = None
    rope_scaling_type: str | None = None
    pooling_type: str | None = None
    attention_type: str | None = None
    flash_attn_type: str | bool | None = None
    rope_freq_base: float | None = None
    rope_freq_scale: float | None = None
    yarn_ext_factor: float | None = None
    yarn_attn_factor: float | None = None
    yarn_beta_fast: float | None = None
    yarn_beta_slow: float | None = None
    yarn_orig_ctx: int | None = None
    type_k: str | None = None
    type_v: str | None = None
    embeddings: bool | None = None
    offload_kqv: bool | None = None
    no_perf: bool | None = None
    op_offload: bool | None = None
    swa_full: bool | None = None
    kv_unified: bool | None = None
    # Ours
    sampler: SamplerChain | None = None
    seed: int | None = None
    verbose: bool = False
    max_itl_ms: float | None = 500.0
    cache_ram_mib: int = 512
    cache_dir: str | os.PathLike[str] | None = None
    cache_disk_mib: int = 0
    fit_margin_mib: int = 1024
    profile: str | os.PathLike[str] | None = None
    speculative: Speculative = None

    def __post_init__(self) -> None:
        if self.model is not None and not isinstance(self.model, (str, os.PathLike)):
            kind = type(self.model).__name__
            raise ParameterError(f"model: expected a path or a repository name, not {kind}")
        for name, choices in param_rules.CHOICES.items():
            self._normalise(name, param_rules.choice, choices)
        for name, bounds in param_rules.INT_RANGES.items():
            self._normalise(name, require_integer, bounds)
        for name, minimum in param_rules.FLOAT_MINIMA.items():
            self._normalise(name, param_rules.real, minimum)
        for name in (*param_rules.BOOLS, "verbose"):
            self._normalise(name, param_rules.boolean, None)
        self._normalise("n_gpu_layers", param_rules.gpu_layers, None)
        self._normalise("devices", param_rules.devices, None)
        self._normalise("tensor_split", param_rules.tensor_split, None)
        self._normalise("tensor_buft_overrides", param_rules.buffer_overrides, None)
        self._normalise("speculative", check_speculative, None)
        self._normalise("kv_overrides", param_rules.overrides, None)
        self._check_batches()
        self._check_attention()
        self._check_cache()

    def _normalise(self, name: str, rule: Any, detail: Any) -> None:
        value = getattr(self, name)
        if value is not None:
            object.__setattr__(self, name, rule(name, value, detail))

    def _check_batches(self) -> None:
        n_batch = self.n_batch or _NATIVE_N_BATCH
        if self.n_ubatch is not None and self.n_ubatch > n_batch:
            default = "" if self.n_batch else " (the default)"
            raise ParameterError(
                f"n_ubatch: {self.n_ubatch} is larger than n_batch {n_batch}{default}"
            )
        # llama.cpp asserts that one output per sequence fits in each of these.
        for name in ("n_batch", "n_ctx", "n_outputs_max"):
            limit = getattr(self, name)
            if limit and (self.n_seq_max or 1) > limit:
                raise ParameterError(f"n_seq_max: {self.n_seq_max} is larger than {name} {limit}")
        # A batch that exceeds n_ubatch would abort: non-causal attention sees a batch as a whole.
        if self.attention_type == "non_causal" and (self.n_ubatch or n_batch) < n_batch:
            raise ParameterError(
                f"n_ubatch: {self.n_ubatch} is smaller than n_batch {n_batch}, "
                "which attention_type='non_causal' does not allow"
            )

    def _check_attention(self) -> None:
        if self.flash_attn_type != "disabled":
            return
        if self.type_v is not None and self.type_v not in param_rules.FLOAT_CACHE_TYPES:
            raise ParameterError(
                f"type_v: {self.type_v!r} needs flash attention, but flash_attn_type is 'disabled'"
            )
        if self.split_mode == "tensor":
            raise ParameterError(
                "split_mode: 'tensor' needs flash attention, but flash_attn_type is 'disabled'"
            )

    def _check_cache(self) -> None:
        for name in ("cache_dir", "profile"):
            path = getattr(self, name)
            if path is not None and not isinstance(path, (str, os.PathLike)):
                raise ParameterError(f"{name}: expected a path, not {type(path).__name__}")
        for name in ("cache_ram_mib", "cache_disk_mib", "fit_margin_mib"):
            if getattr(self, name) is None:
                raise ParameterError(f"{name}: expected an integer, not None")
        if self.cache_disk_mib and self.cache_dir is None:
            raise ParameterError("cache_disk_mib: needs a cache_dir to write to")

    def model_params(self) -> dict[str, Any]:
        """Return the ``llama_model_params`` that are set, as the core's Model takes them."""
        return self._set_fields(MODEL_FIELDS)

    def context_params(self) -> dict[str, Any]:
        """Return the ``llama_context_params`` that are set, as the core's Context takes them."""
        return self._set_fields(CONTEXT_FIELDS)

    def _set_fields(self, names: Iterable[str]) -> dict[str, Any]:
        values = ((name, getattr(self, name)) for name in names)
        return {name: value for name, value in values if value is not None}

    def resolve(self, *, n_ctx_train: int, n_threads: int, offloaded: bool = False) -> LlamaParams:
        """Return these parameters with our own defaults filled in for one model and machine.

        ``n_ctx_train`` is the model's trained length in tokens, ``n_threads`` the number of
        threads to use where none is set, ``offloaded`` whether a GPU computes.
        """
        if self.embeddings:
            return self._resolve_embeddings(n_ctx_train, n_threads)
        changes: dict[str, Any] = {}
        n_seq_max = self.n_seq_max or 1
        if self.n_ctx is None:
            per_sequence = min(n_ctx_train, DEFAULT_N_CTX) if n_ctx_train > 0 else DEFAULT_N_CTX
            changes["n_ctx"] = per_sequence * n_seq_max
        if self.n_outputs_max is None:
            changes["n_outputs_max"] = n_seq_max + n_draft_rows(self.speculative, n_seq_max)
        if self.kv_unified is None and n_seq_max > 1:
            # Streams that are no neighbours need a micro-batch each, and a GPU pays for each.
            changes["kv_unified"] = offloaded
        changes["n_threads"] = self.n_threads or n_threads
        changes["n_threads_batch"] = self.n_threads_batch or changes["n_threads"]
        if self.attention_type == "non_causal" and self.n_ubatch is None:
            changes["n_ubatch"] = self.n_batch or _NATIVE_N_BATCH
        return self.replace(**changes)

    def _resolve_embeddings(self, n_ctx_train: int, n_threads: int) -> LlamaParams:
        """Fill in what embedding needs: a text within one micro-batch, many texts in it."""
        n_seq_max = self.n_seq_max or _EMBEDDING_TEXTS
        longest = min(max(n_ctx_train, _LEAST_EMBEDDING_TOKENS), _MOST_EMBEDDING_TOKENS)
        # llama.cpp asserts that the sequences divide it.
        n_ubatch = self.n_ubatch or self.n_batch or -(-longest // n_seq_max) * n_seq_max
        threads = self.n_threads or n_threads
        return self.replace(
            n_seq_max=n_seq_max,
            n_ubatch=n_ubatch,
            n_batch=self.n_batch or n_ubatch,
            n_ctx=self.n_ctx or n_ubatch,
            kv_unified=True if self.kv_unified is None else self.kv_unified,
            n_threads=threads,
            n_threads_batch=self.n_threads_batch or threads,
        )

    def replace(self, **changes: Any) -> LlamaParams:
        """Return a copy with some fields changed, checked again as a whole."""
        _check_names(changes)
        return _dataclass_replace(self, **changes)

    def to_dict(self) -> dict[str, Any]:
        """Return the fields that differ from their defaults as plain JSON values."""
        result: dict[str, Any] = {}
        for item in fields(self):
            value = getattr(self, item.name)
            if value == item.default:
                continue
            if item.name in ("model", "cache_dir", "profile"):
                value = os.fspath(value)
            elif item.name == "sampler":
                value = value.to_dict()
            elif item.name == "speculative":
                value = speculative_to_dict(value)
            result[item.name] = list(value) if isinstance(value, tuple) else value
        return result

    @classmethod
    def from_dict(cls, values: Mapping[str, Any]) -> LlamaParams:
        """Build parameters from field names and values, as `to_dict` returns them."""
        _check_names(values)
        values = dict(values)
        if isinstance(values.get("sampler"), Mapping):
            values["sampler"] = SamplerChain.from_dict(values["sampler"])
        return cls(**values)

    @classmethod
    def from_profile(
        cls, profile: str | os.PathLike[str] = "auto", *, model: Any = None, **fields: Any
    ) -> LlamaParams:
        """Build parameters that take what `fields` leaves open from a profile; see ``profile``.

        The file is read when the model is loaded, because it holds for one model and machine.
        """
        return cls.from_dict({**fields, "model": model, "profile": profile})

    def __repr__(self) -> str:
        shown = (
            f"{item.name}={getattr(self, item.name)!r}"
            for item in fields(self)
            if item.name == "model" or getattr(self, item.name) != item.default
        )
        return f"LlamaParams({', '.join(shown)})"


def _check_names(names: Iterable[str]) -> None:
    known = [item.name for item in fields(LlamaParams)]
    for name in names:
        if name not in known:
            raise ParameterError(f"{name}: no such parameter{param_rules.suggest(name, known)}")
