"""What tuning found, kept for later: `Profile`, a JSON file.

A profile holds for one model file, one machine and one build: speeds of another say nothing. Those
that `tune` saves lie in the user's cache folder, one per model, machine, build and goal.
"""

from __future__ import annotations

import functools
import json
import os
import threading
from collections.abc import Iterator, Mapping
from dataclasses import asdict, dataclass, field
from pathlib import Path

from .. import _core
from ..hub import resolve_model, split_names
from ..model_identity import file_identity
from ..packaged import cache_dir
from ..params import LlamaParams, ParameterError
from .probe import default_n_threads

TYPE_CHECKING = False
if TYPE_CHECKING:
    from typing import Any

GOALS = ("latency", "throughput", "ttft")
# What a profile may set: the levers of `tune` and the fields that go with them, each kind together.
_KINDS = (
    ("n_threads", "n_threads_batch"),
    ("n_batch", "n_ubatch"),
    ("n_seq_max",),
    ("n_gpu_layers",),
    ("flash_attn_type", "type_k", "type_v"),
)
PROFILE_FIELDS = tuple(name for kind in _KINDS for name in kind)
_FORMAT = 1


class ProfileError(ParameterError):
    """A profile's file cannot be read, or is of another model."""


@dataclass(frozen=True)
class Profile:
    """Settings that were measured as the fastest, and what they hold for.

    ``params`` has the fields of `LlamaParams` that differ from the defaults, so it is empty where
    the defaults are best. ``measured`` keeps the figures of the final check.
    Thread-safety: immutable.
    """

    goal: str
    model: str
    """`file_identity` of the model"""
    machine: Mapping[str, Any]
    build: Mapping[str, Any]
    params: Mapping[str, Any]
    model_name: str = ""
    created: str = ""
    """when, in ISO 8601"""
    unfinished: bool = False
    measured: Mapping[str, Any] = field(default_factory=dict)

    def mismatch(self, model: str) -> str | None:
        """Return in words what this profile does not hold for, None if it holds here."""
        if self.model != model:
            return "another model"
        for name, mine, here in (
            ("machine", self.machine, machine_facts()),
            ("build", self.build, build_facts()),
        ):
            for key in here:
                if mine.get(key) != here[key]:
                    return f"another {name} ({key}: {_brief(mine.get(key))}, {_brief(here[key])})"
        return None

    def apply(self, params: LlamaParams) -> LlamaParams:
        """Return `params` with what they leave open taken from here.

        The number of sequences is left alone where ``n_ctx`` is set: that room was not meant to be
        divided.
        """
        changes = {name: value for name, value in self.params.items() if not _set(params, name)}
        if params.n_ctx is not None:
            changes.pop("n_seq_max", None)
        if params.n_threads is not None and params.n_threads_batch is None:
            # The batch threads follow n_threads, and so they should those of the user.
            changes.pop("n_threads_batch", None)
        return _fitting(params, changes)

    def save(self, path: str | os.PathLike[str] | None = None) -> Path:
        """Write it as JSON, to the user's cache folder by default; return where it is.

        Raises OSError where that cannot be written.
        """
        target = self.default_path() if path is None else Path(path)
        target.parent.mkdir(parents=True, exist_ok=True)
        # Written aside and moved, so that a reader never sees half of it; by each thread elsewhere.
        whole = target.with_name(f".{target.name}.{os.getpid()}.{threading.get_ident()}")
        try:
            whole.write_text(json.dumps({"format": _FORMAT, **asdict(self)}, indent=1) + "\n")
            os.replace(whole, target)
        except OSError:
            whole.unlink(missing_ok=True)
            raise
        return target

    def default_path(self) -> Path:
        """Return where `save` puts it: a name made of all that it holds for."""
        import hashlib

        place = json.dumps([self.machine, self.build], sort_keys=True)
        digest = hashlib.blake2b(place.encode(), digest_size=6).hexdigest()
        return _folder() / f"{self.model}.{self.goal}.{digest}.json"

    @classmethod
    def load(cls, path: str | os.PathLike[str]) -> Profile:
        """Read a file that `save` wrote. Raises `ProfileError` where it is none."""
        try:
            values = json.loads(Path(path).read_text(encoding="utf-8"))
        except OSError as error:
            raise ProfileError(f"profile: cannot read {path} ({error.strerror})") from error
        except (ValueError, RecursionError) as error:
            raise ProfileError(f"profile: {path} is damaged ({error})") from error
        if not isinstance(values, dict) or values.pop("format", None) != _FORMAT:
            raise ProfileError(f"profile: {path} is no profile of format {_FORMAT}")
        try:
            found = cls(**values)
            unknown = set(found.params) - set(PROFILE_FIELDS)
            facts = (found.machine, found.build, found.measured)
            texts = (found.model, found.model_name, found.created)
            if unknown or not all(isinstance(item, dict) for item in facts):
                raise ParameterError(", ".join(sorted(unknown)) or "machine, build, measured")
            if not all(isinstance(item, str) for item in texts):
                raise ParameterError("model, model_name, created")
            if found.goal not in GOALS:
                raise ParameterError(f"goal {found.goal!r}")
            LlamaParams(**found.params)
        except (TypeError, ValueError) as error:
            raise ProfileError(f"profile: {path} is damaged ({error})") from error
        return found


def apply_profile(params: LlamaParams) -> LlamaParams:
    """Return `params` with what they leave open taken from the profile they name, if it holds.

    "auto" is the newest that fits model, machine and build; the name of a goal, that goal's. A
    file of another model is a `ProfileError`, as is one that cannot be read; one of another
    machine or build is left unused with a warning.
    """
    import logging

    logger = logging.getLogger("llama_crab.tuning")
    if params.profile is None:
        return params
    wanted = os.fspath(params.profile)
    identity = identity_of(params.model)
    if wanted == "auto" or wanted in GOALS:
        found = find_profile(identity, None if wanted == "auto" else wanted)
        if found is None:
            logger.debug("no profile %r for this model: the defaults are used", wanted)
            return params
        logger.debug("profile for %s of %s: %s", found.goal, found.created, dict(found.params))
        return found.apply(params)
    if not os.path.exists(wanted):
        names = ", ".join(("auto", *GOALS))
        raise ProfileError(f"profile: {wanted!r} is neither a file nor one of {names}")
    found = Profile.load(wanted)
    why = found.mismatch(identity)
    if why is None:
        return found.apply(params)
    if why == "another model":
        raise ProfileError(f"profile: {wanted} is of another model ({found.model_name})")
    logger.warning("profile %s is of %s: the defaults are used", wanted, why)
    return params


def find_profile(identity: str, goal: str | None = None) -> Profile | None:
    """Return the newest saved profile that holds here, of one goal or of any.

    Says so in a warning where there are only profiles of another machine or build.
    """
    import logging

    logger = logging.getLogger("llama_crab.tuning")
    fitting: list[Profile] = []
    reasons: list[str] = []
    for profile in _saved(identity, goal):
        why = profile.mismatch(identity)
        if why is None:
            fitting.append(profile)
        else:
            reasons.append(why)
    if not fitting and reasons:
        logger.warning(
            "the saved profile is of %s: the defaults are used, `llama-crab tune` makes a new one",
            reasons[-1],
        )
    return max(fitting, key=_when, default=None)


def _saved(identity: str, goal: str | None) -> Iterator[Profile]:
    import logging

    for path in sorted(_folder().glob(f"{identity}.{goal or '*'}.*.json")):
        try:
            yield Profile.load(path)
        except ProfileError as error:
            logging.getLogger("llama_crab.tuning").warning("%s: it is ignored", error)


def identity_of(model: str | os.PathLike[str] | None) -> str:
    """Return the identity of a model's files, found as `Llama` finds them."""
    path = resolve_model(model)
    names = split_names(path.name)
    return file_identity([path.with_name(name) for name in names] or [path])


@functools.cache
def machine_facts() -> dict[str, Any]:
    """Return what of the machine decides speeds: devices, cores to use, the GPU's driver."""
    devices = [[item.backend, item.description.strip()] for item in _core.devices()]
    return {"devices": devices, "n_threads": default_n_threads(), "driver": _driver()}


def build_facts() -> dict[str, Any]:
    """Return what of the build decides speeds: llama.cpp, backend, instruction sets."""
    return {
        "llama_cpp": _core.build_commit(),
        "backend": _core.build_backend(),
        "isa": _core.system_info(),
    }


def _driver() -> str:
    try:
        lines = Path("/proc/driver/nvidia/version").read_text().splitlines()
    except OSError:
        return ""
    return lines[0].strip() if lines else ""


def _folder() -> Path:
    return cache_dir() / "profiles"


def _set(params: LlamaParams, name: str) -> bool:
    return getattr(params, name) is not None


def _fitting(params: LlamaParams, changes: dict[str, Any]) -> LlamaParams:
    """Return `params` with `changes`; without those of a kind that what the user set excludes."""
    for kind in _KINDS:
        try:
            params = params.replace(**{name: changes[name] for name in kind if name in changes})
        except ParameterError:
            continue
    return params


def _when(profile: Profile) -> float:
    """Return the time of its making, 0 where it does not say; zones may differ."""
    from datetime import datetime

    try:
        return datetime.fromisoformat(profile.created).timestamp()
    except (ValueError, OverflowError):
        return 0.0


def _brief(value: object) -> str:
    text = str(value)
    return text if len(text) <= 60 else text[:57] + "..."
