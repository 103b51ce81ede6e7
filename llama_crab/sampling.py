"""How the next token is chosen: `SamplerChain`, an immutable description.

A chain is a value: no model, no native memory, stdlib only. `SamplerChain.compile` makes it ready
to run for one sequence.
"""

from __future__ import annotations

from .errors import SamplerError
from .sampling_stages import (
    GRAMMARS,
    SELECTORS,
    STAGES,
    Frozen,
    Stage,
    recommended_stages,
    source,
)

# Not imported from typing: that module alone costs more than this one may take to import.
TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Iterable, Mapping, Sequence
    from typing import Any, Literal

    from ._core import FusedSampler, Model, Sampler

    Executor = Literal["fused", "reference"]
    # What a prompt has of the answer, the tag that opens thinking, those that end it.
    Opening = tuple[str, str, Sequence[str]]

EXECUTORS = ("fused", "reference")
_DRY_BREAKERS = ("\n", ":", '"', "*")


class SamplerChain(Frozen):
    """An immutable sequence of stages that ends in a selector.

    Each stage method returns a new chain: ``SamplerChain().temp(0.8).top_p(0.9)``. Stages run in
    the order written, except that a grammar always runs first. Without a selector (greedy, dist,
    mirostat, mirostat_v2, adaptive_p) the chain gets ``dist``, or ``greedy`` at temperature 0.
    A ``seed`` of None means the request's seed. Chains compare, hash, pickle and print by what was
    written.

    ``executor`` is who runs it: ``"fused"`` (ours, which covers every stage), or ``"reference"``
    (llama.cpp's own chain, ten times slower; the same tokens for the same seed, but for rounding).

    Raises SamplerError, naming the stage, for values out of range, a stage after the selector, and
    a second selector or grammar. Thread-safety: immutable, share freely.
    """

    __slots__ = ("_executor", "_stages", "_written")
    _executor: Executor
    _stages: tuple[Stage, ...]
    _written: tuple[Stage, ...]

    def __init__(self, stages: Iterable[Stage] = (), executor: Executor = "fused") -> None:
        if executor not in EXECUTORS:
            raise SamplerError(f"executor must be one of {', '.join(EXECUTORS)}, got {executor!r}")
        constraint: list[Stage] = []
        steps: list[Stage] = []
        for stage in stages:
            if stage.name in GRAMMARS:
                if constraint:
                    raise SamplerError(f"{stage.name}: the chain already has a grammar")
                constraint.append(stage)
                continue
            if steps and steps[-1].name in SELECTORS:
                what = "is a second selector" if stage.name in SELECTORS else "is out of reach"
                raise SamplerError(f"{stage.name}: {what} after {steps[-1].name}, which selects")
            steps.append(stage)
        written = (*constraint, *steps)
        selector: tuple[Stage, ...] = ()
        if not steps or steps[-1].name not in SELECTORS:
            cold = any(stage.is_zero_temp for stage in steps)
            selector = (Stage("greedy") if cold else Stage("dist", seed=None),)
        object.__setattr__(self, "_executor", executor)
        object.__setattr__(self, "_written", written)
        object.__setattr__(self, "_stages", (*written, *selector))

    def _then(self, name: str, **params: Any) -> SamplerChain:
        return SamplerChain((*self._written, Stage(name, **params)), self._executor)

    def with_executor(self, executor: Executor) -> SamplerChain:
        """Return the same chain, run by ``"fused"`` or ``"reference"``."""
        return SamplerChain(self._written, executor)

    # Selectors.

    def greedy(self) -> SamplerChain:
        """Select the best candidate. Wraps ``llama_sampler_init_greedy``."""
        return self._then("greedy")

    def dist(self, seed: int | None = None) -> SamplerChain:
        """Draw from the candidates' probabilities. Wraps ``llama_sampler_init_dist``."""
        return self._then("dist", seed=seed)

    def mirostat(
        self, seed: int | None = None, tau: float = 5.0, eta: float = 0.1, m: int = 100
    ) -> SamplerChain:
        """Draw so that the surprise stays near ``tau`` bits, with a top-k cut estimated from ``m``.

        ``eta`` is the learning rate (arXiv:2007.14966). Wraps ``llama_sampler_init_mirostat``.
        """
        return self._then("mirostat", seed=seed, tau=tau, eta=eta, m=m)

    def mirostat_v2(
        self, seed: int | None = None, tau: float = 5.0, eta: float = 0.1
    ) -> SamplerChain:
        """Draw so that the surprise stays near ``tau`` bits, with a cut by surprise.

        ``eta`` is the learning rate (arXiv:2007.14966). Wraps ``llama_sampler_init_mirostat_v2``.
        """
        return self._then("mirostat_v2", seed=seed, tau=tau, eta=eta)

    def adaptive_p(
        self, target: float, decay: float = 0.9, seed: int | None = None
    ) -> SamplerChain:
        """Draw tokens whose probability stays near ``target`` on average (negative: plain draw).

        ``decay`` in [0, 0.99] sets the memory. Wraps ``llama_sampler_init_adaptive_p``.
        """
        return self._then("adaptive_p", target=target, decay=decay, seed=seed)

    # Truncation.

    def top_k(self, k: int) -> SamplerChain:
        """Keep the ``k`` best candidates (0: all). Wraps ``llama_sampler_init_top_k``."""
        return self._then("top_k", k=k)

    def top_p(self, p: float, min_keep: int = 1) -> SamplerChain:
        """Keep the best candidates that together reach probability ``p``.

        Nucleus sampling, arXiv:1904.09751. Wraps ``llama_sampler_init_top_p``.
        """
        return self._then("top_p", p=p, min_keep=min_keep)

    def min_p(self, p: float, min_keep: int = 1) -> SamplerChain:
        """Keep candidates at least ``p`` times as probable as the best one.

        Wraps ``llama_sampler_init_min_p``.
        """
        return self._then("min_p", p=p, min_keep=min_keep)

    def typical(self, p: float, min_keep: int = 1) -> SamplerChain:
        """Keep the candidates whose surprise is nearest the entropy, up to probability ``p``.

        Locally typical sampling, arXiv:2202.00666. Wraps ``llama_sampler_init_typical``.
        """
        return self._then("typical", p=p, min_keep=min_keep)

    def xtc(
        self, p: float, t: float = 0.1, min_keep: int = 1, seed: int | None = None
    ) -> SamplerChain:
        """With chance ``p`` drop all candidates of probability >= ``t`` but the least of them.

        ``t`` above 0.5 turns it off. Wraps ``llama_sampler_init_xtc``.
        """
        return self._then("xtc", p=p, t=t, min_keep=min_keep, seed=seed)

    def top_n_sigma(self, n: float) -> SamplerChain:
        """Keep logits within ``n`` standard deviations of the best (0: all; arXiv:2411.07641).

        Wraps ``llama_sampler_init_top_n_sigma``.
        """
        return self._then("top_n_sigma", n=n)

    def infill(self) -> SamplerChain:
        """Merge candidates that share a prefix and favour ending, for fill-in-the-middle.

        Put it after top_k and top_p: its cost is quadratic in the number of candidates.
        Wraps ``llama_sampler_init_infill``.
        """
        return self._then("infill")

    # Reweighting.

    def temp(self, t: float) -> SamplerChain:
        """Divide the logits by ``t``; 0 keeps the best one only.

        Wraps ``llama_sampler_init_temp``.
        """
        return self._then("temp", t=t)

    def temp_ext(self, t: float, delta: float, exponent: float = 1.0) -> SamplerChain:
        """Divide by a temperature in ``t`` +- ``delta`` that grows with the entropy.

        arXiv:2309.02772. Wraps ``llama_sampler_init_temp_ext``.
        """
        return self._then("temp_ext", t=t, delta=delta, exponent=exponent)

    def penalties(
        self,
        penalty_last_n: int = 64,
        penalty_repeat: float = 1.0,
        penalty_freq: float = 0.0,
        penalty_present: float = 0.0,
    ) -> SamplerChain:
        """Make tokens of the last ``penalty_last_n`` (prompt included) less probable.

        ``penalty_repeat`` divides positive logits and multiplies negative ones (1: off),
        ``penalty_freq`` is subtracted per occurrence, ``penalty_present`` once.
        Wraps ``llama_sampler_init_penalties``.
        """
        return self._then(
            "penalties",
            penalty_last_n=penalty_last_n,
            penalty_repeat=penalty_repeat,
            penalty_freq=penalty_freq,
            penalty_present=penalty_present,
        )

    def dry(
        self,
        dry_multiplier: float,
        dry_base: float = 1.75,
        dry_allowed_length: int = 2,
        dry_penalty_last_n: int = 64,
        seq_breakers: Sequence[str] = _DRY_BREAKERS,
    ) -> SamplerChain:
        """Penalise tokens that would extend a repetition of the last ``dry_penalty_last_n``.

        A repeat of length L costs ``dry_multiplier * dry_base ** (L - dry_allowed_length)``;
        ``seq_breakers`` (strings of at most 40 bytes) end a repeat. Wraps
        ``llama_sampler_init_dry``.
        """
        return self._then(
            "dry",
            dry_multiplier=dry_multiplier,
            dry_base=dry_base,
            dry_allowed_length=dry_allowed_length,
            dry_penalty_last_n=dry_penalty_last_n,
            seq_breakers=seq_breakers,
        )

    def logit_bias(self, logit_bias: Mapping[int, float] | Iterable[Any]) -> SamplerChain:
        """Add a bias to the logits of single tokens; ``-inf`` bans one.

        Takes a mapping or (token, bias) pairs. Wraps ``llama_sampler_init_logit_bias``.
        """
        return self._then("logit_bias", logit_bias=logit_bias)

    # Constraints.

    def grammar(self, grammar_str: str, grammar_root: str = "root") -> SamplerChain:
        """Allow only text of a GBNF grammar; runs before all stages, wherever it is written.

        Wraps ``llama_sampler_init_grammar``.
        """
        return self._then("grammar", grammar_str=grammar_str, grammar_root=grammar_root)

    def grammar_lazy(
        self,
        grammar_str: str,
        grammar_root: str = "root",
        trigger_patterns: Sequence[str] = (),
        trigger_tokens: Sequence[int] = (),
    ) -> SamplerChain:
        """Apply a GBNF grammar from the first match of a trigger on.

        A pattern is an ECMAScript regex matched against the whole answer; the grammar is fed from
        its first group on. Wraps ``llama_sampler_init_grammar_lazy_patterns``.
        """
        return self._then(
            "grammar_lazy",
            grammar_str=grammar_str,
            grammar_root=grammar_root,
            trigger_patterns=trigger_patterns,
            trigger_tokens=trigger_tokens,
        )

    # Presets. They end without a selector, so that one (or more stages) can follow.

    @classmethod
    def default(cls) -> SamplerChain:
        """Return llama.cpp's own default: top_k 40, top_p 0.95, min_p 0.05, temp 0.8, dist."""
        return cls().top_k(40).top_p(0.95).min_p(0.05).temp(0.8)

    @classmethod
    def benchmark(cls) -> SamplerChain:
        """Return temperature 0: the fastest chain, and the same text on every run."""
        return cls().temp(0.0)

    @classmethod
    def code(cls, temp: float = 0.2) -> SamplerChain:
        """Return a cool chain for source code; ``temp=0`` makes it greedy."""
        return cls().temp(temp).top_p(0.95)

    @classmethod
    def chat(cls) -> SamplerChain:
        """Return a chain for general chat."""
        return cls().penalties(64, 1.1).temp(0.7).top_p(0.9).min_p(0.05)

    @classmethod
    def creative(cls) -> SamplerChain:
        """Return a warm chain with stronger penalties, for creative writing."""
        return cls().penalties(128, 1.1, 0.1, 0.1).temp(0.9).top_p(0.95).min_p(0.05)

    @classmethod
    def structured(cls, grammar: str, grammar_root: str = "root") -> SamplerChain:
        """Return a chain for output that must match a GBNF grammar."""
        return cls().grammar(grammar, grammar_root).temp(0.7).top_p(0.9)

    @classmethod
    def from_model(cls, model: Model) -> SamplerChain | None:
        """Return the chain that the GGUF recommends, or None when it recommends nothing.

        Reads the ``general.sampling.*`` metadata as llama.cpp's own programs do: what the file
        leaves out keeps llama.cpp's default, values that cannot be parsed count as left out, and
        unknown names in the sequence are skipped. Stages that would do nothing are not listed.
        Raises SamplerError for recommended values out of range.
        """
        try:
            stages = recommended_stages(model.metadata)
        except SamplerError as error:
            raise SamplerError(f"sampling settings recommended by the GGUF: {error}") from error
        return None if stages is None else cls(stages)

    # What the chain is.

    @property
    def stages(self) -> tuple[Stage, ...]:
        """The stages in the order they run: grammar first, the (implied) selector last."""
        return self._stages

    @property
    def executor(self) -> Executor:
        """Who runs the chain: ``"fused"`` or ``"reference"``."""
        return self._executor

    @property
    def constraint(self) -> Stage | None:
        """The grammar or lazy grammar, or None."""
        return self._stages[0] if self._stages[0].name in GRAMMARS else None

    @property
    def selector(self) -> Stage:
        """The last stage, which selects the token."""
        return self._stages[-1]

    @property
    def seed(self) -> int | None:
        """The selector's own seed; None when the request's seed counts."""
        own: int | None = self.selector.params.get("seed")
        return own

    @property
    def history_len(self) -> int:
        """The number of last tokens, prompt included, that penalties and dry look back on."""
        return max(stage.history_len for stage in self._stages)

    @property
    def needs_history(self) -> bool:
        """Whether a stage depends on earlier tokens, so that the prompt must be accepted."""
        return self.history_len > 0

    # Into llama.cpp, JSON and Python source.

    def compile(
        self,
        model: Model,
        seed: int,
        logit_bias: Mapping[int, float] | None = None,
        *,
        choice: int = 0,
        opening: Opening | None = None,
    ) -> Sampler | FusedSampler:
        """Return what runs the chain for one sequence: grammar, request bias, stages.

        A stage's own seed wins over ``seed``; ``choice`` i of a request's n is added to either.
        ``opening`` is what the prompt has of the answer, for a grammar: see `FusedSampler`.
        Raises SamplerError for a seed or a token out of range and for infill on a vocabulary
        without an end token, GrammarError for a grammar that does not parse.
        """
        from .sampling_compile import compile_chain

        return compile_chain(self, model, seed, logit_bias, choice, opening)

    def to_dict(self) -> dict[str, Any]:
        """Return the chain as written, made of JSON types only."""
        stages = [stage.to_dict() for stage in self._written]
        return {"stages": stages} | ({} if self._executor == "fused" else {"executor": "reference"})

    @classmethod
    def from_dict(cls, fields: Mapping[str, Any]) -> SamplerChain:
        """Return the chain that `to_dict` described; parameters left out get their default.

        Raises SamplerError for anything unknown, missing or out of range.
        """
        try:
            chain = cls(executor=fields.get("executor", "fused"))
            for stage in fields["stages"]:
                params = dict(stage)
                name = params.pop("name")
                if name not in STAGES:
                    raise SamplerError(f"unknown sampler stage {name!r}")
                chain = getattr(chain, name)(**params)
        except SamplerError:
            raise
        except (AttributeError, KeyError, TypeError, ValueError) as error:
            raise SamplerError(f"not a sampler chain: {error!r}") from error
        return chain

    def to_json(self) -> str:
        """Return `to_dict` as JSON text."""
        import json

        return json.dumps(self.to_dict(), allow_nan=False)

    @classmethod
    def from_json(cls, text: str | bytes) -> SamplerChain:
        """Return the chain that `to_json` wrote. Raises SamplerError like `from_dict`."""
        import json

        try:
            fields = json.loads(text)
        except ValueError as error:
            raise SamplerError(f"not a sampler chain: {error}") from error
        return cls.from_dict(fields)

    def __eq__(self, other: object) -> bool:
        if not isinstance(other, SamplerChain):
            return NotImplemented
        return (self._written, self._executor) == (other._written, other._executor)

    def __hash__(self) -> int:
        return hash((self._written, self._executor))

    def __repr__(self) -> str:
        executor = "" if self._executor == "fused" else f"executor={self._executor!r}"
        return f"SamplerChain({executor})" + "".join(f".{_call(s)}" for s in self._written)

    def __reduce__(self) -> tuple[type[SamplerChain], tuple[tuple[Stage, ...], Executor]]:
        return SamplerChain, (self._written, self._executor)


def _call(stage: Stage) -> str:
    defaults = getattr(SamplerChain, stage.name).__defaults__ or ()
    required = len(stage.items) - len(defaults)
    args = []
    for index, (key, value) in enumerate(stage.items):
        if index >= required and value == defaults[index - required]:
            continue
        lead = "" if index == 0 and required == 1 else f"{key}="
        args.append(lead + source(key, value))
    return f"{stage.name}({', '.join(args)})"
