"""A request's answer as it comes: `CompletionStream`."""

from __future__ import annotations

import time
from collections.abc import Iterator, Sequence

from . import _core
from .completion import (
    Completion,
    CompletionChunk,
    Logprobs,
    TextOffsets,
    TokenLogprob,
)
from .engine import Engine, Request, Scheduler
from .engine.request import RawLogprobs, token_logprobs
from .errors import LlamaCrabError

TYPE_CHECKING = False
if TYPE_CHECKING:
    from types import TracebackType

    from ._core import Vocab


class CompletionStream(Iterator[CompletionChunk]):
    """The chunks of one request as they are generated; also a context manager.

    Closing it (or dropping it) before its end cancels the request. `result` gives the whole
    `Completion` once it has ended.

    Thread-safety: one thread at a time.
    """

    def __init__(
        self,
        engine: Engine[Scheduler],
        request: Request,
        vocab: Vocab,
        echo: str,
        model: str,
        load_sec: float,
    ) -> None:
        self._engine = engine
        self._request = request
        self._vocab = vocab
        self._echo = echo
        self._model = model
        self._load_sec = load_sec
        self._created = int(time.time())
        self._n_ended = 0
        self._offsets: dict[int, TextOffsets] = {}
        if engine.on_submit is not None:
            engine.on_submit(request)
        try:
            engine.submit(request)
        except LlamaCrabError as error:
            request.error = error
            request.end_us = _core.time_us()  # it will not begin: a session of it is free again
            request.tell_done()
            raise

    @property
    def id(self) -> str:
        """The request's id, the same in all chunks."""
        return self._request.id

    @property
    def seed(self) -> int:
        """The seed in use."""
        return self._request.seed

    @property
    def indexes(self) -> list[int]:
        """The `index` that the chunks of each of the result's choices have."""
        return [sequence.index for sequence in self._request.chosen()]

    def __iter__(self) -> CompletionStream:
        return self

    def __next__(self) -> CompletionChunk:
        try:
            while not self._has_chunk():
                self._engine.advance(self._request)
        except (StopIteration, LlamaCrabError):
            raise
        except BaseException:
            self.close()
            raise
        return self._chunk()

    def _has_chunk(self) -> bool:
        """Whether there is a chunk to take. Raises its error, or StopIteration at the end."""
        request = self._request
        if request.news:
            return True
        if not request.end_us:
            return False
        if request.error is not None:
            raise request.error
        raise StopIteration

    def close(self) -> None:
        """Cancel the request if it has not ended."""
        if not self._request.done:
            self._engine.cancel(self._request)

    def __enter__(self) -> CompletionStream:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self.close()

    def __del__(self) -> None:
        # An abandoned iterator must not keep its sequence running. The collector may run this
        # inside any call, so it takes no lock: the next step cancels.
        if hasattr(self, "_request") and not self._request.done:
            self._engine.abandon(self._request)

    def result(self) -> Completion:
        """Return everything as one `Completion`, running the request to its end first."""
        for _ in self:
            pass
        return self._completion()

    def _completion(self) -> Completion:
        request = self._request
        if request.error is not None:
            raise request.error
        return Completion(
            id=request.id,
            created=self._created,
            model=self._model,
            choices=tuple(
                sequence.choice(
                    i,
                    self._echo,
                    self._logprobs(sequence.tokens, sequence.logprobs),
                )
                for i, sequence in enumerate(request.chosen())
            ),
            usage=request.usage(),
            timings=request.timings(self._load_sec),
            seed=request.seed,
        )

    def _chunk(self) -> CompletionChunk:
        request = self._request
        news = request.news.popleft()
        if request.n_news_max:
            self._engine.read(request)
        index = news.sequence.index
        if not news.last and index in self._offsets and request.logprobs is None:
            # Most chunks: nothing but text and tokens.
            return CompletionChunk(
                news.text,
                index,
                news.tokens,
                None,
                None,
                None,
                None,
                None,
                request.id,
                self._created,
                self._model,
            )
        offsets = self._offsets.get(index)
        text = news.text
        if offsets is None:
            text = self._echo + text
            offsets = self._offsets[index] = TextOffsets(len(self._echo))
            logprobs = self._logprobs(news.tokens, news.logprobs, offsets)
        else:
            logprobs = self._logprobs(news.tokens, news.logprobs, offsets, with_prompt=False)
        self._n_ended += news.last
        whole = news.last and self._n_ended == request.n
        return CompletionChunk(
            text=text,
            index=index,
            tokens=news.tokens,
            finish_reason=news.sequence.finish_reason if news.last else None,
            stop_reason=news.sequence.stop_reason if news.last else None,
            logprobs=logprobs,
            usage=request.usage() if whole else None,
            timings=request.timings(self._load_sec) if whole else None,
            id=request.id,
            created=self._created,
            model=self._model,
        )

    def _logprobs(
        self,
        tokens: Sequence[int],
        raw: list[RawLogprobs],
        offsets: TextOffsets | None = None,
        *,
        with_prompt: bool = True,
    ) -> Logprobs | None:
        """Return the public form; `offsets` goes on where the choice's last chunk ended."""
        request = self._request
        if request.logprobs is None:
            return None
        entries: list[TokenLogprob] = []
        begins: list[int] = []
        if with_prompt and request.prompt_logprobs:
            head = request.prompt[0]
            entries.append(TokenLogprob.from_piece(head, self._piece(head), None))
            found = self._engine.exclusively(self._engine.scheduler.prompt_logprobs, request)
            entries += token_logprobs(request.prompt[1 : len(found) + 1], found, self._piece)
            # The echoed text ends where the prompt's last token does; what it does not show (BOS)
            # comes first.
            shown = b"".join([entry.bytes for entry in entries]).decode("utf-8", "replace")
            before = TextOffsets(len(self._echo) - len(shown))
            begins += [before.push(entry.bytes) for entry in entries]
        entries += token_logprobs(list(tokens), raw, self._piece)
        offsets = TextOffsets(len(self._echo)) if offsets is None else offsets
        piece, special = self._vocab.piece, request.special
        begins += [offsets.push(piece(token, special)) for token in tokens]
        return Logprobs(tuple(entries), tuple(begins))

    def _piece(self, token: int) -> bytes:
        return self._vocab.piece(token, True)
