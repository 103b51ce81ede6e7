"""The thread-safe door to a `Scheduler`."""

from __future__ import annotations

import atexit
import contextlib
import os
import threading
import time
import weakref
from collections import deque
from collections.abc import Callable, Mapping
from functools import partial
from typing import Generic, Protocol, TypeVar

from .. import _core
from ..errors import ClosedError, ForkedProcessError, LlamaCrabError

TYPE_CHECKING = False
if TYPE_CHECKING:
    from typing import Any, TypeVarTuple

    Result = TypeVar("Result")
    Args = TypeVarTuple("Args")

# Long enough for a waiting thread to wake up, short beside a step.
_HANDOVER_SEC = 50e-6
# Batches per call into the core while nothing is to be told; other threads end it earlier.
_STEPS = 256
# How long the engine's thread sleeps at most while all that runs is held.
_HELD_SEC = 0.05
_DRAIN_POLL_SEC = 0.002


class JobScheduler(Protocol):
    """What the engine drives: `Scheduler` for text, `EmbeddingScheduler` for vectors."""

    context: _core.Context

    @property
    def told(self) -> dict[Any, None]:
        """Requests whose listeners are to be called."""

    def submit(self, request: Any) -> None:
        """Queue a request."""

    def cancel(self, request: Any) -> None:
        """End a request."""

    def cancel_all(self) -> None:
        """End every request."""

    def fail_all(self, error: Exception) -> None:
        """End every request with `error`."""

    def any_request(self) -> Any:
        """Return a request that has not ended, or None."""

    def step(self, n_steps_max: int = 1) -> bool:
        """Do one batch or more; return False when there is nothing to do now."""

    def pause(self) -> None:
        """Have a `step` of another thread return after its batch."""

    def interrupt(self, request: Any) -> None:
        """Stop the batch of another thread, if it is a long one of `request`."""

    def can_go_on(self, request: Any) -> bool:
        """Whether `unhold` would do something."""

    def unhold(self, request: Any) -> None:
        """Go on with what was held for a slow reader."""

    def stats(self) -> Mapping[str, Any]:
        """Return counts."""

    def close(self) -> None:
        """Give up what it has of the context."""


S = TypeVar("S", bound=JobScheduler)


class Engine(Generic[S]):
    """Runs requests of any number of threads over one context.

    Whoever waits for a request drives the loop, for all requests, and lets others have their turn
    in between; so a program of one thread has no second one. `start` gives the loop a thread of its
    own, for requests that nobody waits for; from then on the others only wait.

    Thread-safety: every method may be called from any thread.
    """

    def __init__(self, scheduler: S) -> None:
        self.scheduler = scheduler
        self._context = scheduler.context
        self._lock = threading.Lock()
        self._callers: dict[int, None] = {}
        # Work for the next turn, put here by those who must not wait for one.
        self._inbox: deque[Callable[[], object]] = deque()
        self._pid = os.getpid()
        self._closed = False
        self._draining = False
        self._thread: threading.Thread | None = None
        self._work = threading.Event()
        self.on_submit: Callable[[Any], object] | None = None
        """Called with each request for text before it is queued, by the thread that submits it."""

    @property
    def closed(self) -> bool:
        """Whether `close` was called."""
        return self._closed

    @property
    def started(self) -> bool:
        """Whether a thread of the engine's own drives the loop."""
        return self._thread is not None

    def start(self) -> None:
        """Give the loop a thread. Idempotent. Raises `ClosedError`."""
        if self._thread is None:
            self._exclusively(self._start)

    def submit(self, request: Any, *, draining: bool = False) -> None:
        """Queue a request; while the engine drains only with `draining`. Raises `ClosedError`.

        Waits for nothing when the engine has a thread.
        """
        if self._draining and not draining:
            self._require_open()
            raise ClosedError("the engine is draining: it takes no new requests")
        if self._thread is None:
            self._exclusively(self._if_open, self.scheduler.submit, request)
            return
        self._require_open()
        self.later(self.scheduler.submit, request)
        if self._closed:  # just now: nobody else comes to look, and the reader must not wait
            self._exclusively(self._close)

    def advance(self, request: Any, timeout: float | None = None) -> None:
        """Wait until `request` has news or is done, running the loop if no thread of its own does.

        It may return earlier, when another thread wants its turn. Raises `ClosedError`,
        `DecodeError`, and TimeoutError after `timeout` seconds without news.
        """
        if self._thread is not None:
            self._wait(request, timeout)
        else:
            limit_us = 0 if timeout is None else _core.time_us() + int(timeout * 1e6)
            self._exclusively(self._advance, request, limit_us)

    def read(self, request: Any) -> None:
        """Note that the reader has taken something: what was held for it may go on."""
        if request.n_news_max and self.scheduler.can_go_on(request):
            self.later(self.scheduler.unhold, request)

    def cancel(self, request: Any) -> None:
        """End a request now; does nothing when it is done.

        A batch that is decoding its prompt is stopped, where the backend can, and what others lose
        by that is decoded again.
        """
        self._interrupt(request)
        self._exclusively(self._cancel, request)

    def cancel_soon(self, request: Any) -> None:
        """Do the same without waiting for it: for event loops."""
        self._interrupt(request)
        self.later(self._cancel_now, request)

    def stats(self) -> Mapping[str, Any]:
        """Return the scheduler's counts. Raises `ClosedError`."""
        return self.exclusively(self.scheduler.stats)

    def exclusively(self, work: Callable[[*Args], Result], *args: *Args) -> Result:
        """Run `work` between two steps. Raises `ClosedError`."""
        return self._exclusively(self._if_open, work, *args)

    def drain(self, timeout: float | None = None) -> bool:
        """Refuse new requests and wait for those that are there; return whether all have ended."""
        self._draining = True
        limit = None if timeout is None else time.monotonic() + timeout
        while not self._closed and self._exclusively(self._has_work):
            if limit is not None and time.monotonic() >= limit:
                return False
            if self._thread is None:
                self._exclusively(self._turn)
            else:
                time.sleep(_DRAIN_POLL_SEC)
        return True

    def close(self) -> None:
        """End every request as cancelled and close the context. Idempotent."""
        thread = self._thread
        self._exclusively(self._close)
        self._work.set()
        if thread is not None and thread is not threading.current_thread():
            thread.join()

    def abandon(self, request: Any) -> None:
        """Have the next step end a request. Takes no lock: the collector may call this anywhere."""
        self.later(self.scheduler.cancel, request)

    def later(self, work: Callable[[*Args], object], *args: *Args) -> None:
        """Have `work` done before the next batch. Takes no lock, as `abandon`."""
        self._inbox.append(partial(work, *args))
        self.scheduler.pause()
        self._work.set()

    def _exclusively(self, work: Callable[[*Args], Result], *args: *Args) -> Result:
        """Run `work` alone, then let threads that wait get in first.

        A thread that drives the loop would take the lock again at once, and the others starve. The
        lock is taken by a plain ``with``, which no signal can come in between of.
        """
        if os.getpid() != self._pid:
            # Its lock may have been held when the process was forked, and its thread is not here.
            raise ForkedProcessError("this Llama belongs to the parent process: load one here")
        me = threading.get_ident()
        self._callers[me] = None
        # Always: whoever holds the lock, or takes it before us, must not run on for many batches.
        self.scheduler.pause()
        try:
            with self._lock:
                self._callers.pop(me, None)
                return work(*args)
        finally:
            self._callers.pop(me, None)
            if self._callers:
                time.sleep(_HANDOVER_SEC)

    def _start(self) -> None:
        self._require_open()
        if self._thread is None:
            # Without a strong reference: an engine that nobody uses any more ends its thread.
            work = self._work
            gone = weakref.ref(self, lambda _: work.set())
            self._thread = threading.Thread(
                target=_drive, args=(gone, work), name="llama_crab engine", daemon=True
            )
            self._thread.start()
            _started.add(self)

    def _advance(self, request: Any, limit_us: int) -> None:
        while not request.news and not request.end_us:
            self._require_open()
            if limit_us and _core.time_us() >= limit_us:
                raise TimeoutError("the request is not done yet")
            self._step()
            if self._callers:
                return

    def _wait(self, request: Any, timeout: float | None) -> None:
        """Sleep until the engine's thread has something for `request`."""
        changed, before = threading.Event(), request.listener
        request.listener = changed.set
        try:
            if request.news or request.end_us:  # it came before the listener did
                return
            if not changed.wait(timeout):
                raise TimeoutError("the request is not done yet")
        finally:
            request.listener = before

    def _step(self) -> bool:
        """Run the loop once, then call those who have got something; False if all is held."""
        scheduler = self.scheduler
        self._read_inbox()
        try:
            return scheduler.step(_STEPS)
        finally:
            if scheduler.told:
                self._call_listeners()

    def _turn(self) -> bool | None:
        """Run the loop until another thread wants a turn, all is held (False) or done (None)."""
        while not self._closed and self._has_work():
            try:
                progressed = self._step()
            except LlamaCrabError:
                continue  # every request has ended with it, and its reader is told
            except Exception as error:  # a bug: nobody may wait for ever because of it
                self.scheduler.fail_all(error)
                self._call_listeners()
                continue
            if self._callers or not (progressed or self._inbox):
                return progressed
        return None

    def _interrupt(self, request: Any) -> None:
        with contextlib.suppress(ClosedError):  # another thread may be closing it
            self.scheduler.interrupt(request)

    def _cancel(self, request: Any) -> None:
        if not self._closed:
            self._read_inbox()  # it may have been submitted just now
            self._cancel_now(request)
            self._call_listeners()

    def _cancel_now(self, request: Any) -> None:
        # An abort that came too late must not hit the next batch.
        self._context.clear_abort()
        self.scheduler.cancel(request)

    def _close(self) -> None:
        self._read_inbox()
        self.scheduler.cancel_all()
        self._call_listeners()
        if not self._closed:
            self._context.close()
            self.scheduler.close()  # it has a share of the context
            self._closed = True
            _started.discard(self)

    def _has_work(self) -> bool:
        return bool(self._inbox) or self.scheduler.any_request() is not None

    def _read_inbox(self) -> None:
        while self._inbox:
            self._inbox.popleft()()

    def _call_listeners(self) -> None:
        told = list(self.scheduler.told)
        self.scheduler.told.clear()
        for request in told:
            if request.listener is not None:
                request.listener()

    def _if_open(self, work: Callable[[*Args], Result], *args: *Args) -> Result:
        self._require_open()
        self._read_inbox()
        return work(*args)

    def _require_open(self) -> None:
        if self._closed:
            raise ClosedError("the Llama is closed")


def _drive(engine_ref: weakref.ref[Engine[Any]], work: threading.Event) -> None:
    """Run the loop of an engine in a thread of its own, until it is closed or gone."""
    while True:
        work.clear()
        engine = engine_ref()
        if engine is None or engine.closed:
            return
        progressed = engine._exclusively(engine._turn)
        del engine
        if progressed is None:
            work.wait()
        elif not progressed:
            work.wait(_HELD_SEC)


# Threads that are inside the core when the interpreter ends would be torn out of it.
_started: weakref.WeakSet[Engine[Any]] = weakref.WeakSet()


@atexit.register
def _close_started() -> None:
    for engine in list(_started):
        engine.close()
