"""From a conversation to a checked `Request`, and to how its answers are read."""

from __future__ import annotations

import json
import os
import threading
import time
from collections import OrderedDict
from collections.abc import Callable, Iterable, Mapping, Sequence
from functools import cached_property
from typing import Any

from . import _core
from .chat import ChatMessage, check_messages
from .chat_formats import ChatFormat, chat_format
from .chat_grammar import bare_call, bare_trigger, call_grammar, triggers, without_text_before
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
from .errors import ChatParseError, ChatTemplateError
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
    "callback": "use stream=True",
    "session": "it appends text as it is, and a template writes a conversation anew; what was "
    "computed is reused without one",
}
_FORMS = ("response_format", "grammar", "regex", "choices", "lark")
# What a format does not touch is read without a parser.
_PLAIN = " Plain <b>text</b> {1}\n"


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
        return self.parsed(self.chat_format(chat_template))

    def chat_format(self, chat_template: str | os.PathLike[str] | None) -> ChatFormat:
        """Return the template that is asked for, and its stops."""
        return chat_format(chat_template, self._model)

    def parsed(self, form: ChatFormat) -> _core.ChatTemplates:
        """Return a format's template, made once."""
        source = form.template
        with self._lock:
            found = self._templates.get(source)
            if found is None:
                found = _core.ChatTemplates(self._model, source or None)
                self._templates[source] = found
                if len(self._templates) > _N_TEMPLATES:
                    self._templates.popitem(last=False)
            self._templates.move_to_end(source)
        return found

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
        unknown = options.keys() - ChatOptions.__annotations__.keys()
        if unknown:
            raise TypeError(
                f"create_chat_completion() got an unexpected keyword argument {min(unknown)!r}"
            )
        checked = check_messages(messages)
        chat = _Chat(self, checked, tools, tool_choice, parallel_tool_calls, options)
        output = self._output(chat, options)
        chat.constrain(output, options, self._params)
        ids = chat.templates.tokenize(chat.prompt)
        hidden = _add_stops((*chat.prompt.additional_stops, *chat.stops), self._vocab, options)
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
        asked = next(name for name in _FORMS if form[name] is not None)
        if chat.can_call:
            raise ParameterError(
                f"{asked}: an answer that may "
                "call tools cannot have a form of its own; use tool_choice='none', or ask for it "
                "in a second request"
            )
        if not chat.before and not takes_form(chat.prompt):
            raise ParameterError(
                f"{asked}: the template's format has marks of its own around the answer"
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
        form = requests.chat_format(options.pop("chat_template", None))
        self.templates = requests.parsed(form)
        self.stops = form.stops
        self.parallel = _flag("parallel_tool_calls", parallel)
        self.mode, self.name = "none", None
        self.fallback: Any = None
        self.opening: tuple[str, str, list[str]] | None = None
        self.before = ""
        self.tools: list[Tool] = []
        self.bare: _core.ChatPrompt | None = None
        self.bare_head: str | None = None
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

                choice = self.mode if self.name is None else _named(self.name)
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
        self.tools = found
        if found and self.mode == "auto" and not self.prompt.grammar:
            # The calls have no mark that could wake a grammar.
            self.bare = _render(self.templates, messages, {**render, "tool_choice": "required"})

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
        tools = [tool for tool in self.tools if self.name in (None, tool.name)]
        given = prompt.grammar if self.bare is None else self.bare.grammar
        gbnf = call_grammar(given, tools, parallel=self.parallel)
        if self.bare is not None:
            gbnf, head = bare_call(gbnf, tools)
            self.bare_head = head
            return chain.grammar_lazy(gbnf, trigger_patterns=[bare_trigger(head)])
        if not gbnf:
            return chain
        if prompt.grammar_lazy and self.mode == "auto":
            patterns, tokens = triggers(prompt)
            return chain.grammar_lazy(gbnf, trigger_patterns=patterns, trigger_tokens=tokens)
        return chain.grammar(without_text_before(gbnf))

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
        try:
            return bool(prompt.parse(_PLAIN)["content"] == self.before + _PLAIN)
        except ChatParseError:
            return False

    def plan(self, output: StructuredOutput | None, hidden: Sequence[str | int]) -> ChatPlan:
        """Return how the answers are read."""
        parser: Callable[[], Parser] | None = None
        if self.fallback is not None and self.can_call:
            parser = self.fallback.parser
        return ChatPlan(
            format=None if self._is_plain else self.format,
            fallback=parser,
            must_call=self.mode == "required",
            bare_call=self.bare_head,
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


def _named(name: str) -> dict[str, Any]:
    return {"type": "function", "function": {"name": name}}


def _add_stops(
    stops: Sequence[str], vocab: _core.Vocab, options: dict[str, Any]
) -> list[str | int]:
    """Add a format's stops to the options, and return those that only it asks for."""
    own, own_ids = options.get("stop") or (), options.get("stop_tokens", ())
    own = (own,) if isinstance(own, str) else own
    if not stops or not isinstance(own, Iterable) or not isinstance(own_ids, Iterable):
        return []
    own, own_ids = tuple(own), tuple(own_ids)
    options["stop"] = (*own, *stops)
    # A special token is not in the text, where a stop string is looked for.
    ids = [ids[0] for stop in stops if len(ids := vocab.tokenize(stop, False, True)) == 1]
    ids = [token for token in ids if not vocab.piece(token, False)]
    if ids:
        options["stop_tokens"] = (*own_ids, *ids)
    given = {*own, *own_ids}
    return [*[stop for stop in stops if stop not in given], *[t for t in ids if t not in given]]


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
