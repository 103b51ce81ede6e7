"""The thread-safe door to a `Scheduler`."""

from __future__ import annotations

import threading
import time
from collections import deque
from collections.abc import Callable

from .. import _core
from ..errors import ClosedError
from .request import RawLogprobs, Request
from .scheduler import Scheduler

TYPE_CHECKING = False
if TYPE_CHECKING:
    from typing import TypeVar, TypeVarTuple

    Result = TypeVar("Result")
    Args = TypeVarTuple("Args")

# Long enough for a waiting thread to wake up, short beside a step.
_HANDOVER_SEC = 50e-6
# Batches per call into the core while nothing is to be told; other threads end it earlier.
_STEPS = 256


class Engine:
    """Runs requests of any number of threads over one context.

    There is no thread of its own: whoever waits for a request drives the loop, for all requests,
    and lets others have their turn in between.

    Thread-safety: every method may be called from any thread.
    """

    def __init__(self, context: _core.Context) -> None:
        self.scheduler = Scheduler(context)
        self._context = context
        self._lock = threading.Lock()
        self._callers: dict[int, None] = {}
        self._abandoned: deque[Request] = deque()
        self._closed = False

    @property
    def closed(self) -> bool:
        """Whether `close` was called."""
        return self._closed

    def submit(self, request: Request) -> None:
        """Queue a request. Raises `ClosedError`."""
        self._exclusively(self._submit, request)

    def advance(self, request: Request) -> None:
        """Run the loop until `request` has news or is done, or another thread wants its turn.

        Raises `ClosedError`, `DecodeError`.
        """
        self._exclusively(self._advance, request)

    def cancel(self, request: Request) -> None:
        """End a request now; does nothing when it is done."""
        self._exclusively(self._cancel, request)

    def prompt_logprobs(self, request: Request) -> list[RawLogprobs]:
        """Return the prompt's log-probabilities so far, from the sequence that prefills it."""
        return self._exclusively(self.scheduler.prompt_logprobs, request)

    def close(self) -> None:
        """End every request as cancelled and close the context. Idempotent."""
        self._exclusively(self._close)

    def abandon(self, request: Request) -> None:
        """Have the next step end a request. Takes no lock: the collector may call this anywhere."""
        self._abandoned.append(request)

    def _exclusively(self, work: Callable[[*Args], Result], *args: *Args) -> Result:
        """Run `work` alone, then let threads that wait get in first.

        A thread that drives the loop would take the lock again at once, and the others starve. The
        lock is taken by a plain ``with``, which no signal can come in between of.
        """
        me = threading.get_ident()
        self._callers[me] = None
        # Always: whoever holds the lock, or takes it before us, must not run on for many batches.
        self.scheduler.stepper.pause()
        try:
            with self._lock:
                self._callers.pop(me, None)
                return work(*args)
        finally:
            self._callers.pop(me, None)
            if self._callers:
                time.sleep(_HANDOVER_SEC)

    def _submit(self, request: Request) -> None:
        self._require_open()
        self.scheduler.submit(request)

    def _advance(self, request: Request) -> None:
        step = self.scheduler.step
        while not request.news and not request.end_us:
            self._require_open()
            while self._abandoned:
                self.scheduler.cancel(self._abandoned.popleft())
            step(_STEPS)
            if self._callers:
                return

    def _cancel(self, request: Request) -> None:
        if not self._closed:
            self.scheduler.cancel(request)

    def _close(self) -> None:
        if not self._closed:
            self.scheduler.cancel_all()
            self._context.close()
            self._closed = True

    def _require_open(self) -> None:
        if self._closed:
            raise ClosedError("the Llama is closed")
