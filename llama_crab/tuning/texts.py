"""Two answers that show what drafts are worth: one copies its prompt with edits, one is free."""

from __future__ import annotations

from .. import _core
from ..sampling import SamplerChain

TEXTS = ("copy", "free")

_CODE = '''class Warehouse:
    """Counts what comes in and what goes out."""

    def __init__(self, name, capacity):
        self.name = name
        self.capacity = capacity
        self.items = {}

    def add(self, item, amount):
        if amount <= 0:
            raise ValueError("the amount must be positive")
        if self.total() + amount > self.capacity:
            raise ValueError("the warehouse is full")
        self.items[item] = self.items.get(item, 0) + amount

    def remove(self, item, amount):
        if amount > self.items.get(item, 0):
            raise ValueError("there are not enough of them")
        self.items[item] = self.items[item] - amount
        if self.items[item] == 0:
            del self.items[item]

    def total(self):
        return sum(self.items.values())

    def report(self):
        for item, amount in sorted(self.items.items()):
            print(item, amount)
        print("total", self.total(), "of", self.capacity)
'''
# The edit is begun, so that also a model that takes no orders goes on with it.
_BEGUN = _CODE[: _CODE.index("    def remove")].replace("amount", "count").rstrip() + "\n"
_COPY = f"{_CODE}\n\n# The same class, with `count` in place of `amount`:\n\n{_BEGUN}"
_FREE = (
    "The following is the first chapter of a novel about a clockmaker who lost her voice in the "
    "year of the great flood.\n\nChapter one\n\nThe rain had not stopped for nine days when"
)


def prompt_of(text: str, vocab: _core.Vocab) -> list[int]:
    """Return the prompt of a text as token ids; how many depends on the vocabulary."""
    return vocab.tokenize(_COPY if text == "copy" else _FREE, True, False)


def n_prompt_max(text: str) -> int:
    """Return a bound of the prompt's tokens in any vocabulary: its characters and a first token."""
    return 1 + len(_COPY if text == "copy" else _FREE)


def chain_of(text: str) -> SamplerChain:
    """Return the sampler: greedy for what is copied, llama.cpp's default for what is free."""
    return SamplerChain.benchmark() if text == "copy" else SamplerChain.default()
