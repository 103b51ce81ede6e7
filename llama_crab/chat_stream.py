"""A chat's answer as it comes: `ChatStream`."""

from __future__ import annotations

from collections.abc import Iterator

from .chat import ChatCompletion, ChatCompletionChunk, ChatDelta
from .chat_reader import ChatPlan, ChatReader
from .completion import Completion, CompletionChunk
from .stream import CompletionStream

TYPE_CHECKING = False
if TYPE_CHECKING:
    from types import TracebackType


class ChatReaders:
    """The readers of a request's choices, and what they make of its results.

    Thread-safety: none; one reader at a time.
    """

    def __init__(self, stream: CompletionStream, plan: ChatPlan) -> None:
        self._stream = stream
        self._plan = plan
        self._readers: dict[int, ChatReader] = {}
        self._result: ChatCompletion | None = None

    def _reader(self, index: int) -> ChatReader:
        reader = self._readers.get(index)
        if reader is None:
            reader = ChatReader(self._plan, f"{self._stream.id} {index}")
            self._readers[index] = reader
        return reader

    def chunk(self, chunk: CompletionChunk) -> ChatCompletionChunk | None:
        """Return the public form of a piece; None when it adds nothing yet."""
        index = chunk.index
        is_first = index not in self._readers
        reader = self._reader(index)
        reason = chunk.finish_reason
        delta = reader.push(chunk.text) if reason is None else reader.finish(reason, chunk.text)
        if is_first:
            delta = ChatDelta("assistant", delta.content, delta.reasoning_content, delta.tool_calls)
        elif (
            reason or chunk.logprobs or delta.content or delta.reasoning_content
        ) is None and not delta.tool_calls:
            return None
        return ChatCompletionChunk(
            delta,
            index,
            None if reason is None else reader.finish_reason(reason),
            chunk.usage,
            chunk.timings,
            chunk.logprobs,
            chunk.id,
            chunk.created,
            chunk.model,
        )

    def completion(self, completion: Completion) -> ChatCompletion:
        """Return the public form of the whole."""
        if self._result is not None:
            return self._result
        choices = []
        for choice, index in zip(completion.choices, self._stream.indexes, strict=True):
            reader = self._reader(index)
            reader.finish(choice.finish_reason, choice.text[reader.n_read :])
            choices.append(reader.choice(choice.index, choice))
        self._result = ChatCompletion(
            id=completion.id,
            created=completion.created,
            model=completion.model,
            choices=tuple(choices),
            usage=completion.usage,
            timings=completion.timings,
            seed=completion.seed,
        )
        return self._result


class ChatStream(Iterator[ChatCompletionChunk]):
    """The chunks of one chat request as they are generated; also a context manager.

    Closing it (or dropping it) before its end cancels the request. `result` gives the whole
    `ChatCompletion` once it has ended.

    Thread-safety: one thread at a time.
    """

    def __init__(self, stream: CompletionStream, plan: ChatPlan) -> None:
        self._stream = stream
        self._readers = ChatReaders(stream, plan)

    @property
    def id(self) -> str:
        """The request's id, the same in all chunks."""
        return self._stream.id

    @property
    def seed(self) -> int:
        """The seed in use."""
        return self._stream.seed

    def __iter__(self) -> ChatStream:
        return self

    def __next__(self) -> ChatCompletionChunk:
        while True:
            chunk = self._readers.chunk(next(self._stream))
            if chunk is not None:
                return chunk

    def close(self) -> None:
        """Cancel the request if it has not ended."""
        self._stream.close()

    def result(self) -> ChatCompletion:
        """Return everything as one `ChatCompletion`, running the request to its end first.

        Raises the request's error; `ChatParseError` for calls that are not in the template's
        format.
        """
        return self._readers.completion(self._stream.result())

    def __enter__(self) -> ChatStream:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self.close()
