"""Lark grammars by llguidance, for what GBNF is clumsy at: lexers, keywords, skipped blanks.

llguidance keeps its own automaton and gives a mask per token, which a logits processor applies. So
each step takes the GIL, unlike with a GBNF grammar.
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

from ..errors import GrammarError

if TYPE_CHECKING:
    from .._core import Vocab
    from ..engine.histories import Ids
    from ..engine.processors import Rows


_MARK = b"\x02"


class _Tokens:
    """What llguidance asks of a tokenizer."""

    def __init__(self, vocab: Vocab) -> None:
        n = vocab.n_tokens
        self.eos_token_id = vocab.eog_tokens[0] if vocab.eog_tokens else None
        self.bos_token_id = vocab.bos
        self.tokens = [vocab.piece(token, True) for token in range(n)]
        self.special_token_ids = [token for token in range(n) if vocab.is_control(token)]
        self._vocab = vocab

    def __call__(self, text: bytes) -> list[int]:
        # Not the text alone: SentencePiece would put a blank before it.
        ids = self._vocab.tokenize(_MARK + text, False, False)
        before = b""
        for i, token in enumerate(ids):
            before += self.tokens[token]
            if before.strip() == _MARK:
                return ids[i + 1 :]
        return self._vocab.tokenize(text, False, False)


class LarkGrammars:
    """Makes constraints over one vocabulary, whose tokens llguidance is told once.

    Thread-safety: any thread.
    """

    def __init__(self, vocab: Vocab) -> None:
        self._vocab = vocab
        self._tokenizer: Any = None

    def constraint(self, grammar: str, n_prompt: int) -> LarkConstraint:
        """Return the processor of a request with a prompt of `n_prompt` tokens.

        Raises `GrammarError`; ImportError, which names the extra, when llguidance is missing.
        """
        try:
            llguidance = import_module("llguidance")
        except ImportError as error:
            message = 'lark: needs: pip install "llama-crab[structured]"'
            raise ImportError(message, name="llguidance") from error
        if not self._vocab.eog_tokens:
            raise GrammarError("lark: the model has no token that ends an answer")
        tokenizer = self._tokenizer
        if tokenizer is None:
            wrapper = llguidance.TokenizerWrapper(_Tokens(self._vocab))
            ends = list(self._vocab.eog_tokens)
            tokenizer = llguidance.LLTokenizer(wrapper, self._vocab.n_tokens, ends)
            self._tokenizer = tokenizer
        compiled = llguidance.LLMatcher.grammar_from_lark(grammar)
        matcher = llguidance.LLMatcher(tokenizer, compiled, log_level=0)
        if matcher.is_error():
            raise GrammarError(f"lark: {matcher.get_error()}")
        return LarkConstraint(matcher, n_prompt)


class LarkConstraint:
    """A batch logits processor that leaves the tokens of a grammar.

    It serves all answers of one request. Thread-safety: none; the scheduler's.
    """

    def __init__(self, matcher: Any, n_prompt: int) -> None:
        self._start = matcher
        self._n_prompt = n_prompt
        self._states: dict[bytes, Any] = {}  # by the answer so far

    def process_batch(self, tokens: list[Ids], logits: Rows) -> None:
        """Ban what the grammar does not allow. Raises `GrammarError` at a limit of llguidance."""
        import numpy as np

        for ids, row in zip(tokens, logits, strict=True):
            mask = np.frombuffer(self._after(ids[self._n_prompt :]).compute_bitmask(), np.uint8)
            allowed = np.unpackbits(mask, count=row.size, bitorder="little")
            row[allowed == 0] = -np.inf

    def _after(self, answer: Ids) -> Any:
        key = answer.tobytes()
        matcher = self._states.get(key)
        if matcher is None:
            # An answer that goes on takes its state along; one that parts from another starts over.
            matcher = self._states.pop(key[: -answer.itemsize], None) if key else None
            if matcher is None:
                matcher = self._start.deep_copy()
                matcher.consume_tokens(answer.tolist())
            else:
                matcher.consume_token(int(answer[-1]))
            self._states[key] = matcher
        if matcher.is_error():
            raise GrammarError(f"lark: {matcher.get_error()}")
        return matcher
