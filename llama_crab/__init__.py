"""llama.cpp for programs where latency counts."""

try:
    from . import _core as _core
except ImportError as error:
    if error.name != __name__:
        raise  # it is there, and says itself what it misses
    raise ImportError(
        f"llama_crab is not compiled in {__path__[0]}. In a source checkout run `make build` and "
        "use its .venv from another folder, or `pip install -e .`"
    ) from error
from . import errors
from ._core import devices, supports_gpu_offload, system_info
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
    "devices",
    "errors",
    "supports_gpu_offload",
    "system_info",
]
