"""What drafts come from beside the text itself: a file of n-grams, a second model."""

from __future__ import annotations

import logging
from pathlib import Path
from typing import Any, cast

from . import _core
from .errors import StateError
from .params import LlamaParams
from .speculative import DraftModelDecoding, PromptLookupDecoding

# 16 MiB: some hundred thousand tokens of answers.
_N_NGRAMS = 1 << 20
_log = logging.getLogger("llama_crab.speculative")


class DraftSources:
    """The n-gram cache and the draft model that a model's parameters name.

    Raises `DraftModelError`, `ModelLoadError`, `ModelNotFoundError`, `ContextCreateError`.
    Thread-safety: none; its `Llama`'s.
    """

    def __init__(self, params: LlamaParams, stepper: _core.Stepper) -> None:
        self.cache: _core.NgramCache | None = None
        self._path: Path | None = None
        self._model: _core.Model | None = None
        self._draft_model: _core.DraftModel | None = None
        self._key = 0  # of the vocabulary, for the cache's file
        wanted = params.speculative
        if isinstance(wanted, PromptLookupDecoding) and wanted.cache is not None:
            self._open_cache(Path(wanted.cache), stepper.context.model.vocab)
        elif isinstance(wanted, DraftModelDecoding) and stepper.can_draft:
            self._open_model(wanted, params, stepper)

    def close(self) -> None:
        """Write what was learned and free the draft model. Idempotent."""
        path, self._path = self._path, None
        if self.cache is not None and path is not None:
            try:
                path.parent.mkdir(parents=True, exist_ok=True)
                self.cache.save(path, self._key)
            except OSError as error:
                _log.warning("what was learned for drafts is lost: %s", error)
        if self._draft_model is not None:
            self._draft_model.close()
        if self._model is not None:
            self._model.close()

    def _open_cache(self, path: Path, vocab: _core.Vocab) -> None:
        self.cache, self._path, self._key = _core.NgramCache(_N_NGRAMS), path, vocab_key(vocab)
        if not path.exists():
            return
        try:
            self.cache.load(path, self._key, vocab.n_tokens)
        except (StateError, OSError) as error:
            _log.warning("drafts begin anew: %s", error)

    def _open_model(
        self, wanted: DraftModelDecoding, params: LlamaParams, stepper: _core.Stepper
    ) -> None:
        kind = wanted.kind
        if wanted.model is None:
            kind = "mtp"
        else:
            from .llama import open_model

            self._model, _ = open_model(
                LlamaParams(
                    wanted.model,
                    n_gpu_layers=wanted.n_gpu_layers,
                    n_ctx=params.n_ctx,
                    load_mtp=True if kind == "mtp" else None,
                )
            )
            if kind == "auto":
                architecture = self._model.metadata.get("general.architecture", "")
                kind = "eagle3" if architecture == "eagle3" else "draft"
        threads: dict[str, Any] = {}
        if wanted.n_threads:
            threads = {"n_threads": wanted.n_threads, "n_threads_batch": wanted.n_threads}
        try:
            self._draft_model = _core.DraftModel(
                stepper.context,
                self._model,
                cast("Any", kind),
                wanted.num_pred_tokens,
                **threads,
            )
        except BaseException:
            self.close()
            raise
        stepper.set_draft_model(self._draft_model)


def vocab_key(vocab: _core.Vocab) -> int:
    """Return a number that is the same for equal vocabularies."""
    import hashlib  # not at import time: it costs as much as all of our own modules

    digest = hashlib.blake2b(digest_size=8)
    digest.update(str(vocab.n_tokens).encode())
    for token in range(0, vocab.n_tokens, max(1, vocab.n_tokens // 4096)):
        digest.update(vocab.piece(token, True) + b"\0")
    return int.from_bytes(digest.digest(), "little")
