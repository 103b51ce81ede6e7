"""Checks of a configuration, by rules; `checks_measured` asks the machine where it can."""

from __future__ import annotations

from .checks_machine import gib
from .checks_model import multiplies_by_row
from .finding import Finding, passed
from .subject import Subject

_QUANTISED = ("q8_0", "q5_1", "q5_0", "q4_1", "q4_0", "iq4_nl")
_FEW_TOKENS = 32
# What a device keeps for buffers and the KV cache, roughly; below it no advice is given.
_GPU_SHARE = 0.8


def offload(subject: Subject) -> Finding | None:
    """Whether layers stay on the CPU although a GPU could compute them."""
    name, layers, names = "offload", subject.n_gpu_layers, subject.build.gpu_names
    if not names:
        if layers is not None and layers != 0:
            return Finding(
                name,
                "problem" if layers > 0 else "advice",
                "loading is refused" if layers > 0 else "everything runs on the CPU",
                f"n_gpu_layers={layers}, but the build has no GPU device",
                "leave n_gpu_layers out, or build for the GPU's backend",
            )
        return None
    if layers == 0:
        return Finding(
            name,
            "problem",
            "everything runs on the CPU",
            f"n_gpu_layers=0, and there is {', '.join(names)}",
            "leave n_gpu_layers out, or set it to -1 (all layers)",
        )
    model = subject.model
    # The output layer counts as one more.
    if layers is None:
        return passed(name, f"as many layers as fit on {', '.join(names)}")
    if model is None or layers < 0 or layers > model.n_layer:
        return passed(name, f"all layers on {', '.join(names)}")
    if model.size + model.kv_bytes < _GPU_SHARE * subject.build.gpu_free:
        return Finding(
            name,
            "advice",
            "the layers left on the CPU set the pace",
            f"n_gpu_layers={layers} of {model.n_layer + 1}; {gib(model.size)} of weights, "
            f"{gib(subject.build.gpu_free)} free on the GPU",
            "n_gpu_layers=-1 (all layers)",
        )
    return passed(name, f"{layers} of {model.n_layer + 1} layers on {', '.join(names)}")


def threads(subject: Subject) -> Finding | None:
    """Whether there are more threads than cores this process may use."""
    name, machine, n_cores = "threads", subject.machine, subject.machine.n_cores
    choice = machine.threads
    for field in ("n_threads", "n_threads_batch"):
        n_threads = getattr(subject.given, field)
        if n_threads is None:
            continue
        fix = f"{field}={choice.n_threads}, or leave it out"
        if n_threads > n_cores or (n_threads > choice.n_threads and "quota" in choice.why):
            return Finding(
                name,
                "problem",
                "threads wait for each other: context switches in every operation",
                f"{field}={n_threads}; {choice.why}",
                fix,
            )
        if n_threads > choice.n_threads:
            return Finding(
                name,
                "advice",
                "performance cores wait for efficiency cores in every operation",
                f"{field}={n_threads}; {choice.why}",
                fix,
            )
    return passed(name, f"{subject.params.n_threads or choice.n_threads}; {choice.why}")


def context_length(subject: Subject) -> Finding | None:
    """Whether the context is longer than the model was trained for."""
    name, model, given = "context-length", subject.model, subject.given
    if model is None or model.embeds or model.n_ctx_train <= 0:
        return None
    per_sequence = (subject.params.n_ctx or model.n_ctx_train) // (subject.params.n_seq_max or 1)
    stretched = (
        given.rope_scaling_type not in (None, "unspecified", "none")
        or given.rope_freq_scale
        or given.rope_freq_base
        or given.kv_overrides
    )
    if per_sequence > model.n_ctx_train and not stretched:
        return Finding(
            name,
            "problem",
            f"text falls apart behind token {model.n_ctx_train}",
            f"n_ctx is {per_sequence} per sequence, the model was trained to {model.n_ctx_train}",
            f"n_ctx={model.n_ctx_train * (subject.params.n_seq_max or 1)}, "
            'or rope_scaling_type="yarn" where its makers say so',
        )
    return passed(name, f"{per_sequence} of {model.n_ctx_train} tokens")


def micro_batch(subject: Subject) -> Finding | None:
    """Whether prompts are cut into pieces of a few tokens."""
    name, given = "micro-batch", subject.given
    sizes = {field: getattr(given, field) for field in ("n_ubatch", "n_batch")}
    small = {field: size for field, size in sizes.items() if size and size < _FEW_TOKENS}
    # Without batched kernels a prompt costs the same in any pieces: measured on Q4_1.
    if not small or multiplies_by_row(subject):
        return passed(name, f"n_ubatch {given.n_ubatch or 'as llama.cpp has it'}")
    field, size = next(iter(small.items()))
    return Finding(
        name,
        "advice",
        "prompts are slow: all weights are read for every few tokens",
        f"{field}={size}",
        f"leave {field} out, or 256 and more",
    )


def cache_size(subject: Subject) -> Finding | None:
    """Whether a quantised K cache stands beside a V cache that cannot be quantised."""
    name, given = "cache-size", subject.given
    if given.type_k in _QUANTISED and given.flash_attn_type == "disabled":
        return Finding(
            name,
            "advice",
            "the KV cache shrinks by a quarter, not by half",
            f"type_k={given.type_k!r} with flash_attn_type='disabled': V stays f16",
            f"leave flash_attn_type out and add type_v={given.type_k!r}",
        )
    return passed(name, f"K {given.type_k or 'f16'}, V {given.type_v or 'f16'}")


def sampler(subject: Subject) -> Finding | None:
    """Whether conversations would be sampled greedily."""
    name, chain, model = "sampler", subject.given.sampler, subject.model
    if chain is None or model is None:
        return None
    greedy = chain.selector.name == "greedy" and chain.constraint is None
    if greedy and model.has_chat_template:
        return Finding(
            name,
            "advice",
            "repetitive, bland answers in conversation and creative writing",
            f"a greedy chain; {model.path.name} is a chat model",
            "SamplerChain.chat(), or .creative(); greedy suits benchmarks, extraction and code",
        )
    return passed(name, f"{' > '.join(stage.name for stage in chain.stages)}")
