"""Chat formats by name, and formats and handlers of the user's own."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from ...chat_formats import FORMATS
from ...params import ParameterError
from ...structured import structured_output
from .generation import StoppingCriteriaList, response_schema, stop_strings
from .llama_grammar import LlamaGrammar
from .notices import NotSupportedError
from .shapes import chat_chunks_of_text, chat_of_text

if TYPE_CHECKING:
    from .llama import Llama

LlamaChatCompletionHandler = Callable[..., Any]
"""Called as ``handler(llama=..., messages=..., **arguments of create_chat_completion)``."""

_handlers: dict[str, LlamaChatCompletionHandler] = {}

_DEFAULT = "chat_template.default"
# Where those of a handler that is called directly are not those of `Llama.create_completion`.
_DEFAULTS = {"temperature": 0.2, "repeat_penalty": 1.1, "max_tokens": None}
_OF_FORMATTERS = ("functions", "function_call", "tools", "tool_choice")


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
    listed = ", ".join(_names())
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


class LlamaChatCompletionHandlerNotFoundException(ParameterError):
    """There is no handler of that name."""


def get_chat_completion_handler(name: str) -> LlamaChatCompletionHandler:
    """Return the handler that was registered under a name, or the one of a format in `FORMATS`.

    Raises `LlamaChatCompletionHandlerNotFoundException`, a ValueError.
    """
    if name in _handlers:
        return _handlers[name]
    if name in FORMATS:
        return _handler_of_template(chat_template=name)
    raise LlamaChatCompletionHandlerNotFoundException(
        f"chat_format: no handler is registered as {name!r}, only {', '.join(_names())}"
    )


def _names() -> list[str]:
    return [*FORMATS, *_handlers]


def _handler_of_template(**options: Any) -> LlamaChatCompletionHandler:
    from .chat import complete_chat

    def handler(*, llama: Llama, **given: Any) -> Any:
        return complete_chat(llama, {**_DEFAULTS, **given}, **options)

    return handler


def register_chat_completion_handler(
    name: str, overwrite: bool = False
) -> Callable[[LlamaChatCompletionHandler], LlamaChatCompletionHandler]:
    """Decorate a handler, which ``chat_format=name`` then calls."""

    def register(handler: LlamaChatCompletionHandler) -> LlamaChatCompletionHandler:
        if name in _names() and not overwrite:
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

    What `Llama.create_completion` does not take is given to the formatter, too. Tools are up to it;
    their calls are not read out of the answer.
    """

    def handler(*, llama: Llama, messages: Any, **given: Any) -> Any:
        given = {**_DEFAULTS, **given}
        wanted = _json_form(given.pop("response_format", None))
        if wanted is not None:
            given["grammar"] = wanted
        shown, n_top = given.pop("logprobs", None), given.pop("top_logprobs", None)
        taken = inspect.signature(llama.create_completion).parameters
        of_formatter = dict.fromkeys(_OF_FORMATTERS)
        of_formatter |= {name: given.pop(name) for name in [*given] if name not in taken}
        made = formatter(messages=messages, **of_formatter)
        ids = llama.tokenize(made.prompt.encode(), not made.added_special, True)
        given["logprobs"] = (n_top or 0) if shown else None
        given["stop"] = (*stop_strings(given.get("stop")), *stop_strings(made.stop))
        answer: Any = llama.create_completion(
            ids, stopping_criteria=made.stopping_criteria, **given
        )
        return chat_chunks_of_text(answer) if given.get("stream") else chat_of_text(answer)

    return handler


def _json_form(response_format: Any) -> LlamaGrammar | None:
    output = structured_output(response_schema(response_format))
    return None if output is None or output.gbnf is None else LlamaGrammar(_grammar=output.gbnf)


class Jinja2ChatFormatter:
    """A chat template as a formatter, and as a handler.

    `eos_token` ends the answer also where the model writes it as text. Left out, both tokens are
    the model file's for a handler, and nothing where the formatter itself is called, which knows
    no model. `stop_token_ids` end the answer. Thread-safety: immutable.
    """

    def __init__(
        self,
        template: str,
        eos_token: str | None = None,
        bos_token: str | None = None,
        add_generation_prompt: bool = True,
        stop_token_ids: Iterable[int] | None = None,
    ) -> None:
        self.template = template
        self.eos_token = eos_token
        self.bos_token = bos_token
        self.add_generation_prompt = add_generation_prompt
        self.stop_token_ids = None if stop_token_ids is None else set(stop_token_ids)

    def __call__(self, *, messages: Any, **given: Any) -> ChatFormatterResponse:
        """Return the prompt, rendered by the jinja2 package; `given` are template variables.

        Raises ImportError without jinja2, ValueError where the template refuses the conversation.
        """
        from .jinja import render

        ids = self.stop_token_ids
        prompt = render(
            self.template,
            {
                **dict.fromkeys(_OF_FORMATTERS),
                **given,
                "messages": messages,
                "eos_token": self.eos_token or "",
                "bos_token": self.bos_token or "",
                "add_generation_prompt": self.add_generation_prompt,
            },
        )
        criteria = None
        if ids is not None:
            criteria = StoppingCriteriaList([lambda tokens, logits: int(tokens[-1]) in ids])
        stops = [self.eos_token] if self.eos_token else []
        return ChatFormatterResponse(prompt, stops, criteria, added_special=True)

    def to_chat_handler(self) -> LlamaChatCompletionHandler:
        """Return a handler for ``Llama(chat_handler=)``. It renders as llama.cpp does."""
        from .chat import complete_chat

        given_tokens = {"eos_token": self.eos_token, "bos_token": self.bos_token}
        # In the template, and not as variables from outside, whose special tokens are only text.
        template = self.template
        for name, token in given_tokens.items():
            if token is not None:
                template = f"{{% set {name} = {_literal(token)} %}}{template}"

        def handler(*, llama: Llama, **given: Any) -> Any:
            given = {**_DEFAULTS, **given}
            ends = set(self.stop_token_ids or ())
            if self.eos_token:
                given["stop"] = (*stop_strings(given.get("stop")), self.eos_token)
                ids = llama.tokenize(self.eos_token.encode(), False, True)
                ends |= set(ids) if len(ids) == 1 else set()
            return complete_chat(
                llama,
                given,
                chat_template=template,
                add_generation_prompt=self.add_generation_prompt,
                stop_tokens=tuple(sorted(ends)),
            )

        return handler


def _literal(text: str) -> str:
    escaped = text.replace("\\", "\\\\").replace("'", "\\'")
    return f"'{escaped}'"
