"""A chat request in flight, for threads and for asyncio: `ChatHandle`."""

from __future__ import annotations

from collections.abc import AsyncIterator, Generator

from .chat import ChatCompletion, ChatCompletionChunk
from .chat_reader import ChatPlan
from .chat_stream import ChatStream
from .handle import CompletionHandle

TYPE_CHECKING = False
if TYPE_CHECKING:
    from types import TracebackType
    from typing import Any


class ChatHandle(ChatStream, AsyncIterator[ChatCompletionChunk]):
    """What `Llama.submit_chat` returns; see `CompletionHandle` for what it does when.

    ``result()`` or ``await handle`` gives the `ChatCompletion`; ``for`` and ``async for`` the
    chunks.

    Thread-safety: one reader at a time; `cancel` and `done` from any thread.
    """

    _stream: CompletionHandle

    def __init__(self, handle: CompletionHandle, plan: ChatPlan) -> None:
        super().__init__(handle, plan)

    @property
    def done(self) -> bool:
        """Whether the request has ended; chunks may still be unread."""
        return self._stream.done

    def cancel(self) -> None:
        """End the request within one step; what it has generated stays."""
        self._stream.cancel()

    def result(self, timeout: float | None = None) -> ChatCompletion:
        """Wait for the end and return everything as one `ChatCompletion`.

        Raises the request's error; TimeoutError after `timeout` seconds, which does not cancel it;
        `ChatParseError`, `ClosedError`.
        """
        return self._readers.completion(self._stream.result(timeout))

    def __await__(self) -> Generator[Any, None, ChatCompletion]:
        return self._result_async().__await__()

    async def _result_async(self) -> ChatCompletion:
        return self._readers.completion(await self._stream)

    def __aiter__(self) -> ChatHandle:
        return self

    async def __anext__(self) -> ChatCompletionChunk:
        while True:
            chunk = self._readers.chunk(await anext(self._stream))
            if chunk is not None:
                return chunk

    async def __aenter__(self) -> ChatHandle:
        return self

    async def __aexit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        await self.aclose()

    async def aclose(self) -> None:
        """Cancel the request if it has not ended, without keeping the event loop waiting."""
        await self._stream.aclose()
