"""What a completion returns: typed, immutable results with the OpenAI shape by `to_dict`."""

from __future__ import annotations

import builtins
import codecs
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal

from .errors import StructuredOutputError
from .timings import CompletionTimings

FinishReason = Literal["stop", "length", "cancelled"]

# JSON has no -inf; OpenAI's API uses this value for a token that cannot occur.
_NO_CHANCE = -9999.0
_PREVIEW = 60


@dataclass(frozen=True, slots=True)
class TokenLogprob:
    r"""One token with its log-probability (natural log, softmax over the raw logits).

    ``token`` is its text, or ``bytes:\xNN...`` where its bytes alone are not UTF-8; ``logprob`` is
    None for the first token of an echoed prompt; ``top`` holds the best alternatives at this
    position, best first, each without a ``top`` of its own. Thread-safety: immutable.
    """

    token: str
    token_id: int
    bytes: builtins.bytes
    logprob: float | None
    top: tuple[TokenLogprob, ...] = ()

    @classmethod
    def from_piece(
        cls,
        token_id: int,
        piece: builtins.bytes,
        logprob: float | None,
        top: Iterable[TokenLogprob] = (),
    ) -> TokenLogprob:
        """Return the entry of a token whose text is the bytes ``piece``."""
        try:
            text = piece.decode()
        except UnicodeDecodeError:
            text = "bytes:" + "".join(f"\\x{byte:02x}" for byte in piece)
        return cls(text, token_id, piece, logprob, tuple(top))


class TextOffsets:
    """Where tokens begin in a text, in characters, as they come.

    `start` may be negative for tokens that the text does not show (BOS, a space that the tokenizer
    put in front): they begin at 0.
    """

    __slots__ = ("_at", "_decoder")

    def __init__(self, start: int = 0) -> None:
        self._at = start
        self._decoder = codecs.getincrementaldecoder("utf-8")("replace")

    def push(self, piece: bytes) -> int:
        """Return where the token of these bytes begins, and go on behind it."""
        at = max(0, self._at)
        self._at += len(self._decoder.decode(piece))
        return at


@dataclass(frozen=True, slots=True)
class Logprobs:
    """The log-probabilities of one choice's tokens.

    ``text_offset[i]`` is where token i starts, in characters of the choice's text.
    Thread-safety: immutable.
    """

    tokens: tuple[TokenLogprob, ...]
    text_offset: tuple[int, ...]

    @classmethod
    def from_tokens(cls, tokens: Iterable[TokenLogprob], start: int = 0) -> Logprobs:
        """Return the entries with offsets counted from character ``start``.

        A token that begins inside a character gets the offset of that character.
        """
        entries = tuple(tokens)
        offsets = TextOffsets(start)
        return cls(entries, tuple([offsets.push(entry.bytes) for entry in entries]))

    def to_dict(self) -> dict[str, Any]:
        """Return OpenAI's legacy completions shape: four parallel lists.

        ``top_logprobs`` is keyed by text there; of tokens with the same text the best is kept.
        """
        tops: list[dict[str, float | None] | None] = []
        for entry in self.tokens:
            top: dict[str, float | None] = {}
            for other in entry.top:
                top.setdefault(other.token, finite_logprob(other.logprob))
            tops.append(top or None)
        return {
            "tokens": [entry.token for entry in self.tokens],
            "token_logprobs": [finite_logprob(entry.logprob) for entry in self.tokens],
            "top_logprobs": tops,
            "text_offset": list(self.text_offset),
        }


@dataclass(frozen=True, slots=True)
class Usage:
    """Token counts of one request, over all choices. Thread-safety: immutable.

    ``cached_tokens`` is the part of ``prompt_tokens`` that was not computed again.
    """

    prompt_tokens: int
    completion_tokens: int
    total_tokens: int
    cached_tokens: int = 0

    def to_dict(self) -> dict[str, Any]:
        """Return OpenAI's ``usage`` object."""
        return {
            "prompt_tokens": self.prompt_tokens,
            "completion_tokens": self.completion_tokens,
            "total_tokens": self.total_tokens,
            "prompt_tokens_details": {"cached_tokens": self.cached_tokens},
        }


@dataclass(frozen=True, slots=True, repr=False)
class CompletionChoice:
    """One of a request's answers. Thread-safety: immutable.

    ``stop_reason`` is the stop string or stop token id that ended the answer, or None (length,
    cancelled, or an end-of-generation token of the model). ``tokens`` are the generated ids.
    ``incomplete`` tells that an answer of a wanted form ended before it was whole: at
    ``max_tokens``, cancelled, or at a stop string.
    """

    index: int
    text: str
    finish_reason: FinishReason
    stop_reason: str | int | None = None
    tokens: tuple[int, ...] = ()
    logprobs: Logprobs | None = None
    incomplete: bool = False
    _parsed: Any = field(default=None, hash=False, repr=False)
    _invalid: StructuredOutputError | None = field(default=None, hash=False, repr=False)

    @property
    def parsed(self) -> Any:
        """The answer as what ``response_format``, ``grammar``, ``regex`` or ``choices`` asked for.

        An instance of the class that was given; the document of a JSON schema; otherwise the text.
        None for free text and for an answer that is `incomplete`. Raises `StructuredOutputError`
        when the class's own validators refuse the answer, which no grammar can prevent.
        """
        if self._invalid is not None:
            raise self._invalid.with_traceback(None)  # it may be read often
        return self._parsed

    def to_dict(self) -> dict[str, Any]:
        """Return an element of OpenAI's ``choices``, plus ``stop_reason``."""
        return {
            "index": self.index,
            "text": self.text,
            "logprobs": self.logprobs.to_dict() if self.logprobs else None,
            "finish_reason": self.finish_reason,
            "stop_reason": self.stop_reason,
        }

    def __repr__(self) -> str:
        return (
            f"CompletionChoice(index={self.index}, text={preview(self.text)},"
            f" finish_reason={self.finish_reason!r}, stop_reason={self.stop_reason!r},"
            f" {_count(self.tokens)}{', incomplete' if self.incomplete else ''})"
        )


@dataclass(frozen=True, slots=True, repr=False)
class Completion:
    """The result of a completion; ``text``, ``tokens``, ... are those of the first choice.

    ``created`` is in Unix seconds; ``seed`` is the one that was used, so that passing it again
    repeats the answer. Thread-safety: immutable.
    """

    id: str
    created: int
    model: str
    choices: tuple[CompletionChoice, ...]
    usage: Usage
    timings: CompletionTimings
    seed: int

    @property
    def text(self) -> str:
        """The first choice's text."""
        return self.choices[0].text

    @property
    def finish_reason(self) -> FinishReason:
        """Why the first choice ended: "stop", "length" or "cancelled"."""
        return self.choices[0].finish_reason

    @property
    def stop_reason(self) -> str | int | None:
        """The stop string or stop token id that ended the first choice, or None."""
        return self.choices[0].stop_reason

    @property
    def tokens(self) -> tuple[int, ...]:
        """The first choice's generated token ids."""
        return self.choices[0].tokens

    @property
    def parsed(self) -> Any:
        """The first choice's answer as an object; see `CompletionChoice.parsed`."""
        return self.choices[0].parsed

    @property
    def incomplete(self) -> bool:
        """Whether the first choice, an answer of a wanted form, ended before it was whole."""
        return self.choices[0].incomplete

    @property
    def logprobs(self) -> Logprobs | None:
        """The first choice's log-probabilities, where they were asked for."""
        return self.choices[0].logprobs

    def to_dict(self) -> dict[str, Any]:
        """Return OpenAI's ``text_completion`` object, plus ``timings`` and ``seed``."""
        return {
            "id": self.id,
            "object": "text_completion",
            "created": self.created,
            "model": self.model,
            "choices": [choice.to_dict() for choice in self.choices],
            "usage": self.usage.to_dict(),
            "timings": self.timings.to_dict(),
            "seed": self.seed,
        }

    def __repr__(self) -> str:
        more = f", choices={len(self.choices)}" if len(self.choices) > 1 else ""
        return (
            f"Completion(text={preview(self.text)}, finish_reason={self.finish_reason!r},"
            f" {_count(self.tokens)}{', incomplete' if self.incomplete else ''},"
            f" {self.timings.predicted_per_sec:.1f} tok/s,"
            f" seed={self.seed}{more})"
        )


@dataclass(frozen=True, slots=True, repr=False)
class CompletionChunk:
    """A piece of a streamed answer. Thread-safety: immutable.

    ``finish_reason`` and ``stop_reason`` are set on a choice's last chunk; ``usage`` and
    ``timings`` on the last chunk of the request. ``text`` may be empty while bytes of a character
    or of a possible stop string are held back.
    """

    text: str
    index: int = 0
    tokens: tuple[int, ...] = ()
    finish_reason: FinishReason | None = None
    stop_reason: str | int | None = None
    logprobs: Logprobs | None = None
    usage: Usage | None = None
    timings: CompletionTimings | None = None
    id: str = ""
    created: int = 0
    model: str = ""

    def to_dict(self) -> dict[str, Any]:
        """Return OpenAI's streamed ``text_completion`` object, plus ``timings`` on the last."""
        shape: dict[str, Any] = {
            "id": self.id,
            "object": "text_completion",
            "created": self.created,
            "model": self.model,
            "choices": [
                {
                    "index": self.index,
                    "text": self.text,
                    "logprobs": self.logprobs.to_dict() if self.logprobs else None,
                    "finish_reason": self.finish_reason,
                    "stop_reason": self.stop_reason,
                }
            ],
        }
        if self.usage is not None:
            shape["usage"] = self.usage.to_dict()
        if self.timings is not None:
            shape["timings"] = self.timings.to_dict()
        return shape

    def __repr__(self) -> str:
        end = f", finish_reason={self.finish_reason!r}" if self.finish_reason else ""
        return f"CompletionChunk(text={preview(self.text)}, index={self.index}{end})"


def finite_logprob(logprob: float | None) -> float | None:
    """Return a log-probability as JSON can hold it."""
    return logprob if logprob is None else max(logprob, _NO_CHANCE)


def preview(text: str) -> str:
    """Return a text as a short repr."""
    if len(text) <= _PREVIEW:
        return repr(text)
    return f"{text[: _PREVIEW - 1] + '…'!r} ({len(text)} characters)"


def _count(tokens: Sequence[int]) -> str:
    return f"{len(tokens)} token{'' if len(tokens) == 1 else 's'}"
