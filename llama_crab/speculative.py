"""What speculative decoding may draft from: descriptions, and what a context makes of them."""

from __future__ import annotations

import os
from collections.abc import Mapping
from dataclasses import MISSING, dataclass, fields
from typing import Any, Protocol

from . import _core
from .param_rules import INT32_MAX, ParameterError, require_integer

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Sequence

    import numpy as np
    from numpy.typing import NDArray

# The core keeps no costs of batches beyond twice that.
MAX_DRAFT = 128
MAX_NGRAM = 16
# Output rows for drafts of all sequences together: each costs memory for two rows of logits.
_ROWS_OF_DRAFTS = 64
_KINDS = ("auto", "draft", "mtp", "eagle3")


def _require_bool(name: str, value: Any) -> None:
    if not isinstance(value, bool):
        raise ParameterError(f"speculative.{name}: expected True or False, not {value!r}")


def _require_path(name: str, value: Any) -> None:
    if value is not None and not isinstance(value, (str, os.PathLike)):
        raise ParameterError(f"speculative.{name}: expected a path, not {type(value).__name__}")


@dataclass(frozen=True)
class PromptLookupDecoding:
    """Draft what followed the last tokens where they occurred before, in prompt or answer.

    Parameters
    ----------
    max_ngram, min_ngram
        Tokens that have to agree: most are looked for first, 1 to 16.
    num_pred_tokens
        Tokens of a draft at most, 1 to 128.
    adaptive
        Choose the length of each draft by its measured worth, also none; else it is always
        `num_pred_tokens`.
    cache
        A file of n-grams learned from earlier answers, asked where the text itself has no match. It
        is made when it is missing, and written when the model is closed.

    Thread-safety: immutable.
    """

    max_ngram: int = 2
    num_pred_tokens: int = 8
    min_ngram: int = 1
    adaptive: bool = True
    cache: str | os.PathLike[str] | None = None

    def __post_init__(self) -> None:
        require_integer("speculative.max_ngram", self.max_ngram, (1, MAX_NGRAM))
        require_integer("speculative.min_ngram", self.min_ngram, (1, self.max_ngram))
        require_integer("speculative.num_pred_tokens", self.num_pred_tokens, (1, MAX_DRAFT))
        _require_bool("adaptive", self.adaptive)
        _require_path("cache", self.cache)


@dataclass(frozen=True)
class DraftModelDecoding:
    """Draft with a second, smaller model, or with heads for it in the model itself.

    Parameters
    ----------
    model
        The second GGUF; its vocabulary must be that of the first. None for heads in the model.
    num_pred_tokens, adaptive
        As in `PromptLookupDecoding`.
    kind
        ``"draft"``, ``"mtp"``, ``"eagle3"``, or ``"auto"`` for what the file is.
    n_gpu_layers, n_threads
        Of the second model; None for those of the first.

    Thread-safety: immutable.
    """

    model: str | os.PathLike[str] | None = None
    num_pred_tokens: int = 8
    kind: str = "auto"
    adaptive: bool = True
    n_gpu_layers: int | None = None
    n_threads: int | None = None

    def __post_init__(self) -> None:
        _require_path("model", self.model)
        require_integer("speculative.num_pred_tokens", self.num_pred_tokens, (1, MAX_DRAFT))
        if self.kind not in _KINDS:
            raise ParameterError(f"speculative.kind: {self.kind!r} is not one of {_KINDS}")
        _require_bool("adaptive", self.adaptive)
        for name in ("n_gpu_layers", "n_threads"):
            value = getattr(self, name)
            if value is not None:
                require_integer(f"speculative.{name}", value, (0, INT32_MAX))


class DraftModel(Protocol):
    """A drafter of your own: any callable of this form.

    Called before a batch, by whichever thread drives the loop, with the ids so far (int32, shape
    (n_tokens,), read-only, valid during the call) and the most tokens that are of use; returns ids
    that may follow, or none. A wrong one costs time and never changes the answer. An exception ends
    the request and is raised by it. Attributes ``num_pred_tokens`` and ``adaptive`` are read where
    there are any, with the meaning that they have in `PromptLookupDecoding`.
    """

    def __call__(self, tokens: NDArray[np.int32], n_max: int, /) -> Sequence[int]:
        """Return up to `n_max` token ids."""


Speculative = str | PromptLookupDecoding | DraftModelDecoding | DraftModel | None

AUTO = PromptLookupDecoding(max_ngram=4, num_pred_tokens=32)


def check_speculative(name: str, value: Any, _: None = None) -> Any:
    """Return what `value` stands for: a description, a callable, or None for no drafts."""
    if value is None or isinstance(value, (PromptLookupDecoding, DraftModelDecoding)):
        return value
    if isinstance(value, str) and value == "auto":
        return value
    if isinstance(value, Mapping):
        return _from_dict(name, value)
    if callable(value) and not isinstance(value, type):
        n = getattr(value, "num_pred_tokens", AUTO.num_pred_tokens)
        require_integer(f"{name}.num_pred_tokens", n, (1, MAX_DRAFT))
        _require_bool("adaptive", getattr(value, "adaptive", True))
        return value
    raise ParameterError(
        f'{name}: expected "auto", None, PromptLookupDecoding, DraftModelDecoding or a callable, '
        f"not {value!r}"
    )


def to_dict(value: Any) -> Any:
    """Return a description as plain JSON values, which `check_speculative` reads."""
    if value is None or isinstance(value, str):
        return value
    if not isinstance(value, (PromptLookupDecoding, DraftModelDecoding)):
        raise ParameterError(f"speculative: {value!r} cannot be written down")
    found = {
        item.name: getattr(value, item.name)
        for item in fields(value)
        if item.default is MISSING or getattr(value, item.name) != item.default
    }
    return {"kind_of": type(value).__name__} | {
        name: os.fspath(each) if isinstance(each, os.PathLike) else each
        for name, each in found.items()
    }


def from_text(text: str) -> Any:
    """Return what ``auto``, ``none``, ``lookup[:MAX_NGRAM[:N]]`` or ``FILE.gguf`` stands for.

    Raises `ParameterError` for anything else, and for a file that is not there.
    """
    if text in ("auto", "none"):
        return None if text == "none" else text
    kind, *numbers = text.split(":")
    if kind == "lookup" and len(numbers) <= 2 and all(map(_is_count, numbers)):
        found = PromptLookupDecoding()
        counts = [int(n) for n in numbers] + [found.max_ngram, found.num_pred_tokens][
            len(numbers) :
        ]
        return PromptLookupDecoding(counts[0], counts[1])
    if not text.lower().endswith(".gguf"):
        raise ParameterError(
            f"speculative: {text!r} is not auto, none, lookup[:MAX_NGRAM[:N]] or FILE.gguf"
        )
    if not os.path.isfile(text):
        raise ParameterError(f"speculative: there is no file {text}")
    return DraftModelDecoding(model=text)


def as_text(value: Any) -> str:
    """Return a name for a table: what `from_text` reads, and behind it what that cannot say."""
    if value is None or isinstance(value, str):
        return value or "none"
    if isinstance(value, PromptLookupDecoding):
        name, said = (
            f"lookup:{value.max_ngram}:{value.num_pred_tokens}",
            {"max_ngram", "num_pred_tokens"},
        )
    elif isinstance(value, DraftModelDecoding):
        path = None if value.model is None else os.path.basename(os.fspath(value.model))
        name, said = path or "heads", {"model"}
    else:
        return str(getattr(value, "__name__", type(value).__name__))
    more = [
        f"{item.name}={getattr(value, item.name)}"
        for item in fields(value)
        if item.name not in said and getattr(value, item.name) != item.default
    ]
    return f"{name} ({', '.join(more)})" if more else name


def n_draft_max(value: Any) -> int:
    """Return the most tokens that a draft may have."""
    if value is None:
        return 0
    return int(getattr(value, "num_pred_tokens", AUTO.num_pred_tokens))


def n_draft_rows(value: Any, n_seq_max: int) -> int:
    """Return the output rows that a context of `n_seq_max` sequences needs for drafts."""
    longest = n_draft_max(value)
    return min(longest * n_seq_max, max(longest, _ROWS_OF_DRAFTS))


class Drafts:
    """Makes of a description what the core needs, for the requests of one context.

    Raises `ParameterError` when the context cannot take drafts back.
    Thread-safety: any thread.
    """

    def __init__(
        self, default: Any, *, can_draft: bool, n_rows: int, cache: _core.NgramCache | None
    ) -> None:
        self._can_draft = can_draft
        self._n_rows = n_rows
        self._cache = cache
        self._default = default
        if not can_draft and default not in (None, "auto"):
            self._refuse()

    def choose(self, value: Any) -> tuple[_core.Speculation | None, DraftModel | None]:
        """Return what the core drafts from, and what Python asks; "default" is the context's."""
        own = value != "default"
        value = check_speculative("speculative", value) if own else self._default
        if value is None:
            return None, None
        if not self._can_draft:
            if own and value != "auto":
                self._refuse()
            return None, None
        if self._n_rows <= 0:
            raise ParameterError(
                "speculative: the context has no output rows for drafts; load the model with "
                'speculative="auto", or a larger n_outputs_max'
            )
        if isinstance(value, str):
            value = AUTO
        if isinstance(value, PromptLookupDecoding):
            return self._lookup(value), None
        if isinstance(value, DraftModelDecoding):
            if value != self._default:
                raise ParameterError("speculative: a draft model is loaded with the model only")
            n_max, fixed = value.num_pred_tokens, not value.adaptive
            return _core.Speculation(n_max, fixed=fixed, model=True), None
        fixed = not getattr(value, "adaptive", True)
        return _core.Speculation(n_draft_max(value), fixed=fixed, user=True), value

    def _lookup(self, value: PromptLookupDecoding) -> _core.Speculation:
        if value.cache is not None and value.cache != getattr(self._default, "cache", None):
            raise ParameterError("speculative.cache: it is opened with the model only")
        return _core.Speculation(
            value.num_pred_tokens,
            fixed=not value.adaptive,
            min_ngram=value.min_ngram,
            max_ngram=value.max_ngram,
            cache=self._cache if value.cache is not None else None,
        )

    def _refuse(self) -> None:
        raise ParameterError(
            "speculative: the state of a recurrent model cannot be taken back to before a draft"
        )


def _from_dict(name: str, value: Mapping[str, Any]) -> Any:
    kinds = {kind.__name__: kind for kind in (PromptLookupDecoding, DraftModelDecoding)}
    values = dict(value)
    kind = kinds.get(values.pop("kind_of", None))
    known = {item.name for item in fields(kind)} if kind else set()
    if kind is None or not known.issuperset(values):
        raise ParameterError(f"{name}: {value!r} is not what to_dict() returned")
    return kind(**values)


def _is_count(text: str) -> bool:
    return text.isascii() and text.isdecimal() and len(text) < 10
