"""llama-cpp-python's draft models, for ``draft_model``; the lookup becomes our own."""

from __future__ import annotations

from abc import ABC, abstractmethod
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    import numpy as np
    import numpy.typing as npt


class LlamaDraftModel(ABC):
    """Guesses the tokens that come next."""

    @abstractmethod
    def __call__(self, input_ids: npt.NDArray[np.intc], /, **kwargs: Any) -> npt.NDArray[np.intc]:
        """Return a guess of what follows `input_ids`."""


class LlamaPromptLookupDecoding(LlamaDraftModel):
    """Guesses what followed the last tokens where they occurred before."""

    def __init__(self, max_ngram_size: int = 2, num_pred_tokens: int = 10) -> None:
        self.max_ngram_size = max_ngram_size
        self.num_pred_tokens = num_pred_tokens

    def __call__(self, input_ids: npt.NDArray[np.intc], /, **kwargs: Any) -> npt.NDArray[np.intc]:
        """Return what followed the earliest occurrence of the longest matching end, or nothing."""
        for size in range(min(self.max_ngram_size, len(input_ids) - 1), 0, -1):
            last = input_ids[-size:]
            for begin in range(len(input_ids) - size):
                if (input_ids[begin : begin + size] == last).all():
                    end = begin + size
                    return input_ids[end : end + self.num_pred_tokens]
        return input_ids[:0]
