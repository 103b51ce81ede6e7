"""Chat formats by name, and formats and handlers of the user's own."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from ...chat_formats import FORMATS
from ...params import ParameterError
from .generation import stop_strings
from .notices import NotSupportedError, refuse
from .shapes import chat_chunks_of_text, chat_of_text

if TYPE_CHECKING:
    from .llama import Llama

LlamaChatCompletionHandler = Callable[..., Any]
"""Called as ``handler(llama=..., messages=..., **arguments of create_chat_completion)``."""

_handlers: dict[str, LlamaChatCompletionHandler] = {}

_DEFAULT = "chat_template.default"


def template_of(llama: Llama, name: str | None) -> str | None:
    """Return the ``chat_template`` of a ``chat_format``; None for the model file's own.

    ``chat_template.NAME`` is the file's template of that name. Raises `ParameterError` for what
    the file does not have, `NotSupportedError` for names that are not in `FORMATS`.
    """
    if name is None or name == _DEFAULT:
        return None
    if name in FORMATS:
        return name
    if name.startswith("chat_template."):
        found = llama.crab.model.chat_template(name.removeprefix("chat_template."))
        if found is None:
            raise ParameterError(f"chat_format: the model file has no {name}")
        return found
    listed = ", ".join([*FORMATS, *_handlers])
    raise NotSupportedError(
        f"chat_format: {name!r} is not one of {listed}; register_chat_format() adds one"
    )


@dataclass
class ChatFormatterResponse:
    """A rendered prompt: `stop` are strings that end the answer besides those of the request.

    `added_special` tells that the prompt has its BOS already.
    """

    prompt: str
    stop: str | list[str] | None = None
    stopping_criteria: Any = None
    added_special: bool = False


ChatFormatter = Callable[..., ChatFormatterResponse]
"""Called as ``formatter(messages=..., tools=..., ...)``."""


def registered_handler(name: str | None) -> LlamaChatCompletionHandler | None:
    """Return the handler that was registered under a name, or None."""
    return None if name is None else _handlers.get(name)


def get_chat_completion_handler(name: str) -> LlamaChatCompletionHandler:
    """Return the handler that was registered under a name. Raises `ParameterError`."""
    if name not in _handlers:
        raise ParameterError(f"chat_format: no handler is registered as {name!r}")
    return _handlers[name]


def register_chat_completion_handler(
    name: str, overwrite: bool = False
) -> Callable[[LlamaChatCompletionHandler], LlamaChatCompletionHandler]:
    """Decorate a handler, which ``chat_format=name`` then calls."""

    def register(handler: LlamaChatCompletionHandler) -> LlamaChatCompletionHandler:
        if name in _handlers and not overwrite:
            raise ParameterError(f"chat_format: {name!r} is registered already")
        _handlers[name] = handler
        return handler

    return register


def register_chat_format(name: str) -> Callable[[ChatFormatter], ChatFormatter]:
    """Decorate a formatter, which ``chat_format=name`` then uses."""

    def register(formatter: ChatFormatter) -> ChatFormatter:
        register_chat_completion_handler(name)(chat_formatter_to_chat_completion_handler(formatter))
        return formatter

    return register


def chat_formatter_to_chat_completion_handler(
    formatter: ChatFormatter,
) -> LlamaChatCompletionHandler:
    """Return a handler that completes the prompt which `formatter` makes.

    Tools are up to the formatter; their calls are not read out of the answer.
    """

    def handler(*, llama: Llama, messages: Any, **given: Any) -> Any:
        wanted = ("functions", "function_call", "tools", "tool_choice")
        made = formatter(messages=messages, **{name: given.pop(name) for name in wanted})
        ids = llama.tokenize(made.prompt.encode(), not made.added_special, True)
        if given.pop("response_format", None) not in (None, {"type": "text"}):
            refuse("response_format", "not with a chat format of your own; use grammar")
        shown, n_top = given.pop("logprobs"), given.pop("top_logprobs")
        given["logprobs"] = (n_top or 0) if shown else None
        given["stop"] = (*stop_strings(given["stop"]), *stop_strings(made.stop)) or None
        answer: Any = llama.create_completion(
            ids, stopping_criteria=made.stopping_criteria, **given
        )
        return chat_chunks_of_text(answer) if given["stream"] else chat_of_text(answer)

    return handler


class Jinja2ChatFormatter:
    """A template's text as a handler. BOS and EOS are the model file's, whatever is given."""

    def __init__(
        self,
        template: str,
        eos_token: str = "",
        bos_token: str = "",
        add_generation_prompt: bool = True,
        stop_token_ids: list[int] | None = None,
    ) -> None:
        self.template = template
        self.add_generation_prompt = add_generation_prompt
        self.stop_token_ids = stop_token_ids

    def to_chat_handler(self) -> LlamaChatCompletionHandler:
        """Return a handler for ``Llama(chat_handler=)``."""
        from .chat import complete_chat

        def handler(*, llama: Llama, **given: Any) -> Any:
            return complete_chat(
                llama,
                given,
                chat_template=self.template,
                add_generation_prompt=self.add_generation_prompt,
                stop_tokens=self.stop_token_ids or (),
            )

        return handler
