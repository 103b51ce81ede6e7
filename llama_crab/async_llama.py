"""The facade for asyncio: `AsyncLlama`."""

from __future__ import annotations

import asyncio
import os
from collections.abc import Callable, Iterable, Mapping, Sequence
from functools import partial
from typing import Any, Literal, Unpack, overload

from . import _core
from .chat_handle import ChatHandle
from .chat_methods import tool_steps
from .chat_request import ChatOptions, Messages
from .handle import CompletionHandle
from .llama import Llama
from .params import LlamaParams
from .request_builder import CompletionOptions, Prompt

TYPE_CHECKING = False
if TYPE_CHECKING:
    from types import TracebackType

    import numpy as np
    import numpy.typing as npt

    from .chat import ChatCompletion
    from .completion import Completion
    from .mapping import AsyncCompletionMap
    from .perf import Measurement, Perf
    from .rerank import RerankResult
    from .session import Session
    from .tool_loop import ToolRun
    from .tools import Tool


class AsyncLlama:
    """A `Llama` for asyncio: requests run in an engine thread and share batches.

    ``AsyncLlama("model.gguf", n_seq_max=8)`` or ``AsyncLlama.load(LlamaParams(...))``; loading
    blocks, so in a running event loop use ``await asyncio.to_thread(AsyncLlama.load, params)``.
    Up to ``n_seq_max`` sequences run at a time, any number wait.

    Raises as `Llama`.
    Thread-safety: any thread, and any number of event loops.
    """

    def __init__(self, model: str | os.PathLike[str] | None = None, **fields: Any) -> None:
        self._llama = Llama(model, **fields)

    @classmethod
    def load(cls, params: LlamaParams) -> AsyncLlama:
        """Load the model that `params` describes."""
        found = cls.__new__(cls)
        found._llama = Llama.load(params)
        return found

    @property
    def llama(self) -> Llama:
        """The `Llama` behind it, for what does not wait: tokenize, sessions, adapters."""
        return self._llama

    def create_completion(
        self,
        prompt: Prompt,
        max_tokens: int | None = 128,
        *,
        stream: bool = False,
        **options: Unpack[CompletionOptions],
    ) -> CompletionHandle:
        """Continue `prompt`: ``await`` it for the `Completion`, ``async for`` over it for chunks.

        The options are those of `Llama.create_completion`, and so are the errors: wrong values
        raise here, what happens later is raised by the ``await``.
        """
        return self._llama.submit(prompt, max_tokens, stream=stream, **options)

    def create_chat_completion(
        self,
        messages: Messages,
        max_tokens: int | None = None,
        *,
        stream: bool = False,
        **options: Unpack[ChatOptions],
    ) -> ChatHandle:
        """Answer a conversation: ``await`` for the `ChatCompletion`, ``async for`` for chunks.

        The options are those of `Llama.create_chat_completion`, and so are the errors: wrong values
        raise here, what happens later is raised by the ``await``.
        """
        return self._llama.submit_chat(messages, max_tokens, stream=stream, **options)

    async def run_tools(
        self,
        messages: Messages,
        tools: Sequence[Callable[..., Any] | Tool],
        *,
        max_steps: int = 8,
        **options: Any,
    ) -> ToolRun[ChatCompletion]:
        """Answer a conversation, calling functions, which may be async; see `Llama.run_tools`."""
        from .tool_loop import arun_tool_loop

        ask, history, found = tool_steps(self.create_chat_completion, messages, tools, options)
        return await arun_tool_loop(ask, history, found, max_steps)

    @overload
    def map(
        self,
        prompts: Iterable[Prompt | Mapping[str, Any]],
        max_tokens: int | None = ...,
        *,
        progress: bool = ...,
        return_exceptions: Literal[False] = ...,
        **options: Unpack[CompletionOptions],
    ) -> AsyncCompletionMap[Completion]: ...

    @overload
    def map(
        self,
        prompts: Iterable[Prompt | Mapping[str, Any]],
        max_tokens: int | None = ...,
        *,
        progress: bool = ...,
        return_exceptions: bool,
        **options: Unpack[CompletionOptions],
    ) -> AsyncCompletionMap[Completion | Exception]: ...

    def map(
        self,
        prompts: Iterable[Prompt | Mapping[str, Any]],
        max_tokens: int | None = 128,
        *,
        progress: bool = False,
        return_exceptions: bool = False,
        **options: Unpack[CompletionOptions],
    ) -> AsyncCompletionMap[Any]:
        """Complete many prompts, for ``async for`` over the results; see `Llama.map`."""
        from .mapping import AsyncCompletionMap

        results = self._llama.map(
            prompts,
            max_tokens,
            progress=progress,
            return_exceptions=return_exceptions,
            **options,
        )
        return AsyncCompletionMap(results)

    async def embed(
        self, texts: str | Iterable[str | Sequence[int]], **options: Any
    ) -> npt.NDArray[np.float32]:
        """Return the embeddings of `texts`; see `Llama.embed`."""
        return await asyncio.to_thread(partial(self._llama.embed, texts, **options))

    async def rerank(
        self, query: str, documents: Sequence[str], **options: Any
    ) -> list[RerankResult]:
        """Return documents by their relevance to `query`; see `Llama.rerank`."""
        return await asyncio.to_thread(partial(self._llama.rerank, query, documents, **options))

    def session(self) -> Session:
        """Return an empty conversation; see `Llama.session`."""
        return self._llama.session()

    def load_lora(self, path: str | os.PathLike[str]) -> _core.LoraAdapter:
        """Load a LoRA adapter; see `Llama.load_lora`."""
        return self._llama.load_lora(path)

    def stats(self) -> Mapping[str, Any]:
        """Return counts of the engine; see `Llama.stats`."""
        return self._llama.stats()

    @property
    def perf(self) -> Perf:
        """Counts, seconds and latencies over all requests; see `Llama.perf`."""
        return self._llama.perf

    def reset_perf(self) -> None:
        """Let `perf` count from here on; see `Llama.reset_perf`."""
        self._llama.reset_perf()

    def measure(self) -> Measurement:
        """Measure a block, with a plain ``with`` around what is awaited; see `Llama.measure`."""
        return self._llama.measure()

    async def drain(self, timeout: float | None = None) -> bool:
        """Refuse new requests and wait for those that are there; see `Llama.drain`."""
        return await asyncio.to_thread(self._llama.drain, timeout)

    async def close(self) -> None:
        """End what runs as cancelled, free the context and the model. Idempotent."""
        await asyncio.to_thread(self._llama.close)

    async def __aenter__(self) -> AsyncLlama:
        return self

    async def __aexit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        await self.close()

    def __repr__(self) -> str:
        return f"<Async{repr(self._llama).removeprefix('<')}"
