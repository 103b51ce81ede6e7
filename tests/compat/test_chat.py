"""Chat completions through llama-cpp-python's face."""

from __future__ import annotations

import json
import sys
import types
from typing import Any

import pytest
from golden import CALL_DELTA, CHAT_LOGPROB, CHAT_TOP_LOGPROB, check_chat, check_chat_chunks

from llama_crab import ParameterError, SamplerChain
from llama_crab.compat.llama_cpp import Llama, NotSupportedError, llama_chat_format
from llama_crab.compat.llama_cpp.llama_chat_format import (
    FORMATS,
    ChatFormatterResponse,
    Jinja2ChatFormatter,
    register_chat_format,
)

QUESTION = [{"role": "user", "content": "What is the capital of France?"}]
GREEDY = {"temperature": 0, "max_tokens": 12}
PLACE = {
    "type": "object",
    "properties": {"city": {"type": "string", "maxLength": 12}},
    "required": ["city"],
    "additionalProperties": False,
}
FUNCTION = {"name": "show", "description": "Show a city.", "parameters": PLACE}
TOOLS = [{"type": "function", "function": FUNCTION}]
NAMED = {"type": "function", "function": {"name": "show"}}


def test_a_chat_has_the_same_keys_and_our_text(smol_cpp: Llama) -> None:
    answer = smol_cpp.create_chat_completion(QUESTION, **GREEDY)
    message = check_chat(answer)
    own = smol_cpp.crab.create_chat_completion(QUESTION, 12, sampler=SamplerChain().greedy())
    assert message["content"] == own.text
    assert answer["choices"][0]["finish_reason"] in ("stop", "length")
    chunks = list(smol_cpp.create_chat_completion(QUESTION, stream=True, **GREEDY))
    assert check_chat_chunks(chunks) == message["content"]
    assert chunks[0]["choices"][0]["delta"] == {"role": "assistant"}
    assert chunks[-1]["choices"][0]["delta"] == {}
    json.dumps([answer, chunks])


def test_logprobs_of_a_chat(smol_cpp: Llama) -> None:
    for options in ({"logprobs": True, "top_logprobs": 2}, {"logprobs": 2}):
        answer = smol_cpp.create_chat_completion(QUESTION, **GREEDY, **options)
        found = answer["choices"][0]["logprobs"]
        assert set(found) == {"content", "refusal"}
        for entry in found["content"]:
            assert set(entry) == CHAT_LOGPROB
            assert 2 <= len(entry["top_logprobs"]) <= 3
            assert {frozenset(each) for each in entry["top_logprobs"]} == {
                frozenset(CHAT_TOP_LOGPROB)
            }
    answer = smol_cpp.create_chat_completion(QUESTION, **GREEDY, logprobs=None)
    assert answer["choices"][0]["logprobs"] is None


def test_a_named_tool_is_called(smol_cpp: Llama) -> None:
    options = {"temperature": 0, "max_tokens": 64}
    for wanted in (
        {"tools": TOOLS, "tool_choice": NAMED},
        {"tools": TOOLS, "tool_choice": TOOLS[0]},
        {"functions": [FUNCTION], "function_call": {"name": "show"}},
    ):
        answer = smol_cpp.create_chat_completion(QUESTION, **wanted, **options)
        message = check_chat(answer)
        assert answer["choices"][0]["finish_reason"] == "tool_calls"
        (call,) = message["tool_calls"]
        assert call["function"] == message["function_call"]
        assert list(json.loads(call["function"]["arguments"])) == ["city"]
    chunks = list(
        smol_cpp.create_chat_completion(
            QUESTION, tools=TOOLS, tool_choice=NAMED, stream=True, **options
        )
    )
    check_chat_chunks(chunks)
    deltas = [chunk["choices"][0]["delta"] for chunk in chunks]
    assert all(set(delta) == CALL_DELTA for delta in deltas)
    calls = [delta["tool_calls"][0] for delta in deltas if delta["tool_calls"]]
    names = [each["function"]["name"] for each in calls if each["function"]["name"]]
    assert names == ["show"]
    arguments = "".join(each["function"]["arguments"] for each in calls)
    assert arguments == call["function"]["arguments"]
    assert chunks[-1]["choices"][0]["finish_reason"] == "tool_calls"
    with pytest.raises(ParameterError, match="no tool 'other'"):
        smol_cpp.create_chat_completion(
            QUESTION, tools=TOOLS, tool_choice={"function": {"name": "other"}}
        )


def test_calls_of_the_past_in_both_forms(smol_cpp: Llama) -> None:
    call = {"name": "show", "arguments": '{"city": "Paris"}'}
    older = [
        *QUESTION,
        {"role": "assistant", "content": None, "function_call": call},
        {"role": "function", "name": "show", "content": "shown"},
    ]
    newer = [
        *QUESTION,
        {
            "role": "assistant",
            "content": None,
            "tool_calls": [{"id": "call_show", "type": "function", "function": call}],
        },
        {"role": "tool", "tool_call_id": "call_show", "name": "show", "content": "shown"},
    ]
    texts = [
        check_chat(smol_cpp.create_chat_completion(messages, **GREEDY))["content"]
        for messages in (older, newer)
    ]
    assert texts[0] == texts[1]


def test_response_formats(smol_cpp: Llama) -> None:
    def parsed(response_format: dict[str, Any]) -> Any:
        answer = smol_cpp.create_chat_completion(
            QUESTION, response_format=response_format, temperature=0, max_tokens=100
        )
        return json.loads(check_chat(answer)["content"])

    assert list(parsed({"type": "json_object", "schema": PLACE})) == ["city"]
    schema = {"type": "json_schema", "json_schema": {"name": "place", "schema": PLACE}}
    assert list(parsed(schema)) == ["city"]
    answer = smol_cpp.create_chat_completion(QUESTION, response_format={"type": "text"}, **GREEDY)
    free = smol_cpp.create_chat_completion(QUESTION, **GREEDY)
    assert check_chat(answer) == check_chat(free)


def test_named_formats_render(smol_cpp: Llama, monkeypatch: pytest.MonkeyPatch) -> None:
    messages = [
        {"role": "system", "content": "S."},
        {"role": "user", "content": "U1"},
        {"role": "assistant", "content": "A1"},
        {"role": "user", "content": "U2"},
    ]
    prompts = {name: smol_cpp.crab.format_chat(messages, chat_template=name) for name in FORMATS}
    for prompt in prompts.values():
        places = [prompt.index(text) for text in ("S.", "U1", "A1", "U2")]
        assert places == sorted(places)
        assert prompt.count("S.") == 1
    assert prompts["chatml"].endswith("<|im_start|>user\nU2<|im_end|>\n<|im_start|>assistant\n")
    assert "[INST] <<SYS>>\nS.\n<</SYS>>\n\nU1 [/INST] A1 " in prompts["llama-2"]
    assert (
        "<start_of_turn>user\nS.\n\nU1<end_of_turn>\n<start_of_turn>model\nA1" in prompts["gemma"]
    )
    monkeypatch.setattr(smol_cpp, "chat_format", "chatml")
    own = check_chat(smol_cpp.create_chat_completion(messages, **GREEDY))
    monkeypatch.setattr(smol_cpp, "chat_format", "chat_template.default")
    assert own == check_chat(smol_cpp.create_chat_completion(messages, **GREEDY))
    monkeypatch.setattr(smol_cpp, "chat_format", "functionary")
    with pytest.raises(NotSupportedError, match="functionary"):
        smol_cpp.create_chat_completion(messages)


def test_formats_and_handlers_of_ones_own(smol_cpp: Llama, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(llama_chat_format, "_handlers", {})

    @register_chat_format("plain")
    def plain(messages: Any, **given: Any) -> ChatFormatterResponse:
        assert set(given) == {"functions", "function_call", "tools", "tool_choice"}
        return ChatFormatterResponse("The capital of France is", stop=".")

    monkeypatch.setattr(smol_cpp, "chat_format", "plain")
    answer = smol_cpp.create_chat_completion(QUESTION, **GREEDY)
    assert check_chat(answer)["content"] == " Paris"
    chunks = list(smol_cpp.create_chat_completion(QUESTION, stream=True, **GREEDY))
    assert check_chat_chunks(chunks) == " Paris"
    handler = Jinja2ChatFormatter("The capital of {{ messages[0].content }} is").to_chat_handler()
    monkeypatch.setattr(smol_cpp, "chat_handler", handler)
    answer = smol_cpp.create_chat_completion([{"role": "user", "content": "France"}], **GREEDY)
    assert check_chat(answer)["content"].strip().startswith("Paris")


def test_openai_objects(smol_cpp: Llama, monkeypatch: pytest.MonkeyPatch) -> None:
    chat = types.ModuleType("openai.types.chat")
    chat.ChatCompletion = type("ChatCompletion", (types.SimpleNamespace,), {})
    chat.ChatCompletionChunk = type("ChatCompletionChunk", (types.SimpleNamespace,), {})
    monkeypatch.setitem(sys.modules, "openai", types.ModuleType("openai"))
    monkeypatch.setitem(sys.modules, "openai.types", types.ModuleType("openai.types"))
    monkeypatch.setitem(sys.modules, "openai.types.chat", chat)
    answer = smol_cpp.create_chat_completion_openai_v1(QUESTION, **GREEDY)
    assert isinstance(answer, chat.ChatCompletion)
    check_chat(vars(answer))
    chunks = list(smol_cpp.create_chat_completion_openai_v1(QUESTION, stream=True, **GREEDY))
    assert {type(chunk) for chunk in chunks} == {chat.ChatCompletionChunk}
    check_chat_chunks([vars(chunk) for chunk in chunks])
