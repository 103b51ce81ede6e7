"""Texts out of a grammar by random walks, and whether a grammar lets a text pass."""

from __future__ import annotations

from typing import Any

import numpy as np

from llama_crab import _core
from llama_crab.errors import SamplerError
from llama_crab.sampling import SamplerChain

# What brings a document to its end, the surest first.
_CLOSERS = (b'"', b"}", b"]", b"0", b"n")
_DEMANDED = (b"@", b".", b"b", b"-", b"\xc3", b"\xa9", b"0", b"\\")
_BAD_STARTS = (0xC0, 0xC1, 0xE0, 0xED, *range(0xF0, 0x100))


class Walker:
    """Walks through grammars as the engine does: masks of a real vocabulary, tokens accepted."""

    def __init__(self, model: _core.Model) -> None:
        self._model = model
        vocab = model.vocab
        self._eos = vocab.eog_tokens[0]
        self._byte_tokens: dict[int, int] = {}
        for token in range(vocab.n_tokens):
            piece = vocab.piece(token, True)
            if len(piece) == 1:
                self._byte_tokens[piece[0]] = token
        self._flat = np.zeros(vocab.n_tokens, np.float32)
        # As llama.cpp's, the masks let overlong forms and surrogates pass where single bytes are
        # tokens. No trained model writes them; walks begin them only where nothing else may come.
        for byte in _BAD_STARTS:
            self._flat[self._byte_tokens[byte]] = -30.0
        self._closing = self._preferring(_CLOSERS)
        # What closes is not always enough: a pattern may ask for something first.
        self._others = [self._preferring((piece,)) for piece in _DEMANDED]

    def _preferring(self, pieces: tuple[bytes, ...]) -> Any:
        row = self._flat.copy()
        for rank, piece in enumerate(pieces):
            row[self._byte_tokens[piece[0]]] = 40.0 - 5.0 * rank
        row[self._eos] = 60.0
        return row

    def accepts(self, gbnf: str, text: str) -> bool:
        """Tell whether the grammar lets this text pass, byte by byte, and end."""
        sampler = SamplerChain().grammar(gbnf).compile(self._model, 1)
        try:
            for byte in text.encode():
                sampler.accept(self._byte_tokens[byte])
            sampler.accept(self._eos)
        except SamplerError:
            return False
        return True

    def text(self, gbnf: str, seed: int, n_free: int = 40, n_most: int = 3000) -> str:
        """Return a random text of the grammar.

        All allowed tokens are equally likely at first; after `n_free` of them, those that close
        something are preferred.
        """
        sampler: Any = SamplerChain().grammar(gbnf).compile(self._model, seed)
        rng = np.random.default_rng(seed)
        # Some walks end at once where they may, some late.
        row = self._flat.copy()
        row[self._eos] = rng.choice([-3.0, 0.0, 4.0])
        found = bytearray()
        for step in range(n_most):
            if step >= n_free:
                row = self._closing if rng.random() < 0.6 else rng.choice(self._others)
            token = sampler.select(row)
            if token == self._eos:
                return found.decode()
            found += self._model.vocab.piece(token, True)
        raise AssertionError(f"no end after {n_most} tokens: {bytes(found[:200])!r}")
