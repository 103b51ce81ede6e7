"""Requests that have to end by a certain time."""

from __future__ import annotations

from collections.abc import Callable

from .. import _core
from ..errors import RequestTimeoutError
from .request import Request


class Deadlines:
    """Watches the deadlines of requests. `fail` ends one with an error.

    Thread-safety: none; the scheduler's.
    """

    def __init__(self, fail: Callable[[Request, Exception], None]) -> None:
        self._fail = fail
        self._requests: dict[Request, None] = {}

    def __len__(self) -> int:
        return len(self._requests)

    def watch(self, request: Request) -> None:
        """Take a request in, if it has a deadline."""
        if request.deadline_us:
            self._requests[request] = None

    def forget(self, request: Request) -> None:
        """Leave out a request that has ended."""
        self._requests.pop(request, None)

    def expire(self) -> int:
        """End requests whose time is over; return the next deadline, 0 for none."""
        if not self._requests:
            return 0
        now, first = _core.time_us(), 0
        for request in list(self._requests):
            if request.done:
                self.forget(request)
            elif request.deadline_us <= now:
                seconds = (request.deadline_us - request.submit_us) / 1e6
                self._fail(request, RequestTimeoutError(f"not done within {seconds:g} s"))
            else:
                first = min(first or request.deadline_us, request.deadline_us)
        return first
