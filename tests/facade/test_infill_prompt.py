"""Prompts for filling in the middle are llama-server's: layout, cutting, what is missing."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from llama_crab import ParameterError, _core
from llama_crab.infill import infill_prompt

BEFORE = "def add(a, b):\n    return "
AFTER = "\n\nprint(add(1, 2))\n"
EXTRA = [("one.py", "ONE = 1\n"), ("two.py", "TWO = 2\n")]
ROOM: Any = {"n_ctx": 4096, "n_batch": 512}
SNIPPET = "\n\n--- snippet ---\n\n"


@pytest.fixture(params=["deepseek-coder", "starcoder", "refact"])
def vocab(request: pytest.FixtureRequest, vocab_folder: Path) -> Iterator[_core.Vocab]:
    """Return vocabularies with FIM tokens: with a BOS, with neither, with FIM_REP."""
    path = vocab_folder / f"ggml-vocab-{request.param}.gguf"
    with _core.Model(path, vocab_only=True) as model:
        yield model.vocab


@pytest.fixture
def all_fim(tiny_fim_path: Path) -> Iterator[_core.Vocab]:
    """Return a vocabulary with all six FIM tokens and a BOS."""
    with _core.Model(tiny_fim_path, vocab_only=True) as model:
        yield model.vocab


def plain(vocab: _core.Vocab, text: str) -> list[int]:
    return vocab.tokenize(text, False, False)


def bos(vocab: _core.Vocab) -> list[int]:
    return [vocab.bos] if vocab.add_bos and vocab.bos is not None else []


def test_prefix_and_suffix_around_the_gap(vocab: _core.Vocab) -> None:
    found = infill_prompt(vocab, BEFORE, AFTER, **ROOM)
    repository = [] if vocab.fim_rep is None else [vocab.fim_rep, *plain(vocab, "myproject\n")]
    assert found == [
        *(*repository, *bos(vocab)),
        *(vocab.fim_pre, *plain(vocab, BEFORE)),
        *(vocab.fim_suf, *plain(vocab, AFTER)),
        vocab.fim_mid,
    ]


def test_the_suffix_can_come_first(vocab: _core.Vocab) -> None:
    found = infill_prompt(vocab, BEFORE, AFTER, prompt="a +", spm_infill=True, **ROOM)
    middle = vocab.tokenize("a +", False, True)
    expected = [
        *(*bos(vocab), vocab.fim_suf, *plain(vocab, AFTER)),
        *(vocab.fim_pre, *plain(vocab, BEFORE), *middle),
        vocab.fim_mid,
    ]
    assert found[-len(expected) :] == expected


def test_other_files_without_a_separator_token(vocab: _core.Vocab) -> None:
    found = infill_prompt(vocab, BEFORE, AFTER, extra=EXTRA, **ROOM)
    bare = infill_prompt(vocab, BEFORE, AFTER, **ROOM)
    files = []
    for _, text in EXTRA:
        files += plain(vocab, SNIPPET) + plain(vocab, text)
    n_repository = 0 if vocab.fim_rep is None else 1 + len(plain(vocab, "myproject\n"))
    assert vocab.fim_sep is None
    assert found == [*bare[:n_repository], *files, *bare[n_repository:]]


def test_other_files_of_a_repository(all_fim: _core.Vocab) -> None:
    vocab = all_fim
    found = infill_prompt(
        vocab, BEFORE, AFTER, extra=EXTRA, repository="crab", filename="add.py", **ROOM
    )
    assert found == [
        *(vocab.fim_rep, *plain(vocab, "crab\n")),
        *(vocab.fim_sep, *plain(vocab, "one.py\n"), *plain(vocab, "ONE = 1\n")),
        *(vocab.fim_sep, *plain(vocab, "two.py\n"), *plain(vocab, "TWO = 2\n")),
        *(vocab.fim_sep, *plain(vocab, "add.py\n")),
        *(vocab.bos, vocab.fim_pre, *plain(vocab, BEFORE)),
        *(vocab.fim_suf, *plain(vocab, AFTER)),
        vocab.fim_mid,
    ]


def test_special_tokens_are_read_in_the_prompt_alone(all_fim: _core.Vocab) -> None:
    text = "<|fim_middle|>"
    found = infill_prompt(all_fim, text, text, extra=[(text, text)], **ROOM)
    assert found.count(all_fim.fim_mid) == 1
    found = infill_prompt(all_fim, text, text, prompt=text, **ROOM)
    assert found.count(all_fim.fim_mid) == 2


def test_ids_are_taken_as_they_are(all_fim: _core.Vocab) -> None:
    ids = plain(all_fim, BEFORE), plain(all_fim, AFTER)
    assert infill_prompt(all_fim, *ids, **ROOM) == infill_prompt(all_fim, BEFORE, AFTER, **ROOM)


@pytest.mark.parametrize("n_batch", [1, 3, 4, 7, 8, 30, 32, 64, 400])
@pytest.mark.parametrize("prompt", ["", "a +"])
def test_prefix_and_suffix_are_cut_to_a_batch(
    all_fim: _core.Vocab, n_batch: int, prompt: str
) -> None:
    vocab = all_fim
    prefix, suffix = list(range(300, 400)), list(range(400, 500))
    middle = vocab.tokenize(prompt, False, True)
    found = infill_prompt(vocab, prefix, suffix, prompt=prompt, n_ctx=4096, n_batch=n_batch)
    n_prefix = min(100, 3 * (n_batch // 4))
    n_suffix = min(100, max(0, n_batch // 4 - 2 - len(middle)))
    expected = [
        *(vocab.bos, vocab.fim_pre, *prefix[100 - n_prefix :], *middle),
        *(vocab.fim_suf, *suffix[:n_suffix]),
        vocab.fim_mid,
    ]
    assert found[-len(expected) :] == expected


@pytest.mark.parametrize("n_ctx", [16, 64, 65, 66, 67, 200])
@pytest.mark.parametrize("n_batch", [16, 64, 4096])
@pytest.mark.parametrize("n_predict", [0, 1, 7])
@pytest.mark.parametrize("spm_infill", [False, True])
def test_prompt_and_answer_fit_the_context(
    all_fim: _core.Vocab, n_ctx: int, n_batch: int, n_predict: int, spm_infill: bool
) -> None:
    long = list(range(300, 600))
    found = infill_prompt(
        *(all_fim, long, long),
        n_ctx=n_ctx,
        n_batch=n_batch,
        extra=EXTRA * 100,
        n_predict=n_predict,
        spm_infill=spm_infill,
    )
    room = n_ctx - n_predict
    # What is rounded off is less than 4 tokens of prefix and suffix; and room for two answers is
    # kept from the extra files.
    assert room - 4 - n_predict <= len(found) <= room


@pytest.mark.parametrize(
    ("n_ctx", "n_predict"), [(512, 0), (520, 0), (520, 3), (520, 50), (1000, 0)]
)
def test_other_files_keep_their_end(all_fim: _core.Vocab, n_ctx: int, n_predict: int) -> None:
    def prompt(n_ctx: int, n_predict: int = 0) -> list[int]:
        return infill_prompt(
            all_fim, BEFORE, AFTER, extra=EXTRA, n_ctx=n_ctx, n_batch=512, n_predict=n_predict
        )

    whole, gap = prompt(4096), prompt(512)
    n_files = len(whole) - len(gap)
    n_kept = min(n_files, max(0, n_ctx - 512 - 2 * n_predict))
    assert prompt(n_ctx, n_predict) == whole[n_files - n_kept :]


@pytest.mark.parametrize("name", ["qwen2", "gpt-2", "llama-spm"])
def test_models_without_the_tokens_are_refused(vocab_folder: Path, name: str) -> None:
    path = vocab_folder / f"ggml-vocab-{name}.gguf"
    with (
        _core.Model(path, vocab_only=True) as model,
        pytest.raises(ParameterError, match="infill: the model has no FIM_PRE token"),
    ):
        infill_prompt(model.vocab, BEFORE, AFTER, **ROOM)


@pytest.mark.parametrize("field", ["n_ctx", "n_batch", "n_predict"])
def test_sizes_are_checked(all_fim: _core.Vocab, field: str) -> None:
    for value in (-1, 2**31, 1.5, None):
        with pytest.raises(ParameterError, match=field):
            infill_prompt(all_fim, BEFORE, AFTER, **{**ROOM, field: value})
