"""The tiny models of `tiny_gguf.py` are what they claim to be, and compute."""

from __future__ import annotations

from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np
import pytest

from llama_crab import _core

# Tiny graphs: more threads would wait for each other most of the time.
SMALL: Any = {
    **{"n_ctx": 128, "n_batch": 64, "n_ubatch": 64, "n_seq_max": 4},
    **{"n_threads": 1, "n_threads_batch": 1},
}
TEXTS = ("the world", "of war and peace!", "x")


def pooled(model: _core.Model, texts: tuple[str, ...] = TEXTS) -> list[np.ndarray]:
    """Return what the model's own pooling makes of the texts, all in one batch."""
    with (
        _core.Context(model, embeddings=True, **SMALL) as context,
        _core.Batch(64, n_seq_max=1) as batch,
    ):
        for i, text in enumerate(texts):
            batch.extend(model.vocab.tokenize(text, True, False), 0, i, "all")
        if context.causal_attn:
            context.decode(batch)
        else:
            context.encode(batch)
        return [np.array(context.embeddings_seq(i)) for i in range(len(texts))]


def last_logits(model: _core.Model, chunks: list[list[int]], **fields: Any) -> np.ndarray:
    """Decode the chunks one after the other; return the logits of the last token."""
    with _core.Context(model, **SMALL, **fields) as context, _core.Batch(64) as batch:
        n_past = 0
        for chunk in chunks:
            batch.clear()
            batch.extend(chunk, n_past, 0, "last")
            context.decode(batch)
            n_past += len(chunk)
        return np.array(context.logits())


def test_the_reranker_gives_one_score_per_text(tiny_reranker_path: Path) -> None:
    with _core.Model(tiny_reranker_path) as model:
        assert (model.n_cls_out, model.cls_labels) == (1, ["LABEL_0"])
        with _core.Context(model, **SMALL) as context:
            assert (context.pooling_type, context.causal_attn) == ("rank", False)
        scores = pooled(model)
    assert [score.shape for score in scores] == [(1,)] * 3
    assert np.isfinite(scores).all()
    assert len(np.unique(scores)) == 3


def test_the_wordpiece_vocabulary_is_whole(tiny_embedder_path: Path) -> None:
    with _core.Model(tiny_embedder_path, vocab_only=True) as model:
        vocab = model.vocab
        specials = (vocab.pad, vocab.bos, vocab.sep, vocab.mask)
        assert [vocab.text(token) for token in specials] == ["[PAD]", "[CLS]", "[SEP]", "[MASK]"]
        cls, *words, sep = vocab.tokenize("The wörld, xyz \u16a0", True, False)
        assert (cls, sep) == (vocab.bos, vocab.sep)
        pieces = ["\u2581the", "\u2581world", "\u2581,", "\u2581x", "y", "z", "[UNK]"]
        assert [vocab.text(token) for token in words] == pieces


@pytest.mark.parametrize("pooling", ["mean", "cls", "last"])
def test_embedders_pool_as_their_files_say(
    tiny_gguf: ModuleType, vocab_folder: Path, tmp_path: Path, pooling: str
) -> None:
    if pooling == "last":
        tokens = tiny_gguf.spm_tokens(vocab_folder / "ggml-vocab-llama-spm.gguf")
    else:
        tokens = tiny_gguf.wpm_tokens(vocab_folder / "ggml-vocab-bert-bge.gguf")
    path = tiny_gguf.write_embedder(tmp_path / "embedder.gguf", tokens, pooling=pooling)
    with _core.Model(path) as model:
        with _core.Context(model, **SMALL) as context:
            assert context.pooling_type == pooling
            assert context.causal_attn == (pooling == "last")
        together = pooled(model)
        for vector, text in zip(together, TEXTS, strict=True):
            assert vector.shape == (tiny_gguf.N_EMBD,)
            assert np.isfinite(vector).all()
            np.testing.assert_allclose(vector, pooled(model, (text,))[0], rtol=0, atol=1e-4)
    assert not np.allclose(together[0], together[1], atol=0.1)


def test_all_fim_tokens_are_declared(tiny_gguf: ModuleType, tiny_fim_path: Path) -> None:
    with _core.Model(tiny_fim_path) as model:
        vocab = model.vocab
        for name, piece in tiny_gguf.FIM_PIECES.items():
            token = getattr(vocab, name)
            assert vocab.text(token) == piece
            assert vocab.tokenize(piece, False, True) == [token]
        ids = [vocab.bos, vocab.fim_pre, 300, vocab.fim_suf, 301, vocab.fim_mid]
        assert np.isfinite(last_logits(model, [ids])).all()


@pytest.mark.parametrize("kind", ["recurrent", "hybrid"])
def test_states_carry_over_from_one_decode_to_the_next(
    request: pytest.FixtureRequest, kind: str
) -> None:
    tokens = [1, 300, 301, 302, 310, 320, 330, 340, 350, 360, 370, 380]
    with _core.Model(request.getfixturevalue(f"tiny_{kind}_path")) as model:
        assert (model.is_recurrent, model.is_hybrid) == (kind == "recurrent", kind == "hybrid")
        whole = last_logits(model, [tokens])
        assert np.isfinite(whole).all()
        for cut in (1, 7):
            chunked = last_logits(model, [tokens[:cut], tokens[cut:]])
            np.testing.assert_allclose(chunked, whole, rtol=0, atol=1e-3)
        assert not np.allclose(last_logits(model, [tokens[7:]]), whole, atol=0.1)


def test_adapters_of_two_seeds_differ(
    tiny_gguf: ModuleType, tiny: _core.Model, tmp_path: Path
) -> None:
    found = []
    for seed in (1, 2):
        path = tiny_gguf.write_lora(tmp_path / f"{seed}.gguf", seed=seed)
        adapter = _core.LoraAdapter(tiny, path)
        with _core.Context(tiny, **SMALL) as context, _core.Batch(4) as batch:
            context.set_adapters({adapter: 1.0})
            batch.extend([1, 300, 301], 0, 0, "last")
            context.decode(batch)
            found.append(np.array(context.logits()))
    assert not np.allclose(*found, atol=0.1)
