"""The reference executor: a `SamplerChain` as llama.cpp's own samplers."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING

from ._core import Sampler
from .errors import SamplerError
from .sampling_stages import N_SEEDS, Stage

if TYPE_CHECKING:
    from ._core import Model
    from .sampling import SamplerChain

_NEED_VOCAB = frozenset({"dry", "infill", "grammar", "grammar_lazy"})
_NEED_N_VOCAB = frozenset({"mirostat", "penalties", "logit_bias"})


def compile_chain(
    chain: SamplerChain,
    model: Model,
    seed: int,
    logit_bias: Mapping[int, float] | None,
    choice: int,
) -> Sampler:
    """Return the native chain; see `SamplerChain.compile`."""
    if isinstance(seed, bool) or not isinstance(seed, int) or not 0 <= seed < N_SEEDS:
        raise SamplerError(f"seed must be an integer in [0, {N_SEEDS - 1}], got {seed!r}")
    steps = list(chain.stages)
    if logit_bias:
        # After the grammar: a constraint sees the raw row.
        steps.insert(chain.constraint is not None, Stage("logit_bias", logit_bias=logit_bias))
    native = Sampler.chain()
    for stage in steps:
        native.add(_build(stage, model, seed, choice))
    return native


def _build(stage: Stage, model: Model, seed: int, choice: int) -> Sampler:
    vocab = model.vocab
    params = stage.params
    biases = dict(params.get("logit_bias", ()))
    for token in (*biases, *params.get("trigger_tokens", ())):
        if token >= vocab.n_tokens:
            raise SamplerError(
                f"{stage.name}: token {token} is outside the vocabulary of {vocab.n_tokens}"
            )
    if stage.name == "infill" and vocab.eot is None and vocab.eos is None:
        # llama.cpp asserts that it can end the middle part.
        raise SamplerError("infill: the model has neither an EOT nor an EOS token")
    if "logit_bias" in params:
        params["logit_bias"] = biases
    if "seed" in params:
        own = seed if params["seed"] is None else params["seed"]
        params["seed"] = (own + choice) % N_SEEDS
    name = "grammar_lazy_patterns" if stage.name == "grammar_lazy" else stage.name
    args = list(params.values())
    if stage.name in _NEED_VOCAB:
        args.insert(0, vocab)
    elif stage.name in _NEED_N_VOCAB:
        args.insert(0, vocab.n_tokens)
    native: Sampler = getattr(Sampler, name)(*args)
    return native
