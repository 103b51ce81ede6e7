"""Tokenizers as objects: `LlamaTokenizer`."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Sequence

TYPE_CHECKING = False
if TYPE_CHECKING:
    from .llama import Llama


class BaseLlamaTokenizer(ABC):
    """Text of bytes to token ids, and back."""

    @abstractmethod
    def tokenize(self, text: bytes, add_bos: bool = True, special: bool = True) -> list[int]:
        """Return the ids of `text`, which is UTF-8."""

    @abstractmethod
    def detokenize(
        self, tokens: Sequence[int], prev_tokens: Sequence[int] | None = None, special: bool = False
    ) -> bytes:
        """Return the bytes of `tokens`, which follow `prev_tokens`."""


class LlamaTokenizer(BaseLlamaTokenizer):
    """The tokenizer of a model file. Thread-safety: any thread."""

    def __init__(self, llama: Llama) -> None:
        self._llama = llama

    def tokenize(self, text: bytes, add_bos: bool = True, special: bool = True) -> list[int]:
        """Return the ids of `text`; see `Llama.tokenize`."""
        return self._llama.tokenize(text, add_bos, special)

    def detokenize(
        self, tokens: Sequence[int], prev_tokens: Sequence[int] | None = None, special: bool = False
    ) -> bytes:
        """Return the bytes of `tokens`; see `Llama.detokenize`."""
        return self._llama.detokenize(tokens, prev_tokens, special)

    def encode(self, text: str, add_bos: bool = True, special: bool = True) -> list[int]:
        """Return the ids of `text`."""
        return self.tokenize(text.encode("utf-8", "ignore"), add_bos, special)

    def decode(self, tokens: Sequence[int]) -> str:
        """Return the text of `tokens`."""
        return self.detokenize(tokens).decode("utf-8", "ignore")

    @classmethod
    def from_ggml_file(cls, path: str) -> LlamaTokenizer:
        """Return the tokenizer of a GGUF without loading its weights."""
        from .llama import Llama

        return cls(Llama(path, vocab_only=True))
