"""From a conversation to a checked `Request`, and to how its answers are read."""

from __future__ import annotations

import json
import os
import re
import threading
import time
from collections import OrderedDict
from collections.abc import Callable, Iterable, Mapping, Sequence
from functools import cached_property
from pathlib import Path
from typing import Any

from . import _core
from .chat import ChatMessage, check_messages
from .chat_reader import ChatPlan, Parser
from .chat_reasoning import (
    after_thinking,
    is_thinking,
    limit_reasoning,
    opening,
    takes_form,
    thinks_first,
)
from .engine.request import Request
from .errors import ChatTemplateError
from .params import LlamaParams, ParameterError
from .request_builder import CompletionOptions, RequestBuilder
from .sampling import SamplerChain

TYPE_CHECKING = False
if TYPE_CHECKING:
    from .structured import StructuredOutput
    from .tools import Tool

Messages = Iterable[Mapping[str, Any] | ChatMessage]

_N_TEMPLATES = 16
_REASONING_FORMATS = ("none", "auto", "deepseek", "deepseek-legacy")
_NOT_FOR_CHATS = {
    "echo": "the prompt is made by the chat template",
    "suffix": "the prompt is made by the chat template",
    "session": "it appends text as it is, and a template writes a conversation anew; what was "
    "computed is reused without one",
}
_FORMS = ("response_format", "grammar", "regex", "choices", "lark")
# What a format does not touch is read without a parser.
_PLAIN = " Plain <b>text</b> {1}\n"
# Some of llama-common's grammars allow more than one call in any case; and where its grammar of a
# required call lets text come first, which may go on for ever.
_MORE_CALLS = re.compile(r"^(tool-calls ::= )\((tool-call space)\)\+$", re.MULTILINE)
_TEXT_BEFORE_CALL = re.compile(
    r"^(root ::= .*?)\buntil-\d+\??\s+((?:space )?[\w-]*tool-call)", re.M
)


class ChatOptions(CompletionOptions, total=False):
    """Keyword arguments of `Llama.create_chat_completion` beside ``stream``."""

    tools: Sequence[Mapping[str, Any] | Callable[..., Any]] | None
    tool_choice: str | Mapping[str, Any] | None
    parallel_tool_calls: bool
    chat_template: str | os.PathLike[str] | None
    chat_template_kwargs: Mapping[str, Any] | None
    add_generation_prompt: bool
    continue_final_message: bool
    enable_thinking: bool | None
    reasoning_format: str
    reasoning_budget: int | None


class ChatRequests:
    """Renders conversations with a model's templates and makes requests of them.

    Thread-safety: any thread.
    """

    def __init__(
        self, model: _core.Model, vocab: _core.Vocab, params: LlamaParams, builder: RequestBuilder
    ) -> None:
        self._model = model
        self._vocab = vocab
        self._params = params
        self._builder = builder
        self._templates: OrderedDict[str, _core.ChatTemplates] = OrderedDict()
        self._lock = threading.Lock()

    def close(self) -> None:
        """Let go of the model."""
        with self._lock:
            self._templates.clear()

    def templates(self, chat_template: str | os.PathLike[str] | None) -> _core.ChatTemplates:
        """Return the model's templates, or what overrides them; made once.

        Raises `ChatTemplateError` for a template that does not parse, `ParameterError`.
        """
        source = self._source(chat_template)
        with self._lock:
            found = self._templates.get(source)
            if found is None:
                found = _core.ChatTemplates(self._model, source or None)
                self._templates[source] = found
                if len(self._templates) > _N_TEMPLATES:
                    self._templates.popitem(last=False)
            self._templates.move_to_end(source)
        return found

    def _source(self, chat_template: str | os.PathLike[str] | None) -> str:
        if chat_template is None:
            return ""
        if isinstance(chat_template, os.PathLike):
            return _file_text(Path(chat_template))
        if not isinstance(chat_template, str):
            raise ParameterError(f"chat_template: expected text or a path, not {chat_template!r}")
        if "{{" in chat_template or "{%" in chat_template or "\n" in chat_template:
            return chat_template
        if chat_template == "chatml":
            return chat_template
        named = self._model.metadata.get(f"tokenizer.chat_template.{chat_template}")
        if named is not None:
            return str(named)
        if chat_template and len(chat_template) < 1024 and Path(chat_template).is_file():
            return _file_text(Path(chat_template))
        raise ParameterError(
            f"chat_template: {chat_template!r:.80} is no template text, no file, none of the "
            "model's named templates and not 'chatml'"
        )

    def format(self, messages: Messages, tools: Any = None, **options: Any) -> str:
        """Return the text of a prompt; see `Llama.format_chat`."""
        chat = _Chat(self, check_messages(messages), tools, None, False, options)
        if options:
            raise ParameterError(f"{min(options)}: not an option of templates")
        return chat.prompt.text

    def request(
        self,
        messages: Messages,
        max_tokens: int | None,
        *,
        stream: bool,
        n_news_max: int = 0,
        tools: Any = None,
        tool_choice: str | Mapping[str, Any] | None = None,
        parallel_tool_calls: bool = False,
        reasoning_budget: int | None = None,
        **options: Any,
    ) -> tuple[Request, ChatPlan]:
        """Return the request and how to read its answers; see `Llama.create_chat_completion`.

        Raises as `RequestBuilder.completion`, and `ChatTemplateError`.
        """
        for name, reason in _NOT_FOR_CHATS.items():
            if options.get(name) not in (None, False):
                raise ParameterError(f"{name}: not for chats; {reason}")
            options.pop(name, None)
        checked = check_messages(messages)
        chat = _Chat(self, checked, tools, tool_choice, parallel_tool_calls, options)
        output = self._output(chat, options)
        chat.constrain(output, options, self._params)
        ids = chat.templates.tokenize(chat.prompt)
        hidden = _add_stops(chat.prompt, options)
        if reasoning_budget is not None:
            budget = limit_reasoning(reasoning_budget, self._vocab, chat.prompt, len(ids))
            options["logits_processors"] = (*options.get("logits_processors", ()), budget)
        if any(not self._vocab.piece(token, False) for token in chat.special_tokens(self._vocab)):
            options["special"] = True
        request, _ = self._builder.completion(
            ids, max_tokens, stream=stream, n_news_max=n_news_max, **options
        )
        request.id = f"chat{request.id}"
        request.opening = chat.opening
        return request, chat.plan(output, hidden)

    def _output(self, chat: _Chat, options: dict[str, Any]) -> StructuredOutput | None:
        form = {name: options.pop(name, None) for name in _FORMS}
        if all(value is None for value in form.values()):
            return None
        from .structured import structured_output

        output = structured_output(*form.values())
        if output is None:
            return None
        if chat.can_call:
            raise ParameterError(
                f"{next(name for name in _FORMS if form[name] is not None)}: an answer that may "
                "call tools cannot have a form of its own; use tool_choice='none', or ask for it "
                "in a second request"
            )
        if not chat.before and not takes_form(chat.prompt):
            raise ParameterError(
                "response_format: the template's format has marks of its own around the answer"
            )
        if output.lark is not None:
            if is_thinking(chat.prompt):
                raise ParameterError("lark: not while the model thinks; use enable_thinking=False")
            options["lark"] = output.lark
        return output


class _Chat:
    """One conversation on its way to a request."""

    def __init__(
        self,
        requests: ChatRequests,
        messages: list[dict[str, Any]],
        tools: Any,
        tool_choice: str | Mapping[str, Any] | None,
        parallel: bool,
        options: dict[str, Any],
    ) -> None:
        self.templates = requests.templates(options.pop("chat_template", None))
        self.parallel = _flag("parallel_tool_calls", parallel)
        self.mode, self.name = "none", None
        self.fallback: Any = None
        self.opening: tuple[str, str, list[str]] | None = None
        self.before = ""
        found: list[Tool] = []
        if tools or tool_choice is not None:
            from .tools import normalize_tool_choice, normalize_tools

            found = normalize_tools(tools or ())
            self.mode, self.name = normalize_tool_choice(tool_choice, found)
        render = _render_options(options)
        past = any("tool_calls" in each or each["role"] == "tool" for each in messages)
        if found or past:
            able = self.templates.capabilities()
            if not able["supports_tools"]:
                from .tools import ToolFallback

                choice = self.name or self.mode
                self.fallback = ToolFallback(found, choice, self.parallel)
                messages = self.fallback.with_system_text(messages)
                found = []
        if found:
            render["tools"] = _json("tools", [tool.to_dict() for tool in found])
            render["tool_choice"] = self.mode
            render["parallel_tool_calls"] = self.parallel
        if render["continue_final_message"]:
            self.before = _last_text(messages)
        self.prompt = _render(self.templates, messages, render)
        self.format = self.prompt
        if self.name is not None and found:
            # The model is told of all tools; the grammar is that of one.
            one = [tool.to_dict() for tool in found if tool.name == self.name]
            self.format = _render(self.templates, messages, {**render, "tools": json.dumps(one)})

    @property
    def can_call(self) -> bool:
        """Whether an answer may have tool calls."""
        return self.mode != "none"

    def constrain(
        self, output: StructuredOutput | None, options: dict[str, Any], params: LlamaParams
    ) -> None:
        """Give the sampler in `options` the grammar of the answer."""
        if not self.can_call and output is None:
            return
        chosen = options.get("sampler")
        chain = params.sampler if chosen is None else chosen
        chain = SamplerChain.default() if chain is None else chain
        if not isinstance(chain, SamplerChain):
            return  # the builder says so
        if chain.constraint is not None:
            raise ParameterError("sampler: it has a grammar of its own; only one can hold")
        if options.get("ignore_eos"):
            raise ParameterError("ignore_eos: an answer of a form ends where it is complete")
        options["sampler"] = self._constrained(chain, output)

    def _constrained(self, chain: SamplerChain, output: StructuredOutput | None) -> SamplerChain:
        prompt = self.format
        if output is not None:
            if output.gbnf is None:
                return chain
            gbnf = output.gbnf
            if self.before and not is_thinking(prompt):
                self.opening = (self.before, "", [])
            elif thinks_first(prompt):
                gbnf = after_thinking(gbnf, prompt)
            return chain.grammar(gbnf)
        self.opening = opening(prompt)
        if self.fallback is not None:
            gbnf = self.fallback.gbnf
            if not self.fallback.lazy:
                self.opening = None
                if thinks_first(prompt):
                    gbnf = after_thinking(gbnf, prompt)
                return chain.grammar(gbnf)
            return chain.grammar_lazy(gbnf, trigger_patterns=[self.fallback.trigger])
        if not prompt.grammar:
            return chain
        gbnf = prompt.grammar
        if not self.parallel:
            gbnf = _MORE_CALLS.sub(r"\1\2", gbnf)
        if prompt.grammar_lazy and self.mode == "auto":
            patterns, tokens = _triggers(prompt)
            return chain.grammar_lazy(gbnf, trigger_patterns=patterns, trigger_tokens=tokens)
        return chain.grammar(_TEXT_BEFORE_CALL.sub(r"\1\2", gbnf))

    def special_tokens(self, vocab: _core.Vocab) -> list[int]:
        """Return the tokens that the parser needs to see."""
        if self._is_plain:
            return []
        tags = (self.prompt.thinking_start_tag, *self.prompt.thinking_end_tags)
        found = []
        for text in (*self.format.preserved_tokens, *tags):
            ids = vocab.tokenize(text, False, True) if text else []
            if len(ids) == 1:
                found += ids
        return found

    @cached_property
    def _is_plain(self) -> bool:
        prompt = self.prompt
        if prompt.supports_thinking or (self.can_call and self.fallback is None):
            return False
        return bool(prompt.parse(_PLAIN)["content"] == self.before + _PLAIN)

    def plan(self, output: StructuredOutput | None, hidden: Sequence[str]) -> ChatPlan:
        """Return how the answers are read."""
        parser: Callable[[], Parser] | None = None
        if self.fallback is not None and self.can_call:
            parser = self.fallback.parser
        return ChatPlan(
            format=None if self._is_plain else self.format,
            fallback=parser,
            has_tools=self.can_call,
            parallel_tool_calls=self.parallel,
            output=output,
            hidden_stops=frozenset(hidden),
            before=self.before,
        )


def _render_options(options: dict[str, Any]) -> dict[str, Any]:
    """Take what is the template's out of the options of a request."""
    thinking = options.pop("enable_thinking", None)
    kwargs = options.pop("chat_template_kwargs", None)
    reasoning_format = options.pop("reasoning_format", "auto")
    if reasoning_format not in _REASONING_FORMATS:
        raise ParameterError(
            f"reasoning_format: {reasoning_format!r:.80} is not one of "
            f"{', '.join(_REASONING_FORMATS)}"
        )
    if kwargs is not None and not isinstance(kwargs, Mapping):
        raise ParameterError(f"chat_template_kwargs: expected a mapping, not {kwargs!r:.80}")
    continues = _flag("continue_final_message", options.pop("continue_final_message", False))
    generates = _flag("add_generation_prompt", options.pop("add_generation_prompt", True))
    return {
        "add_generation_prompt": generates and not continues,
        "continue_final_message": "auto" if continues else None,
        "enable_thinking": thinking is None or _flag("enable_thinking", thinking),
        "reasoning_format": reasoning_format,
        "template_kwargs": _json("chat_template_kwargs", dict(kwargs)) if kwargs else None,
    }


def _render(
    templates: _core.ChatTemplates, messages: list[dict[str, Any]], options: dict[str, Any]
) -> _core.ChatPrompt:
    now = int(time.time())
    try:
        return templates.render(_json("messages", messages), now=now, **options)
    except ChatTemplateError as error:
        reason = error
    if not options["continue_final_message"]:
        # The first message with which it says the same is the one that it means.
        for n in range(1, len(messages)):
            try:
                templates.render(json.dumps(messages[:n]), now=now, **options)
            except ChatTemplateError as error:
                if str(error) == str(reason):
                    raise ChatTemplateError(
                        f"messages[{n - 1}]: {reason.args[0]}", log=reason.log
                    ) from None
    where = f"messages[{len(messages) - 1}]" if len(messages) > 1 else "messages[0]"
    raise ChatTemplateError(f"{where}: {reason.args[0]}", log=reason.log) from None


def _triggers(prompt: _core.ChatPrompt) -> tuple[list[str], list[int]]:
    patterns, tokens = [], []
    for kind, value, token in prompt.grammar_triggers:
        if kind == "token" and token is not None:
            tokens.append(token)
        elif kind == "word":
            patterns.append(re.sub(r"([.^$|()*+?\[\]{}\\/])", r"\\\1", value))
        elif kind == "pattern_full":
            patterns.append(f"^{value.removeprefix('^').removesuffix('$')}$")
        else:
            patterns.append(value)
    return patterns, tokens


def _add_stops(prompt: _core.ChatPrompt, options: dict[str, Any]) -> list[str]:
    own = options.get("stop", ())
    own = (own,) if isinstance(own, str) else own
    if not prompt.additional_stops or not isinstance(own, Iterable):
        return []
    own = tuple(own)
    options["stop"] = (*own, *prompt.additional_stops)
    return [stop for stop in prompt.additional_stops if stop not in own]


def _last_text(messages: list[dict[str, Any]]) -> str:
    content = messages[-1].get("content")
    if isinstance(content, list):
        return "".join([part["text"] for part in content])
    return content or ""


def _flag(name: str, value: Any) -> bool:
    if not isinstance(value, bool):
        raise ParameterError(f"{name}: expected True or False, not {value!r:.80}")
    return value


def _json(name: str, value: Any) -> str:
    try:
        text = json.dumps(value, allow_nan=False, ensure_ascii=False)
        # Half a surrogate pair is no UTF-8.
        return text if text.isascii() or _is_utf8(text) else json.dumps(value)
    except (TypeError, ValueError, RecursionError) as error:
        raise ParameterError(f"{name}: not JSON: {error}") from None


def _is_utf8(text: str) -> bool:
    try:
        text.encode()
    except UnicodeEncodeError:
        return False
    return True


def _file_text(path: Path) -> str:
    try:
        return path.read_text(encoding="utf-8")
    except (OSError, ValueError) as error:
        raise ParameterError(f"chat_template: cannot read {path}: {error}") from error
