"""llama.cpp for programs where latency counts."""

from . import errors
from ._version import __version__
from .completion import (
    Completion,
    CompletionChoice,
    CompletionChunk,
    Logprobs,
    TokenLogprob,
    Usage,
)
from .errors import LlamaCrabError
from .llama import Llama
from .params import LlamaParams, ParameterError
from .sampling import SamplerChain
from .stream import CompletionStream
from .timings import CompletionTimings

__all__ = [
    "Completion",
    "CompletionChoice",
    "CompletionChunk",
    "CompletionStream",
    "CompletionTimings",
    "Llama",
    "LlamaCrabError",
    "LlamaParams",
    "Logprobs",
    "ParameterError",
    "SamplerChain",
    "TokenLogprob",
    "Usage",
    "__version__",
    "errors",
]
