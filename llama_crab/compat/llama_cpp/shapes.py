"""llama-cpp-python's dictionaries, made of our results."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from typing import TYPE_CHECKING, Any

from ...completion import Completion, CompletionChunk, Logprobs, TokenLogprob, Usage

if TYPE_CHECKING:
    from .llama_types import CompletionLogprobs, CompletionUsage, CreateCompletionResponse

# JSON has no -inf; the same number as in our own dictionaries.
_NO_CHANCE = -9999.0


def usage_dict(usage: Usage) -> CompletionUsage:
    """Return token counts under their three names."""
    return {
        "prompt_tokens": usage.prompt_tokens,
        "completion_tokens": usage.completion_tokens,
        "total_tokens": usage.total_tokens,
    }


def logprobs_dict(
    logprobs: Logprobs | None, shift: int, bos: int | None
) -> CompletionLogprobs | None:
    """Return four parallel lists; offsets count from the prompt's beginning, `shift` before ours.

    The BOS token is left out, and each token's own log-probability is among the best ones.
    """
    if logprobs is None:
        return None
    pairs = [
        (entry, offset)
        for entry, offset in zip(logprobs.tokens, logprobs.text_offset, strict=True)
        if entry.token_id != bos
    ]
    return {
        "tokens": [_text(entry) for entry, _ in pairs],
        "text_offset": [shift + offset for _, offset in pairs],
        "token_logprobs": [_finite(entry.logprob) for entry, _ in pairs],
        "top_logprobs": [_top(entry) for entry, _ in pairs],
    }


def completion_dict(
    completion: Completion, model: str, prompt: str, bos: int | None, echo: bool
) -> CreateCompletionResponse:
    """Return a ``text_completion``. `prompt` is the text that the answer follows."""
    choice = completion.choices[0]
    logprobs = logprobs_dict(choice.logprobs, 0 if echo else len(prompt), bos)
    if logprobs is not None and echo and logprobs["tokens"]:
        # Nothing comes before the first token that could predict it.
        logprobs["token_logprobs"][0] = None
        logprobs["top_logprobs"][0] = None
    return {
        "id": completion.id,
        "object": "text_completion",
        "created": completion.created,
        "model": model,
        "choices": [
            {
                "text": choice.text,
                "index": 0,
                "logprobs": logprobs,
                "finish_reason": choice.finish_reason,
            }
        ],
        "usage": usage_dict(completion.usage),
    }


def chunk_dicts(
    chunks: Iterable[CompletionChunk], model: str, prompt: str, bos: int | None
) -> Iterator[dict[str, Any]]:
    """Yield streamed ``text_completion`` objects: text, and last one with the reason alone."""
    for chunk in chunks:
        logprobs = logprobs_dict(chunk.logprobs, len(prompt), bos)
        if chunk.text or (logprobs is not None and logprobs["tokens"]):
            yield _chunk(chunk, model, chunk.text, logprobs, None)
        if chunk.finish_reason is not None:
            yield _chunk(chunk, model, "", None, chunk.finish_reason)


def _chunk(
    chunk: CompletionChunk,
    model: str,
    text: str,
    logprobs: CompletionLogprobs | None,
    finish_reason: str | None,
) -> dict[str, Any]:
    return {
        "id": chunk.id,
        "object": "text_completion",
        "created": chunk.created,
        "model": model,
        "choices": [
            {"text": text, "index": 0, "logprobs": logprobs, "finish_reason": finish_reason}
        ],
    }


def _top(entry: TokenLogprob) -> dict[str, float] | None:
    if entry.logprob is None:
        return None
    top: dict[str, float] = {}
    for other in entry.top:
        if other.logprob is not None:
            top.setdefault(_text(other), max(other.logprob, _NO_CHANCE))
    top[_text(entry)] = max(entry.logprob, _NO_CHANCE)
    return top


def _text(entry: TokenLogprob) -> str:
    return entry.bytes.decode("utf-8", "ignore")


def _finite(logprob: float | None) -> float | None:
    return None if logprob is None else max(logprob, _NO_CHANCE)


def chat_logprobs_dict(logprobs: CompletionLogprobs | None) -> dict[str, Any] | None:
    """Return the chat's form of `logprobs_dict`."""
    if logprobs is None:
        return None
    lists = (logprobs["tokens"], logprobs["token_logprobs"], logprobs["top_logprobs"])
    return {
        "content": [
            {
                "token": token,
                "bytes": None,
                "logprob": value,
                "top_logprobs": [
                    {"token": other, "logprob": chance, "bytes": None}
                    for other, chance in (top or {}).items()
                ],
            }
            for token, value, top in zip(*lists, strict=True)
        ],
        "refusal": None,
    }


def chat_of_text(answer: dict[str, Any]) -> dict[str, Any]:
    """Return a ``chat.completion`` of a ``text_completion``."""
    choice = answer["choices"][0]
    return {
        "id": "chat" + answer["id"],
        "object": "chat.completion",
        "created": answer["created"],
        "model": answer["model"],
        "choices": [
            {
                "index": 0,
                "message": {"role": "assistant", "content": choice["text"]},
                "logprobs": chat_logprobs_dict(choice["logprobs"]),
                "finish_reason": choice["finish_reason"],
            }
        ],
        "usage": answer["usage"],
    }


def chat_chunks_of_text(pieces: Iterable[dict[str, Any]]) -> Iterator[dict[str, Any]]:
    """Yield ``chat.completion.chunk`` objects of streamed ``text_completion`` ones."""
    started = False
    for piece in pieces:
        head = {"id": "chat" + piece["id"], "model": piece["model"], "created": piece["created"]}
        if not started:
            started = True
            yield chat_chunk(head, {"role": "assistant"})
        choice = piece["choices"][0]
        reason = choice["finish_reason"]
        delta = {"content": choice["text"]} if reason is None else {}
        yield chat_chunk(head, delta, chat_logprobs_dict(choice["logprobs"]), reason)


def chat_chunk(
    head: dict[str, Any],
    delta: dict[str, Any],
    logprobs: dict[str, Any] | None = None,
    finish_reason: str | None = None,
) -> dict[str, Any]:
    """Return one ``chat.completion.chunk``."""
    choice = {
        "index": 0,
        "delta": delta,
        "logprobs": logprobs,
        "finish_reason": finish_reason,
    }
    return {**head, "object": "chat.completion.chunk", "choices": [choice]}
