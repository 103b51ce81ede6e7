"""Fill in the middle: the prompt of what comes before and after a gap, and of other files.

The layout and the cutting are llama-server's, so that models see what they see there.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence

from . import _core
from .params import INT32_MAX, ParameterError, require_integer

# Comes before each other file where the vocabulary has no token for that.
_SNIPPET = "\n\n--- snippet ---\n\n"
_TOKENS_BESIDE_SUFFIX = 2
# llama-server leaves no room for BOS and the last marker, and fails where they do not fit.
_TOKENS_FORGOTTEN = 2


def infill_prompt(
    vocab: _core.Vocab,
    prefix: str | Sequence[int],
    suffix: str | Sequence[int],
    *,
    n_ctx: int,
    n_batch: int,
    prompt: str = "",
    extra: Iterable[tuple[str, str]] = (),
    n_predict: int = 0,
    spm_infill: bool = False,
    repository: str = "myproject",
    filename: str = "filename",
) -> list[int]:
    """Return the ids of a fill-in-the-middle prompt.

    ::

        [FIM_REP]repository
        [FIM_SEP]name of the first extra file
        its text
        ...
        [FIM_SEP]filename
        [BOS][FIM_PRE]prefix prompt[FIM_SUF]suffix[FIM_MID]

    FIM_REP, FIM_SEP and BOS appear as far as the vocabulary has them; without FIM_SEP a line
    ``--- snippet ---`` comes before each extra file and its name is left out.

    Parameters
    ----------
    prefix, suffix
        Text before and after the gap; special tokens written in it are not read. Or token ids.
    n_ctx, n_batch
        What must hold the prompt. The prefix keeps its last 3/4 of `n_batch` tokens, the suffix its
        first 1/4 less what `prompt` and two markers take, the extra files their last
        ``n_ctx - n_batch - 2 * n_predict``; all of them less where `n_ctx` would be exceeded.
    prompt
        Beginning of what is to be filled in; special tokens in it are read.
    extra
        Other files as (filename, text).
    n_predict
        Tokens to be generated; room is kept for them. 0 for an unknown number.
    spm_infill
        The suffix first: ``[FIM_SUF]suffix[FIM_PRE]prefix prompt[FIM_MID]``.
    repository, filename
        Names for the lines above.

    Raises `ParameterError` when the model has no fill-in-the-middle tokens; `TokenizeError`.
    """
    require_integer("n_ctx", n_ctx, (1, INT32_MAX))
    require_integer("n_batch", n_batch, (1, INT32_MAX))
    require_integer("n_predict", n_predict, (0, INT32_MAX))
    fim_pre = _required(vocab.fim_pre, "FIM_PRE")
    fim_suf = _required(vocab.fim_suf, "FIM_SUF")
    fim_mid = _required(vocab.fim_mid, "FIM_MID")
    begin = vocab.tokenize(prompt, False, True)
    n_most = n_ctx - n_predict
    n_gap = max(0, min(n_batch, n_most - _TOKENS_FORGOTTEN))
    n_prefix = 3 * (n_gap // 4)
    n_suffix = max(0, n_gap // 4 - _TOKENS_BESIDE_SUFFIX - len(begin))
    before = [fim_pre, *_last(_ids(vocab, prefix), n_prefix), *begin]
    after = [fim_suf, *_ids(vocab, suffix)[:n_suffix]]
    gap = [
        *([vocab.bos] if vocab.add_bos and vocab.bos is not None else []),
        *(after + before if spm_infill else before + after),
        fim_mid,
    ]
    n_others = max(0, min(n_ctx - n_batch - 2 * n_predict, n_most - len(gap)))
    return _last(_others(vocab, extra, repository, filename), n_others) + gap


def _required(token: int | None, name: str) -> int:
    if token is None:
        raise ParameterError(f"infill: the model has no {name} token")
    return token


def _others(
    vocab: _core.Vocab, extra: Iterable[tuple[str, str]], repository: str, filename: str
) -> list[int]:
    """Return all that comes before the file with the gap, uncut."""

    def plain(text: str) -> list[int]:
        return vocab.tokenize(text, False, False)

    found: list[int] = []
    if vocab.fim_rep is not None:
        found += [vocab.fim_rep, *plain(f"{repository}\n")]
    for name, text in extra:
        if vocab.fim_sep is None:
            found += plain(_SNIPPET)
        else:
            found += [vocab.fim_sep, *plain(f"{name}\n")]
        found += plain(text)
    if vocab.fim_sep is not None:
        found += [vocab.fim_sep, *plain(f"{filename}\n")]
    return found


def _ids(vocab: _core.Vocab, text: str | Sequence[int]) -> list[int]:
    return vocab.tokenize(text, False, False) if isinstance(text, str) else list(text)


def _last(ids: list[int], n: int) -> list[int]:
    return ids[max(0, len(ids) - n) :]
