"""The part of the facade that answers conversations."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, Literal, TypeVar, Unpack, overload

from . import _core
from .chat import ChatCompletion, check_messages
from .chat_request import ChatOptions, ChatRequests, Messages
from .chat_stream import ChatStream
from .engine import Engine
from .params import ParameterError
from .request_builder import UNREAD_CHUNKS
from .stream import CompletionStream

TYPE_CHECKING = False
if TYPE_CHECKING:
    from .chat_handle import ChatHandle
    from .tool_loop import ToolRun
    from .tools import Tool

_Answer = TypeVar("_Answer")


def tool_steps(
    create: Callable[..., _Answer],
    messages: Messages,
    tools: Sequence[Callable[..., Any] | Tool],
    options: dict[str, Any],
) -> tuple[Callable[[list[dict[str, Any]]], _Answer], list[dict[str, Any]], list[Tool]]:
    """Return what the loop of tools asks, the checked conversation and the tools."""
    from .tools import normalize_tools

    if "stream" in options:
        raise ParameterError("stream: not with run_tools, which returns when all answers are there")
    found = normalize_tools(tools)
    first = options.pop("tool_choice", None)
    choices = iter([first])

    def ask(history: list[dict[str, Any]]) -> _Answer:
        choice = next(choices, "none" if first == "none" else None)
        return create(history, tools=found, tool_choice=choice, **options)

    return ask, check_messages(messages), found


class ChatMethods:
    """Methods of `Llama` for a model that was made for conversations."""

    load_sec: float
    _engine: Engine[Any]
    _vocab: _core.Vocab
    _chats: ChatRequests
    _name: str
    _require_text: Callable[[], None]

    @overload
    def create_chat_completion(
        self,
        messages: Messages,
        max_tokens: int | None = ...,
        *,
        stream: Literal[False] = ...,
        **options: Unpack[ChatOptions],
    ) -> ChatCompletion: ...

    @overload
    def create_chat_completion(
        self,
        messages: Messages,
        max_tokens: int | None = ...,
        *,
        stream: Literal[True],
        **options: Unpack[ChatOptions],
    ) -> ChatStream: ...

    def create_chat_completion(
        self,
        messages: Messages,
        max_tokens: int | None = None,
        *,
        stream: bool = False,
        **options: Any,
    ) -> ChatCompletion | ChatStream:
        """Answer a conversation, by the chat template of the model.

        Parameters
        ----------
        messages
            OpenAI's: mappings of ``role`` (system, developer, user, assistant, tool) and
            ``content`` (text, or parts of type ``text``), or a `ChatMessage` of an earlier answer.
            Special tokens that a user wrote are text to the model.
        max_tokens
            None goes on until the model ends or the context is full.
        stream
            Return a `ChatStream` of `ChatCompletionChunk` instead of a `ChatCompletion`.
        tools
            What the model may call: mappings in OpenAI's form or Python functions. Where the
            template knows no tools, they are told in the system message.
        tool_choice
            ``"auto"`` (the default with tools), ``"none"``, ``"required"``, or one tool's name, as
            OpenAI's mapping or text. A grammar makes each call well-formed.
        parallel_tool_calls
            Keep more than one call.
        chat_template
            Instead of the model's: a Jinja template as text or file, the name of a further one in
            the GGUF, or of a format such as ``"chatml"``, which also ends answers at its marks.
        chat_template_kwargs
            Variables for the template.
        add_generation_prompt
            End the prompt with what opens the answer.
        continue_final_message
            Let the model go on with the last message, the assistant's; the answer is what follows.
        enable_thinking
            Whether a template that can tells the model to think. None, the default, is True to the
            template, as in llama.cpp; some then think that do not unless they are told to.
        reasoning_format
            ``"auto"`` puts thinking into ``message.reasoning_content``, ``"none"`` leaves it in
            the content; also llama.cpp's ``"deepseek"`` and ``"deepseek-legacy"``.
        reasoning_budget
            Tokens of thinking, in the answer, after which it is ended; 0 for none.

        The other options are those of `create_completion`, but for ``echo``, ``suffix`` and
        ``session``. ``stop`` looks at the text as the model writes it, with its thinking and calls.
        An answer's form (``response_format``, ...) is that of the content, behind any thinking, and
        not to be had together with calls.

        Raises as `create_completion`; `ChatTemplateError` for a conversation that the template
        refuses, naming the message; `ChatParseError`, with the ``text``, for an answer that ends
        within a call, or that had to be one and is none; `SchemaError` for a tool's parameters.
        """
        self._require_text()
        request, plan = self._chats.request(messages, max_tokens, stream=stream, **options)
        job = CompletionStream(self._engine, request, self._vocab, "", self._name, self.load_sec)
        chat = ChatStream(job, plan)
        if stream:
            return chat
        with chat:
            return chat.result()

    def submit_chat(
        self,
        messages: Messages,
        max_tokens: int | None = None,
        *,
        stream: bool = False,
        **options: Unpack[ChatOptions],
    ) -> ChatHandle:
        """Start a chat completion in the background; return a handle to read, await or cancel it.

        The options are those of `create_chat_completion`; see `submit` for the rest.
        """
        from .chat_handle import ChatHandle  # with asyncio
        from .handle import CompletionHandle

        self._require_text()
        request, plan = self._chats.request(
            messages, max_tokens, stream=stream, n_news_max=UNREAD_CHUNKS, **options
        )
        self._engine.start()
        handle = CompletionHandle(self._engine, request, self._vocab, "", self._name, self.load_sec)
        return ChatHandle(handle, plan)

    def run_tools(
        self,
        messages: Messages,
        tools: Sequence[Callable[..., Any] | Tool],
        *,
        max_steps: int = 8,
        **options: Any,
    ) -> ToolRun[ChatCompletion]:
        """Answer a conversation, calling Python functions for the model until it is done.

        Returns the last answer, the whole conversation with all calls and results, and the number
        of answers, at most `max_steps`. What a tool raises is told to the model. A `tool_choice`
        that asks for a call holds for the first answer only. The other options are those of
        `create_chat_completion`, without ``stream``.

        Raises as it does, and `ParameterError` for tools without a function.
        """
        from .tool_loop import run_tool_loop

        ask, history, found = tool_steps(self.create_chat_completion, messages, tools, options)
        return run_tool_loop(ask, history, found, max_steps)

    def format_chat(self, messages: Messages, **options: Any) -> str:
        """Return the prompt that a conversation becomes, as text.

        Takes ``tools`` and the options of `create_chat_completion` that are the template's. Raises
        `ChatTemplateError`, `ParameterError`.
        """
        self._require_text()
        return self._chats.format(messages, **options)
