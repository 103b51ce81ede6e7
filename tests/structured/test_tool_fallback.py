"""Tools for templates that have none: plain messages, grammars, and the parser of their answers."""

from __future__ import annotations

import json
import random
from collections.abc import Iterable
from typing import Any

import jsonschema
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from walks import Walker

from llama_crab import Llama, SamplerChain, _core
from llama_crab.errors import SamplerError, SchemaError
from llama_crab.params import ParameterError
from llama_crab.tools import FallbackParser, Tool, ToolFallback

TOOLS = [
    Tool("now"),
    Tool(
        "weather",
        "Tell the weather.",
        {
            "type": "object",
            "properties": {
                "place": {"type": "string", "maxLength": 20},
                "days": {"type": "integer", "minimum": 1, "maximum": 9},
                "unit": {"enum": ["celsius", "kelvin"]},
            },
            "required": ["place", "days"],
            "additionalProperties": False,
        },
    ),
    Tool(
        "note",
        "",
        {
            "type": "object",
            "properties": {
                "tags": {"type": "array", "items": {"$ref": "#/$defs/tag"}, "maxItems": 2},
                "by": {"anyOf": [{"type": "null"}, {"$ref": "#/$defs/person"}]},
            },
            "required": ["tags", "by"],
            "$defs": {
                "tag": {"type": "string", "pattern": "^[a-z]{1,5}$"},
                "person": {
                    "type": "object",
                    "properties": {"born": {"type": "string", "format": "date"}},
                    "required": ["born"],
                },
            },
        },
    ),
    Tool(
        "number",
        "",
        {"type": "object", "properties": {"x": {"type": "number"}}, "required": ["x"]},
    ),
]
BY_NAME = {tool.name: tool for tool in TOOLS}


def assemble(deltas: Iterable[Any]) -> dict[str, Any]:
    """Put deltas together as a client does."""
    message: dict[str, Any] = {"content": "", "reasoning_content": "", "tool_calls": []}
    for delta in deltas:
        if "index" in delta:
            assert delta.keys() == {"index", "id", "name", "arguments"}
            if delta["index"] == len(message["tool_calls"]):
                assert delta["id"]
                message["tool_calls"].append({"id": "", "name": "", "arguments": ""})
            assert delta["index"] == len(message["tool_calls"]) - 1
            for key in ("id", "name", "arguments"):
                message["tool_calls"][-1][key] += delta[key]
        else:
            assert delta["content"]
            message["content"] += delta["content"]
    return message


def parsed(*pieces: str) -> tuple[str, list[tuple[str, str]], bool]:
    """Return content, calls and whether a call is cut, of an answer that comes in pieces."""
    parser = FallbackParser()
    deltas = [delta for piece in pieces for delta in parser.push(piece)]
    deltas += parser.finish()
    message = assemble(deltas)
    assert message == parser.message
    ids = [call["id"] for call in message["tool_calls"]]
    assert len(set(ids)) == len(ids)
    calls = [(call["name"], call["arguments"]) for call in message["tool_calls"]]
    return message["content"], calls, parser.incomplete


def written(name: str, arguments: str) -> str:
    return f'<tool_call>\n{{"name": "{name}", "arguments": {arguments}}}\n</tool_call>'


HARD = '{"a": "</tool_call> \\" } \\\\", "b": [{"c": "<tool_call>"}, "ü🦀"], "d": {}}'
ANSWERS: list[tuple[str, str, list[tuple[str, str]], bool]] = [
    ("", "", [], False),
    (" Plain text.\n", " Plain text.\n", [], False),
    ("a < b <tool_cal", "a < b <tool_cal", [], False),
    ("  \n ", "  \n ", [], False),
    (written("f", "{}"), "", [("f", "{}")], False),
    (written("f", HARD) + "\n", "", [("f", HARD)], False),
    ("Look: \n" + written("f", "{}"), "Look:", [("f", "{}")], False),
    (
        "One\n" + written("f", "{}") + "\n" + written("g", HARD) + "\n\nand\n" + written("h", "{}"),
        "One\n\nand",
        [("f", "{}"), ("g", HARD), ("h", "{}")],
        False,
    ),
    (written("f", "{}") + " done", " done", [("f", "{}")], False),
    (
        '<tool_call>{"name":"f","arguments":{"a":1}}</tool_call>',
        "",
        [("f", '{"a":1}')],
        False,
    ),
    # Without a proper end the call counts all the same.
    ('<tool_call>{"name": "f", "arguments": {}}', "", [("f", "{}")], False),
    ('<tool_call>{"name": "f", "arguments": {}} </tool', "", [("f", "{}")], False),
    ('<tool_call>{"name": "f", "arguments": {}}</tool no', "</tool no", [("f", "{}")], False),
    ('<tool_call>{"name": "f", "arguments": {}' + written("g", "{}"), "", None, False),  # type: ignore[list-item]
    # Cut.
    ("Look <tool_call>", "Look", [], True),
    ('Look <tool_call>\n{"name": "weath', "Look", [], True),
    ('<tool_call>\n{"name": "weather", "arguments": ', "", [], True),
    ('<tool_call>\n{"name": "f", "arguments": {"a": "x\\', "", [("f", '{"a": "x')], True),
    ('<tool_call>\n{"name": "f", "arguments": {"a": [1, ', "", [("f", '{"a": [1, ')], True),
    # No calls.
    ("The mark \n<tool_call> is text.", "The mark \n<tool_call> is text.", [], False),
    ("<tool_call>[1]</tool_call>", "<tool_call>[1]</tool_call>", [], False),
    ('<tool_call>{"name": 1}', '<tool_call>{"name": 1}', [], False),
    ('<tool_call>{"name": "\\x"}', '<tool_call>{"name": "\\x"}', [], False),
    ('<tool_call>{"name": "f"}', '<tool_call>{"name": "f"}', [], False),
    ("<tool_call> <tool_call>" + " " * 1100, "<tool_call> <tool_call>" + " " * 1100, [], False),
    ("<tool_call> x " + written("f", "{}"), "<tool_call> x", [("f", "{}")], False),
    (written("f" * 2000, "{}"), written("f" * 2000, "{}"), [], False),
]


@pytest.mark.parametrize("case", range(len(ANSWERS)))
def test_the_parse_of_an_answer(case: int) -> None:
    text, content, calls, incomplete = ANSWERS[case]
    if calls is None:
        calls = [("f", "{}"), ("g", "{}")]
    assert parsed(text) == (content, calls, incomplete)


@pytest.mark.parametrize("case", range(len(ANSWERS)))
def test_an_answer_may_be_cut_anywhere(case: int) -> None:
    text = ANSWERS[case][0]
    whole = parsed(text)
    assert parsed(*text) == whole
    rng = random.Random(case)
    for at in range(0, len(text) + 1, max(1, len(text) // 300)):
        assert parsed(text[:at], text[at:]) == whole
        other = rng.randrange(len(text) + 1)
        first, second = min(at, other), max(at, other)
        assert parsed(text[:first], text[first:second], text[second:]) == whole


PARTS = st.sampled_from(
    [
        *("<tool_call>", "</tool_call>", '{"name": "f", "arguments": ', '{"name": "', '"', "\\"),
        *("{", "}", "[", "]", "\n", " ", "<", "text", '": ', '"a": 1', "}}", "<tool_", "ü"),
        *(written("f", '{"a": "}"}'), '{"name": "f", "arguments": {'),
    ]
)


@settings(max_examples=300, deadline=None)
@given(st.lists(PARTS, max_size=12), st.lists(st.integers(0, 200), max_size=8))
def test_any_text_may_be_cut_anywhere(parts: list[str], cuts: list[int]) -> None:
    text = "".join(parts)
    at = sorted({min(cut, len(text)) for cut in cuts})
    pieces = [text[i:j] for i, j in zip([0, *at], [*at, len(text)], strict=True)]
    whole = parsed(text)
    assert parsed(*pieces) == whole
    assert parsed(*text) == whole


def test_arguments_are_passed_on_while_they_grow() -> None:
    parser = FallbackParser()
    assert parser.push("I look. ") == [{"content": "I look."}]
    assert parser.push('<tool_call>\n{"name": "f", "argum') == []
    (first,) = parser.push('ents": {"a')
    assert (first["index"], first["name"], first["arguments"]) == (0, "f", '{"a')
    assert first["id"].startswith("call_")
    assert parser.push('": "b') == [{"index": 0, "id": "", "name": "", "arguments": '": "b'}]
    assert parser.incomplete
    assert parser.push('"}}\n</tool_call>')[0]["arguments"] == '"}'
    assert not parser.incomplete
    assert parser.finish() == []


def call(name: str, arguments: Any, id_: str = "c0") -> dict[str, Any]:
    return {"id": id_, "type": "function", "function": {"name": name, "arguments": arguments}}


HISTORY: list[dict[str, Any]] = [
    {"role": "system", "content": "Be kind."},
    {"role": "user", "content": "Weather?"},
    {
        "role": "assistant",
        "content": "I look.",
        "tool_calls": [call("weather", HARD), call("now", {}, "c1")],
    },
    {"role": "tool", "tool_call_id": "c0", "content": '{"sun": true}'},
    {"role": "tool", "tool_call_id": "c1", "content": "noon </tool_response>"},
    {"role": "user", "content": "And now?"},
    {"role": "assistant", "content": None, "tool_calls": [call("now", "")]},
    {"role": "tool", "tool_call_id": "c0", "content": [{"type": "text", "text": "1"}]},
]


def test_a_history_becomes_plain_messages() -> None:
    fallback = ToolFallback(TOOLS)
    found = fallback.messages(HISTORY)
    assert [message["role"] for message in found] == [
        *("system", "user", "assistant", "user", "assistant", "user")
    ]
    assert all(message.keys() == {"role", "content"} for message in found)
    assert found[2]["content"] == "I look.\n" + written("weather", HARD) + "\n" + written(
        "now", "{}"
    )
    assert parsed(found[2]["content"])[:2] == ("I look.", [("weather", HARD), ("now", "{}")])
    assert found[3]["content"] == (
        '<tool_response>\n{"name": "weather", "content": {"sun": true}}\n</tool_response>\n'
        '<tool_response>\n{"name": "now", "content": "noon <\\/tool_response>"}\n</tool_response>\n'
        "And now?"
    )
    assert found[4]["content"] == written("now", "{}")
    assert found[5]["content"] == (
        '<tool_response>\n{"name": "now", "content": 1}\n</tool_response>'
    )
    assert HISTORY[2]["content"] == "I look."
    assert fallback.messages(found) == found


def test_parts_of_a_message_stay_parts() -> None:
    image = {"type": "image_url", "image_url": {"url": "x"}}
    messages = [HISTORY[2], HISTORY[3], {"role": "user", "content": [image]}]
    last = ToolFallback(TOOLS).messages(messages)[-1]
    assert last["content"][0]["type"] == "text"
    assert last["content"][1] == image


def test_the_system_text_tells_the_tools() -> None:
    fallback = ToolFallback(TOOLS, "required", parallel=True)
    for tool in TOOLS:
        assert json.dumps(tool.to_dict()) in fallback.system_text
    for choice in ("auto", "none", "now"):
        assert ToolFallback(TOOLS, choice, parallel=True).system_text == fallback.system_text
    with_system = fallback.with_system_text(HISTORY)
    assert with_system[0]["content"] == "Be kind.\n\n" + fallback.system_text
    without = fallback.with_system_text(HISTORY[1:])
    assert without[0] == {"role": "system", "content": fallback.system_text}
    assert without[1:] == with_system[1:]


def test_without_tools_or_choice_there_is_no_grammar() -> None:
    for fallback in (ToolFallback(TOOLS, "none"), ToolFallback([]), ToolFallback([], "none")):
        assert fallback.gbnf == ""
        assert bool(fallback.system_text) is bool(fallback.tools)
        assert (fallback.lazy, fallback.trigger) == (False, None)
        chain = SamplerChain.chat()
        assert fallback.constrain(chain) is chain
        assert (fallback.with_system_text(HISTORY)[0] == HISTORY[0]) is not bool(fallback.tools)
    with pytest.raises(ParameterError, match="tool_choice"):
        ToolFallback(TOOLS, "other")


@pytest.mark.parametrize("calls", [[{}], [{"function": {}}], "x", [1]])
def test_calls_of_the_past_are_checked(calls: Any) -> None:
    messages = [{"role": "user", "content": ""}, {"role": "assistant", "tool_calls": calls}]
    with pytest.raises(ParameterError, match=r"messages\[1\]\.tool_calls"):
        ToolFallback(TOOLS).messages(messages)


def test_a_schema_that_cannot_be_guaranteed_names_its_tool() -> None:
    unique = {"properties": {"a": {"type": "array", "uniqueItems": True}}}
    with pytest.raises(SchemaError, match="tool 'odd': 'uniqueItems' at #/properties/a") as caught:
        ToolFallback([*TOOLS, Tool("odd", "", unique)])
    assert (caught.value.keyword, caught.value.path) == ("uniqueItems", "#/properties/a")
    impossible = {"properties": {"a": False}, "required": ["a"]}
    with pytest.raises(SchemaError, match=r"tool 'odd': .*no document"):
        ToolFallback([Tool("odd", "", impossible)])
    # Only what may be called has to have a grammar.
    assert ToolFallback([*TOOLS, Tool("odd", "", unique)], "now").gbnf


def checked(text: str, names: Iterable[str]) -> int:
    """Check that an answer is calls and nothing else, and return how many."""
    content, calls, incomplete = parsed(text)
    assert content == ""
    assert calls
    assert not incomplete
    for name, arguments in calls:
        assert name in names
        jsonschema.validate(json.loads(arguments), BY_NAME[name].parameters)
    return len(calls)


@pytest.mark.parametrize("parallel", [False, True])
@pytest.mark.parametrize("name", [None, *BY_NAME])
def test_walks_through_the_grammar(walker: Walker, name: str | None, parallel: bool) -> None:
    fallback = ToolFallback(TOOLS, name or "required", parallel)
    assert (fallback.lazy, fallback.trigger) == (False, None)
    found = [walker.text(fallback.gbnf, seed) for seed in range(12)]
    counts = [checked(text, BY_NAME if name is None else [name]) for text in found]
    assert max(counts) == 1 or parallel
    assert all(walker.accepts(fallback.gbnf, text) for text in found)
    assert not walker.accepts(fallback.gbnf, written("other", "{}"))
    assert not walker.accepts(fallback.gbnf, written("weather", '{"place": "x"}'))
    two = "\n".join([written("now", "{}")] * 2)
    assert walker.accepts(fallback.gbnf, two) is (parallel and name in (None, "now"))
    assert not walker.accepts(fallback.gbnf, written("now", "{}") + " and more")


def test_a_tool_without_parameters_gets_none(walker: Walker) -> None:
    for parameters in ({}, {"type": "object", "properties": {}}, {"properties": {}, "title": "x"}):
        gbnf = ToolFallback([Tool("now", "", parameters)], "required").gbnf
        assert {walker.text(gbnf, seed) for seed in range(4)} == {written("now", "{}")}
    any_object = Tool("now", "", {"properties": {}, "additionalProperties": True})
    gbnf = ToolFallback([any_object], "required").gbnf
    assert walker.accepts(gbnf, written("now", '{"a": 1}'))


def ids_of(model: _core.Model, text: str) -> list[int]:
    return model.vocab.tokenize(text, False, False)


@pytest.mark.parametrize(
    ("text", "begins"),
    [
        ("Free text <tool_call", False),
        ("Free text <tool_call>", True),
        ("Free text <tool_call>\n", True),
        ('Free text <tool_call>{"', True),
        ('Free text <tool_call>\n{"', True),
    ],
)
def test_a_lazy_grammar_begins_with_the_mark(smol: _core.Model, text: str, begins: bool) -> None:
    sampler: Any = ToolFallback(TOOLS).constrain(SamplerChain.benchmark()).compile(smol, 1)
    for token in ids_of(smol, text):
        sampler.accept(token)
    assert is_free(sampler, smol) is not begins


def test_a_mark_that_goes_on_as_no_call_is_text(smol: _core.Model) -> None:
    vocab = smol.vocab
    pieces = [(token, vocab.piece(token, True)) for token in range(vocab.n_tokens)]
    past = [token for token, piece in pieces if piece in (b"></", b">(", b"><", b">.", b">,")]
    assert past
    for token in past:
        sampler: Any = ToolFallback(TOOLS).constrain(SamplerChain.benchmark()).compile(smol, 1)
        for each in [*ids_of(smol, "Write <tool_call"), token, *ids_of(smol, "x and ")]:
            sampler.accept(each)
        assert is_free(sampler, smol)
        for each in ids_of(smol, "<tool_call>"):
            sampler.accept(each)
        assert not is_free(sampler, smol)


def is_free(sampler: Any, model: _core.Model) -> bool:
    """Tell whether text may follow that no call has."""
    try:
        sampler.clone().accept(ids_of(model, "x")[0])
    except SamplerError:
        return False
    return True


SHORT = "<|im_start|>user\nHello<|im_end|>\n<|im_start|>assistant\n"


def prompt_of(fallback: ToolFallback, question: str) -> str:
    messages = fallback.with_system_text([{"role": "user", "content": question}])
    turns = [f"<|im_start|>{m['role']}\n{m['content']}<|im_end|>\n" for m in messages]
    return "".join(turns) + "<|im_start|>assistant\n"


def test_a_small_model_answers_with_the_right_call(smol_llama: Llama) -> None:
    fallback = ToolFallback(TOOLS[:2], "required")
    result = smol_llama.create_completion(
        prompt_of(fallback, "How is the weather in Oslo in the next 3 days?"),
        100,
        sampler=fallback.constrain(SamplerChain.benchmark()),
    )
    assert checked(result.text, ["weather"]) == 1
    arguments = json.loads(parsed(result.text)[1][0][1])
    assert (arguments["place"], arguments["days"]) == ("Oslo", 3)


@pytest.mark.parametrize("choice", ["required", *BY_NAME])
def test_required_calls_at_any_temperature(smol_llama: Llama, choice: str) -> None:
    names = BY_NAME if choice == "required" else [choice]
    fallback = ToolFallback(TOOLS, choice)
    for seed, temp in enumerate((0.7, 2.0, 5.0)):
        result = smol_llama.create_completion(
            SHORT, 200, sampler=fallback.constrain(SamplerChain().temp(temp)), seed=seed
        )
        assert result.choices[0].finish_reason == "stop"
        assert checked(result.text, names) == 1


def test_calls_that_are_cut(smol_llama: Llama) -> None:
    fallback = ToolFallback(TOOLS, "weather")
    chain = fallback.constrain(SamplerChain.benchmark())
    result = smol_llama.create_completion(SHORT, 18, sampler=chain)
    content, calls, incomplete = parsed(result.text)
    assert (content, incomplete) == ("", True)
    assert [name for name, _ in calls] in ([], ["weather"])


def test_a_real_model_goes_on_behind_the_mark(smol_llama: Llama) -> None:
    fallback = ToolFallback(TOOLS[:2])
    # The model is too small to begin a call by itself.
    mark = ids_of(smol_llama.model, "Well. <tool_call>")
    n_written = 0

    def begin(ids: Any, row: Any) -> None:
        nonlocal n_written
        if n_written < len(mark):
            row[:] = -1e9
            row[mark[n_written]] = 0.0
        n_written += 1

    for seed in range(2):
        n_written = 0
        result = smol_llama.create_completion(
            SHORT,
            200,
            sampler=fallback.constrain(SamplerChain().temp(1.5)),
            seed=seed,
            logits_processors=[begin],
        )
        content, calls, incomplete = parsed(result.text)
        assert (content, incomplete) == ("Well.", False)
        assert checked(result.text.removeprefix("Well."), ["now", "weather"]) == len(calls) == 1


def test_a_free_answer_has_no_call(smol_llama: Llama) -> None:
    chain = ToolFallback(TOOLS[:2]).constrain(SamplerChain.benchmark())
    result = smol_llama.create_completion(SHORT, 8, sampler=chain)
    plain = smol_llama.create_completion(SHORT, 8, sampler=SamplerChain.benchmark())
    assert result.text == plain.text
    assert parsed(result.text) == (result.text, [], False)
