cdef frozenset _TOOL_CHOICES = frozenset({"auto", "none", "required"})
cdef frozenset _REASONING_FORMATS = frozenset({"none", "auto", "deepseek", "deepseek-legacy"})
cdef frozenset _CONTINUATIONS = frozenset({"", "auto", "content", "reasoning_content"})


cdef str _one_of(str name, object value, frozenset allowed):
    if value not in allowed:
        raise ValueError(f"{name}={value!r}: expected one of {', '.join(sorted(allowed))}")
    return value


cdef list _strings(const vector[string]& texts):
    return [_str(texts[i]) for i in range(texts.size())]


cdef dict _message_dict(const nat.ChatMessage& message):
    cdef size_t i
    return {
        "content": _str(message.content),
        "reasoning_content": _str(message.reasoning_content),
        "tool_calls": [
            {
                "id": _str(message.tool_calls[i].id),
                "name": _str(message.tool_calls[i].name),
                "arguments": _str(message.tool_calls[i].arguments),
            }
            for i in range(message.tool_calls.size())
        ],
    }


cdef list _deltas(const vector[nat.ChatDelta]& deltas):
    cdef list found = []
    cdef size_t i
    for i in range(deltas.size()):
        if deltas[i].index >= 0:
            found.append({
                "index": deltas[i].index, "id": _str(deltas[i].id), "name": _str(deltas[i].name),
                "arguments": _str(deltas[i].arguments)})
        elif not deltas[i].content.empty():
            found.append({"content": _str(deltas[i].content)})
        else:
            found.append({"reasoning_content": _str(deltas[i].reasoning_content)})
    return found


@cython.final
cdef class ChatTemplates:
    """The chat templates of a model, parsed and analysed once.

    ``ChatTemplates(model, source=None)``: `source` is a Jinja template to use instead of those in
    the GGUF; BOS and EOS are the model's in any case. Without either, ChatML stands in.

    Raises `ChatTemplateError` for a template that does not parse.
    Thread-safety: immutable; any thread may render.

    Wraps ``common_chat_templates``.
    """

    def __cinit__(self, Model model not None, source=None):
        cdef nat.ModelPtr c_model
        cdef string text = _utf8(source) if source is not None else b""
        cdef nat.CChatTemplates *templates
        cdef nat.Status status
        cdef uint64_t mark = nat.log_mark()
        model._require_open()
        c_model = model._c_model
        if source is not None and text.empty():
            raise errors.ChatTemplateError("the template is empty")
        with nogil:
            templates = nat.new_chat_templates(c_model, text, status)
        if templates == NULL:
            raise _error(errors.ChatTemplateError, status, mark, _str(status.message))
        self._c_templates.reset(templates)
        self._generation = nat.fork_generation
        self._model = model
        self._has_tokenizer = model.vocab.type != "none"

    cdef nat.CChatTemplates *_require_open(self) except NULL:
        if self._c_templates == NULL:  # made by __new__ alone
            raise errors.ClosedError("the templates are not open")
        _check_generation(self._generation)
        return self._c_templates.get()

    def __repr__(self):
        return f"<ChatTemplates of {self._model!r}>"

    def __reduce__(self):
        raise TypeError("ChatTemplates cannot be pickled")

    @property
    def model(self):
        return self._model

    @property
    def source(self):
        """The text of the template for conversations without tools."""
        return _str(self._require_open().source(False))

    @property
    def tool_use_source(self):
        """The text of the template for conversations with tools; None if it is the same one."""
        cdef string text = self._require_open().source(True)
        return None if text.empty() else _str(text)

    @property
    def was_explicit(self):
        """False when neither the model nor the caller has a template, so that ChatML stands in."""
        return self._require_open().was_explicit()

    def capabilities(self):
        """Return what the templates can do as a dict of str to bool.

        ``supports_tools`` is True when a tool comes into the prompt, the grammar and the parser;
        where it is False, tools must be described and parsed by other means. The others:
        ``supports_thinking``, ``supports_system_role``, ``supports_tool_calls`` (in the history),
        ``supports_parallel_tool_calls``, ``supports_preserve_reasoning``,
        ``supports_reasoning_effort``, ``supports_string_content``, ``supports_typed_content``,
        ``supports_object_arguments``. Renders a few conversations on first use.
        """
        cdef nat.CChatTemplates *templates = self._require_open()
        cdef nat.cmap[string, nat.bool] found
        with nogil:
            found = templates.capabilities()
        return {_str(item.first): item.second for item in found}

    def render(
        self, messages, *, tools=None, tool_choice="auto", bint parallel_tool_calls=False,
        json_schema=None, grammar=None, bint add_generation_prompt=True,
        continue_final_message=None, bint enable_thinking=True, reasoning_format="auto",
        template_kwargs=None, int64_t now
    ):
        """Render a conversation to a `ChatPrompt`.

        `messages`, `tools`, `json_schema` and `template_kwargs` are JSON texts (str or bytes):
        messages and tools in OpenAI's form. `json_schema` or `grammar` (GBNF) constrain the
        answer; a grammar cannot be combined with tools. `continue_final_message` is ``auto``,
        ``content`` or ``reasoning_content`` and lets the model go on with a last assistant message.
        `now` is the template's time in seconds since 1970.

        Raises `ChatTemplateError` when the template refuses the conversation, or the JSON is not
        in the form described.

        Wraps ``common_chat_templates_apply``.
        """
        cdef nat.CChatTemplates *templates = self._require_open()
        cdef nat.ChatRequest request
        cdef ChatPrompt prompt = ChatPrompt.__new__(ChatPrompt)
        cdef nat.Status status
        cdef uint64_t mark = nat.log_mark()
        request.messages = _utf8(messages)
        request.tools = _utf8(tools or "")
        request.tool_choice = _utf8(_one_of("tool_choice", tool_choice, _TOOL_CHOICES))
        request.json_schema = _utf8(json_schema or "")
        request.grammar = _utf8(grammar or "")
        request.continue_final_message = _utf8(
            _one_of("continue_final_message", continue_final_message or "", _CONTINUATIONS))
        request.reasoning_format = _utf8(
            _one_of("reasoning_format", reasoning_format, _REASONING_FORMATS))
        request.template_kwargs = _utf8(template_kwargs or "")
        request.parallel_tool_calls = parallel_tool_calls
        request.add_generation_prompt = add_generation_prompt
        request.enable_thinking = enable_thinking
        request.now = now
        with nogil:
            templates.render(request, prompt._c_prompt, status)
        if status.kind != nat.STATUS_OK:
            raise _error(errors.ChatTemplateError, status, mark, _str(status.message))
        prompt._made = True
        return prompt

    def tokenize(self, ChatPrompt prompt not None):
        """Return the token ids of a prompt as a list of int.

        Special tokens count where the template wrote them; in what users wrote they are text. BOS
        comes once, when the vocabulary asks for it. Raises `TokenizeError`.

        Wraps ``llama_tokenize``.
        """
        cdef nat.CChatTemplates *templates = self._require_open()
        cdef const nat.CChatPrompt *c_prompt = prompt._require_open()
        cdef vector[int32_t] out
        cdef nat.Status status
        cdef uint64_t mark = nat.log_mark()
        if not self._has_tokenizer:
            raise errors.TokenizeError("the model has no tokenizer")
        with nogil:
            templates.tokenize(deref(c_prompt), out, status)
        if status.kind != nat.STATUS_OK:
            raise _error(errors.TokenizeError, status, mark, _str(status.message))
        return out


@cython.final
cdef class ChatPrompt:
    """A rendered conversation, and what is needed to generate and to parse its answer.

    Made by `ChatTemplates.render`. Thread-safety: immutable.

    Wraps ``common_chat_params``.
    """

    def __init__(self):
        raise TypeError("use ChatTemplates.render")

    cdef const nat.CChatPrompt *_require_open(self) except NULL:
        if not self._made:
            raise errors.ClosedError("use ChatTemplates.render")
        return &self._c_prompt

    def __repr__(self):
        if not self._made:
            return "<ChatPrompt>"
        return f"<ChatPrompt {self.format} of {self._c_prompt.text.size()} bytes>"

    def __reduce__(self):
        raise TypeError("a ChatPrompt cannot be pickled")

    @property
    def text(self):
        """The whole prompt as the template wrote it, with its BOS if it wrote one."""
        self._require_open()
        return _str(self._c_prompt.text)

    @property
    def parts(self):
        """The prompt in pieces: a list of ``(text, is_input)``.

        In pieces that are input, special tokens are plain text: they come from what users wrote.
        """
        self._require_open()
        cdef list found = []
        cdef size_t pos = 0
        cdef size_t i, first, second
        cdef bytes text = self._c_prompt.text
        for i in range(self._c_prompt.input.size()):
            first = self._c_prompt.input[i].first
            second = self._c_prompt.input[i].second
            if first > pos:
                found.append((text[pos:first].decode("utf-8", "replace"), False))
            found.append((text[first:second].decode("utf-8", "replace"), True))
            pos = second
        if pos < self._c_prompt.text.size():
            found.append((text[pos:].decode("utf-8", "replace"), False))
        return found

    @property
    def format(self):
        """Name of the output's format. Wraps ``common_chat_format_name``."""
        self._require_open()
        return _str(self._c_prompt.format)

    @property
    def grammar(self):
        """GBNF that the answer must match, or ""; rule ``root``."""
        self._require_open()
        return _str(self._c_prompt.grammar)

    @property
    def grammar_lazy(self):
        """True when the grammar applies only from a trigger on."""
        self._require_open()
        return self._c_prompt.grammar_lazy

    @property
    def grammar_triggers(self):
        """What wakes a lazy grammar: a list of ``(kind, value, token)``.

        `kind` is ``word``, ``pattern``, ``pattern_full`` or ``token``; `token` is None unless it is
        the latter.
        """
        self._require_open()
        cdef size_t i
        return [
            (_str(self._c_prompt.grammar_triggers[i].kind),
             _str(self._c_prompt.grammar_triggers[i].value),
             _optional(self._c_prompt.grammar_triggers[i].token))
            for i in range(self._c_prompt.grammar_triggers.size())
        ]

    @property
    def preserved_tokens(self):
        """Special tokens, by their text, that the parser needs to see in the output."""
        self._require_open()
        return _strings(self._c_prompt.preserved_tokens)

    @property
    def additional_stops(self):
        """Further strings that end the answer."""
        self._require_open()
        return _strings(self._c_prompt.additional_stops)

    @property
    def generation_prompt(self):
        """The end of the prompt that opens the answer; the parser reads it before the output."""
        self._require_open()
        return _str(self._c_prompt.generation_prompt)

    @property
    def supports_thinking(self):
        """True when the format has a place for reasoning."""
        self._require_open()
        return self._c_prompt.supports_thinking

    @property
    def thinking_start_tag(self):
        """What opens reasoning, or ""."""
        self._require_open()
        return _str(self._c_prompt.thinking_start_tag)

    @property
    def thinking_end_tags(self):
        """What may close reasoning, the preferred one first."""
        self._require_open()
        return _strings(self._c_prompt.thinking_end_tags)

    def parse(self, output, bint is_partial=False):
        """Parse a whole output (bytes or str) at once; for one that grows see `ChatParser`.

        Returns a dict of ``content``, ``reasoning_content`` and ``tool_calls``, each of which has
        ``id``, ``name`` and ``arguments`` (JSON text). Raises `ChatParseError`.

        Wraps ``common_chat_parse``.
        """
        cdef const nat.CChatPrompt *prompt = self._require_open()
        cdef string text = _utf8(output)
        cdef nat.ChatMessage message
        cdef nat.Status status
        cdef uint64_t mark = nat.log_mark()
        with nogil:
            nat.parse_chat_output(deref(prompt), text, is_partial, message, status)
        if status.kind != nat.STATUS_OK:
            raise _error(errors.ChatParseError, status, mark, _str(status.message))
        return _message_dict(message)


@cython.final
cdef class ChatParser:
    """Parses the answer to a `ChatPrompt` while it grows.

    `push` and `finish` return lists of deltas, each a dict with either ``content``, or
    ``reasoning_content``, or ``index``, ``id``, ``name`` and ``arguments`` of a tool call. Put
    together they are the message that `ChatPrompt.parse` makes of the whole output. A piece of
    text that may still become something else is held back.

    Thread-safety: none; one thread at a time.

    Wraps ``common_chat_parse``.
    """

    def __cinit__(self, ChatPrompt prompt not None):
        cdef const nat.CChatPrompt *c_prompt = prompt._require_open()
        cdef nat.CChatParser *parser
        cdef nat.Status status
        cdef uint64_t mark = nat.log_mark()
        with nogil:
            parser = nat.new_chat_parser(deref(c_prompt), status)
        if parser == NULL:
            raise _error(errors.ChatParseError, status, mark, "cannot make the parser")
        self._c_parser.reset(parser)

    cdef nat.CChatParser *_require_open(self) except NULL:
        if self._c_parser == NULL:
            raise errors.ClosedError("the parser is not open")
        return self._c_parser.get()

    def __reduce__(self):
        raise TypeError("a ChatParser cannot be pickled")

    def push(self, data):
        """Take the next bytes of the output (or str) and return what they add to the message.

        A character may be cut anywhere. Raises `ChatParseError` for an output that nests too deep.
        """
        cdef nat.CChatParser *parser = self._require_open()
        cdef bytes text = _utf8(data)
        cdef const char *start = text
        cdef size_t n = len(text)
        cdef vector[nat.ChatDelta] deltas
        cdef nat.Status status
        cdef uint64_t mark = nat.log_mark()
        with nogil:
            parser.push(start, n, deltas, status)
        if status.kind != nat.STATUS_OK:
            raise _error(errors.ChatParseError, status, mark, "the output cannot be parsed")
        return _deltas(deltas)

    def finish(self):
        """Take the end of the output and return what was held back.

        Raises `ChatParseError` when the output is not in the format, or its end takes back what
        was told: a call that breaks off in a form no grammar allowed.
        """
        cdef nat.CChatParser *parser = self._require_open()
        cdef vector[nat.ChatDelta] deltas
        cdef nat.Status status
        cdef uint64_t mark = nat.log_mark()
        with nogil:
            parser.finish(deltas, status)
        if status.kind == nat.STATUS_FAILED:
            raise _error(errors.ChatParseError, status, mark, _str(status.message))
        if status.kind != nat.STATUS_OK:
            raise _error(errors.ChatParseError, status, mark, "the output cannot be parsed")
        return _deltas(deltas)

    @property
    def message(self):
        """The message so far, in the form of `ChatPrompt.parse`: the sum of all deltas."""
        return _message_dict(self._require_open().message())
