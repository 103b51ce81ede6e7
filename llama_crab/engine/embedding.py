"""Embeddings through the engine: texts of all requests packed into batches."""

from __future__ import annotations

from collections import deque
from collections.abc import Mapping
from dataclasses import dataclass, field

from .. import _core, logs
from ..errors import ClosedError, DecodeAborted, DecodeError, LlamaCrabError, RequestTimeoutError
from .request import News, rank_of

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Callable
    from typing import Any

    import numpy as np
    import numpy.typing as npt

    Vectors = npt.NDArray[np.float32]

# The rows of a larger batch leave the caches of a processor's core: with all-MiniLM-L6-v2 (F32) 512
# tokens take a third longer each than 128 do, 2048 twice as long; fewer than 64 gain nothing.
CPU_BATCH_TOKENS = 128


@dataclass(slots=True, eq=False)
class EmbeddingRequest:
    """Texts and the rows that are to be filled; `first_rows` are their rows in `vectors`.

    The fields that it shares with `Request` mean the same.
    """

    texts: _core.TokenizedTexts
    vectors: Vectors
    first_rows: list[int]
    normalize: bool = True
    priority: int = 0
    deadline_us: int = 0
    submit_us: int = 0
    end_us: int = 0
    n_news_max: int = 0
    error: BaseException | None = None
    listener: Callable[[], object] | None = None
    news: deque[News] = field(default_factory=deque)
    lengths: list[int] = field(default_factory=list)
    waiting: deque[int] = field(default_factory=deque)
    sequences: tuple[()] = ()

    def __post_init__(self) -> None:
        self.lengths = self.texts.lengths()
        # The longest first, so that short ones are left to fill the room in batches.
        order = sorted(range(len(self.lengths)), key=self.lengths.__getitem__, reverse=True)
        self.waiting = deque(order)

    @property
    def rank(self) -> int:
        """What the queue orders by, smallest first."""
        return rank_of(self.submit_us, self.priority, self.deadline_us)

    @property
    def done(self) -> bool:
        """Whether nothing more will come."""
        return self.end_us != 0


class EmbeddingScheduler:
    """Runs embedding requests over one context: a batch per step, filled from all that wait.

    The counterpart of `Scheduler` for a context that cannot generate; the engine drives either.

    Thread-safety: none; the engine holds a lock around it.
    """

    def __init__(self, context: _core.Context) -> None:
        self.context = context
        self.embedder = _core.Embedder(context)
        n_most = self.embedder.n_tokens_max
        self._batch_tokens = n_most if _core.supports_gpu_offload() else CPU_BATCH_TOKENS
        self._requests: list[EmbeddingRequest] = []
        self._taken: list[tuple[EmbeddingRequest, int]] = []
        self.told: dict[EmbeddingRequest, None] = {}
        self.n_batches = 0
        self.n_tokens = 0

    def submit(self, request: EmbeddingRequest) -> None:
        """Queue a request."""
        if request.done:
            return
        request.submit_us = request.submit_us or _core.time_us()
        if not request.waiting:
            self._end(request)
            return
        self._requests.append(request)
        self._requests.sort(key=lambda request: request.rank)

    def cancel(self, request: EmbeddingRequest) -> None:
        """End a request now. Does nothing when it is done."""
        if not request.done:
            request.error = request.error or ClosedError("the request was cancelled")
            self._end(request)

    def cancel_all(self) -> None:
        """End every request."""
        for request in list(self._requests):
            self.cancel(request)

    def fail_all(self, error: Exception) -> None:
        """End every request with `error`."""
        for request in list(self._requests):
            self._fail(request, error)

    def any_request(self) -> EmbeddingRequest | None:
        """Return a request that has not ended, or None."""
        return self._requests[0] if self._requests else None

    def step(self, n_steps_max: int = 1) -> bool:
        """Compute one batch. Raises `DecodeError` when the context fails; all requests end then."""
        self._expire()
        try:
            self._fill()
            if not self._taken:
                return bool(self._requests)
            self._run()
        except DecodeAborted:
            logs.flush(expected=True)
        except DecodeError as error:
            self.fail_all(error)
            self._taken.clear()
            raise
        finally:
            # After an abort, Ctrl-C, or while somebody holds a view of the last results.
            self._put_back()
            logs.flush()
        return True

    def pause(self) -> None:
        """Do nothing: a step is one batch in any case."""

    def interrupt(self, request: EmbeddingRequest) -> None:
        """Do nothing: a batch is short."""

    def can_go_on(self, request: EmbeddingRequest) -> bool:
        """Return False: nothing is ever held."""
        return False

    def close(self) -> None:
        """Give up what it has of the context."""
        self.embedder.close()

    def stats(self) -> Mapping[str, Any]:
        """Return counts of the queue and of what was computed."""
        return {
            "n_waiting": len(self._requests),
            "n_batches": self.n_batches,
            "n_tokens": self.n_tokens,
        }

    def unhold(self, request: EmbeddingRequest) -> None:
        """Do nothing: nothing is ever held."""

    def _fill(self) -> None:
        """Queue texts for a batch, the most urgent request's first."""
        self._put_back()
        self.embedder.clear()
        taken = self._taken
        for request in list(self._requests):
            if taken and request.normalize != taken[0][0].normalize:
                continue
            waiting = request.waiting
            try:
                # The longest first, and the shortest into the room that is left. Noted first, then
                # taken: Ctrl-C may come between any two lines, and no text may be lost by that.
                while waiting and self._add(request, waiting[0]):
                    taken.append((request, waiting[0]))
                    waiting.popleft()
                while waiting and self._add(request, waiting[-1]):
                    taken.append((request, waiting[-1]))
                    waiting.pop()
            except LlamaCrabError as error:
                self._fail(request, error)
        taken[:] = [(request, text) for request, text in taken if not request.done]

    def _add(self, request: EmbeddingRequest, text: int) -> bool:
        n_tokens, length = self.embedder.n_tokens, request.lengths[text]
        if n_tokens > 0 and n_tokens + length > self._batch_tokens:
            return False
        return self.embedder.add(request.texts, text, request.vectors, request.first_rows[text])

    def _run(self) -> None:
        n_tokens = self.embedder.n_tokens
        self.embedder.run("l2" if self._taken[0][0].normalize else "none")
        self.n_batches += 1
        self.n_tokens += n_tokens
        for request in {request: None for request, _ in self._taken}:
            if not request.waiting:
                self._end(request)
        self._taken.clear()

    def _put_back(self) -> None:
        """Have the texts of a batch that was not computed wait again."""
        if not self._taken:
            return
        while self._taken:
            request, text = self._taken[-1]
            request.waiting.appendleft(text)
            self._taken.pop()
        self.embedder.clear()

    def _expire(self) -> None:
        now = _core.time_us()
        for request in [r for r in self._requests if r.deadline_us and r.deadline_us <= now]:
            seconds = (request.deadline_us - request.submit_us) / 1e6
            self._fail(request, RequestTimeoutError(f"not done within {seconds:g} s"))

    def _fail(self, request: EmbeddingRequest, error: Exception) -> None:
        request.error = error
        self._end(request)

    def _end(self, request: EmbeddingRequest) -> None:
        request.end_us = _core.time_us()
        if request in self._requests:
            self._requests.remove(request)
        if request.listener is not None:
            self.told[request] = None
