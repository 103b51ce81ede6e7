"""The keys of llama-cpp-python 0.3.36's dictionaries, read off its types and its source."""

from __future__ import annotations

from typing import Any

USAGE = {"prompt_tokens", "completion_tokens", "total_tokens"}
COMPLETION = {"id", "object", "created", "model", "choices", "usage"}
# A streamed piece has no usage.
CHUNK = COMPLETION - {"usage"}
CHOICE = {"text", "index", "logprobs", "finish_reason"}
LOGPROBS = {"tokens", "text_offset", "token_logprobs", "top_logprobs"}
CHAT_CHOICE = {"index", "message", "logprobs", "finish_reason"}
CHAT_CHUNK_CHOICE = {"index", "delta", "logprobs", "finish_reason"}
CHAT_LOGPROB = {"token", "bytes", "logprob", "top_logprobs"}
CHAT_TOP_LOGPROB = {"token", "bytes", "logprob"}
CALL_DELTA = {"role", "content", "function_call", "tool_calls"}
EMBEDDINGS = {"object", "data", "model", "usage"}


def check_completion(answer: dict[str, Any], *, logprobs: bool = False) -> None:
    assert set(answer) == COMPLETION
    assert answer["object"] == "text_completion"
    assert answer["id"].startswith("cmpl-")
    assert set(answer["usage"]) == USAGE
    check_choice(answer, logprobs=logprobs)


def check_choice(answer: dict[str, Any], *, logprobs: bool = False) -> None:
    (choice,) = answer["choices"]
    assert set(choice) == CHOICE
    assert choice["index"] == 0
    if not logprobs:
        assert choice["logprobs"] is None
        return
    assert set(choice["logprobs"]) == LOGPROBS
    assert len({len(entries) for entries in choice["logprobs"].values()}) == 1


def check_chunks(chunks: list[dict[str, Any]], *, logprobs: bool = False) -> str:
    """Check a stream of text; return the text."""
    *pieces, last = chunks
    for chunk in chunks:
        assert set(chunk) == CHUNK
        assert chunk["object"] == "text_completion"
        assert chunk["id"] == last["id"]
    for piece in pieces:
        check_choice(piece, logprobs=logprobs)
        assert piece["choices"][0]["finish_reason"] is None
    check_choice(last)
    assert last["choices"][0]["text"] == ""
    assert last["choices"][0]["finish_reason"] in ("stop", "length")
    return "".join(chunk["choices"][0]["text"] for chunk in chunks)


def check_chat(answer: dict[str, Any]) -> dict[str, Any]:
    """Check a chat completion; return the message."""
    assert set(answer) == COMPLETION
    assert answer["object"] == "chat.completion"
    assert answer["id"].startswith("chatcmpl-")
    assert set(answer["usage"]) == USAGE
    (choice,) = answer["choices"]
    assert set(choice) == CHAT_CHOICE
    message: dict[str, Any] = choice["message"]
    if message.get("tool_calls"):
        assert set(message) == {"role", "content", "function_call", "tool_calls"}
        for call in message["tool_calls"]:
            assert set(call) == {"id", "type", "function"}
            assert set(call["function"]) == {"name", "arguments"}
        assert choice["finish_reason"] in ("tool_calls", "length")
    else:
        assert set(message) == {"role", "content"}
    return message


def check_chat_chunks(chunks: list[dict[str, Any]]) -> str:
    """Check a stream of a chat; return the text."""
    text = ""
    for chunk in chunks:
        assert set(chunk) == CHUNK
        assert chunk["object"] == "chat.completion.chunk"
        (choice,) = chunk["choices"]
        assert set(choice) == CHAT_CHUNK_CHOICE
        delta = choice["delta"]
        assert set(delta) in ({"role"}, {"content"}, set(), CALL_DELTA)
        text += delta.get("content") or ""
        assert (choice["finish_reason"] is not None) == (chunk is chunks[-1])
    assert chunks[0]["choices"][0]["delta"]["role"] == "assistant"
    return text
