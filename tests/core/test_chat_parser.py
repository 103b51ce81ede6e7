"""The incremental parser against llama-common's parse of the whole output, cut at every place."""

from __future__ import annotations

import json
import random
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from llama_crab import _core, errors

TEMPLATES = Path(__file__).resolve().parents[2] / "third_party/llama.cpp/models/templates"
NAMES = sorted(path.stem for path in TEMPLATES.glob("*.jinja"))
NOW = 1_700_000_000


def tool(name: str, **properties: str) -> dict[str, Any]:
    return {
        "type": "function",
        "function": {
            "name": name,
            "description": f"Do {name}.",
            "parameters": {
                "type": "object",
                "properties": {
                    key: {
                        "type": kind,
                        **({"items": {"type": "string"}} if kind == "array" else {}),
                    }
                    for key, kind in properties.items()
                },
                "required": list(properties),
            },
        },
    }


# One name begins with another on purpose.
TOOLS = [
    tool("get", key="string"),
    tool("get_weather", place="string", days="integer"),
    tool("note", text="string", tags="array", meta="object", done="boolean", rating="number"),
]
NOTE = {
    "text": 'Zürich "quoted" \\ slash\nnew line 🦀 <b> {x} [y]',
    "tags": ["a", "b c"],
    "meta": {"k": {"n": None, "m": [1, 2]}},
    "done": True,
    "rating": -1.5,
}
CALLS: dict[str, list[tuple[str, dict[str, Any]]]] = {
    "weather": [("get_weather", {"place": "Bern", "days": 2})],
    "short_name": [("get", {"key": 'value with <tags> & "quotes"'})],
    "note": [("note", NOTE)],
    "two": [("get_weather", {"place": "Bern", "days": 2}), ("get", {"key": "k"})],
}
TEXTS = [
    "Plain.",
    'Ünï 🦀 text\n\nwith < and > and {"json": [1]} and ```code```',
    " lead and trail \n",
]


@pytest.fixture(scope="module")
def formats(smol: _core.Model) -> dict[str, _core.ChatTemplates]:
    """Return all templates of the llama.cpp tree, on SmolLM2's vocabulary."""
    return {
        name: _core.ChatTemplates(smol, (TEMPLATES / f"{name}.jinja").read_text(encoding="utf-8"))
        for name in NAMES
    }


def render(templates: _core.ChatTemplates, messages: list[Any], **options: Any) -> _core.ChatPrompt:
    options.setdefault("tools", json.dumps(TOOLS))
    options.setdefault("parallel_tool_calls", True)
    return templates.render(json.dumps(messages), now=NOW, **options)


def written_by(templates: _core.ChatTemplates, answer: dict[str, Any]) -> str | None:
    """Return an answer as the template writes it into a history: the model's own format.

    None where the history does not begin with the prompt for the answer, or is refused.
    """

    def rest(message: dict[str, Any]) -> str | None:
        question = [{"role": "user", "content": "Go"}]
        try:
            prompt = render(templates, question).text
            whole = render(templates, [*question, message], add_generation_prompt=False).text
        except errors.ChatTemplateError:
            return None
        return whole[len(prompt) :] if whole.startswith(prompt) else None

    output = rest(answer)
    short = rest({"role": "assistant", "content": "Short."})
    if output is None or short is None or "Short." not in short:
        return output
    # What ends a message is a stop token, which a parser does not get to see.
    return output.removesuffix(short.partition("Short.")[2])


def answers() -> Iterable[tuple[str, dict[str, Any]]]:
    for i, text in enumerate(TEXTS):
        yield f"text{i}", {"role": "assistant", "content": text}
        yield (
            f"thought{i}",
            {"role": "assistant", "content": text, "reasoning_content": f"Because {text}."},
        )
    for name, calls in CALLS.items():
        message = {
            "role": "assistant",
            "content": "",
            "tool_calls": [
                {
                    "type": "function",
                    "id": f"call{i:05}",
                    "function": {"name": function, "arguments": arguments},
                }
                for i, (function, arguments) in enumerate(calls)
            ],
        }
        yield name, message
        yield f"{name}_thought", {**message, "reasoning_content": "I need a tool."}


ANSWERS = dict(answers())


def assemble(deltas: Iterable[Any]) -> dict[str, Any]:
    """Put deltas together as a client does."""
    message: dict[str, Any] = {"content": "", "reasoning_content": "", "tool_calls": []}
    for delta in deltas:
        if "index" in delta:
            if delta["index"] == len(message["tool_calls"]):
                message["tool_calls"].append({"id": "", "name": "", "arguments": ""})
            call = message["tool_calls"][delta["index"]]
            for key in ("id", "name", "arguments"):
                call[key] += delta[key]
        else:
            for key, value in delta.items():
                message[key] += value
    return message


def stream(prompt: _core.ChatPrompt, pieces: Iterable[bytes]) -> dict[str, Any]:
    parser = _core.ChatParser(prompt)
    deltas: list[Any] = []
    for piece in pieces:
        deltas += parser.push(piece)
    deltas += parser.finish()
    message = assemble(deltas)
    assert message == parser.message
    return message


def whole(prompt: _core.ChatPrompt, output: bytes) -> dict[str, Any] | None:
    try:
        return dict(prompt.parse(output))
    except errors.ChatParseError:
        return None


def cuts(output: bytes, n: int) -> list[list[bytes]]:
    """Return the output byte by byte, whole, and cut in two at up to `n` places."""
    step = max(1, len(output) // n)
    halves = [[output[:i], output[i:]] for i in range(0, len(output) + 1, step)]
    return [[output[i : i + 1] for i in range(len(output))], [output], *halves]


def check(prompt: _core.ChatPrompt, output: bytes, n: int = 400) -> dict[str, Any] | None:
    """Compare the stream with the whole parse at every cut; return the message."""
    expected = whole(prompt, output)
    for pieces in cuts(output, n):
        try:
            assert stream(prompt, pieces) == expected
        except errors.ChatParseError:
            assert expected is None or lost(expected, output)
    return expected


def lost(message: dict[str, Any], output: bytes) -> bool:
    """Tell whether the whole parse dropped a call that breaks the format without saying so.

    A stream has told of the beginning of that call by then.
    """
    return b"note" in output and not any(c["name"] == "note" for c in message["tool_calls"])


def calls_of(message: dict[str, Any]) -> list[tuple[str, Any]]:
    return [(call["name"], json.loads(call["arguments"])) for call in message["tool_calls"]]


@pytest.mark.parametrize("name", NAMES)
def test_a_stream_equals_the_whole_parse_at_every_cut(
    formats: dict[str, _core.ChatTemplates], name: str
) -> None:
    """Over all formats, with the answers that their own templates write."""
    templates = formats[name]
    prompt = render(templates, [{"role": "user", "content": "Go"}])
    for key, answer in ANSWERS.items():
        output = written_by(templates, answer)
        if output is not None:
            check(prompt, output.encode(), n=400 if key in ("two", "thought1") else 40)


# Formats whose templates write calls so that llama-common reads them back, value by value.
READ_BACK = [
    "Kimi-K2-Instruct",
    "Kimi-K2-Thinking",
    "Kimi-K3",
    "GLM-4.6",
    "MiMo-VL",
    "NousResearch-Hermes-2-Pro-Llama-3-8B-tool_use",
    "Qwen-Qwen2.5-7B-Instruct",
    "Qwen-Qwen3-0.6B",
    "mistralai-Ministral-3-14B-Reasoning-2512",
    "mistralai-Mistral-Nemo-Instruct-2407",
    "moonshotai-Kimi-K2",
    "muse-glimmer",
    "unsloth-mistral-Devstral-Small-2507",
]


@pytest.mark.parametrize("name", READ_BACK)
def test_calls_come_back_as_the_template_wrote_them(
    formats: dict[str, _core.ChatTemplates], name: str
) -> None:
    templates = formats[name]
    prompt = render(templates, [{"role": "user", "content": "Go"}])
    for key, calls in CALLS.items():
        output = written_by(templates, ANSWERS[key])
        assert output is not None
        message = stream(prompt, [output.encode()])
        assert calls_of(message) == calls
    output = written_by(templates, ANSWERS["text1"])
    assert output is not None
    assert stream(prompt, [output.encode()])["content"].strip() == TEXTS[1]


# Outputs as models write them: what comes before a call, between calls, and after thinking.
OUTPUTS: dict[str, tuple[str, str, dict[str, Any]]] = {
    "hermes": (
        "Qwen-Qwen2.5-7B-Instruct",
        'Let me look.\n<tool_call>\n{"name": "get_weather", "arguments": {"place": "Bern", "days":'
        ' 3}}\n</tool_call>\n<tool_call>\n{"name": "get", "arguments": {"key": "ü\\n"}}\n'
        "</tool_call>",
        {
            "content": "Let me look.\n",
            "reasoning": "",
            "calls": [("get_weather", {"place": "Bern", "days": 3}), ("get", {"key": "ü\n"})],
        },
    ),
    "qwen3": (
        "Qwen-Qwen3-0.6B",
        "<think>\nEasy < hard.\n</think>\n\n4 is <b>it</b>.",
        {"content": "4 is <b>it</b>.", "reasoning": "Easy < hard.\n", "calls": []},
    ),
    "qwen3_coder": (
        "Qwen3-Coder",
        '<tool_call>\n<function=get_weather>\n<parameter=place>\nSankt "Gallen"\n</parameter>\n'
        "<parameter=days>\n12\n</parameter>\n</function>\n</tool_call>",
        {
            "content": "",
            "reasoning": "",
            "calls": [("get_weather", {"place": 'Sankt "Gallen"', "days": 12})],
        },
    ),
    "gpt_oss": (
        "openai-gpt-oss-120b",
        "<|channel|>analysis<|message|>Need weather.<|end|><|start|>assistant<|channel|>commentary "
        'to=functions.get_weather <|constrain|>json<|message|>{"place": "Bern", "days": 1}',
        {
            "content": "",
            "reasoning": "Need weather.",
            "calls": [("get_weather", {"place": "Bern", "days": 1})],
        },
    ),
    "mistral": (
        "mistralai-Mistral-Nemo-Instruct-2407",
        '[TOOL_CALLS][{"name": "get", "arguments": {"key": "a]b"}, "id": "123456789"}]',
        {"content": "", "reasoning": "", "calls": [("get", {"key": "a]b"})]},
    ),
    "llama": (
        "meta-llama-Llama-3.1-8B-Instruct",
        '{"name": "get_weather", "parameters": {"place": "Bern", "days": 2}}',
        {
            "content": "",
            "reasoning": "",
            "calls": [("get_weather", {"place": "Bern", "days": 2})],
        },
    ),
    "gemma": (
        "google-gemma-4-31B-it",
        '<|tool_call>call:note{text:<|"|>{"a"}, b<|"|>,tags:[<|"|>x<|"|>,2],meta:{k:{n:true}},'
        "done:false,rating:0.5}<tool_call|>",
        {
            "content": "",
            "reasoning": "",
            "calls": [
                (
                    "note",
                    {
                        "text": '{"a"}, b',
                        "tags": ["x", 2],
                        "meta": {"k": {"n": True}},
                        "done": False,
                        "rating": 0.5,
                    },
                )
            ],
        },
    ),
    "glm": (
        "GLM-4.6",
        "\n<think>Hm.</think>\n<tool_call>get_weather\n<arg_key>place</arg_key>\n<arg_value>Bern"
        "</arg_value>\n<arg_key>days</arg_key>\n<arg_value>4</arg_value>\n</tool_call>",
        {
            "content": "",
            "reasoning": "Hm.",
            "calls": [("get_weather", {"place": "Bern", "days": 4})],
        },
    ),
}


@pytest.mark.parametrize("key", OUTPUTS)
def test_outputs_as_models_write_them(formats: dict[str, _core.ChatTemplates], key: str) -> None:
    """Each prefix of an output, as a cancelled answer leaves it, is parsed as the whole is."""
    name, output, expected = OUTPUTS[key]
    prompt = render(formats[name], [{"role": "user", "content": "Go"}])
    data = output.encode()
    message = check(prompt, data)
    assert message is not None
    assert message["content"] == expected["content"]
    assert message["reasoning_content"] == expected["reasoning"]
    assert calls_of(message) == expected["calls"]
    for end in range(len(data)):
        assert stream(prompt, [data[:end]]) == whole(prompt, data[:end])


@settings(max_examples=60, deadline=None)
@given(data=st.data())
def test_random_texts_at_random_cuts(
    formats: dict[str, _core.ChatTemplates], data: st.DataObject
) -> None:
    """Text made of the pieces of a format, valid or not, and of bytes that are no UTF-8."""
    name = data.draw(st.sampled_from(sorted({name for name, _, _ in OUTPUTS.values()})))
    pieces = [
        *(
            "<tool_call>",
            "</tool_call>",
            "\n",
            " ",
            "<think>",
            "</think>",
            "<function=get>\n",
            "{",
            "}",
        ),
        *(
            '{"name": "get", "arguments": {"key": "',
            '"}}',
            "get",
            "get_weather",
            "\\",
            '"',
            "ü",
            "🦀",
        ),
        *(
            "<parameter=key>\n",
            "\n</parameter>\n",
            "<|channel|>",
            "final",
            "<|message|>",
            "<",
            "word",
        ),
    ]
    chosen = data.draw(st.lists(st.sampled_from(pieces), max_size=12))
    raw = "".join(chosen).encode() + data.draw(
        st.sampled_from([b"", b"\xff", b"\xc3", b"\xe2\x82"])
    )
    prompt = render(formats[name], [{"role": "user", "content": "Go"}])
    expected = whole(prompt, raw)
    marks = sorted(data.draw(st.lists(st.integers(0, len(raw)), max_size=6)))
    parts = [raw[a:b] for a, b in zip([0, *marks], [*marks, len(raw)], strict=True)]
    try:
        assert stream(prompt, parts) == expected
    except errors.ChatParseError:
        # Either it is no output of the format, or what was told has been taken back at the end.
        if expected is not None:
            first = _core.ChatParser(prompt)
            told = assemble([delta for part in parts for delta in first.push(part)])
            assert told != expected
            assert any(told.values())


def test_thinking_is_content_when_it_is_not_to_be_extracted(
    formats: dict[str, _core.ChatTemplates],
) -> None:
    output = b"<think>Hm.</think>4"
    prompt = render(
        formats["Qwen-Qwen3-0.6B"], [{"role": "user", "content": "Go"}], reasoning_format="none"
    )
    assert check(prompt, output) == {
        "content": "<think>Hm.</think>4",
        "reasoning_content": "",
        "tool_calls": [],
    }


def test_the_beginning_that_a_prompt_continues_is_not_told(
    formats: dict[str, _core.ChatTemplates],
) -> None:
    messages = [{"role": "user", "content": "Count"}, {"role": "assistant", "content": "One, "}]
    prompt = render(
        formats["Qwen-Qwen2.5-7B-Instruct"],
        messages,
        tools=None,
        continue_final_message="content",
        add_generation_prompt=False,
    )
    assert prompt.text.endswith("One, ")
    parser = _core.ChatParser(prompt)
    assert parser.push("two") == [{"content": "two"}]
    assert parser.finish() == []
    assert parser.message["content"] == "One, two"


def test_a_grammar_of_required_calls_names_the_tools(
    formats: dict[str, _core.ChatTemplates],
) -> None:
    prompt = render(
        formats["Qwen-Qwen2.5-7B-Instruct"],
        [{"role": "user", "content": "Go"}],
        tool_choice="required",
    )
    assert not prompt.grammar_lazy
    assert "get_weather" in prompt.grammar
    lazy = render(formats["Qwen-Qwen2.5-7B-Instruct"], [{"role": "user", "content": "Go"}])
    assert lazy.grammar_lazy
    assert ("word", "<tool_call>\n", None) in lazy.grammar_triggers


def test_an_output_out_of_format_is_an_error_in_both(
    formats: dict[str, _core.ChatTemplates],
) -> None:
    prompt = render(
        formats["meta-llama-Llama-3.1-8B-Instruct"], [{"role": "user", "content": "Go"}]
    )
    output = '{"name": "unknown_tool", "parameters": {}}'
    with pytest.raises(errors.ChatParseError, match="not in the format"):
        prompt.parse(output)
    parser = _core.ChatParser(prompt)
    assert parser.push(output) == []
    with pytest.raises(errors.ChatParseError, match="not in the format"):
        parser.finish()


def test_an_output_that_nests_too_deep_is_refused(
    formats: dict[str, _core.ChatTemplates],
) -> None:
    """llama-common's parser follows nesting down the stack."""
    prompt = render(formats["Qwen-Qwen2.5-7B-Instruct"], [{"role": "user", "content": "Go"}])
    output = '<tool_call>\n{"name": "get", "arguments": {"key": ' + "[" * 100_000
    with pytest.raises(errors.ChatParseError, match="too deep"):
        prompt.parse(output)
    parser = _core.ChatParser(prompt)
    parser.push(output[:100])
    with pytest.raises(errors.ChatParseError, match="too deep"):
        parser.push(output[100:])


def test_long_arguments_come_in_time(formats: dict[str, _core.ChatTemplates]) -> None:
    """Pieces of long arguments are told together, but never far behind."""
    prompt = render(formats["Qwen3-Coder"], [{"role": "user", "content": "Go"}])
    parser = _core.ChatParser(prompt)
    parser.push("<tool_call>\n<function=get>\n<parameter=key>\n")
    rng = random.Random(1)
    text = "".join(rng.choice('abc def\n"\\') for _ in range(20_000)).rstrip("\n")
    behind = 0
    for i in range(0, len(text), 4):
        parser.push(text[i : i + 4])
        told = parser.message["tool_calls"][0]["arguments"].removeprefix('{"key":"')
        behind = max(behind, len(json.dumps(text[: i + 4])) - 2 - len(told))
    parser.push("\n</parameter>\n</function>\n</tool_call>")
    parser.finish()
    assert calls_of(dict(parser.message)) == [("get", {"key": text})]
    assert behind < 200


@pytest.mark.parametrize("name", ["Qwen-Qwen3-0.6B", "google-gemma-4-31B-it"])
def test_long_texts_are_told_in_pieces_that_grow(
    formats: dict[str, _core.ChatTemplates], name: str
) -> None:
    """Each look at a message costs as much as it is long."""
    prompt = render(formats[name], [{"role": "user", "content": "Go"}], tools=None)
    parser = _core.ChatParser(prompt)
    parser.push("<think>\n\n</think>\n\n" if name.startswith("Qwen") else "")
    n_deltas = {0: 0, 32: 0, 256: 0}
    total = behind = 0
    for size in n_deltas:
        total += len("word" * 256 * size)
        parser.push("word" * 256 * size)
        for _ in range(300):
            n_deltas[size] += len(parser.push("word"))
            total += 4
            behind = max(behind, total - len(parser.message["content"]))
    parser.finish()
    assert parser.message["content"] == "word" * (total // 4)
    assert n_deltas[0] >= 298  # what may begin a tag is held back
    assert 50 < n_deltas[32] < 100
    assert 5 < n_deltas[256] < 20
    assert behind < 300


def test_many_calls_are_told_in_pieces_that_grow(
    formats: dict[str, _core.ChatTemplates],
) -> None:
    prompt = render(formats["Qwen-Qwen2.5-7B-Instruct"], [{"role": "user", "content": "Go"}])
    parser = _core.ChatParser(prompt)
    n_deltas = []
    for i in range(300):
        call = f'<tool_call>\n{{"name": "get", "arguments": {{"key": "{i}"}}}}\n</tool_call>\n'
        n_deltas.append(sum(len(parser.push(piece)) for piece in call))
    parser.finish()
    assert calls_of(dict(parser.message)) == [("get", {"key": str(i)}) for i in range(300)]
    assert min(n_deltas[:5]) > 5
    assert max(n_deltas[-5:]) < 5


def test_parsers_are_made_of_prompts_alone() -> None:
    with pytest.raises(TypeError):
        _core.ChatParser(None)  # type: ignore[arg-type]
    with pytest.raises(TypeError, match="render"):
        _core.ChatPrompt()
    empty = _core.ChatPrompt.__new__(_core.ChatPrompt)
    with pytest.raises(errors.ClosedError):
        _core.ChatParser(empty)
    with pytest.raises(errors.ClosedError):
        empty.text  # noqa: B018
