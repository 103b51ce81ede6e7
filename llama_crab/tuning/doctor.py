"""`examine`: what keeps this machine, build, configuration and model from their speed."""

from __future__ import annotations

import os
from collections.abc import Callable, Collection
from dataclasses import replace
from pathlib import Path

from .. import _core, logs
from ..errors import LlamaCrabError
from ..hub import resolve_model, split_names
from ..params import LlamaParams
from . import checks_config, checks_machine, checks_model
from .finding import SEVERITIES, Diagnosis, Finding
from .subject import Build, Machine, ModelFacts, Subject

_RULES: tuple[Callable[[Subject], Finding | None], ...] = (
    checks_machine.gpu_backend,
    checks_machine.instruction_set,
    checks_config.offload,
    checks_config.threads,
    checks_machine.cpu_frequency,
    checks_machine.battery,
    checks_machine.memory_pressure,
    checks_model.memory,
    checks_model.kernels,
    checks_config.context_length,
    checks_config.micro_batch,
    checks_config.cache_size,
    checks_config.sampler,
)


def examine(
    model: str | os.PathLike[str] | None = None,
    params: LlamaParams | None = None,
    *,
    quick: bool = False,
    root: str | os.PathLike[str] = "/",
    affinity: Collection[int] | None = None,
    progress: Callable[[str], object] | None = None,
) -> Diagnosis:
    """Check this machine and build, and a configuration and a model where they are given.

    `model` is a path or a repository, as in `LlamaParams.model`, which counts where `model` is
    None; without either, no model is looked at. Its file is read for a moment and its settings are
    measured against their alternatives, which takes up to about a minute; `quick` leaves out both.
    `root` and `affinity` show another machine; then nothing is measured. `progress` is called with
    a line of text.

    Raises what `Llama` raises when the model is not found or cannot be read.
    """
    given = params or LlamaParams()
    if model is not None:
        given = given.replace(model=model)
    machine = Machine.read(root, affinity=affinity)
    facts, resolved = None, given
    if given.model is not None:
        facts, resolved = _look_at(given)
    subject = Subject(machine, Build.read(), given, resolved, facts)
    quick = quick or Path(root) != Path("/")
    return diagnose(subject, quick=quick, progress=progress or (lambda line: None))


def diagnose(
    subject: Subject, *, quick: bool = True, progress: Callable[[str], object] = lambda line: None
) -> Diagnosis:
    """Run all checks over a subject; see `examine`."""
    found = {finding.name: finding for rule in _RULES if (finding := rule(subject))}
    stored = checks_model.storage(subject, measure=not quick)
    if stored is not None:
        found[stored.name] = stored
    if not quick and _can_measure(subject, found):
        # What was measured counts for more than the rule of the same name.
        sane = _without_surplus_threads(subject, found)
        found.update((finding.name, finding) for finding in _measure(sane, progress))
    ranked = sorted(found.values(), key=lambda finding: SEVERITIES.index(finding.severity))
    return Diagnosis(tuple(ranked))


def _can_measure(subject: Subject, found: dict[str, Finding]) -> bool:
    if subject.model is None or subject.model.embeds:
        return False
    if (subject.n_gpu_layers or 0) > 0 and not subject.build.gpu_names:
        return False
    return found.get("memory", Finding("memory", "ok")).severity != "problem"


def _without_surplus_threads(subject: Subject, found: dict[str, Finding]) -> Subject:
    """Return the subject to measure: with too many threads a token can take seconds."""
    if found["threads"].severity != "problem":
        return subject
    return replace(subject, given=subject.given.replace(n_threads=None, n_threads_batch=None))


def _measure(subject: Subject, progress: Callable[[str], object]) -> list[Finding]:
    from .checks_measured import alternatives, measured

    try:
        return measured(subject, alternatives(subject), progress)
    except LlamaCrabError as error:
        said = "; ".join(str(error).splitlines())
        fix = "change what the message names"
        return [Finding("load", "problem", "this configuration does not load", said, fix)]


def _look_at(given: LlamaParams) -> tuple[ModelFacts, LlamaParams]:
    from ..llama import resolve_params
    from .bed import kv_bytes

    path = resolve_model(given.model)
    try:
        # vocab_only would leave out the hyperparameters and the quantisation.
        with _core.Model(str(path), no_alloc=True, load_mode="none") as model:
            resolved = resolve_params(given, model)
            parts = [path.with_name(name) for name in split_names(path.name)] or [path]
            facts = ModelFacts(
                path=path,
                size=sum(part.stat().st_size for part in parts),
                kv_bytes=0 if resolved.embeddings else kv_bytes(model, resolved),
                ftype=model.ftype,
                n_layer=model.n_layer,
                n_ctx_train=model.n_ctx_train,
                has_chat_template=model.chat_template() is not None,
                embeds=bool(resolved.embeddings),
            )
    finally:
        logs.flush()
    return facts, resolved
