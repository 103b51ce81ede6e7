"""Formatters, handlers and named formats called as llama-cpp-python lets them be called."""

from __future__ import annotations

import json
import sys
import warnings
from typing import Any

import numpy as np
import pytest
from golden import check_chat, check_chat_chunks

from llama_crab import ParameterError
from llama_crab.compat.llama_cpp import Llama, LlamaCppCompatWarning, llama_chat_format
from llama_crab.compat.llama_cpp.llama_chat_format import (
    ChatFormatterResponse,
    Jinja2ChatFormatter,
    LlamaChatCompletionHandlerNotFoundException,
    get_chat_completion_handler,
    register_chat_completion_handler,
    register_chat_format,
)
from llama_crab.errors import ChatTemplateError

QUESTION = [{"role": "user", "content": "What is the capital of France?"}]
GREEDY = {"temperature": 0, "max_tokens": 6}
CHATML = (
    "{% for m in messages %}<|im_start|>{{ m.role }}\n{{ m.content }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
TOOLS = [
    {
        "type": "function",
        "function": {
            "name": "show",
            "parameters": {
                "type": "object",
                "properties": {"city": {"type": "string", "maxLength": 12}},
                "required": ["city"],
                "additionalProperties": False,
            },
        },
    }
]


def writing(llama: Llama, text: str) -> Any:
    """Return a processor under which the model writes `text`, none of it as a special token."""
    ids = [*llama.tokenize(text.encode(), False, False), llama.token_eos()]
    start: list[int] = []

    def force(tokens: Any, logits: Any) -> Any:
        start.append(len(tokens))
        token = ids[min(len(tokens) - start[0], len(ids) - 1)]
        logits[:] = -np.inf
        logits[token] = 0.0
        return logits

    return [force]


def text_of(answer: Any) -> str:
    content: str = check_chat(answer)["content"]
    return content


@pytest.fixture(autouse=True)
def nothing_registered(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(llama_chat_format, "_handlers", {})


# Formatters


def test_a_jinja_formatter_is_called_and_has_the_tokens_it_was_given() -> None:
    pytest.importorskip("jinja2")
    template = (
        "{{ bos_token }}{% for m in messages %}{% generation %}{{ m.content }}{% endgeneration %}"
        "{{ eos_token }}{% endfor %}{{ tools | tojson }}{{ more }}{% if x is none %}!{% endif %}"
        "{% if add_generation_prompt %}>{% endif %}"
    )
    formatter = Jinja2ChatFormatter(template, "</e>", "<b>", stop_token_ids=[7])
    made = formatter(messages=[{"role": "user", "content": "<é>"}], tools=["<t>"], more=1, x=None)
    assert isinstance(made, ChatFormatterResponse)
    assert made.prompt == '<b><é></e>["<t>"]1!>'
    assert (made.stop, made.added_special) == (["</e>"], True)
    assert [made.stopping_criteria(np.array([1, n]), None) for n in (7, 8)] == [True, False]
    plain = Jinja2ChatFormatter("{{ eos_token }}|{{ bos_token }}")(messages=[])
    assert (plain.prompt, plain.stop, plain.stopping_criteria) == ("|", [], None)
    with pytest.raises(ValueError, match="no such"):
        Jinja2ChatFormatter("{{ raise_exception('no such') }}", "", "")(messages=[])
    for wrong in ("{% if", "{{ messages.pop() }}", "{{ a.b.c }}"):
        with pytest.raises(ChatTemplateError):
            Jinja2ChatFormatter(wrong, "", "")(messages=[])


def test_a_formatter_without_jinja2_says_so(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("jinja2", "jinja2.ext", "jinja2.sandbox"):
        monkeypatch.setitem(sys.modules, name, None)
    with pytest.raises(ImportError, match="jinja2"):
        Jinja2ChatFormatter("{{ 1 }}{{ 2 }}", "", "")(messages=[])


def test_the_tokens_of_a_jinja_formatter_count_in_its_handler(smol_cpp: Llama) -> None:
    handler = Jinja2ChatFormatter(CHATML, eos_token="capital", bos_token="").to_chat_handler()
    free = handler(llama=smol_cpp, messages=QUESTION, **GREEDY)
    assert "capital" not in text_of(free)
    answer = handler(
        llama=smol_cpp, messages=QUESTION, logits_processor=writing(smol_cpp, "The capital is")
    )
    assert text_of(answer) == "The "
    assert answer["choices"][0]["finish_reason"] == "stop"
    # The same prompt, token for token, as with the tokens written out.
    spelled = Jinja2ChatFormatter(
        CHATML.replace("<|im_start|>", "{{ bos_token }}").replace("<|im_end|>", "{{ eos_token }}"),
        eos_token="<|im_end|>",
        bos_token="<|im_start|>",
    ).to_chat_handler()
    answers = [
        each(llama=smol_cpp, messages=QUESTION, **GREEDY)
        for each in (spelled, get_chat_completion_handler("chatml"))
    ]
    assert text_of(answers[0]) == text_of(answers[1])
    assert answers[0]["usage"] == answers[1]["usage"]


# Handlers


def test_a_handler_is_called_with_what_it_needs(smol_cpp: Llama) -> None:
    seen: list[dict[str, Any]] = []

    @register_chat_format("mine")
    def mine(messages: Any, **given: Any) -> ChatFormatterResponse:
        seen.append(given)
        return ChatFormatterResponse("The capital of France is", stop=[".", ""])

    handler = get_chat_completion_handler("mine")
    answer = handler(llama=smol_cpp, messages=QUESTION, temperature=0)
    assert text_of(answer) == " Paris"
    chunks = handler(llama=smol_cpp, messages=QUESTION, temperature=0, stream=True, flavour="dry")
    assert check_chat_chunks(list(chunks)) == " Paris"
    assert seen[0].keys() == {"functions", "function_call", "tools", "tool_choice"}
    assert seen[1]["flavour"] == "dry"
    form = {"type": "json_object", "schema": TOOLS[0]["function"]["parameters"]}
    answer = handler(llama=smol_cpp, messages=QUESTION, temperature=0, response_format=form)
    assert list(json.loads(text_of(answer))) == ["city"]


def test_handlers_of_the_named_formats(smol_cpp: Llama, monkeypatch: pytest.MonkeyPatch) -> None:
    answer = get_chat_completion_handler("chatml")(llama=smol_cpp, messages=QUESTION, **GREEDY)
    monkeypatch.setattr(smol_cpp, "chat_format", "chatml")
    # The handler's default there is 1.1.
    own = smol_cpp.create_chat_completion(QUESTION, repeat_penalty=1.1, **GREEDY)
    assert text_of(answer) == text_of(own)
    with pytest.raises(LlamaChatCompletionHandlerNotFoundException, match="chatml"):
        get_chat_completion_handler("nobody")
    with pytest.raises(ParameterError, match="registered already"):
        register_chat_completion_handler("chatml")(lambda **given: None)


@pytest.mark.parametrize("name", ["chatml", "openchat", "llama-3"])
def test_a_named_format_ends_where_its_mark_is_written(
    smol_cpp: Llama, monkeypatch: pytest.MonkeyPatch, name: str
) -> None:
    monkeypatch.setattr(smol_cpp, "chat_format", name)
    (mark,) = llama_chat_format.FORMATS[name].stops
    forced = writing(smol_cpp, f"Paris{mark}And more")
    answer = smol_cpp.create_chat_completion(QUESTION, logits_processor=forced)
    assert text_of(answer) == "Paris"
    assert answer["choices"][0]["finish_reason"] == "stop"


# Forms


def test_a_form_counts_more_than_tools_that_may_be_called(smol_cpp: Llama) -> None:
    form: dict[str, Any] = {"response_format": {"type": "json_object"}}
    for options in (form, {"grammar": 'root ::= "{}"'}):
        for choice in (None, "auto"):
            answer = smol_cpp.create_chat_completion(
                QUESTION,
                tools=TOOLS,
                tool_choice=choice,
                logits_processor=writing(smol_cpp, "{}"),
                max_tokens=20,
                **options,
            )
            assert text_of(answer) == "{}"
    named = smol_cpp.create_chat_completion(
        QUESTION, tools=TOOLS, tool_choice=TOOLS[0], temperature=0, max_tokens=64, **form
    )
    assert check_chat(named)["tool_calls"][0]["function"]["name"] == "show"


def test_an_answer_of_a_form_comes_behind_thinking(
    smol_cpp: Llama, monkeypatch: pytest.MonkeyPatch
) -> None:
    template = (
        "{% for m in messages %}{% if m.role == 'assistant' %}{{ m.content.split('</think>')[-1] }}"
        "{% else %}<|im_start|>{{ m.role }}\n{{ m.content }}<|im_end|>\n{% endif %}{% endfor %}"
        "{% if add_generation_prompt %}<|im_start|>assistant\n<think>\n{% endif %}"
    )
    monkeypatch.setattr(smol_cpp, "chat_handler", Jinja2ChatFormatter(template).to_chat_handler())
    for options in ({"response_format": {"type": "json_object"}}, {"grammar": 'root ::= "{}"'}):
        answer = smol_cpp.create_chat_completion(
            QUESTION,
            logits_processor=writing(smol_cpp, "So be it.\n</think>\n\n{}"),
            max_tokens=40,
            **options,
        )
        assert text_of(answer).strip() == "{}"
    free = smol_cpp.create_chat_completion(
        QUESTION, logits_processor=writing(smol_cpp, "Hm.\n</think>\n\nParis"), max_tokens=40
    )
    assert "</think>" in text_of(free)


# Conversations


def test_keys_without_a_meaning_are_left_out_with_one_warning(smol_cpp: Llama) -> None:
    messages = [{**QUESTION[0], "time": 3, "refusal": None}]
    with pytest.warns(LlamaCppCompatWarning, match="time") as told:
        answers = [smol_cpp.create_chat_completion(messages, **GREEDY) for _ in range(2)]
    assert len(told) == 1
    own = smol_cpp.create_chat_completion(QUESTION, **GREEDY)
    assert [text_of(each) for each in answers] == 2 * [text_of(own)]
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        empty = [*QUESTION, {"role": "assistant", "content": None}, *QUESTION]
        smol_cpp.create_chat_completion(empty, **GREEDY)


def test_a_role_is_up_to_the_template(smol_cpp: Llama, monkeypatch: pytest.MonkeyPatch) -> None:
    narrator = {"role": "narrator", "content": "The capital of Norway is"}
    messages = [narrator, *QUESTION]
    logits: list[Any] = []
    # ChatML writes any role; the prompt is its text, token for token.
    answer = smol_cpp.create_chat_completion(
        messages, logits_processor=lambda ids, row: (logits.append(ids.copy()), row)[1], **GREEDY
    )
    text = "".join(f"<|im_start|>{m['role']}\n{m['content']}<|im_end|>\n" for m in messages)
    prompt = smol_cpp.detokenize(list(logits[0]), special=True).decode()
    assert prompt.endswith(f"{text}<|im_start|>assistant\n")
    assert len(text_of(answer)) > 0
    chunks = smol_cpp.create_chat_completion(messages, stream=True, **GREEDY)
    assert check_chat_chunks(list(chunks)) == text_of(answer)
    found = smol_cpp.create_chat_completion(messages, logprobs=True, top_logprobs=1, **GREEDY)
    check_chat(found)
    assert len(found["choices"][0]["logprobs"]["content"]) == found["usage"]["completion_tokens"]
    form = {"type": "json_object", "schema": TOOLS[0]["function"]["parameters"]}
    found = smol_cpp.create_chat_completion(messages, response_format=form, temperature=0)
    assert list(json.loads(text_of(found))) == ["city"]
    with pytest.raises(NotImplementedError, match="narrator"):
        smol_cpp.create_chat_completion(messages, tools=TOOLS)
    strict = "{% for m in messages %}{% if m.role == 'user' %}{{ m.content }}{% else %}"
    strict += "{{ raise_exception('only users') }}{% endif %}{% endfor %}"
    handler = Jinja2ChatFormatter(strict).to_chat_handler()
    with pytest.raises(ChatTemplateError, match="only users"):
        handler(llama=smol_cpp, messages=messages)
    # A named format has no place for it.
    monkeypatch.setattr(smol_cpp, "chat_format", "chatml")
    own = smol_cpp.create_chat_completion(QUESTION, **GREEDY)
    with pytest.warns(LlamaCppCompatWarning, match="narrator"):
        answer = smol_cpp.create_chat_completion(messages, **GREEDY)
    assert text_of(answer) == text_of(own)
    for wrong in ("hello", {"content": "x"}, {"role": 3, "content": "x"}):
        with pytest.raises(ParameterError, match="with a role"):
            smol_cpp.create_chat_completion([wrong])
