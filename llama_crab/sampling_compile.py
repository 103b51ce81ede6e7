"""A `SamplerChain` made ready to run on a model, by one of two executors with the same meaning.

``fused`` is ours; ``reference`` is llama.cpp's own chain of samplers over a candidate array.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from ._core import FusedSampler, Sampler
from .errors import SamplerError
from .sampling_stages import GRAMMARS, N_SEEDS, Stage

if TYPE_CHECKING:
    from collections.abc import Mapping

    from ._core import Model
    from .sampling import Opening, SamplerChain

_NEED_VOCAB = frozenset({"dry", "infill", "grammar", "grammar_lazy"})
_NEED_N_VOCAB = frozenset({"mirostat", "penalties", "logit_bias"})


def compile_chain(
    chain: SamplerChain,
    model: Model,
    seed: int,
    logit_bias: Mapping[int, float] | None,
    choice: int,
    opening: Opening | None = None,
) -> Sampler | FusedSampler:
    """Return the executor; see `SamplerChain.compile`."""
    if isinstance(seed, bool) or not isinstance(seed, int) or not 0 <= seed < N_SEEDS:
        raise SamplerError(f"seed must be an integer in [0, {N_SEEDS - 1}], got {seed!r}")
    steps = list(chain.stages)
    if logit_bias:
        # After the grammar: a constraint sees the raw row.
        steps.insert(chain.constraint is not None, Stage("logit_bias", logit_bias=logit_bias))
    settled = [(stage.name, _settle(stage, model, seed, choice)) for stage in steps]
    if chain.executor == "fused":
        keep = [stage.name in GRAMMARS or not stage.is_noop for stage in steps]
        return FusedSampler(
            model, [s for s, kept in zip(settled, keep, strict=True) if kept], opening
        )
    if opening is not None and any(opening):
        raise SamplerError("executor: a chat's grammar that goes on from the prompt needs 'fused'")
    native = Sampler.chain()
    for name, params in settled:
        native.add(_reference(name, params, model))
    return native


def _settle(stage: Stage, model: Model, seed: int, choice: int) -> dict[str, Any]:
    """Return a stage's parameters with its seed decided and its tokens checked."""
    vocab = model.vocab
    params = stage.params
    if "logit_bias" in params:
        params["logit_bias"] = dict(params["logit_bias"])
    for token in (*params.get("logit_bias", ()), *params.get("trigger_tokens", ())):
        if token >= vocab.n_tokens:
            raise SamplerError(
                f"{stage.name}: token {token} is outside the vocabulary of {vocab.n_tokens}"
            )
    if stage.name == "infill" and vocab.eot is None and vocab.eos is None:
        # llama.cpp asserts that it can end the middle part.
        raise SamplerError("infill: the model has neither an EOT nor an EOS token")
    if "seed" in params:
        own = seed if params["seed"] is None else params["seed"]
        params["seed"] = (own + choice) % N_SEEDS
    return params


def _reference(name: str, params: dict[str, Any], model: Model) -> Sampler:
    args = list(params.values())
    if name in _NEED_VOCAB:
        args.insert(0, model.vocab)
    elif name in _NEED_N_VOCAB:
        args.insert(0, model.vocab.n_tokens)
    name = "grammar_lazy_patterns" if name == "grammar_lazy" else name
    native: Sampler = getattr(Sampler, name)(*args)
    return native
