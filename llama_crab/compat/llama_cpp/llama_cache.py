"""llama-cpp-python's caches, as descriptions: the engine's own prefix cache does the work."""

from __future__ import annotations

import os


class BaseLlamaCache:
    """How much to keep, in bytes. `Llama.set_cache` accepts it, and says what is used instead."""

    def __init__(self, capacity_bytes: int = 2 << 30) -> None:
        self.capacity_bytes = capacity_bytes

    @property
    def cache_size(self) -> int:
        """Bytes in it: always 0."""
        return 0

    def __repr__(self) -> str:
        return f"{type(self).__name__}(capacity_bytes={self.capacity_bytes})"


class LlamaRAMCache(BaseLlamaCache):
    """A cache in host memory."""


LlamaCache = LlamaRAMCache


class LlamaDiskCache(BaseLlamaCache):
    """A cache in files below `cache_dir`."""

    def __init__(
        self,
        cache_dir: str | os.PathLike[str] = ".cache/llama_cache",
        capacity_bytes: int = 2 << 30,
    ) -> None:
        super().__init__(capacity_bytes)
        self.cache_dir = cache_dir
