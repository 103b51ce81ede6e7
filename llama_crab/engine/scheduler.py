"""The one generation loop: admit, decode, sample, hand out."""

from __future__ import annotations

from collections import deque

from .. import _core, logs
from ..completion import FinishReason
from ..errors import DecodeAborted, DecodeError, KVCacheFullError, LlamaCrabError, SamplerError
from .prefix_cache import PrefixCache
from .request import News, RawLogprobs, Request, Sequence

TYPE_CHECKING = False
if TYPE_CHECKING:
    from .processors import Processors


class Scheduler:
    """Runs requests over the sequences of one context, several in each batch.

    `step` is the loop's body. It decodes one token of every running sequence, fills the rest of
    the batch with pieces of waiting prompts, and collects what is new. The heavy part is one call
    into the core without the GIL; Python looks at a sequence only when it has news.

    Thread-safety: none; the facade holds a lock around it.
    """

    def __init__(self, context: _core.Context) -> None:
        self.context = context
        self.stepper = _core.Stepper(context)
        # A prompt is prefilled in micro-batches anyway; handing over one at a time lets running
        # sequences continue, and Ctrl-C act, in between.
        self._budget = max(context.n_ubatch, context.n_seq_max)
        self._cache = PrefixCache(self.stepper)
        self._waiting: deque[Sequence] = deque()
        self._running: dict[int, Sequence] = {}
        self._interrupted = False
        self._processors: Processors | None = None  # made when a request has some

    @property
    def n_running(self) -> int:
        """Sequences that have a slot."""
        return len(self._running)

    @property
    def n_waiting(self) -> int:
        """Sequences that wait for a slot."""
        return len(self._waiting)

    def submit(self, request: Request) -> None:
        """Queue a request; `step` until it is done."""
        request.submit_us = request.submit_us or _core.time_us()
        self._waiting.extend(request.sequences)

    def cancel(self, request: Request) -> None:
        """End a request now; what it has generated stays. Does nothing when it is done."""
        if request.done:
            return
        for sequence in request.sequences:
            if sequence.slot is not None:
                self._retire(sequence, "cancelled", None)
            elif sequence.finish_reason is None:
                sequence.finish_reason = "cancelled"
        self._waiting = deque(s for s in self._waiting if s.request is not request)
        request.end_us = _core.time_us()

    def cancel_all(self) -> None:
        """End every request, running or waiting."""
        for request in self._requests():
            self.cancel(request)

    def step(self, n_steps_max: int = 1) -> None:
        """Advance everything by one batch; by more, up to `n_steps_max`, while there is no news.

        An error that concerns one request ends that request and is kept in `Request.error`.
        Raises `DecodeError` when the context itself fails; then every request has ended with it.
        """
        if self._interrupted:
            self._recover()
        self._interrupted = True
        if self._waiting:
            self._admit()
        try:
            news = self.stepper.step(self._budget, n_steps_max, self._processors)
        except KVCacheFullError as error:
            if not self._cache.evict(self._idle()):
                self._give_way(error)
            self._interrupted = False
            return
        except DecodeAborted:
            return  # nothing is lost: the next step decodes again what was dropped
        except DecodeError as error:
            self._interrupted = False
            for request in self._requests():
                self._fail(request, error)
            raise
        finally:
            if _core.log_pending():
                logs.flush()
        for slot in news:
            sequence = self._running.get(slot)
            if sequence is not None:
                self._collect(sequence)
        self._interrupted = False

    def prompt_logprobs(self, request: Request) -> list[RawLogprobs]:
        """Return the prompt's log-probabilities so far, from the sequence that prefills it."""
        for sequence in request.sequences:
            found = sequence.prompt_logprobs
            if sequence.slot is not None:
                found = self.stepper.prompt_logprobs(sequence.slot)
            if found:
                return found
        return []

    def _requests(self) -> set[Request]:
        return {s.request for s in (*self._running.values(), *self._waiting)}

    def _idle(self) -> list[int]:
        return [slot for slot in range(self.stepper.n_slots) if slot not in self._running]

    def _give_way(self, error: KVCacheFullError) -> None:
        """End the sequence that was admitted last: the memory that all share is full."""
        youngest = next(reversed(self._running.values()))
        if youngest.slot is not None and self.stepper.progress(youngest.slot)[3] > 0:
            self._retire(youngest, "length", None)
        else:
            self._fail(youngest.request, error)

    def _recover(self) -> None:
        """Finish what a signal has cut short: it came between the core's work and ours."""
        for slot in self._idle():
            self.stepper.release(slot)
        for sequence in list(self._running.values()):
            self._collect(sequence)
        self._interrupted = False

    def _admit(self) -> None:
        while self._waiting and len(self._running) < self.stepper.n_slots:
            # It leaves the queue last: a signal in between must not lose it.
            sequence = self._waiting[0]
            try:
                if sequence.slot is None or self._running.get(sequence.slot) is not sequence:
                    self._assign(sequence)
            except LlamaCrabError as error:
                self._fail(sequence.request, error)
            else:
                self._waiting.popleft()

    def _assign(self, sequence: Sequence) -> None:
        request = sequence.request
        sampler = request.sampler.compile(
            self.context.model, request.seed, request.logit_bias, choice=sequence.index
        )
        if request.logits_processors and self._processors is None:
            from .processors import Processors

            self._processors = Processors(self.stepper, self._running)
        leader = self._leader(request)
        reuse = request.cache_prompt and not request.prompt_logprobs and leader < 0
        slot, n_keep = self._cache.best(self._idle(), request.prompt)
        self.stepper.assign(
            slot,
            request.prompt,
            sampler=sampler,
            n_keep=n_keep if reuse else 0,
            leader=leader,
            max_tokens=-1 if request.max_tokens is None else request.max_tokens,
            min_tokens=request.min_tokens,
            stop_tokens=request.stop_tokens,
            n_logprobs=request.n_logprobs,
            prompt_logprobs=request.prompt_logprobs and leader < 0,
            ignore_eos=request.ignore_eos,
            special=request.special,
            emit=request.emit,
            processed=bool(request.logits_processors),
        )
        self._cache.touch(slot)
        sequence.slot = slot
        self._running[slot] = sequence

    def _leader(self, request: Request) -> int:
        """Return the slot that is prefilling the same request's prompt, or -1."""
        for other in request.sequences:
            if other.slot is not None and self.stepper.progress(other.slot)[3] == 0:
                return other.slot
        return -1

    def _collect(self, sequence: Sequence) -> None:
        """Take what is new from the core; end the sequence if it has finished."""
        slot = sequence.slot
        if slot is None:
            return
        told = sequence.n_tokens_told
        data, tokens, ends, reason = self.stepper.news(slot, sequence.n_bytes, told)
        sequence.n_bytes += len(data)
        text = sequence.stream.push(data)
        if sequence.stream.stop is not None:
            self._retire(sequence, "stop", sequence.stream.stop, text)
        elif reason is None:
            self._tell(sequence, text, tokens, ends)
        elif reason == "error":
            self._tell(sequence, text, tokens, ends)
            error = sequence.error or SamplerError(self.stepper.error(slot))
            self._fail(sequence.request, error)
        elif reason == "stop_token":
            self._retire(sequence, "stop", self.stepper.finish(slot)[1], text)
        elif reason == "eog":
            self._retire(sequence, "stop", None, text)
        elif reason != "cancelled":
            self._retire(sequence, "length", None, text)

    def _tell(self, sequence: Sequence, text: str, tokens: list[int], ends: list[int]) -> None:
        """Hand the text and the tokens that made it to a streaming reader."""
        if text:
            sequence.text_parts.append(text)
        request, slot = sequence.request, sequence.slot
        if not request.stream or slot is None:
            return
        if sequence.stream.end < sequence.n_bytes:
            # Tokens that may yet turn out to spell a stop string wait with their text.
            n = sequence.stream.n_tokens(sequence.n_bytes_told, ends)
            del tokens[n:], ends[n:]
        if not tokens and not text:
            return
        told = sequence.n_tokens_told
        raw = [] if request.logprobs is None else self.stepper.logprobs(slot, told)[: len(tokens)]
        sequence.n_tokens_told = told + len(tokens)
        sequence.n_bytes_told = ends[-1] if ends else sequence.n_bytes_told
        request.news.append(News(sequence, text, tuple(tokens), raw, False))

    def _retire(
        self,
        sequence: Sequence,
        reason: FinishReason,
        stop_reason: str | int | None,
        text: str = "",
    ) -> None:
        """End a sequence: take the rest from its slot and free it."""
        slot = sequence.slot
        if slot is None:
            return
        data, sequence.tokens, ends, _ = self.stepper.news(slot, sequence.n_bytes, 0)
        sequence.n_bytes += len(data)
        text += sequence.stream.push(data) + sequence.stream.flush()
        if sequence.stream.stop is not None:
            # The rest spelt the stop string.
            del sequence.tokens[sequence.stream.n_tokens(0, ends) :]
        sequence.logprobs = self.stepper.logprobs(slot)[: len(sequence.tokens)]
        sequence.prompt_logprobs = self.stepper.prompt_logprobs(slot)
        sequence.n_cached = self.stepper.progress(slot)[1]
        sequence.times = self.stepper.times(slot)
        sequence.finish_reason = reason
        sequence.stop_reason = stop_reason
        if text:
            sequence.text_parts.append(text)
        if sequence.request.stream:
            told = sequence.n_tokens_told
            raw = [] if sequence.request.logprobs is None else sequence.logprobs[told:]
            last = News(sequence, text, tuple(sequence.tokens[told:]), raw, True)
            sequence.request.news.append(last)
        self.stepper.release(slot)
        self._cache.touch(slot)
        self._running.pop(slot, None)
        sequence.slot = None
        request = sequence.request
        if all(other.finish_reason is not None for other in request.sequences):
            request.end_us = _core.time_us()

    def _fail(self, request: Request, error: Exception) -> None:
        request.error = error
        self.cancel(request)
        request.end_us = request.end_us or _core.time_us()
