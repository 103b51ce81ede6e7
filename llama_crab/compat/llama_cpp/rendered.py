"""Chats that are a prompt and a text, where nothing is to be read out of the answer."""

from __future__ import annotations

import json
import time
from collections.abc import Iterator, Mapping, Sequence
from typing import TYPE_CHECKING, Any

from ...params import ParameterError
from .shapes import chat_chunks_of_text, chat_of_text, chunk_dicts, completion_dict

if TYPE_CHECKING:
    from .llama import Llama


def complete_rendered(
    llama: Llama,
    messages: Sequence[Mapping[str, Any]],
    max_tokens: int | None,
    options: Mapping[str, Any],
    model: str,
    is_stream: bool,
) -> Any:
    """Return a ``chat.completion``, or its chunks, for roles that only the template knows.

    `options` are those of our ``create_chat_completion``. Raises `ChatTemplateError` where the
    template does not know them.
    """
    form = llama.crab._chats.chat_format(options.get("chat_template"))
    templates = llama.crab._chats.parsed(form)
    try:
        text = json.dumps(messages, allow_nan=False)
    except (TypeError, ValueError, RecursionError) as error:
        raise ParameterError(f"messages: not JSON: {error}") from None
    prompt = templates.render(
        text,
        add_generation_prompt=options.get("add_generation_prompt", True),
        reasoning_format="none",
        now=int(time.time()),
    )
    ids = templates.tokenize(prompt)
    own = {name: value for name, value in options.items() if name not in _OF_CHATS}
    own["stop"] = (*own.get("stop", ()), *prompt.additional_stops, *form.stops)
    bos = llama._vocab.bos
    if is_stream:
        return chat_chunks_of_text(_pieces(llama, ids, max_tokens, own, model))
    completion = llama.crab.create_completion(ids, max_tokens, **own)
    answer: Any = completion_dict(completion, model, "", bos, echo=False)
    return chat_of_text(answer)


_OF_CHATS = ("chat_template", "reasoning_format", "add_generation_prompt", "tools", "tool_choice")


def _pieces(
    llama: Llama, ids: list[int], max_tokens: int | None, options: dict[str, Any], model: str
) -> Iterator[dict[str, Any]]:
    with llama.crab.create_completion(ids, max_tokens, stream=True, **options) as chunks:
        yield from chunk_dicts(chunks, model, "", llama._vocab.bos)
