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
from .chat import (
    ChatChoice,
    ChatCompletion,
    ChatCompletionChunk,
    ChatDelta,
    ChatMessage,
    ToolCall,
    ToolCallDelta,
)
from .chat_stream import ChatStream
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
from .perf import Latencies, Measurement, Perf
from .sampling import SamplerChain
from .speculative import DraftModel, DraftModelDecoding, PromptLookupDecoding
from .stream import CompletionStream
from .timings import CompletionTimings

TYPE_CHECKING = False
if TYPE_CHECKING:
    from .async_llama import AsyncLlama
    from .chat_handle import ChatHandle
    from .handle import CompletionHandle
    from .session import Session
    from .tool_loop import ToolRun
    from .tools import Tool, function_tool

# They bring asyncio with them, for which a program that has no use for it does not wait.
_LATER = {
    "AsyncLlama": "async_llama",
    "ChatHandle": "chat_handle",
    "CompletionHandle": "handle",
    "Session": "session",
    "Tool": "tools",
    "ToolRun": "tool_loop",
    "function_tool": "tools",
}


def __getattr__(name: str) -> object:
    if name not in _LATER:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    from importlib import import_module

    return getattr(import_module(f".{_LATER[name]}", __name__), name)


def __dir__() -> list[str]:
    return sorted({*globals(), *_LATER})


__all__ = [
    "AsyncLlama",
    "ChatChoice",
    "ChatCompletion",
    "ChatCompletionChunk",
    "ChatDelta",
    "ChatHandle",
    "ChatMessage",
    "ChatStream",
    "Completion",
    "CompletionChoice",
    "CompletionChunk",
    "CompletionHandle",
    "CompletionStream",
    "CompletionTimings",
    "DraftModel",
    "DraftModelDecoding",
    "Latencies",
    "Llama",
    "LlamaCrabError",
    "LlamaParams",
    "Logprobs",
    "Measurement",
    "ParameterError",
    "Perf",
    "PromptLookupDecoding",
    "SamplerChain",
    "Session",
    "TokenLogprob",
    "Tool",
    "ToolCall",
    "ToolCallDelta",
    "ToolRun",
    "Usage",
    "__version__",
    "devices",
    "errors",
    "function_tool",
    "supports_gpu_offload",
    "system_info",
]
