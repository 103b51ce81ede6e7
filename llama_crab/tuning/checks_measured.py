"""Checks by measurement: each setting against its alternative, in turns, on the same weights.

A difference inside the spread is never called one, and a difference outside it is measured a
second time before it counts.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

from ..errors import LlamaCrabError
from .bed import Bed
from .finding import Finding, passed
from .samples import Comparison, Samples, compare
from .subject import Subject

TYPE_CHECKING = False
if TYPE_CHECKING:
    from typing import Any

    from .finding import Severity

_ROUNDS = 5
_WORTH = 1.05
_GRAVE = 1.15
_MOST_DEPTH, _MOST_PROMPT, _MOST_GEN = 2048, 128, 16
_PROBE_TOKENS, _PROBE_GEN = 16, 2
_FILL_SEC, _PROMPT_SEC, _GEN_SEC = 4.0, 0.5, 0.4
# A slower configuration is not worth the wait; `llama-crab bench` has no such limit.
_LONGEST_PROBE_SEC = 4.0


@dataclass(frozen=True)
class Alternative:
    """Another value of one setting: what the check is called, and what would change."""

    name: str
    changes: dict[str, Any]
    now: str
    fix: str


@dataclass(frozen=True)
class _Size:
    """How many tokens are decoded, and how many lie before them."""

    depth: int
    n_prompt: int
    n_gen: int


@dataclass
class _Race:
    """A bed and its rates per workload, one value per round."""

    bed: Bed
    rates: dict[str, list[float]] = field(default_factory=dict)


def alternatives(subject: Subject) -> list[Alternative]:
    """Return what is worth measuring for a configuration."""
    given, found = subject.given, []
    if given.flash_attn_type == "disabled":
        changes: dict[str, Any] = {"flash_attn_type": "enabled"}
        fix = "leave flash_attn_type out"
        found.append(Alternative("flash-attention", changes, "flash attention is off", fix))
    elif given.type_v in (None, "f32", "f16", "bf16") and given.split_mode != "tensor":
        changes = {"flash_attn_type": "disabled"}
        fix = 'flash_attn_type="disabled"'
        found.append(Alternative("flash-attention", changes, "flash attention is on", fix))
    default = subject.machine.threads.n_threads
    if {given.n_threads, given.n_threads_batch} - {None, default}:
        changes = {"n_threads": default, "n_threads_batch": default}
        now = f"n_threads={given.n_threads}, n_threads_batch={given.n_threads_batch}"
        found.append(Alternative("threads", changes, now, f"n_threads={default}, the default"))
    if min(given.n_ubatch or 512, given.n_batch or 512) < 128:
        changes = {"n_ubatch": None, "n_batch": None}
        now = f"n_ubatch={given.n_ubatch}, n_batch={given.n_batch}"
        found.append(Alternative("micro-batch", changes, now, "leave n_ubatch and n_batch out"))
    if {given.type_k, given.type_v} - {None, "f16"}:
        changes = {"type_k": None, "type_v": None}
        now = f"type_k={given.type_k}, type_v={given.type_v}"
        fix = "leave type_k and type_v out (f16) where memory allows"
        found.append(Alternative("cache-type", changes, now, fix))
    return found


def measured(
    subject: Subject, options: Sequence[Alternative], progress: Callable[[str], object]
) -> list[Finding]:
    """Measure each alternative against the configuration; return one finding for each.

    Nothing is returned for a model that is too slow for a short measurement. Raises what `Llama`
    raises when the configuration does not load.
    """
    n_ctx = _MOST_DEPTH + _MOST_PROMPT + 64
    if subject.model is not None and subject.model.n_ctx_train > 0:
        n_ctx = min(n_ctx, max(subject.model.n_ctx_train, 2 * _MOST_PROMPT))
    plain = subject.given.replace(
        n_ctx=n_ctx, n_seq_max=None, n_outputs_max=None, n_outputs_max_per_seq=None, kv_unified=None
    )
    progress("loading the model")
    with Bed(plain) as bed:
        races = {"": _Race(bed)}
        try:
            for option in options:
                # An alternative that needs more memory than there is is none.
                with contextlib.suppress(LlamaCrabError):
                    other = Bed(plain.replace(**option.changes), weights_of=bed)
                    races[option.name] = _Race(other)
            options = [option for option in options if option.name in races]
            if not options:
                return []
            size = _size(races, n_ctx)
            if size is None:
                return []
            _run(races, size, "measuring " + ", ".join(list(races)[1:]), progress)
            doubtful = [option.name for option in options if _differs(races, option.name)]
            again = {name: _Race(races[name].bed) for name in ("", *doubtful)}
            if doubtful:
                _run(again, size, "measuring again " + ", ".join(doubtful), progress)
            return [_finding(subject, option, races, again, size.depth) for option in options]
        finally:
            for name, race in races.items():
                if name:
                    race.bed.close()


def _size(races: dict[str, _Race], n_ctx: int) -> _Size | None:
    """Return a size that the slowest of all is done with soon, or None where there is none."""
    prompt_sec = gen_sec = 0.0
    for race in races.values():
        race.bed.prefill(_PROBE_TOKENS)  # allocates, and wakes the threads
        prompt_sec = max(prompt_sec, race.bed.prefill(_PROBE_TOKENS) / _PROBE_TOKENS)
        gen_sec = max(gen_sec, race.bed.generate(_PROBE_GEN) / _PROBE_GEN)
    if max(prompt_sec * _PROBE_TOKENS, gen_sec * _PROBE_GEN) > _LONGEST_PROBE_SEC:
        return None
    room = n_ctx - _MOST_PROMPT
    return _Size(
        depth=min(int(_FILL_SEC / prompt_sec), room, _MOST_DEPTH) // 64 * 64,
        n_prompt=max(_PROBE_TOKENS, min(int(_PROMPT_SEC / prompt_sec), _MOST_PROMPT)),
        n_gen=max(_PROBE_GEN, min(int(_GEN_SEC / gen_sec), _MOST_GEN)),
    )


def _run(
    races: dict[str, _Race], size: _Size, what: str, progress: Callable[[str], object]
) -> None:
    order = list(races.values())
    for race in order:
        race.bed.prefill(_PROBE_TOKENS, size.depth)
        race.bed.generate(_PROBE_GEN, size.depth)
    for i in range(_ROUNDS):
        progress(f"{what}, round {i + 1} of {_ROUNDS}")
        # Who comes first may find a cooler machine.
        for race in order if i % 2 == 0 else reversed(order):
            seconds = race.bed.prefill(size.n_prompt, size.depth)
            race.rates.setdefault("prompts", []).append(size.n_prompt / seconds)
            seconds = race.bed.generate(size.n_gen, size.depth)
            race.rates.setdefault("answers", []).append(size.n_gen / seconds)


def _compare(races: dict[str, _Race], name: str, workload: str) -> Comparison:
    before, after = races[""].rates[workload], races[name].rates[workload]
    return compare(Samples(tuple(before)), Samples(tuple(after)))


def _differs(races: dict[str, _Race], name: str) -> bool:
    return any(_is_worth(_compare(races, name, workload)) for workload in ("prompts", "answers"))


def _is_worth(found: Comparison) -> bool:
    return found.verdict == "faster" and found.ratio >= _WORTH


def _finding(
    subject: Subject,
    option: Alternative,
    first: dict[str, _Race],
    again: dict[str, _Race],
    depth: int,
) -> Finding:
    faster, shown, lost = [], [], False
    best = 1.0
    for workload in ("prompts", "answers"):
        found = _compare(first, option.name, workload)
        confirmed = False
        if option.name in again:
            repeated = _compare(again, option.name, workload)
            confirmed = _is_worth(found) and _is_worth(repeated)
            found = min(found, repeated, key=lambda comparison: comparison.ratio)
        if confirmed:
            faster.append(workload)
            best = max(best, found.ratio)
        lost |= found.verdict == "slower" and found.ratio < 1 / _WORTH
        shown.append(f"{workload} {found}")
    evidence = (
        f"{option.now}; the alternative ({option.fix}), {depth} tokens deep: {', '.join(shown)}"
    )
    if not faster:
        return passed(option.name, evidence)
    severity: Severity = "advice"
    if option.name in ("threads", "micro-batch") or subject.given.flash_attn_type == "disabled":
        severity = "problem" if best >= _GRAVE and not lost else "advice"
    if option.name == "cache-type":
        severity = "advice"  # a smaller cache may be worth it
    symptom = f"{' and '.join(faster)} are slower than they could be"
    if lost:
        symptom += ", at the cost of the other"
    return Finding(option.name, severity, symptom, evidence, option.fix)
