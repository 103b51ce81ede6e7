"""Answers that are not in the form that a template asks for, and grammars that see to it."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from llama_crab import ChatMessage, Llama, ParameterError, SamplerChain, ToolCall
from llama_crab.errors import SchemaError
from llama_crab.structured import structured_output

TEMPLATES = Path(__file__).resolve().parents[2] / "third_party/llama.cpp/models/templates"
LLAMA_3 = TEMPLATES / "meta-llama-Llama-3.1-8B-Instruct.jinja"
QWEN_2 = TEMPLATES / "Qwen-Qwen2.5-7B-Instruct.jinja"
QWEN_3 = TEMPLATES / "Qwen-Qwen3-0.6B.jinja"
NEMO = TEMPLATES / "mistralai-Mistral-Nemo-Instruct-2407.jinja"
GREEDY = SamplerChain().greedy()
ASK = [{"role": "user", "content": "Write C."}]
CODE = "int main() { return 0; }"
Force = Callable[..., Any]


def tool(name: str = "w", **properties: Any) -> dict[str, Any]:
    properties = properties or {"city": {"type": "string", "maxLength": 10}}
    schema = {"type": "object", "properties": properties, "required": list(properties)}
    return {"type": "function", "function": {"name": name, "parameters": schema}}


def ask(llama: Llama, max_tokens: int = 60, messages: Any = ASK, **options: Any) -> Any:
    return llama.create_chat_completion(messages, max_tokens, **{"sampler": GREEDY, **options})


def test_braces_in_an_answer_that_may_call_are_text(smol_llama: Llama, forced: Force) -> None:
    """Llama 3 calls in plain JSON: there is no mark that tells a call from text."""
    for text in (CODE, '{"name": "Anna", "age": 3}', "{", "a { b"):
        options = {"tools": [tool()], "chat_template": LLAMA_3}
        answer = ask(smol_llama, logits_processors=[forced(smol_llama, text)], **options)
        assert (answer.message.content, answer.finish_reason) == (text, "stop")
        stream = ask(
            smol_llama, logits_processors=[forced(smol_llama, text)], stream=True, **options
        )
        assert "".join([chunk.text for chunk in stream]) == text
    cut = ask(smol_llama, 5, logits_processors=[forced(smol_llama, CODE)], **options)
    assert (cut.text, cut.finish_reason) == ("int main() { return", "length")


@pytest.mark.parametrize("before", ["", "Sure. ", "a {1} b "])
def test_a_call_without_a_mark_is_held_to_the_schema(
    smol_llama: Llama, forced: Force, before: str
) -> None:
    begun = forced(smol_llama, before + '{"name": "w"', end=False)
    kind = {"enum": ["sunny", "wet"]}
    answer = ask(
        smol_llama, tools=[tool(kind=kind)], chat_template=LLAMA_3, logits_processors=[begun]
    )
    (call,) = answer.tool_calls
    assert (answer.finish_reason, answer.text) == ("tool_calls", before)
    assert call.parsed_arguments["kind"] in kind["enum"]


@pytest.mark.parametrize(
    "name",
    [
        "openai-gpt-oss-120b",
        "CohereForAI-c4ai-command-r7b-12-2024-tool_use",
        "muse-glimmer",
        "meetkai-functionary-medium-v3.2",
    ],
)
def test_an_answer_without_the_marks_of_its_format_is_text(
    smol_llama: Llama, forced: Force, name: str
) -> None:
    template = TEMPLATES / f"{name}.jinja"
    text = "Hello there."
    for max_tokens, told in ((20, text), (2, "Hello there")):
        processors = [forced(smol_llama, text)]
        answer = ask(smol_llama, max_tokens, chat_template=template, logits_processors=processors)
        assert answer.message.content == told


@pytest.mark.parametrize("template", [None, QWEN_2], ids=["fallback", "qwen"])
def test_a_call_that_a_stop_string_cuts_is_no_call(
    smol_llama: Llama, forced: Force, template: Any
) -> None:
    written = '<tool_call>\n{"name": "w", "arguments": {"city": "Oslo"}}\n</tool_call>'
    for stop, reason in (('"}', "stop"), ("</tool_call>", "tool_calls")):
        answer = ask(
            smol_llama,
            tools=[tool()],
            chat_template=template,
            stop=stop,
            logits_processors=[forced(smol_llama, written)],
        )
        assert answer.finish_reason == reason
        assert answer.tool_calls[0].arguments.startswith('{"city": "Oslo')


FORM = {
    "n": {"type": "integer", "minimum": 10, "maximum": 30, "multipleOf": 7},
    "e": {"type": "string", "format": "ipv4"},
    "xs": {"type": "array", "items": {"type": "number", "exclusiveMinimum": 5}, "maxItems": 2},
}


@pytest.mark.parametrize("template", [QWEN_2, LLAMA_3, NEMO], ids=["qwen", "llama", "nemo"])
def test_arguments_satisfy_what_llama_commons_grammar_passes_over(
    smol_llama: Llama, template: Path
) -> None:
    options = {"chat_template": template, "tool_choice": "required"}
    answer = ask(smol_llama, 120, tools=[tool(**FORM)], **options)
    given = answer.tool_calls[0].parsed_arguments
    assert given["n"] in (14, 21, 28)
    assert all(0 <= int(part) < 256 for part in given["e"].split("."))
    assert len(given["xs"]) <= 2
    assert all(x > 5 for x in given["xs"])
    unique = {"type": "array", "uniqueItems": True}
    with pytest.raises(SchemaError, match=r"tool 'w': 'uniqueItems' at #/properties/a") as raised:
        ask(smol_llama, tools=[tool(a=unique)], **options)
    assert (raised.value.keyword, raised.value.path) == ("uniqueItems", "#/properties/a")


def test_arguments_one_by_one_are_ours_where_they_are_json(smol_llama: Llama) -> None:
    request, _ = smol_llama._chats.request(
        ASK,
        1,
        stream=False,
        tools=[tool(n=FORM["n"])],
        tool_choice="required",
        chat_template=TEMPLATES / "Qwen3-Coder.jinja",
    )
    grammar = str(request.sampler.constraint)
    assert '"14"' in grammar
    assert '"21"' in grammar


def test_ids_of_calls_can_be_told_again(smol_llama: Llama) -> None:
    """Nemo's template takes no others back than those of nine letters and digits."""
    answer = ask(smol_llama, 200, tools=[tool()], tool_choice="required", chat_template=NEMO)
    (call,) = answer.tool_calls
    assert answer.finish_reason == "tool_calls"
    told = {"role": "tool", "tool_call_id": call.id, "content": "wet"}
    prompt = smol_llama.format_chat([*ASK, answer.message, told], chat_template=NEMO)
    assert call.id in prompt
    assert len(call.id) == 9


@pytest.mark.parametrize("name", ["none", "auto", "required"])
def test_a_tool_may_be_called_like_a_choice(smol_llama: Llama, name: str) -> None:
    for template in (None, QWEN_2):
        options = {"tools": [tool(name)], "chat_template": template}
        choice = {"type": "function", "function": {"name": name}}
        answer = ask(smol_llama, tool_choice=choice, **options)
        assert [call.name for call in answer.tool_calls] == [name]
        with pytest.raises(ParameterError, match=f"'{name}' is the name of a tool, too"):
            ask(smol_llama, tool_choice=name, **options)


def test_without_tools_there_is_no_choice(smol_llama: Llama) -> None:
    answer = ask(smol_llama, tool_choice="auto", choices=["yes", "no"])
    assert answer.parsed in ("yes", "no")
    past = [
        *ASK,
        ChatMessage(tool_calls=(ToolCall("a", "w", "{}"),)),
        {"role": "tool", "tool_call_id": "a", "content": "wet"},
    ]
    assert ask(smol_llama, 3, messages=past, tool_choice="auto").text
    with pytest.raises(ParameterError, match="tool_choice"):
        ask(smol_llama, tools=[], tool_choice={"type": "function", "function": {"name": "w"}})


def test_a_message_with_half_a_call_is_named(smol_llama: Llama) -> None:
    half = ChatMessage(tool_calls=(ToolCall("a", "w", '{"city": "Os'),))
    with pytest.raises(ParameterError, match=r"messages\[1\]: the arguments .* not JSON"):
        ask(smol_llama, messages=[*ASK, half])


def test_a_run_that_was_cut_can_be_continued(smol_llama: Llama) -> None:
    def now() -> str:
        """Tell the time."""
        return "noon"

    run = smol_llama.run_tools(ASK, [now], tool_choice="required", max_tokens=12, sampler=GREEDY)
    assert run.completion.finish_reason == "length"
    assert run.messages[-1] == {"role": "assistant", "content": ""}
    more = [*run.messages, {"role": "user", "content": "Go on."}]
    assert ask(smol_llama, 2, messages=more).text


def test_options_that_chats_do_not_have_are_named(smol_llama: Llama) -> None:
    with pytest.raises(ParameterError, match="callback: not for chats; use stream=True"):
        ask(smol_llama, callback=print)
    with pytest.raises(TypeError, match=r"create_chat_completion\(\) .*'colour'"):
        ask(smol_llama, colour=1)
    with pytest.raises(ParameterError, match="stream: not with run_tools"):
        smol_llama.run_tools(ASK, [], stream=True)
    assert ask(smol_llama, 2, stop=None).text


def test_a_callback_that_has_ended_a_request_is_not_called_again(smol_llama: Llama) -> None:
    seen = []

    def end(chunk: Any) -> bool:
        seen.append(chunk)
        return False

    answer = smol_llama.create_completion("Once upon a time", 20, callback=end)
    assert (len(seen), answer.finish_reason) == (1, "cancelled")


def test_blanks_of_an_answer_of_a_form_are_kept(smol_llama: Llama, forced: Force) -> None:
    """Only what stands between thinking and the answer is not the answer's."""
    options = {"chat_template": QWEN_3, "enable_thinking": False}
    answer = ask(smol_llama, choices=[" yes", " no"], **options)
    assert answer.parsed in (" yes", " no")
    begun = [*ASK, {"role": "assistant", "content": "yes"}]
    options = {"chat_template": QWEN_3, "continue_final_message": True}
    answer = ask(smol_llama, messages=begun, choices=["yes sir", "yes madam"], **options)
    assert answer.parsed == "yes" + answer.text
    for blanks, choices in (("\n\n", ["yes", "no"]), ("\n\n", [" yes", " no"])):
        thought = forced(smol_llama, f"<think>\nhm\n</think>{blanks}", end=False)
        answer = ask(smol_llama, choices=choices, chat_template=QWEN_3, logits_processors=[thought])
        assert answer.message.reasoning_content
        assert answer.parsed in choices


def test_a_number_that_was_cut_is_incomplete() -> None:
    schema = {"type": "integer", "minimum": 100}
    output = structured_output({"type": "json_schema", "json_schema": {"schema": schema}})
    assert output is not None
    assert output.read("12", at_end=False) == (None, None, True)
    assert output.read("123", at_end=False) == (123, None, False)
    assert output.read(json.dumps(123), at_end=True) == (123, None, False)
