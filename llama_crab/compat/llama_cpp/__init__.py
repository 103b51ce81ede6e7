"""llama-cpp-python's names over `llama_crab`: change the import, keep the program.

``from llama_crab.compat.llama_cpp import Llama`` in place of ``from llama_cpp import Llama``; for
libraries that import ``llama_cpp`` themselves, call `install_as_llama_cpp` before they do.
"""

from __future__ import annotations

from typing import NoReturn

from .constants import *  # noqa: F403
from .generation import (
    LogitsProcessor,
    LogitsProcessorList,
    MinTokensLogitsProcessor,
    StoppingCriteria,
    StoppingCriteriaList,
)
from .llama import Llama
from .llama_cache import BaseLlamaCache, LlamaCache, LlamaDiskCache, LlamaRAMCache
from .llama_grammar import LlamaGrammar
from .llama_speculative import LlamaDraftModel, LlamaPromptLookupDecoding
from .llama_tokenizer import BaseLlamaTokenizer, LlamaTokenizer
from .llama_types import *  # noqa: F403
from .notices import LlamaCppCompatWarning, NotSupportedError
from .state import LlamaState

__version__ = "0.3.36"
"""The version of llama-cpp-python whose interface this is."""

_MODULES = (
    *("llama", "llama_cache", "llama_chat_format", "llama_grammar", "llama_speculative"),
    *("llama_tokenizer", "llama_types"),
)


def install_as_llama_cpp() -> None:
    """Make ``import llama_cpp`` give this module, for the rest of the process.

    Raises RuntimeError when llama-cpp-python was imported already. Thread-safety: call it once, at
    the program's start.
    """
    import sys
    from importlib import import_module

    there = sys.modules.get("llama_cpp")
    if there is not None and there.__name__ != __name__:
        raise RuntimeError("llama_cpp was imported already: install this module before that")
    sys.modules["llama_cpp"] = sys.modules[__name__]
    for name in _MODULES:
        sys.modules[f"llama_cpp.{name}"] = import_module(f".{name}", __name__)


def __getattr__(name: str) -> NoReturn:
    hint = ""
    if name.startswith(("llama_", "ggml_", "LLAMA_", "GGML_")):
        hint = ": of the C API only constants are here; see llama_crab._core"
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}{hint}")


__all__ = [
    "BaseLlamaCache",
    "BaseLlamaTokenizer",
    "Llama",
    "LlamaCache",
    "LlamaCppCompatWarning",
    "LlamaDiskCache",
    "LlamaDraftModel",
    "LlamaGrammar",
    "LlamaPromptLookupDecoding",
    "LlamaRAMCache",
    "LlamaState",
    "LlamaTokenizer",
    "LogitsProcessor",
    "LogitsProcessorList",
    "MinTokensLogitsProcessor",
    "NotSupportedError",
    "StoppingCriteria",
    "StoppingCriteriaList",
    "install_as_llama_cpp",
]
