"""A request in flight, for threads and for asyncio: `CompletionHandle`."""

from __future__ import annotations

import asyncio
import threading
import time
import weakref
from collections import deque
from collections.abc import AsyncIterator, Generator

from .completion import Completion, CompletionChunk
from .engine.delivery import final_news
from .stream import CompletionStream

TYPE_CHECKING = False
if TYPE_CHECKING:
    from types import TracebackType
    from typing import Any


class CompletionHandle(CompletionStream, AsyncIterator[CompletionChunk]):
    """What `Llama.submit` returns: the request runs on its own, and this reads or ends it.

    ``result()`` or ``await handle`` gives the `Completion`; ``for`` and ``async for`` the chunks as
    they come, or the whole answers at their end when it was not submitted with ``stream=True``.
    A reader that falls behind holds its own request back and nobody else's. To drop the handle
    before the end cancels; so does leaving its ``with`` or ``async with`` block, or cancelling a
    task that awaits it.

    Thread-safety: one reader at a time; `cancel` and `done` from any thread.
    """

    _future: asyncio.Future[None] | None = None
    _bridge: LoopBridge | None = None

    @property
    def done(self) -> bool:
        """Whether the request has ended; chunks may still be unread."""
        return self._request.done

    def cancel(self) -> None:
        """End the request within one step; what it has generated stays."""
        self.close()

    def result(self, timeout: float | None = None) -> Completion:
        """Wait for the end and return everything as one `Completion`.

        Unread chunks are skipped. Raises the request's error; TimeoutError after `timeout` seconds,
        which does not cancel it; `ClosedError`.
        """
        limit = None if timeout is None else time.monotonic() + timeout
        request = self._request
        try:
            while not request.end_us:
                left = None if limit is None else max(0.0, limit - time.monotonic())
                self._engine.advance(request, left)
                self._skip()
        except KeyboardInterrupt:
            self.close()
            raise
        return self._completion()

    def __await__(self) -> Generator[Any, None, Completion]:
        return self._result_async().__await__()

    async def _result_async(self) -> Completion:
        while not self._request.end_us:
            await self._changed()
            self._skip()
        return self._completion()

    def __aiter__(self) -> CompletionHandle:
        return self

    async def __anext__(self) -> CompletionChunk:
        try:
            while not self._has_chunk():
                await self._changed()
        except StopIteration:
            raise StopAsyncIteration from None
        return self._chunk()

    async def __aenter__(self) -> CompletionHandle:
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
        if not self._request.done:
            self._engine.cancel_soon(self._request)
            while not self._request.end_us:
                await self._changed()
                self._skip()

    def _has_chunk(self) -> bool:
        request = self._request
        ended = request.end_us and request.error is None
        if ended and not request.stream and not request.news and not self._n_ended:
            # It was not streamed: each answer is one chunk.
            request.news.extend(final_news(s, s.text) for s in request.chosen())
        return super()._has_chunk()

    def _skip(self) -> None:
        request = self._request
        if request.stream and request.news:
            request.news.clear()
            self._engine.read(request)

    async def _changed(self) -> None:
        """Wait until the engine has something for the request."""
        request = self._request
        loop = asyncio.get_running_loop()
        if self._bridge is None or self._bridge.loop is not loop:
            self._bridge = LoopBridge.of(loop)
            reference = weakref.ref(self)
            bridge = self._bridge
            request.listener = lambda: bridge.post(reference)
        self._future = future = loop.create_future()
        if request.news or request.end_us:  # it came before the future did
            self._future = None
            return
        try:
            await future
        except asyncio.CancelledError:
            # The request is of no use to anybody else.
            self._engine.cancel_soon(request)
            raise
        finally:
            self._future = None

    def _wake(self) -> None:
        future = self._future
        if future is not None and not future.done():
            future.set_result(None)


class LoopBridge:
    """Wakes the tasks of one event loop: with one call into the loop for all of a step.

    Thread-safety: `post` from any thread, the rest in the loop's own.
    """

    def __init__(self, loop: asyncio.AbstractEventLoop) -> None:
        self._loop = weakref.ref(loop)
        self._pending: deque[weakref.ref[CompletionHandle]] = deque()
        self._scheduled = False

    @classmethod
    def of(cls, loop: asyncio.AbstractEventLoop) -> LoopBridge:
        """Return the bridge of `loop`."""
        with _bridges_lock:
            return _bridges.setdefault(loop, cls(loop))

    @property
    def loop(self) -> asyncio.AbstractEventLoop | None:
        """The event loop; None when it is gone."""
        return self._loop()

    def post(self, handle: weakref.ref[CompletionHandle]) -> None:
        """Wake the task that waits for a handle, soon."""
        self._pending.append(handle)
        loop = self.loop
        if not self._scheduled and loop is not None:
            self._scheduled = True
            try:
                loop.call_soon_threadsafe(self._drain)
            except RuntimeError:  # the loop is closed: nobody waits any more
                self._scheduled = False
                self._pending.clear()

    def _drain(self) -> None:
        self._scheduled = False
        while self._pending:
            handle = self._pending.popleft()()
            if handle is not None:
                handle._wake()


_bridges: weakref.WeakKeyDictionary[asyncio.AbstractEventLoop, LoopBridge] = (
    weakref.WeakKeyDictionary()
)
_bridges_lock = threading.Lock()
