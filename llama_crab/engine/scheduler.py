"""The one generation loop: admit, decode, sample, hand out."""

from __future__ import annotations

from array import array
from collections import Counter
from collections.abc import Mapping

from .. import _core, logs
from ..errors import (
    DecodeAborted,
    DecodeError,
    KVCacheFullError,
    LlamaCrabError,
)
from .deadlines import Deadlines
from .delivery import Delivery
from .prefix_cache import Placement, PrefixCache
from .request import RawLogprobs, Request, Sequence
from .swap import Swap
from .user_code import UserCode
from .waiting import WaitingLine

TYPE_CHECKING = False
if TYPE_CHECKING:
    from typing import Any

    from .snapshots import SnapshotStore
    from .tally import Tally

# Cells that a sequence must find beside its own for each one that runs already: else it would be
# admitted only to be suspended again.
_CELLS_TO_GROW = 16


class Scheduler:
    """Runs requests over the sequences of one context, several in each batch.

    `step` is the loop's body. It decodes one token of every running sequence, fills the rest of
    the batch with pieces of waiting prompts, and collects what is new. The heavy part is one call
    into the core without the GIL; Python looks at a sequence only when it has news.

    The queue goes by `Request.rank`. A sequence gives its slot up for one of higher priority, its
    cells when a unified KV cache is full, and both while its reader is behind and others wait: it
    is suspended, with its state in host memory, and goes on where it was.

    Parameters
    ----------
    context
        Its memory belongs to the scheduler from now on.
    store
        Where the prefix cache keeps what has to leave the context; None for nowhere.
    max_itl_ms
        Milliseconds between two tokens of an answer up to which prompts may fill its batches.

    Thread-safety: none; the engine holds a lock around it.
    """

    def __init__(
        self,
        context: _core.Context,
        store: SnapshotStore | None = None,
        max_itl_ms: float | None = None,
    ) -> None:
        self.context = context
        self.stepper = _core.Stepper(context)
        if max_itl_ms is not None:
            self.stepper.target_us = int(max_itl_ms * 1000)
        # A prompt is prefilled in micro-batches anyway; handing over one at a time lets running
        # sequences continue, and Ctrl-C act, in between.
        self._budget = max(context.n_ubatch, context.n_seq_max)
        self._unified = context.kv_unified or context.n_seq_max == 1
        self.cache = PrefixCache(self.stepper, store)
        self._swap = Swap(self.stepper)
        self._waiting = WaitingLine()
        self._parked: dict[Sequence, None] = {}  # suspended while their reader is behind
        self._running: dict[int, Sequence] = {}
        self._held: dict[Sequence, None] = {}  # of those, whose reader is behind
        self._priorities: Counter[int] = Counter()  # of those that run
        # The sequence that found no cells, and the count of what may have made room since.
        self._no_cells_for: tuple[Sequence, int] | None = None
        self._n_changes = 0
        self._delivery = Delivery(self.stepper, self._leave, self._hold, self._fail)
        self._deadlines = Deadlines(self._fail)
        self._interrupted = False
        self._user_code = UserCode(self.stepper, self._running)

    @property
    def n_running(self) -> int:
        """Sequences that have a slot."""
        return len(self._running)

    @property
    def n_waiting(self) -> int:
        """Sequences that wait for a slot."""
        return len(self._waiting) + len(self._parked)

    @property
    def n_suspended(self) -> int:
        """How often a running sequence had to leave its slot."""
        return self._swap.n_suspended

    @property
    def told(self) -> dict[Request, None]:
        """Requests with a listener that have got news or ended; the engine calls and clears it."""
        return self._delivery.told

    @property
    def tally(self) -> Tally:
        """Counts of the requests that have ended."""
        return self._delivery.tally

    def stats(self) -> Mapping[str, Any]:
        """Return counts of the queue, the steps and the prefix cache."""
        return {
            "n_running": self.n_running,
            "n_waiting": self.n_waiting,
            "n_suspended": self.n_suspended,
            "n_steps": self.stepper.n_steps,
            "n_decoded": self.stepper.n_decoded,
            "speculation": self.stepper.speculation(),
            **self.cache.stats(),
        }

    def submit(self, request: Request) -> None:
        """Queue a request; `step` until it is done."""
        if request.done:
            return
        request.submit_us = request.submit_us or _core.time_us()
        for sequence in request.sequences:
            self._waiting.push(sequence)
        self._deadlines.watch(request)

    def cancel(self, request: Request) -> None:
        """End a request now; what it has generated stays. Does nothing when it is done."""
        if request.done:
            return
        for sequence in request.sequences:
            if sequence.slot is not None:
                self._delivery.retire(sequence, "cancelled", None)
            elif sequence.finish_reason is None:
                self._delivery.cancel_paused(sequence)
                self._swap.drop(sequence)
            self._parked.pop(sequence, None)
        self._waiting.remove_request(request)
        self._deadlines.forget(request)
        self._delivery.end(request)

    def cancel_all(self) -> None:
        """End every request, running or waiting."""
        for request in self._requests():
            self.cancel(request)

    def adopt(self, ids: array[int], state: bytes, adapters: int) -> None:
        """Put the state of a saved sequence into the prefix cache. Raises `StateError`."""
        self.cache.adopt(ids, state, adapters, self._idle())

    def close(self) -> None:
        """Give up what it has of the context."""
        self.stepper.close()

    def fail_all(self, error: Exception) -> None:
        """End every request with `error`."""
        for request in self._requests():
            self._fail(request, error)

    def any_request(self) -> Request | None:
        """Return a request that has not ended, or None."""
        for group in (self._running.values(), self._waiting, self._parked):
            for sequence in group:
                return sequence.request
        return None

    def pause(self) -> None:
        """Have a `step` of another thread return after the batch it is at."""
        self.stepper.pause()

    def interrupt(self, request: Request) -> None:
        """Stop the batch of another thread that computes the prompt of `request`.

        Where the backend can, and when nothing is lost: what others lose is decoded again.
        """
        slots = [s.slot for s in request.sequences if s.slot is not None]
        if self.stepper.can_abort and any(self.stepper.n_in_batch(slot) > 1 for slot in slots):
            self.context.abort()

    def can_go_on(self, request: Request) -> bool:
        """Whether a sequence of `request` is held though its reader has caught up.

        Thread-safety: any thread.
        """
        return 2 * len(request.news) <= request.n_news_max and any(
            sequence in self._held or sequence in self._parked for sequence in request.sequences
        )

    def unhold(self, request: Request) -> None:
        """Go on with sequences that were held because their reader was behind."""
        for sequence in request.sequences:
            if sequence.slot is not None and sequence in self._held:
                del self._held[sequence]
                self.stepper.hold(sequence.slot, False)
            elif sequence in self._parked:
                del self._parked[sequence]
                self._waiting.push(sequence)

    def step(self, n_steps_max: int = 1) -> bool:
        """Advance everything by one batch; by more, up to `n_steps_max`, while there is no news.

        Return False when nothing could be done: all that runs is held. An error that concerns one
        request ends that request and is kept in `Request.error`. Raises `DecodeError` when the
        context itself fails; then every request has ended with it.
        """
        if self._interrupted:
            self._recover()
        self._interrupted = True
        until_us = self._deadlines.expire()
        if self._waiting:
            self._admit()
        before, user_code = self.stepper.n_steps, self._user_code
        try:
            news = self.stepper.step(
                self._budget, n_steps_max, user_code.processors, until_us, user_code.drafters
            )
        except KVCacheFullError as error:
            logs.flush(expected=True)
            self._make_room(error)
            self._interrupted = False
            return True
        except DecodeAborted:
            logs.flush(expected=True)
            self._interrupted = False
            return True  # nothing is lost: the next step decodes again what was dropped
        except DecodeError as error:
            self._interrupted = False
            self.fail_all(error)
            raise
        finally:
            if _core.log_pending():
                logs.flush()
        for slot in news:
            sequence = self._running.get(slot)
            if sequence is not None:
                if self.cache.takes_checkpoint(sequence.request):
                    self.cache.checkpoint(slot, sequence.request)
                self._delivery.collect(sequence)
        for sequence, reason in user_code.take_failed().items():
            self._fail(sequence.request, reason)
        self._interrupted = False
        return self.stepper.n_steps != before or bool(news)

    def prompt_logprobs(self, request: Request) -> list[RawLogprobs]:
        """Return the prompt's log-probabilities so far, from the sequence that prefills it."""
        for sequence in request.sequences:
            found = sequence.prompt_logprobs
            if sequence.slot is not None:
                found = self.stepper.prompt_logprobs(sequence.slot)
            if found:
                return found
        return []

    def _requests(self) -> dict[Request, None]:
        everybody = (*self._running.values(), *self._waiting, *self._parked)
        return {sequence.request: None for sequence in everybody}

    def _idle(self) -> list[int]:
        return [slot for slot in range(self.stepper.n_slots) if slot not in self._running]

    def _recover(self) -> None:
        """Finish what a signal has cut short: it came between the core's work and ours."""
        for slot in self._idle():
            self.stepper.release(slot)
        for sequence in list(self._running.values()):
            self._delivery.collect(sequence)
        self._interrupted = False

    def _admit(self) -> None:
        while (sequence := self._waiting.first()) is not None:
            if self._no_cells_for == (sequence, self._n_changes):
                return
            if len(self._running) == self.stepper.n_slots and not self._free_a_slot(sequence):
                return
            # It leaves the queue last: a signal in between must not lose it.
            try:
                started = sequence.slot is not None and sequence is self._running.get(sequence.slot)
                if not started and not self._start(sequence):
                    self._no_cells_for = (sequence, self._n_changes)
                    return
            except LlamaCrabError as error:
                self._fail(sequence.request, error)
            else:
                self._waiting.remove(sequence)

    def _free_a_slot(self, wanted: Sequence) -> bool:
        """Suspend a sequence that must not keep `wanted` waiting; return False if none must."""
        victims = list(self._held)
        if not victims and min(self._priorities, default=0) < wanted.request.priority:
            victims = [
                sequence
                for sequence in self._running.values()
                if sequence.request.priority < wanted.request.priority
                and _rank(sequence) > _rank(wanted)
            ]
        if victims:
            self._suspend(max(victims, key=_rank))
        return bool(victims)

    def _make_room(self, error: KVCacheFullError) -> None:
        """Take cells from what needs them least: a unified cache is full."""
        if self.cache.evict(self._idle()):
            return
        last = max(self._held or self._running.values(), key=_rank)
        if len(self._running) > 1:
            self._suspend(last)
        elif last.slot is not None and self.stepper.progress(last.slot)[3] > 0:
            self._delivery.retire(last, "length", None)
        else:
            self._fail(last.request, error)

    def _fits(self, sequence: Sequence, place: Placement, n_tokens: int) -> bool:
        """Make room for a sequence of `n_tokens`; return False while others need the cells."""
        stepper, n_ctx = self.stepper, self.context.n_ctx
        if not self._unified:
            return True
        n_taken_over = place.n_keep if place.source < 0 and place.leader < 0 else 0
        if n_taken_over == 0:
            self.cache.empty(place.slot)
        suspension = sequence.suspension
        restores = suspension and suspension.state and suspension.n_past > place.n_keep
        n_reused = 0 if restores else place.n_reused
        margin = _CELLS_TO_GROW * (len(self._running) + 1)
        needed = min(n_tokens - n_reused + margin, n_ctx)
        needed -= stepper.progress(place.slot)[2] - n_taken_over  # the rest of that goes
        idle = [slot for slot in self._idle() if slot not in (place.slot, place.source)]
        while stepper.n_cells_used + stepper.n_cells_to_come + needed > n_ctx:
            if self.cache.evict(idle):
                continue
            if not self._free_a_slot(sequence):
                return not self._running
        return True

    def _start(self, sequence: Sequence) -> bool:
        """Give a sequence a slot; return False when there are no cells for it yet."""
        request, suspension = sequence.request, sequence.suspension
        ids = suspension.ids if suspension else array("i", request.prompt)
        leader = -1 if suspension else self._leader(request)
        reuse = request.cache_prompt and not request.prompt_logprobs and leader < 0
        place = self.cache.place(ids, request.adapters, self._idle(), reuse=reuse)
        if leader >= 0:
            place.leader, place.n_shared = leader, len(ids)
        n_changes = self._n_changes
        if not self._fits(sequence, place, len(ids)):
            return False
        if self._n_changes != n_changes and leader < 0:
            # What had to go may have been where the beginning was to come from.
            place = self.cache.place(ids, request.adapters, self._idle(), reuse=reuse)
        if suspension:
            self._swap.back(sequence, place)
        else:
            self._assign(sequence, place)
        self.cache.hold(place.slot, ids, request.adapters)
        sequence.slot = place.slot
        self._running[place.slot] = sequence
        self._priorities[request.priority] += 1
        return True

    def _assign(self, sequence: Sequence, place: Placement) -> None:
        request = sequence.request
        sampler = sequence.compile_sampler(self.context.model)
        self._user_code.prepare(request)
        checkpoint = len(request.prompt) - 1 if self.cache.takes_checkpoint(request) else -1
        self.stepper.assign(
            place.slot,
            request.prompt,
            sampler=sampler,
            source=place.source,
            n_keep=place.n_keep,
            leader=place.leader,
            n_shared=place.n_shared,
            checkpoint=checkpoint,
            rank=request.rank,
            adapters=request.adapters,
            # One first token per request, whose answers get theirs from the same row.
            submit_us=0 if sequence.index else request.submit_us,
            max_tokens=-1 if request.max_tokens is None else request.max_tokens,
            min_tokens=request.min_tokens,
            stop_tokens=request.stop_tokens,
            n_logprobs=request.n_logprobs,
            prompt_logprobs=request.prompt_logprobs and place.leader < 0,
            ignore_eos=request.ignore_eos,
            special=request.special,
            emit=request.emit,
            processed=bool(request.logits_processors),
            speculation=request.speculation,
        )

    def _suspend(self, sequence: Sequence) -> None:
        """Take a running sequence out of its slot, to go on later from where it is."""
        self._delivery.pause(sequence)
        slot = sequence.slot
        if slot is None:
            return  # it had ended
        held = sequence in self._held
        self._swap.out(sequence, slot)
        self.cache.forget(slot)
        self._free(sequence, slot)
        if held:
            self._parked[sequence] = None
        else:
            self._waiting.push(sequence)

    def _leader(self, request: Request) -> int:
        """Return the slot that is prefilling the same request's prompt, or -1."""
        for other in request.sequences:
            if other.slot is not None and self.stepper.progress(other.slot)[3] == 0:
                return other.slot
        return -1

    def _hold(self, sequence: Sequence, slot: int) -> None:
        self.stepper.hold(slot, True)
        self._held[sequence] = None
        self._n_changes += 1  # others may take its cells now
        if self.can_go_on(sequence.request):  # the reader was faster than this
            self.unhold(sequence.request)

    def _leave(self, sequence: Sequence, slot: int) -> None:
        self.cache.keep(slot)
        self._free(sequence, slot)

    def _free(self, sequence: Sequence, slot: int) -> None:
        if self._running.pop(slot, None) is not None:
            self._priorities[sequence.request.priority] -= 1
            if not self._priorities[sequence.request.priority]:
                del self._priorities[sequence.request.priority]
        self._held.pop(sequence, None)
        self._n_changes += 1
        sequence.slot = None

    def _fail(self, request: Request, error: Exception) -> None:
        request.error = error
        self.cancel(request)
        request.end_us = request.end_us or _core.time_us()


def _rank(sequence: Sequence) -> int:
    return sequence.request.rank
