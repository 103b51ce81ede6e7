"""Vocab: tokenisers against llama.cpp's golden files, round trips, pieces, special ids."""

from __future__ import annotations

import array
import os
import random
from pathlib import Path
from types import ModuleType

import gguf
import numpy as np
import pytest

from llama_crab import _core, errors

ROOT = Path(__file__).resolve().parents[2]
MODELS = Path(os.environ.get("LLAMA_CPP_DIR") or ROOT / "third_party" / "llama.cpp") / "models"
GOLDEN = sorted(path.name.removesuffix(".inp") for path in MODELS.glob("*.gguf.inp"))
SEPARATOR = b"\n__ggml_vocab_test__\n"


def test_golden_files_are_there() -> None:
    assert len(GOLDEN) >= 15


@pytest.mark.parametrize("name", GOLDEN)
def test_ids_equal_the_golden_file(name: str) -> None:
    texts = (MODELS / f"{name}.inp").read_bytes().removesuffix(SEPARATOR).split(SEPARATOR)
    lines = (MODELS / f"{name}.out").read_text(encoding="utf-8").splitlines()
    expected = [[int(word) for word in line.split()] for line in lines]
    with _core.Model(MODELS / name, vocab_only=True) as model:
        found = [model.vocab.tokenize(text, False, False) for text in texts]
    assert len(texts) == len(expected) > 30
    for text, ids, golden in zip(texts, found, expected, strict=True):
        assert ids == golden, text


TEXTS = [
    "",
    " ",
    "Hello world",
    "  two  spaces\tand tab\n\nlines\r\n",
    "Füße, naïve, 中文, русский, 🦀🦙",
    "<s> </s> <|im_start|> <end_of_turn>",
    "\0 inside",
    "".join(map(chr, range(32, 0x250))),
]


@pytest.mark.parametrize("text", TEXTS)
def test_byte_level_bpe_round_trips_every_text(smol: _core.Model, text: str) -> None:
    vocab = smol.vocab
    ids = vocab.tokenize(text, False, False)
    assert vocab.detokenize(ids, False, True) == text.encode()
    assert b"".join(vocab.piece(token, True) for token in ids) == text.encode()


@pytest.mark.parametrize("text", TEXTS)
def test_sentencepiece_round_trips_every_text(gemma: _core.Model, text: str) -> None:
    vocab = gemma.vocab
    ids = vocab.tokenize(text, False, False)
    assert vocab.detokenize(ids, False, True) == text.encode()


def test_broken_utf8_survives_byte_level_bpe_as_replacement(smol: _core.Model) -> None:
    ids = smol.vocab.tokenize(b"ab\xff\xfecd", False, False)
    text = smol.vocab.detokenize(ids, False, True)
    assert text.startswith(b"ab")
    assert text.endswith(b"cd")
    assert smol.vocab.tokenize("a\ud800b", False, False) == smol.vocab.tokenize("a?b", False, False)


@pytest.mark.parametrize("which", ["smol", "gemma"])
def test_a_text_of_1_mb(which: str, request: pytest.FixtureRequest) -> None:
    vocab = request.getfixturevalue(which).vocab
    rng = random.Random(7)
    words = ["the", "quick", "Füße", "中文", "🦀", "fox\n", "12345", "def f(x):"]
    text = " ".join(rng.choice(words) for _ in range(170_000))
    assert len(text.encode()) > 1_000_000
    ids = vocab.tokenize(text, False, False)
    assert vocab.detokenize(ids, False, True).decode() == text
    assert vocab.detokenize(np.array(ids, np.int32), False, True).decode() == text


def test_one_word_of_100_kb_without_a_space(smol: _core.Model) -> None:
    text = "ab" * 50_000
    ids = smol.vocab.tokenize(text, False, False)
    assert smol.vocab.detokenize(ids, False, True) == text.encode()


def test_special_tokens_are_added_and_parsed_only_when_asked(smol: _core.Model) -> None:
    vocab = smol.vocab
    start = vocab.tokenize("<|im_start|>", False, True)
    assert len(start) == 1
    assert vocab.is_control(start[0])
    assert len(vocab.tokenize("<|im_start|>", False, False)) > 1
    assert vocab.piece(start[0], False) == b""
    assert vocab.piece(start[0], True) == b"<|im_start|>"
    assert vocab.detokenize(start, False, False) == b""
    assert vocab.detokenize(start, False, True) == b"<|im_start|>"


def test_bos_is_added_as_the_model_asks_and_removed(gemma: _core.Model) -> None:
    vocab = gemma.vocab
    assert vocab.add_bos
    ids = vocab.tokenize("Hi", True, False)
    assert ids == [vocab.bos, *vocab.tokenize("Hi", False, False)]
    assert vocab.detokenize(ids, True, True) == b"Hi"
    assert vocab.detokenize(ids, False, True) == b"<bos>Hi"


def test_special_ids_are_those_of_the_metadata(smol: _core.Model, gemma: _core.Model) -> None:
    for model in (smol, gemma):
        for ours, key in (
            (model.vocab.bos, "tokenizer.ggml.bos_token_id"),
            (model.vocab.eos, "tokenizer.ggml.eos_token_id"),
            (model.vocab.pad, "tokenizer.ggml.padding_token_id"),
        ):
            assert ours == int(model.metadata[key])
    assert smol.vocab.fim_pre is None or smol.vocab.text(smol.vocab.fim_pre)
    assert gemma.vocab.eot is not None
    assert gemma.vocab.text(gemma.vocab.eot) == "<end_of_turn>"


def test_fim_ids_of_a_code_model() -> None:
    with _core.Model(MODELS / "ggml-vocab-refact.gguf", vocab_only=True) as model:
        vocab = model.vocab
        ids = (vocab.fim_pre, vocab.fim_suf, vocab.fim_mid, vocab.fim_pad)
        assert [None if i is None else vocab.text(i) for i in ids] == [
            "<fim_prefix>",
            "<fim_suffix>",
            "<fim_middle>",
            "<fim_pad>",
        ]


def test_bert_has_separator_and_mask() -> None:
    with _core.Model(MODELS / "ggml-vocab-bert-bge.gguf", vocab_only=True) as model:
        vocab = model.vocab
        assert vocab.type == "wpm"
        assert vocab.sep is not None
        assert vocab.text(vocab.sep) == "[SEP]"
        assert vocab.tokenize("hi", True, False)[0] == vocab.bos


def test_eog_tokens_are_those_that_is_eog_names(smol: _core.Model) -> None:
    vocab = smol.vocab
    assert vocab.eog_tokens == tuple(t for t in range(len(vocab)) if vocab.is_eog(t))
    assert vocab.eos in vocab.eog_tokens


def test_texts_scores_and_attributes_equal_the_file(
    tiny: _core.Model, tiny_gguf: ModuleType, vocab_folder: Path
) -> None:
    tokens = tiny_gguf.spm_tokens(vocab_folder / "ggml-vocab-llama-spm.gguf")
    names = {
        gguf.TokenType.NORMAL: "normal",
        gguf.TokenType.UNKNOWN: "unknown",
        gguf.TokenType.CONTROL: "control",
        gguf.TokenType.BYTE: "byte",
    }
    vocab = tiny.vocab
    assert vocab.n_tokens == len(vocab) == len(tokens.texts)
    for i, (text, score, kind) in enumerate(
        zip(tokens.texts, tokens.scores, tokens.types, strict=True)
    ):
        assert vocab.text(i) == text.decode()
        assert vocab.score(i) == pytest.approx(score)
        assert names[gguf.TokenType(kind)] in vocab.attrs(i)
        assert vocab.is_control(i) == (kind == gguf.TokenType.CONTROL)
    assert vocab.piece(3 + 0xE9, False) == b"\xe9"  # byte tokens give their byte


def test_lstrip_drops_leading_spaces(tiny: _core.Model) -> None:
    token = next(t for t in range(259, 600) if tiny.vocab.text(t).startswith("▁▁"))
    whole = tiny.vocab.piece(token, False)
    assert tiny.vocab.piece(token, False, 1) == whole[1:]


@pytest.mark.parametrize("token", [-1, 759, 1 << 31, -(1 << 40)])
def test_ids_outside_the_vocabulary_are_refused(tiny: _core.Model, token: int) -> None:
    vocab = tiny.vocab
    for call in (vocab.text, vocab.score, vocab.attrs, vocab.is_eog, vocab.is_control):
        with pytest.raises(errors.InvalidTokenError):
            call(token)
    with pytest.raises(errors.InvalidTokenError):
        vocab.piece(token, True)
    with pytest.raises(errors.InvalidTokenError):
        vocab.detokenize([1, token], False, False)


def test_token_sequences_of_every_kind(tiny: _core.Model) -> None:
    ids = tiny.vocab.tokenize("a bc", False, False)
    expected = tiny.vocab.detokenize(ids, False, False)
    for form in (
        tuple(ids),
        iter(ids),
        array.array("i", ids),
        np.array(ids, np.int32),
        np.array(ids, np.int64),
        np.repeat(np.array(ids, np.int32), 2)[::2],
    ):
        assert tiny.vocab.detokenize(form, False, False) == expected
    with pytest.raises(TypeError):
        tiny.vocab.detokenize(np.array(ids, np.float32), False, False)


def test_a_model_without_tokenizer_says_so(tiny_path: Path) -> None:
    overrides = {"tokenizer.ggml.model": "none"}
    with _core.Model(tiny_path, kv_overrides=overrides) as model:
        assert model.vocab.type == "none"
        with pytest.raises(errors.TokenizeError, match="no tokenizer"):
            model.vocab.tokenize("a", False, False)
        with pytest.raises(errors.TokenizeError):
            model.vocab.piece(0, False)
