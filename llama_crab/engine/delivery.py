"""What a slot has produced, handed to its request: text, tokens, ends, errors."""

from __future__ import annotations

from collections.abc import Callable

from .. import _core
from ..completion import FinishReason
from ..errors import SamplerError
from .request import News, Request, Sequence
from .tally import Tally


class Delivery:
    """Takes news out of slots and ends sequences that are done.

    `told` gathers the requests that have got something and want to hear of it, `tally` counts those
    that have ended. `leave` is called
    when a sequence has ended, with its slot; `hold` when its reader is behind; `fail` when its
    request has to end.

    Thread-safety: none; the scheduler's.
    """

    def __init__(
        self,
        stepper: _core.Stepper,
        leave: Callable[[Sequence, int], None],
        hold: Callable[[Sequence, int], None],
        fail: Callable[[Request, Exception], None],
    ) -> None:
        self._stepper = stepper
        self._leave = leave
        self._hold = hold
        self._fail = fail
        self.told: dict[Request, None] = {}
        self.tally = Tally()

    def collect(self, sequence: Sequence) -> None:
        """Take what is new from the core; end the sequence if it has finished."""
        slot = sequence.slot
        if slot is None:
            return
        told = sequence.n_tokens_told
        data, tokens, ends, reason = self._stepper.news(slot, sequence.n_bytes, told)
        sequence.n_bytes += len(data)
        text = sequence.stream.push(data)
        if sequence.stream.stop is not None:
            self.retire(sequence, "stop", sequence.stream.stop, text)
        elif reason is None:
            self._tell(sequence, text, tokens, ends)
        elif reason == "error":
            self._tell(sequence, text, tokens, ends)
            error = sequence.error or SamplerError(self._stepper.error(slot))
            self._fail(sequence.request, error)
        elif reason == "stop_token":
            self.retire(sequence, "stop", self._stepper.finish(slot)[1], text)
        elif reason == "eog":
            self.retire(sequence, "stop", None, text)
        elif reason != "cancelled":
            self.retire(sequence, "length", None, text)

    def retire(
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
        text += self._take_answer(sequence, slot)
        self._finish(sequence, reason, stop_reason, text)
        self._stepper.release(slot)
        self._leave(sequence, slot)
        self.end(sequence.request)

    def pause(self, sequence: Sequence) -> None:
        """Take and tell all that a sequence has given, before it leaves its slot for a while."""
        self.collect(sequence)
        if sequence.slot is not None:
            self._take_answer(sequence, sequence.slot, final=False)

    def cancel_paused(self, sequence: Sequence) -> None:
        """End a sequence that has no slot with what it had given before."""
        self._finish(sequence, "cancelled", None, sequence.stream.flush())

    def end(self, request: Request) -> None:
        """Note that a sequence of `request` has ended; so has the request when all have."""
        if not request.end_us and all(s.finish_reason is not None for s in request.sequences):
            request.end_us = _core.time_us()
            request.on_end = None
            self.tally.count(request)
            request.tell_done()
        self._note(request)

    def _take_answer(self, sequence: Sequence, slot: int, *, final: bool = True) -> str:
        """Copy tokens, log-probabilities and times out of a slot; return text not seen before."""
        stepper = self._stepper
        data, sequence.tokens, ends, _ = stepper.news(slot, sequence.n_bytes, 0)
        sequence.n_bytes += len(data)
        text = sequence.stream.push(data)
        if final:
            text += sequence.stream.flush()
        if sequence.stream.stop is not None:
            # The rest spelt the stop string.
            n = sequence.stream.n_tokens(0, ends)
            self.tally.n_cut += len(sequence.tokens) - n
            del sequence.tokens[n:]
        sequence.logprobs = stepper.logprobs(slot)[: len(sequence.tokens)]
        sequence.prompt_logprobs = stepper.prompt_logprobs(slot)
        sequence.n_cached = stepper.progress(slot)[1]
        sequence.times = stepper.times(slot)
        sequence.drafts = stepper.drafts(slot)
        return text

    def _finish(
        self,
        sequence: Sequence,
        reason: FinishReason,
        stop_reason: str | int | None,
        text: str,
    ) -> None:
        sequence.finish_reason = reason
        sequence.stop_reason = stop_reason
        if text:
            sequence.text_parts.append(text)
        if sequence.request.stream:
            sequence.request.news.append(final_news(sequence, text))
        if sequence.request.on_end is not None:
            sequence.request.on_end(sequence)

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
        raw = [] if request.logprobs is None else self._stepper.logprobs(slot, told)[: len(tokens)]
        sequence.n_tokens_told = told + len(tokens)
        sequence.n_bytes_told = ends[-1] if ends else sequence.n_bytes_told
        request.news.append(News(sequence, text, tuple(tokens), raw, False))
        self._note(request)
        if 0 < request.n_news_max <= len(request.news):
            self._hold(sequence, slot)

    def _note(self, request: Request) -> None:
        if request.listener is not None:
            self.told[request] = None


def final_news(sequence: Sequence, text: str) -> News:
    """Return a sequence's last piece: what was not told before."""
    told = sequence.n_tokens_told
    raw = [] if sequence.request.logprobs is None else sequence.logprobs[told:]
    return News(sequence, text, tuple(sequence.tokens[told:]), raw, True)
