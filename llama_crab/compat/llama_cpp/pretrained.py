"""Files of a Hugging Face repository, chosen by llama-cpp-python's patterns."""

from __future__ import annotations

import os
from collections.abc import Iterable
from fnmatch import fnmatch
from pathlib import Path, PurePosixPath
from typing import Any

from ...errors import ModelNotFoundError
from ...hub import split_names
from ...params import ParameterError


def fetch(
    repo_id: str,
    filename: str | None,
    additional_files: Iterable[str],
    local_dir: str | os.PathLike[str] | None,
    cache_dir: str | os.PathLike[str] | None,
) -> str:
    """Fetch the file that `filename` matches, with the parts it is split into; return its path.

    Raises ImportError without huggingface_hub, `ModelNotFoundError` when not exactly one file fits
    (of a split model only the first part counts), and what huggingface_hub raises.
    """
    try:
        import huggingface_hub as hub
    except ImportError as error:
        raise ImportError(
            'Llama.from_pretrained needs huggingface_hub: pip install "llama-crab[hub]"',
            name="huggingface_hub",
        ) from error
    if filename is None:
        raise ParameterError("filename: expected a file's name or a pattern, not None")
    names: list[str] = hub.HfApi().list_repo_files(repo_id)
    chosen = [_match(repo_id, names, filename)]
    chosen += _other_parts(chosen[0])
    chosen += [_match(repo_id, names, pattern) for pattern in additional_files]
    where: dict[str, Any] = {"local_dir": local_dir, "cache_dir": cache_dir}
    paths = [
        hub.hf_hub_download(repo_id, name, **{key: at for key, at in where.items() if at})
        for name in dict.fromkeys(chosen)
    ]
    return os.fspath(Path(paths[0]))


def _match(repo_id: str, names: list[str], pattern: str) -> str:
    found = [name for name in names if fnmatch(name, pattern)]
    firsts = [name for name in found if name not in _later_parts(found)]
    if len(firsts) == 1:
        return firsts[0]
    what = "several files" if firsts else "no file"
    listed = ", ".join(firsts or names)
    raise ModelNotFoundError(f"{repo_id} has {what} matching {pattern}: {listed}")


def _other_parts(name: str) -> list[str]:
    path = PurePosixPath(name)
    return [str(path.with_name(part)) for part in split_names(path.name) if part != path.name]


def _later_parts(names: Iterable[str]) -> set[str]:
    later: set[str] = set()
    for name in names:
        parts = split_names(PurePosixPath(name).name)
        if parts and PurePosixPath(name).name == parts[0]:
            later.update(_other_parts(name))
    return later
