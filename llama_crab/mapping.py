"""Many prompts over one engine, with answers in the prompts' order; and how far it is."""

from __future__ import annotations

import asyncio
import contextlib
import sys
import threading
import time
from collections import deque
from collections.abc import AsyncIterator, Callable, Iterable, Iterator, Mapping, Sized
from importlib import import_module
from typing import Any, Generic, TypeVar, cast

from .completion import Completion
from .errors import ClosedError
from .params import ParameterError

TYPE_CHECKING = False
if TYPE_CHECKING:
    from types import TracebackType

    from .handle import CompletionHandle
    from .request_builder import Prompt

    # Starts a completion. The listener is called, by any thread, when it may have ended.
    Submit = Callable[[Prompt, int | None, "Listener", dict[str, Any]], CompletionHandle]

Result_co = TypeVar("Result_co", covariant=True)
Listener = Callable[[], object]

# Results that wait for an earlier one, per request in flight: with fewer, one long answer leaves
# the others nothing to do.
_AHEAD = 4
_REDRAW_SEC = 0.1


def n_in_flight(n_seq_max: int) -> int:
    """Return how many requests keep `n_seq_max` sequences busy, those that wait included."""
    return 2 * n_seq_max + 2


class Window:
    """Pulls prompts as needed, keeps a bounded number running, and gives outcomes in their order.

    `wake` is called when one has ended. Thread-safety: none, but `wake` is called by any thread.
    """

    def __init__(
        self,
        submit: Submit,
        prompts: Iterable[Prompt | Mapping[str, Any]],
        max_tokens: int | None,
        options: Mapping[str, Any],
        n_running_max: int,
    ) -> None:
        if isinstance(prompts, (str, bytes, Mapping)) or not isinstance(prompts, Iterable):
            raise ParameterError(f"prompts: expected several prompts, not {type(prompts).__name__}")
        self._submit = submit
        self._prompts = iter(prompts)
        self._defaults = {"max_tokens": max_tokens, **options}
        self._n_running_max = n_running_max
        self._turns: deque[_Turn] = deque()  # all that were pulled and not taken, in order
        self._running: list[_Turn] = []
        # Why no more are pulled; raised when those before it have been taken.
        self._end: Exception | None = None
        self.wake: Listener = lambda: None

    def take(self) -> Completion | Exception | None:
        """Return the next prompt's result or its error, or None while there is neither.

        Raises StopIteration after the last, what the iterable of prompts raised, `ClosedError`.
        """
        self._settle()
        self._fill()
        if not self._turns:
            raise self._end or StopIteration
        outcome = self._turns[0].outcome
        if outcome is not None:
            self._turns.popleft()
        return outcome

    def clear(self) -> list[CompletionHandle]:
        """Forget everything; return what still runs, youngest first."""
        self._end = StopIteration()
        running = [turn.handle for turn in reversed(self._running) if turn.handle is not None]
        self._running.clear()
        self._turns.clear()
        return running

    def _settle(self) -> None:
        """Put results in the place of requests that have ended."""
        running = []
        for turn in self._running:
            if turn.handle is not None and turn.handle.done:
                try:
                    turn.outcome = turn.handle.result()
                except Exception as error:
                    turn.outcome = error
                turn.handle = None
            else:
                running.append(turn)
        self._running = running

    def _fill(self) -> None:
        while (
            self._end is None
            and len(self._running) < self._n_running_max
            and len(self._turns) < _AHEAD * self._n_running_max
        ):
            try:
                prompt = next(self._prompts)
            except Exception as error:
                self._end = error
                return
            turn = _Turn()
            try:
                turn.handle = self._start(prompt)
            except ClosedError as error:
                self._end = error
                return
            except Exception as error:
                turn.outcome = error
            else:
                self._running.append(turn)
            self._turns.append(turn)

    def _start(self, prompt: Prompt | Mapping[str, Any]) -> CompletionHandle:
        own = prompt if isinstance(prompt, Mapping) else {"prompt": prompt}
        options = {**self._defaults, **own}
        if "prompt" not in own:
            raise ParameterError("prompt: missing")
        return self._submit(options.pop("prompt"), options.pop("max_tokens"), self.wake, options)


class _Turn:
    """One prompt's place in the order: a request that runs, or its outcome."""

    __slots__ = ("handle", "outcome")

    def __init__(self) -> None:
        self.handle: CompletionHandle | None = None
        self.outcome: Completion | Exception | None = None


class CompletionMap(Iterator[Result_co]):
    """The results of `Llama.map`, in the order of the prompts; also a context manager.

    Closing it, or dropping it, cancels what is in flight. So does an error that it raises, after
    which it is at its end.

    Thread-safety: one thread at a time.
    """

    def __init__(
        self, window: Window, *, return_exceptions: bool, bar: ProgressBar | None = None
    ) -> None:
        self._window = window
        self._return_exceptions = return_exceptions
        self._bar = bar
        self._changed = threading.Event()
        window.wake = self._changed.set

    def __iter__(self) -> CompletionMap[Result_co]:
        return self

    def __next__(self) -> Result_co:
        try:
            while True:
                self._changed.clear()
                outcome = self._window.take()
                if outcome is not None:
                    return self._taken(outcome)
                self._changed.wait()
        except BaseException:
            self.close()
            raise

    def _taken(self, outcome: Completion | Exception) -> Result_co:
        if isinstance(outcome, Exception) and not self._return_exceptions:
            raise outcome
        if self._bar is not None:
            self._bar.advance()
        return cast(Result_co, outcome)

    def close(self) -> None:
        """Cancel what is in flight and end. Idempotent."""
        for handle in self._window.clear():
            handle.cancel()
        self._end_bar()

    def _end_bar(self) -> None:
        if self._bar is not None:
            self._bar.close()

    def __enter__(self) -> CompletionMap[Result_co]:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self.close()


class AsyncCompletionMap(AsyncIterator[Result_co], Generic[Result_co]):
    """The results of `AsyncLlama.map`: as `CompletionMap`, for ``async for`` and ``async with``.

    Cancelling a task that waits for the next result ends it. Thread-safety: one task at a time.
    """

    def __init__(self, results: CompletionMap[Result_co]) -> None:
        self._results = results
        self._window = results._window
        self._changed: asyncio.Event | None = None

    def __aiter__(self) -> AsyncCompletionMap[Result_co]:
        return self

    async def __anext__(self) -> Result_co:
        changed = self._changed or self._listen()
        try:
            while True:
                changed.clear()
                outcome = self._window.take()
                if outcome is not None:
                    return self._results._taken(outcome)
                await changed.wait()
        except StopIteration:
            await self.aclose()
            raise StopAsyncIteration from None
        except asyncio.CancelledError:
            # Dropped handles cancel; to wait for that would hold the cancelled task back.
            self._window.clear()
            self._results._end_bar()
            raise
        except Exception:
            await self.aclose()
            raise

    def _listen(self) -> asyncio.Event:
        loop = asyncio.get_running_loop()
        changed = self._changed = asyncio.Event()

        def wake() -> None:
            with contextlib.suppress(RuntimeError):  # the loop is closed: nobody waits any more
                loop.call_soon_threadsafe(changed.set)

        self._window.wake = wake
        return changed

    async def aclose(self) -> None:
        """Cancel what is in flight and end, without keeping the event loop waiting. Idempotent."""
        await asyncio.gather(*[handle.aclose() for handle in self._window.clear()])
        self._results._end_bar()

    async def __aenter__(self) -> AsyncCompletionMap[Result_co]:
        return self

    async def __aexit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        await self.aclose()


class ProgressBar:
    """How many are done, how fast it goes and what is left; on stderr, if that is a terminal.

    Drawn by rich where it is installed, else as one line that is written again. `done` are those
    of an earlier run, which count for the total and not for the rate.

    Thread-safety: none.
    """

    def __init__(self, total: int | None, done: int = 0) -> None:
        self._total = total
        self._done = self._before = done
        self._began = self._drawn = time.monotonic()
        self._width = 0
        self._rich = _rich_progress(total, done)
        is_terminal = sys.stderr is not None and sys.stderr.isatty()
        self._shows = self._rich is not None or is_terminal

    @classmethod
    def over(cls, items: Iterable[object]) -> ProgressBar:
        """Return a bar for `items`, with their number where it is known."""
        return cls(len(items) if isinstance(items, Sized) else None)

    def advance(self) -> None:
        """Count one more."""
        self._done += 1
        if self._shows and time.monotonic() - self._drawn >= _REDRAW_SEC:
            self._draw()

    def close(self) -> None:
        """Draw the last state and leave the line. Idempotent."""
        if self._shows:
            self._shows = False
            self._draw()
            if self._rich is not None:
                self._rich.stop()
            else:
                sys.stderr.write("\n")

    def __del__(self) -> None:
        # Rich hides the cursor meanwhile.
        if hasattr(self, "_shows"):
            self.close()

    def _draw(self) -> None:
        self._drawn = time.monotonic()
        seconds, n_new = self._drawn - self._began, self._done - self._before
        rate = f"{n_new / seconds if seconds else 0.0:.2f}/s"
        if self._rich is not None:
            self._rich.update(self._rich.task_ids[0], completed=self._done, rate=rate, refresh=True)
            return
        text = f"{self._done}" if self._total is None else f"{self._done}/{self._total}"
        text += f"  {rate}"
        if self._total is not None and n_new and self._done < self._total:
            text += f"  {_clock(seconds / n_new * (self._total - self._done))} left"
        sys.stderr.write("\r" + text.ljust(self._width))
        sys.stderr.flush()
        self._width = len(text)


def _rich_progress(total: int | None, done: int) -> Any:
    """Return a started ``rich.progress.Progress`` of one task; None where rich cannot draw one."""
    try:
        console = import_module("rich.console").Console(stderr=True)
        rich = import_module("rich.progress")
    except ImportError:
        return None
    if not (console.is_terminal or console.is_jupyter):
        return None
    progress = rich.Progress(
        rich.BarColumn(),
        rich.MofNCompleteColumn(),
        rich.TextColumn("{task.fields[rate]}"),
        rich.TimeRemainingColumn(),
        console=console,
        auto_refresh=False,
    )
    progress.add_task("", total=total, completed=done, rate="")
    progress.start()
    return progress


def _clock(seconds: float) -> str:
    minutes, rest = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02d}:{rest:02d}"
