"""A conversation that keeps its place in the KV cache: `Session`."""

from __future__ import annotations

import os
from array import array
from collections.abc import Mapping, Sequence

from .engine import Engine, Request, Scheduler
from .engine.request import Sequence as Answer
from .errors import ContextBusyError, StateError
from .params import ParameterError
from .sampling import SamplerChain

TYPE_CHECKING = False
if TYPE_CHECKING:
    from typing import Any

    from .engine.prefix_cache import Claim


class Session:
    """The tokens of a conversation, and a claim on what the KV cache has of them.

    Made by `Llama.session`. Give it to `create_completion(..., session=session)`: the prompt is
    what comes next, and the answer becomes part of the session. The prefix cache gives up its
    content last, and moves it to host memory before that; should it be lost all the same, it is
    computed again. A request that failed or was cancelled leaves what it had generated.

    Thread-safety: one request at a time; `ContextBusyError` otherwise.
    """

    def __init__(
        self,
        engine: Engine[Scheduler],
        key: Mapping[str, Any],
        tokens: Sequence[int] = (),
        adapters: int = 0,
    ) -> None:
        self._engine = engine
        self._key = key
        self._ids = array("i", tokens)
        self._adapters = adapters
        self._request: Request | None = None
        self._closed = False
        self._claim: Claim | None = None
        if tokens:
            engine.exclusively(self._protect)

    @property
    def tokens(self) -> tuple[int, ...]:
        """The token ids so far: prompts and answers."""
        return tuple(self._ids)

    @property
    def n_tokens(self) -> int:
        """How many there are."""
        return len(self._ids)

    def fork(self) -> Session:
        """Return another session with the same past; the two go on independently.

        Costs nothing: cells are shared, or copied when the second one goes on.
        """
        self._require_idle()
        return Session(self._engine, self._key, self._ids, self._adapters)

    def save(self, path: str | os.PathLike[str]) -> None:
        """Write the conversation with its state to a file, atomically.

        What of it is not in memory is computed first. Raises `StateError`, OSError.
        """
        from pathlib import Path

        from .engine.snapshots import write_snapshot

        self._require_idle()
        if not self._ids:
            raise StateError("the session is empty: there is nothing to save")
        write_snapshot(Path(path), self._full_key(), self._ids.tobytes(), self._state())

    @classmethod
    def load(
        cls,
        path: str | os.PathLike[str],
        engine: Engine[Scheduler],
        key: Mapping[str, Any],
        adapters: int = 0,
    ) -> Session:
        """Return the session that `save` wrote, with its state in the KV cache.

        Raises `StateError` for a damaged file or one of another model, naming what differs.
        """
        from pathlib import Path

        from .engine.snapshots import read_snapshot

        session = cls(engine, key, (), adapters)
        tokens, state = read_snapshot(Path(path), session._full_key())
        session._ids = array("i", tokens)
        engine.exclusively(engine.scheduler.adopt, session._ids, state, adapters)
        engine.exclusively(session._protect)
        return session

    def begin(self, request: Request) -> None:
        """Make `request`, whose prompt goes on from here, the one that extends the session."""
        self._require_idle()
        if request.prompt[: len(self._ids)] != list(self._ids):
            raise ContextBusyError("the session went on while this request was prepared")
        self._request = request
        request.on_end = self._finished

    def close(self) -> None:
        """Give up the claim on the cache. Idempotent."""
        self._closed = True
        self._release()

    def __enter__(self) -> Session:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def __del__(self) -> None:
        if hasattr(self, "_claim"):
            self._release()

    def __repr__(self) -> str:
        return f"<Session of {len(self._ids)} tokens{' closed' if self._closed else ''}>"

    def _finished(self, answer: Answer) -> None:
        """Take the answer in; called by the scheduler."""
        self._ids = array("i", [*answer.request.prompt, *answer.tokens])
        self._adapters = answer.request.adapters
        if not self._closed:
            self._protect()

    def _protect(self) -> None:
        cache = self._engine.scheduler.cache
        old, self._claim = self._claim, cache.protect(self._ids, self._adapters)
        if old is not None:
            cache.unprotect(old)

    def _release(self) -> None:
        claim, self._claim = self._claim, None
        if claim is not None:
            # The collector may call this anywhere, so it waits for the next step.
            self._engine.later(self._engine.scheduler.cache.unprotect, claim)

    def _state(self) -> bytes:
        """Have a slot hold exactly these tokens, and return its state."""
        taken: list[bytes | None] = []

        def take(answer: Answer) -> None:
            # Called while it has its slot: afterwards anybody may take that.
            if answer.slot is not None:
                taken.append(self._engine.scheduler.stepper.save(answer.slot))

        n_ctx = self._engine.scheduler.context.n_ctx_seq
        if len(self._ids) > n_ctx:
            raise StateError(
                f"the session fills its context of {n_ctx} tokens: its last token has no state"
            )
        request = Request(
            prompt=list(self._ids),
            sampler=SamplerChain().greedy(),
            seed=0,
            max_tokens=0,
            adapters=self._adapters,
            on_end=take,
        )
        self._engine.submit(request, draining=True)
        while not request.done:
            self._engine.advance(request)
        if request.error is not None:
            raise request.error
        if not taken or taken[0] is None:
            raise StateError("the request that computes the session was cancelled")
        return taken[0]

    def _full_key(self) -> dict[str, Any]:
        namespace = self._engine.scheduler.cache.namespaces[self._adapters]
        return {**self._key, "adapters": namespace}

    def _require_idle(self) -> None:
        if self._closed:
            raise ParameterError("session: it is closed")
        if self._request is not None and not self._request.done:
            raise ContextBusyError("the session is running a request: wait for it, or fork it")
